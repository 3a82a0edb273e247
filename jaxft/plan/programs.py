"""A run's programs as the planner compiles them: of shapes alone, each the largest that the settings allow."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxft import tree
from jaxft.batch import Tokens
from jaxft.data.pairs.source import PairRows
from jaxft.data.prompts import group_row_shape, padded_length, rollout_batch_shapes
from jaxft.distributed import sharding
from jaxft.inference import generate
from jaxft.rl.online_pairs import OnlinePairs
from jaxft.rl.reward_models import HeadReward, head_scores
from jaxft.rl.rollout import Rollouts
from jaxft.rl.sampler import score_tokens
from jaxft.train import evaluate
from jaxft.train.programs import Programs, reference_step, sharded_batch
from jaxft.train.settings import Run


@dataclass(frozen=True)
class Program:
    """One of a run's programs. trace() -> jax.stages.Traced; batch: the train step's, None for a program that doesn't train."""

    name: str
    trace: Callable[[], Any]
    batch: Any = None


def steps(run: Run, p: Programs) -> list[Program]:
    """What trains. The weights and the optimizer's state are there in each of a run's programs."""
    batch: Any = run.data.abstract(sharding.row_shards(p.mesh))
    if _precomputed(run, p) and isinstance(run.data, PairRows):
        batch = run.data.abstract(sharding.row_shards(p.mesh), reference=True)
    batch = sharded_batch(p, p.objective.batch_spec(batch))
    return [Program("train step", lambda: p.train_step.trace(p.state, p.frozen, batch), batch)]


def every(run: Run, p: Programs) -> list[Program]:
    """What trains, and what runs before, after and between: evaluation, general text, answers, a precomputed reference's pass,
    and what draws and judges completions."""
    shards, whole = sharding.row_shards(p.mesh), tree.combine(p.state.trainable, p.frozen)
    (first,) = found = steps(run, p)
    held = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), first.batch)
    at = (p.state.trainable, p.frozen)
    if isinstance(run.data, Rollouts):
        found += _drawing(run, p, whole, first.batch)
    elif run.data.holds_out:
        found.append(
            Program("evaluation", lambda: p.eval_step.trace(*at, sharded_batch(p, held), p.state.aux))
        )
        if run.samples:
            found.append(Program("answers", lambda: _answers(run, p, whole)))
    if run.general is not None and p.objective.text is not None:  # else it is evaluation's program
        text = evaluate.general_rows(run.data, run.general).abstract(shards)
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), text)
        found.append(
            Program("general text", lambda: p.text_step.trace(*at, sharded_batch(p, one), p.state.aux))
        )
    if _precomputed(run, p):
        plain = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), run.data.abstract(shards)
        )
        found.append(Program("reference", lambda: reference_step(p).trace(whole, sharded_batch(p, plain))))
    return found


def _drawing(run: Run, p: Programs, whole: Any, batch: Any) -> list[Program]:
    """The sampler with its cache, the pass that judges what was drawn, and those of the scorers."""
    data: Any = run.data
    rows = _prompts(p, data.batch, padded_length(data.max_prompt))
    s = generate.Sampling(data.max_new, data.temperature, data.top_k, data.top_p)
    sampler: Any = generate.make_sampler(p.partition.model, s, tuple(run.model.config.eos), data.group)
    found = [Program("drawing", lambda: sampler.trace(whole, rows, _key(p)))]
    if not isinstance(data, OnlinePairs):
        judge = jax.jit(partial(score_tokens, p.objective))
        found.append(Program("judging", lambda: judge.trace(whole, p.state.aux, batch)))
    else:  # pairs are learned from, and groups drawn
        shape = group_row_shape(data, data.max_prompt)
        batch = sharded_batch(p, rollout_batch_shapes(data, shape, sharding.row_shards(p.mesh)))
    for reward in data.rules.rewards:
        if isinstance(reward, HeadReward):
            score: Any = jax.jit(partial(head_scores, p.partition.model, reward))
            found.append(
                Program(f"scoring by {reward.name}", partial(score.trace, whole, p.state.aux, batch))
            )
    return found


def _prompts(p: Programs, rows: int, size: int) -> Tokens:
    everywhere = sharding.replicated(p.mesh)
    at = lambda last, dtype=np.int32: jax.ShapeDtypeStruct((rows, last), dtype, sharding=everywhere)  # noqa: E731
    return Tokens(at(size), at(size), at(size), at(1), at(1), at(1, np.float32))


def _key(p: Programs) -> Any:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(p.mesh))


def _precomputed(run: Run, p: Programs) -> bool:
    return p.objective.facts.reference == "precomputed" and isinstance(run.data, PairRows)


def _answers(run: Run, p: Programs, whole: Any) -> Any:
    """Held-out prompts, each as long as a row may be, with the cache for what is answered."""
    size = -(-run.data.max_length // generate.BUCKET) * generate.BUCKET
    answer: Any = generate.make_generate(p.partition.model, run.sampling, tuple(run.model.config.eos))
    return answer.trace(whole, _prompts(p, run.samples, size), _key(p))
