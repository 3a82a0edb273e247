"""Config files and their overrides. A config is a Python file with a function `config(knob=default, ...)`.

It returns a tree of frozen dataclasses; this module knows none of them by name. `knob=value` sets a parameter of that function,
`section.field=value` a field of what it returns. `describe` turns the result into JSON,
`differences` compares two of those.
"""

import ast
import dataclasses
import functools
import inspect
import io
import tokenize
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from jaxft.nn.param import Model
from jaxft.runs.parse import BARE, find_file, kind_name, parse, run_file, shown_path, told
from jaxft.runs.record import describe, differences, members
from jaxft.tree import nearest

__all__ = ["describe", "differences", "knob_names", "knobs", "load"]


def _parse_for(label: str, text: str, kind: Any, now: Any) -> Any:
    """Parse an override; an annotation that says nothing is read off the present value."""
    if kind in (BARE, Any):
        if now is BARE or now is None:
            raise ValueError(
                f"{label}={text}: neither an annotation nor a default shows its type; annotate it in the config"
            )
        item = type(now[0]) if isinstance(now, tuple) and now else str
        kind = tuple[item, ...] if isinstance(now, tuple) else Callable if callable(now) else type(now)
    try:
        return parse(text, kind)
    except ValueError as error:
        shown = (
            ""
            if now is BARE or not isinstance(now, bool | int | float | str | None | tuple)
            else f" (now {now!r})"
        )
        raise ValueError(f"{label}={text}: {error}{shown}") from error


def _hints(thing: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(thing, include_extras=True)
    except NameError as error:
        raise ValueError(
            f"annotation of {getattr(thing, '__qualname__', thing)} can't be read: {error}"
        ) from error


def _knobs(fn: Callable) -> dict[str, tuple[Any, Any]]:
    """Knob -> (annotation, default)."""
    hints = _hints(fn)
    return {
        name: (hints.get(name, BARE), p.default)
        for name, p in inspect.signature(fn).parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }


def _config_function(path: str) -> tuple[Callable, types.ModuleType]:
    module = run_file(find_file(path))
    fn = getattr(module, "config", None)
    if not inspect.isfunction(fn):
        raise ValueError(
            f"{path}: found no function `config`; a config file defines def config(knob=default, ...) -> Run"
        )
    return fn, module


def knob_names(path: str) -> list[str]:
    """The knobs of a config file."""
    return list(_knobs(_config_function(path)[0]))


def load(path: str, overrides: list[str]) -> Any:
    """What the file's `config` returns, with overrides applied. Raises ValueError with one line about the first wrong one."""
    fn, _ = _config_function(path)
    known = _knobs(fn)
    texts: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"{override!r}: an override is knob=value or section.field=value")
        if key in texts:
            raise ValueError(f"{key} is given twice: {texts[key]} and {text}")
        texts[key] = text
    knobs = {k: _parse_for(k, t, *known[k]) for k, t in texts.items() if k in known}
    for name, (kind, default) in known.items():
        if default is BARE and name not in knobs:
            wanted = "..." if kind is BARE else f"<{kind_name(kind)}>"
            raise ValueError(f"{path}: {name} has no default; give {name}={wanted}")
    root = _call(fn, knobs, path)
    if not dataclasses.is_dataclass(root) or isinstance(root, type):
        raise ValueError(
            f"{path}: config returned a {type(root).__name__}, wanted a frozen dataclass such as Run"
        )
    dotted: dict[tuple[str, ...], tuple[str, str]] = {}
    for key, text in texts.items():
        if key not in known:
            steps = _steps(root, key, list(known))
            if steps in dotted:
                raise ValueError(f"{key} and {dotted[steps][0]} are the same field")
            dotted[steps] = (key, text)
    if not dotted:
        return root
    final = _apply(root, dotted)
    sections = {
        steps for steps in dotted if dataclasses.is_dataclass(_get(root, steps))
    }  # set to none as a whole
    alone = {steps: item for steps, item in dotted.items() if steps not in sections}
    settings = {k: knobs.get(k, default) for k, (_, default) in known.items()}
    _refuse_computed(fn, settings, list(knobs), root, dotted)
    _refuse_computed(fn, settings, [k for k in known if k not in knobs], root, alone)
    return final


def _call(fn: Callable, knobs: dict[str, Any], path: str) -> Any:
    try:
        return fn(**knobs)
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"{path}: {told(error, Path(fn.__code__.co_filename))}") from error


def _steps(root: Any, key: str, knobs: list[str]) -> tuple[str, ...]:
    """The field names that lead to a dotted key; the root may be named by its class, as in `run.name`."""
    steps = tuple(key.split("."))
    own = [f.name for f in dataclasses.fields(root)]
    if len(steps) > 1 and steps[0] not in own and steps[0] == type(root).__name__.lower():
        steps = steps[1:]
    node = root
    for i, step in enumerate(steps):
        here = ".".join(steps[:i])
        if isinstance(node, Model):
            raise ValueError(
                f"{key}: {here} is a whole model; choose another through the knobs {', '.join(knobs)}"
            )
        if not dataclasses.is_dataclass(node) or isinstance(node, type):
            found = "none" if node is None else f"a {type(node).__name__}"
            raise ValueError(f"{key}: {here} is {found}, it has no field {step!r}")
        names = [f.name for f in dataclasses.fields(node) if f.init]
        if step not in names:
            candidates = [f"{here}.{n}" if here else n for n in names] + (
                [] if i else [*knobs, *_settable(root)]
            )
            near = nearest(key, list(dict.fromkeys(candidates)))
            raise ValueError(f"unknown key {key!r}; near: {', '.join(near)}")
        node = getattr(node, step)
    return steps


