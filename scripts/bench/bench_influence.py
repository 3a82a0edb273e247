"""Measure how well influence finds planted mistakes in worlds with a known truth, and what it costs; print a
JSON line for each world.

    python scripts/bench/bench_influence.py [--recipe dpo] [--worlds 1] [--drawings 10] [--steps 4]

A world's rows have right labels. In each of --drawings drawings, labels are flipped at random; this negates
the gradients of their pairs, so that one pass over the rows serves all drawings. auroc: area under the ROC
curve with 20 % of the labels flipped, the least and the mean over the drawings. worst_last: number of
drawings in which one of ten sources, with 60 % of its labels flipped, has the lowest mean influence of all.
epochs: CPU seconds of the pass and its compilation, divided by the CPU seconds of an epoch of training, from
--steps steps after the first two.

SmolLM2-135M-Instruct, dpo, two busy AVX2 cores: worlds 0, 1 and 2 have least areas of 0.938, 0.904 and 0.926
and means of 0.953, 0.932 and 0.949; the bad source is the last in 10 of 10 drawings each. The pass takes
0.41 epochs in world 0 (commit 41b8b780), and took 0.47 in worlds 1 and 2 some commits before.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np  # noqa: E402

SOURCES = 10


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="dpo", help="a recipe of pairs")
    parser.add_argument("--worlds", type=int, default=1, help="worlds, with seeds 0, 1, ...")
    parser.add_argument("--drawings", type=int, default=10, help="drawings of the flipped labels of a world")
    parser.add_argument("--steps", type=int, default=4, help="steps of training that are timed")
    parser.add_argument("--set", nargs="*", default=[], metavar="KNOB=VALUE", help="settings of the recipe")
    return parser.parse_args()


def planted(gradients: Any, flipped: np.ndarray, names: Any = None) -> Any:
    """Return the influences after some labels are flipped. flipped: bool of each row. names: of the rows."""
    train = np.where(flipped[:, None], -gradients.train, gradients.train)
    return replace(gradients, train=train, names=gradients.names if names is None else names).influence


def auroc(gradients: Any, seed: int) -> float:
    """Return the area under the ROC curve for finding a fifth of the labels, flipped at random."""
    rng, count = np.random.default_rng(seed), len(gradients.train)
    flipped = np.isin(np.arange(count), rng.choice(count, count // 5, replace=False))
    values = planted(gradients, flipped).values
    return float((values[~flipped][:, None] > values[flipped][None, :]).mean())


def bad_source_is_last(gradients: Any, seed: int) -> bool:
    """Whether the source with flipped labels has the lowest mean influence."""
    rng, count = np.random.default_rng(seed), len(gradients.train)
    source = rng.permutation(count) % SOURCES
    members = np.flatnonzero(source == 0)
    flipped = np.isin(np.arange(count), rng.choice(members, round(0.6 * len(members)), replace=False))
    names = np.asarray([f"{k}.jsonl:{n}" for n, k in enumerate(source)])
    return next(iter(planted(gradients, flipped, names).by_file())) == "0.jsonl"


def seconds_per_step(parts: Any, steps: int) -> float:
    """Return the CPU seconds of a train step, after two that may compile."""
    import jax

    state, begin = parts.state, 0.0
    for step in range(steps + 2):
        if step == 2:
            begin = time.process_time()
        state, _ = parts.step(state, parts.batch(step))
        jax.block_until_ready(state.trainable)
    return (time.process_time() - begin) / steps


def main() -> None:
    """Measure each world."""
    args = arguments()
    import jaxft
    from jaxft.lab.influence import margin_gradients
    from jaxft.lab.worlds import World

    for seed in range(args.worlds):
        with tempfile.TemporaryDirectory() as folder:
            train, held_out = World(seed=seed).write(folder)
            given = dict(text.split("=", 1) for text in args.set)
            parts = jaxft.prepare(args.recipe, data=str(train), held_out=str(held_out), epochs=1.0, **given)
            begin, wall = time.process_time(), time.monotonic()
            gradients = margin_gradients(parts)
            cpu, wall = time.process_time() - begin, time.monotonic() - wall
            epoch = parts.steps * seconds_per_step(parts, args.steps)
        areas = [auroc(gradients, k) for k in range(args.drawings)]
        last = sum(bad_source_is_last(gradients, k) for k in range(args.drawings))
        result = {
            "world": seed, "pairs": len(gradients.train), "auroc_least": round(min(areas), 3),
            "auroc_mean": round(float(np.mean(areas)), 3), "worst_last": f"{last} of {args.drawings}",
            "cpu_seconds": round(cpu, 1), "seconds": round(wall, 1), "epochs": round(cpu / epoch, 2),
        }  # fmt: skip
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
