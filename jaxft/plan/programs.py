"""The programs of a run to plan, traced for abstract arrays of the largest shapes that its settings allow."""

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
from jaxft.tree import Batch, Params


@dataclass(frozen=True)
class Program:
    """One program of a run. trace() returns jax.stages.Traced; batch: of a train step, otherwise None."""

    name: str
    trace: Callable[[], jax.stages.Traced]
    batch: Batch = None


def train_programs(run: Run, p: Programs) -> list[Program]:
    """Return the train step of a run."""
    batch: Any = run.data.abstract(sharding.row_shards(p.mesh))
    if _precomputed(run, p) and isinstance(run.data, PairRows):
        batch = run.data.abstract(sharding.row_shards(p.mesh), reference=True)
    batch = sharded_batch(p, p.objective.batch_spec(batch))
    return [Program("train step", lambda: p.train_step.trace(p.state, p.frozen, batch), batch)]


def all_programs(run: Run, p: Programs) -> list[Program]:
    """Return the train step and all other programs of a run.

    These are evaluation, sample completions, general text, precomputed reference log-probs, and for rollouts
    sampling, log-probs and reward heads.
    """
    shards, params = sharding.row_shards(p.mesh), tree.combine(p.state.trainable, p.frozen)
    (first,) = found = train_programs(run, p)
    held_out = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), first.batch)
    args = (p.state.trainable, p.frozen)
    if isinstance(run.data, Rollouts):
        found += _rollout_programs(run, p, params, first.batch)
    elif run.data.holds_out:
        found.append(
            Program("evaluation", lambda: p.eval_step.trace(*args, sharded_batch(p, held_out), p.state.aux))
        )
        if run.samples:
            found.append(Program("sample completions", lambda: _sample_completions(run, p, params)))
    if run.general is not None and p.objective.text is not None:  # otherwise it is the evaluation program
        text = evaluate.general_rows(run.data, run.general).abstract(shards)
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), text)
        found.append(
            Program("general text", lambda: p.text_step.trace(*args, sharded_batch(p, batch), p.state.aux))
        )
    if _precomputed(run, p):
        plain = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), run.data.abstract(shards)
        )
        found.append(
            Program("reference log-probs", lambda: reference_step(p).trace(params, sharded_batch(p, plain)))
        )
    return found


def _rollout_programs(run: Run, p: Programs, params: Params, batch: Batch) -> list[Program]:
    """Return the programs of rollouts: sampling, log-probs with the training program, and reward heads."""
    data: Any = run.data
    rows = _prompts(p, data.batch, padded_length(data.max_prompt))
    s = generate.Sampling(data.max_new, data.temperature, data.top_k, data.top_p)
    sampler: Any = generate.make_sampler(p.partition.model, s, tuple(run.model.config.eos), data.group)
    found = [Program("rollout sampling", lambda: sampler.trace(params, rows, _key(p)))]
    if not isinstance(data, OnlinePairs):
        logps: Any = jax.jit(partial(score_tokens, p.objective))
        found.append(Program("rollout log-probs", lambda: logps.trace(params, p.state.aux, batch)))
    else:  # it samples groups and trains on pairs
        shape = group_row_shape(data, data.max_prompt)
        batch = sharded_batch(p, rollout_batch_shapes(data, shape, sharding.row_shards(p.mesh)))
    for reward in data.rules.rewards:
        if isinstance(reward, HeadReward):
            score: Any = jax.jit(partial(head_scores, p.partition.model, reward))
            found.append(
                Program(f"reward head {reward.name}", partial(score.trace, params, p.state.aux, batch))
            )
    return found


def _prompts(p: Programs, rows: int, size: int) -> Tokens:
    replicated = sharding.replicated(p.mesh)

    def array(columns: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, columns), dtype, sharding=replicated)

    return Tokens(array(size), array(size), array(size), array(1), array(1), array(1, np.float32))


def _key(p: Programs) -> Any:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(p.mesh))


def _precomputed(run: Run, p: Programs) -> bool:
    return p.objective.facts.reference == "precomputed" and isinstance(run.data, PairRows)


def _sample_completions(run: Run, p: Programs, params: Any) -> Any:
    """Trace the sampler for held-out prompts of the maximum length, with its cache."""
    size = -(-run.data.max_length // generate.BUCKET) * generate.BUCKET
    sampler: Any = generate.make_generate(p.partition.model, run.sampling, tuple(run.model.config.eos))
    return sampler.trace(params, _prompts(p, run.samples, size), _key(p))
