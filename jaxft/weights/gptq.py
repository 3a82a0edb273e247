"""GPTQ (Frantar et al. 2023, arXiv:2210.17323): rounding that minimises the error of a layer's outputs, for
every format of quant.py.

Rounding an element changes the layer's outputs; the elements that are rounded later compensate for that as
far as their inputs are correlated. Scales are those of plain rounding, so files and kernels are the same.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.nn import quant_formats as qf
from jaxft.nn.quant import FORMATS, QTensor, grid, is_paired

DAMPING = 0.01  # of the mean squared input, added to every input's own
INPUT_BLOCK = 32  # inputs whose errors are propagated to the later ones together


def with_codes(q: QTensor, codes: Any) -> QTensor:
    """Return a weight on the host with other codes [I, O], not packed."""
    found: Any = np.asarray(codes)
    return replace(q, codes=qf.pack(found) if is_paired(q.kind) else found)


def damped(moment: Float[Array, "I I"]) -> Float[Array, "I I"]:
    """Add DAMPING of the mean square to the squares of all inputs, and all of it to inputs that were always
    zero.
    """
    squares = jnp.diagonal(moment)
    mean = jnp.mean(squares)
    return moment + jnp.diag(DAMPING * mean + jnp.where(squares > 0, 0.0, mean) + jnp.float32(1e-30))


def rounding_block(ins: int) -> int:
    """Return how many inputs are rounded before their errors are propagated to all others."""
    return next(n for n in range(min(INPUT_BLOCK, ins), 0, -1) if ins % n == 0)


class InverseFactor(NamedTuple):
    """The inverse of a damped moment H [I, I]: `H[order][:, order]^-1 = upper^T upper / mean`.

    order: of inputs, the largest first. upper: upper triangular [I, I]. mean: of H's diagonal.
    """

    order: Array
    upper: Array
    mean: Array


@jax.jit
def inverse_factor(moment: Float[Array, "I I"]) -> InverseFactor:
    """Factorise the inverse of a moment, damped; the inputs of several weights have the same."""
    order = jnp.argsort(-jnp.diagonal(moment))
    moment = damped(moment)[order][:, order]
    mean = jnp.mean(jnp.diagonal(moment))
    return InverseFactor(order, _upper_factor(moment / mean), mean)


@partial(jax.jit, static_argnames="kind")
def gptq_codes(weight: Array, factor: InverseFactor, plain: QTensor, kind: str) -> Array:
    """Return the codes [I, O] of GPTQ with the scales of `plain`, one layer's weight as nn.quant.quantize
    returns it.

    The largest inputs are rounded first, while many others can still compensate for them. The weights of an
    input that was always zero are rounded to nearest.
    """
    ins, outs = weight.shape
    order, upper, _ = factor
    plain_scale, plain_offset = grid(plain)
    scale, offset = plain_scale[order], None if plain_offset is None else plain_offset[order]
    size = rounding_block(ins)
    format = FORMATS[kind]

    def take(x: Array, at: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, at, size, 0)

    def one(j: Array, now: tuple[Array, Array, Array], grids: tuple, factor: Array) -> tuple:
        part, errors, codes = now
        row = part[j]
        s, o = grids[0][j], None if grids[1] is None else grids[1][j]
        code = format.nearest(row, s, o)
        value = format.decode(code) * s if o is None else format.decode(code) * s + o
        error = (row - value) / factor[j, j]
        part = part - factor[j][:, None] * error[None]
        return part, errors.at[j].set(error), codes.at[j].set(code)

    def block(b: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        weight, codes = now
        at = b * size
        rows = take(upper, at)
        factor = jax.lax.dynamic_slice_in_dim(rows, at, size, 1)
        grids = take(scale, at), None if offset is None else take(offset, at)
        start = take(weight, at), jnp.zeros((size, outs), jnp.float32), take(codes, at)
        _, errors, own = jax.lax.fori_loop(0, size, partial(one, grids=grids, factor=factor), start)
        weight = weight - jnp.matmul(rows.T, errors, precision=jax.lax.Precision.HIGHEST)
        return weight, jax.lax.dynamic_update_slice_in_dim(codes, own, at, 0)

    zeros = jnp.zeros((ins, outs), format.code_dtype)
    codes = jax.lax.fori_loop(0, ins // size, block, (weight[order], zeros))[1]
    return codes[jnp.argsort(order)]


def _upper_factor(x: Float[Array, "I I"]) -> Float[Array, "I I"]:
    """Return the upper triangular U with `U^T U = x^-1`."""
    low = jnp.linalg.cholesky(x[::-1, ::-1])[::-1, ::-1]  # upper, with low low^T = x
    return jax.scipy.linalg.solve_triangular(low, jnp.eye(len(x), dtype=x.dtype), lower=False)
