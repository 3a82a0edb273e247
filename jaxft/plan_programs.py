"""A run's programs as the planner compiles them: of shapes alone, each the largest that the settings allow."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxft import attention, generate, report, sharding, train, tree
from jaxft.batch import Tokens
from jaxft.data.pairs import PairRows, abstract_pairs
from jaxft.programs import Programs, placed, reference_step


@dataclass(frozen=True)
class Program:
    """One of a run's programs. trace() -> jax.stages.Traced; batch: the train step's, None for a program that doesn't train."""

    name: str
    trace: Callable[[], Any]
    batch: Any = None


def steps(run: train.Run, p: Programs) -> list[Program]:
    """What trains. The weights and the optimizer's state are there in each of a run's programs."""
    shards, data = sharding.row_shards(p.mesh), run.data
    shapes: Any = data.abstract(shards)
    if _precomputed(p) and isinstance(data, PairRows):
        shapes = abstract_pairs(data, shards, reference=True)
    batch = placed(p, shapes)
    return [Program("train step", lambda: p.train_step.trace(p.state, p.frozen, batch), batch)]


def every(run: train.Run, p: Programs) -> list[Program]:
    """What trains, and what runs before, after and between: evaluation, general text, answers, a precomputed reference's pass."""
    shards, whole = sharding.row_shards(p.mesh), tree.combine(p.state.trainable, p.frozen)
    (first,) = found = steps(run, p)
    held = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), first.batch)
    at = (p.state.trainable, p.frozen)
    if run.data.held_out not in (None, "none", 0):
        found.append(Program("evaluation", lambda: p.eval_step.trace(*at, placed(p, held), p.state.aux)))
        if run.samples:
            found.append(Program("answers", lambda: _answers(run, p, whole)))
    if run.general is not None and hasattr(p.objective, "text"):  # else it is evaluation's program
        text = report.general_rows(run.data, run.general).abstract(shards)
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), text)
        found.append(Program("general text", lambda: p.text_step.trace(*at, placed(p, one), p.state.aux)))
    if _precomputed(p) and isinstance(run.data, PairRows):
        plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), run.data.abstract(shards))
        found.append(Program("reference", lambda: reference_step(p).trace(whole, placed(p, plain))))
    return found


def _precomputed(p: Programs) -> bool:
    return bool(getattr(p.objective, "precomputed", False))


def _answers(run: train.Run, p: Programs, whole: Any) -> Any:
    """Held-out prompts, each as long as a row may be, with the cache for what is answered."""
    everywhere = sharding.replicated(p.mesh)
    size = -(-run.data.max_length // generate.BUCKET) * generate.BUCKET
    at = lambda last, dtype=np.int32: jax.ShapeDtypeStruct((run.samples, last), dtype, sharding=everywhere)  # noqa: E731
    prompts = Tokens(at(size), at(size), at(size), at(1), at(1), at(1, np.float32))
    kernel = attention.choose(p.mesh, run.model.config.head_dim, run.model.dtype)
    answer: Any = generate.make_generate(p.trained.model.with_attention(kernel), run.sampling, tuple(run.model.config.eos))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return answer.trace(whole, prompts, jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere))
