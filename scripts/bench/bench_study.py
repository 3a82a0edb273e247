"""Test whether a study finds the best of six losses if it is known, and compare its time with a full grid.

    python scripts/bench/bench_study.py --worlds 10

In each world annotators compare two sentences of random words. Every word has a hidden value, and a
sentence's true reward is the sum over its words. Annotators follow Bradley and Terry with the difference of
the true rewards plus `bias` for each additional word. The losses are R-DPO with six values of alpha, which
subtracts alpha from the reward for each additional token: if alpha is the annotators' bias, the loss is the
likelihood of the labels, and its minimiser is the true reward; otherwise a part of the bias stays in the
policy. So the best loss is known, and no loss is best in all worlds: a world's bias is one of the six values
at random, as are its words, rows and weights. Held-out pairs have true labels, and the accuracy of each
loss's minimiser on them is printed as `limit`.

Each world is a study: a random Llama with one layer, successive halving of `--trials` trials of learning rate
and beta, three seeds of the best setting. The full grid trains every trial with every seed to the end, by the
same compiled program in the same process, before or after the study in turn. Times include training,
evaluation and writing, not compilation.

Two busy AVX512 cores, --worlds 10 --grids 2: the planted best is found in 10 of 10 worlds, in 0.257 of the
full grid's seconds and 0.210 of its steps (commit adec3de8).
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import chdir
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

BIASES = (-1.0, -0.6, -0.2, 0.2, 0.6, 1.0)  # in nats for each word more
WORDS, PROMPT_WORDS, LONGEST = 24, 12, 9
UNUSED = 1000  # further words of the model, see write_model
PAIRS, HELD_OUT = 1200, 240
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class WordWorld:
    """A world: hidden values of words, and the annotators' bias, all from a seed."""

    seed: int

    @cached_property
    def rng(self) -> random.Random:
        """The random numbers of the rows."""
        return random.Random(self.seed)

    @property
    def best(self) -> int:
        """The index in BIASES of the annotators' bias, which is also the best loss's index."""
        return int(np.random.default_rng(self.seed).integers(len(BIASES)))

    @cached_property
    def values(self) -> np.ndarray:
        """The reward of each word; their sum is 0, so that longer sentences are not better."""
        values = np.random.default_rng((self.seed, 1)).normal(0, 1, WORDS)
        return values - values.mean()

    def sentence(self) -> list[int]:
        """Return the words of a sentence of 1 to LONGEST words."""
        return [self.rng.randrange(WORDS) for _ in range(self.rng.randint(1, LONGEST))]

    def pairs(self, count: int, true_labels: bool) -> list[dict[str, Any]]:
        """Return preference rows that also have `truth` and `longer`: by how much the chosen sentence's true
        reward, and its length, exceed the rejected one's. true_labels: annotators make no mistakes.
        """
        rows: list[dict[str, Any]] = []
        while len(rows) < count:
            a, b = self.sentence(), self.sentence()
            gap = float(self.values[a].sum() - self.values[b].sum())
            liked = gap + BIASES[self.best] * (len(a) - len(b))
            wins = gap > 0 if true_labels else self.rng.random() < 1 / (1 + np.exp(-liked))
            if abs(gap) < 0.2:
                continue
            (chosen, rejected), sign = ((a, b), 1) if wins else ((b, a), -1)
            prompt = " ".join(f"p{self.rng.randrange(PROMPT_WORDS)}" for _ in range(4))
            rows.append(
                {
                    "prompt": prompt,
                    "chosen": " ".join(f"w{i}" for i in chosen),
                    "rejected": " ".join(f"w{i}" for i in rejected),
                    "truth": sign * gap,
                    "longer": len(chosen) - len(rejected),
                }
            )
        return rows

    def limits(self, rows: Sequence[dict[str, Any]]) -> list[float]:
        """Return the accuracy on `rows` of each loss's minimiser: the true reward plus the bias per token
        that the loss does not subtract.
        """
        truth, longer = (np.array([row[name] for row in rows]) for name in ("truth", "longer"))
        return [float((truth + (BIASES[self.best] - alpha) * longer > 0).mean()) for alpha in BIASES]


