"""Influence of training pairs on held-out pairs: which rows are mislabelled, which are duplicates, which are
worth training on, and which source harms.

`margins_of_rows` is fast: it takes less than half an epoch of training. The gradient of a pair's margin,
log pi(chosen) - log pi(rejected), with respect to a linear map of the last hidden states needs only a forward
pass of the layers; it is projected to a vector of length 1024 (as LoGra, Choe et al. 2024, arXiv:2405.13954).
A ridge regression on the gradients of all other rows, held-out ones included, predicts each row's margin:
their influence function on it (Koh & Liang 2017, arXiv:1703.04730), with the Gauss-Newton Hessian. A margin
below 0 means that the row's label contradicts the other rows, and is probably wrong.

`gradients_of_rows` computes the gradient of each row's loss with respect to all trainable parameters,
projected at random to a vector of length 4096. A row's influence is the cosine with the held-out gradient. It
takes longer than an epoch. This is LESS (Xia et al. 2024, arXiv:2402.04333) for one checkpoint and plain
gradients; LESS adds the cosines of several checkpoints, and scales gradients of training rows as Adam does.

    parts = jaxft.prepare("dpo", rows, held_out="held.jsonl")
    state = ...                                      # train with parts.step, or restore a checkpoint
    influence = margins_of_rows(parts, state)
    influence.names[influence.order[:10]]            # the ten most harmful rows

`train_without_sources` trains one adapter with all sources and one without each of them, in one program, and
compares their held-out losses.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from jaxft.batch import Pairs
from jaxft.data.data_settings import DataSettings
from jaxft.data.packing import pair_layout
from jaxft.data.packing.pack import RowShape, round_up
from jaxft.data.pairs import PairRows, PairSource
from jaxft.data.rows.dataset_rows import find_data, read_rows
from jaxft.data.rows.mixture import parse_sources, sources_with_metrics
from jaxft.distributed import sharding
from jaxft.nn import tree
from jaxft.nn.tree import Aux, Metrics, Params
from jaxft.objectives.intervals import Paired, paired_means
from jaxft.objectives.logprobs import LanguageModel, weighted_loss
from jaxft.objectives.metrics import LOSS, WEIGHT
from jaxft.objectives.objective import Objective
from jaxft.objectives.read_positions import gather_read
from jaxft.report.ranking import read_held_out
from jaxft.train.loop import train_sweep
from jaxft.train.python_api import Prepared
from jaxft.train.settings import Run

SIZE = 4096  # length of a projected gradient
ROWS_AT_ONCE = 8
SIDE = 32  # a margin's gradient is projected to a matrix [SIDE, SIDE]
ROW_TOKENS, SPARE = 1024, 1.05  # tokens of a row, and spare read positions; see _full_rows
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # that predicted_margins tries; gradients have norm 1
SAME = 0.98  # cosine of two rows' gradients from which they count as duplicates


@dataclass(frozen=True)
class Influence:
    """How much each of n training rows helps the held-out rows. names: FILE:LINE of each row. values: below 0
    the row harms; margins or cosines, see the module's docstring.
    """

    names: np.ndarray
    values: Float[np.ndarray, " n"]

    @property
    def order(self) -> Int[np.ndarray, " n"]:
        """Indices of the rows, from the most harmful to the most helpful."""
        return np.argsort(self.values, kind="stable")

    def by_file(self) -> dict[str, float]:
        """Return file -> mean influence of its rows, the least helpful file first."""
        files = np.asarray([str(name).rpartition(":")[0] for name in self.names])
        means = {str(file): float(self.values[files == file].mean()) for file in np.unique(files)}
        return dict(sorted(means.items(), key=lambda item: item[1]))

    def subset(self, fraction: float) -> Int[np.ndarray, " k"]:
        """Return the indices of a fraction of the rows, of highest influence, in ascending order."""
        count = max(1, round(fraction * len(self.names)))
        return np.sort(self.order[::-1][:count])


@dataclass(frozen=True)
class MarginGradients:
    """Projected gradients of the margins of n training pairs and h held-out pairs. Flipping a pair's label
    negates its gradient. names: FILE:LINE of each training pair.
    """

    names: np.ndarray
    train: Float[np.ndarray, "n size"]
    held_out: Float[np.ndarray, "h size"]

    @property
    def influence(self) -> Influence:
        """The margin of each training pair that the other pairs predict; see predicted_margins.

        A training pair has weight 1 in the regression, a held-out pair max(1, n / h).
        """
        n, h = len(self.train), len(self.held_out)
        weight = np.repeat([1.0, max(1.0, n / h)], [n, h])
        unit = _unit(np.concatenate([self.train, self.held_out]).astype(np.float64))
        return Influence(self.names, predicted_margins(unit, weight, n)[:n])


@dataclass(frozen=True)
class RowGradients:
    """Projected gradients of the losses of n training rows, and of the mean loss of the held-out rows."""

    names: np.ndarray
    gradients: Float[np.ndarray, "n size"]
    held_out: Float[np.ndarray, " size"]

    @property
    def influence(self) -> Influence:
        """The cosine of each row's gradient with the held-out gradient."""
        return Influence(self.names, _unit(self.gradients) @ _unit(self.held_out[None])[0])

    def duplicates(self, same: float = SAME) -> list[tuple[int, int, float]]:
        """Return (i, j, cosine) for all rows i < j whose gradients have a cosine of absolute value `same` or
        more. It is negative for two rows with the same content and opposite labels.
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
    """A run on one device: its source of pairs, its arrays, and the names of the training rows."""

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
            "influence is computed for preference pairs only; use a recipe with chosen and rejected "
            "responses, such as dpo"
        )


def _open(parts: Prepared) -> _Opened:
    source, state = parts.source, parts.state
    check_is_of_pairs(parts.run.data)
    assert isinstance(source, PairSource)
    if not len(source.split.held):
        raise ValueError("no rows are held out to compute the influence on; set held_out=FILE or a fraction")
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    # with a sharding on this mesh: put on a device alone, an array keeps its old mesh in its type
    trainable, frozen, aux = jax.device_put(
        (state.trainable, parts.frozen, state.aux), sharding.replicated(mesh)
    )
    folders, split = source_folders(parts.run.data.train), source.split
    names = np.asarray([f"{folders[split.sources[i]]}{split.rows.names[i]}" for i in split.train])
    return _Opened(source, mesh, trainable, frozen, aux, names)


# Margins that the other rows predict


def margins_of_rows(parts: Prepared) -> Influence:
    """Return the influence of each training pair: its margin, as all other pairs predict it if theirs are 1.

    Raises the errors of margin_gradients.
    """
    return margin_gradients(parts).influence


def margin_gradients(parts: Prepared) -> MarginGradients:
    """Return the gradients of the margins of all training and held-out pairs, for the parameters of
    parts.state.

    Runs on one device. Raises ValueError for data that are no pairs, a model with a scalar head, rows of one
    response and a label, gradients that are not finite, and without held-out rows.
    """
    run = _open(parts)
    if not parts.model.generates:
        raise ValueError("a margin needs log-probs, but this run's model has a scalar head; use --gradients")
    rows, key = run.source.split, jax.random.key(0)
    alone = np.flatnonzero((rows.rows.reads[:, :2] == 0).any(1))
    if len(alone):
        raise ValueError(
            f"{rows.rows.names[alone[0]]}: a row of one response has no margin ({len(alone)} such rows); "
            "leave these rows out, or use --gradients"
        )

    def of_batch(trainable: Params, frozen: Params, batch: Pairs) -> Float[Array, "B P size"]:
        return map_gradients(parts.model, tree.combine(trainable, frozen), batch, key)

    with jax.set_mesh(run.mesh):
        compiled, by_index = jax.jit(of_batch), dict[int, np.ndarray]()
        for full in _full_rows(run.source, np.concatenate([rows.train, rows.held])):
            batch = jax.tree.map(lambda x: x[0], full)
            gradients = np.asarray(compiled(run.trainable, run.frozen, batch))
            used = batch.index >= 0
            by_index |= dict(zip(batch.index[used].tolist(), gradients[used], strict=True))
    train, held_out = (np.stack([by_index[i] for i in which]) for which in (rows.train, rows.held))
    _check_finite(train, held_out)
    return MarginGradients(run.names, train, held_out)


def _full_rows(source: PairSource, members: Int[np.ndarray, " n"]) -> tuple[Pairs, ...]:
    """Return batches of one row, as full as possible, of ROW_TOKENS tokens or more for a longer pair. Its
    number of read positions (with a target) is the pairs' mean for so many tokens, times SPARE.
    """
    pairs, layout = source.split.rows, source.layout
    tokens, reads = layout.lengths[members], pairs.targets[members]
    length = round_up(max(ROW_TOKENS, int(tokens.max())), 64)
    per_token = SPARE * reads.sum() / tokens.sum()
    most_reads = min(length, round_up(max(int(length * per_token), int(reads.max())), 8))
    shape = RowShape(length, most_reads, length // int(tokens.min()))
    plan = pair_layout.fit_rows(members, layout.lengths, pairs.targets, shape)
    return replace(layout, rows=replace(layout.rows, rows=1, shape=shape)).evaluation(plan)


def map_gradients(
    model: LanguageModel, params: Params, batch: Pairs, key: Key[Array, ""]
) -> Float[Array, "B P size"]:
    """Return the projected gradient of each pair's margin with respect to a map M of the last hidden states.

    The states h_t become h_t M, with M = 1. The result is P^T (sum_t h_t g_t^T) Q, flattened; g_t: gradient
    with respect to h_t, P and Q: random [D, SIDE].
    """
    h_BMD = gather_read(model.hidden(params, batch)[0], batch.read, None)
    slots, kinds = batch.pair_weights.shape[1], batch.kinds
    of_kind = {kind: batch.responses % len(kinds) == number for number, kind in enumerate(kinds)}
    valid = batch.responses < slots * len(kinds)
    signs = of_kind["rejected"].astype(jnp.float32) - of_kind["chosen"].astype(jnp.float32)

    def total(h_BMD: Float[Array, "B M D"]) -> Float[Array, ""]:
        """Return the sum of all margins: of log-probs, which are negative cross-entropies."""
        return weighted_loss(model, params, h_BMD, batch.targets, jnp.where(valid, signs, 0))[0]

    g_BMD = jax.grad(total)(h_BMD)
    P, Q = (jax.random.normal(k, (h_BMD.shape[2], SIDE)) / SIDE**0.5 for k in jax.random.split(key))
    sides = (x.astype(jnp.float32) @ side for x, side in ((h_BMD, P), (g_BMD, Q)))
    of_pair = jax.nn.one_hot(batch.responses // len(kinds), slots)  # zeros for padding
    outer = jnp.einsum("bmp,bmi,bmj->bpij", of_pair, *sides)
    return outer.reshape(*outer.shape[:2], SIDE * SIDE)


def predicted_margins(
    gradients: Float[np.ndarray, "n size"], weight: Float[np.ndarray, " n"], train: int
) -> Float[np.ndarray, " n"]:
    """Return the margin of each row that ridge regression on the other rows predicts; their margins are 1.

    weight: of each row in the regression. The rows after the first `train` are held out; their labels are
    trusted, so the ridge is the one of RIDGES with the least error on them. All n regressions follow from one
    (the leave-one-out formula of linear smoothers).
    """
    weighted = gradients * weight[:, None]
    gram, total = weighted.T @ gradients, weighted.sum(0)
    best, least = np.zeros(0), np.inf
    for ridge in RIDGES:
        solved = np.linalg.solve(gram + ridge * np.eye(len(gram)), np.column_stack([total, weighted.T]))
        leverage = np.einsum("ns,sn->n", gradients, solved[:, 1:])
        predicted = (gradients @ solved[:, 0] - leverage) / (1 - leverage)
        error = float(np.mean((predicted[train:] - 1) ** 2))
        if error < least:
            best, least = predicted, error
    return best


# Gradients of losses


def gradients_of_rows(parts: Prepared) -> RowGradients:
    """Return the projected gradient of each training row's loss and of the held-out rows' weighted mean loss,
    for the parameters of parts.state.

    Raises ValueError for data that are no pairs, a loss that couples rows, gradients that are not finite, and
    without held-out rows.
    """
    run, objective = _open(parts), parts.objective
    if objective.facts.coupled:
        raise ValueError(
            "this loss couples the rows of a batch, so a row alone has no gradient; use loss=dpo"
        )
    key = jax.random.key(0)

    def of_rows(trainable: Params, frozen: Params, aux: Any, batch: Pairs) -> Float[Array, "rows size"]:
        def of_row(row: Pairs) -> Float[Array, " size"]:
            grads = jax.grad(lambda t: objective(tree.combine(t, frozen), row, None, aux)[0])(trainable)
            return project(grads, key, SIZE)

        return jax.vmap(of_row)(batch)

    with jax.set_mesh(run.mesh):
        compiled, arrays = jax.jit(of_rows), (run.trainable, run.frozen, run.aux)
        train, held = (
            np.concatenate(
                [np.asarray(compiled(*arrays, rows))[used] for rows, used in _single_rows(run.source, which)]
            )
            for which in (run.source.split.train, run.source.split.held)
        )
    split = run.source.split
    weights = pair_layout.batch_means(split.rows, split.held, run.source.layout.settings.weighting).weights
    gradients = RowGradients(run.names, train, weights[split.held] @ held)
    _check_finite(gradients.gradients, gradients.held_out)
    if not gradients.held_out.any():
        raise ValueError(
            "the gradient of the held-out loss is 0 at this step, so that no row has an influence on it; use "
            "an earlier checkpoint, or other held-out rows"
        )
    return gradients


def _check_finite(*gradients: np.ndarray) -> None:
    if not all(np.isfinite(x).all() for x in gradients):
        raise ValueError("the gradients are not finite: the run has diverged; use an earlier checkpoint")


def rows_by_name(train: str) -> dict[str, dict[str, Any]]:
    """Return name -> columns for all rows of data.train, with names as in Influence.names."""
    folders, sources = source_folders(train), parse_sources(train)
    parts = zip(folders, (read_rows(source.ref) for source in sources), strict=True)
    return {f"{folder}{row.name}": row.fields for folder, rows in parts for row in rows}


def source_folders(train: str) -> list[str]:
    """Return the prefix of the rows' names FILE:LINE for each source: its folder if several sources have one
    file name or are folders, else "". For "a/x.jsonl,b/x.jsonl" it is ["a/", "b/"].
    """
    paths = [(Path(source.ref), find_data(source.ref)) for source in parse_sources(train)]
    folders = [path is not None and path.is_dir() for _, path in paths]
    if len(paths) == 1 or (len({path.name for path, _ in paths}) == len(paths) and not any(folders)):
        return [""] * len(paths)
    return [
        f"{path if is_folder else path.parent}/" for (path, _), is_folder in zip(paths, folders, strict=True)
    ]


def _single_rows(source: PairSource, members: Int[np.ndarray, " n"]) -> Iterator[tuple[Pairs, np.ndarray]]:
    """Yield (batch [rows, 1, ...] of one pair per row, mask of the rows that have a pair), in the order of
    `members`.
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


