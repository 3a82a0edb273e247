"""GPTQ (Frantar et al. 2023, arXiv:2210.17323): rounding that minimises the error of a layer's outputs, for
every format of quant.py.

Rounding an element changes the layer's outputs; the elements that are rounded later compensate for that as
far as their inputs are correlated. Scales are those of plain rounding, so files and kernels are the same.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft import tree
from jaxft.nn import quant_formats as qf
from jaxft.nn.matmul import GramProbe
from jaxft.nn.quant import FORMATS, QTensor, grid, is_paired, is_qtensor, quantize

DAMPING = 0.01  # of the mean squared input, added to every input's own
INPUT_BLOCK = 128  # inputs whose errors are propagated to the later ones together


def second_moments(
    model: Any, base: Any, paths: list[str], batches: Iterable[Any], loss: Callable
) -> dict[str, Array]:
    """Return the sum of x x^T over the inputs x of each of the linear layers `paths`, float32 [L, I, I].

    batches: of Tokens [rows, ...]. loss(params, batch): a scalar that depends on all inputs that count.
    Memory holds the moments of all layers together with the weights.
    """
    shapes = {path: leaf.shape for path, leaf in tree.paths(base, is_qtensor).items()}
    moments = {
        path: jnp.zeros((*shapes[path][:-2], shapes[path][-2], shapes[path][-2]), jnp.float32)
        for path in paths
    }

    def with_probes(base: Any, sums: dict[str, Array]) -> Any:
        return tree.map_with_path(
            lambda path, w: GramProbe(w, sums[path]) if path in sums else w, base, is_leaf=is_qtensor
        )

    @partial(jax.jit, donate_argnums=1)
    def add_batch(base: Any, sums: dict[str, Array], batch: Any) -> dict[str, Array]:
        at_zero = jax.tree.map(jnp.zeros_like, sums)
        added = jax.grad(lambda sums: loss(with_probes(base, sums), batch))(at_zero)
        return jax.tree.map(jnp.add, sums, added)

    for batch in batches:
        moments = add_batch(base, moments, batch)
    return moments


def quantize_gptq(
    weight: Any, moment: Any, kind: str, block: int | None = None, double: bool | None = None
) -> QTensor:
    """Quantise one layer's weight [I, O] as nn.quant.quantize does, but with codes that compensate for each
    other's errors.

    moment: [I, I], the sum of x x^T over the layer's inputs. The weights of an input that was always zero are
    rounded to nearest.
    """
    plain = quantize(np.asarray(weight), kind, block, double)
    codes: Any = np.asarray(_codes(jnp.asarray(weight, jnp.float32), jnp.asarray(moment), plain, kind))
    return replace(plain, codes=qf.pack(codes) if is_paired(kind) else codes)


@partial(jax.jit, static_argnames="kind")
def _codes(weight: Array, moment: Array, plain: QTensor, kind: str) -> Array:
    """Round the largest inputs first, while many others can still compensate for them."""
    ins, outs = weight.shape
    squares = jnp.diagonal(moment)
    order = jnp.argsort(-squares)
    damp = DAMPING * jnp.mean(squares) + jnp.where(squares > 0, 0.0, jnp.mean(squares)) + jnp.float32(1e-30)
    moment = (moment + jnp.diag(damp))[order][:, order]
    plain_scale, plain_offset = grid(plain)
    scale, offset = plain_scale[order], None if plain_offset is None else plain_offset[order]
    upper = _inverse_factor(moment / jnp.mean(jnp.diagonal(moment)))
    size = next(n for n in range(min(INPUT_BLOCK, ins), 0, -1) if ins % n == 0)
    format = FORMATS[kind]

    def take(x: Array, at: Array, n: int = size) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, at, n, 0)

    def one(
        j: Array, now: tuple[Array, Array, Array], at: Array, factor: Array
    ) -> tuple[Array, Array, Array]:
        part, errors, codes = now
        row = part[j]
        s, o = take(scale, at + j, 1)[0], None if offset is None else take(offset, at + j, 1)[0]
        code = format.nearest(row, s, o)
        value = format.decode(code) * s if o is None else format.decode(code) * s + o
        error = (row - value) / factor[j, j]
        part = part - factor[j][:, None] * error[None]
        return part, errors.at[j].set(error), codes.at[at + j].set(code)

    def block(b: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        weight, codes = now
        at = b * size
        rows = take(upper, at)
        factor = jax.lax.dynamic_slice_in_dim(rows, at, size, 1)
        start = take(weight, at), jnp.zeros((size, outs), jnp.float32), codes
        _, errors, codes = jax.lax.fori_loop(0, size, partial(one, at=at, factor=factor), start)
        return weight - jnp.matmul(rows.T, errors, precision=jax.lax.Precision.HIGHEST), codes

    zeros = jnp.zeros((ins, outs), format.code_dtype)
    codes = jax.lax.fori_loop(0, ins // size, block, (weight[order], zeros))[1]
    return codes[jnp.argsort(order)]


def _inverse_factor(x: Float[Array, "I I"]) -> Float[Array, "I I"]:
    """Return the upper triangular U with `U^T U = x^-1`."""
    low = jnp.linalg.cholesky(x[::-1, ::-1])[::-1, ::-1]  # upper, with low low^T = x
    return jax.scipy.linalg.solve_triangular(low, jnp.eye(len(x), dtype=x.dtype), lower=False)
