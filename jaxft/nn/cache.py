"""Prefill and decoding: a model's stacked layers with a cache of keys and values.

Layers with full attention cache all tokens of a row. Layers with a sliding window of W tokens cache only the
last W: the token in slot s is at index s % W.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxft.nn.attention import attention, cached_attention
from jaxft.nn.flash_attention import Visibility
from jaxft.nn.layer_attention import (
    AttentionLayers,
    angles_of,
    cache_angles,
    checked_values,
    rotated,
    rule_of,
    window_of,
)
from jaxft.nn.matmul import from_bits, to_bits
from jaxft.nn.scan import Layer
from jaxft.tree import Batch, Params, static, struct

# k [L, B, K, E, S] and v [L, B, K, S, E]: layers with full attention, stored as raw bits. window_k, window_v:
# layers with a window, where S is the longest window. visible [B, S]: whether a slot has a token.
Cache = dict[str, Array]


@struct
class NextToken:
    """The position [B] of each row's next token in its text, and its cache slot, which all rows share."""

    positions: Any
    slot: Any


def prefill_layers(
    layer: Layer,
    h_BTD: Float[Array, "B T D"],
    layers: Params,
    tokens: Batch,
    size: int,
    a: AttentionLayers,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Return the residual stream of prompts after all layers, and a cache with `size` slots per row.

    Prompts are left-padded (segment 0), so that every row stores its next token in the same slot.
    """
    slots = jnp.arange(tokens.ids.shape[1], dtype=tokens.positions.dtype)
    angles = cache_angles(a, tokens.positions, slots, size, h_BTD.dtype)
    rows = Visibility(tokens.segments, tokens.branches, tokens.positions if a.longest_window else None)

    def body(h: Array, x: Any) -> tuple[Array, Any]:
        p, kind = x

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            (q, k), v = rotated(a, q, k, angles_of(angles, kind)), checked_values(v)
            o = attention(q, k, v, rows, tokens.packed, rule_of(a, kind, len(slots)))
            return o, (to_bits(k.transpose(0, 2, 3, 1)), to_bits(v.swapaxes(1, 2)))

        return layer(p, h, attend, None)

    h_BTD, (k, v) = jax.lax.scan(body, h_BTD, (layers, a.kind_numbers))
    used = tokens.ids.shape[1]
    cache = {"visible": jnp.pad(tokens.segments > 0, ((0, 0), (0, size - used)))}
    windowed = a.windowed
    if not windowed.all():
        if windowed.any():
            of_layers = np.flatnonzero(~windowed)
            full_k, full_v = k[of_layers], v[of_layers]
        else:
            full_k, full_v = k, v
        cache["k"], cache["v"] = _pad_axis(full_k, 4, size - used), _pad_axis(full_v, 3, size - used)
    if windowed.any():
        of_layers, kept = np.flatnonzero(windowed), min(a.longest_window, size)
        cache["window_k"] = _last_slots(k[of_layers], 4, kept)
        cache["window_v"] = _last_slots(v[of_layers], 3, kept)
    return h_BTD, cache


def _pad_axis(x: Array, axis: int, count: int) -> Array:
    return jnp.pad(x, [(0, count if i == axis else 0) for i in range(x.ndim)])


def _last_slots(x: Array, axis: int, count: int) -> Array:
    """Return the last `count` slots, with slot s at index s % count."""
    used = x.shape[axis]
    if used <= count:
        return _pad_axis(x, axis, count - used)
    return jnp.roll(jax.lax.slice_in_dim(x, used - count, used, axis=axis), used % count, axis)


def decode_layers(
    layer: Layer,
    h_B1D: Float[Array, "B 1 D"],
    layers: Params,
    cache: Cache,
    at: NextToken,
    a: AttentionLayers,
) -> tuple[Float[Array, "B 1 D"], Cache]:
    """Return the residual stream of one token per row after all layers, and the cache with that token.

    The scan carries the cache and updates it in place: as xs and ys it would be copied for each token.
    """
    slot, size = at.slot, cache["visible"].shape[1]
    visible = cache["visible"] | (jnp.arange(size, dtype=slot.dtype) == slot)[None]
    angles = cache_angles(a, at.positions[:, None], slot[None].astype(at.positions.dtype), size, h_B1D.dtype)
    windowed = a.windowed
    place = np.where(windowed, np.cumsum(windowed), np.cumsum(~windowed)) - 1  # index in k or in window_k

    def body(carry: tuple[Array, Cache], x: Any) -> tuple[Any, None]:
        h, stored = carry
        p, i, has_window, kind = x
        step = _Step(slot, i, window_of(a, kind, size), a.softcap)

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            (q, k), v = rotated(a, q, k, angles_of(angles, kind)), checked_values(v)
            new = to_bits(k.transpose(0, 2, 3, 1)), to_bits(v.swapaxes(1, 2))
            if windowed.all():
                now = _store(stored, "window_", new, step)
                return _attend_window(q, now, visible, step), now
            if not windowed.any():
                now = _store(stored, "", new, step)
                return _attend_all(q, now, visible, step), now
            now = _store(stored, "window_", new, step, has_window)
            now = _store(now, "", new, step, ~has_window)
            choices = (_attend_all, _attend_window)
            return jax.lax.cond(
                has_window, *(lambda f=f: f(q, now, visible, step) for f in choices[::-1])
            ), now

        return layer(p, h, attend, None), None

    xs = layers, place.astype(slot.dtype), windowed, a.kind_numbers
    stored = {name: x for name, x in cache.items() if name != "visible"}
    (h_B1D, stored), _ = jax.lax.scan(body, (h_B1D, stored), xs)
    return h_B1D, {**stored, "visible": visible}


@struct
class _Step:
    """A decoding step of one layer: the token's slot, the layer's index in its cache, window, soft cap."""

    slot: Any
    place: Any
    window: Any
    softcap: float | None = static(default=None)


def _store(stored: Cache, prefix: str, new: tuple[Array, Array], s: _Step, used: Any = None) -> Cache:
    """Store a layer's keys [B, K, E, 1] and values [B, K, 1, E] in the token's slot, except if not `used`."""
    out, zero = dict(stored), jnp.zeros_like(s.slot)  # all start indices have one integer type
    for name, axis, x in ((f"{prefix}k", 4, new[0]), (f"{prefix}v", 3, new[1])):
        start = [s.place, zero, zero, zero, zero]
        start[axis] = s.slot % stored[name].shape[axis] if prefix else s.slot
        x = x[None]
        if used is not None:
            place = jnp.minimum(s.place, stored[name].shape[0] - 1)  # the other cache may have more layers
            start[0] = place
            x = jnp.where(used, x, jax.lax.dynamic_slice(stored[name], start, x.shape))
        out[name] = jax.lax.dynamic_update_slice(stored[name], x, start)
    return out


def _attend_all(q: Array, stored: Cache, visible: Bool[Array, "B S"], s: _Step) -> Array:
    return _attend(q, (stored["k"], stored["v"]), visible, s)


def _attend_window(q: Array, stored: Cache, visible: Bool[Array, "B S"], s: _Step) -> Array:
    count = stored["window_k"].shape[4]
    back = (s.slot - jnp.arange(count, dtype=s.slot.dtype)) % count  # index j stores slot `slot - back[j]`
    seen = back <= s.slot if s.window is None else (back <= s.slot) & (back < s.window)
    slots = jnp.maximum(s.slot - back, 0)
    return _attend(q, (stored["window_k"], stored["window_v"]), seen[None] & visible[:, slots], s)


def _attend(q: Array, stored: tuple[Array, Array], visible: Array, s: _Step) -> Array:
    k_BKES, v_BKSE = (from_bits(jax.lax.dynamic_index_in_dim(x, s.place, 0, False), q.dtype) for x in stored)
    return cached_attention(q[:, 0], k_BKES, v_BKSE, visible, s.softcap)[:, None]


def repeat_cache(cache: Cache, count: int) -> Cache:
    """Return the cache with each row repeated `count` times in succession, for that many completions each."""
    if count == 1:
        return cache
    return {name: jnp.repeat(x, count, axis=0 if name == "visible" else 1) for name, x in cache.items()}
