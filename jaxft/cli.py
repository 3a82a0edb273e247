"""What every script shares at its edge: one clear line for a user's mistake, and the compilation cache."""

import os
import sys
import traceback
from collections.abc import Callable


def one_line_errors(main: Callable[[], int]) -> int:
    """Run `main`; a user's error becomes one line on stderr and exit code 1. JAXFT_TRACEBACK=1 shows the traceback."""
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("JAXFT_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
