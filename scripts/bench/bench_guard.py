"""Measure what the check of the update costs: time of train steps with it and without, as one JSON line.

    python scripts/bench/bench_guard.py [--config configs/sft.py] [--steps 12] [name=value ...]

The check skips a step whose loss, gradient or update is not finite; for it, the update is computed before it
is written (optim/update.py: stays_finite). Both programs take turns on one state and the first batch of the
config's rows, so that changes in the machine's load affect both. `cost` is the median of
(seconds with the check / seconds without) - 1 over the pairs of consecutive steps.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

WARM = 2  # pairs of steps that are not timed


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    from jaxft.cli import cli

    parser = cli.CommandParser(__doc__)
    parser.add_argument("--config", default="configs/sft.py", help="a config of rows or pairs")
    parser.add_argument(
        "--steps", type=cli.COUNT, default=12, help="timed steps of each program (default 12)"
    )
    parser.add_argument("overrides", nargs="*", help="knob=value or section.field=value")
    return parser.parse_intermixed_args()


def unchecked(optimizer: Any) -> Any:
    """Return the optimizer without the check of its updates."""

    def no_check(grads: Any, opt_state: Any, params: Any, info: Any) -> Any:
        return info.finite

    parts = optimizer.parts._replace(check_layer=no_check, check_rest=no_check)
    return optimizer._replace(check=no_check, parts=parts)


def measure(overrides: list[str], config_file: str, steps: int) -> dict[str, Any]:
    """Compile both programs for a run and return their times."""
    import jax

    from jaxft.distributed import sharding
    from jaxft.runs.settings import config
    from jaxft.train import programs
    from jaxft.train.step import make_train_step
    from jaxft.weights import pretrained

    run = config.load_config(config_file, overrides)
    mesh = sharding.make_mesh(run.mesh)
    with jax.set_mesh(mesh):
        source = run.data.open(pretrained.load_tokenizer(run.weights), sharding.row_shards(mesh))
        p = programs.build(run, 1000)
        state, frozen = programs.start(run, p, None)
        batch = sharding.shard_batch(mesh, source.batch(0, state)[0])
        shardings = jax.tree.map(lambda x: x.sharding, p.state), sharding.replicated(mesh)

        def compiled(optimizer: Any) -> Any:
            step = make_train_step(p.objective, optimizer, run.seed)
            jitted = jax.jit(step, donate_argnums=0, out_shardings=shardings)
            return jitted.lower(p.state, p.frozen, batch).compile()

        seconds: tuple[list[float], list[float]] = ([], [])
        both = compiled(p.optimizer), compiled(unchecked(p.optimizer))
        for _ in range(WARM + steps):
            for step, times in zip(both, seconds, strict=True):
                begin = time.perf_counter()
                state, metrics = step(state, frozen, batch)
                jax.block_until_ready((state, metrics))
                times.append(time.perf_counter() - begin)
    checked, plain = (times[WARM:] for times in seconds)
    return {
        "config": config_file,
        "trainable": programs.model_summary(p).trainable,
        "shape": list(batch.ids.shape),
        "device": jax.devices()[0].device_kind,
        "seconds_checked": round(statistics.median(checked), 4),
        "seconds_unchecked": round(statistics.median(plain), 4),
        "cost": round(statistics.median(a / b for a, b in zip(checked, plain, strict=True)) - 1, 4),
    }


def main() -> int:
    """Measure and print."""
    args = arguments()
    print(json.dumps(measure(args.overrides, args.config, args.steps)))
    return 0


if __name__ == "__main__":
    from jaxft.distributed import xla_flags

    xla_flags.apply_settings()  # as a run does
    sys.exit(main())
