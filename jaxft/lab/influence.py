"""Influence of training rows on held-out rows, from gradients of the adapter: which rows are mislabelled,
which are duplicates, and which are worth training on.

The gradient of each row's loss with respect to the trainable parameters is projected at random onto a few
thousand numbers, in the same pass as it is computed. The influence of a row is the cosine between its
gradient and that of the mean loss of the held-out rows, as in LESS (Xia et al. 2024, arXiv:2402.04333); the
product of the two is TracIn (Pruthi et al. 2020, arXiv:2002.08484). A step along a row of negative influence
raises the held-out loss.

    parts = jaxft.prepare("dpo", rows)
    for step in range(parts.steps):
        ...                                          # train, or restore a checkpoint
    found = influence_of_rows(parts, state)
    found.names[found.order[:10]]                    # the ten most harmful rows

Cost: a forward and a backward pass over the rows, without an optimizer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxft import tree
from jaxft.batch import Pairs, TrainState
from jaxft.data.packing import pair_layout
from jaxft.data.packing.pack import RowShape, round_up
from jaxft.data.pairs import PairSource
from jaxft.distributed import sharding
from jaxft.objectives.objective import Objective
from jaxft.train.python_api import Prepared
from jaxft.tree import Params

SIZE = 4096  # numbers of a projected gradient
ROWS_AT_ONCE = 8
SAME = 0.98  # cosine of two rows' gradients from which they count as duplicates


@dataclass(frozen=True)
class Influence:
    """Projected gradients of n training rows and of the mean loss of the held-out rows.

    names: FILE:LINE of each row.
    """

    names: np.ndarray
    gradients: Float[np.ndarray, "n size"]
    held_out: Float[np.ndarray, " size"]

    @cached_property
    def cosine(self) -> Float[np.ndarray, " n"]:
        """Cosine of each row's gradient with the held-out one: above 0 the row helps."""
        return self.product / (np.linalg.norm(self.gradients, axis=1) * np.linalg.norm(self.held_out) + 1e-30)

    @cached_property
    def product(self) -> Float[np.ndarray, " n"]:
        """How much a step of size 1 along each row's gradient lowers the held-out loss (TracIn)."""
        return self.gradients @ self.held_out

    @property
    def order(self) -> Int[np.ndarray, " n"]:
        """Rows from the most harmful to the most helpful."""
        return np.argsort(self.cosine, kind="stable")

    def duplicates(self, same: float = SAME) -> list[tuple[int, int, float]]:
        """Return pairs of rows whose gradients have a cosine of at least `same`, in absolute value: below 0
        for rows that repeat one another with opposite labels.
        """
        unit = self.gradients / (np.linalg.norm(self.gradients, axis=1, keepdims=True) + 1e-30)
        found = list[tuple[int, int, float]]()
        for begin in range(0, len(unit), 1024):
            cosines = unit[begin : begin + 1024] @ unit.T
            first, second = np.nonzero(np.abs(cosines) >= same)
            near = second > first + begin
            found += [
                (int(i + begin), int(j), float(cosines[i, j])) for i, j in zip(first[near], second[near])
            ]
        return found

    def subset(self, fraction: float) -> Int[np.ndarray, " k"]:
        """Return the rows of highest influence, a fraction of all, in their order in the data (LESS)."""
        count = max(1, round(fraction * len(self.names)))
        return np.sort(self.order[::-1][:count])


def influence_of_rows(
    parts: Prepared, state: TrainState | None = None, size: int = SIZE, seed: int = 0
) -> Influence:
    """Return the influence of each training row of a preference run. state: of the run, after some of its
    steps; by default the state at step 0.

    Runs on one device. Raises ValueError for a run of other data, a loss that couples rows, and without
    held-out rows.
    """
    source, objective = parts.source, parts.objective
    if not isinstance(source, PairSource):
        raise ValueError(
            "influence is of pairs: use a recipe with chosen and rejected responses, such as dpo"
        )
    if objective.facts.coupled:
        raise ValueError(
            "this loss couples the rows of a batch, so a row alone has no gradient; use loss=dpo"
        )
    if not len(source.split.held):
        raise ValueError("no rows are held out; set held_out=FILE or a fraction, which the influence is on")
    state = parts.state if state is None else state
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    one = jax.tree.map(
        lambda x: jax.device_put(x, jax.devices()[0]), (state.trainable, parts.frozen, state.aux)
    )
    key = jax.random.key(seed)
    with jax.set_mesh(mesh):
        run = jax.jit(
            lambda trainable, frozen, aux, batch: _sketches(
                objective, trainable, frozen, aux, batch, key, size
            )
        )
        train, held = (
            np.concatenate(
                [np.asarray(run(*one, batch))[used] for batch, used in _single_rows(source, which)]
            )
            for which in (source.split.train, source.split.held)
        )
    names = np.asarray([source.split.rows.names[i] for i in source.split.train])
    return Influence(names, train, held.mean(0))


def _single_rows(source: PairSource, members: Sequence[int]) -> Iterator[tuple[Pairs, np.ndarray]]:
    """Yield batches [rows, 1, ...] of one pair per row, in the order of `members`, and which rows are
    used.
    """
    pairs, layout = source.split.rows, source.layout
    members = np.asarray(members, np.int64)
    length = round_up(int(layout.lengths[members].max()), 64)
    shape = RowShape(length, min(round_up(int(pairs.targets[members].max()), 8), length), 1)
    single = replace(layout, rows=replace(layout.rows, rows=ROWS_AT_ONCE, shape=shape))
    for begin in range(0, len(members), ROWS_AT_ONCE):
        chosen = members[begin : begin + ROWS_AT_ONCE]
        plan = pair_layout.plan_rows(chosen, np.arange(len(chosen)), ROWS_AT_ONCE)
        (batch,) = single.evaluation(plan)
        batch = jax.tree.map(lambda x: x[0][:, None], batch)
        used = batch.index[:, 0, 0] >= 0
        yield replace(batch, pair_weights=(batch.index >= 0).astype(np.float32)), used


def _sketches(
    objective: Objective,
    trainable: Params,
    frozen: Params,
    aux: Any,
    batch: Pairs,
    key: Key[Array, ""],
    size: int,
) -> Float[Array, "rows size"]:
    """The projected gradient of each row of a batch [rows, 1, ...]."""

    def of_row(row: Pairs) -> Float[Array, " size"]:
        grads = jax.grad(lambda t: objective(tree.combine(t, frozen), row, None, aux)[0])(trainable)
        return project(grads, key, size)

    return jax.vmap(of_row)(batch)


def project(grads: Params, key: Key[Array, ""], size: int) -> Float[Array, " size"]:
    """Project gradients at random: each number gets a random sign and is added to one of `size` sums.

    The product of two projections has the expectation of the product of the gradients (a count sketch,
    Charikar et al. 2002), at the cost of one pass over them.
    """
    total = jnp.zeros(size)
    for n, leaf in enumerate(jax.tree.leaves(grads)):
        signs = jax.random.rademacher(jax.random.fold_in(key, n), (leaf.size,), jnp.int8)
        signed = leaf.reshape(leaf.size).astype(jnp.float32) * signs.astype(jnp.float32)
        padded = jnp.pad(signed, (0, -leaf.size % size))
        total = total + padded.reshape(padded.size // size, size).sum(0)
    return total
