"""Compare runs: a table of their metrics, intervals of their differences, and curves in a picture.

    python scripts/compare.py runs/a runs/b runs/c
    python scripts/compare.py runs/dpo-beta-seed                    # a sweep, with all of its members
    python scripts/compare.py runs/grpo-0 runs/grpo-1 --out grpo --title "GRPO, two seeds"

The metrics are from each run's metrics.jsonl, at the first and the last evaluation of the held-out rows.
Runs that differ in nothing but seeds are one setting, with mean and standard deviation. The best run or
setting is named, and how far the others are behind, with 95 % intervals: over the seeds, or on the same
held-out rows. Files that a pattern such as runs/seeds/* also matches are skipped.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.cli.cli import CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument("runs", nargs="+", help="folders of runs or sweeps")
    parser.add_argument("--out", type=Path, help="write OUT.png and OUT.json (default: only print the table)")
    parser.add_argument("--title", default="", help="the title of the picture")
    return parser


def main() -> int:
    """Read the metrics of all runs, print the table, and plot the curves."""
    from jaxft.objectives.metrics import HELD_OUT
    from jaxft.report import charts, ranking
    from jaxft.report.run_files import folders_of_runs, runs_among
    from jaxft.runs.folder_copies import local_folder
    from jaxft.runs.metrics_log import read_entries

    args = make_parser().parse_args()
    runs, others = runs_among([local_folder(run) for run in args.runs])
    if others:
        print(f"skipped, not runs: {', '.join(map(str, others))}", file=sys.stderr)
    folders = folders_of_runs(runs)
    entries = {name: read_entries(folder / "metrics.jsonl") for name, folder in folders.items()}
    empty = next((name for name, lines in entries.items() if not lines), None)
    if empty:
        raise ValueError(f"{empty}: metrics.jsonl is empty; wait for the first step")
    results = [ranking.read_result(name, folder) for name, folder in folders.items()]
    table = ranking.table_of(results)
    print("\n\n".join(ranking.texts(results)))
    if args.out:
        charts.draw(args.out.with_suffix(".png"), charts.comparison_panels(entries), args.title)
        drawn = {"step", *charts.compared_metrics(entries)}
        curves = {
            name: [{key: x for key, x in e.items() if key.removeprefix(HELD_OUT) in drawn} for e in lines]
            for name, lines in entries.items()
        }
        comparison = {"runs": table.as_json(), "ranking": ranking.ranking_lines(results), "curves": curves}
        text = json.dumps(comparison, indent=1)
        args.out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
