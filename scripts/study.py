"""Compare preference losses in a declared study: the same rows, seeds and number of trials for each.

    python scripts/study.py study.py
    python scripts/study.py study.py --dry-run          # check the declaration and print the plan
    python scripts/study.py runs/four-losses --report   # write page and tables of a finished study again

The file has a function `study() -> Study` (jaxft/lab/studies/study.py has an example): losses with the
values of their knobs to search, a recipe, learning rates, seeds. Before anything is trained, it is written to
runs/<name>/declaration.json with hashes of the rows, the losses and the versions; a study that has changed
since then is refused. Each loss has the same number of trials, of which successive halving trains the best
longer; the best setting is trained with every seed. Losses are compared on held-out prompts that selected
nothing, paired by prompt and seed. The same command continues a stopped study. At the end report.html is the
appendix of a paper, and tables/ has its tables as LaTeX and CSV.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.cli.cli import CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument(
        "study", help="a Python file with study() -> Study, or the folder of a finished study"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the trials and the plan, and end")
    parser.add_argument("--report", action="store_true", help="only write the results of a finished study")
    return parser


def main() -> int:
    """Load the study, and run or continue it."""
    args = make_parser().parse_args()
    from jaxft.distributed import processes
    from jaxft.lab.studies.halving import run_study
    from jaxft.lab.studies.study import load_study
    from jaxft.train.logs.clock import Clock

    processes.require_single_process("a study")
    clock = Clock()
    if Path(args.study).is_dir():
        return show_results(Path(args.study))
    study, file = load_study(args.study)
    if args.dry_run:
        for label in study.losses:
            for trial in study.trials_of(label):
                print(f"{label} {trial.number}: {trial}")
        print(f"{study.steps_per_loss} optimizer steps for each loss")
        return 0
    folder = Path("runs") / study.name
    code = 0 if args.report else run_study(study, file, clock=clock)
    return code or show_results(folder)


def show_results(folder: Path) -> int:
    """Print the conclusions of a finished study, and write its page and tables."""
    from jaxft.lab.studies.appendix import REPORT, TABLES, write_appendix
    from jaxft.lab.studies.study_results import read_study

    study = read_study(folder)
    write_appendix(study)
    print("\n".join(study.lines()))
    print(f"the page is {folder / REPORT}, the tables are in {folder / TABLES}")
    return 0


if __name__ == "__main__":
    from jaxft.distributed import xla_flags
    from jaxft.distributed.exit import accept_interrupts
    from jaxft.runs import terminal

    xla_flags.restart()
    accept_interrupts()
    terminal.quiet()
    terminal.outlive_console()
    sys.exit(terminal.one_line_errors(main))
