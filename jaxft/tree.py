"""Names for pytrees, their paths, boolean masks over them, and the partition that masks make.

A path is the leaf's dict keys and field names joined by "/", e.g. `base/layers/attn/q`.
"""

import difflib
import re
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, dataclass_transform

import jax
from flax import struct as _flax_struct

T = TypeVar("T")

Params: TypeAlias = Any  # nested dicts of arrays and QTensors, None where a partition has no leaf
Grads: TypeAlias = Any  # the structure of the trainable Params
OptState: TypeAlias = Any  # an optimizer's state
Aux: TypeAlias = Any  # what an objective and a source keep in TrainState beside the parameters
Batch: TypeAlias = Any  # Tokens, Pairs, Rollout, or another struct of arrays with leading rows
Metrics: TypeAlias = dict[str, Any]  # name -> metrics.Sum, Max or Min in a program, float on the host


def static(**kwargs: Any) -> Any:
    """A struct field that is part of the tree's structure, not a leaf."""
    return _flax_struct.field(pytree_node=False, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def struct(cls: type[T]) -> type[T]:
    """A frozen dataclass that is a pytree: flax.struct's, in a form that type checkers see through."""
    return _flax_struct.dataclass(cls)


def path_of(keys: tuple) -> str:
    """The "/"-joined name of a jax key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)


def paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Every leaf under its path, in tree order."""
    return {path_of(k): leaf for k, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]}


def map_with_path(fn: Callable, tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """`fn(path, leaf, *rest_leaves)` over a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda k, *leaves: fn(path_of(k), *leaves), tree, *rest, is_leaf=is_leaf
    )


def nearest(name: str, known: list[str], count: int = 3) -> list[str]:
    """The known names most like `name`, for an error message."""
    return difflib.get_close_matches(name, known, n=count, cutoff=0.3) or known[:count]


def _prefixes(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def regex(pattern: str, name: str) -> re.Pattern[str]:
    """The compiled regular expression. Raises ValueError that names the setting where it is malformed."""
    try:
        return re.compile(pattern)
    except re.error as e:
        raise ValueError(f"{name}: {pattern!r} is no regular expression ({e})") from e


def mask_by_path(tree: Any, pattern: str) -> Any:
    """True where the regular expression matches the whole path of a leaf or of a node above it.

    Raises ValueError if nothing matches, with the nearest paths: a mask is never silently empty.
    """
    wanted = regex(pattern, "pattern")
    mask = map_with_path(lambda path, _: any(wanted.fullmatch(p) for p in _prefixes(path)), tree)
    if not any(jax.tree.leaves(mask)):
        known = list(paths(tree))
        near = ", ".join(nearest(pattern, known))
        raise ValueError(f"pattern {pattern!r} matches none of {len(known)} parameters; near: {near}")
    return mask


def partition(tree: Any, mask: Any) -> tuple[Any, Any]:
    """(leaves where mask is True, leaves where it is False); None stands for the leaves of the other side."""
    return (
        jax.tree.map(lambda m, x: x if m else None, mask, tree),
        jax.tree.map(lambda m, x: None if m else x, mask, tree),
    )


def combine(*trees: Any) -> Any:
    """Put partitions together: the first tree that has a leaf supplies it."""
    return jax.tree.map(
        lambda *leaves: next((x for x in leaves if x is not None), None), *trees, is_leaf=lambda x: x is None
    )
