"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) and DoRA: a separate tree that is attached to the base
at trace time.

An adapter is a tree with the paths of the base. At the path of an adapted kernel [*L, I, O], stacked along
any lead axes L, such as layers, it has a pair: `a` [*L, I, R], `b` [*L, R, O] and the frozen `scale` [*L] =
alpha / rank, or alpha / sqrt(rank) with rslora (see Adapter.scale_of); with DoRA also `magnitude` [*L, O].
Without attaching it, the model is the base model bit for bit.

Where the layers of a stack have different ranks, R is the largest rank. The columns of `a` and rows of `b`
beyond a layer's rank start at zero, have zero gradients, and are not exported.

Several adapters that go through the model together have one more axis, "adapters", the last of the lead axes.
"""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxft.annotations import BELOW_ONE, PositiveInt, between, check_bounds
from jaxft.nn import tree
from jaxft.nn.adapters.full_modules import Replaced, TokenRows, is_replacement
from jaxft.nn.param_spec import ParamSpec, Specs, kernel, map_stack, spec_paths
from jaxft.nn.quant import RESIDUAL_INITS, QTensor, dequantize, is_qtensor
from jaxft.nn.tensor_names import SCORE_MODULES, is_name
from jaxft.nn.tree import Params, static, struct

# Layers that compute several projections by one matrix, and the layers that other models have in their place.
FUSED_PARTS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}

ADAPTERS = "adapters"  # the axis over several adapters, behind the lead axes of their base
# By the name of a leaf: its number of axes after the axis over adapters.
OWN_AXES = {"a": 2, "b": 2, "scale": 0, "magnitude": 1, "gain": 1, "score": 2}
EVA = "eva"
INITIAL_ADAPTER = "initial_adapter"  # in a run's parameters: its policy's adapter at step 0, for heads
AdapterInit = Literal["default", "pissa", "olora", "loftq", "qera", "eva"]


@dataclass(frozen=True)
class Adapter:
    """LoRA settings, named as in PEFT.

    rank: inner dimension of the pairs of matrices a and b. alpha: their product is scaled by alpha / rank,
    with rslora by alpha / sqrt(rank). dropout: fraction of an adapter's inputs that are dropped in training.
    targets: "all-linear" (every linear layer of the blocks, routers excepted), a tuple of module names ("q",
    "v", "gate", "head", or Hugging Face's "q_proj"; "qkv" and "gate_up" in models with fused layers), one
    such name, or a regular expression over whole parameter paths. rslora: scale by alpha / sqrt(rank) in
    place of alpha / rank (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732).

    rank_pattern, alpha_pattern: (pattern, value) pairs for modules with another rank or alpha; the first
    pattern counts that matches a module's name, Hugging Face's or a part of a path (see nn/tensor_names.py),
    or the end of it. exclude_modules: ends of module names (as in rank_pattern), or one regular expression
    over whole names; these modules get no adapter. layers_to_transform: numbers of the layers that get an
    adapter, none for all.

    modules_to_save: modules that are trained in full and saved with the adapter (targets may be empty with
    them), such as "lm_head", "embed_tokens", "norm" or "mlp" ("score", the head of a reward model, always
    is), with the modules in them; the base keeps its weights. bias: also train the biases of all layers or of
    the adapted ones (lora_only), and save them with the adapter. trainable_token_indices: also train the rows
    of these tokens in the embedding table, and save them with the adapter. token_head: also train the rows of
    these tokens in an untied head; a tied head shares the table's rows.

    dora: learn the norm of each output's weights too (DoRA, Liu et al. 2024, arXiv:2402.09353; PEFT's
    use_dora). init: "default" starts a Kaiming-uniform and b at zero; "pissa", "olora" and "loftq" (for a
    quantised base) start from the base's weights and store the base without that part, and "qera" starts
    from the error of a calibrated base, see lora_start.py; with these four the exported adapter is
    for the unchanged base and has twice the rank. "eva" starts from the inputs of the layers on the run's
    rows and gives modules other ranks with the same sum, see eva.py. eva_rho: the largest rank of a
    module, as a multiple of its rank; in training each module has the memory of that rank, and the exported
    adapter the chosen ranks. eva_tokens: how many tokens of the run's first batches "eva" reads.
    """

    rank: PositiveInt = 16
    alpha: float = 32.0
    dropout: Annotated[float, BELOW_ONE] = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    rslora: bool = False
    rank_pattern: tuple[tuple[str, PositiveInt], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[int, ...] = ()
    token_head: bool = True
    dora: bool = False
    init: AdapterInit = "default"
    eva_rho: Annotated[float, between(1, 1000)] = 2.0
    eva_tokens: PositiveInt = 16384

    def __post_init__(self):
        check_bounds(self, "adapter")
        if self.init != EVA and (self.eva_rho, self.eva_tokens) != (Adapter.eva_rho, Adapter.eva_tokens):
            raise ValueError(
                f"adapter.eva_rho={self.eva_rho:g} and adapter.eva_tokens={self.eva_tokens} need "
                f"adapter.init=eva, got adapter.init={self.init}; leave them out"
            )
        if not self.token_head and not self.trainable_token_indices:
            raise ValueError("adapter.token_head=false needs adapter.trainable_token_indices; leave it out")
        if self.changes_base and (self.dora or self.replaces_weights):
            raise ValueError(
                f"adapter.init={self.init} changes the base; it needs adapter.dora=false, and no "
                "modules_to_save, bias or trainable_token_indices"
            )
        if not 0.0 < abs(self.alpha) < 3.4e38 or not abs(self.scale) > 1e-37:  # of float32
            raise ValueError(f"adapter.alpha must be finite and other than 0 in float32, got {self.alpha}")
        layers = self.layers_to_transform or ()
        if len(set(layers)) < len(layers):
            raise ValueError(
                f"adapter.layers_to_transform={','.join(map(str, layers))} has a layer twice; list each once"
            )
        for pattern, alpha in self.alpha_pattern:
            if not 0.0 < abs(alpha) < 3.4e38:
                raise ValueError(
                    f"adapter.alpha_pattern: the alpha of {pattern!r} must be finite and not 0, got {alpha}"
                )

    @property
    def changes_base(self) -> bool:
        """Whether `init` changes the base at step 0; PiSSA moves a part of its weights into the adapter."""
        return self.init in RESIDUAL_INITS

    @property
    def exported(self) -> "Adapter":
        """The settings of the adapter that a run exports, which is always for the unchanged base. If `init`
        changes the base, the exported adapter contains that change too and therefore has twice the rank.
        """
        return self.doubled if self.changes_base else self

    @property
    def doubled(self) -> "Adapter":
        """The settings of an adapter whose pairs have twice the rank and the same scales."""
        times = 2**0.5 if self.rslora else 2
        ranks = tuple((pattern, 2 * rank) for pattern, rank in self.rank_pattern)
        alphas = tuple((pattern, times * alpha) for pattern, alpha in self.alpha_pattern)
        wider = replace(self, rank=2 * self.rank, rank_pattern=ranks, init="default")
        return replace(wider, alpha=times * self.alpha, alpha_pattern=alphas)

    @property
    def scale(self) -> float:
        """The factor by which x a b is multiplied in modules with the default rank and alpha."""
        return self.scale_of(self.rank, self.alpha)

    @property
    def replaces_weights(self) -> bool:
        """Whether the adapter trains parameters of the base in full (modules, biases or rows of tokens)."""
        saved = set(self.modules_to_save) - set(SCORE_MODULES)
        return bool(saved or self.trainable_token_indices or self.bias != "none")

    @property
    def highest_rank(self) -> int:
        """The largest rank of any module."""
        return max([self.rank, *(rank for _, rank in self.rank_pattern)])

    def scale_of(self, rank: int, alpha: float) -> float:
        """Return the factor by which x a b is multiplied in a module with this rank and alpha."""
        return alpha / (rank**0.5 if self.rslora else rank)


@struct
class Adapted:
    """A base weight with its adapter, for nn.matmul.linear. `weight` is None for a tied head.

    All leaves have the base's lead axes L, which scan and vmap slice. If `over` is (ADAPTERS,), the leaves of
    the adapter have one more axis behind L, over K adapters.
    """

    weight: Any
    a: Any  # [*L, I, R], or a ParamSpec
    b: Any  # [*L, R, O]
    scale: Any  # [*L]
    dropout: float = static(default=0.0)
    magnitude: Any = None  # [*L, O] with DoRA
    gain: Any = None  # [*L, O], in place of a magnitude: constant factors of the outputs, for inference
    rows: Any = None  # [*L, B]: the adapter of each row of the input; all other leaves are over K adapters
    over: tuple[str, ...] = static(default=())


@struct
class Several:
    """Parameters of K adapters that go through a model together: each leaf has an axis over adapters."""

    params: Any


def target_paths(specs: Specs, targets: str | tuple[str, ...]) -> list[str]:
    """Return the paths of the base kernels that `targets` (see Adapter) selects.

    Raises ValueError for a target that selects nothing; the error lists similar names.
    """
    kernels = {p: axes for p, s in spec_paths(specs).items() if (axes := kernel(s))}
    blocks = [p for p, axes in kernels.items() if "layers" in axes.lead]
    heads = ["embed", "head"]  # also for a tied head, which has no leaf of its own in the base
    if targets == "all-linear":
        return [p for p in blocks if not kernels[p].is_router]
    if not targets:
        raise ValueError(
            "adapter.targets names no layer; use all-linear, or some of "
            + ", ".join(p.rsplit("/", 1)[-1] for p in [*blocks, *heads])
        )
    if isinstance(targets, str) and is_name(targets) and "." not in targets:
        targets = (targets,)
    if isinstance(targets, str):
        pattern = tree.regex(targets, "adapter.targets")
        selected = [p for p in [*blocks, *heads] if pattern.fullmatch(p)]
        if not selected:
            raise ValueError(
                f"adapter.targets={targets!r} matches no kernel; the paths are "
                f"{', '.join([*blocks, *heads])}; or list names of modules, such as "
                f"{','.join(p.rpartition('/')[2] for p in blocks[:2])}"
            )
        return selected
    ends = {path: path.rpartition("/")[2] for path in [*blocks, *heads]}
    end_by_name = {end: end for end in ends.values()}
    end_by_name |= {f"{end}_proj": end for end in ends.values()}
    end_by_name |= {"lm_head": "head", "embed_tokens": "embed"}
    for name in targets:
        if name not in end_by_name:
            _refuse_part(name, end_by_name.keys())
            near = ", ".join(tree.nearest(name, list(end_by_name)))
            raise ValueError(f"adapter.targets: {name!r} is not a linear layer; near: {near}")
    chosen = {end_by_name[name] for name in targets}
    return [path for path, end in ends.items() if end in chosen]


def _refuse_part(name: str, known: AbstractSet[str]) -> None:
    """Raise ValueError if a target such as "q" is a part of a fused layer of the model ("qkv"), or if it is
    the name of a fused layer and the model has the parts as separate layers. known: the model's names.
    """
    kernel_name = name.removesuffix("_proj")
    for fused, parts in FUSED_PARTS.items():
        if kernel_name in parts and fused in known:
            raise ValueError(
                f"adapter.targets: {name!r} is a part of the layer {fused!r} ({fused}_proj) of this model, "
                f"which has one adapter; use {fused!r}"
            )
        if kernel_name == fused and known & set(parts):
            raise ValueError(
                f"adapter.targets: {name!r} is {len(parts)} layers in this model; use {', '.join(parts)}"
            )


def pair_axes(base: ParamSpec) -> dict[str, tuple[str, ...]]:
    """Return the logical axes of a, b, scale, magnitude and gain for a kernel with the spec `base`."""
    *lead, ins, outs = base.axes
    of_outputs = dict.fromkeys(("magnitude", "gain"), (*lead, outs))
    return {"a": (*lead, ins, "rank"), "b": (*lead, "rank", outs), "scale": (*lead,), **of_outputs}


def is_pair(node: Any) -> bool:
    """Return whether a node of an adapter's tree is the pair (a, b and scale) of a kernel."""
    return isinstance(node, dict) and {"a", "b", "scale"} <= node.keys()


