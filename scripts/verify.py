"""Check that a run or a study is as it was written, and compute a step again to the bit.

    python scripts/verify.py runs/dpo
    python scripts/verify.py runs/dpo --step 20        # from the checkpoint before step 20, or from the start
    python scripts/verify.py runs/four-losses          # a study: declaration, log, files of all trials

Every line of metrics.jsonl has a digest in metrics_digests.jsonl that depends on all lines before it; at the
end of a run digests of its settings, versions, held-out values and summary follow. Weights and checkpoints
have hashes too. The last digest is printed: published with a paper, it fixes the whole record. Exit code 1 if
something has changed.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.cli.cli import COUNT, CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run or a study")
    parser.add_argument("--step", type=COUNT, help="repeat this step and compare metrics and state")
    return parser


def main() -> int:
    """Check the record, then the step."""
    args = make_parser().parse_args()
    from jaxft.lab.studies.halving import LEDGER
    from jaxft.lab.studies.verify import recompute_step, record_problems
    from jaxft.runs.metrics_log import METRICS, check_chain

    problems = list(record_problems(args.run))
    for problem in problems:
        print(f"changed: {problem}", flush=True)
    if problems:
        return 1
    log = args.run / (LEDGER if (args.run / LEDGER).is_file() else METRICS)
    digest = f"; last digest {check_chain(log)}" if log.is_file() else ""
    print(f"{args.run}: the record is as it was written{digest}", flush=True)
    if args.step is not None:
        for line in recompute_step(args.run, args.step):
            print(line)
    return 0


if __name__ == "__main__":
    from jaxft.distributed import xla_flags
    from jaxft.runs import terminal

    xla_flags.restart()
    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
