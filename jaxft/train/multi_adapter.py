"""Several adapters on one base in one program: each has its own loss, learning rate, clipping and skips.

The adapters take turns: `lax.map` over blocks of `at_once` adapters, so that activations are those of one block whatever their
number. Within a block the rows go through the model together. The reference runs once for all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxft import tree
from jaxft.batch import TrainState
from jaxft.nn import lora
from jaxft.objectives import metrics
from jaxft.objectives.objective import Facts, Objective
from jaxft.optim.optimizer import Optimizer
from jaxft.optim.update import StepInfo
from jaxft.train.step import accumulate_gradients

Found = tuple[Any, dict[str, Any]]  # gradients of the stacked adapters, metrics; every leaf [K, ...]


@dataclass(frozen=True)
class Together:
    """K objectives over one base, an adapter each.

    lead: the objective whose forward pass is used for all. reference: its kind, see objective.Facts.
    apart: each adapter learns from rows of its own, [K * micro, rows, ...], and not all from the same. at_once: adapters that
    go through the model in one forward pass; it divides K.
    """

    objectives: tuple[Objective, ...]
    lead: int
    reference: str
    apart: bool = False
    at_once: int = 1

    @property
    def coupled(self) -> bool:
        """Whether one of the losses couples rows: then microbatches are judged together."""
        return any(o.facts.coupled for o in self.objectives)

    @property
    def once(self) -> bool:
        """Whether the reference is the same for all and is run once."""
        return self.reference == "start" and not self.apart


def together(objectives: Sequence[Objective], apart: bool = False, at_once: int = 1) -> Together:
    """Put objectives together. Raises ValueError where they don't go together."""
    if len(objectives) % at_once:
        raise ValueError(f"{len(objectives)} adapters don't divide into blocks of {at_once}; use a divisor")
    kinds = [o.facts.reference for o in objectives]
    known = {kind for kind in kinds if kind != "none"}
    if len(known) > 1:
        raise ValueError(
            f"the runs know their reference in different ways ({', '.join(sorted(known))}); choose one for all"
        )
    lead = next((i for i, kind in enumerate(kinds) if kind != "none"), 0)
    return Together(tuple(objectives), lead, kinds[lead], apart, at_once)


def gradients(t: Together, trainable: Sequence[Any], frozen: Any, batch: Any, aux: Sequence[Any]) -> Found:
    """Gradients of each adapter's own loss, and its metrics.

    trainable, aux: K, as a run alone has them. frozen: (the base tree, K trees of the others' frozen leaves).
    batch: [micro, rows, ...].
    """
    key = jax.random.key(0)  # nothing is drawn: adapters with dropout train alone
    nothing, size = trainable[0]["base"], _rows(batch)
    batch = _with_reference(t, (trainable, frozen), batch, aux)
    if t.apart:
        K = len(t.objectives)
        batch = jax.tree.map(lambda x: x.reshape(K, x.shape[0] // K, *x.shape[1:]), batch)

    def block(number, adapters, kept):
        trained, fixed = adapters
        rows = batch
        if t.apart:
            mine = jax.tree.map(
                lambda x: jax.lax.dynamic_slice_in_dim(x, number * t.at_once, t.at_once), batch
            )
            rows = jax.tree.map(
                lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2], *x.shape[3:]),
                mine,
            )
        params = ({"base": nothing, **trained}, {"base": frozen[0], **fixed})
        grads, found = accumulate_gradients(_block(t, (number, size), kept), params, rows, key, aux)
        return own(grads), found

    return _by_block(t, block, _stack(trainable, frozen), _own_references(t, aux))


