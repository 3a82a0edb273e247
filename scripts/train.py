"""Train a recipe, or resume it: the same command resumes a stopped run.

    python scripts/train.py --config configs/sft.py [knob=value ...] [section.field=value ...]
    python scripts/train.py sft data=rows.jsonl          # the same recipe, by its name
    python scripts/train.py sft --help                   # its knobs

SIGTERM, Ctrl-C or SIGHUP finishes the step, saves and exits with code 143, 130 or 129; a second one exits
immediately. JAXFT_TRACEBACK=1 prints the traceback of errors. `loop.profile=10:15` profiles steps 10 to 15.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.cli.cli import CommandParser

    parser = CommandParser(__doc__, add_help=False)
    parser.add_argument(
        "--config", metavar="RECIPE", help="a recipe such as sft, or a Python file with config(...) -> Run"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print settings, parameters and planned memory, then exit"
    )
    parser.add_argument("--json", action="store_true", help="with --dry-run: print one JSON object instead")
    parser.add_argument(
        "-h", "--help", action="store_true", help="print this help, and with a recipe its knobs"
    )
    parser.add_argument("overrides", nargs="*", help="the recipe, then knob=value or section.field=value")
    return parser


def main() -> int:
    """Parse the command line, load the config, and train."""
    from jaxft.cli import cli

    parser = make_parser()
    args = parser.parse_intermixed_args()
    if args.help:
        knobs = ""
        if args.config or args.overrides:
            from jaxft.runs.settings.settings_list import help_text, settings_of
            from jaxft.train.settings import Run

            recipe, _ = cli.recipe_and_overrides(args.config, args.overrides)
            knobs = f"\n{help_text(recipe, settings_of(Run))}\n"
        print(parser.format_help() + knobs, end="")
        return 0
    recipe, overrides = cli.recipe_and_overrides(args.config, args.overrides)

    from jaxft.distributed import processes
    from jaxft.distributed.sync import is_first
    from jaxft.runs import terminal
    from jaxft.train import loop
    from jaxft.train.logs.clock import Clock
    from jaxft.train.start import open_settings

    if args.dry_run:
        from jaxft.plan import plan_report
        from jaxft.runs.settings import config
        from jaxft.runs.trackers import check_trackers
        from jaxft.train.recipes import without_model_weights
        from jaxft.train.start.jobs import run_folder

        with without_model_weights():
            settings, lines = open_settings.fitted_here(open_settings.resolve(recipe, overrides))
            run = settings.value
            run_folder(run, Path("runs"))  # raises ValueError for a name that cannot be a folder's
            check_trackers(run.trackers)
            planned = plan_report.dry_run(settings, config.recipe_defaults(recipe), lines)
            print(plan_report.dry_run_json(planned) if args.json else plan_report.dry_run_text(planned))
        return 0
    if args.json:
        parser.error("--json is the format of --dry-run; add that, or leave --json out")
    clock, settings = Clock(), open_settings.resolve(recipe, overrides)
    with processes.started(settings.value.hosts, terminal.print_error):
        settings, lines = open_settings.fitted(settings)
        for line in lines if is_first() else ():
            print(line, flush=True)
        return loop.run(settings.value, settings.describe(), clock=clock)


if __name__ == "__main__":
    from jaxft.distributed import exit, xla_flags
    from jaxft.runs import terminal

    xla_flags.restart()
    exit.accept_interrupts()
    terminal.quiet()
    terminal.outlive_console()
    sys.exit(terminal.one_line_errors(main))
