"""The planner against the truth: real train steps on this machine's device beside what was planned for them.

    python scripts/bench/bench_plan.py                                   # SmolLM2-135M: LoRA, QLoRA, every weight; minutes on a CPU
    python scripts/bench/bench_plan.py --cases lora full max_length=256 data.batch=2
    python scripts/bench/bench_plan.py --cases lora qlora model=meta-llama/Llama-3.1-8B-Instruct max_length=4096 remat=full   # on a GPU
    python scripts/bench/bench_plan.py --config configs/llama31_8b_sft.py full=true batch=8 micro=1                  # any SFT config

Weights and rows are random numbers, so nothing is loaded. A JSON line a case, each in a process of its own. Overrides are for all
cases, wherever they stand.

bytes: on a GPU or TPU the device's peak_bytes_in_use. A CPU's backend counts nothing, so there it is the arrays that are held
between steps, which is measured exactly, and by how much the process grows while a step runs: the middle of the timed steps, each
from its own start with the heap given back. Of the growth, the program knows its temporaries; the scratch of the libraries that
multiply matrices and of the thread pool, pages that the allocator takes whole, and what of a buffer is never touched (then it is
less) are in no plan. once: what the process grew by beside that, from before the weights were made to its largest size: programs
that make and place arrays, their compilation, libraries' tables. No plan could know it, and a run has it too. All of them are a
device's share.

seconds: the middle of the timed steps; fastest: the least of them. On a CPU the rates of products and memory are measured before,
and whatever else runs meanwhile slows one of both: load is how many processes wanted each core by the end of the case. Above 1
the ratio of the seconds means little.
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
    """The command line. What has a = in it is an override, also where it follows --cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--cases",
        nargs="+",
        default=list(CASES),
        metavar="CASE",
        help=f"of {', '.join(CASES)}; by itself all",
    )
    what.add_argument(
        "--config", help="a config of your own instead, a Python file with a function config(...) -> Run"
    )
    parser.add_argument("--here", action="store_true", help="in this process")
    parser.add_argument("overrides", nargs="*", help="knob=value or section.field=value, for all cases")
    found = parser.parse_intermixed_args(argv)
    found.overrides = [*(text for text in found.cases if "=" in text), *found.overrides]
    found.cases = [name for name in found.cases if "=" not in name] or list(CASES)
    for name in found.cases:
        if name not in CASES:
            parser.error(f"argument --cases: there is no case {name!r}; use some of {', '.join(CASES)}")
    for text in found.overrides:
        if "=" not in text:
            parser.error(f"{text!r} is no override; write knob=value")
    return found


def commands(a: argparse.Namespace) -> list[list[str]]:
    """The arguments of a process for each case."""
    if a.config:
        return [["--here", "--config", a.config, *a.overrides]]
    return [["--here", "--cases", name, *a.overrides] for name in a.cases]


def random_batch(abstract: Any, vocab: int) -> Any:
    """Full rows of one example each, in which every position is learned. Raises ValueError for other batches than SFT's."""
    from jaxft.batch import Tokens

    if not isinstance(abstract, Tokens):
        raise ValueError(
            f"{type(abstract).__name__}: only batches of SFT runs are made up here; use an SFT config"
        )
    rng, (micro, rows, length) = np.random.default_rng(0), abstract.ids.shape
    ids = rng.integers(3, vocab, (2, micro, rows, length)).astype(np.int32)
    at = np.broadcast_to(np.arange(length, dtype=np.int32), (micro, rows, length))
    weights = np.full((micro, rows, length), 1 / (micro * rows * length), np.float32)
    one = np.ones((micro, rows, length), np.int32)
    return replace(
        abstract, ids=ids[0], segments=one, positions=at, read=at, targets=ids[1], token_weights=weights
    )


class Resident:
    """The largest resident size of this process while it is open, looked up every few milliseconds. Bytes."""

    def __init__(self) -> None:
        self.peak, self._open = self.now(), True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @staticmethod
    def now() -> int:
        """The resident size at this moment."""
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _watch(self) -> None:
        while self._open:
            self.peak = max(self.peak, self.now())
            time.sleep(0.005)

    def again(self) -> int:
        """The size once a step's buffers are given back, which XLA does late; the largest is looked for anew from here."""
        from jaxft.distributed import devices

        least, since = self.now(), time.monotonic()
        while time.monotonic() - since < 0.5:  # it has not shrunk for so long
            time.sleep(0.02)
            devices.trim_heap()
            if (size := self.now()) < 0.999 * least:
                least, since = size, time.monotonic()
        self.peak = self.now()
        return self.peak

    def close(self) -> int:
        """Stop looking; the largest size."""
        self._open = False
        self._thread.join()
        return self.peak


