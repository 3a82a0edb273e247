"""Train: `python scripts/train.py --config configs/sft.py [knob=value ...] [section.field=value ...]`."""

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def main() -> int:
    """Parse the command line, load the config, run it."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("--config", help="a Python file with a function config(...) -> Run, such as configs/sft.py")
    parser.add_argument("--dry-run", action="store_true", help="print the settings and the parameters, touch nothing else")
    parser.add_argument("-h", "--help", action="store_true", help="with --config, list the config's knobs too")
    parser.add_argument("overrides", nargs="*", help="knob=value or section.field=value")
    args = parser.parse_args()
    if args.help or not args.config:
        parser.print_help()
        if args.config:
            from jaxft.config import knobs

            print("\n" + knobs(args.config))
        return 0 if args.help else 2

    from jaxft import config, describe, train

    run = config.load(args.config, args.overrides)
    if args.dry_run:
        print(train.dry_run(run, describe.describe(run)))
        return 0
    return train.run(run, describe.describe(run))


if __name__ == "__main__":
    from jaxft.cli import one_line_errors

    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jaxft" / "xla"))
    sys.exit(one_line_errors(main))
