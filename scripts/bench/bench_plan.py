"""Compare plans with real train steps on this machine's device: one JSON line per case.

    python scripts/bench/bench_plan.py              # SmolLM2-135M: LoRA, QLoRA, full; minutes on a CPU
    python scripts/bench/bench_plan.py --cases lora full max_length=256 data.batch=2
    python scripts/bench/bench_plan.py --cases lora qlora model=meta-llama/Llama-3.1-8B-Instruct   # on a GPU
    python scripts/bench/bench_plan.py --config configs/llama31_8b_sft.py full=true batch=8   # any SFT config

Weights and rows are random, so nothing is loaded. Every case runs in a separate process. Overrides apply to
all cases.

`bytes`, per device: peak_bytes_in_use of a GPU or TPU. The CPU backend has no such counter; there it is
`held`, the exact size of the arrays between steps, plus `growth`, the median growth of the process during a
step, after the heap is trimmed. Growth differs from the planned temporaries by the scratch memory of matmul
libraries and the thread pool, by allocator granularity, and by parts of buffers that are never written.
`once` is the remaining growth of the process since before the weights were created: programs that initialise
arrays, compilation and libraries. It is part of every run and of no plan.

`seconds` is the median and `fastest` the minimum of the timed steps. On a CPU the rates of matmuls and memory
are measured first. `load` is the number of runnable processes per core at the end of the case; above 1,
`seconds_ratio` is not meaningful.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parents[2])

CASES = {
    "lora": ("configs/sft.py", []),
    "qlora": ("configs/sft.py", ["quant=nf4"]),
    "full": ("configs/sft_full.py", ["batch=1"]),
}
WARM, TIMED = 2, 5  # steps


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. An argument with = is an override, even after --cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--cases",
        nargs="+",
        default=list(CASES),
        metavar="CASE",
        help=f"any of {', '.join(CASES)} (default: all)",
    )
    what.add_argument("--config", help="a Python file with a function config(...) -> Run, instead of --cases")
    parser.add_argument("--here", action="store_true", help="run in this process")
    parser.add_argument("overrides", nargs="*", help="knob=value or section.field=value, for all cases")
    parsed = parser.parse_intermixed_args(argv)
    parsed.overrides = [*(text for text in parsed.cases if "=" in text), *parsed.overrides]
    parsed.cases = [name for name in parsed.cases if "=" not in name] or list(CASES)
    for name in parsed.cases:
        if name not in CASES:
            parser.error(f"argument --cases: no case {name!r}; use any of {', '.join(CASES)}")
    for text in parsed.overrides:
        if "=" not in text:
            parser.error(f"{text!r} is no override; use knob=value")
    return parsed


def commands(a: argparse.Namespace) -> list[list[str]]:
    """Return the arguments of the process of each case."""
    if a.config:
        return [["--here", "--config", a.config, *a.overrides]]
    return [["--here", "--cases", name, *a.overrides] for name in a.cases]


def random_batch(abstract: Any, vocab: int) -> Any:
    """Return random full rows with a loss on every token. Raises ValueError for batches other than SFT's."""
    from jaxft.batch import Tokens

    if not isinstance(abstract, Tokens):
        raise ValueError(f"{type(abstract).__name__}: only SFT batches are supported; use an SFT config")
    rng, (micro, rows, length) = np.random.default_rng(0), abstract.ids.shape
    ids = rng.integers(3, vocab, (2, micro, rows, length)).astype(np.int32)
    at = np.broadcast_to(np.arange(length, dtype=np.int32), (micro, rows, length))
    weights = np.full((micro, rows, length), 1 / (micro * rows * length), np.float32)
    tokens = np.ones((micro, rows, length), np.int32)
    return replace(
        abstract, ids=ids[0], segments=tokens, positions=at, read=at, targets=ids[1], token_weights=weights
    )


class Resident:
    """A thread that polls this process's resident memory and records the peak, in bytes."""

    def __init__(self) -> None:
        self.peak, self._open = self.now(), True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @staticmethod
    def now() -> int:
        """Return the current resident memory in bytes."""
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _watch(self) -> None:
        while self._open:
            self.peak = max(self.peak, self.now())
            time.sleep(0.005)

    def reset(self) -> int:
        """Wait until XLA has freed the buffers of the last step, set the peak to the current memory, and
        return it.
        """
        from jaxft.distributed import threads

        least, since = self.now(), time.monotonic()
        while time.monotonic() - since < 0.5:  # until it has not shrunk for half a second
            time.sleep(0.02)
            threads.trim_heap()
            if (size := self.now()) < 0.999 * least:
                least, since = size, time.monotonic()
        self.peak = self.now()
        return self.peak

    def close(self) -> int:
        """Stop polling and return the peak."""
        self._open = False
        self._thread.join()
        return self.peak


