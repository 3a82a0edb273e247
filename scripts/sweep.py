"""Train a recipe with several values of its knobs, on one base if possible.

    python scripts/sweep.py --config configs/dpo.py --over beta=0.05,0.1,0.2 --over lr=5e-5,2e-4
    python scripts/sweep.py --config configs/dpo.py --over loss=dpo,ipo --over seed=0,1,2
    python scripts/sweep.py --config configs/sft.py --over rank=4,16,64 --name ranks epochs=1

Every combination is a run with its own adapter, optimizer, clipping, log and PEFT export in
runs/<name>/<knob=value,...>/. If only objective, optimizer, seed and adapter rank differ, the base is in
memory once and the reference runs once; each run has the same result as with scripts/train.py alone. Other
runs, such as batch=4,8, and runs that sample completions are trained one after the other. All hold out the
same rows; runs that differ only in seeds are one setting, with mean and spread. The best one is named with
its interval. Common settings follow as knob=value or section.field=value. The same command resumes a stopped
sweep. SIGTERM or Ctrl-C finishes the step, saves and exits with code 143 or 130.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

MAX_RUNS = 64  # more than this is most likely a mistake


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.cli.cli import COUNT, CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument(
        "--config", metavar="RECIPE", help="a recipe such as sft, or a file with config(...) -> Run"
    )
    parser.add_argument(
        "--over", action="append", required=True, metavar="KNOB=A,B,...", help="a knob and its values"
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="combine the n-th values of all knobs instead of every combination",
    )
    parser.add_argument("--name", help="the sweep's folder in runs/, or name= (default: <config>-<knobs>)")
    parser.add_argument(
        "--at-once",
        type=COUNT,
        help="adapters per forward pass, a divisor of their number (default 1); only for runs in one program",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the runs with their settings, and end")
    parser.add_argument(
        "overrides", nargs="*", help="the recipe, then knob=value or section.field=value for all runs"
    )
    return parser


def values(over: list[str], together: bool) -> list[list[str]]:
    """Return the overrides of each run, a list of `knob=value`. over: the values of --over. together: pair
    the first values of all knobs, the second ones, and so on. Raises ValueError for a knob or value given
    twice.
    """
    knobs: dict[str, list[str]] = {}
    for text in over:
        knob, equals, given = text.partition("=")
        if not equals or not knob:
            raise ValueError(f"--over {text}: expected knob=a,b,... such as beta=0.05,0.1")
        if knob in knobs:
            raise ValueError(f"--over {knob} is given twice; put all its values into one --over")
        knobs[knob] = given.split(",")
        compared = [_comparable(value) for value in knobs[knob]]
        for number, value in enumerate(knobs[knob]):
            if compared[number] in compared[:number]:
                raise ValueError(f"--over {text}: the value {value} is listed twice; list each value once")
    if together and len({len(v) for v in knobs.values()}) > 1:
        counts = ", ".join(f"{len(v)} ({k})" for k, v in knobs.items())
        raise ValueError(f"--together: the knobs have {counts} values; use the same number for all")
    rows = zip(*knobs.values(), strict=True) if together else itertools.product(*knobs.values())
    settings = [[f"{knob}={value}" for knob, value in zip(knobs, row, strict=True)] for row in rows]
    if len(settings) > MAX_RUNS:
        raise ValueError(
            f"{len(settings)} runs exceed the maximum of {MAX_RUNS}; use fewer values or --together"
        )
    return settings


def _comparable(value: str) -> float | str:
    """Return a text as a number if it is one, so that 0.1 and 0.10 are equal; else the text, stripped."""
    try:
        return float(value)
    except ValueError:
        return value.strip()


def label_of(row: list[str]) -> str:
    """Return the name of a run, such as beta=0.1,lr=5e-5. row: its overrides."""
    return re.sub(r"[^\w.=+,-]+", "-", ",".join(row))


def sweep_name(option: str | None, overrides: list[str]) -> tuple[str | None, list[str]]:
    """Return (name of the sweep, None if it has none; overrides without name=). option: the value of --name.
    Raises ValueError if --name and name= differ.
    """
    named = [text for text in overrides if text.startswith(("name=", "run.name="))]
    given = [*([option] if option else []), *(text.partition("=")[2] for text in named)]
    if len(set(given)) > 1:
        raise ValueError(f"the sweep has two names, {' and '.join(given)}; give one")
    return next(iter(given), None), [text for text in overrides if text not in named]


def lines_of_runs(about: Mapping[str, list[str]]) -> list[str]:
    """Merge lines about runs into one list: the lines alone if all runs have the same, else each line after
    its run's label. about: label -> lines.
    """
    first, *others = about.values()
    if all(lines == first for lines in others):
        return first
    return [f"{label}: {line}" for label, lines in about.items() for line in lines]


def main() -> int:
    """Load the config once for each combination and train them together."""
    args = make_parser().parse_intermixed_args()
    from dataclasses import replace

    from jaxft.cli import cli
    from jaxft.distributed import processes
    from jaxft.train.logs.clock import Clock
    from jaxft.train.loop import train_sweep
    from jaxft.train.start import open_settings

    processes.require_single_process("a sweep")
    clock = Clock()
    recipe, overrides = cli.recipe_and_overrides(args.config, args.overrides)
    rows = values(args.over, args.together)
    given, overrides = sweep_name(args.name, overrides)
    name = given or "-".join([Path(recipe).stem, *dict.fromkeys(o.partition("=")[0] for o in rows[0])])
    runs, about = {}, dict[str, list[str]]()
    for row in rows:
        label, settings = label_of(row), open_settings.resolve(recipe, [*overrides, *row])
        named = replace(settings, value=replace(settings.value, name=f"{name}/{label}"))
        fitted, about[label] = open_settings.fitted(named)
        runs[label] = replace(fitted.value, name=f"{name}/{label}")
    for line in lines_of_runs(about):
        print(line, flush=True)
    if args.dry_run:
        for label, row in zip(runs, rows, strict=True):
            print(f"runs/{name}/{label}: {' '.join([*overrides, *row])}")
        return 0
    return train_sweep(name, runs, args.at_once, clock=clock)


if __name__ == "__main__":
    from jaxft.distributed import exit, xla_flags
    from jaxft.runs import terminal

    xla_flags.restart()
    exit.accept_interrupts()
    terminal.quiet()
    terminal.outlive_console()
    sys.exit(terminal.one_line_errors(main))
