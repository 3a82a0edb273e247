"""Compare runs, finished or running: a table of their metrics, and their curves in one picture.

    python scripts/compare.py runs/a runs/b runs/c
    python scripts/compare.py runs/grpo-0 runs/grpo-1 --out grpo --title "GRPO, two seeds"

The metrics are those of each run's metrics.jsonl at the first and the last evaluation of the held-out rows.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.runs.cli import CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--out", type=Path, help="write OUT.png and OUT.json (default: only print the table)")
    parser.add_argument("--title", default="", help="the title of the picture")
    return parser


def main() -> int:
    """Read the metrics of all runs, print the table, and plot the curves."""
    from jaxft.runs import compare
    from jaxft.runs.fetched import local_folder
    from jaxft.runs.trackers.jsonl import Entry, read_entries

    def curve_metrics(entry: Entry) -> Entry:
        """Return an entry with only the metrics that the curves show."""
        return {name: value for name, value in entry.items() if name == "step" or compare.is_drawn(name)}

    args = make_parser().parse_args()
    runs = [local_folder(run) for run in args.runs]
    missing = next((run for run in runs if not (run / "metrics.jsonl").is_file()), None)
    if missing:
        raise ValueError(f"{missing}: has no metrics.jsonl; use the folder of a run, such as runs/sft")
    entries = {run.name: read_entries(run / "metrics.jsonl") for run in runs}
    if len(entries) < len(runs):
        names = ", ".join(run.name for run in runs)
        raise ValueError(f"two of the runs have the same name ({names}); rename one of the folders")
    empty = next((name for name, lines in entries.items() if not lines), None)
    if empty:
        raise ValueError(f"{empty}: metrics.jsonl is empty; wait for the first step")
    sides = [compare.first_and_last(lines) for lines in entries.values()]
    table = compare.Table.of(tuple(entries), [before for before, _ in sides], [after for _, after in sides])
    print(table.text())
    if args.out:
        compare.draw(args.out.with_suffix(".png"), compare.panels(entries), args.title)
        curves = {name: [curve_metrics(entry) for entry in lines] for name, lines in entries.items()}
        text = json.dumps({"runs": table.as_json(), "curves": curves}, indent=1)
        args.out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    from jaxft.runs import cli

    cli.quiet()
    sys.exit(cli.one_line_errors(main))
