"""Records of a run's settings: values as comparable JSON, and the differences between two records."""

import dataclasses
import functools
import hashlib
import inspect
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.data.rows.remote import without_secrets
from jaxft.models.model import Model

JaxDType = type(jnp.float32)
PROMPT_TEXTS = "chat_template_kwargs"  # the setting whose texts later commands render, so they are unchanged


def union_members(kind: Any) -> tuple[Any, ...]:
    """The members of a union annotation, or the annotation alone."""
    if typing.get_origin(kind) is typing.Annotated:
        return union_members(typing.get_args(kind)[0])
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def describe(value: Any) -> Any:
    """A value as JSON.

    A dataclass becomes a dict of its fields; a function its name, its arguments (bound by `partial`, a method
    or a closure) and a hash of its source; a model its config; an array its shape, dtype and hash. URLs lose
    passwords and signatures, see urls.without_secrets, except in PROMPT_TEXTS.
    """
    if isinstance(value, str):
        return without_secrets(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else repr(value)
    if isinstance(value, list | tuple):
        return [describe(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted((describe(v) for v in value), key=repr)
    if isinstance(value, dict):
        return {without_secrets(str(k)): _describe_field(k, v) for k, v in value.items()}
    if isinstance(value, Path):
        return without_secrets(str(value))
    if isinstance(value, Model):
        return _describe_model(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _describe_dataclass(value)
    if isinstance(value, np.dtype | JaxDType) or (isinstance(value, type) and issubclass(value, np.generic)):
        return np.dtype(value).name
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        data = np.ascontiguousarray(value)
        digest = hashlib.sha256(data.tobytes()).hexdigest()
        return {"array": list(data.shape), "dtype": data.dtype.name, "sha256": digest}
    return _describe_callable(value) if callable(value) else {"object": _name(type(value))}


def _describe_field(name: str, value: Any) -> Any:
    return list(value) if name == PROMPT_TEXTS and isinstance(value, list | tuple) else describe(value)


def _describe_model(model: Model) -> dict[str, Any]:
    dtype, residual = np.dtype(model.dtype), np.dtype(model.residual)
    record = {"type": _name(type(model.config)), "config": describe(model.config), "dtype": dtype.name}
    record |= {"heads": sorted(model.heads)} if model.heads else {}
    return record if residual.itemsize >= max(4, dtype.itemsize) else {**record, "residual": residual.name}


def _describe_dataclass(value: Any) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(type(value))
    except NameError:
        hints = {}
    record = {}
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        record[field.name] = _describe_field(field.name, inner)
        is_section = dataclasses.is_dataclass(inner) and not isinstance(inner, type | Model)
        kinds = {kind for kind in union_members(hints.get(field.name)) if kind is not type(None)}
        if is_section and kinds != {type(inner)}:  # the annotation doesn't say which class it is
            record[field.name] = {"type": _name(type(inner)), **record[field.name]}
    return record


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
    if not inspect.isroutine(fn) and not isinstance(fn, type | np.ufunc):  # an object with __call__
        try:
            inner = {k: describe(v) for k, v in vars(fn).items()}
        except TypeError:  # it has slots
            inner = {}
        return {
            "callable": _name(type(fn)),
            "args": {**inner, **args},
            "source_sha256": _source_hash(type(fn)),
        }
    if inspect.isfunction(fn):
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            try:
                inner = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            args.setdefault(name, describe(inner) if inner is not fn else "itself")
    return {"callable": _name(fn), "args": args, "source_sha256": _source_hash(fn)}


def _source_hash(definition: Any) -> str | None:
    """A hash of the source of a function or class; of its whole file where that is a user's, whose helpers it
    may call.
    """
    try:
        if str(definition.__module__).endswith(".py"):
            return hashlib.sha256(Path(inspect.getfile(definition)).read_bytes()).hexdigest()
        return hashlib.sha256(inspect.getsource(definition).encode()).hexdigest()
    except (OSError, TypeError):
        return None


def recorded_defaults(section: Any, prefix: str = "") -> dict[str, Any]:
    """Return the default of each field of a dataclass and of the sections in it that has one, as JSON by
    dotted name.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        name, value = f"{prefix}{field.name}", getattr(section, field.name)
        if field.default is not dataclasses.MISSING:
            found[name] = _as_json(describe(field.default))
        elif field.default_factory is not dataclasses.MISSING:
            found[name] = _as_json(describe(field.default_factory()))
        if dataclasses.is_dataclass(value) and not isinstance(value, type | Model):
            found |= recorded_defaults(value, f"{name}.")
    return found


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def absent_lines(defaults: Mapping[str, Any]) -> set[str]:
    """Return the `differences` between a record from before settings existed and one with their defaults."""
    return {f"{name}: {_ABSENT} -> {_short(default)}" for name, default in defaults.items()}


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """`a.b: 1 -> 2` for each place where two records differ; `absent` for a key that one of them lacks."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in dict.fromkeys([*old, *new]):
            inner = f"{path}.{key}" if path else str(key)
            found += differences(old.get(key, _ABSENT), new.get(key, _ABSENT), inner)
        return found
    same = old == new and isinstance(old, bool) == isinstance(new, bool)
    return [] if same else [f"{path}: {_short(old)} -> {_short(new)}"]


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:60] + "..." + text[-20:]
