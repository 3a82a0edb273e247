"""Compare the attention kernels that run on a device: time and TFLOP/s forward and backward, as JSON lines.

    python scripts/bench/attention.py                    # Llama 3 8B's heads, rows of 4096 tokens
    python scripts/bench/attention.py --rows 1 --tokens 16384 --window 4096
    python scripts/bench/attention.py --tiny             # the same programs in small shapes, for a CPU
    python scripts/bench/attention.py --tokens 512 --heads 9 --kv-heads 3 --head-dim 64 --blocks 256

Cases: rows packed with 1, 4 and 16 segments, and rows in which 4 responses share a prompt of half a row.
FLOPs count only matmuls over pairs of query and key that attention can see: 4 per pair and dimension forward,
10 backward. So a kernel that also computes masked pairs gets a lower rate. A kernel that does not support a
case is left out of it, with a line on stderr. Kernels take turns for --rounds rounds, of which the fastest
counts; compilation is not timed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parents[2])

TINY = {"rows": 2, "tokens": 128, "heads": 4, "kv_heads": 2, "head_dim": 16, "rounds": 1}


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    from jaxft.annotations import ComputeDtype

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a row (default 4096)")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--window", type=int, default=None, help="sliding window (default: none)")
    parser.add_argument("--softcap", type=float, default=None, help="soft cap of scores (default: none)")
    parser.add_argument("--dtype", choices=get_args(ComputeDtype), default="bfloat16")
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[], help="further sizes of blocks for blockwise XLA"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    a = parser.parse_args()
    if a.tiny:
        vars(a).update(TINY)
    return a


def layouts(tokens: int) -> dict[str, tuple[list[int], list[int] | None]]:
    """Return case -> (segment of each token, its branch after a shared prompt, or None without branches)."""
    at = np.arange(tokens)
    segments_of: dict[str, tuple[list[int], list[int] | None]] = {
        f"packed {count}": ((at * count // tokens + 1).tolist(), None) for count in (1, 4, 16)
    }
    segments_of["shared prompt"] = ([1] * tokens, np.maximum(at * 8 // tokens - 3, 0).tolist())
    return segments_of


def kernels(blocks: list[int]) -> dict[str, Callable]:
    """Return name -> kernel for the kernels of this process's devices, and blockwise XLA with these block
    sizes.
    """
    import jax

    from jaxft.nn.attention import attention

    device = jax.devices()[0]
    by_name: dict[str, Callable] = {"flash": attention.flash}
    by_name |= {f"flash {block}": partial(attention.flash, block=block) for block in blocks}
    if device.platform == "tpu":
        by_name["splash"] = attention.splash
    elif device.platform in ("gpu", "cuda") and "NVIDIA" in device.device_kind:
        by_name |= {"pallas": attention.pallas, "cudnn": attention.cudnn}
    return by_name


def cases(a: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield each case's name and key ranges of its rows."""
    import jax.numpy as jnp

    from jaxft.nn.attention.flash_attention import key_ranges, within_window

    for name, (segments, branches) in layouts(a.tokens).items():
        rows = (None if x is None else jnp.asarray([x] * a.rows, jnp.int32) for x in (segments, branches))
        yield name, within_window(key_ranges(*rows), a.window)


def programs(kernel: Callable, ranges: Any, softcap: float | None) -> tuple[Callable, Callable]:
    """Return compiled functions (q, k, v) -> (o, residuals), and (residuals, do) -> gradients of q, k, v."""
    import jax

    attend = partial(kernel, softcap=softcap)

    def forward(q: Any, k: Any, v: Any) -> Any:
        return jax.vjp(lambda q, k, v: attend(q, k, v, ranges), q, k, v)

    return jax.jit(forward), jax.jit(lambda residuals, do: residuals(do))


def pairs(ranges: Any) -> int:
    """Return how many pairs of query and key attention can see in all rows."""
    count = np.maximum(np.asarray(ranges.own_end, np.int64) - np.asarray(ranges.own_start), 0).sum()
    if ranges.prompt_start is not None:
        prompt = np.asarray(ranges.prompt_end, np.int64) - np.asarray(ranges.prompt_start)
        count += np.maximum(prompt, 0).sum()
    return int(count)


def measure(a: argparse.Namespace) -> list[dict[str, Any]]:
    """Return milliseconds and TFLOP/s of each kernel in each case."""
    import jax
    import jax.numpy as jnp

    if (
        min(a.rows, a.heads, a.kv_heads, a.head_dim, a.rounds, *a.blocks) < 1
        or a.tokens < 16
        or a.heads % a.kv_heads
    ):
        raise ValueError(
            "--tokens must be at least 16, every other size at least 1, and --heads a multiple of --kv-heads"
        )
    rng, fastest_cases = np.random.default_rng(0), []
    heads = (a.heads, a.kv_heads, a.kv_heads, a.heads)
    q, k, v, do = (jnp.asarray(rng.normal(size=(a.rows, a.tokens, n, a.head_dim)), a.dtype) for n in heads)
    for name, ranges in cases(a):
        run: dict[str, tuple[Callable, Callable]] = {}
        for kernel_name, kernel in kernels(a.blocks).items():
            if kernel_name == "cudnn" and name != "packed 1":
                continue  # a row is one example there
            forward, backward = programs(kernel, ranges, a.softcap)
            try:
                _, residuals = forward(q, k, v)
            except ValueError as error:  # the kernel lacks shared prompts, windows or soft caps
                print(f"{name}: {kernel_name} is left out: {error}", file=sys.stderr)
                continue
            jax.block_until_ready(backward(residuals, do))
            run[kernel_name] = partial(forward, q, k, v), partial(backward, residuals, do)
        seconds: dict[str, list[list[float]]] = {kernel_name: [[], []] for kernel_name in run}
        for _ in range(a.rounds):
            for kernel_name, passes in run.items():
                for fn, times in zip(passes, seconds[kernel_name], strict=True):
                    begin = time.perf_counter()
                    jax.block_until_ready(fn())
                    times.append(time.perf_counter() - begin)
        for kernel_name, (forward_seconds, backward_seconds) in seconds.items():
            fastest = rates(a, ranges, min(forward_seconds), min(backward_seconds))
            fastest_cases.append({"case": name, "kernel": kernel_name, **fastest})
    return fastest_cases


def rates(a: argparse.Namespace, ranges: Any, forward: float, backward: float) -> dict[str, float]:
    """Return milliseconds and TFLOP/s. forward, backward: the seconds of each pass."""
    work = pairs(ranges) * a.heads * a.head_dim / 1e12
    by_name = {
        "forward_ms": 1e3 * forward,
        "backward_ms": 1e3 * backward,
        "forward_tflops": 4 * work / forward,
        "backward_tflops": 10 * work / backward,
    }
    return {name: float(f"{value:.4g}") for name, value in by_name.items()}


def main() -> int:
    """Measure, and print a line for each case and kernel."""
    import jax

    from jaxft.distributed.sharding import MeshShape, make_mesh

    a = arguments()
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    sizes = {name: value for name, value in vars(a).items() if name not in ("rounds", "tiny", "blocks")}
    with jax.set_mesh(make_mesh(MeshShape(), jax.devices()[:1])):  # blocks are chosen by its device
        for line in measure(a):
            print(json.dumps({**line, **sizes, **about}), flush=True)
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
