"""The keys that each query of packed rows attends to, as two ranges of storage positions.

A query sees its own segment up to itself or, behind a prompt that responses share, its own response up to
itself and the prompt. A sliding window shortens both ranges. Attention kernels know these ranges and no
segments, branches or windows.

Rows are laid out as their sources write them. The tokens of a segment are contiguous, and 0 is padding. Where
responses share a prompt, the prompt (branch 0) comes first in its segment; then come the responses (branches
1, 2, ...), the tokens of each contiguous.
"""

import functools
import operator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxft.tree import static, struct

NEVER = np.int32(2**30)  # an empty range is [NEVER, 0), so that min and max over ranges ignore it


@struct
class KeyRanges:
    """The keys that each query sees: those in [own_start, own_end) and those in [prompt_start, prompt_end).

    int32 arrays [..., T] of storage positions in the row. The prompt's are None if no row has branches, and a
    range without keys is [2^30, 0). The prompt's range ends before the own range starts. windowed: a sliding
    window may have shortened the ranges.
    """

    own_start: Any
    own_end: Any
    prompt_start: Any = None
    prompt_end: Any = None
    windowed: bool = static(default=False, kw_only=True)

    @property
    def pairs(self) -> list[tuple[Any, Any]]:
        """Start and end of the own ranges and, if rows have branches, of the prompts'."""
        own, prompts = (self.own_start, self.own_end), (self.prompt_start, self.prompt_end)
        return [own] if self.prompt_start is None else [own, prompts]


def key_ranges(segments: Int[Any, "B T"], branches: Int[Any, "B T"] | None = None) -> KeyRanges:
    """Return the key ranges of all queries of rows; see the layout of rows above.

    Work and memory grow with T.
    """
    segments = jnp.asarray(segments)
    at = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32)[None], segments.shape)
    real, new = segments != 0, _changes(segments)
    segment_start = own_start = lax.cummax(jnp.where(new, at, 0), axis=1)
    prompt_start = prompt_end = None
    if branches is not None:
        branches = jnp.asarray(branches)
        own_start = lax.cummax(jnp.where(new | _changes(branches), at, 0), axis=1)
        in_prompt = (branches == 0) & (own_start == segment_start)
        end = lax.cummax(jnp.where(in_prompt, at + 1, 0), axis=1)  # of the last prompt up to here
        prompt_start, prompt_end = _if(real & ~in_prompt & (end > segment_start), segment_start, end)
    own_start, own_end = _if(real, own_start, at + 1)
    return KeyRanges(own_start, own_end, prompt_start, prompt_end)


def _changes(x_BT: jax.Array) -> Bool[Array, "B T"]:
    """Whether each entry is the first of a run of equal entries."""
    return jnp.pad(x_BT[:, 1:] != x_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def _if(exists: jax.Array, start: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.where(exists, start, NEVER), jnp.where(exists, end, 0)


def within_window(ranges: KeyRanges, window: Any) -> KeyRanges:
    """Return the ranges of a layer in which a query sees the last `window` keys only, its own included.

    Windows count the tokens of the text, not of the row: behind a shared prompt, the window of a response's
    token covers its own response and then the end of the prompt. window: an int, an int32 scalar array, or
    None for all keys. ranges: as key_ranges returns them.
    """
    if window is None:
        return ranges
    reach = jnp.asarray(window, jnp.int32) - 1
    own_start = jnp.maximum(ranges.own_start, ranges.own_end - 1 - reach)
    shortened = replace(ranges, own_start=own_start, windowed=True)
    if ranges.prompt_start is None:
        return shortened
    before = ranges.own_end - 1 - ranges.own_start  # tokens of the response before the query's
    start = jnp.maximum(ranges.prompt_start, ranges.prompt_end + (before - reach))
    start, end = _if(start < ranges.prompt_end, start, ranges.prompt_end)
    return replace(shortened, prompt_start=start, prompt_end=end)


def visible(ranges: KeyRanges, keys: Int[Array, " S"]) -> Bool[Array, "..."]:
    """Return which of the keys at these storage positions each query sees: [..., T, S]."""
    keys = lax.broadcast_in_dim(keys, (1,) * ranges.own_start.ndim + keys.shape, (ranges.own_start.ndim,))
    seen = [(start[..., None] <= keys) & (keys < end[..., None]) for start, end in ranges.pairs]
    return functools.reduce(operator.or_, seen)


def overlaps(ranges: KeyRanges, count: int, size: int) -> Bool[Array, "..."]:
    """Return whether each query sees a key of each of `count` blocks of `size` keys: [..., T, count]."""
    ndim = ranges.own_start.ndim
    first = lax.broadcasted_iota(jnp.int32, (1,) * ndim + (count,), ndim) * np.int32(size)
    last = first + np.int32(size - 1)
    seen = [(start[..., None] <= last) & (end[..., None] > first) for start, end in ranges.pairs]
    return functools.reduce(operator.or_, seen)


def pad_queries(ranges: KeyRanges, extra: int) -> KeyRanges:
    """Append queries without keys to each row."""
    if not extra:
        return ranges

    def pad(x: Any, value: Any) -> Any:
        return jnp.pad(x, ((0, 0), (0, extra)), constant_values=value)

    padded = [x for start, end in ranges.pairs for x in (pad(start, NEVER), pad(end, 0))]
    return KeyRanges(*padded, windowed=ranges.windowed)


def in_parts(ranges: KeyRanges, parts: tuple[tuple[Any, Any], tuple[Any, Any]]) -> KeyRanges:
    """Return the ranges as positions in a block of keys that consists of two parts of the row.

    parts: start and length of each; the first one is before the second one.
    """

    def before(at: Any) -> Any:  # keys of the block before a position of the row
        return sum(jnp.clip(at - start, 0, length) for start, length in parts)

    inside = [(before(start), before(end)) for start, end in ranges.pairs]
    arrays = [x for start, end in inside for x in _if(start < end, start, end)]
    return KeyRanges(*arrays, windowed=ranges.windowed)