def attach(
    base: Any, adapter: Any, dropout: float = 0.0, token_ids: tuple[int, ...] = (), rows: Any = None
) -> Any:
    """Return the base's tree with an Adapted in place of each adapted kernel, and with the parameters that
    the adapter trains in full; nothing is copied or computed.

    adapter: a tree, None, or Several. token_ids: the tokens whose rows the adapter trains. rows [B]: row i of
    the activations uses adapter rows[i] of a Several.

    >>> base = {"q": jnp.zeros((8, 6)), "norm": jnp.ones(8)}
    >>> pair = {"a": jnp.ones((8, 2)), "b": jnp.ones((2, 6)), "scale": jnp.asarray(0.5)}
    >>> attached = attach(base, {"q": pair})
    >>> type(attached["q"]).__name__, attached["norm"] is base["norm"]
    ('Adapted', True)
    >>> merge_leaf(base["q"], pair, jnp.float32)[0].tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    over = (ADAPTERS,) if isinstance(adapter, Several) else ()

    def walk(name: str, base: Any, node: Any) -> Any:
        if is_pair(node):
            pair = node["a"], node["b"], node["scale"]
            of_rows = None if rows is None else jnp.broadcast_to(rows, (*node["scale"].shape[:-1], len(rows)))
            return Adapted(base, *pair, dropout, node.get("magnitude"), node.get("gain"), of_rows, over)
        if is_replacement(node):
            if "rows" in node:
                return TokenRows(base, node["rows"], token_ids)
            return Replaced(node["weight"], base) if name == "embed" else node["weight"]
        if not node:
            return base
        return {**base, **{inner: walk(inner, base.get(inner), node[inner]) for inner in node}}

    return walk("", base, adapter.params if isinstance(adapter, Several) else adapter)


def join_adapters(adapter: Any, other: Any) -> Any:
    """Return one adapter with the effect of two: their pairs are concatenated, so that ranks add up.

    adapter: may be None, may replace parameters (which are kept), and may have DoRA's magnitudes; they then
    rescale the sum of the weight and both pairs. other: has pairs only.
    """
    if not adapter:
        return other
    if not other or is_replacement(adapter):
        return adapter
    if is_pair(adapter):
        factor = (other["scale"] / adapter["scale"])[..., None, None]
        a = jnp.concatenate([adapter["a"], other["a"]], -1)
        return {**adapter, "a": a, "b": jnp.concatenate([adapter["b"], factor * other["b"]], -2)}
    return {**other, **{name: join_adapters(node, other.get(name)) for name, node in adapter.items()}}


def pairs_by_path(adapter: Params | None) -> dict[str, dict[str, Any]]:
    """Return the nodes of an adapter by path: {"a", "b", "scale", ...} for a pair, {"weight"} or {"rows"} for
    a replaced parameter; {} if adapter is None.
    """
    pairs: dict[str, dict[str, Any]] = {}
    for path, leaf in tree.paths(adapter or {}).items():
        above, _, name = path.rpartition("/")
        pairs.setdefault(above, {})[name] = leaf
    return pairs


def padded_pair(pair: dict[str, Any], rank: int) -> dict[str, Any]:
    """Pad a pair, of NumPy or jax arrays, to this rank by zero columns of `a` and zero rows of `b`."""
    xp: Any = np if isinstance(pair["a"], np.ndarray) else jnp
    *lead, _, size = pair["a"].shape
    same, more = [(0, 0)] * len(lead), (0, rank - size)
    a, b = xp.pad(pair["a"], [*same, (0, 0), more]), xp.pad(pair["b"], [*same, more, (0, 0)])
    return {**pair, "a": a, "b": b}


def map_kernels(
    fn: Callable[[jax.Array, dict[str, Any]], jax.Array], base: Params, pairs: dict[str, dict[str, Any]]
) -> dict[str, jax.Array]:
    """Apply `fn(weight, pair)` to every adapted kernel, one layer of a stack at a time; return the stacked
    results by path. pairs: by path. Quantised weights are dequantised first.
    """
    weights = tree.paths(base, is_qtensor)

    def call(path: str, weight: Any, pair: dict[str, Any]) -> jax.Array:
        plain = dequantize(weight) if is_qtensor(weight) else weight
        return fn(plain if path in weights else plain.T, pair)  # a tied head is the table transposed

    return {
        path: map_stack(partial(call, path), pair["scale"].shape, weights.get(path, base.get("embed")), pair)
        for path, pair in pairs.items()
    }


def stack_adapters(adapters: Sequence[Any]) -> Any:
    """Stack adapters of the same kernels: leaves [K, ...]; smaller ranks are padded with zeros."""

    def stack(*leaves: jax.Array) -> jax.Array:
        shape = [max(sizes) for sizes in zip(*(x.shape for x in leaves), strict=True)]
        widths = [[(0, n - m) for m, n in zip(x.shape, shape, strict=True)] for x in leaves]
        return jnp.stack([jnp.pad(x, width) if width else x for x, width in zip(leaves, widths, strict=True)])

    return jax.tree.map(stack, *adapters)


def several(stacks: dict[str, Any]) -> dict[str, Several]:
    """Convert stacks [K, ...] of adapters or heads, by name, to the form that one forward pass over all K
    takes: the axis over adapters moves behind the lead axes.
    """
    moved = tree.map_with_path(lambda path, x: jnp.moveaxis(x, 0, adapters_axis(path)), stacks)
    return {name: Several(x) for name, x in moved.items()}


def adapters_axis(path: str) -> int:
    """Return the index (negative) of the axis over several adapters in a leaf; it follows the lead axes."""
    return -1 - OWN_AXES[path.rpartition("/")[2]]


def adapter_of_stack(stack: Any, number: int, like: Any) -> Any:
    """Return adapter `number` of a stack [K, ...], truncated to the shapes (and so to the rank) of `like`."""
    return jax.tree.map(lambda x, y: x[(number, *(slice(n) for n in y.shape))], stack, like)


def merge_leaf(weight: Any, pair: dict[str, Any], dtype: DTypeLike) -> jax.Array:
    """Return `w + scale a b` of one kernel or a stack, computed in float32 or wider and cast to `dtype`. With
    DoRA the norm of each output is set to its magnitude.
    """
    wide = np.promote_types(dtype, np.float32)
    w = (dequantize(weight) if isinstance(weight, QTensor) else jnp.asarray(weight)).astype(wide)
    a, b, scale = (jnp.asarray(pair[name], wide) for name in ("a", "b", "scale"))
    low = jnp.einsum("...ir,...ro->...io", a * scale[..., None, None], b, precision=jax.lax.Precision.HIGHEST)
    merged = w + low
    return (rescaled(merged, pair["magnitude"]) if "magnitude" in pair else merged).astype(dtype)


# DoRA (Liu et al. 2024, arXiv:2402.09353): a learned norm for each output of an adapted weight, `W' = m (W +
# s A B) / ||W + s A B||`. As in PEFT (use_dora), the norm is a constant for gradients (section 4.3 of the
# paper). It is computed from `||W||^2 + 2 s <W, A B> + s^2 ||A B||^2`, so that no sum `W + s A B` is stored.
# The leaf `magnitude` [L, O] is m. 0 marks an output without magnitude, whose factor is 1: in layers that an
# adapter's file leaves out, and where all weights of the output are 0.


def output_norms(
    w: Float[Array, "I O"], a: Float[Array, "*K I R"], b: Float[Array, "*K R O"], scale: Float[Array, "*K"]
) -> Float[Array, "*K O"]:
    """Return the norm of each output's weights, a column of `w + scale a b`, in float32 or wider."""
    wide, highest = np.promote_types(w.dtype, np.float32), jax.lax.Precision.HIGHEST
    a, low = a.astype(wide), b.astype(wide) * scale.astype(wide)[..., None, None]
    squares = jnp.sum(jnp.square(w.astype(wide)), 0)
    cross = jnp.einsum("...ir,io->...ro", a.astype(w.dtype), w, preferred_element_type=wide)
    gram = jnp.einsum("...ir,...is->...rs", a, a, precision=highest)
    squares_low = jnp.sum(low * (jnp.einsum("...rs,...so->...ro", gram, low, precision=highest)), -2)
    total = 2 * jnp.sum(low * cross, -2) + squares_low
    return jnp.sqrt(jnp.maximum(squares.reshape((1,) * (total.ndim - 1) + squares.shape) + total, 0))