def memory_rate() -> float:
    """Return the bytes per second that a copy reads and writes."""
    x = np.ones(1 << 27, np.uint8)
    y = np.empty_like(x)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        np.copyto(y, x)
        seconds.append(time.perf_counter() - begin)
    return 2 * x.size / min(seconds)


def local_machine() -> Any:
    """Return this process's devices as a machine, with measured rates if their chip is not in the table."""
    from jaxft.plan import machines

    machine = machines.local()
    if machine.chip is not None:
        return machine
    rate = memory_rate()
    kind = machine.devices[0].device_kind
    limit = (machine.devices[0].memory_stats() or {}).get("bytes_limit") or os.sysconf(
        "SC_PHYS_PAGES"
    ) * os.sysconf("SC_PAGE_SIZE")
    return replace(machine, chip=machines.Chip(kind, int(limit), 0, rate, rate, rate, "measured"))


def measure(path: str, overrides: list[str]) -> dict[str, Any]:
    """Plan a run, execute it, and return both results."""
    import jax

    from jaxft.distributed import devices
    from jaxft.plan import plan
    from jaxft.runs.settings import config
    from jaxft.train import programs

    run = config.load_config(path, overrides)
    machine = local_machine()
    planned = plan.plan(run, machine)
    p, batch = programs.abstract(run)
    device = jax.devices()[0]
    with jax.set_mesh(p.mesh):
        seconds, taken = steps(run, p, batch)
    assert planned.total is not None and planned.estimate is not None
    if "peak_bytes_in_use" in (device.memory_stats() or {}):
        taken = {"bytes": round(devices.memory_gib(device) * 2**30), "measured": "peak_bytes_in_use"}
    else:
        taken["measured"] = "arrays between steps plus growth of the process during a step"
    middle = float(np.median(seconds))
    return {
        "planned_bytes": planned.total,
        **taken,
        "bytes_ratio": round(taken["bytes"] / planned.total, 3),
        "planned_temporaries": planned.parts.get("activations and temporaries", 0),
        "planned_seconds": round(planned.estimate.step, 4),
        "seconds": round(middle, 4),
        "fastest": round(min(seconds), 4),
        "seconds_ratio": round(middle / planned.estimate.step, 3),
        "bottleneck": planned.estimate.bottleneck,
        "load": round(os.getloadavg()[0] / (os.cpu_count() or 1), 2),
        "device": f"{len(machine.devices)} x {device.device_kind}",
        "jax": jax.__version__,
    }


def steps(run: Any, p: Any, batch: Any) -> tuple[list[float], dict[str, Any]]:
    """Return (seconds of the timed steps, {bytes, held, growth, once}, see the module docstring)."""
    import jax

    from jaxft.distributed import sharding
    from jaxft.train import programs
    from scripts.bench.bench_gpu import random_base

    step = programs.compile_step(p, batch)
    watch = Resident()
    before, largest, grew, seconds = watch.reset(), 0, [], []
    state, frozen = programs.start(run, p, None, random_base(p))
    placed = sharding.shard_batch(p.mesh, random_batch(batch, run.model.config.vocab))
    for _ in range(WARM + TIMED):
        largest = max(largest, watch.peak)
        start, begin = watch.reset(), time.perf_counter()
        state, output = step(state, frozen, placed)
        jax.block_until_ready((state, output))
        seconds.append(time.perf_counter() - begin)
        grew.append(watch.peak - start)
    largest = max(largest, watch.close())
    shards = [shard.data for x in jax.live_arrays() for shard in x.addressable_shards]
    # 4-bit arrays are packed, although numpy counts a byte per element
    held = sum(x.nbytes // (2 if x.dtype.name in ("int4", "uint4") else 1) for x in shards)
    growth, once = int(np.median(grew[WARM:])), largest - before
    output = {"bytes": held + growth, "held": held, "growth": growth, "once": once - held - growth}
    return seconds[WARM:], {name: size // p.mesh.size for name, size in output.items()}


def main() -> int:
    """Run each case in a separate process, because a process has only one memory peak."""
    a = arguments()
    if not a.here:
        return max(
            subprocess.run([sys.executable, __file__, *command], check=False).returncode
            for command in commands(a)
        )
    for name in [a.config] if a.config else a.cases:
        path, overrides = (
            (name, []) if a.config else (str(Path(sys.path[0]) / CASES[name][0]), CASES[name][1])
        )
        given = {text.partition("=")[0] for text in a.overrides}
        defaults = [text for text in overrides if text.partition("=")[0] not in given]
        print(json.dumps({"case": Path(name).stem, **measure(path, [*defaults, *a.overrides])}), flush=True)
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