def make_update(objective: Objective, optimizer: Optimizer) -> Callable:
    """`(state, number, gradients [K], metrics [K]) -> (state, metrics)` of one adapter: the second half of a run's train step.

    Where its loss or gradient isn't finite the adapter, its optimizer and aux stay as they are, and the others go on.
    """

    def update(state: TrainState, number: Any, grads: Any, found: Any) -> tuple[TrainState, dict[str, Any]]:
        grad = {**state.trainable, **lora.adapter_of_stack(grads, number, own(state.trainable))}
        mine = jax.tree.map(lambda x: x[number], found)
        norm = optax.tree.norm(grad)
        ok = jnp.isfinite(norm) & jnp.isfinite(mine["loss"].total)
        trainable, opt_state = optimizer.update(grad, state.opt_state, state.trainable, StepInfo(norm, ok))
        aux = objective.update(state.aux, trainable, mine)
        aux = jax.tree.map(lambda new, old: jnp.where(ok, new, old), aux, state.aux)
        bad = jnp.where(ok, state.bad * jnp.array([1, 0]), state.bad + 1)
        one = jnp.ones((), norm.dtype)
        told = {"grad_norm": metrics.Sum(norm, one), "skipped": metrics.Sum((~ok).astype(norm.dtype), one)}
        return TrainState(state.step + 1, trainable, opt_state, aux, bad), told

    return update


def make_eval_step(t: Together) -> Callable:
    """`(trainable, frozen, batch [1, rows, ...], aux) -> metrics [K]` of held-out rows, the same for all adapters.

    If a loss couples rows it gives what was seen instead, [K, rows, ...], to be judged with the other batches' by judge_each.
    """
    same = replace(t, apart=False)

    def step(trainable: Any, frozen: Any, batch: Any, aux: Any) -> Any:
        stack = _stack(trainable, frozen)
        size, batch = _rows(batch), _part(_with_reference(same, (trainable, frozen), batch, aux), 0)

        def block(number, adapters, kept):
            params = {"base": frozen[0], **tree.combine(*adapters)}
            seen = _see(same, params, batch, kept)
            if t.coupled:
                return jax.tree.map(
                    lambda x: x.reshape(t.at_once, x.shape[0] // t.at_once, *x.shape[1:]), seen
                )
            return _judge(same, (number, size), seen, aux)[1]

        return _by_block(same, block, stack, _own_references(same, aux))

    return step


def judge_each(t: Together, seen: Any, aux: Any) -> dict[str, Any]:
    """Metrics [K] of all held-out rows, [K, rows, ...], as make_eval_step gives them of a batch."""
    found = [o.loss(jax.tree.map(lambda x, k=k: x[k], seen), aux[k])[1] for k, o in enumerate(t.objectives)]
    return _metrics_stacked(found, _names(found))


def _block(t: Together, which: tuple[Any, int], kept: Any) -> Objective:
    """The objective of a block of adapters: the sum of their losses. which: the block's number, an adapter's rows of a microbatch."""

    def forward(params: Any, batch: Any, key: Any, aux: Any) -> Any:
        return _see(t, params, batch, kept)

    def loss(outputs: Any, aux: Any) -> tuple[Array, dict[str, Any]]:
        return _judge(t, which, outputs, aux)

    return Objective(forward, loss, facts=Facts(coupled=t.coupled))


def own(whole: Any) -> dict[str, Any]:
    """What a run has for itself: all but the base, its adapter and a head if it has one."""
    return {name: x for name, x in whole.items() if name != "base"}


def _stack(trainable: Any, frozen: Any) -> tuple[Any, Any]:
    return lora.stack_adapters([own(x) for x in trainable]), lora.stack_adapters(frozen[1])


def _rows(batch: Any) -> int:
    """Rows of a microbatch."""
    return jax.tree.leaves(batch)[0].shape[1]


def _part(batch: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], batch)


def _by_block(t: Together, fn: Callable, stack: Any, kept: Any) -> Any:
    """fn(block's number, its adapters, its references) for every block; results [K, ...]."""
    count = len(t.objectives) // t.at_once
    split = lambda x: x.reshape(count, t.at_once, *x.shape[1:])  # noqa: E731
    blocks = jax.tree.map(split, (stack, kept))
    if count == 1:
        return fn(0, *_part(blocks, 0))
    found = jax.lax.map(lambda args: fn(args[0], *args[1]), (jnp.arange(count), blocks))
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), found)


