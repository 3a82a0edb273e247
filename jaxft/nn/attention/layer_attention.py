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
from jaxft.nn.tree import Batch, LayerOutputs, static, struct

EVERY_KEY = np.int32(2**30)  # the window of full attention in a model where other layers have a window

Angles = tuple[Float[Array, "..."], Float[Array, "..."]]


class Extras(NamedTuple):
    """The outputs of a layer in addition to the residual stream.

    cached: in generation, (carry, value) for the cache, see stack.Pass. outputs: values by name, which the
    scan over layers stacks.
    """

    cached: Any = None
    outputs: LayerOutputs = {}


Attend = Callable[[Array, Array, Array], tuple[Array, Extras]]


@struct
class AttentionRule:
    """Sliding window and soft cap of a layer that attends to cached keys.

    window: a query at position p sees keys at positions above p - window. An int, or an int32 scalar array
    if it differs between the layers of a scan; None: no window. softcap: see attention.dense.
    """

    window: Any = None
    softcap: float | None = static(default=None)


@dataclass(frozen=True)
class LayerKind:
    """Rope and sliding window of some layers. window: how many of the most recent keys a query attends to,
    its own key included; None for all.
    """

    rope: Rope
    window: Annotated[int | None, between(1, EVERY_KEY - 1), "sliding_window"] = None

    def __post_init__(self) -> None:
        check_bounds(self, "config:")


@dataclass(frozen=True)
class AttentionLayers:
    """Attention settings of every layer of a model.

    kinds: the distinct LayerKinds. layout: for each layer its index into `kinds`, None for a layer without
    attention. scale: factor on the scores q k^T; None for 1 / sqrt(head_dim). settings: soft cap, and
    settings that choose a kernel.
    """

    kinds: tuple[LayerKind, ...]
    layout: tuple[int | None, ...]
    head_dim: int
    scale: float | None = None
    settings: AttentionSettings = AttentionSettings()

    def part(self, numbers: range) -> "AttentionLayers":
        """Return the settings of the layers with these indices into `layout`."""
        return replace(self, layout=tuple(self.layout[i] for i in numbers))

    @property
    def windowed(self) -> np.ndarray:
        """Bools [L]: whether a layer has a sliding window."""
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
    """Return whether the rope angles of texts with up to `longest` tokens depend on the texts' lengths, as
    in the rope types dynamic and longrope beyond the original length.
    """
    ropes = [kind.rope for kind in a.kinds if needs_lengths(kind.rope)]
    return any(longest > (rope.original_max_positions or 0) for rope in ropes)


def uniform(count: int, head_dim: int, rope: Rope, window: int | None = None) -> AttentionLayers:
    """Return the AttentionLayers of `count` layers with the same settings."""
    return AttentionLayers((LayerKind(rope, window),), (0,) * count, head_dim)


def window_of(a: AttentionLayers, kind: Array | None, length: int) -> Any:
    """Return the window of a layer for rows of `length` tokens: None if no layer's window is shorter than the
    row, an int if all layers have the same window, an int32 scalar array otherwise.

    kind: the index of the layer's LayerKind; None if there is only one.
    """
    windows = [needed_window(k.window, length) for k in a.kinds]
    if kind is None or not any(windows):
        return windows[0] if kind is None else None
    numbers = np.array([EVERY_KEY if window is None else window for window in windows], np.int32)
    return jnp.asarray(numbers)[kind]


def attention_needs(a: AttentionLayers, length: int, packed: bool, branches: bool) -> AttentionNeeds:
    """Return the features that a kernel needs to run these layers on rows of `length` tokens."""
    windowed = any(needed_window(kind.window, length) for kind in a.kinds)
    return AttentionNeeds(packed, branches, windowed, a.settings.softcap is not None)


def batch_ranges(tokens: Batch) -> KeyRanges:
    """Return the key ranges of rows, computed once for all layers. tokens: Tokens, Pairs or Rollout."""
    segments, branches = (
        None if x is None else constrain(x, "rows", "whole_time") for x in (tokens.segments, tokens.branches)
    )
    return key_ranges(segments, branches)


def layer_ranges(a: AttentionLayers, kind: Array | None, ranges: KeyRanges) -> KeyRanges:
    """Return the batch's key ranges, shortened by the window of a layer. kind: as in window_of."""
    return within_window(ranges, window_of(a, kind, ranges.own_start.shape[1]))


def example_angles(
    a: AttentionLayers, positions: Int[Array, "B T"], segments: Int[Array, "B T"], dtype: DTypeLike
) -> list[Angles]:
    """Return cos and sin of the rope angles of packed rows, [B, T, E/2], for each LayerKind."""
    lengths = None
    if any(needs_lengths(kind.rope) for kind in a.kinds):
        lengths = example_lengths(positions, segments)
    return [rope_angles(kind.rope, a.head_dim, positions, lengths, dtype) for kind in a.kinds]


def batch_angles(a: AttentionLayers, tokens: Batch, dtype: DTypeLike) -> list[Angles]:
    """Return cos and sin of the rope angles of a batch's rows, [B, T, E/2], for each LayerKind. Sampled
    completions have the angles that they had in generation (generation_angles).

    tokens: Tokens, Pairs or Rollout. Raises ValueError for pairs that share a prompt if the angles depend on
    the length of a text: one response's angles would depend on the length of the other.
    """
    shared = tokens.branches is not None and tokens.sampled_length is None
    if shared and varies_with_length(a, tokens.max_length):
        raise ValueError(
            "pairs share prompts, but the model's rope depends on the length of a text; use "
            "data.layout=plain or, in Python, open the pairs by jaxft.data.source.open_for"
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
    """Return cos and sin of the rope angles of tokens in generation, [B, T, E/2], for each LayerKind.

    lengths: for each token, the maximum length of its text (the prompt and the most new tokens), so that the
    angles depend neither on the decoding step nor on the other prompts of the batch.
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
    """Return the output of attention of rows in one layer, and the keys (after rope) and values.

    qkv: queries, keys and values before rope. kind: the index of the layer's LayerKind; None if there is only
    one. angles: rope angles for each LayerKind. ranges: key ranges of the batch. packed: see
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
    """Return the factor on queries that gives scores the model's scale, for a kernel that divides scores by
    sqrt(E): cached_attention, and all kernels but those in OF_SCALED_QUERIES.
    """
    return 1.0 if a.scale is None else a.scale * a.head_dim**0.5


def rotated(
    q: Float[Array, "B T H E"], k: Float[Array, "B T K E"], angles: Angles, factor: float
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T K E"]]:
    """Apply rope to queries and keys, and a factor to the queries; name both so that remat policies can save
    them.

    The factor is applied in float32 or wider, before queries are rounded, so that they are rounded once.
    """
    q = constrain(rotate(q, *angles, factor), "rows", "time", "heads", "head_dim")
    k = constrain(rotate(k, *angles), "rows", "time", "kv_heads", "head_dim")
    return saveable(q, "q"), saveable(k, "k")


def checked_values(v: Float[Array, "B T K E"]) -> Float[Array, "B T K E"]:
    """Return the values sharded over heads and named so that remat policies can save them."""
    return saveable(constrain(v, "rows", "time", "kv_heads", "head_dim"), "v")