def memory_rate() -> float:
    """Bytes a second that this process reads and writes when it copies."""
    x = np.ones(1 << 27, np.uint8)
    y = np.empty_like(x)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        np.copyto(y, x)
        seconds.append(time.perf_counter() - begin)
    return 2 * x.size / min(seconds)


def here() -> Any:
    """This process's devices with the rates of their chip, measured where the table has none."""
    from jaxft.plan import machines

    machine = machines.local()
    if machine.chip is not None:
        return machine
    rate = memory_rate()
    kind = machine.devices[0].device_kind
    limit = (machine.devices[0].memory_stats() or {}).get("bytes_limit") or os.sysconf(
        "SC_PHYS_PAGES"
    ) * os.sysconf("SC_PAGE_SIZE")
    return replace(machine, chip=machines.Chip(kind, int(limit), 0, rate, rate, rate, "measured here"))


def measure(path: str, overrides: list[str]) -> dict[str, Any]:
    """Plan, then run."""
    import jax

    from jaxft.distributed import devices
    from jaxft.plan import plan
    from jaxft.runs import config
    from jaxft.train import programs

    run = config.load_config(path, overrides)
    machine = here()
    planned = plan.plan(run, machine)
    p, batch = programs.abstract(run)
    device = jax.devices()[0]
    with jax.set_mesh(p.mesh):
        seconds, taken = steps(run, p, batch)
    assert planned.total is not None and planned.estimate is not None
    if "peak_bytes_in_use" in (device.memory_stats() or {}):
        taken = {"bytes": round(devices.memory_gib(device) * 2**30), "measured": "peak_bytes_in_use"}
    else:
        taken["measured"] = "arrays between steps, and growth of the process in a step"
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
        "limit": planned.estimate.limit,
        "load": round(os.getloadavg()[0] / (os.cpu_count() or 1), 2),
        "device": f"{len(machine.devices)} x {device.device_kind}",
        "jax": jax.__version__,
    }


def steps(run: Any, p: Any, batch: Any) -> tuple[list[float], dict[str, Any]]:
    """(seconds of the timed steps, bytes of them by this process's size: see the head of this file)."""
    import jax
    from scripts.bench_gpu import random_base

    from jaxft.distributed import sharding
    from jaxft.train import programs

    step = programs.compile_step(p, batch)
    watch = Resident()
    before, largest, grew, seconds = watch.again(), 0, [], []
    state, frozen = programs.start(run, p, None, random_base(p))
    placed = sharding.shard_batch(p.mesh, random_batch(batch, run.model.config.vocab))
    for _ in range(WARM + TIMED):
        largest = max(largest, watch.peak)
        start, begin = watch.again(), time.perf_counter()
        state, found = step(state, frozen, placed)
        jax.block_until_ready((state, found))
        seconds.append(time.perf_counter() - begin)
        grew.append(watch.peak - start)
    largest = max(largest, watch.close())
    shards = [shard.data for x in jax.live_arrays() for shard in x.addressable_shards]
    held = sum(
        x.nbytes // (2 if x.dtype.name in ("int4", "uint4") else 1) for x in shards
    )  # packed, whatever numpy says
    growth, once = int(np.median(grew[WARM:])), largest - before
    found = {"bytes": held + growth, "held": held, "growth": growth, "once": once - held - growth}
    return seconds[WARM:], {name: size // p.mesh.size for name, size in found.items()}


def main() -> int:
    """Each case in a process of its own, so that a peak is its own."""
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
        kept = [text for text in overrides if text.partition("=")[0] not in given]
        print(json.dumps({"case": Path(name).stem, **measure(path, [*kept, *a.overrides])}), flush=True)
    return 0


if __name__ == "__main__":
    from jaxft.runs import cli

    cli.quiet()
    sys.exit(cli.one_line_errors(main))
