"""Calibrated rounding: codes and scales of a weight that minimise the error of its outputs on given inputs.

With `H = sum x x^T` over a layer's inputs x, a rounded weight V in place of a target weight W changes the
outputs by the squared error `tr((V - W)^T H (V - W))`. The inputs x come from a model whose earlier layers
are quantised already, so the target is not the original weight W0 but the least-squares solution that maps x
to the outputs of the exact model: `W = W0 + H^-1 (C - H) W0` with `C = sum x y^T` and the exact model's
inputs y (Li et al. 2025, GPTAQ, arXiv:2504.02692).

Scales: for each block the best of some fractions of the plain scale, each input weighted by its mean square.
Codes: GPTQ (Frantar et al. 2023, arXiv:2210.17323), then coordinate descent, alternately on scales and codes
(Behdin et al. 2023, QuantEase, arXiv:2309.01885), which lowers this error at every step. The result has as
many bits as plain rounding.
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
from jaxft.nn.quant import QTensor, dequantize, grid, is_paired, quantize, with_defaults
from jaxft.nn.quant_formats import FORMATS

FRACTIONS = np.linspace(0.7, 1.05, 15, dtype=np.float32)  # tried, of the plain scale of a block
DAMPING = 0.01  # of the mean squared input, added to every input's own
INPUT_BLOCK = 32  # inputs whose errors are propagated to the later ones together
ROUNDS = 2  # of coordinate descent on codes and scales
HIGHEST = jax.lax.Precision.HIGHEST
SMALLEST_VALUE = 1e-30  # instead of a smaller singular value in a divisor

_Weight = Float[np.ndarray, "I O"]
FirstPair = tuple[Float[np.ndarray, "I R"], Float[np.ndarray, "R O"]]


class InputMoments(NamedTuple):
    """Sums over the inputs of a layer, float32 [I, I]. gram: the sum of x x^T, with inputs x in the quantised
    model. cross: the sum of x y^T, with inputs y in the exact model.
    """

    gram: Any
    cross: Any


class InverseFactor(NamedTuple):
    """The inverse of a damped sum H of x x^T, factorised: `H[order][:, order]^-1 = upper^T upper / mean`.

    order: indices of the inputs by mean square, largest first. upper: upper triangular [I, I]. mean: mean of
    H's diagonal.
    """

    order: Array
    upper: Array
    mean: Array


@jax.jit
def inverse_factor(moment: Float[Array, "I I"]) -> InverseFactor:
    """Damp a moment (the sum of x x^T over a layer's inputs) and factorise its inverse."""
    order = jnp.argsort(-jnp.diagonal(moment))
    moment = damped(moment)[order][:, order]
    mean = jnp.mean(jnp.diagonal(moment))
    # upper triangular, with low low^T = moment / mean
    low = jnp.linalg.cholesky((moment / mean)[::-1, ::-1])[::-1, ::-1]
    upper = jax.scipy.linalg.solve_triangular(low, jnp.eye(len(low), dtype=low.dtype), lower=False)
    return InverseFactor(order, upper, mean)


def quantize_calibrated(
    target: Float[np.ndarray, "I O"],
    gram: Float[Array, "I I"],
    kind: str,
    block: int | None = None,
    double: bool | None = None,
    factor: InverseFactor | None = None,
) -> QTensor:
    """Quantise a weight to the layout of nn.quant.quantize, with a smaller error of the outputs.

    target: the weight to approximate. gram: sum of x x^T over the inputs. kind, block, double: see
    nn.quant.Quant. factor: inverse_factor(gram), None to compute it. The error, with damped gram, is never
    above the error of rounding to nearest. Raises ValueError for a target or inputs that are not finite.
    """
    if not all(np.isfinite(np.asarray(x)).all() for x in (target, gram)):
        raise ValueError(
            "calibration: a layer's weights, its inputs on the calibration rows or the solution for its "
            "outputs are not finite; round to nearest (quant.calibrate=none, or no --calibrate)"
        )
    plain = quantize(np.asarray(target), kind, block, double)
    weight, moment = jnp.asarray(target, jnp.float32), damped(jnp.asarray(gram))
    rounded = _with_searched_scales(plain, weight, jnp.diagonal(moment))
    factor = inverse_factor(jnp.asarray(gram)) if factor is None else factor
    rounded = with_codes(rounded, gptq_codes(weight, factor, rounded, kind))
    candidates = [plain, rounded]
    size = with_defaults(kind, block, double)[0]
    for _ in range(ROUNDS):
        if size and weight.shape[0] % size == 0:
            rounded = _with_scales(rounded, _fitted_scales(rounded, weight, moment, size))
        rounded = with_codes(rounded, _descended_codes(rounded, weight, moment))
        candidates.append(rounded)
    errors = np.array([float(_output_error(q, weight, moment)) for q in candidates])
    return candidates[int(np.argmin(np.where(np.isfinite(errors), errors, np.inf)))]


@jax.jit
def compensated_weight(
    weight: Float[Array, "I O"], moments: InputMoments, factor: InverseFactor
) -> Float[Array, "I O"]:
    """Return the weight that maps a layer's inputs in the quantised model to the outputs in the exact model
    with the least squared error.

    weight: the exact model's weight. factor: inverse_factor(moments.gram).
    """
    order, upper, mean = factor
    change = jnp.matmul((moments.cross - moments.gram)[order], weight, precision=HIGHEST)
    change = jnp.matmul(upper.T, jnp.matmul(upper, change, precision=HIGHEST), precision=HIGHEST) / mean
    return weight.at[order].add(change)


@jax.jit
def _output_error(q: QTensor, weight: Array, moment: Array) -> Array:
    off = dequantize(replace(q, dtype=jnp.dtype(jnp.float32))) - weight
    return jnp.sum(off * jnp.matmul(moment, off, precision=HIGHEST))


def _with_scales(q: QTensor, scale: Any) -> QTensor:
    """Replace a host QTensor's scales by `scale` [N, O], quantised if the QTensor's scales are."""
    scale = np.asarray(scale).astype(FORMATS[q.kind].scale_dtype)
    if q.outer is None:
        return replace(q, scale=scale)
    scale, outer, mean = qf.encode_scales(scale)
    return replace(q, scale=scale, outer=outer, mean=mean)


def _with_searched_scales(plain: QTensor, weight: Array, squares: Array) -> QTensor:
    """Replace scales and offsets by those with the least error, inputs weighted by `squares` [I]."""
    if plain.block is None:
        return plain
    scale, offset = _searched_scales(weight, squares, plain.kind, plain.block)
    dtype = FORMATS[plain.kind].scale_dtype
    rounded = plain if offset is None else replace(plain, offset=np.asarray(offset).astype(dtype))
    return _with_scales(rounded, scale)


@partial(jax.jit, static_argnames=("kind", "block"))
def _searched_scales(weight: Array, squares: Array, kind: str, block: int) -> tuple[Array, Array | None]:
    format, blocks = FORMATS[kind], qf.to_blocks(qf.as_zero_or_normal(weight), block)
    weights = qf.to_blocks(squares[:, None], block)
    middle = jnp.zeros_like(blocks[:, :1])
    if format.scale(blocks)[1] is not None:
        middle = (jnp.max(blocks, 1, keepdims=True) + jnp.min(blocks, 1, keepdims=True)) / 2

    def at(fraction: Any) -> tuple[Array, Array, Array | None]:
        scale, offset = format.scale(middle + fraction * (blocks - middle))
        value = format.decode(format.nearest(blocks, scale, offset)) * scale
        value = value if offset is None else value + offset
        return jnp.sum(weights * jnp.square(value - blocks), 1, keepdims=True), scale, offset

    def better(a: tuple, b: tuple) -> tuple:
        return jax.tree.map(lambda x, y: jnp.where(b[0] < a[0], y, x), a, b)

    best = at(jnp.float32(1.0))
    for fraction in FRACTIONS:
        best = better(best, at(fraction))
    return best[1][:, 0], None if best[2] is None else best[2][:, 0]


@jax.jit
def _descended_codes(q: QTensor, weight: Array, moment: Array) -> Array:
    """Return codes [I, O] after one pass over all inputs, each set to its best value given the others."""
    format, (scale, offset) = FORMATS[q.kind], grid(q)
    codes = qf.unpack(q.codes) if is_paired(q.kind) else jnp.asarray(q.codes)
    value = format.decode(codes) * scale
    value = value if offset is None else value + offset
    gradient = jnp.matmul(moment, weight - value, precision=HIGHEST)

    def choose(j: Array, row: Array, arrays: tuple, block: Array) -> tuple[Array, Array]:
        values, scale, offset = arrays
        s, o = scale[j], None if offset is None else offset[j]
        code = format.nearest(values[j] + row / block[j, j], s, o)
        after = format.decode(code) * s
        return (after if o is None else after + o) - values[j], code

    return swept(moment, gradient, codes, (value, scale, offset), choose)


@partial(jax.jit, static_argnames="size")
def _fitted_scales(q: QTensor, weight: Array, moment: Array, size: int) -> Array:
    """Return scales [N, O] after one pass over all N blocks of `size` inputs, each set to its best value
    given the other scales. A scale whose best value is twice or half of it, or beyond, is unchanged. moment:
    the damped gram of the inputs.
    """
    ins, outs = weight.shape
    scale, offset = grid(q)
    units = FORMATS[q.kind].decode(qf.unpack(q.codes) if is_paired(q.kind) else jnp.asarray(q.codes))
    value = units * scale if offset is None else units * scale + offset
    gradient = jnp.matmul(moment, weight - value, precision=HIGHEST)

    def block(b: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        gradient, scales = now
        rows = jax.lax.dynamic_slice_in_dim(moment, b * size, size, 0)
        inside = jax.lax.dynamic_slice_in_dim(rows, b * size, size, 1)
        unit = jax.lax.dynamic_slice_in_dim(units, b * size, size, 0)
        part = jax.lax.dynamic_slice_in_dim(gradient, b * size, size, 0)
        square = jnp.sum(unit * jnp.matmul(inside, unit, precision=HIGHEST), 0)
        before = scales[b]
        after = before + jnp.sum(unit * part, 0) / jnp.maximum(square, jnp.float32(1e-30))
        after = jnp.where((after > before / 2) & (after < before * 2), after, before)
        change = unit * (after - before)[None]
        return gradient - jnp.matmul(rows.T, change, precision=HIGHEST), scales.at[b].set(after)

    return jax.lax.fori_loop(0, ins // size, block, (gradient, scale[::size]))[1]


# GPTQ: rounding an element changes the outputs; the elements that are rounded later compensate for that as
# far as their inputs are correlated. The layout is plain rounding's, so files and kernels are the same.


def with_codes(q: QTensor, codes: Any) -> QTensor:
    """Replace the codes of a QTensor on the host. codes: [I, O], not packed."""
    on_host: Any = np.asarray(codes)
    return replace(q, codes=qf.pack(on_host) if is_paired(q.kind) else on_host)


def damped(moment: Float[Array, "I I"]) -> Float[Array, "I I"]:
    """Add DAMPING times the mean of a moment's diagonal to the diagonal, and for inputs that were always zero
    also the mean itself, so that the moment (a sum of x x^T) can be inverted.
    """
    squares = jnp.diagonal(moment)
    mean = jnp.mean(squares)
    return moment + jnp.diag(DAMPING * mean + jnp.where(squares > 0, 0.0, mean) + jnp.float32(1e-30))


@partial(jax.jit, static_argnames="kind")
def gptq_codes(weight: Array, factor: InverseFactor, plain: QTensor, kind: str) -> Array:
    """Return the codes [I, O] that GPTQ chooses with the scales of `plain`, a QTensor of one layer's weight.

    The largest inputs are rounded first, while many others can still compensate for them. The weights of an
    input that was always zero are rounded to nearest.
    """
    order, upper, _ = factor
    plain_scale, plain_offset = grid(plain)
    scale, offset = plain_scale[order], None if plain_offset is None else plain_offset[order]
    format = FORMATS[kind]

    def choose(j: Array, row: Array, arrays: tuple, factor: Array) -> tuple[Array, Array]:
        scale, offset = arrays
        s, o = scale[j], None if offset is None else offset[j]
        code = format.nearest(row, s, o)
        value = format.decode(code) * s if o is None else format.decode(code) * s + o
        return (row - value) / factor[j, j], code

    zeros = jnp.zeros(weight.shape, format.code_dtype)
    codes = swept(upper, weight[order], zeros, (scale, offset), choose)
    return codes[jnp.argsort(order)]


def swept(
    matrix: Float[Array, "I I"], state: Float[Array, "I O"], codes: Array, arrays: tuple, choose: Callable
) -> Array:
    """Choose codes [I, O] input by input; each choice changes the state of the other inputs.

    state: a row [O] for each input, such as its weights or gradients. codes: initial codes. arrays: further
    arrays with a row for each input. choose(j, row of the state, arrays, matrix) -> (change [O], code [O]).
    After each choice, the outer product of row j of the matrix and the change is subtracted from the state.
    Inputs are processed in blocks, for speed: j counts from the first input of the block, and choose gets
    only the block's rows of `arrays` and the block's rows and columns of `matrix`.
    """
    ins, outs = state.shape
    size = next(n for n in range(min(INPUT_BLOCK, ins), 0, -1) if ins % n == 0)

    def take(x: Array, at: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, at, size, 0)

    def block(b: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        state, codes = now
        at = b * size
        rows = take(matrix, at)
        diagonal = jax.lax.dynamic_slice_in_dim(rows, at, size, 1)
        inside = jax.tree.map(partial(take, at=at), arrays)

        def step(j: Array, now: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            part, changes, codes = now
            change, code = choose(j, part[j], inside, diagonal)
            part = part - diagonal[j][:, None] * change[None]
            return part, changes.at[j].set(change), codes.at[j].set(code)

        start = take(state, at), jnp.zeros((size, outs), jnp.float32), take(codes, at)
        _, changes, own_codes = jax.lax.fori_loop(0, size, step, start)
        state = state - jnp.matmul(rows.T, changes, precision=HIGHEST)
        return state, jax.lax.dynamic_update_slice_in_dim(codes, own_codes, at, 0)

    return jax.lax.fori_loop(0, ins // size, block, (state, codes))[1]


# Low-rank pairs: starts of PiSSA and OLoRA, and corrections of rounded weights


def principal_pair(weight: _Weight, rank: int, scale: float) -> FirstPair:
    """Return a [in, R], b [R, out], R = rank, so that `scale a b` is the best approximation of a weight with
    this rank: its R largest singular values and their vectors.

    Columns of a and rows of b have equal norms. Singular vectors are eigenvectors of the smaller Gram matrix,
    computed in float64.
    """
    import scipy.linalg  # not at the top: most runs do not need it

    wide = weight.astype(np.float64)
    if wide.shape[0] > wide.shape[1]:
        b, a = principal_pair(weight.T, rank, scale)
        return a.T, b.T
    size = wide.shape[0]
    _, vectors = scipy.linalg.eigh(wide @ wide.T, subset_by_index=[size - rank, size - 1])
    left = vectors[:, ::-1]
    right = left.T @ wide  # rows have the singular values as norms
    values = np.sqrt(np.sum(right**2, 1))
    root = np.sqrt(values / abs(scale))
    b = right * (np.copysign(root, scale) / np.maximum(values, SMALLEST_VALUE))[:, None]
    return (left * root).astype(np.float32), b.astype(np.float32)


def _qr_pair(weight: _Weight, rank: int, scale: float) -> FirstPair:
    """Return a [in, R], b [R, out] from the QR decomposition `weight.T = q r`: the first R rows of r and the
    first R columns of q, both transposed. As in peft, `scale` is not used.
    """
    q, r = np.linalg.qr(weight.T)
    return np.ascontiguousarray(r[:rank].T), np.ascontiguousarray(q[:, :rank].T)


FIRST_PAIRS = {"pissa": principal_pair, "olora": _qr_pair}  # by the name of the initialisation


def correction(
    error: Float[Array, "I O"], gram: Float[Array, "I I"], rank: int
) -> tuple[Float[np.ndarray, "I R"], Float[np.ndarray, "R O"]]:
    """Return a [I, R], b [R, O] whose product, added to a rounded weight, gives the least error of the
    outputs (Zhang et al. 2025, QERA, arXiv:2410.06040).

    error: target minus rounded weight. gram: sum of x x^T over the inputs. Columns of a and rows of b have
    equal norms.
    """
    low = jnp.linalg.cholesky(damped(jnp.asarray(gram)))
    a, b = principal_pair(np.asarray(jnp.matmul(low.T, error, precision=HIGHEST)), rank, 1.0)
    a = np.asarray(jax.scipy.linalg.solve_triangular(low.T, jnp.asarray(a), lower=False))
    norms = np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1)
    root = np.sqrt(norms[1] / np.maximum(norms[0], np.float32(1e-30)))
    return a * root, b / np.maximum(root, np.float32(1e-30))[:, None]
