"""`python -m jaxft` is the command `jaxft`."""

import sys

from jaxft.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
