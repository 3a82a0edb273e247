"""Measure the start of a run: seconds from its launch to its first step, by phase.

    python scripts/bench/bench_start.py [--rounds 3] [--root CLONE ...] [recipe] [knob=value ...]
    python scripts/bench/bench_start.py --imports

The recipe is sft by default. A cold start has no compiled programs and no tokenised rows in its cache, only
the model's file; a warm one has both. `evaluation` is the time of the evaluation before the first step, which
completes the held-out prompts of the recipe and is not part of `start`. Each --root, a clone
of jaxft, is measured in turn, so that two commits are compared on the same machine; the default is this one.
Each phase has two numbers: seconds, and seconds of CPU time of all threads, which other programs on the
machine change little.
--imports lists what `import jaxft.train.loop` imports, by seconds.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
COMPILED = re.compile(r"compiled in (?:(\d+) min )?([\d.]+) s")
STEP = re.compile(r"step +(\d+)")
Phases = dict[str, np.ndarray]  # seconds and CPU seconds by phase


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="warm starts of each clone (default 3)")
    parser.add_argument("--root", type=Path, nargs="+", default=[ROOT], help="clones to compare")
    parser.add_argument("--imports", action="store_true", help="list the imports of the train loop")
    parser.add_argument("overrides", nargs="*", default=["sft"], help="the recipe, then knob=value")
    return parser.parse_args()


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, its ended children and all their threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def phases(root: Path, overrides: list[str], cache: Path) -> Phases:
    """Start a run, stop it after its first step, and return seconds and CPU seconds of each phase."""
    command = [sys.executable, str(root / "scripts" / "train.py"), *overrides]
    at: dict[str, np.ndarray] = {}  # wall and CPU time at which a line was printed
    compilation = 0.0
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "JAXFT_CACHE": str(cache)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            now = np.array([time.perf_counter() - begin, cpu_seconds(process.pid)])
            at.setdefault("header", now)
            if match := COMPILED.search(line):
                compilation, at["compiled"] = 60 * int(match[1] or 0) + float(match[2]), now
            elif match := STEP.match(line.strip()):
                at[match[1]] = now
                if match[1] == "1":
                    break
        process.kill()
        process.wait()
    if "1" not in at:
        raise SystemExit(f"error: {' '.join(command)} ended before its first step; run it to see its error")
    evaluation = at.get("0", at["compiled"]) - at["compiled"]
    return {
        "imports, settings, rows": at["header"],
        "weights, compilation": at["compiled"] - at["header"],
        "of which compilation": np.array([compilation, np.nan]),
        "evaluation": evaluation,
        "first step": at["1"] - at["compiled"] - evaluation,
        "start": at["1"] - evaluation,
    }


def report(kind: str, root: Path, starts: list[Phases]) -> None:
    """Print the medians of some starts: a line for each phase with its seconds and CPU seconds."""
    print(f"{kind} start of {root}, median of {len(starts)}:")
    for name in starts[0]:
        wall, cpu = np.median([start[name] for start in starts], axis=0)
        print(f"  {name:24s} {wall:7.2f} s" + ("" if np.isnan(cpu) else f"  CPU {cpu:7.2f} s"), flush=True)


def list_imports() -> None:
    """Print the packages that the train loop imports, by seconds."""
    code = "import jaxft.train.loop"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds: dict[str, int] = {}
    for line in done.stderr.splitlines():
        parts = [part.strip() for part in line.removeprefix("import time:").split("|")]
        if len(parts) == 3 and parts[0].isdigit():
            package = parts[2].split(".")[0]
            seconds[package] = seconds.get(package, 0) + int(parts[0])
    for package, micros in sorted(seconds.items(), key=lambda item: -item[1])[:25]:
        print(f"{micros / 1e6:7.3f} s  {package}")
    print(f"{sum(seconds.values()) / 1e6:7.3f} s  in all")


def main() -> int:
    """Measure, and print a line for each kind of start of each clone."""
    args = arguments()
    if args.imports:
        list_imports()
        return 0
    models = Path(os.environ.get("JAXFT_CACHE") or "~/.cache/jaxft").expanduser() / "pypi"
    with tempfile.TemporaryDirectory() as folder:
        caches = [Path(folder, str(number)) for number in range(len(args.root))]
        for root, cache in zip(args.root, caches, strict=True):
            cache.mkdir()
            if models.is_dir():
                (cache / "pypi").symlink_to(models)
            report("cold", root, [phases(root, args.overrides, cache)])
        warm: list[list[Phases]] = [[] for _ in args.root]
        for _ in range(args.rounds):
            for root, cache, root_starts in zip(args.root, caches, warm, strict=True):
                root_starts.append(phases(root, args.overrides, cache))
        for root, root_starts in zip(args.root, warm, strict=True):
            report("warm", root, root_starts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
