"""AdamW with moments in 8-bit blocks, or in bfloat16 with stochastic rounding.

Compared with Adam's float32 moments, `optim.optimizer=adamw_8bit` needs a quarter of the memory, `adamw_bf16`
half.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from jaxft.distributed.sharding import is_multi_device
from jaxft.nn import tree
from jaxft.nn.param_spec import Specs, lead_shape, spec_paths
from jaxft.nn.quant_formats import DYNAMIC, DYNAMIC_BOUNDS, dynamic_code
from jaxft.nn.tree import OptState, Params, struct
from jaxft.optim.rules import UpdateRule, check_adam, with_decay
from jaxft.optim.update import stochastically_rounded

BLOCK = 256  # values that share a scale
AT_ONCE = 1 << 22  # maximum number of values that are encoded at once
SMALL = 4096  # a layer's leaf with fewer values stays in float32, as in bitsandbytes

POSITIVE = dynamic_code(signed=False)
POSITIVE_BOUNDS = (POSITIVE[:-1] + POSITIVE[1:]) * np.float32(0.5)


@struct
class Codes:
    """A float32 array stored in 8 bits per value: `table[code] * absmax of the block`, as in Dettmers et al.
    2022, arXiv:2110.02861.

    codes: uint8 of the array's shape, sharded like the array. absmax: the largest magnitude of each block of
    BLOCK values in a row.
    """

    codes: UInt8[Array, "..."]
    absmax: Float[Array, "rows blocks"]


def _rows(shape: tuple[int, ...], stacked: int) -> tuple[int, int]:
    """Return (number of rows, values per row) of an array of this shape; blocks never cross rows. A row runs
    along the last axis or, if that is shorter than BLOCK, is one of the `stacked` layers, flattened.
    """
    total = math.prod(shape)
    last = shape[-1] if shape[-1] >= BLOCK else total // stacked
    return total // last, last


def encode_blocks(x: Float[Array, "..."], stacked: int, signed: bool) -> Codes:
    """Return the Codes nearest to x. stacked: how many parameters (layers) are stacked in x; no block
    contains values of two. signed: whether values may be negative.

    >>> encode_blocks(jnp.ones((2, 256)), stacked=1, signed=True).absmax.tolist()
    [[1.0], [1.0]]
    """
    rows, size = _rows(x.shape, stacked)
    padding = -size % BLOCK
    bounds = jnp.asarray(DYNAMIC_BOUNDS if signed else POSITIVE_BOUNDS)

    def encode(x: Array) -> tuple[Array, Array]:
        blocks = jnp.pad(x, ((0, 0), (0, padding))).reshape(len(x), (size + padding) // BLOCK, BLOCK)
        absmax = jnp.max(jnp.abs(blocks), axis=-1)
        scaled = blocks / jnp.maximum(absmax, np.float32(2.0**-120))[..., None]
        codes = jnp.searchsorted(bounds, scaled, method="scan_unrolled").astype(jnp.uint8)
        return codes.reshape(len(x), size + padding)[:, :size], absmax

    parts = next((n for n in range(1, rows + 1) if rows % n == 0 and x.size // n <= AT_ONCE), 1)
    if parts == 1 or is_multi_device():
        codes, absmax = encode(x.reshape(rows, size))
    else:  # searchsorted has several temporaries of its input's size
        codes, absmax = jax.lax.map(encode, x.reshape(parts, rows // parts, size))
    return Codes(codes.reshape(x.shape), absmax.reshape(rows, -1))


def encoded_zeros(shape: tuple[int, ...], stacked: int, signed: bool) -> Codes:
    """Return encode_blocks(jnp.zeros(shape), ...) without computing it, which would take XLA seconds."""
    rows, size = _rows(shape, stacked)
    code = np.searchsorted(DYNAMIC_BOUNDS if signed else POSITIVE_BOUNDS, 0.0)
    return Codes(jnp.full(shape, code, jnp.uint8), jnp.zeros((rows, -(-size // BLOCK)), jnp.float32))


def decode_blocks(c: Codes, stacked: int, signed: bool) -> Float[Array, "..."]:
    """Invert encode_blocks: return the float32 values of the codes."""
    rows, size = _rows(c.codes.shape, stacked)
    scales = jnp.repeat(c.absmax, BLOCK, axis=-1, total_repeat_length=c.absmax.shape[1] * BLOCK)[:, :size]
    table = jnp.asarray(DYNAMIC if signed else POSITIVE)
    values = table.at[c.codes.astype(jnp.int32)].get(mode="promise_in_bounds")
    return values * scales.reshape(c.codes.shape)


class Adam(NamedTuple):
    """Hyper-parameters of Adam (Kingma & Ba 2015, arXiv:1412.6980)."""

    b1: float
    b2: float
    eps: float


def _adam(
    hyper: Adam, updates: Params, count: Array, moments: tuple[Params, Params]
) -> tuple[Params, Array, Params, Params]:
    """Return (direction, count, mu, nu) after a step of Adam in float32. moments: (mu, nu) before."""
    b1, b2, eps = hyper

    def wide(x: Array) -> Array:
        return x.astype(jnp.float32)

    mu = jax.tree.map(lambda m, g: b1 * wide(m) + (1 - b1) * wide(g), moments[0], updates)
    nu = jax.tree.map(lambda v, g: b2 * wide(v) + (1 - b2) * wide(g) * wide(g), moments[1], updates)
    count = optax.safe_increment(count)
    at = count.astype(jnp.float32)
    direction = jax.tree.map(lambda m, v: m / (1 - b1**at) / (jnp.sqrt(v / (1 - b2**at)) + eps), mu, nu)
    return direction, count, mu, nu


def scale_by_adam_8bit(hyper: Adam, specs: Specs) -> optax.GradientTransformation:
    """optax.scale_by_adam with moments stored as Codes between steps, except for small leaves.

    Each layer of a stacked parameter has separate blocks. A step computes in float32; only the stored moments
    are rounded.
    """
    stacked = {path: math.prod(lead_shape(s)) for path, s in spec_paths(specs).items()}

    def is_packed(path: str, x: Array) -> bool:
        return x.size // stacked[path] >= SMALL

    def zeros(params: Params, signed: bool) -> Params:
        def leaf(path: str, p: Array) -> Any:
            if is_packed(path, p):
                return encoded_zeros(p.shape, stacked[path], signed)
            return jnp.zeros(p.shape, jnp.float32)

        return tree.map_with_path(leaf, params)

    def unpack(moment: Params, like: Params, signed: bool) -> Params:
        def leaf(path: str, _: Array, m: Any) -> Array:
            return decode_blocks(m, stacked[path], signed) if isinstance(m, Codes) else m

        return tree.map_with_path(leaf, like, moment)

    def pack(moment: Params, signed: bool) -> Params:
        def leaf(path: str, x: Array) -> Any:
            return encode_blocks(x, stacked[path], signed) if is_packed(path, x) else x

        return tree.map_with_path(leaf, moment)

    def init(params: Params) -> OptState:
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros(params, True), zeros(params, False))

    def update(updates: Params, state: OptState, params: Params | None = None) -> tuple[Params, OptState]:
        moments = unpack(state.mu, updates, True), unpack(state.nu, updates, False)
        direction, count, mu, nu = _adam(hyper, updates, state.count, moments)
        return direction, optax.ScaleByAdamState(count, pack(mu, True), pack(nu, False))

    return optax.GradientTransformation(init, update)


def scale_by_adam_bf16(hyper: Adam) -> optax.GradientTransformation:
    """optax.scale_by_adam with moments in bfloat16, rounded stochastically so that small changes persist.

    The key of the random bits is derived from the step, the leaf and its first value (which differs between
    the layers of a layerwise update), so a resumed run has the same bits.
    """

    def rounded(moment: Params, count: Array, salt: int) -> Params:
        key = jax.random.fold_in(jax.random.key(salt), count)
        leaves, structure = jax.tree.flatten(moment)

        def first_bits(x: Array) -> Array:
            return jax.lax.bitcast_convert_type(x.reshape(-1)[0], jnp.uint32)

        keys = [jax.random.fold_in(jax.random.fold_in(key, i), first_bits(x)) for i, x in enumerate(leaves)]
        return jax.tree.unflatten(structure, list(map(stochastically_rounded, leaves, keys)))

    def init(params: Params) -> OptState:
        mu, nu = (jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.bfloat16), params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(updates: Params, state: OptState, params: Params | None = None) -> tuple[Params, OptState]:
        direction, count, mu, nu = _adam(hyper, updates, state.count, (state.mu, state.nu))
        return direction, optax.ScaleByAdamState(count, rounded(mu, count, 1), rounded(nu, count, 2))

    return optax.GradientTransformation(init, update)


def adamw_8bit(
    schedule: optax.Schedule,
    specs: Specs,
    weight_decay: float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> UpdateRule:
    """AdamW with moments in 8 bits, in blocks of 256 (Dettmers et al. 2022, arXiv:2110.02861).

    Leaves with fewer than 4096 values per layer have float32 moments, as in bitsandbytes.
    """
    check_adam(b1, b2, eps)
    adam = scale_by_adam_8bit(Adam(b1, b2, eps), specs)
    return UpdateRule(with_decay(adam, schedule, specs, weight_decay), rowwise=True, replicated=("absmax",))


def adamw_bf16(
    schedule: optax.Schedule,
    specs: Specs,
    weight_decay: float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> UpdateRule:
    """AdamW with moments in bfloat16 that are rounded stochastically."""
    check_adam(b1, b2, eps)
    adam = scale_by_adam_bf16(Adam(b1, b2, eps))
    return UpdateRule(with_decay(adam, schedule, specs, weight_decay), rowwise=True)
