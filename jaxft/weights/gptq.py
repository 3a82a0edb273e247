"""GPTQ (Frantar et al. 2023, arXiv:2210.17323): rounding that minimises the error of a layer's outputs, for
every format of quant.py.

Rounding an element changes the layer's outputs; the elements that are rounded later compensate for that as
far as their inputs are correlated. Scales are those of plain rounding, so files and kernels are the same.
"""

from collections.abc import Callable
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
    # upper triangular, with low low^T = moment / mean
    low = jnp.linalg.cholesky((moment / mean)[::-1, ::-1])[::-1, ::-1]
    upper = jax.scipy.linalg.solve_triangular(low, jnp.eye(len(low), dtype=low.dtype), lower=False)
    return InverseFactor(order, upper, mean)


@partial(jax.jit, static_argnames="kind")
def gptq_codes(weight: Array, factor: InverseFactor, plain: QTensor, kind: str) -> Array:
    """Return the codes [I, O] of GPTQ with the scales of `plain`, one layer's weight as nn.quant.quantize
    returns it.

    The largest inputs are rounded first, while many others can still compensate for them. The weights of an
    input that was always zero are rounded to nearest.
    """
    order, upper, _ = factor
    plain_scale, plain_offset = grid(plain)
    scale, offset = plain_scale[order], None if plain_offset is None else plain_offset[order]
    format = FORMATS[kind]

    def one(j: Array, row: Array, arrays: tuple, factor: Array) -> tuple[Array, Array]:
        scale, offset = arrays
        s, o = scale[j], None if offset is None else offset[j]
        code = format.nearest(row, s, o)
        value = format.decode(code) * s if o is None else format.decode(code) * s + o
        return (row - value) / factor[j, j], code

    zeros = jnp.zeros(weight.shape, format.code_dtype)
    codes = swept(upper, weight[order], zeros, (scale, offset), one)
    return codes[jnp.argsort(order)]


def swept(
    matrix: Float[Array, "I I"], state: Float[Array, "I O"], codes: Array, arrays: tuple, one: Callable
) -> Array:
    """Return codes [I, O] that are chosen input by input, in blocks.

    one(j, state of the input, arrays of its block, block of the matrix) -> (change, code): the change of the
    j-th input of a block, times its row of the matrix, is subtracted from the state of all inputs.
    """
    ins, outs = state.shape
    size = next(n for n in range(min(INPUT_BLOCK, ins), 0, -1) if ins % n == 0)

    def take(x: Array, at: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, at, size, 0)

    def block(b: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        state, codes = now
        at = b * size
        rows = take(matrix, at)
        own = jax.lax.dynamic_slice_in_dim(rows, at, size, 1)
        inside = jax.tree.map(partial(take, at=at), arrays)

        def step(j: Array, now: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            part, changes, codes = now
            change, code = one(j, part[j], inside, own)
            part = part - own[j][:, None] * change[None]
            return part, changes.at[j].set(change), codes.at[j].set(code)

        start = take(state, at), jnp.zeros((size, outs), jnp.float32), take(codes, at)
        _, changes, own_codes = jax.lax.fori_loop(0, size, step, start)
        state = state - jnp.matmul(rows.T, changes, precision=jax.lax.Precision.HIGHEST)
        return state, jax.lax.dynamic_update_slice_in_dim(codes, own_codes, at, 0)

    return jax.lax.fori_loop(0, ins // size, block, (state, codes))[1]