def write_model(folder: Path, seed: int) -> None:
    """Write a random Llama with one layer and a tokenizer of words.

    As in trained models, embeddings have a direction in common, so that a word can become more likely
    everywhere, and the head is large enough for log-probs of any size. Most words of the vocabulary are in no
    sentence. If all were, making some words likelier would make others rarer: log-probs would fall with the
    length of a sentence, and no policy's implicit reward could be the true reward.
    """
    import jax
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from jaxft.models.families.llama import LlamaConfig, llama
    from jaxft.nn import param_spec
    from jaxft.weights.hf import hf_write

    counts = {"p": PROMPT_WORDS, "w": WORDS, "u": UNUSED}
    words = ["<s>", "</s>", *(f"{kind}{i}" for kind, count in counts.items() for i in range(count))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )
    config = LlamaConfig(vocab=len(words), width=32, layers=1, heads=2, kv_heads=1, head_dim=16, mlp=64)
    model = llama(config)
    base = param_spec.init_params(model.specs, jax.random.key(seed))
    common = jax.random.normal(jax.random.key(seed + 1), (1, config.width))
    base["embed"] += 3 * base["embed"].std() * common
    base["head"] *= 25.0
    hf_write.save_folder(folder, model, base, wrapped)


def world_study(name: str, steps: int, trials: int) -> Any:
    """Return the study of a world whose model and rows are in the working directory."""
    from jaxft.lab.studies.study import LogRange, SearchedLoss, Study, study_recipe
    from jaxft.objectives.losses.preference_losses import rdpo

    recipe = study_recipe(
        "dpo", "model=model", "data=train.jsonl", "held_out=held_out.jsonl", "dtype=float32", "batch=64",
        "data.format=plain", "data.max_length=16", "data.layout=plain", f"loop.steps={steps}", "epochs=10",
        "adapter.targets=down",
    )  # fmt: skip
    return Study(
        name=name,
        recipe=recipe,
        losses={
            f"alpha{alpha:+g}": SearchedLoss(partial(rdpo, alpha=alpha), {"beta": LogRange(0.5, 5)})
            for alpha in BIASES
        },
        lr=LogRange(1e-3, 3e-2),
        trials=trials,
        seeds=SEEDS,
    )


def timed(fn: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Return a function's result and its seconds."""
    begin = time.perf_counter()
    result = fn(*args)
    return result, time.perf_counter() - begin


def full_grid(lab: Any, folder: Path) -> list[dict[str, Any]]:
    """Train every trial with every seed to the end; return the log."""
    from jaxft.lab.studies.halving import Wave, train_wave

    steps, done = lab.study.recipe.loop.steps, list[dict[str, Any]]()
    trials = {label: lab.study.trials_of(label) for label in lab.study.losses}
    for seed in lab.study.seeds:
        for number in range(lab.study.trials):
            of_number = {label: of_loss[number] for label, of_loss in trials.items()}
            done = train_wave(lab, folder, Wave(seed, of_number, 0, steps), done)
    return done


def best_of_grid(lab: Any, folder: Path, log: Sequence[dict[str, Any]]) -> str:
    """Return the loss that the full grid finds best. A loss's best trial is chosen by its mean over seeds on
    the tuning prompts; losses are then compared on the other prompts.
    """
    from jaxft.lab.studies.halving import EVALUATIONS, read_evaluations, trial_folder

    study, means = lab.study, dict[str, float]()
    for label in study.losses:
        by_trial = [
            np.mean([entry["scores"][label] or 0.0 for entry in log if entry["trials"][label] == number])
            for number in range(study.trials)
        ]
        finals = [trial_folder(folder, label, int(np.argmax(by_trial)), seed) for seed in study.seeds]
        rows = [read_evaluations(final / EVALUATIONS)[-1].rows[study.metric] for final in finals]
        means[label] = float(np.mean([lab.pairs.by_prompt(x, tuning=False) for x in rows]))
    return max(means, key=means.__getitem__)


def steps_of(log: Sequence[dict[str, Any]]) -> int:
    """Return how many optimizer steps of each loss a log has."""
    return sum(entry["steps"][1] - entry["steps"][0] for entry in log if "wave" in entry)


def run_world(seed: int, steps: int, trials: int, with_grid: bool) -> dict[str, Any]:
    """Run a world's study and, if with_grid, its full grid in the working directory; return the results."""
    import jax

    from jaxft.distributed import sharding
    from jaxft.distributed.exit import Interrupt
    from jaxft.lab.studies.halving import declared_lab, train_waves
    from jaxft.lab.studies.study_results import read_study
    from jaxft.runs import run_record
    from jaxft.train.logs.clock import Clock

    world = WordWorld(seed)
    held_out, train = world.pairs(HELD_OUT, True), world.pairs(PAIRS, False)
    for name, rows in (("held_out.jsonl", held_out), ("train.jsonl", train)):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_model(Path("model"), seed)
    study = world_study("study", steps, trials)
    folder, grid = (run_record.folder_of(Path("runs"), name) for name in ("study", "grid"))
    folder.mkdir(parents=True)
    with jax.set_mesh(sharding.make_mesh(study.recipe.mesh)):
        (lab, done), opening = timed(declared_lab, study, Path(__file__), folder, Clock())
        assert lab is not None
        parts: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
            ("study", train_waves, (lab, folder, done, Interrupt()))
        ]
        if with_grid:
            parts.append(("grid", full_grid, (lab, grid)))
        results = {name: timed(fn, *args) for name, fn, args in parts[:: 1 if seed % 2 else -1]}
    result = read_study(folder)
    first, second = result.order[:2]
    duel = next(d for d in result.duels if {d.one, d.other} == {first.label, second.label})
    (log, seconds), (grid_log, grid_seconds) = results["study"], results.get("grid", ([], 0.0))
    planted = [*study.losses][world.best]
    return {
        "world": seed,
        "planted": planted,
        "limit": dict(zip(study.losses, world.limits(held_out), strict=True)),
        "found": first.label,
        "accuracy": {loss.label: round(float(np.nanmean(loss.final)), 4) for loss in result.order},
        "second": second.label,
        "p": duel.p,
        "error": [d.difference.error for d in result.duels],
        "unpaired": [d.difference.unpaired_error for d in result.duels],
        "grid": best_of_grid(lab, grid, grid_log) if with_grid else None,
        "steps": [steps_of(log), steps_of(grid_log)],
        "seconds": [seconds, grid_seconds],
        "opening": opening,
    }


