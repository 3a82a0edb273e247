"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): a separate tree that is attached to the base at trace
time.

An adapter has the base's paths; each adapted kernel [L, I, O] has `a` [L, I, R], `b` [L, R, O] and the frozen
`scale` [L] = alpha / rank. Without attaching it, the model is the base model bit for bit.

Where layers have different ranks, R is the largest: the further columns of `a` and rows of `b` are zero. Both
of their gradients are then zero, so that they stay zero in training; they are not exported.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxft import tree
from jaxft.nn.lora_patterns import TensorNames, is_listed, module_names, values_by_pattern
from jaxft.nn.param import Init, ParamSpec, Specs, full, kaiming_uniform, spec_paths
from jaxft.nn.quant import QTensor, dequantize
from jaxft.tree import Params, static, struct

# Layers that compute several projections by one matrix, and the layers that other models have in their place.
FUSED_PARTS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


@dataclass(frozen=True)
class Adapter:
    """LoRA settings, named as in PEFT.

    targets: "all-linear" (every linear layer of the blocks), a tuple of module names ("q", "v", "gate",
    "head", or Hugging Face's "q_proj"; "qkv" and "gate_up" in models with fused layers), or a regular
    expression over whole parameter paths. rslora scales by alpha / sqrt(rank).

    rank_pattern, alpha_pattern: (pattern, value) pairs for modules with another rank or alpha; the first
    pattern counts that matches a module's name or the end of it. exclude_modules: ends of module names, or
    one regular expression over whole names, that get no adapter. layers_to_transform: numbers of the layers
    that get one, None for all. Names are Hugging Face's or those of paths, see nn/lora_patterns.py.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    rslora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"adapter.rank must be at least 1, got {self.rank}")
        if not 0.0 < abs(self.alpha) < 3.4e38 or not abs(self.scale) > 1e-37:  # of float32
            raise ValueError(f"adapter.alpha must be a finite number other than 0, got {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"adapter.dropout must be in [0, 1), got {self.dropout}")
        for pattern, rank in self.rank_pattern:
            if rank < 1:
                raise ValueError(
                    f"adapter.rank_pattern: the rank of {pattern!r} must be at least 1, got {rank}"
                )
        for pattern, alpha in self.alpha_pattern:
            if not 0.0 < abs(alpha) < 3.4e38:
                raise ValueError(f"adapter.alpha_pattern: {pattern!r} must be finite and not 0, got {alpha}")

    @property
    def scale(self) -> float:
        """The factor of (x a) b, of modules with the default rank and alpha."""
        return self.scale_of(self.rank, self.alpha)

    @property
    def highest_rank(self) -> int:
        """The largest rank of any module."""
        return max([self.rank, *(rank for _, rank in self.rank_pattern)])

    def scale_of(self, rank: int, alpha: float) -> float:
        """The factor of (x a) b of a module with this rank and alpha."""
        return alpha / (rank**0.5 if self.rslora else rank)


class PairRanks(NamedTuple):
    """Rank and alpha of the pair in each layer of a kernel, both 0 for no pair; one of each for a kernel
    without layers.
    """

    ranks: tuple[int, ...]
    alphas: tuple[float, ...]


@struct
class Adapted:
    """A base weight with its adapter, for nn.matmul.linear. `weight` is None for a tied head."""

    weight: Any
    a: Any  # [L, I, R], or a ParamSpec
    b: Any  # [L, R, O]
    scale: Any  # [L]
    dropout: float = static(default=0.0)


def target_paths(specs: Specs, targets: str | tuple[str, ...]) -> list[str]:
    """Return the paths of the base kernels that `targets` selects.

    Raises ValueError, with near misses, for a target that selects nothing.
    """
    kernels = {p: s for p, s in spec_paths(specs).items() if len(s.axes) - ("layers" in s.axes) == 2}
    blocks = [p for p, s in kernels.items() if "layers" in s.axes]
    heads = ["head"]  # also for a tied head, which has no leaf of its own in the base
    if targets == "all-linear":
        return blocks
    if not targets:
        raise ValueError(
            "adapter.targets names no layer; use all-linear, or some of "
            + ", ".join(p.rsplit("/", 1)[-1] for p in [*blocks, *heads])
        )
    if isinstance(targets, str):
        pattern = tree.regex(targets, "adapter.targets")
        selected = [p for p in [*blocks, *heads] if pattern.fullmatch(p)]
        if not selected:
            raise ValueError(
                f"adapter.targets={targets!r} matches no kernel; the paths are {', '.join([*blocks, *heads])}"
            )
        return selected
    path_by_name = {p.rsplit("/", 1)[-1]: p for p in [*blocks, *heads]}
    path_by_name |= {f"{name}_proj": p for name, p in path_by_name.items()} | {"lm_head": "head"}
    for name in targets:
        if name not in path_by_name:
            _refuse_part(name, path_by_name.keys())
            near = ", ".join(tree.nearest(name, list(path_by_name)))
            raise ValueError(f"adapter.targets: {name!r} is not a linear layer; near: {near}")
    return [p for p in [*blocks, *heads] if p in {path_by_name[name] for name in targets}]


def _refuse_part(name: str, known: AbstractSet[str]) -> None:
    """Raise ValueError for a part of a fused layer of the model, or a fused layer that it has in parts."""
    asked = name.removesuffix("_proj")
    for fused, parts in FUSED_PARTS.items():
        if asked in parts and fused in known:
            raise ValueError(
                f"adapter.targets: {name!r} is a part of the layer {fused!r} ({fused}_proj) of this model, "
                f"which has one adapter; use {fused!r}"
            )
        if asked == fused and known & set(parts):
            raise ValueError(
                f"adapter.targets: {name!r} is {len(parts)} layers in this model; use {', '.join(parts)}"
            )


def pair_layouts(specs: Specs, settings: Adapter, names: TensorNames) -> dict[str, PairRanks]:
    """Return the rank and alpha of each adapted kernel's layers by path.

    names: the model's weight_names. Raises ValueError for patterns, exclusions and layers that select
    nothing, or everything.
    """
    base = spec_paths(specs)
    modules = [
        (path, layer, name)
        for path in target_paths(specs, settings.targets)
        for layer, name in enumerate(module_names(path, _layer_count(base, path), names))
    ]
    selected = [
        (path, layer, name) for path, layer, name in modules if _is_selected(settings, base, path, layer)
    ]
    excluded = [m for m in selected if is_listed(settings.exclude_modules, m[2], "adapter.exclude_modules")]
    if settings.exclude_modules and not excluded:
        near = ", ".join(dict.fromkeys(name[0].rpartition(".")[2] for _, _, name in selected))
        raise ValueError(
            f"adapter.exclude_modules={settings.exclude_modules!r} matches none of the adapted modules "
            f"({near}); a list of one name ends with a comma"
        )
    if len(excluded) == len(selected):
        raise ValueError(
            f"adapter.exclude_modules={settings.exclude_modules!r} excludes every module that "
            "adapter.targets selects; correct one of them"
        )
    kept = [m for m in selected if m not in excluded]
    all_names = [name for _, _, name in kept]
    ranks = values_by_pattern(settings.rank_pattern, all_names, "adapter.rank_pattern")
    alphas = values_by_pattern(settings.alpha_pattern, all_names, "adapter.alpha_pattern")
    pairs = {
        (path, layer): (
            int(settings.rank if rank is None else rank),
            settings.alpha if alpha is None else alpha,
        )
        for (path, layer, _), rank, alpha in zip(kept, ranks, alphas, strict=True)
    }
    layouts = {}
    for path in dict.fromkeys(path for path, _, _ in kept):
        count = _layer_count(base, path) or 1
        found = [pairs.get((path, layer), (0, 0.0)) for layer in range(count)]
        layouts[path] = PairRanks(tuple(rank for rank, _ in found), tuple(alpha for _, alpha in found))
    return layouts


def _layer_count(base: dict[str, ParamSpec], path: str) -> int | None:
    """The size of a kernel's layers axis, None if it has none."""
    spec = base.get(path)
    return spec.shape[0] if spec is not None and spec.axes[0] == "layers" else None


