"""Influence of training pairs on held-out pairs, from gradients of the adapter: which rows are mislabelled,
which are duplicates, and which are worth training on.

`slopes_of_rows` is the fast way: by how much each training pair's margin, log pi(chosen) - log pi(rejected),
moves with a step along the gradient of the held-out margins. That is the product of the two gradients
(TracIn, Pruthi et al. 2020, arXiv:2002.08484), computed by two forward passes over the rows, a step ahead and
a step back, instead of a backward pass for each row. Below 0, the label is probably wrong.

`gradients_of_rows` computes the gradient of each row's loss, projected at random onto a few thousand numbers
(as LESS, Xia et al. 2024, arXiv:2402.04333): their cosines with the held-out gradient, and with one another.

    parts = jaxft.prepare("dpo", rows)
    state = ...                                      # train with parts.step, or restore a checkpoint
    found = slopes_of_rows(parts, state)
    found.names[found.order[:10]]                    # the ten most harmful rows

The first takes less time than an epoch of training, the second more.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from jaxft import tree
from jaxft.batch import Pairs, TrainState
from jaxft.data.data_settings import DataSettings
from jaxft.data.packing import pair_layout
from jaxft.data.packing.pack import RowShape, round_up
from jaxft.data.pairs import PairRows, PairSource
from jaxft.data.rows.dataset_rows import read_rows
from jaxft.data.rows.mixture import parse_sources
from jaxft.data.source import spread
from jaxft.distributed import sharding
from jaxft.objectives.logprobs import HeadInput
from jaxft.objectives.pair import response_sums
from jaxft.objectives.read_positions import read_logps_of_heads
from jaxft.train.python_api import Prepared
from jaxft.tree import Params

SIZE = 4096  # numbers of a projected gradient
ROWS_AT_ONCE = 8
NATS = 1.0  # by which the step raises the mean held-out margin, to first order
# held-out pairs whose gradient is computed: at most this fraction of the training pairs' number, or so many
HELD_OUT_FRACTION, FEWEST_HELD_OUT = 0.125, 16
SAME = 0.98  # cosine of two rows' gradients from which they count as duplicates


@dataclass(frozen=True)
class Influence:
    """Influence of n training rows on the held-out ones. names: FILE:LINE of each row. values: above 0 the
    row helps.
    """

    names: np.ndarray
    values: Float[np.ndarray, " n"]

    @property
    def order(self) -> Int[np.ndarray, " n"]:
        """Rows from the most harmful to the most helpful."""
        return np.argsort(self.values, kind="stable")

    def by_file(self) -> dict[str, float]:
        """Return the mean influence of the rows of each file, the least helpful first."""
        files = np.asarray([str(name).rpartition(":")[0] for name in self.names])
        means = {str(file): float(self.values[files == file].mean()) for file in np.unique(files)}
        return dict(sorted(means.items(), key=lambda item: item[1]))

    def subset(self, fraction: float) -> Int[np.ndarray, " k"]:
        """Return the rows of highest influence, a fraction of all, in their order in the data."""
        count = max(1, round(fraction * len(self.names)))
        return np.sort(self.order[::-1][:count])


@dataclass(frozen=True)
class RowGradients:
    """Projected gradients of the losses of n training rows, and of the mean loss of the held-out rows."""

    names: np.ndarray
    gradients: Float[np.ndarray, "n size"]
    held_out: Float[np.ndarray, " size"]

    @property
    def influence(self) -> Influence:
        """The cosine of each row's gradient with the held-out one (LESS)."""
        return Influence(self.names, _unit(self.gradients) @ _unit(self.held_out[None])[0])

    def duplicates(self, same: float = SAME) -> list[tuple[int, int, float]]:
        """Return pairs of rows whose gradients have a cosine of at least `same`, in absolute value: below 0
        for rows that repeat one another with opposite labels.
        """
        unit, pairs = _unit(self.gradients), list[tuple[int, int, float]]()
        for begin in range(0, len(unit), 1024):
            cosines = unit[begin : begin + 1024] @ unit.T
            for i, j in np.argwhere(np.abs(cosines) >= same).tolist():
                if j > i + begin:
                    pairs.append((i + begin, j, float(cosines[i, j])))
        return pairs


def _unit(x: Float[np.ndarray, "n size"]) -> Float[np.ndarray, "n size"]:
    return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-30)


class _Opened(NamedTuple):
    """A run on one device: its source of pairs, and its arrays."""

    source: PairSource
    mesh: Mesh
    trainable: Params
    frozen: Params
    aux: Any
    names: np.ndarray


def check_is_of_pairs(data: DataSettings) -> None:
    """Raise ValueError for a recipe whose rows are no pairs."""
    if not isinstance(data, PairRows):
        raise ValueError(
            "influence is of pairs; use a recipe with chosen and rejected responses, such as dpo"
        )


def _open(parts: Prepared, state: TrainState | None) -> _Opened:
    source = parts.source
    check_is_of_pairs(parts.run.data)
    assert isinstance(source, PairSource)
    if not len(source.split.held):
        raise ValueError("no rows are held out; set held_out=FILE or a fraction, which the influence is on")
    state, device = parts.state if state is None else state, jax.devices()[0]
    arrays = state.trainable, parts.frozen, state.aux
    trainable, frozen, aux = jax.tree.map(lambda x: jax.device_put(x, device), arrays)
    names = np.asarray([source.split.rows.names[i] for i in source.split.train])
    return _Opened(source, sharding.make_mesh(sharding.MeshShape(), [device]), trainable, frozen, aux, names)


