"""Adam with its moments in few bits: blocks of 8-bit codes, or bfloat16 with stochastic rounding.

`optim.optimizer=jaxft.optim.low_precision:adamw_8bit` holds a quarter of float32 Adam's bytes, `adamw_bf16` half of them.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from jaxft import tree
from jaxft.distributed.sharding import is_spread
from jaxft.nn.param import is_spec
from jaxft.nn.quant_formats import DYNAMIC, DYNAMIC_BOUNDS, dynamic_code
from jaxft.optim.optimizer import Optim, decayed, stochastically_rounded
from jaxft.tree import struct

BLOCK = 256  # values that share a scale
AT_ONCE = 1 << 22  # values that are encoded at a time
SMALL = 4096  # a layer's leaf with fewer values stays in float32, as in bitsandbytes

POSITIVE = dynamic_code(signed=False)
POSITIVE_BOUNDS = (POSITIVE[:-1] + POSITIVE[1:]) * np.float32(0.5)


@struct
class Codes:
    """A float32 array in blocks of 8 bits: `table[codes] * absmax of the block` (Dettmers et al. 2022, arXiv:2110.02861).

    codes: uint8 of the array's shape, so that they lie on the mesh as it does; absmax: float32 [rows, blocks].
    """

    codes: UInt8[Array, "..."]
    absmax: Float[Array, "rows blocks"]


def _rows(shape: tuple[int, ...], layers: bool) -> tuple[int, int]:
    """(rows, values a row) of an array whose blocks run within rows: the last axis, or all of a layer where that is short."""
    whole = math.prod(shape)
    lead = shape[0] if layers else 1
    last = shape[-1] if shape[-1] >= BLOCK else whole // lead
    return whole // last, last


def encode(x: Float[Array, "..."], layers: bool, signed: bool) -> Codes:
    """The nearest codes. layers: whether the first axis stacks layers, which then share no block."""
    rows, size = _rows(x.shape, layers)
    room = -size % BLOCK
    bounds = jnp.asarray(DYNAMIC_BOUNDS if signed else POSITIVE_BOUNDS)

    def some(x: Array) -> tuple[Array, Array]:
        blocks = jnp.pad(x, ((0, 0), (0, room))).reshape(len(x), (size + room) // BLOCK, BLOCK)
        absmax = jnp.max(jnp.abs(blocks), axis=-1)
        scaled = blocks / jnp.maximum(absmax, np.float32(2.0**-120))[..., None]
        codes = jnp.searchsorted(bounds, scaled, method="scan_unrolled").astype(jnp.uint8)
        return codes.reshape(len(x), size + room)[:, :size], absmax

    parts = next((n for n in range(1, rows + 1) if rows % n == 0 and x.size // n <= AT_ONCE), 1)
    if parts == 1 or is_spread():
        codes, absmax = some(x.reshape(rows, size))
    else:  # the search has several temporaries of its input's size
        codes, absmax = jax.lax.map(some, x.reshape(parts, rows // parts, size))
    return Codes(codes.reshape(x.shape), absmax.reshape(rows, -1))


def encoded_zeros(shape: tuple[int, ...], layers: bool, signed: bool) -> Codes:
    """`encode(jnp.zeros(shape), ...)`, which XLA would spend seconds on while it compiles, folding constants."""
    rows, size = _rows(shape, layers)
    code = np.searchsorted(DYNAMIC_BOUNDS if signed else POSITIVE_BOUNDS, 0.0)
    return Codes(jnp.full(shape, code, jnp.uint8), jnp.zeros((rows, -(-size // BLOCK)), jnp.float32))


def decode(c: Codes, layers: bool, signed: bool) -> Float[Array, "..."]:
    """Undo encode."""
    rows, size = _rows(c.codes.shape, layers)
    each = jnp.repeat(c.absmax, BLOCK, axis=-1, total_repeat_length=c.absmax.shape[1] * BLOCK)[:, :size]
    table = jnp.asarray(DYNAMIC if signed else POSITIVE)
    values = table.at[c.codes.astype(jnp.int32)].get(mode="promise_in_bounds")
    return values * each.reshape(c.codes.shape)


def _adam(o: Optim, updates: Any, count: Array, moments: tuple[Any, Any]) -> tuple[Any, Array, Any, Any]:
    """(direction, count, mu, nu) of a step of Adam (Kingma & Ba 2015, arXiv:1412.6980), in float32."""
    wide = lambda x: x.astype(jnp.float32)  # noqa: E731
    mu = jax.tree.map(lambda m, g: o.b1 * wide(m) + (1 - o.b1) * wide(g), moments[0], updates)
    nu = jax.tree.map(lambda v, g: o.b2 * wide(v) + (1 - o.b2) * wide(g) * wide(g), moments[1], updates)
    count = optax.safe_increment(count)
    at = count.astype(jnp.float32)
    direction = jax.tree.map(lambda m, v: m / (1 - o.b1**at) / (jnp.sqrt(v / (1 - o.b2**at)) + o.eps), mu, nu)
    return direction, count, mu, nu


def scale_by_adam_8bit(o: Optim, specs: Any) -> optax.GradientTransformation:
    """optax.scale_by_adam whose moments are held as Codes between the steps (arXiv:2110.02861), except small leaves'.

    Each layer of a stacked leaf has blocks of its own. The moments of a step are exact; what is rounded is what is kept.
    """
    stacked = {
        path: "layers" in s.axes for path, s in tree.paths(specs, is_leaf=is_spec).items() if s is not None
    }

    def packed(path: str, x: Array) -> bool:
        return x.size // (x.shape[0] if stacked[path] else 1) >= SMALL

    def keep(path: str, x: Array, signed: bool) -> Any:
        return encode(x, stacked[path], signed) if packed(path, x) else x

    def start(params: Any, signed: bool) -> Any:
        def zeros(path: str, p: Array) -> Any:
            return (
                encoded_zeros(p.shape, stacked[path], signed)
                if packed(path, p)
                else jnp.zeros(p.shape, jnp.float32)
            )

        return tree.map_with_path(zeros, params)

    def wide(moment: Any, like: Any, signed: bool) -> Any:
        known = lambda path, _, m: decode(m, stacked[path], signed) if isinstance(m, Codes) else m  # noqa: E731
        return tree.map_with_path(known, like, moment)

    def init(params):
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), start(params, True), start(params, False))

    def update(updates, state, params=None):
        moments = wide(state.mu, updates, True), wide(state.nu, updates, False)
        direction, count, mu, nu = _adam(o, updates, state.count, moments)
        kept = [
            tree.map_with_path(lambda path, x, s=s: keep(path, x, s), moment)
            for moment, s in ((mu, True), (nu, False))
        ]
        return direction, optax.ScaleByAdamState(count, *kept)

    return optax.GradientTransformation(init, update)


def scale_by_adam_bf16(o: Optim, specs: Any) -> optax.GradientTransformation:
    """optax.scale_by_adam whose moments are held in bfloat16, rounded stochastically, so that small changes are not lost.

    The random bits follow from the step, the leaf and its first number (layers in turn look alike otherwise), so a run that is
    resumed is the same.
    """

    def rounded(moment: Any, count: Array, salt: int) -> Any:
        key = jax.random.fold_in(jax.random.key(salt), count)
        leaves, shape = jax.tree.flatten(moment)
        first = lambda x: jax.lax.bitcast_convert_type(x.reshape(-1)[0], jnp.uint32)  # noqa: E731
        keys = [jax.random.fold_in(jax.random.fold_in(key, i), first(x)) for i, x in enumerate(leaves)]
        return jax.tree.unflatten(shape, list(map(stochastically_rounded, leaves, keys)))

    def init(params):
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.bfloat16), params)  # noqa: E731
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros(), zeros())

    def update(updates, state, params=None):
        direction, count, mu, nu = _adam(o, updates, state.count, (state.mu, state.nu))
        return direction, optax.ScaleByAdamState(count, rounded(mu, count, 1), rounded(nu, count, 2))

    return optax.GradientTransformation(init, update)


def adamw_8bit(o: Optim, schedule: optax.Schedule, specs: Any) -> optax.GradientTransformation:
    """AdamW with moments in 8 bits, in blocks of 256 (Dettmers et al. 2022, arXiv:2110.02861)."""
    return _adamw(scale_by_adam_8bit(o, specs), o, schedule, specs)


def adamw_bf16(o: Optim, schedule: optax.Schedule, specs: Any) -> optax.GradientTransformation:
    """AdamW with moments in bfloat16 that are rounded stochastically."""
    return _adamw(scale_by_adam_bf16(o, specs), o, schedule, specs)


def _adamw(
    adam: optax.GradientTransformation, o: Optim, schedule: Any, specs: Any
) -> optax.GradientTransformation:
    return optax.chain(adam, decayed(o, specs), optax.scale_by_learning_rate(schedule))


adamw_8bit.by_row = adamw_bf16.by_row = True  # type: ignore[attr-defined]
