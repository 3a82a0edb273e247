"""Values from text, by annotation; and the Python files and functions that text may name."""

import collections.abc
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jaxft.runs.record import members
from jaxft.tree import nearest

ROOT = Path(__file__).resolve().parents[2]
BARE = inspect.Parameter.empty  # no annotation, no default


def find_file(path: str) -> Path:
    """A relative path from the working directory or, failing that, from the repository root. Raises FileNotFoundError."""
    for folder in (Path.cwd(), ROOT):
        if (folder / path).is_file():
            return (folder / path).resolve()
    near = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").glob("*.py"))
    hint = f"; there are: {', '.join(nearest(path, near, 5))}" if near else ""
    raise FileNotFoundError(f"{path}: no such file in {Path.cwd()} or {ROOT}{hint}")


def shown_path(file: Path) -> str:
    """How a file is named in messages and records: relative to the working directory or the repository where it lies in them."""
    for folder in (Path.cwd(), ROOT):
        if file.is_relative_to(folder):
            return file.relative_to(folder).as_posix()
    return str(file)


def run_file(file: Path) -> types.ModuleType:
    # The module is named by its path, so that a function of it describes itself as "configs/dpo.py:name".
    module = types.ModuleType(shown_path(file))
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), module.__dict__)
    except SyntaxError as error:
        raise ValueError(f"{shown_path(file)}:{error.lineno}: syntax error: {error.msg}") from error
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"{shown_path(file)}: {told(error, file)}") from error
    return module


def told(error: Exception, file: Path) -> str:
    """The error with the line of the file that it came from."""
    lines, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}" + (f" (line {lines[-1]})" if lines else "")


def load_callable(text: str) -> Callable:
    """The function that `package.module:name` or `file.py:name` names. Raises ValueError or FileNotFoundError."""
    where, _, name = text.rpartition(":")
    if not where or not name:
        raise ValueError(f"{text!r} names no function; write package.module:name or file.py:name")
    if where.endswith(".py"):
        module = run_file(find_file(where))
    else:
        try:
            module = __import__(where, fromlist=["_"])
        except ImportError as error:
            raise ValueError(f"{text!r}: {error}; write package.module:name or file.py:name") from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise ValueError(
                f"{where} has no {name!r}; it has: {', '.join(nearest(name, known, 5)) or 'no functions'}"
            )
        found = getattr(found, part)
    if not callable(found) and not hasattr(
        found, "opened"
    ):  # a reward that is opened first, see completions.ForAll
        raise ValueError(f"{text} is a {type(found).__name__}, not a function")
    return found


def kind_name(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if len(members(kind)) > 1:
        return " or ".join(kind_name(k) for k in members(kind))
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin is tuple:
        return "a list a,b of " + " and ".join(dict.fromkeys(kind_name(a) for a in args if a is not ...))
    if kind is bool:
        return "true or false"
    if kind in (None, type(None)):
        return "none"
    if _is_callable(kind):
        return "package.module:name or file.py:name"
    return getattr(kind, "__name__", str(kind))


def _is_callable(kind: Any) -> bool:
    return collections.abc.Callable in (kind, typing.get_origin(kind))


def parse(text: str, kind: Any) -> Any:
    """The value that `text` means for an annotation. Raises ValueError saying what is wanted."""
    kinds = members(kind)
    if type(None) in kinds and text.lower() == "none":
        return None
    if len(kinds) > 1:
        return _parse_union(text, kind, kinds)
    kind = kinds[0]
    origin, args = typing.get_origin(kind) or kind, typing.get_args(kind)
    if _is_callable(kind):
        return load_callable(text)
    if origin is Literal:
        for choice in args:
            if text == str(choice) or (isinstance(choice, bool) and text.lower() == str(choice).lower()):
                return choice
    elif origin is tuple:
        return _parse_tuple(
            text, args, ":" if args == (int, int) and "," not in text else ","
        )  # a range: 10:15
    elif kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    elif kind in (str, Path):
        return kind(text)
    elif kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is not None and value == value:
            return value
    elif dataclasses.is_dataclass(kind):
        raise ValueError(
            f"it is a section; set its fields: {', '.join(f.name for f in dataclasses.fields(kind))}"
        )
    else:
        raise ValueError("such a value can't be written on the command line; change the config file")
    raise ValueError(f"wanted {kind_name(kind)}")


def _parse_union(text: str, kind: Any, kinds: tuple[Any, ...]) -> Any:
    # str takes anything, so it comes last; a tuple comes before it only where there is a comma
    tuples = "," in text or str not in kinds
    ranked = [
        k for k in kinds if k not in (str, type(None)) and (tuples or typing.get_origin(k) is not tuple)
    ]
    for k in [*ranked, *(k for k in kinds if k is str)]:
        try:
            return parse(text, k)
        except ValueError:
            if _is_callable(k) and ":" in text:
                raise
    raise ValueError(f"wanted {kind_name(kind)}")


def _parse_tuple(text: str, args: tuple[Any, ...], mark: str = ",") -> tuple:
    items = [item.strip() for item in text.split(mark)] if text else []
    if items and items[-1] == "":
        items.pop()  # "a," is the tuple of one
    kinds = args[:1] * len(items) if len(args) == 2 and args[1] is ... else args or (str,) * len(items)
    if len(items) != len(kinds):
        raise ValueError(f"wanted {len(kinds)} values with {mark!r} between, found {len(items)}")
    inner = [
        typing.get_args(k) if typing.get_origin(k) is tuple and mark == "," else None for k in kinds
    ]  # a:1,b:2
    return tuple(
        parse(i, k) if t is None else _parse_tuple(i, t, ":")
        for i, k, t in zip(items, kinds, inner, strict=True)
    )