# Slopes of margins


def slopes_of_rows(parts: Prepared, state: TrainState | None = None) -> Influence:
    """Return the slope of each training pair's margin along the gradient of the held-out margins: nats for
    each nat that the mean held-out margin rises.

    state: of the run, after some of its steps; by default the state at step 0. The gradient is of at most
    HELD_OUT_FRACTION as many held-out pairs as there are training pairs, or of FEWEST_HELD_OUT. Runs on one
    device. Raises ValueError for a run of other data or another kind of objective, and without held-out rows.
    """
    run = _open(parts, state)
    if not parts.model.generates:
        raise ValueError("slopes are of log-probs, and this run's model has a scalar head; use --gradients")

    def margins(trainable: Params, frozen: Params, batch: Pairs) -> Float[Array, "B P"]:
        params = tree.combine(trainable, frozen)
        head = HeadInput(parts.model, params, parts.model.hidden(params, batch)[0])
        (logps,) = read_logps_of_heads([head], (batch.read, batch.targets))
        sums = response_sums(logps.logp, batch.responses, batch.kinds, batch.pair_weights.shape[1])
        return sums["chosen"] - sums["rejected"]

    def held_out(trainable: Params, frozen: Params, batch: Pairs) -> Float[Array, ""]:
        return jnp.sum(jnp.where(batch.index >= 0, margins(trainable, frozen, batch), 0))

    def along(trainable: Params, step: Params, frozen: Params, batch: Pairs) -> Float[Array, "B P"]:
        ahead, back = (jax.tree.map(sign, trainable, step) for sign in (jnp.add, jnp.subtract))
        return margins(ahead, frozen, batch) - margins(back, frozen, batch)

    rows = run.source.split
    most = max(FEWEST_HELD_OUT, int(HELD_OUT_FRACTION * len(rows.train)))
    chosen = rows.held[spread(len(rows.held), most)]
    values = dict[int, float]()
    with jax.set_mesh(run.mesh):
        grad, add = jax.jit(jax.grad(held_out)), jax.jit(partial(jax.tree.map, jnp.add))
        slope = reduce(
            add, (grad(run.trainable, run.frozen, _on_rows(b)) for b in run.source.cover(chosen.tolist()))
        )
        squares = float(sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(slope)))
        size = NATS * len(chosen) / max(squares, 1e-30)  # raises the mean held-out margin by NATS
        step = jax.tree.map(lambda x: (size * x.astype(jnp.float32)).astype(x.dtype), slope)
        forward = jax.jit(along)
        for batch in map(_on_rows, run.source.cover(rows.train.tolist())):
            slopes = np.asarray(forward(run.trainable, step, run.frozen, batch))
            values |= {int(i): float(x) for i, x in zip(batch.index.flat, slopes.flat, strict=True) if i >= 0}
    return Influence(run.names, np.asarray([values[i] for i in rows.train]) / (2 * NATS))


def _on_rows(batch: Pairs) -> Pairs:
    """The rows of a batch [1, rows, ...]."""
    return jax.tree.map(lambda x: x[0], batch)


# Gradients of losses


def gradients_of_rows(
    parts: Prepared, state: TrainState | None = None, size: int = SIZE, seed: int = 0
) -> RowGradients:
    """Return the projected gradient of each training row's loss, and of the mean loss of held-out rows.

    See slopes_of_rows for state. Raises ValueError for a loss that couples rows, too.
    """
    run, objective = _open(parts, state), parts.objective
    if objective.facts.coupled:
        raise ValueError(
            "this loss couples the rows of a batch, so a row alone has no gradient; use loss=dpo"
        )
    key = jax.random.key(seed)

    def of_rows(trainable: Params, frozen: Params, aux: Any, batch: Pairs) -> Float[Array, "rows size"]:
        def of_row(row: Pairs) -> Float[Array, " size"]:
            grads = jax.grad(lambda t: objective(tree.combine(t, frozen), row, None, aux)[0])(trainable)
            return project(grads, key, size)

        return jax.vmap(of_row)(batch)

    with jax.set_mesh(run.mesh):
        compiled, arrays = jax.jit(of_rows), (run.trainable, run.frozen, run.aux)
        train, held = (
            np.concatenate(
                [np.asarray(compiled(*arrays, rows))[used] for rows, used in _single_rows(run.source, which)]
            )
            for which in (run.source.split.train, run.source.split.held)
        )
    return RowGradients(run.names, train, held.mean(0))


def rows_by_name(train: str) -> dict[str, dict[str, Any]]:
    """Return the columns of all rows of data.train by FILE:LINE."""
    parts = (read_rows(source.ref) for source in parse_sources(train))
    return {row.name: row.fields for rows in parts for row in rows}


def _single_rows(source: PairSource, members: Int[np.ndarray, " n"]) -> Iterator[tuple[Pairs, np.ndarray]]:
    """Yield batches [rows, 1, ...] of one pair per row, in the order of `members`, and which rows are
    used.
    """
    pairs, layout = source.split.rows, source.layout
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
