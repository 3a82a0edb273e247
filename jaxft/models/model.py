"""The type of a model: what every file in models/ builds, and all that the rest of jaxft knows of one.

No code outside models/ and weights/ names an architecture. A variation of a model (an adapter, a scalar head, a temperature)
is `dataclasses.replace` of the fields that differ.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxtyping import Array, Float

from jaxft.tree import Params

WeightNames = dict[str, tuple[str, bool]]


class ModelConfig(Protocol):
    """The sizes that code outside models/ reads. A family's config is a frozen dataclass with these and its own fields."""

    @property
    def vocab(self) -> int:
        """Rows of the embedding table."""

    @property
    def width(self) -> int:
        """Size of the residual stream."""

    @property
    def layers(self) -> int:
        """Number of layers."""

    @property
    def heads(self) -> int:
        """Query heads."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads, a divisor of `heads`."""

    @property
    def head_dim(self) -> int:
        """Size of a head."""

    @property
    def eos(self) -> tuple[int, ...]:
        """Token ids that end a completion."""

    @property
    def max_positions(self) -> int:
        """The longest row."""


def no_scalar_head(params: Params, h: Array) -> Array:
    """The `scores` of a language model. Raises ValueError."""
    raise ValueError("this model has no scalar head; make it one with models.heads.scorer")


@dataclass(frozen=True)
class Model:
    """An architecture with its sizes and dtypes as pure functions of a parameter tree.

    config: sizes.
    specs: ParamSpec tree of all parameters.
    weight_names: parameter path -> (tensor name in Hugging Face's layout with {i} for the layer, whether it is transposed).
    dtype, residual: dtype of the computation, and of the residual stream between layers.
    hidden(params, tokens, key=None) -> [B, T, D] after the final norm. tokens: Tokens, Pairs or Rollout. Without a key
        there is no dropout.
    head(params) -> the subtree of parameters that `logits` reads.
    logits(head, h [..., D]) -> [..., V] in float32 or wider.
    prefill(params, tokens, size) -> (h [B, T, D], cache with slots for `size` tokens a row).
    decode(params, cache, ids [B], positions [B], slot) -> (h [B, D], cache); `slot` is the same for all rows.
    repeat_cache(cache, count) -> the cache with each row `count` times in succession.
    forward_flops(tokens, context) -> floating point operations of a forward pass, attention over `context` keys included.
    heads: ParamSpecs that the whole tree has in addition to base and adapter: scalar heads, and models with adapters of
        their own.
    scores(params, h [..., D]) -> [...] in float32 or wider, by the scalar head `params["score"]`. Raises ValueError where
        the model has none.
    generates: whether it generates text. Otherwise head, logits, prefill and decode raise ValueError.
    """

    config: ModelConfig
    specs: Any
    weight_names: WeightNames
    dtype: Any
    residual: Any
    hidden: Callable[..., Float[Array, "B T D"]]
    head: Callable[[Params], Params]
    logits: Callable[[Params, Array], Array]
    prefill: Callable[..., tuple[Array, Any]]
    decode: Callable[..., tuple[Array, Any]]
    repeat_cache: Callable[[Any, int], Any]
    forward_flops: Callable[[int, int], float]
    heads: dict[str, Any] = field(default_factory=dict)
    scores: Callable[[Params, Array], Array] = no_scalar_head
    generates: bool = True
