"""Write runs as one HTML page: curves, comparison, settings, samples, data and parameters.

    python scripts/report.py runs/sft
    python scripts/report.py runs/dpo runs/ipo --out dpo_or_ipo.html --title "DPO or IPO"
    python scripts/report.py runs/dpo-beta                               # a sweep, with all of its members

The page is a single file that loads nothing from any network, so it can be mailed or kept. The runs may be
finished or running. Without --out it is report.html in the folder of the run or sweep, or in the working
directory for several runs or a run in an object store.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.cli.cli import CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument("runs", nargs="+", help="folders of runs or sweeps")
    parser.add_argument("--out", type=Path, help="the file to write (default: report.html, see above)")
    parser.add_argument("--title", default="", help="the title of the page (default: the names of the runs)")
    return parser


def main() -> int:
    """Write the page and print where it is."""
    from jaxft.report.document import write_report
    from jaxft.report.run_files import runs_among
    from jaxft.runs.folder_copies import is_fetched, local_folder

    args = make_parser().parse_args()
    runs, others = runs_among([local_folder(run) for run in args.runs])
    if others:
        print(f"skipped, not runs: {', '.join(map(str, others))}", file=sys.stderr)
    beside = len(runs) == 1 and not is_fetched(runs[0])
    out = args.out or (runs[0] if beside else Path()) / "report.html"
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name the file to write, such as {out / 'report.html'}")
    size = write_report(runs, out, args.title)
    print(f"{out}: {size / 1e6:.1f} MB; open it in a browser")
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
