"""Metrics, stored as sums: added over steps, microbatches and evaluation batches, divided when logged."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxft.nn.stack import LayerMean
from jaxft.nn.tree import LayerOutputs, Metrics, static, struct

LOSS, ENTROPY, KL, TOKEN_ACCURACY = "loss", "entropy", "kl", "mean_token_accuracy"
GRAD_NORM, SKIPPED, LOSS_SPIKES = "grad_norm", "skipped", "loss_spikes"
HELD_OUT = "eval_"  # prefix of metrics of held-out rows
ROWS, WEIGHT = "rows/", "weight"  # prefix of values of single rows; of their weight among them
PAIR_COUNT = "_pairs"  # suffix of an accuracy's name: the number of pairs that it is computed from
PROMPT_COUNT = "_prompts"  # the same for prompts and a mean reward, if every reward is 0 or 1
FloatMetrics: TypeAlias = dict[str, float]  # by name, after division
IGNORED_FRACTION = 0.4  # fraction of pairs with the smallest |margin| that LabelNoise ignores

# Jax arrays in a program, NumPy arrays on the host, or their shapes; stacked in a sweep
Stored: TypeAlias = Any


@struct
class Sum:
    """A weighted mean, stored as two sums: its value is total / weight.

    >>> Sum.of(jnp.array([1.0, 2.0, 6.0]), jnp.array([True, True, False])).total.item()
    3.0
    """

    total: Stored
    weight: Stored

    @staticmethod
    def of(values: Float[Array, "..."], weight: Shaped[Array, "..."]) -> "Sum":
        """Return the mean of `values` under weights, or over the elements where a mask is True."""
        w = weight.astype(values.dtype)
        return Sum(jnp.sum(w * values), jnp.sum(w))


@struct
class WinRate:
    """The fraction of pairs that are won, where a tie counts 1/2.

    sums: [won, tied, all pairs]. TRL counts a tie as lost, so that a policy that equals its reference has an
    accuracy of 0; here its accuracy is not logged, because all pairs are ties.
    """

    sums: Stored

    @staticmethod
    def of(margin: Float[Array, "..."], tied: Bool[Array, "..."], where: Bool[Array, "..."]) -> "WinRate":
        """Return the fraction of margins above 0 among the pairs where the mask `where` is True. A pair where
        `tied` is True counts 1/2. The fraction is NaN if one of these margins is NaN.
        """
        w = where.astype(margin.dtype)
        tie = tied.astype(margin.dtype)
        won = jnp.where(jnp.isnan(margin), margin, jnp.where(tied, 0, (margin > 0).astype(margin.dtype)))
        return WinRate(jnp.stack([jnp.sum(jnp.where(where, won, 0)), jnp.sum(w * tie), jnp.sum(w)]))

    def value(self) -> float | None:
        """The fraction; None without pairs or if all are ties."""
        won, tied, pairs = (float(s) for s in self.sums)
        return None if tied == pairs else (won + tied / 2) / pairs


@struct
class PerRow:
    """A value for each held-out row, in their order; only in evaluation. weights: of rows, 0 for padding."""

    values: Stored
    weights: Stored

    @staticmethod
    def of(values: Float[Array, "..."], weights: Shaped[Array, "..."]) -> "PerRow":
        """Flatten values and weights; values of rows of weight 0 become 0."""
        w = weights.astype(values.dtype)
        return PerRow(jnp.where(w > 0, values, 0).ravel(), w.ravel())


@struct
class PerLayer:
    """A Sum for each of L layers of a model, logged as NAME/0, NAME/1, ... (NAME/00, ... if a layer's index
    has two digits). total, weight: [L]. numbers: the L layers' indices in the model, from 0.
    """

    total: Stored
    weight: Stored
    numbers: tuple[int, ...] = static()

    def layers(self, name: str) -> "dict[str, Sum]":
        """Return {logged name: Sum}, such as {"NAME/00": ..., "NAME/11": ...} for name="NAME"."""
        digits, weight = len(str(max(self.numbers))), np.broadcast_to(self.weight, self.total.shape)
        sums = zip(self.numbers, self.total, weight, strict=True)
        return {f"{name}/{number:0{digits}d}": Sum(total, w) for number, total, w in sums}


@struct
class Max:
    """The largest of several values."""

    value: Stored


@struct
class Min:
    """The smallest of several values."""

    value: Stored


@struct
class Correlation:
    """Pearson's correlation of two quantities x and y, stored as the sums of [1, x, y, xx, yy, xy]."""

    sums: Stored

    @staticmethod
    def of(x: Float[Array, "..."], y: Float[Array, "..."], where: Bool[Array, "..."]) -> "Correlation":
        """Return the correlation of two arrays over the elements where a mask is True."""
        w = where.astype(x.dtype)
        return Correlation(jnp.stack([jnp.sum(w * z) for z in (jnp.ones_like(x), x, y, x * x, y * y, x * y)]))

    def value(self) -> float | None:
        """The correlation; None for fewer than three elements or if one quantity is constant."""
        n, x, y, xx, yy, xy = (float(s) for s in self.sums)
        if n < 3:
            return None
        spread = (xx - x * x / n) * (yy - y * y / n)
        return (xy - x * y / n) / spread**0.5 if spread > 1e-12 * max(xx * yy, 1e-30) else None


