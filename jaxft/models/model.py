"""The Model type: model families build one, and code outside models/ uses models only through it.

No code outside models/ and weights/ names an architecture. A variant of a model (with an adapter, a scalar
head or a temperature) is made by `dataclasses.replace`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any, Generic, TypeVar

from jaxtyping import Array, Float

from jaxft.models.dense_config import DenseConfig
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.attention.kv_cache import Cache
from jaxft.nn.attention.layer_attention import AttentionLayers
from jaxft.nn.param_spec import Specs, kernel, spec_paths
from jaxft.nn.stack import RematPolicy, Stacks
from jaxft.nn.tensor_names import WeightNames
from jaxft.nn.tree import LayerOutputs, Params

Config = TypeVar("Config", bound=DenseConfig)


def no_scalar_head(params: Params, h: Array) -> Array:
    """The `scores` of a language model. Raises ValueError."""
    raise ValueError("this model has no scalar head; add one with models.adapted.with_scalar_head")


@dataclass(frozen=True, eq=False)  # equal and hashed by identity
class Model:
    """A language model as pure functions of a parameter tree, with its sizes and dtypes.

    config: sizes; a family's own class adds fields.
    specs: ParamSpec tree of all parameters.
    weight_names: names of the tensors in Hugging Face files by path; see nn/tensor_names.py.
    attention: rope, window and soft cap of each layer.
    stacks: the layers, see nn/stack.py, whose run_layer computes one layer.
    dtype, residual: dtype of the computation, and of the residual stream between layers.
    hidden(params, tokens, key=None, neftune=0.0, observe=None) -> (h [B, T, D] after the final norm, outputs
        of the layers). tokens: Tokens, Pairs or Rollout. key: for dropout and NEFTune's noise, whose alpha is
        neftune; None disables both. The outputs are {name: [L, B, ...]}, {} for dense models; observe(h
        before, h after a layer) -> {name: value} adds its values, [L, ...].
    embed(params, ids [B, T]) -> h [B, T, D], the residual stream before the first layer; params: of the base.
    head(params) -> the subtree of parameters that `logits` reads.
    logits(head, h [..., D]) -> [..., V] in float32 or wider.
    prefill(params, tokens, new) -> (h [P, T, D], PromptKeys) of left-padded prompts; new: the maximum number
        of tokens of a completion.
    extend(params, cache, chunk) -> (h [r, C, D], cache): append given tokens to rows; chunk: GivenChunk.
    decode(params, cache, ids [R], at) -> (h [R, D], cache): append one token to each row; at: NextToken.
    empty_cache((prompts, token slots of a prompt), rows, new, stored="compute") -> a Cache without tokens.
    forward_flops(tokens, context, read=None) -> floating point operations of a forward pass over texts of
        `context` tokens each; read: how many tokens have logits, all by default.
    heads: ParamSpecs of a run's parameters besides base and adapter: scalar heads, and further models
        (critics, reward models) by name.
    head_adapters: the adapter settings of these further models, by the same names.
    scores(params, h [..., D]) -> [...] in float32 or wider, by the scalar head `params["score"]`; raises
        ValueError if there is none.
    generates: whether it generates text; if False, head, logits, prefill, extend and decode raise ValueError.
    teacher: a second, frozen language model over the same parameter tree, which an objective may read; None
        without one (see models/adapted.py).
    """

    config: DenseConfig
    specs: Specs
    weight_names: WeightNames
    attention: AttentionLayers
    stacks: Stacks
    dtype: Any
    residual: Any
    hidden: Callable[..., tuple[Float[Array, "B T D"], LayerOutputs]]
    embed: Callable[[Params, Array], Float[Array, "B T D"]]
    head: Callable[[Params], Params]
    logits: Callable[[Params, Array], Array]
    prefill: Callable[..., tuple[Array, Any]]
    extend: Callable[..., tuple[Array, Cache]]
    decode: Callable[..., tuple[Array, Cache]]
    empty_cache: Callable[..., Cache]
    forward_flops: Callable[..., float]
    heads: dict[str, Any] = field(default_factory=dict)
    head_adapters: dict[str, Adapter] = field(default_factory=dict)
    scores: Callable[[Params, Array], Array] = no_scalar_head
    generates: bool = True
    teacher: "Model | None" = None


@dataclass(frozen=True)
class ForwardOptions(Generic[Config]):
    """The compute options of a family's forward pass.

    dtype: dtype of activations and matmuls. residual: dtype of the residual stream between layers. remat: see
    nn.stack.RematPolicy.
    """

    config: Config
    dtype: Any
    residual: Any
    remat: RematPolicy


def dense_flops(
    config: DenseConfig,
    specs: Specs,
    attention: AttentionLayers,
    tokens: int,
    context: float,
    read: int | None = None,
) -> float:
    """Return the FLOPs of a dense decoder's forward pass over `tokens` tokens in texts of `context` tokens:
    kernels of the layers, causal attention within each layer's window, and the head for `read` tokens (all by
    default). A multiply-add counts as two.
    """
    kernels = [spec for spec in spec_paths(specs).values() if "layers" in spec.axes and kernel(spec)]
    windows = [attention.kinds[kind].window for kind in attention.layout if kind is not None]
    keys = sum(mean_keys(window, context) for window in windows)
    scores = 2 * config.heads * config.head_dim * keys
    head = config.width * config.vocab * (tokens if read is None else read)
    return 2.0 * (tokens * (sum(prod(spec.shape) for spec in kernels) + scores) + head)


def mean_keys(window: int | None, context: float) -> float:
    """Return the approximate mean number of keys that a query attends to, causally and within the window, in
    a text of `context` tokens: half of them without a window.
    """
    if window is None or window >= context:
        return context / 2
    return window * (1 - window / (2 * context))
