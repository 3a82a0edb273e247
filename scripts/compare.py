"""Finished or running runs side by side: a table of where each stands, and their curves in one picture.

    python scripts/compare.py runs/a runs/b runs/c
    python scripts/compare.py runs/grpo-0 runs/grpo-1 --out grpo --title "GRPO, two seeds"    # grpo.png and grpo.json

The numbers are those of each run's metrics.jsonl at its first and last look at the held-out rows.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument(
        "--out", type=Path, help="where OUT.png and OUT.json go (default: only the table is printed)"
    )
    parser.add_argument("--title", default="", help="above the picture")
    return parser.parse_args()


def looks(entries: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """The held-out numbers of the first and the last look, and the last step's own."""
    held = [e for e in entries if any(name.startswith("eval_") for name in e)]
    own = [e for e in entries if "perf" in e and not any(name.startswith("eval_") for name in e)]
    last = {
        name: x
        for name, x in (own[-1] if own else {}).items()
        if isinstance(x, int | float) and name != "step"
    }
    return (held[0] if held else {}), {**last, **(held[-1] if held else {})}


def main() -> int:
    """Read, print, draw."""
    from jaxft.runs import compare
    from jaxft.runs.trackers.jsonl import read_entries

    args = arguments()
    missing = next((run for run in args.runs if not (run / "metrics.jsonl").is_file()), None)
    if missing:
        raise ValueError(f"{missing}: holds no metrics.jsonl; name the folder of a run, such as runs/sft")
    entries = {run.name: read_entries(run / "metrics.jsonl") for run in args.runs}
    if len(entries) < len(args.runs):
        raise ValueError(
            f"two of the runs have the same name, found {', '.join(run.name for run in args.runs)}; rename one"
        )
    empty = next((name for name, lines in entries.items() if not lines), None)
    if empty:
        raise ValueError(f"{empty}: its metrics.jsonl is empty so far; wait for its first step")
    sides = [looks(lines) for lines in entries.values()]
    table = compare.Table.of(tuple(entries), [before for before, _ in sides], [after for _, after in sides])
    print(table.text())
    if args.out:
        compare.draw(args.out.with_suffix(".png"), compare.panels(entries), args.title)
        told = {
            "runs": table.as_json(),
            "curves": {name: [_numbers(e) for e in lines] for name, lines in entries.items()},
        }
        args.out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 0


def _numbers(entry: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl with what is drawn of it."""
    from jaxft.runs import compare

    drawn = {name for _, _, names in compare.CURVES for name in names} | {
        name for _, _, name in compare.ROLLOUTS
    }
    return {name: x for name, x in entry.items() if name == "step" or name.removeprefix("eval_") in drawn}


if __name__ == "__main__":
    from jaxft.runs import cli

    cli.quiet()
    sys.exit(cli.one_line_errors(main))