def main() -> int:
    """Run the worlds and print a line for each, and the totals."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", type=int, default=10, help="number of worlds (default 10)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first world (default 0)")
    parser.add_argument("--steps", type=int, default=81, help="steps of a full run (default 81)")
    parser.add_argument("--trials", type=int, default=6, help="trials of each loss (default 6)")
    parser.add_argument("--grids", type=int, help="train the full grid of the first N worlds (default all)")
    parser.add_argument("--json", action="store_true", help="also print each world as a JSON line")
    a = parser.parse_args()
    worlds = []
    for seed in range(a.first, a.first + a.worlds):
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            out = run_world(seed, a.steps, a.trials, a.grids is None or seed - a.first < a.grids)
        worlds.append(out)
        right = "right" if out["found"] == out["planted"] else "WRONG"
        limits = sorted(out["limit"].values())[::-1]
        print(
            f"world {seed}: planted {out['planted']} (limit {limits[0]:.3f}, next {limits[1]:.3f}), found "
            f"{out['found']} {right}, accuracy {out['accuracy'][out['found']]:.3f}, second {out['second']} "
            f"{out['accuracy'][out['second']]:.3f}, p = {out['p']:.2g}; full grid {out['grid']}; seconds "
            f"{out['seconds'][0]:.1f} and {out['seconds'][1]:.1f}",
            flush=True,
        )
        if a.json:
            print(json.dumps(out), flush=True)
    ratio = np.array([np.array(world["error"]) / np.array(world["unpaired"]) for world in worlds])
    two = list(combinations(range(len(BIASES)), 2))  # in the order of the study's duels
    near = ratio[:, [two.index((i, i + 1)) for i in range(len(BIASES) - 1)]]
    right = sum(world["found"] == world["planted"] for world in worlds)
    print(
        f"the planted loss was found in {right} of {len(worlds)} worlds; paired error over the unpaired one: "
        f"median {np.median(near):.2f} of losses with neighbouring alpha, {np.median(ratio):.2f} of all"
    )
    both = [world for world in worlds if world["grid"] is not None]
    if both:
        steps, seconds = (np.array([world[name] for world in both]).sum(0) for name in ("steps", "seconds"))
        of_grid = sum(world["grid"] == world["planted"] for world in both)
        print(
            f"full grid of {len(both)} worlds: found it in {of_grid}; the study took "
            f"{steps[0] / steps[1]:.3f} of its steps and {seconds[0] / seconds[1]:.3f} of its seconds"
        )
    return 0


if __name__ == "__main__":
    from jaxft.distributed import xla_flags

    xla_flags.restart()
    sys.exit(main())
