"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): a tree of their own beside the base, attached at trace time.

An adapter mirrors the base's paths; each adapted kernel [L, I, O] has `a` [L, I, R], `b` [L, R, O] and the frozen
`scale` [L] = alpha / rank. Not attaching it gives the base model back, bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxft import tree
from jaxft.nn.param import ParamSpec, full, kaiming_uniform, spec_paths
from jaxft.nn.quant import QTensor, dequantize
from jaxft.tree import static, struct


@dataclass(frozen=True)
class Adapter:
    """LoRA settings, PEFT's names.

    targets: "all-linear" (every linear layer of the blocks), a tuple of module names ("q", "v", "gate", "head", or Hugging
    Face's "q_proj"), or a regular expression over whole parameter paths. rslora scales by alpha / sqrt(rank).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    rslora: bool = False

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"adapter.rank is at least 1, found {self.rank}")
        if not 0.0 < abs(self.alpha) < float("inf"):
            raise ValueError(f"adapter.alpha is a number other than 0, found {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"adapter.dropout is in [0, 1), found {self.dropout}")

    @property
    def scale(self) -> float:
        """What multiplies (x a) b."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@struct
class Adapted:
    """A base weight with its adapter, as `nn.linear` takes it. `weight` is None for a tied head."""

    weight: Any
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    dropout: float = static(default=0.0)


def target_paths(specs: Any, targets: str | tuple[str, ...]) -> list[str]:
    """Paths of the base kernels that `targets` selects. Raises ValueError, with near misses, if one selects nothing."""
    kernels = {p: s for p, s in spec_paths(specs).items() if len(s.axes) - ("layers" in s.axes) == 2}
    blocks = [p for p, s in kernels.items() if "layers" in s.axes]
    heads = ["head"]  # also where it is tied and the base has no leaf of that name
    if targets == "all-linear":
        return blocks
    if not targets:
        raise ValueError(
            "adapter.targets names no layer; use all-linear or some of q, k, v, o, gate, up, down, head"
        )
    if isinstance(targets, str):
        wanted = tree.regex(targets, "adapter.targets")
        found = [p for p in [*blocks, *heads] if wanted.fullmatch(p)]
        if not found:
            raise ValueError(
                f"adapter.targets={targets!r} matches no kernel; the paths are {', '.join([*blocks, *heads])}"
            )
        return found
    known = {p.rsplit("/", 1)[-1]: p for p in [*blocks, *heads]}
    known |= {f"{name}_proj": p for name, p in known.items()} | {"lm_head": "head"}
    for name in targets:
        if name not in known:
            raise ValueError(
                f"adapter.targets: {name!r} is no linear layer; near: {', '.join(tree.nearest(name, list(known)))}"
            )
    return [p for p in [*blocks, *heads] if p in {known[name] for name in targets}]


def adapter_specs(specs: Any, settings: Adapter) -> dict[str, Any]:
    """The adapter's ParamSpec tree for a base's specs. PEFT's start: a Kaiming uniform, b zero."""
    base = spec_paths(specs)
    out: dict[str, Any] = {}
    for path in target_paths(specs, settings.targets):
        if path == "head" and settings.dropout:
            raise ValueError(
                f"adapter.dropout={settings.dropout} doesn't reach an adapter on the head; set it to 0"
            )
        if path in base:
            spec = base[path]
        else:  # a tied head: [V, D] read the other way round
            (vocab, width), axes = base["embed"].shape, base["embed"].axes
            spec = ParamSpec((width, vocab), (axes[1], axes[0]), base["embed"].init)
        *lead, size_in, size_out = spec.shape
        *lead_axes, axis_in, axis_out = spec.axes
        node = out
        for part in path.split("/"):
            node = node.setdefault(part, {})
        start = kaiming_uniform(size_in)
        node["a"] = ParamSpec(
            (*lead, size_in, settings.rank), (*lead_axes, axis_in, "rank"), start, spec.heads
        )
        node["b"] = ParamSpec(
            (*lead, settings.rank, size_out), (*lead_axes, "rank", axis_out), full(0.0), spec.heads
        )
        node["scale"] = ParamSpec(tuple(lead), tuple(lead_axes), full(settings.scale))
    return out


def _is_pair(node: Any) -> bool:
    return isinstance(node, dict) and {"a", "b", "scale"} <= node.keys()


def attach(base: Any, adapter: Any, dropout: float = 0.0) -> Any:
    """The base tree with each adapted leaf as an Adapted node; leaves are shared, nothing is computed."""
    if _is_pair(adapter):
        return Adapted(base, adapter["a"], adapter["b"], adapter["scale"], dropout)
    if not adapter:
        return base
    return {**base, **{name: attach(base.get(name), node, dropout) for name, node in adapter.items()}}


def stack_adapters(adapters: Sequence[Any]) -> Any:
    """Adapters for the same kernels as one tree, each leaf [K, ...]. A smaller rank ends in zero pairs, which add nothing.

    `jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), stacked(...))` is a tree that nn.linear takes under the scan over layers.
    """

    def stack(*leaves):
        whole = [max(sizes) for sizes in zip(*(x.shape for x in leaves), strict=True)]
        return jnp.stack(
            [jnp.pad(x, [(0, n - m) for m, n in zip(x.shape, whole, strict=True)]) for x in leaves]
        )

    return jax.tree.map(stack, *adapters)


def adapter_of_stack(stack: Any, number: int, like: Any) -> Any:
    """Adapter `number` of a stack, of the rank that `like` has."""
    return jax.tree.map(lambda x, one: x[(number, *(slice(n) for n in one.shape))], stack, like)


def merge_leaf(weight: Any, pair: dict[str, Any], dtype: Any) -> jax.Array:
    """`w + scale a b` in float32 or wider, cast to `dtype`; takes one kernel or a stack of them."""
    wide = jnp.promote_types(dtype, jnp.float32)
    w = (dequantize(weight) if isinstance(weight, QTensor) else jnp.asarray(weight)).astype(wide)
    a, b, scale = (jnp.asarray(pair[name], wide) for name in ("a", "b", "scale"))
    low = jnp.einsum("...ir,...ro->...io", a * scale[..., None, None], b, precision=jax.lax.Precision.HIGHEST)
    return (w + low).astype(dtype)


def merge(base: Any, adapter: Any, dtype: Any) -> Any:
    """The base tree with the adapter folded in. A tied head that is adapted becomes a head of its own."""

    def fold(node, pair, path):
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