def _is_selected(settings: Adapter, base: dict[str, ParamSpec], path: str, layer: int) -> bool:
    """Whether layers_to_transform includes a layer of a kernel. Raises ValueError for numbers of no layer."""
    numbers, count = settings.layers_to_transform, _layer_count(base, path)
    if numbers is None or count is None:
        return True
    if not numbers or not all(0 <= number < count for number in numbers):
        raise ValueError(
            f"adapter.layers_to_transform={','.join(map(str, numbers))}: the layers are 0 to {count - 1}; "
            "name some of them, or none for all"
        )
    return layer in numbers


def same_pairs(specs: Specs, one: Adapter, other: Adapter, names: TensorNames) -> bool:
    """Whether two settings declare the same pairs on a base, however they name their targets; dropout may
    differ.
    """
    layouts = [pair_layouts(specs, settings, names) for settings in (one, other)]
    return layouts[0] == layouts[1] and one.rslora == other.rslora


def adapter_specs(specs: Specs, settings: Adapter, names: TensorNames | None = None) -> dict[str, Any]:
    """Declare the adapter of a base. As in PEFT, a starts Kaiming-uniform and b zero.

    names: the model's weight_names; without them patterns match names of paths only.
    """
    base = spec_paths(specs)
    out: dict[str, Any] = {}
    for path, layout in pair_layouts(specs, settings, names or {}).items():
        if path == "head" and settings.dropout:
            raise ValueError(
                f"adapter.dropout={settings.dropout} has no effect on an adapter of the head; set it to 0"
            )
        if path in base:
            spec = base[path]
        else:  # a tied head is the table [V, D] transposed
            (vocab, width), axes = base["embed"].shape, base["embed"].axes
            spec = ParamSpec((width, vocab), (axes[1], axes[0]), base["embed"].init)
        node = out
        for part in path.split("/"):
            node = node.setdefault(part, {})
        node.update(_pair_specs(spec, layout, settings))
    return out