CALIBRATION_BINS = 15


@struct
class CalibrationError:
    """The expected calibration error of predictions with a confidence (Guo et al. 2017, arXiv:1706.04599,
    eq. 3): `sum_b n_b / n |accuracy_b - confidence_b|`.

    b: 15 bins (CALIBRATION_BINS) of equal width; bin i has confidences above i / 15 and up to (i + 1) / 15.
    sums [3, 15]: for each bin the count of predictions, the sum of confidences, the sum of `correct` (see
    of).
    """

    sums: Stored

    @staticmethod
    def of(
        confidence: Float[Array, "..."], correct: Float[Array, "..."], where: Bool[Array, "..."]
    ) -> "CalibrationError":
        """Return the error of the predictions where a mask is True. correct: 1 for a right one, 0 for a wrong
        one; with soft labels, the label's probability of the predicted choice.
        """
        at = jnp.ceil(confidence * CALIBRATION_BINS).astype(jnp.int32) - 1
        at = jnp.where(where, jnp.clip(at, 0, CALIBRATION_BINS - 1), CALIBRATION_BINS).ravel()
        columns = jnp.stack([jnp.ones_like(confidence), confidence, correct]).reshape(3, -1)
        return CalibrationError(jax.vmap(lambda x: jax.ops.segment_sum(x, at, CALIBRATION_BINS))(columns))

    def value(self) -> float | None:
        """The error; None for no predictions."""
        count, confidence, correct = np.asarray(self.sums)
        return float(np.abs(correct - confidence).sum() / count.sum()) if count.any() else None


@struct
class LabelNoise:
    """The fraction of wrong labels among pairs, estimated from a model's margins.

    Of the pairs with the largest |margin|, those with a negative margin (lost) mostly have wrong labels.
    With r the rank of a pair by |margin|, from 0 to 1, and w = max(r - IGNORED_FRACTION, 0), the estimate is
    sum_lost w / sum w. It needs pairs that the model was not trained on, and is too high for a model that is
    certain and wrong. counts: number of pairs by [won or lost, bin of |margin|].
    """

    counts: Stored

    @staticmethod
    def of(margin: Float[Array, "..."], where: Bool[Array, "..."]) -> "LabelNoise":
        """Count the margins where a mask is True. A margin of 0 counts as neither won nor lost."""
        where = where & (margin != 0)
        size = jnp.clip(jnp.floor(4 * jnp.log2(jnp.maximum(jnp.abs(margin), 1e-12)) + 64), 0, 127)
        lost = (margin <= 0).astype(jnp.int32)
        flat = jnp.where(where, lost * 128 + size.astype(jnp.int32), 256).ravel()
        return LabelNoise(jnp.bincount(flat, length=257)[:256].reshape(2, 128).astype(margin.dtype))

    def value(self) -> float | None:
        """The estimate; None for fewer than 24 pairs."""
        lost, weight = self._lost_and_weight()
        return float((lost * weight).sum() / weight.sum()) if self.counts.sum() >= 24 else None

    def error(self) -> float | None:
        """Return the standard error of value() as an estimate of the fraction p of these n pairs:
        sqrt(p (1 - p) (1 / k - 1 / n)). None if value() is None.

        k = (sum w)^2 / sum w^2 is the effective number of pairs. In place of p the formula has (p k + 1) /
        (k + 2), so that the error is not 0 for p = 0.
        """
        fraction, (_, weight), n = self.value(), self._lost_and_weight(), self.counts.sum()
        if fraction is None:
            return None
        k = weight.sum() ** 2 / (weight**2 / np.maximum(self.counts.sum(0), 1)).sum()
        p = (fraction * k + 1) / (k + 2)
        return float(np.sqrt(p * (1 - p) * (1 / k - 1 / n)))

    def _lost_and_weight(self) -> tuple[Stored, Stored]:
        """Return (fraction of lost pairs, weight of all pairs) for each bin of |margin|."""
        total = self.counts.sum(0)
        rank = (total.cumsum() - total / 2) / max(total.sum(), 1)
        return self.counts[1] / np.maximum(total, 1), total * np.maximum(rank - IGNORED_FRACTION, 0)


