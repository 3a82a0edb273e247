"""Train: `python scripts/train.py --config configs/sft.py [knob=value ...] [section.field=value ...]`.

The same command resumes a stopped run. SIGTERM, Ctrl-C or SIGHUP finishes the step, saves and exits with code
143, 130 or 129; a second one exits immediately. JAXFT_TRACEBACK=1 prints the traceback of errors.
`loop.profile=10:15` profiles steps 10 to 15.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", help="a Python file with a function config(...) -> Run, such as configs/sft.py"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print settings, parameters and planned memory, then exit"
    )
    parser.add_argument(
        "-h", "--help", action="store_true", help="print this help, and with --config the config's knobs"
    )
    parser.add_argument("overrides", nargs="*", help="knob=value or section.field=value")
    return parser


def main() -> int:
    """Parse the command line, load the config, and train."""
    parser = arguments()
    args = parser.parse_intermixed_args()
    if args.help or not args.config:
        parser.print_help()
        if args.config:
            from jaxft.runs.config import help_text

            print("\n" + help_text(args.config))
        return 0 if args.help else 2

    from jaxft.distributed import processes
    from jaxft.runs import cli, config
    from jaxft.train import loop
    from jaxft.train.settings import Run

    settings = config.resolve_config(args.config, args.overrides, expected=Run)
    run, record = settings.value, settings.describe()
    if args.dry_run:
        from jaxft.plan import text

        print(text.dry_run(run, record))
        return 0
    with processes.started(run.hosts, cli.print_error):
        return loop.run(run, record)


if __name__ == "__main__":
    from jaxft.runs import cli, streams

    cli.quiet()
    streams.outlive_console()
    sys.exit(cli.one_line_errors(main))
