"""Compare decoding with and without sliding windows: size of the cache and time per token, as one JSON line.

    python scripts/bench/bench_window.py [--layers 12] [--full 2] [--window 256] [--slots 4096]

Both models are random Mistrals of the same sizes in bfloat16, with a cache of --slots tokens per row. One has
full attention in all layers, the other in --full layers and a window in the rest, in a pattern as regular as
the numbers allow. Each decodes --tokens tokens after a prompt of 16; compilation is not timed. They take
turns for --rounds rounds, of which the fastest counts.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

PROMPT = 16


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--full", type=int, default=2, help="layers with full attention (default 2)")
    parser.add_argument("--window", type=int, default=256, help="keys that the others attend to")
    parser.add_argument("--slots", type=int, default=4096, help="tokens per row in the cache")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64, help="decoded tokens of a round (default 64)")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def decoder(a: argparse.Namespace, full: int) -> tuple[int, Callable[[], float]]:
    """Return (bytes of the cache, a function that decodes a round and returns the seconds per token) for a
    model with full attention in `full` of its layers.
    """
    import jax
    import jax.numpy as jnp

    from jaxft.models.dense_config import FULL, SLIDING
    from jaxft.models.families.llama import MistralConfig, mistral
    from jaxft.nn.attention.kv_cache import NextToken, RowGroups
    from jaxft.nn.param_spec import init_params

    types = tuple(
        FULL if (i + 1) * full // a.layers > i * full // a.layers else SLIDING for i in range(a.layers)
    )
    windows: dict[str, Any] = {"window": a.window, "layer_types": types} if SLIDING in types else {}
    model = mistral(
        MistralConfig(
            vocab=1024, width=a.width, layers=a.layers, heads=8, kv_heads=4, head_dim=a.width // 8,
            mlp=2 * a.width, max_positions=a.slots, **windows,
        ),
    )  # fmt: skip
    params = init_params(model.specs, jax.random.key(0), jnp.bfloat16)
    rows = jnp.arange(a.batch, dtype=jnp.int32)
    new, groups = a.slots - PROMPT, RowGroups(rows[:, None], rows)
    decode = jax.jit(model.decode, donate_argnums=1)
    ids = jnp.full(a.batch, 5, jnp.int32)

    def empty() -> Any:
        return model.empty_cache((a.batch, PROMPT), a.batch, new)

    def decode_round() -> float:
        cache = jax.block_until_ready(jax.jit(empty)())
        begin = time.perf_counter()
        for n in range(a.tokens):
            count = jnp.full(a.batch, n + 1, jnp.int32)
            h, cache = decode(params, cache, ids, NextToken(count + PROMPT - 1, count, groups))
        jax.block_until_ready(h)
        return (time.perf_counter() - begin) / a.tokens

    cache = jax.eval_shape(empty)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.prompts.layers, cache.rows)))
    decode_round()  # compiles
    return size, decode_round


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """Return megabytes of the cache and milliseconds per token of both models."""
    if a.tokens < 1 or PROMPT + a.tokens > a.slots or not 0 <= a.full < a.layers:
        raise ValueError(
            f"--tokens must be from 1 to {a.slots - PROMPT} with --slots {a.slots}, and --full from 0 to "
            f"{a.layers - 1}; got --tokens {a.tokens} --full {a.full}"
        )
    models = {"full_attention": decoder(a, a.layers), "windows": decoder(a, a.full)}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(a.rounds):
        for name, (_, decode_round) in models.items():
            seconds[name].append(decode_round())
    return {
        name: {"cache_mb": size / 1e6, "ms_per_token": 1e3 * min(seconds[name])}
        for name, (size, _) in models.items()
    }


def main() -> int:
    """Measure, and print both models' numbers."""
    a = arguments()
    rounded = {name: {key: round(value, 2) for key, value in row.items()} for name, row in measure(a).items()}
    print(json.dumps({**vars(a), **rounded}))
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