def mean_losses(
    values: Float[Array, "*n"],
    weights: Float[Array, "*n"],
    sources: Int[Any, "*n"] | None,
    names: tuple[str, ...],
) -> Metrics:
    """Return the weighted mean of loss values as the metric `loss`, and those of losses_by_source."""
    total = jnp.sum(jnp.where(weights > 0, weights * values, 0))
    return {LOSS: Sum(total, jnp.sum(weights)), **losses_by_source(values, weights, sources, names)}


def losses_by_source(
    values: Float[Array, "*n"],
    weights: Float[Array, "*n"],
    sources: Int[Any, "*n"] | None,
    names: tuple[str, ...],
) -> Metrics:
    """Return the weighted mean of loss values over each data source, as `loss/NAME`.

    names: of the data sources. sources: for each value the index of its source in `names`; None, for which
    the result is {}, if the data has one source.
    """
    if sources is None:
        return {}
    weight_of = {name: jnp.where(sources == number, weights, 0) for number, name in enumerate(names)}
    return {
        f"{LOSS}/{name}": Sum(jnp.sum(jnp.where(w > 0, w * values, 0)), jnp.sum(w))
        for name, w in weight_of.items()
    }


def by_row(outputs: LayerOutputs) -> LayerOutputs:
    """Transpose the outputs of a model's layers from [L, B, ...] to [B, L, ...]."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), outputs)


def layer_metrics(outputs: LayerOutputs) -> Metrics:
    """Return a PerLayer for each LayerMean in `outputs` (see by_row), summed over rows, and nothing else."""
    means = {name: x for name, x in outputs.items() if isinstance(x, LayerMean)}
    return {name: PerLayer(jnp.sum(x.total, 0), jnp.sum(x.weight, 0), x.numbers) for name, x in means.items()}


SUMS = (Sum, PerLayer, WinRate, Correlation, CalibrationError, LabelNoise)  # added element by element
Metric = Sum | PerLayer | WinRate | PerRow | Max | Min | Correlation | CalibrationError | LabelNoise


def add(a: Metrics, b: Metrics) -> Metrics:
    """Add the metrics of two parts of a batch. Both have the same names, and no PerRow (see join_rows)."""
    return {name: _add(a[name], b[name]) for name in a}


def _add(a: Any, b: Any) -> Metric:
    if isinstance(a, SUMS):
        return jax.tree.map(lambda x, y: x + y, a, b)
    xp: Any = jnp if isinstance(a.value, jax.Array) else np  # on the host nothing may be compiled
    extreme = xp.maximum if isinstance(a, Max) else xp.minimum
    return type(a)(extreme(a.value, b.value))


def join_rows(parts: Sequence[Metrics]) -> Metrics:
    """Concatenate the PerRow metrics of parts of a batch, in order; parts have no other metrics."""
    # the last axis: in a sweep the first one is over members
    return jax.tree.map(lambda *x: np.concatenate(x, -1), *parts)


def neutral(like: Metrics) -> Metrics:
    """Return metrics m with add(x, m) = x, with the shapes and dtypes of `like`; a PerRow becomes zeros."""

    def neutral_of(m: Any) -> Metric:
        if isinstance(m, (*SUMS, PerRow)):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), m)
        fill = -jnp.inf if isinstance(m, Max) else jnp.inf
        return type(m)(jnp.full(m.value.shape, fill, m.value.dtype))

    return {name: neutral_of(m) for name, m in like.items()}


def by_layer(metrics: Metrics) -> Metrics:
    """Replace each PerLayer by a Sum per layer (see PerLayer.layers). metrics: of NumPy arrays."""
    out: Metrics = {}
    for name, m in metrics.items():
        out |= m.layers(name) if isinstance(m, PerLayer) else {name: m}
    return out


def as_ties(metrics: Metrics) -> Metrics:
    """Count all pairs of a WinRate as ties, and empty Correlation and LabelNoise, for a policy that equals
    its reference: its margins are rounding errors. Other metrics stay as they are. metrics: of NumPy arrays.
    """

    def tied(m: Any) -> Any:
        if isinstance(m, WinRate):
            pairs = m.sums[..., 2]
            return WinRate(np.stack([np.zeros_like(pairs), pairs, pairs], -1))
        return jax.tree.map(np.zeros_like, m) if isinstance(m, Correlation | LabelNoise) else m

    return {name: tied(m) for name, m in metrics.items()}


def as_floats(metrics: Metrics) -> dict[str, float]:
    """Return each metric as a number (a Sum as total / weight), and a LabelNoise's standard error as
    `NAME_error`. PerRow, and metrics without a value, such as a mean over nothing, are left out.
    """
    out = {}
    for name, m in by_layer(jax.device_get(metrics)).items():
        if isinstance(m, Sum):
            if m.weight != 0:
                out[name] = float(m.total) / float(m.weight)
        elif isinstance(m, WinRate | Correlation | CalibrationError | LabelNoise):
            values = {name: m.value()} | ({f"{name}_error": m.error()} if isinstance(m, LabelNoise) else {})
            out.update({key: value for key, value in values.items() if value is not None})
        elif not isinstance(m, PerRow):
            out[name] = float(m.value)
    return out


def pair_counts(metrics: Metrics) -> FloatMetrics:
    """Return {NAME_pairs: number of pairs} of each WinRate NAME that has pairs."""
    counts = {name: m.sums[2] for name, m in metrics.items() if isinstance(m, WinRate)}
    return {name + PAIR_COUNT: float(count) for name, count in jax.device_get(counts).items() if count}


class Count(NamedTuple):
    """The number of pairs or prompts that a fraction was computed from. unit: "pairs" or "prompts"."""

    number: float
    unit: str


def count_of(metrics: Mapping[str, float], name: str) -> Count | None:
    """Return the count that is logged for `name` as NAME_pairs or NAME_prompts; None if there is neither."""
    counts = ((metrics.get(name + suffix), suffix.removeprefix("_")) for suffix in (PAIR_COUNT, PROMPT_COUNT))
    return next((Count(number, unit) for number, unit in counts if number), None)


def without_count(name: str) -> str:
    """Return NAME for NAME_pairs and NAME_prompts (see count_of); other names unchanged."""
    return name.removesuffix(PAIR_COUNT).removesuffix(PROMPT_COUNT)


def row_values(metrics: Metrics) -> dict[int, FloatMetrics]:
    """Return the PerRow values of an evaluation by row, such as {0: {"loss": 0.7, "weight": 0.5}}: the key is
    the row's index in the PerRow arrays, "weight" the weight of its loss. Rows of weight 0 are left out.
    """
    rows: dict[int, FloatMetrics] = {}
    for name, m in jax.device_get(metrics).items():
        if isinstance(m, PerRow):
            for at in np.flatnonzero(m.weights).tolist():
                row = rows.setdefault(at, {})
                row[name.removeprefix(ROWS)] = float(m.values[at])
                if name == ROWS + LOSS:
                    row[WEIGHT] = float(m.weights[at])
    return dict(sorted(rows.items()))


def to_json(metrics: Metrics) -> dict[str, list[Any]]:
    """Return metrics as JSON, {name: [type, *arrays]}, such as {"loss": ["Sum", 3.0, 2.0]}."""
    arrays = {name: [x.tolist() for x in jax.tree.leaves(m)] for name, m in metrics.items()}
    return {name: [type(m).__name__, *arrays[name]] for name, m in metrics.items()}


def from_json(stored: dict[str, list[Any]]) -> Metrics:
    """Return the metrics that to_json stored, in float64 on the host; none of them may be a PerRow or a
    PerLayer (see by_layer).
    """
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (*SUMS, Max, Min)}
    return {
        name: kinds[kind](*(np.asarray(x, np.float64) for x in arrays))
        for name, (kind, *arrays) in stored.items()
    }
