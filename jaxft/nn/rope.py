"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864): the rotation, and the frequencies of every
rope type of transformers. Of a head's d rotated dimensions, i and i + d/2 are a pair, as in Hugging Face.

The types `dynamic` and `longrope` use other frequencies for texts longer than the original length:
- In training, the length is each example's (`example_lengths`), not its row's, so a packed example has
  the angles that transformers computes for it alone. A prompt with several responses is one example, as long
  as with its longest response; rows of preferences that may exceed the original length don't share prompts.
- In generation, the final length is unknown, so the length is the capacity of a row's cache: the prompt plus
  the maximum number of new tokens, just as vLLM decides by max_model_len. transformers decides again for each
  token, so it changes frequencies in the middle of a text. Training on sampled completions takes the same
  length, so that their log-probs equal the sampled ones.
"""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxft.annotations import ABOVE_ZERO_TO_ONE, above, at_least, check_bounds
from jaxft.nn.layers import to_rank
from jaxft.nn.matmul import accumulation_dtype

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional", "none"]

# The fields of Rope that each kind uses, in addition to theta and rotated.
USED: dict[RopeKind, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_positions"),
    "llama3": ("factor", "original_max_positions", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor", "original_max_positions", "attention_factor", "mscale", "mscale_all_dim", "beta_fast",
        "beta_slow", "truncate",
    ),
    "longrope": ("factor", "original_max_positions", "attention_factor", "short_factor", "long_factor"),
    "proportional": ("factor",),
    "none": (),
}  # fmt: skip


@dataclass(frozen=True)
class Rope:
    """The rotary position embedding of a model, or of some of its layers.

    theta: base of the frequencies theta^(-2i/d) of a head with d rotated dimensions.
    original_max_positions: the model's context length before its rope was extended, in tokens.
    kind:
      default: these frequencies;
      linear: all frequencies divided by `factor`;
      dynamic: a larger theta for examples longer than original_max_positions (NTK-aware);
      llama3: low frequencies divided by `factor`; low_freq_factor and high_freq_factor bound the transition;
      yarn: as llama3, by arXiv:2309.00071; beta_fast, beta_slow and truncate bound the transition;
      longrope: arXiv:2402.13753; frequency i divided by short_factor[i] or, for examples longer than
        original_max_positions, by long_factor[i];
      proportional: frequencies of the full head, divided by `factor`; 0 beyond the fraction `rotated`;
      none: no rotation.
    rotated: fraction of a head's dimensions that are rotated, starting with the first.
    attention_factor: factor on cos and sin (yarn, longrope); None computes it from factor, mscale and
      mscale_all_dim as transformers does.

    Raises ValueError for a value out of range, or for a field that `kind` doesn't use.
    """

    theta: Annotated[float, at_least(1), "rope_theta"] = 10000.0
    kind: Annotated[RopeKind, "rope_type"] = "default"
    factor: Annotated[float, above(0)] = 1.0
    original_max_positions: int | None = None
    rotated: Annotated[float, ABOVE_ZERO_TO_ONE, "partial_rotary_factor"] = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: Annotated[float | None, at_least(0)] = None
    mscale: Annotated[float | None, at_least(0)] = None
    mscale_all_dim: Annotated[float | None, at_least(0)] = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self):
        check_bounds(self, "config: rope:")
        used = ("theta", "kind", "rotated", *USED[self.kind])
        for f in fields(self):
            if f.name not in used and getattr(self, f.name) != f.default:
                raise ValueError(
                    f"config: rope type {self.kind!r} does not use {f.name}={getattr(self, f.name)!r}; "
                    "remove it"
                )
        original = self.original_max_positions
        needs_original = "original_max_positions" in used
        if needs_original and (original is None or original < 1):
            raise ValueError(
                f"config: rope type {self.kind!r} needs original_max_position_embeddings above 0, got "
                f"{original}"
            )
        self._check_kind()

    def _check_kind(self) -> None:
        low, high = self.low_freq_factor, self.high_freq_factor
        if not 0 < low < high < math.inf:
            raise ValueError(
                "config: rope's low_freq_factor must be above 0 and below high_freq_factor, which must be "
                f"finite, got low_freq_factor={low}, high_freq_factor={high}"
            )
        if not 0 < self.beta_slow <= self.beta_fast < math.inf:
            raise ValueError(
                "config: rope's beta_slow must be above 0 and at most beta_fast, which must be finite, got "
                f"beta_slow={self.beta_slow}, beta_fast={self.beta_fast}"
            )
        if self.kind == "yarn" and self.theta == 1:
            raise ValueError("config: rope_theta must be above 1 for rope type 'yarn', got 1")
        for name in ("short_factor", "long_factor"):
            if not all(0 < x < math.inf for x in getattr(self, name)):
                raise ValueError(
                    f"config: rope's {name} must be finite numbers above 0, got {getattr(self, name)}"
                )
        if self.kind == "longrope" and self.original_max_positions == 1:
            raise ValueError(
                "config: original_max_position_embeddings must be above 1 for rope type 'longrope', got 1"
            )


def rotated_dims(rope: Rope, head_dim: int) -> int:
    """Return how many dimensions of a head are rotated; each frequency rotates two."""
    return head_dim if rope.kind in ("proportional", "none") else int(head_dim * rope.rotated)


def check_rope(rope: Rope, head_dim: int, max_positions: int) -> None:
    """Raise ValueError if a rope doesn't fit the head size, or an angle up to max_positions overflows."""
    dims = rotated_dims(rope, head_dim)
    if dims % 2 or not dims:
        part = f"head_dim={head_dim}"
        part += "" if dims == head_dim else f" and partial_rotary_factor={rope.rotated}"
        raise ValueError(f"config: {part} makes {dims} rotated dimensions; use an even number above 0")
    if rope.kind == "dynamic" and dims == 2:
        raise ValueError("config: rope type 'dynamic' has 2 rotated dimensions per head; use another type")
    for name, factors in (("short_factor", rope.short_factor), ("long_factor", rope.long_factor)):
        if rope.kind == "longrope" and len(factors) != dims // 2:
            raise ValueError(
                f"config: rope's {name} must have {dims // 2} numbers, one per pair of the {dims} rotated "
                f"dimensions, got {len(factors)}"
            )
    with np.errstate(over="ignore"):
        angles = [max_positions * np.abs(f) for f in (frequencies(rope, head_dim), _long(rope, head_dim))]
    if not all((x < 3.4e38).all() for x in angles):
        raise ValueError(
            f"config: rope's angles are not finite with rope_theta={rope.theta}, factor={rope.factor} and "
            f"{max_positions} positions; "
            "use smaller values"
        )


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Return the frequencies (radians per position) as [d/2] in float64, for d rotated dimensions.

    dynamic and longrope: for examples with up to original_max_positions tokens. kind none: zeros.
    """
    dims = rotated_dims(rope, head_dim)
    freqs = rope.theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    if rope.kind == "linear":
        return freqs / rope.factor
    if rope.kind == "proportional":
        return np.where(np.arange(dims // 2) < int(rope.rotated * head_dim // 2), freqs / rope.factor, 0)
    if rope.kind == "llama3":
        return _llama3(rope, freqs)
    if rope.kind == "yarn":
        return _yarn(rope, freqs)
    if rope.kind == "longrope":
        return freqs / np.asarray(rope.short_factor, np.float64)
    return np.zeros(dims // 2) if rope.kind == "none" else freqs


def _long(rope: Rope, head_dim: int) -> np.ndarray:
    """Return longrope's frequencies above original_max_positions; for other kinds, `frequencies(rope)`."""
    freqs = frequencies(rope, head_dim)
    if rope.kind != "longrope":
        return freqs
    return freqs * np.asarray(rope.short_factor, np.float64) / np.asarray(rope.long_factor, np.float64)