# Training without a source


@dataclass(frozen=True)
class SourceEffect:
    """The change of the held-out loss if the source `name` is left out of training: above 0 it helps."""

    name: str
    change: Paired

    def text(self) -> str:
        """Return the change, its interval and a verdict."""
        return f"{self.change.text()}  without {self.name}"


def train_without_sources(run: Run, root: Path = Path("runs")) -> list[SourceEffect]:
    """Train an adapter on all sources of a run and one without each of them, in one program; return the
    effects of the sources, the most harmful first.

    The pairs of a source that is left out have weight 0, so that all adapters have the same steps. The runs
    are in <root>/<name>-sources; the same call resumes them. Raises ValueError for data that are no
    pairs, a single source, or no held-out rows, and if training does not finish.
    """
    check_is_of_pairs(run.data)
    names = sources_with_metrics(run.data.train)
    if not names:
        raise ValueError("the run has one source; name several, as in data=a.jsonl,b.jsonl")
    if not run.data.holds_out:
        raise ValueError("no rows are held out to compare the losses on; set held_out=FILE or a fraction")
    labels = [f"without-{name.replace('/', '-')}" for name in names]
    left_out = {label: number for number, label in enumerate(labels)}
    name = f"{run.name}-sources"
    runs = {"all": replace(run, name=f"{name}/all")}  # its folder if it is trained alone
    for label, number in left_out.items():
        objective = partial(without_source, objective=run.objective, source=number)
        runs[label] = replace(run, name=f"{name}/{label}", objective=objective)
    code = train_sweep(name, runs, root=root)
    if code:
        raise ValueError(f"{root / name}: training ended with exit code {code}; the same command resumes it")
    losses = {label: read_held_out(root / name / label) for label in runs}
    effects = []
    for label, number in left_out.items():
        common = [row for row in losses["all"] if LOSS in losses["all"][row] and LOSS in losses[label][row]]
        before, after = ([losses[x][row][LOSS] for row in common] for x in ("all", label))
        weights = [losses["all"][row].get(WEIGHT, 1.0) for row in common]
        effects.append(SourceEffect(names[number], paired_means(before, after, weights)))
    return sorted(effects, key=lambda effect: effect.change.difference)


def without_source(model: Any, objective: Callable[[Any], Objective], source: int) -> Objective:
    """Return an objective that gives pairs of a source weight 0 in training. source: its index in
    batch.source_names.
    """
    inner = objective(model)

    def loss(outputs: Any, aux: Aux) -> tuple[Array, Metrics]:
        weights = jnp.where(outputs.batch.sources == source, 0, outputs.batch.pair_weights)
        return inner.loss(replace(outputs, batch=replace(outputs.batch, pair_weights=weights)), aux)

    evaluated = inner.for_evaluation()
    return inner._replace(
        loss=loss, one_pass=None, eval_loss=evaluated.loss, eval_one_pass=evaluated.one_pass
    )