def _settable(root: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(root):
        value = getattr(root, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type | Model):
            yield from _settable(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _get(root: Any, steps: tuple[str, ...]) -> Any:
    return functools.reduce(getattr, steps, root)


def _apply(node: Any, dotted: dict[tuple[str, ...], tuple[str, str]]) -> Any:
    """The node with its fields replaced; those of one dataclass together, so that it checks them together."""
    values: dict[str, Any] = {}
    for name in dict.fromkeys(steps[0] for steps in dotted):
        now = getattr(node, name)
        below = {steps[1:]: item for steps, item in dotted.items() if steps[0] == name}
        if () in below and len(below) > 1:
            raise ValueError(
                f"{' and '.join(key for key, _ in below.values())}: one contains the other; set only one"
            )
        if () in below:
            key, text = below[()]
            values[name] = _parse_for(key, text, _hints(type(node)).get(name, BARE), now)
        else:
            values[name] = _apply(now, below)
    return dataclasses.replace(node, **values)


# Fields that the config computed from a knob


def _refuse_computed(fn: Callable, knobs: dict[str, Any], tried: list[str], root: Any, dotted: dict) -> None:
    """Call the config with each knob of `tried` changed: a field that changes along is the knob's, setting both contradicts."""
    hints = _knobs(fn)
    for knob in tried if dotted else ():
        value = knobs[knob]
        for other in _others(value, hints[knob][0]):
            try:
                changed = fn(**{**knobs, knob: other})
            except Exception:  # not a value this config takes: try the next
                continue
            for steps, (key, _) in dotted.items():
                if _follows(fn, knobs, knob, other, (root, changed), steps):
                    raise ValueError(
                        f"{key} is computed from the knob {knob}; set {knob}=... instead (now {_brief(value)})"
                    )


def _brief(value: Any) -> str:
    return str(describe(value).get("callable")) if callable(value) else repr(value)


def _follows(
    fn: Callable, knobs: dict[str, Any], knob: str, other: Any, pair: tuple[Any, Any], steps: tuple[str, ...]
) -> bool:
    for i in range(len(steps)):
        if type(_get(pair[0], steps[:i])) is not type(_get(pair[1], steps[:i])):
            return (
                False  # the section itself comes and goes with the knob: that says nothing about its fields
            )
    before, after = _get(pair[0], steps), _get(pair[1], steps)
    if not isinstance(other, str) or other != knobs[knob]:
        return describe(before) != describe(after)
    # A text is often a name that is looked up (a model, a file), so it isn't changed but followed, as an equal copy
    if after is other or (isinstance(after, tuple) and any(x is other for x in after)):
        return True
    if not isinstance(after, str | Path) or len(other) < 3 or other not in str(after):
        return False
    try:
        return describe(before) != describe(_get(fn(**{**knobs, knob: other + "x"}), steps))
    except Exception:
        return True


def _others(value: Any, kind: Any) -> list[Any]:
    """Other values of the same type, cheap and mostly valid."""
    kinds = () if kind is BARE else members(kind)
    out: list[Any] = [
        c for k in kinds if typing.get_origin(k) is Literal for c in typing.get_args(k) if c != value
    ]
    if out:
        return out
    if isinstance(value, bool):
        out = [not value]
    elif isinstance(value, int):
        out = [value + 1, 2 * value + 1, value - 1]
    elif isinstance(value, float):
        out = [value / 2, value * 2] if value else [0.5, 1.0]
    elif isinstance(value, str):
        out = ["".join(list(value))] if len(value) > 1 else []
    elif isinstance(value, tuple):
        out = [value[:-1], value + value[-1:]] if value else []
    elif value is None:
        out = [{int: 1, float: 0.5, bool: True}[k] for k in kinds if k in (int, float, bool)]
    elif callable(value):
        out = [_stand_in]
    return out + ([None] if type(None) in kinds and value is not None else [])


def _stand_in(*args: Any, **kwargs: Any) -> None:
    """A function that no config passes."""


# Help


def knobs(path: str) -> str:
    """The docstring of a config file and its knobs with their defaults, types and comments."""
    fn, module = _config_function(path)
    source = Path(module.__file__ or path).read_text(encoding="utf-8")
    comments = {
        t.start[0]: t.string.lstrip("# ").strip()
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }
    tree = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "config")
    last = {
        a.lineno: a.arg for a in (*tree.args.args, *tree.args.kwonlyargs)
    }  # a comment belongs to the last knob of its line
    told = {name: comments.get(line, "") for line, name in last.items()}
    rows = []
    for name, (kind, default) in _knobs(fn).items():
        shown = name if default is BARE else f"{name}={_plain(default)}"
        wanted = kind_name(type(default) if kind in (BARE, Any) else kind)
        rows.append((shown, wanted if default is not BARE else wanted + ", required", told.get(name, "")))
    width = [max((len(r[i]) for r in rows), default=0) for i in range(2)]
    table = [f"  {a:{width[0]}}  {b:{width[1]}}  {c}".rstrip() for a, b, c in rows]
    doc = inspect.cleandoc(module.__doc__ or shown_path(Path(module.__file__ or path)))
    return "\n".join([doc, "", "Knobs (knob=value; other settings as section.field=value):", *table])


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(_plain(v) for v in value) + ("," if len(value) == 1 else "")
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return _brief(value) if callable(value) else str(value)