def _pair_specs(spec: ParamSpec, layout: PairRanks, settings: Adapter) -> dict[str, ParamSpec]:
    """Declare a, b and scale of one kernel."""
    *lead, size_in, size_out = spec.shape
    *lead_axes, axis_in, axis_out = spec.axes
    rank, ranks = max(layout.ranks), layout.ranks
    scales = [settings.scale_of(r or settings.rank, alpha) for r, alpha in zip(*layout, strict=True)]
    start = kaiming_uniform(size_in)
    if min(ranks) < rank:
        start = _zero_beyond(start, ranks)
    return {
        "a": ParamSpec((*lead, size_in, rank), (*lead_axes, axis_in, "rank"), start, spec.heads),
        "b": ParamSpec((*lead, rank, size_out), (*lead_axes, "rank", axis_out), full(0.0), spec.heads),
        "scale": ParamSpec(tuple(lead), tuple(lead_axes), _constant(scales)),
    }


def _zero_beyond(start: Init, ranks: Sequence[int]) -> Init:
    """Return an initialiser of [L, I, R] whose columns beyond the rank of each layer are zero."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        used = jnp.arange(shape[-1])[None, :] < jnp.asarray(ranks)[:, None]
        return jnp.where(used[:, None, :], start(key, shape, dtype), jnp.zeros((), dtype))

    return init


def _constant(values: Sequence[float]) -> Init:
    """Return an initialiser that sets each element of a vector, or a scalar, to its value."""
    return lambda key, shape, dtype: jnp.asarray(values, dtype).reshape(shape)


def _is_pair(node: Any) -> bool:
    return isinstance(node, dict) and {"a", "b", "scale"} <= node.keys()


def attach(base: Any, adapter: Any, dropout: float = 0.0) -> Any:
    """Return the base tree with each adapted leaf as an Adapted node; nothing is copied or computed."""
    if _is_pair(adapter):
        return Adapted(base, adapter["a"], adapter["b"], adapter["scale"], dropout)
    if not adapter:
        return base
    return {**base, **{name: attach(base.get(name), node, dropout) for name, node in adapter.items()}}


def pairs_by_path(adapter: Params | None) -> dict[str, dict[str, Any]]:
    """Return {"a", "b", "scale"} of each adapted weight by its path; {} for None."""
    pairs: dict[str, dict[str, Any]] = {}
    for path, leaf in tree.paths(adapter or {}).items():
        above, _, name = path.rpartition("/")
        pairs.setdefault(above, {})[name] = leaf
    return pairs


def stack_adapters(adapters: Sequence[Any]) -> Any:
    """Stack adapters of the same kernels into one tree, each leaf [K, ...]; smaller ranks are padded with
    zeros.

    `jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), stack_adapters(...))` is a tree for the scan over layers.
    """

    def stack(*leaves: jax.Array) -> jax.Array:
        shape = [max(sizes) for sizes in zip(*(x.shape for x in leaves), strict=True)]
        return jnp.stack(
            [jnp.pad(x, [(0, n - m) for m, n in zip(x.shape, shape, strict=True)]) for x in leaves]
        )

    return jax.tree.map(stack, *adapters)


def adapter_of_stack(stack: Any, number: int, like: Any) -> Any:
    """Return adapter `number` of a stack, truncated to the rank of `like`."""
    return jax.tree.map(lambda x, one: x[(number, *(slice(n) for n in one.shape))], stack, like)


def merge_leaf(weight: Any, pair: dict[str, Any], dtype: DTypeLike) -> jax.Array:
    """Return `w + scale a b`, computed in float32 or wider, in `dtype`, of one kernel or a stack."""
    wide = np.promote_types(dtype, np.float32)
    w = (dequantize(weight) if isinstance(weight, QTensor) else jnp.asarray(weight)).astype(wide)
    a, b, scale = (jnp.asarray(pair[name], wide) for name in ("a", "b", "scale"))
    low = jnp.einsum("...ir,...ro->...io", a * scale[..., None, None], b, precision=jax.lax.Precision.HIGHEST)
    return (w + low).astype(dtype)


def merge(base: Any, adapter: Any, dtype: DTypeLike) -> Any:
    """Return the base tree with the adapter merged into its kernels; an adapted tied head becomes a leaf
    "head".
    """

    def fold(node: Any, pair: Any, path: str) -> Any:
        if _is_pair(pair):
            if node is None:  # the tied head
                table = base["embed"]
                table = dequantize(table) if isinstance(table, QTensor) else table
                node = jnp.asarray(table).T
            return merge_leaf(node, pair, dtype)
        if not pair:
            return node
        return {**node, **{name: fold(node.get(name), p, f"{path}/{name}") for name, p in pair.items()}}

    return fold(base, adapter, "")
