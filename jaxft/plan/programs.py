"""The programs of a run to plan, traced for abstract arrays of the largest shapes that its settings allow."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from jaxft import tree
from jaxft.data.pairs import PairRows, PairSource
from jaxft.data.prompts import padded_length, rollout_batch_shapes
from jaxft.distributed import sharding
from jaxft.engine.programs import program_tracers
from jaxft.engine.state import Decoding, Slots, slots_for, state_shapes
from jaxft.rl.online_pairs import OnlinePairs
from jaxft.rl.reward_models import HeadReward, head_scores
from jaxft.rl.rollout import Rollouts
from jaxft.rl.rollout_layout import score_tokens
from jaxft.rl.rollout_sampler import engine_sizes
from jaxft.train.evaluate import evaluate
from jaxft.train.programs import Programs, reference_step, sharded_batch
from jaxft.train.settings import Run
from jaxft.tree import Batch, Params


@dataclass(frozen=True)
class Program:
    """One program of a run.

    trace() returns jax.stages.Traced. batch: of a train step, otherwise None. state: shapes of a sampler's
    state, which is not part of the run's, otherwise None.
    """

    name: str
    trace: Callable[[], jax.stages.Traced]
    batch: Batch = None
    state: Any = None


def train_programs(run: Run, p: Programs, pairs: PairSource | None = None) -> list[Program]:
    """Return the train step of a run. pairs: the source of its preference rows, whose batches are smaller
    than the largest ones that the settings allow.
    """
    batch: Any = run.data.abstract(sharding.row_shards(p.mesh))
    if pairs is not None:
        batch = pairs.abstract(_precomputed(run, p))
    elif _precomputed(run, p) and isinstance(run.data, PairRows):
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
            stop = tuple(run.model.config.eos)
            decoding = Decoding(p.partition.model, run.sampling, stop)
            slots = slots_for(run.samples, 1, run.data.max_length)
            found += _sampling("sample completions", p, params, decoding, slots)
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
    size, stop = padded_length(data.max_prompt), tuple(run.model.config.eos)
    d, slots = engine_sizes(data, p.partition.model, stop, data.group, size, p.mesh)
    found = _sampling("rollout sampling", p, params, d, slots)
    if not isinstance(data, OnlinePairs):
        logps: Any = jax.jit(partial(score_tokens, p.objective))
        found.append(Program("rollout log-probs", lambda: logps.trace(params, p.state.aux, batch)))
    else:  # it samples groups and trains on pairs
        shape = data.group_row_shape(data.max_prompt)
        batch = sharded_batch(p, rollout_batch_shapes(data, shape, sharding.row_shards(p.mesh)))
    for reward in data.rules.rewards:
        if isinstance(reward, HeadReward):
            score: Any = jax.jit(partial(head_scores, p.partition.model, reward))
            found.append(
                Program(f"reward head {reward.name}", partial(score.trace, params, p.state.aux, batch))
            )
    return found


def _sampling(name: str, p: Programs, params: Params, d: Decoding, slots: Slots) -> list[Program]:
    """Return the programs of sampling with the largest state: prefill, and decoding that reads all keys."""
    tracers = program_tracers(d, params, slots, p.mesh)
    start = max((key for key in tracers if key[0] == "start"), key=lambda key: key[3])
    decode = max(key for key in tracers if key[0] == "decode")
    state = state_shapes(d, slots, slots.rows, p.mesh)
    prefill = Program(f"{name}: prefill", tracers[start], state=state)
    return [prefill, Program(name, tracers[decode], state=state)]


def _precomputed(run: Run, p: Programs) -> bool:
    return p.objective.facts.reference == "precomputed" and isinstance(run.data, PairRows)
