"""Attention settings of a model's layers, which may differ between layers: rope, sliding window, soft cap."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxft.annotations import between, check_bounds
from jaxft.distributed.sharding import constrain
from jaxft.nn.attention.attention import (
    OF_SCALED_QUERIES,
    AttentionNeeds,
    AttentionSettings,
    attention_by,
    chosen_kernel,
    needed_window,
)
from jaxft.nn.attention.flash_attention import KeyRanges, key_ranges, within_window
from jaxft.nn.layers import saveable
from jaxft.nn.rope import Rope, example_lengths, needs_lengths, rope_angles, rotate
from jaxft.tree import Batch, LayerOutputs, static, struct

EVERY_KEY = np.int32(2**30)  # the window of full attention in a model where other layers have a window

Angles = tuple[Float[Array, "..."], Float[Array, "..."]]


class Extras(NamedTuple):
    """The outputs of a layer in addition to the residual stream.

    cached: what attention returned for a cache, see stack.Pass. outputs: values by name, which scans stack.
    """

    cached: Any = None
    outputs: LayerOutputs = {}


Attend = Callable[[Array, Array, Array], tuple[Array, Extras]]


@struct
class AttentionRule:
    """Window and soft cap of a layer, for a query on cached keys.

    window: a query at position p sees keys at positions above p - window. An int, or an int32 scalar array,
    which may differ between the layers of a scan; None: no window. softcap: see attention.dense.
    """

    window: Any = None
    softcap: float | None = static(default=None)


@dataclass(frozen=True)
class LayerKind:
    """Rope and sliding window of some layers. window: keys that a query attends to, including its own
    position; None for all keys before it.
    """

    rope: Rope
    window: Annotated[int | None, between(1, EVERY_KEY - 1), "sliding_window"] = None

    def __post_init__(self) -> None:
        check_bounds(self, "config:")


@dataclass(frozen=True)
class AttentionLayers:
    """Attention settings of every layer of a model.

    kinds: the distinct LayerKinds. layout: the index into `kinds` of each layer, None for one without
    attention. scale: factor on the scores q k^T; None for 1 / sqrt(head_dim). settings: soft cap, and
    overrides of the choice of a kernel.
    """

    kinds: tuple[LayerKind, ...]
    layout: tuple[int | None, ...]
    head_dim: int
    scale: float | None = None
    settings: AttentionSettings = AttentionSettings()

    def part(self, numbers: range) -> "AttentionLayers":
        """Return the settings of some of these layers."""
        return replace(self, layout=tuple(self.layout[i] for i in numbers))

    @property
    def windowed(self) -> np.ndarray:
        """Whether each layer has a window: bools [L]."""
        return np.array([kind is not None and self.kinds[kind].window is not None for kind in self.layout])

    @property
    def longest_window(self) -> int:
        """The longest window of any layer; 0 if none has one."""
        return max((kind.window or 0 for kind in self.kinds), default=0)

    @property
    def kind_numbers(self) -> np.ndarray | None:
        """`layout` as int32 [L], for the scan over layers; None if there is only one kind."""
        return None if len(self.kinds) == 1 else np.array(self.layout, np.int32)


def varies_with_length(a: AttentionLayers, longest: int) -> bool:
    """Whether the angles of texts of up to `longest` tokens depend on their lengths (dynamic, longrope)."""
    ropes = [kind.rope for kind in a.kinds if needs_lengths(kind.rope)]
    return any(longest > (rope.original_max_positions or 0) for rope in ropes)


def uniform(count: int, head_dim: int, rope: Rope, window: int | None = None) -> AttentionLayers:
    """Return the AttentionLayers of `count` layers with the same settings."""
    return AttentionLayers((LayerKind(rope, window),), (0,) * count, head_dim)


def window_of(a: AttentionLayers, kind: Array | None, length: int) -> Any:
    """Return the window of a layer for rows of `length` tokens: None if no layer's window is shorter than the
    row, an int if all layers have the same window, an int32 scalar array otherwise.
    """
    windows = [needed_window(k.window, length) for k in a.kinds]
    if kind is None or not any(windows):
        return windows[0] if kind is None else None
    numbers = np.array([EVERY_KEY if window is None else window for window in windows], np.int32)
    return jnp.asarray(numbers)[kind]


def attention_needs(a: AttentionLayers, length: int, packed: bool, branches: bool) -> AttentionNeeds:
    """Return the layers' needs from a kernel for rows of `length` tokens; see AttentionNeeds."""
    windowed = any(needed_window(kind.window, length) for kind in a.kinds)
    return AttentionNeeds(packed, branches, windowed, a.settings.softcap is not None)


def batch_ranges(tokens: Batch) -> KeyRanges:
    """Return the key ranges of a batch's rows, computed once for all layers; tokens: Tokens, Pairs or
    Rollout.
    """
    segments, branches = (
        None if x is None else constrain(x, "rows", "whole_time") for x in (tokens.segments, tokens.branches)
    )
    return key_ranges(segments, branches)


def layer_ranges(a: AttentionLayers, kind: Array | None, ranges: KeyRanges) -> KeyRanges:
    """Return the batch's key ranges, shortened by the layer's window."""
    return within_window(ranges, window_of(a, kind, ranges.own_start.shape[1]))


