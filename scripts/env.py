"""Print what a bug report needs: versions, flags, devices, memory and kernels.

    jaxft env
    jaxft env --json

Include the output in bug reports. It contains no access tokens, and no paths except those in XLA's flags.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.cli.cli import CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main() -> int:
    """Print the facts, one per line."""
    args = make_parser().parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a run may need the GPU's memory
    from jaxft.runs.versions_and_devices import bug_report, report_lines

    report = bug_report()
    print(json.dumps(report) if args.json else "\n".join(report_lines(report)))
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
