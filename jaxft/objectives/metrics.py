"""Metrics that add: steps, microbatches and evaluation combine them, and only log.py's caller divides."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.tree import struct

UNSURE = 0.4  # the share of the pairs, by the size of their margins, of which a model's opinion is not taken


@struct
class Sum:
    """A weighted mean still in two parts; `total / weight` is read once, at the end."""

    total: Any
    weight: Any

    @staticmethod
    def of(values: Any, weight: Any) -> "Sum":
        """Return the mean of `values` with weights, or of the elements where a mask is True."""
        w = weight.astype(values.dtype)
        return Sum(jnp.sum(w * values), jnp.sum(w))


@struct
class Max:
    """The largest value seen."""

    value: Any


@struct
class Min:
    """The smallest value seen."""

    value: Any


@struct
class Correlation:
    """Pearson's correlation of two quantities, still in sums: [n, x, y, xx, yy, xy]."""

    sums: Any

    @staticmethod
    def of(x: Any, y: Any, where: Any) -> "Correlation":
        """Of the elements of two arrays where a mask is True."""
        w = where.astype(x.dtype)
        return Correlation(jnp.stack([jnp.sum(w * z) for z in (jnp.ones_like(x), x, y, x * x, y * y, x * y)]))

    def value(self) -> float | None:
        """None for fewer than three pairs of values, or where one quantity doesn't vary."""
        n, x, y, xx, yy, xy = (float(s) for s in self.sums)
        if n < 3:
            return None
        spread = (xx - x * x / n) * (yy - y * y / n)
        return (xy - x * y / n) / spread**0.5 if spread > 1e-12 * max(xx * yy, 1e-30) else None


@struct
class Disagreement:
    """The share of labels that are wrong, estimated from margins: counts [won or lost, size of the margin] of pairs.

    Among the pairs that a model is most sure of, the ones it holds the other way round are mostly wrong labels. The estimate is
    the share of lost pairs, where the smallest margins don't count and the largest count most: with r the rank by size
    from 0 to 1 and w = max(r - UNSURE, 0), sum_lost w / sum w. It wants pairs that the model was not trained on, and is too high
    for a model that is sure and wrong.
    """

    counts: Any

    @staticmethod
    def of(margin: Any, where: Any) -> "Disagreement":
        """Of margins where a mask is True; a margin of 0 takes no side."""
        where = where & (margin != 0)
        size = jnp.clip(jnp.floor(4 * jnp.log2(jnp.maximum(jnp.abs(margin), 1e-12)) + 64), 0, 127).astype(
            jnp.int32
        )
        lost = (margin <= 0).astype(jnp.int32)
        flat = jnp.where(where, lost * 128 + size, 256).ravel()
        return Disagreement(jnp.bincount(flat, length=257)[:256].reshape(2, 128).astype(margin.dtype))

    def value(self) -> float | None:
        """None for fewer than 24 pairs."""
        lost, weight = self._weighed()
        return float((lost * weight).sum() / weight.sum()) if self.counts.sum() >= 24 else None

    def error(self) -> float | None:
        """The standard error of value() as an estimate of these n pairs' share p: sqrt(p (1 - p) (1 / k - 1 / n)).

        k = (sum w)^2 / sum w^2 is how many pairs were as good as asked; p is (p k + 1) / (k + 2), so that it is above 0.
        """
        share, (_, weight), n = self.value(), self._weighed(), self.counts.sum()
        if share is None:
            return None
        k = weight.sum() ** 2 / (weight**2 / np.maximum(self.counts.sum(0), 1)).sum()
        p = (share * k + 1) / (k + 2)
        return float(np.sqrt(p * (1 - p) * (1 / k - 1 / n)))

    def _weighed(self) -> tuple[Any, Any]:
        """(share of lost pairs, weight of all pairs) of each size of the margin."""
        total = self.counts.sum(0)
        rank = (total.cumsum() - total / 2) / max(total.sum(), 1)
        return self.counts[1] / np.maximum(total, 1), total * np.maximum(rank - UNSURE, 0)


SUMS = (Sum, Correlation, Disagreement)  # added element by element


def is_metric(x: Any) -> bool:
    """For tree functions: stop at a metric."""
    return isinstance(x, (*SUMS, Max, Min))


def _add(a: Any, b: Any) -> Any:
    if isinstance(a, SUMS):
        return jax.tree.map(lambda x, y: x + y, a, b)
    on_host = not isinstance(a.value, jax.Array)  # where nothing may be compiled
    if isinstance(a, Max):
        return Max((np if on_host else jnp).maximum(a.value, b.value))
    return Min((np if on_host else jnp).minimum(a.value, b.value))


def add(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The metrics of two parts of a batch as those of the whole."""
    return {name: _add(a[name], b[name]) for name in a}


def neutral(like: dict[str, Any]) -> dict[str, Any]:
    """The metrics of no rows at all, in the shape and dtype of `like` (arrays or abstract ones)."""

    def start(m):
        if isinstance(m, SUMS):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), m)
        fill = -jnp.inf if isinstance(m, Max) else jnp.inf
        return type(m)(jnp.full(m.value.shape, fill, m.value.dtype))

    return {name: start(m) for name, m in like.items()}


def read(metrics: dict[str, Any]) -> dict[str, float]:
    """Plain numbers, of an estimate its standard error too (`name_error`). A mean over nothing is left out, never NaN."""
    host = jax.device_get(metrics)
    out = {}
    for name, m in host.items():
        if isinstance(m, Sum):
            if m.weight != 0:
                out[name] = float(m.total) / float(m.weight)
        elif isinstance(m, Correlation | Disagreement):
            found = {name: m.value()} | ({f"{name}_error": m.error()} if isinstance(m, Disagreement) else {})
            out.update({key: value for key, value in found.items() if value is not None})
        else:
            out[name] = float(m.value)
    return out


def kept(metrics: dict[str, Any]) -> dict[str, list[Any]]:
    """Metrics as JSON; loaded() gives them back."""
    return {
        name: [type(m).__name__, *(x.tolist() for x in jax.tree.leaves(m))] for name, m in metrics.items()
    }


def loaded(kept: dict[str, list[Any]]) -> dict[str, Any]:
    """Metrics from JSON, on the host in float64."""
    kinds = {kind.__name__: kind for kind in (*SUMS, Max, Min)}
    return {
        name: kinds[kind](*(np.asarray(x, np.float64) for x in numbers))
        for name, (kind, *numbers) in kept.items()
    }