def gains(magnitude: Float[Array, "*K O"], norms: Float[Array, "*K O"]) -> Float[Array, "*K O"]:
    """Return DoRA's factor of each output, `magnitude / norms`, norms without gradient; 1 for magnitude 0."""
    none = magnitude == 0
    norms = jnp.where(none, jnp.ones((), norms.dtype), jax.lax.stop_gradient(norms))
    return jnp.where(none, jnp.ones((), norms.dtype), magnitude.astype(norms.dtype) / norms)


def output_factors(
    magnitude: Float[Array, "*K O"], w: Float[Array, "I O"], a: Array, b: Array, scale: Array
) -> Float[Array, "*K O"]:
    """Return DoRA's factor of each output of w with the pair a, b; only magnitude gets a gradient."""
    return gains(magnitude, output_norms(*jax.lax.stop_gradient((w, a, b)), scale))


def scale_outputs(y: Float[Array, "*N O"], gain: Float[Array, "*K O"]) -> Float[Array, "*N O"]:
    """Return `y * gain` in the dtype of y. With a gain [K, O], the rows of y are K groups of equal size."""
    *lead, outs = gain.shape
    groups = y if not lead else y.reshape(*lead, y.shape[0] // lead[0], *y.shape[1:])
    gain = gain.reshape(*lead, *(1,) * (groups.ndim - gain.ndim), outs)
    return (groups.astype(gain.dtype) * gain).astype(y.dtype).reshape(y.shape)


def rescaled(weight: Float[Array, "*L I O"], magnitude: Float[Array, "*L O"]) -> Float[Array, "*L I O"]:
    """Return the weight with the norm of each output set to its magnitude, unless the magnitude is 0."""
    norms = jnp.sqrt(jnp.sum(jnp.square(weight), -2))
    return weight * gains(magnitude.astype(weight.dtype), norms)[..., None, :]
