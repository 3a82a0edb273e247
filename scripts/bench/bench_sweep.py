"""Compare the time of scripts/sweep.py with scripts/train.py run once per member, as one JSON line.

    python scripts/bench/bench_sweep.py --config configs/dpo.py --over beta=0.05,0.1,0.2 [--alone 2]

`whole` is the sweep command's time divided by the time of all single runs. Only the first --alone members
are run singly (half of them before the sweep, half after), and their mean is used for the others. `step` is
the ratio of the sweep's median step time to the time of as many single steps. Peaks are the processes' memory
peaks, reported by the operating system.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a Python file with a function config(...) -> Run")
    parser.add_argument("--over", required=True, metavar="KNOB=A,B,...", help="a knob and its values")
    parser.add_argument("--alone", type=int, default=2, help="members to run singly (default 2)")
    parser.add_argument("--at-once", type=int, default=1, help="--at-once of scripts/sweep.py (default 1)")
    parser.add_argument("overrides", nargs="*", help="knob=value or section.field=value, for all runs")
    return parser.parse_intermixed_args()


def timed(*command: str) -> tuple[float, float]:
    """Return (seconds, peak GiB) of a command. Raises RuntimeError with the end of its output if it fails."""
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read().decode(errors="replace")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {process.returncode}: {output[-400:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - begin, usage.ru_maxrss * unit / 2**30


def step_seconds(metrics: Path) -> list[float]:
    """Return the seconds of every step except the first two."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line["perf"]["seconds"] for line in lines if "seconds" in line.get("perf", {})][2:]


def main() -> int:
    """Run the commands and print the ratios."""
    a = arguments()
    knob, _, text = a.over.partition("=")
    values = text.split(",")
    if not 1 <= a.alone <= len(values):
        raise SystemExit(
            f"error: --alone must be from 1 to {len(values)}, the number of values of {knob}; got {a.alone}"
        )
    common = ["--config", a.config, *a.overrides]
    single: list[tuple[float, float]] = []
    steps: list[float] = []
    name = f"bench-sweep-{os.getpid()}"  # in runs/ of the working directory, removed at the end
    folder = Path("runs") / name

    def alone(number: int) -> None:
        given = (f"{knob}={values[number]}", f"name={name}/alone-{number}")
        single.append(timed(str(ROOT / "scripts/train.py"), *common, *given))
        steps.extend(step_seconds(folder / f"alone-{number}/metrics.jsonl"))
        print(
            f"alone, {given[0]}: {single[-1][0]:.0f} s, {single[-1][1]:.2f} GiB", file=sys.stderr, flush=True
        )

    try:
        half = (a.alone + 1) // 2
        for number in range(half):
            alone(number)
        flags = ["--over", a.over, "--name", f"{name}/all", "--at-once", str(a.at_once)]
        together = timed(str(ROOT / "scripts/sweep.py"), *common, *flags)
        print(f"together: {together[0]:.0f} s, {together[1]:.2f} GiB", file=sys.stderr, flush=True)
        for number in range(half, a.alone):
            alone(number)
        sweep_steps = step_seconds(folder / "all/metrics.jsonl")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(_result(len(values), (single, steps), (together, sweep_steps))))
    return 0


def _result(
    count: int, alone: tuple[list[tuple[float, float]], list[float]], all_: tuple[Any, list[float]]
) -> dict[str, Any]:
    seconds = statistics.mean(s for s, _ in alone[0])
    alone_seconds, many = statistics.median(alone[1]), statistics.median(all_[1])
    return {
        "members": count,
        "whole": round(all_[0][0] / (count * seconds), 3),
        "step": round(many / (count * alone_seconds), 3),
        "seconds_together": round(all_[0][0], 1),
        "seconds_alone": [round(s, 1) for s, _ in alone[0]],
        "step_seconds_together": round(many, 3),
        "step_seconds_alone": round(alone_seconds, 3),
        "peak_gib_together": round(all_[0][1], 2),
        "peak_gib_alone": round(max(g for _, g in alone[0]), 2),
    }


if __name__ == "__main__":
    sys.exit(main())