def _own_references(t: Together, aux: Any) -> Any:
    """The references that adapters keep each for itself, [K, ...]."""
    if t.once or "reference" not in aux[t.lead]:
        return None
    return lora.stack_adapters(
        [own(aux[t.lead if "reference" not in a else k]["reference"]) for k, a in enumerate(aux)]
    )


def _with_reference(t: Together, params: tuple[Any, Any], batch: Any, aux: Any) -> Any:
    """The batch with the reference's log-probs, run here once for all adapters."""
    if not t.once:
        return batch
    trainable, frozen = params
    whole = {"base": frozen[0]}
    if "reference" in aux[t.lead]:
        whole = tree.combine(
            aux[t.lead]["reference"], {**whole, **tree.combine(own(trainable[t.lead]), frozen[1][t.lead])}
        )
    count = jax.tree.leaves(batch)[0].shape[0]
    see = lambda part: t.objectives[t.lead].forward(whole, part, None, {}).logp  # noqa: E731
    known = see(_part(batch, 0))[None] if count == 1 else jax.lax.map(see, batch)
    return replace(batch, reference=jax.lax.stop_gradient(known))


def _see(t: Together, params: Any, batch: Any, kept: Any) -> Any:
    """What a block's adapters see, [at_once * rows, ...]; adapters in params: [at_once, ...]."""
    view = lambda x: x[0] if t.at_once == 1 else jnp.moveaxis(x, 0, 1)  # noqa: E731  # layers first
    whole = {"base": params["base"], **jax.tree.map(view, own(params))}
    if not t.apart:
        batch = jax.tree.map(lambda x: jnp.concatenate([x] * t.at_once), batch)
    nothing = jax.tree.map(lambda x: None, params["base"])
    aux = {} if kept is None else {"reference": {"base": nothing, **jax.tree.map(view, kept)}}
    seen = t.objectives[t.lead].forward(whole, batch, None, aux)
    # the lead's own run of the reference, if it has one, is then dead code and no part of the program
    return replace(seen, reference=batch.reference) if t.once else seen


def _judge(t: Together, which: tuple[Any, int], seen: Any, aux: Any) -> tuple[Array, dict[str, Any]]:
    """(sum of the losses, metrics [at_once]) of a block, of which rows of several microbatches come one after the other."""
    (number, rows), G = which, t.at_once

    def part(g, x):
        parts = x.shape[0] // (G * rows)
        return x.reshape(parts, G, rows, *x.shape[1:])[:, g].reshape(parts * rows, *x.shape[1:])

    parts = [jax.tree.map(partial(part, g), seen) for g in range(G)]
    shapes = [jax.eval_shape(o.loss, parts[0], a)[1] for o, a in zip(t.objectives, aux, strict=True)]
    names = _names(shapes)

    def branch(first):
        def judged(parts):
            found = [t.objectives[first + g].loss(parts[g], aux[first + g]) for g in range(G)]
            return sum((loss for loss, _ in found[1:]), found[0][0]), _metrics_stacked(
                [m for _, m in found], names
            )

        return judged

    branches = [branch(first) for first in range(0, len(t.objectives), G)]
    return branches[0](parts) if len(branches) == 1 else jax.lax.switch(number, branches, parts)


def _names(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All names, each with a metric of its shape."""
    return {name: m for each in found for name, m in each.items()}


def _metrics_stacked(found: Sequence[dict[str, Any]], names: dict[str, Any]) -> dict[str, Any]:
    """Metrics [K]; one that an objective doesn't give is neutral."""
    whole = [
        {name: m.get(name) or metrics.neutral({name: like})[name] for name, like in names.items()}
        for m in found
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *whole)