def example_angles(
    a: AttentionLayers, positions: Int[Array, "B T"], segments: Int[Array, "B T"], dtype: DTypeLike
) -> list[Angles]:
    """Return cos and sin [B, T, E/2] of packed rows for each LayerKind."""
    lengths = None
    if any(needs_lengths(kind.rope) for kind in a.kinds):
        lengths = example_lengths(positions, segments)
    return [rope_angles(kind.rope, a.head_dim, positions, lengths, dtype) for kind in a.kinds]


def batch_angles(a: AttentionLayers, tokens: Batch, dtype: DTypeLike) -> list[Angles]:
    """Return cos and sin [B, T, E/2] of a batch's rows for each LayerKind; for sampled completions the angles
    of the sampler (generation_angles). tokens: Tokens, Pairs or Rollout. Raises ValueError for pairs that
    share a prompt, whose angles would depend on the length of the other response.
    """
    shared = tokens.branches is not None and tokens.sampled_length is None
    if shared and varies_with_length(a, tokens.max_length):
        raise ValueError(
            "pairs share prompts, but the model's rope depends on the length of a text; use "
            "data.layout=plain, or open the pairs by jaxft.data.source.open_for"
        )
    positions = constrain(tokens.positions, "rows", "time")
    depends_on_length = any(needs_lengths(kind.rope) for kind in a.kinds)
    if tokens.sampled_length is None or tokens.branches is None or not depends_on_length:
        return example_angles(a, positions, tokens.segments, dtype)
    of_prompts = jnp.where(tokens.branches == 0, positions, jnp.zeros((), positions.dtype))
    prompts = example_lengths(of_prompts, tokens.segments)
    return generation_angles(a, positions, prompts + tokens.sampled_length, dtype)


def generation_angles(
    a: AttentionLayers, positions: Int[Array, "B T"], lengths: Int[Array, "B T"], dtype: DTypeLike
) -> list[Angles]:
    """Return cos and sin [B, T, E/2] of tokens in generation for each LayerKind.

    lengths: the most tokens that each token's text may have, prompt and completion, so that the angles depend
    neither on the decoding step nor on the other prompts of the batch.
    """
    return [rope_angles(kind.rope, a.head_dim, positions, lengths, dtype) for kind in a.kinds]


def angles_of(angles: list[Angles], kind: Array | None) -> Angles:
    """Return the angles of a layer's LayerKind. kind: its index; None if there is only one."""
    if kind is None:
        return angles[0]
    cos, sin = (jnp.stack(parts) for parts in zip(*angles, strict=True))
    return tuple(jax.lax.dynamic_index_in_dim(x, kind, 0, keepdims=False) for x in (cos, sin))


def attend_rows(
    a: AttentionLayers,
    kind: Array | None,
    qkv: tuple[Float[Array, "B T H E"], Float[Array, "B T K E"], Float[Array, "B T K E"]],
    angles: list[Angles],
    ranges: KeyRanges,
    packed: bool,
) -> tuple[Float[Array, "B T H E"], tuple[Float[Array, "B T K E"], Float[Array, "B T K E"]]]:
    """Return the attention of rows in one layer, and the keys, with rope, and values that it attends to.

    qkv: queries, keys and values before rope. kind: the index of the layer's LayerKind; None if there is only
    one. angles: rope angles of each LayerKind. ranges: key ranges of the batch. packed: as in
    attention.attention.
    """
    q, k, v = qkv
    needs = attention_needs(a, q.shape[1], packed, ranges.prompt_start is not None)
    layout, kernel = chosen_kernel(q, k.shape[2], needs, a.settings)
    factor = query_factor(a)
    if kernel in OF_SCALED_QUERIES:
        kernel, factor = OF_SCALED_QUERIES[kernel], a.head_dim**-0.5 if a.scale is None else a.scale
    (q, k), v = rotated(q, k, angles_of(angles, kind), factor), checked_values(v)
    ranges = layer_ranges(a, kind, ranges)
    return attention_by((layout, kernel), q, k, v, ranges, a.settings.softcap), (k, v)


def query_factor(a: AttentionLayers) -> float:
    """Return the factor on queries that makes the total scale the model's where scores are divided by
    sqrt(E), as in cached_attention and in all kernels that do not take scaled queries.
    """
    return 1.0 if a.scale is None else a.scale * a.head_dim**0.5


def rotated(
    q: Float[Array, "B T H E"], k: Float[Array, "B T K E"], angles: Angles, factor: float
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T K E"]]:
    """Return queries, with rope and multiplied by a factor, and keys with rope, under names that remat
    policies can save.

    The factor is applied in float32 or wider, so that queries are rounded once.
    """
    q = constrain(rotate(q, *angles, factor), "rows", "time", "heads", "head_dim")
    k = constrain(rotate(k, *angles), "rows", "time", "kv_heads", "head_dim")
    return saveable(q, "q"), saveable(k, "k")


def checked_values(v: Float[Array, "B T K E"]) -> Float[Array, "B T K E"]:
    """Return values sharded over their heads, under a name that remat policies can save."""
    return saveable(constrain(v, "rows", "time", "kv_heads", "head_dim"), "v")