def _llama3(rope: Rope, freqs: np.ndarray) -> np.ndarray:
    """Divide low frequencies (long wavelengths) by rope.factor, as Llama 3.1's reference code does."""
    wavelength = 2 * math.pi / freqs
    smooth = (_original(rope) / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    return freqs * ((1 - np.clip(smooth, 0, 1)) / rope.factor + np.clip(smooth, 0, 1))


def _yarn(rope: Rope, freqs: np.ndarray) -> np.ndarray:
    """Return YaRN's frequencies. Frequencies with fewer than beta_slow turns in original_max_positions are
    divided by the factor; above beta_fast turns they are unchanged, with a linear transition in between.
    """
    dims = 2 * len(freqs)

    def index(turns: float) -> float:  # of the frequency with this number of turns
        return dims * math.log(_original(rope) / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    width = high - low or 0.001  # as in transformers
    divided = np.clip((np.arange(len(freqs)) - low) / width, 0, 1)
    return freqs * (divided / rope.factor + (1 - divided))


def _original(rope: Rope) -> int:
    assert rope.original_max_positions is not None  # checked by Rope
    return rope.original_max_positions


def attention_scaling(rope: Rope) -> float:
    """Return the factor by which cos and sin are multiplied: 1 except for yarn and longrope."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    if rope.kind == "longrope":
        return math.sqrt(1 + math.log(rope.factor) / math.log(_original(rope)))
    above, below = (rope.mscale, rope.mscale_all_dim) if rope.mscale and rope.mscale_all_dim else (1.0, 0.0)
    return (0.1 * above * math.log(rope.factor) + 1) / (0.1 * below * math.log(rope.factor) + 1)


def needs_lengths(rope: Rope) -> bool:
    """Return whether the angles depend on the number of an example's tokens (dynamic, longrope)."""
    return rope.kind in ("dynamic", "longrope")


def example_lengths(positions: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return the length of each token's example: the largest position in its segment, plus 1.

    segments: 0 for padding, else from 1 to T. A shared prompt and its responses are one segment.
    """
    rows = jnp.arange(segments.shape[0], dtype=segments.dtype)[:, None]
    largest = jnp.zeros((segments.shape[0], segments.shape[1] + 1), positions.dtype)
    return largest.at[rows, segments].max(positions)[rows, segments] + 1


def rope_angles(
    rope: Rope,
    head_dim: int,
    positions: Int[Array, "B T"],
    lengths: Int[Array, "B T"] | None,
    dtype: DTypeLike,
) -> tuple[Float[Array, "B T E2"], Float[Array, "B T E2"]]:
    """Return cos and sin of the angles at each position, [B, T, d/2] in float32 or wider for d rotated
    dimensions, times the attention factor (yarn, longrope).

    lengths: for each position, the number of tokens of its example; needed only if `needs_lengths(rope)`.
    kind none: cos is 1 and sin 0.
    """
    wide = accumulation_dtype(dtype)
    if rope.kind == "none":
        shape = (*positions.shape, head_dim // 2)
        return jnp.ones(shape, wide), jnp.zeros(shape, wide)
    freqs = jnp.asarray(frequencies(rope, head_dim), wide)
    if needs_lengths(rope):
        if lengths is None:
            raise ValueError(f"rope type {rope.kind!r} needs the lengths of the examples; pass `lengths`")
        freqs = _by_length(rope, head_dim, lengths, freqs)
    angles = positions[..., None].astype(wide) * to_rank(freqs, positions.ndim + 1)
    cos, sin, scaling = jnp.cos(angles), jnp.sin(angles), attention_scaling(rope)
    if scaling == 1:
        return cos, sin
    return cos * jnp.asarray(scaling, wide), sin * jnp.asarray(scaling, wide)


def _by_length(
    rope: Rope, head_dim: int, lengths: Int[Array, "B T"], freqs: Float[Array, " E2"]
) -> Float[Array, "B T E2"]:
    """Return dynamic's or longrope's frequencies for `lengths`. freqs: up to original_max_positions."""
    original, wide = _original(rope), freqs.dtype
    freqs = to_rank(freqs, 3)
    if rope.kind == "longrope":
        long = to_rank(jnp.asarray(_long(rope, head_dim), wide), 3)
        return jnp.where(lengths[..., None] > original, long, freqs)
    # theta becomes theta * g^(d/(d-2)) with g = factor * length / original - (factor - 1). As a factor on the
    # frequencies this is a power of g alone, and log1p makes it exactly 1 up to the original length.
    dims = 2 * freqs.shape[-1]
    beyond = jnp.maximum(lengths - original, 0).astype(wide) * jnp.asarray(rope.factor / original, wide)
    powers = jnp.asarray(np.arange(0, dims, 2) / (dims - 2), wide)
    return freqs * jnp.exp(-jnp.log1p(beyond)[..., None] * to_rank(powers, 3))


def rotate(
    x: Float[Array, "B T N E"], cos: Float[Array, "B T E2"], sin: Float[Array, "B T E2"], scale: float = 1.0
) -> Float[Array, "B T N E"]:
    """Rotate each head and multiply it by `scale`, computed in cos's dtype and rounded to x's dtype once.

    Dimensions from 2 * cos.shape[-1] on are scaled but not rotated.
    """
    half = cos.shape[-1]
    x1, x2, rest = jnp.split(x.astype(cos.dtype), (half, 2 * half), -1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = [x1 * cos - x2 * sin, x2 * cos + x1 * sin]
    out = jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, -1)
    return (out if scale == 1 else out * jnp.asarray(scale, out.dtype)).astype(x.dtype)
