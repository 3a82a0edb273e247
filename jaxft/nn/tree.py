"""Names for pytrees, their paths, boolean masks over them, and the partition that masks make.

A path is the leaf's dict keys and field names joined by "/", e.g. `base/layers/attn/q`.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar, dataclass_transform

import jax
import regex as regex_package
from flax import struct as _flax_struct
from flax import traverse_util

T = TypeVar("T")
MATCH_SECONDS = 2.0  # for a regular expression on one name

Params: TypeAlias = Any  # nested dicts of arrays and QTensors, None where a partition has no leaf
Grads: TypeAlias = Any  # the structure of the trainable Params
OptState: TypeAlias = Any  # an optimizer's state
Mask: TypeAlias = Any  # the structure of Params, with a bool at each leaf
Aux: TypeAlias = Any  # state of the objective and the source in TrainState
Batch: TypeAlias = Any  # Tokens, Pairs, Rollout, or another struct of arrays with leading rows
LayerOutputs: TypeAlias = dict[str, Any]  # name -> array [L, ...] of a model's layers; {} for dense models
Metrics: TypeAlias = dict[str, Any]  # name -> metrics.Sum, Max or Min in a program, float on the host


def static(**kwargs: Any) -> Any:
    """Declare a struct field that is part of the tree's structure, not a leaf."""
    return _flax_struct.field(pytree_node=False, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def struct(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass that is a pytree: flax.struct.dataclass, typed for type checkers."""
    return _flax_struct.dataclass(cls)


def path_of(keys: tuple) -> str:
    """Return the "/"-joined name of a jax key path."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Return every leaf by its path, in tree order."""
    return {path_of(k): leaf for k, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dicts from {path: leaf}: the inverse of `paths` for a tree of dicts.

    >>> nested({"q/a": 1, "q/b": 2})
    {'q': {'a': 1, 'b': 2}}
    """
    return traverse_util.unflatten_dict(leaves, sep="/")


def map_with_path(fn: Callable, tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Map `fn(path, leaf, *rest_leaves)` over a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda k, *leaves: fn(path_of(k), *leaves), tree, *rest, is_leaf=is_leaf
    )


def nearest(name: str, available: list[str], count: int = 3) -> list[str]:
    """Return up to `count` available names, the most similar to `name`; the first ones if none is similar."""
    return difflib.get_close_matches(name, available, n=count, cutoff=0.3) or available[:count]


@dataclasses.dataclass(frozen=True)
class BoundedPattern:
    """A regular expression from a setting or a file, whose matching time is limited.

    name: the setting's name, for error messages. dotall: a dot matches line ends too.
    """

    pattern: str
    name: str
    dotall: bool = False

    def fullmatch(self, text: str) -> bool:
        """Return whether the whole text matches. Raises ValueError if matching takes more than MATCH_SECONDS,
        which nested repetitions such as (a+)+ can cause.
        """
        try:
            flags = regex_package.DOTALL if self.dotall else 0
            return regex_package.fullmatch(self.pattern, text, flags, timeout=MATCH_SECONDS) is not None
        except TimeoutError as e:
            raise ValueError(
                f"{self.name}: the regular expression {self.pattern[:100]!r} takes more than "
                f"{MATCH_SECONDS} s on {text[:100]!r}; write it without nested repetitions"
            ) from e


def regex(pattern: str, name: str, dotall: bool = False) -> BoundedPattern:
    """Check a regular expression and return it as a BoundedPattern.

    name: the setting's name, for errors. Raises ValueError if the expression is malformed.
    """
    try:
        regex_package.compile(pattern)
    except (regex_package.error, OverflowError, RecursionError) as e:
        raise ValueError(
            f"{name}: {pattern[:100]!r} is not a valid regular expression ({e}); correct it"
        ) from e
    return BoundedPattern(pattern, name, dotall)


def mask_by_path(tree: Any, pattern: str, setting: str = "pattern") -> Mask:
    """Return a mask: True for each leaf whose path, or the path of a node above it, fully matches the regular
    expression.

    setting: the pattern's name in errors. Raises ValueError if nothing matches; the error lists the paths
    that are most similar to the pattern.

    >>> mask_by_path({"q": {"w": 0.0, "a": 1.0, "b": 2.0}}, ".*/[ab]")
    {'q': {'a': True, 'b': True, 'w': False}}
    """
    compiled = regex(pattern, setting)

    def matches(path: str, _: Any) -> bool:
        parts = path.split("/")
        return any(compiled.fullmatch("/".join(parts[: i + 1])) for i in range(len(parts)))

    mask = map_with_path(matches, tree)
    if not any(jax.tree.leaves(mask)):
        available = list(paths(tree))
        near = ", ".join(nearest(pattern, available))
        raise ValueError(f"{setting}: {pattern!r} matches none of {len(available)} parameters; near: {near}")
    return mask


def partition(tree: Any, mask: Mask) -> tuple[Any, Any]:
    """Split a tree into two of the same structure: one has the leaves where the mask is True, the other one
    the leaves where it is False, and each has None for the leaves of the other.

    >>> params = {"q": {"w": 0.0, "a": 1.0, "b": 2.0}}
    >>> trainable, frozen = partition(params, mask_by_path(params, ".*/[ab]"))
    >>> trainable
    {'q': {'a': 1.0, 'b': 2.0, 'w': None}}
    >>> combine(trainable, frozen) == params
    True
    """
    return (
        jax.tree.map(lambda m, x: x if m else None, mask, tree),
        jax.tree.map(lambda m, x: None if m else x, mask, tree),
    )


def combine(*trees: Any) -> Any:
    """Merge partitions: each leaf comes from the first tree in which it is not None."""
    return jax.tree.map(
        lambda *leaves: next((x for x in leaves if x is not None), None), *trees, is_leaf=lambda x: x is None
    )
