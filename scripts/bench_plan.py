"""The planner against the truth: real train steps on this machine's device beside what was planned for them.

    python scripts/bench_plan.py                                   # SmolLM2-135M: LoRA, QLoRA, every weight; minutes on a CPU
    python scripts/bench_plan.py --cases lora model=meta-llama/Llama-3.1-8B-Instruct max_length=4096 remat=full   # on a GPU

Weights and rows are random numbers, so nothing is loaded. A JSON line a case, each in a process of its own. Bytes: on a GPU or
TPU the device's peak_bytes_in_use, on a CPU how much the process grows from before the weights are made to its largest size
while steps run. Seconds: the middle of the timed steps. On a CPU the rates of products and memory are measured first.
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

sys.path[0] = str(Path(__file__).resolve().parents[1])

CASES = {"lora": ("configs/sft.py", []), "qlora": ("configs/sft.py", ["quant=nf4"]), "full": ("configs/sft_full.py", ["batch=1"])}
WARM, TIMED = 2, 5  # steps


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--here", action="store_true", help="in this process, for one case")
    parser.add_argument("overrides", nargs="*", help="knob=value or section.field=value, for all cases")
    return parser.parse_intermixed_args()


def random_batch(abstract: Any, vocab: int) -> Any:
    """Full rows of one example each, in which every position is learned."""
    rng, (micro, rows, length) = np.random.default_rng(0), abstract.ids.shape
    ids = rng.integers(3, vocab, (2, micro, rows, length)).astype(np.int32)
    at = np.broadcast_to(np.arange(length, dtype=np.int32), (micro, rows, length))
    weights = np.full((micro, rows, length), 1 / (micro * rows * length), np.float32)
    one = np.ones((micro, rows, length), np.int32)
    return replace(abstract, ids=ids[0], segments=one, positions=at, read=at, targets=ids[1], token_weights=weights)


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
    from jaxft import machines

    machine = machines.local()
    if machine.chip is not None:
        return machine
    rate = memory_rate()
    kind = machine.devices[0].device_kind
    limit = (machine.devices[0].memory_stats() or {}).get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf(
        "SC_PAGE_SIZE"
    )
    return replace(machine, chip=machines.Chip(kind, int(limit), 0, rate, rate, rate, "measured here"))


def measure(path: str, overrides: list[str]) -> dict[str, Any]:
    """Plan, then run."""
    import jax

    from jaxft import config, devices, plan, programs, sharding
    from scripts.bench_gpu import random_base

    run = config.load(path, overrides)
    machine = here()
    planned = plan.plan(run, machine)
    p, batch = programs.abstract(run)
    with jax.set_mesh(p.mesh):
        step = programs.compile_step(p, batch)
        device = jax.devices()[0]
        told = "peak_bytes_in_use" in (device.memory_stats() or {})
        before = 0 if told else Resident.now()
        watch = None if told else Resident()
        state, frozen = programs.start(run, p, None, random_base(p))
        placed, seconds = sharding.place_batch(p.mesh, random_batch(batch, run.model.config.vocab)), []
        for _ in range(WARM + TIMED):
            begin = time.perf_counter()
            state, found = step(state, frozen, placed)
            jax.block_until_ready((state, found))
            seconds.append(time.perf_counter() - begin)
        peak = watch.close() - before if watch else round(devices.memory_gib(device) * 2**30)
    assert planned.total is not None and planned.estimate is not None
    middle = float(np.median(seconds[WARM:]))
    return {
        "planned_bytes": planned.total,
        "bytes": peak,
        "bytes_ratio": round(peak / planned.total, 3),
        "measured": "peak_bytes_in_use" if told else "growth of the process",
        "planned_seconds": round(planned.estimate.step, 4),
        "seconds": round(middle, 4),
        "seconds_ratio": round(middle / planned.estimate.step, 3),
        "limit": planned.estimate.limit,
        "device": f"{len(machine.devices)} x {device.device_kind}",
        "jax": jax.__version__,
    }


def main() -> int:
    """Each case in a process of its own, so that a peak is its own."""
    a = arguments()
    if not a.here:
        commands = [[sys.executable, __file__, "--here", "--cases", name, *a.overrides] for name in a.cases]
        return max(subprocess.run(command, check=False).returncode for command in commands)
    for name in a.cases:
        path, overrides = CASES[name]
        given = {text.partition("=")[0] for text in a.overrides}
        kept = [text for text in overrides if text.partition("=")[0] not in given]
        found = measure(str(Path(sys.path[0]) / path), [*kept, *a.overrides])
        print(json.dumps({"case": name, **found}), flush=True)
    return 0


if __name__ == "__main__":
    from jaxft import cli

    cli.quiet()
    sys.exit(cli.one_line_errors(main))
