"""Values as JSON that can be compared: the record of a run's settings, and the differences between two records."""

import dataclasses
import functools
import hashlib
import inspect
import types
import typing
from pathlib import Path
from typing import Any, Union

import numpy as np

from jaxft.nn.param import Model


def members(kind: Any) -> tuple[Any, ...]:
    """The members of a union annotation, or the annotation alone."""
    if typing.get_origin(kind) is typing.Annotated:
        return members(typing.get_args(kind)[0])
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def describe(value: Any) -> Any:
    """The value as JSON: dataclasses as dicts, a function by name, arguments and source hash, a Model by its config."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else repr(value)
    if isinstance(value, list | tuple):
        return [describe(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted((describe(v) for v in value), key=repr)
    if isinstance(value, dict):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Model):
        known = {
            "type": _name(type(value.config)),
            "config": describe(value.config),
            "dtype": np.dtype(value.dtype).name,
        }
        known |= {"beside": sorted(value.beside)} if value.beside else {}
        wide = np.dtype(value.residual).itemsize >= max(4, np.dtype(value.dtype).itemsize)
        return known if wide else {**known, "residual": np.dtype(value.residual).name}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _describe_dataclass(value)
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return np.dtype(value).name
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        data = np.ascontiguousarray(value)
        return {
            "array": list(data.shape),
            "dtype": data.dtype.name,
            "sha256": hashlib.sha256(data.tobytes()).hexdigest(),
        }
    if isinstance(getattr(value, "dtype", None), np.dtype):  # jnp.bfloat16 and the like
        return value.dtype.name
    return _describe_callable(value) if callable(value) else {"object": _name(type(value))}


def _describe_dataclass(value: Any) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(type(value))
    except NameError:
        hints = {}
    out = {}
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        out[field.name] = describe(inner)
        section = dataclasses.is_dataclass(inner) and not isinstance(inner, type | Model)
        if section and {k for k in members(hints.get(field.name)) if k is not type(None)} != {type(inner)}:
            out[field.name] = {
                "type": _name(type(inner)),
                **out[field.name],
            }  # the annotation doesn't say which
    return out


def _name(value: Any) -> str:
    return f"{value.__module__}:{value.__qualname__}"


def _describe_callable(fn: Any) -> dict[str, Any]:
    args: dict[str, Any] = {}
    while isinstance(fn, functools.partial):
        try:
            bound = inspect.signature(fn.func).bind_partial(*fn.args, **fn.keywords).arguments
        except (TypeError, ValueError):
            bound = {**{str(i): a for i, a in enumerate(fn.args)}, **fn.keywords}
        args, fn = {**{k: describe(v) for k, v in bound.items()}, **args}, fn.func
    if inspect.ismethod(fn):
        args, fn = {"self": describe(fn.__self__), **args}, fn.__func__
    fn = inspect.unwrap(fn)
    if not hasattr(fn, "__qualname__"):  # an object with __call__
        inner = {k: describe(v) for k, v in getattr(fn, "__dict__", {}).items()}
        return {
            "callable": _name(type(fn)),
            "args": {**inner, **args},
            "source_sha256": _source_hash(type(fn)),
        }
    free = getattr(getattr(fn, "__code__", None), "co_freevars", ())
    for name, cell in zip(free, getattr(fn, "__closure__", None) or (), strict=True):
        try:
            inner = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        args.setdefault(name, describe(inner) if inner is not fn else "itself")
    return {"callable": _name(fn), "args": args, "source_sha256": _source_hash(fn)}


def _source_hash(thing: Any) -> str | None:
    """Of the function's text, or of its whole file where that is named by its path: it may call what stands beside it."""
    try:
        if str(thing.__module__).endswith(".py"):
            return hashlib.sha256(Path(inspect.getfile(thing)).read_bytes()).hexdigest()
        return hashlib.sha256(inspect.getsource(thing).encode()).hexdigest()
    except (OSError, TypeError):
        return None


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """`a.b: 1 -> 2` for each place where two descriptions differ; `absent` for a key that one of them lacks."""
    if isinstance(old, dict) and isinstance(new, dict):
        out = []
        for key in dict.fromkeys([*old, *new]):
            out += differences(
                old.get(key, _ABSENT), new.get(key, _ABSENT), f"{path}.{key}" if path else str(key)
            )
        return out
    same = old == new and isinstance(old, bool) == isinstance(new, bool)
    return [] if same else [f"{path}: {_short(old)} -> {_short(new)}"]


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:60] + "..." + text[-20:]
