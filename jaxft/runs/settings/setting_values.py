"""Values of settings: parsed by their type annotations, and recorded as comparable JSON.

Settings may name Python files and functions, which are loaded here. Records of two runs are compared here
too.
"""

import ast
import collections.abc
import dataclasses
import difflib
import functools
import hashlib
import importlib
import inspect
import json
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.annotations import ShortNames, bounds_of, choices_of, types_and_marks
from jaxft.data.rows.remote_files import without_secrets
from jaxft.data.rows.shipped import ROOT
from jaxft.models.model import Model
from jaxft.nn.tree import nearest
from jaxft.runs.settings.setting_names import name_of_loss, settings_file

JaxDType = type(jnp.float32)
PROMPT_TEXTS = "chat_template_kwargs"  # the setting whose texts later commands render, so they are unchanged


def union_members(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union annotation, (kind,) for any other. Annotated[X, ...] counts as X."""
    if typing.get_origin(kind) is typing.Annotated:
        return union_members(typing.get_args(kind)[0])
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def describe(value: Any) -> Any:
    """Return a value as JSON, for the record of a run.

    A dataclass becomes a dict of its fields; a function its name, its arguments (bound by `partial`, a method
    or a closure) and a hash of its source; a model its config; an array its shape, dtype and hash. URLs lose
    passwords and signatures, see remote.without_secrets, except in PROMPT_TEXTS.
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
        kind = type(fn)
        return {"callable": _name(kind), "args": {**inner, **args}, "source_sha256": _source_hash(kind)}
    if inspect.isfunction(fn):
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            try:
                inner = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            args.setdefault(name, describe(inner) if inner is not fn else "itself")
    return {"callable": _name(fn), "args": args, "source_sha256": _source_hash(fn)}


def _source_hash(definition: Any) -> str | None:
    """Return a hash of the source of a function or class; in a user's file, of the whole file, because it may
    call helpers there. None if the source cannot be read.
    """
    try:
        if str(definition.__module__).endswith(".py"):
            return hashlib.sha256(Path(inspect.getfile(definition)).read_bytes()).hexdigest()
        return hashlib.sha256(inspect.getsource(definition).encode()).hexdigest()
    except (OSError, TypeError):
        return None


def recorded_defaults(section: Any, prefix: str = "") -> dict[str, Any]:
    """Return {dotted name: default as JSON} of the fields of a dataclass and of the dataclasses in it. Fields
    without a default are left out.
    """
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        name, value = f"{prefix}{field.name}", getattr(section, field.name)
        if field.default is not dataclasses.MISSING:
            defaults[name] = _as_json(describe(field.default))
        elif field.default_factory is not dataclasses.MISSING:
            defaults[name] = _as_json(describe(field.default_factory()))
        if dataclasses.is_dataclass(value) and not isinstance(value, type | Model):
            defaults |= recorded_defaults(value, f"{name}.")
    return defaults


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def absent_lines(defaults: Mapping[str, Any]) -> set[str]:
    """Return the lines that `differences` returns for settings that an old record lacks, because they did not
    exist then, and that a new record has with their defaults. defaults: {dotted name: default}.
    """
    return {f"{name}: {_ABSENT} -> {_short(default)}" for name, default in defaults.items()}


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return `a.b: 1 -> 2` for each difference of two records; `absent` is a key that a record lacks."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in dict.fromkeys([*old, *new]):
            inner = f"{path}.{key}" if path else str(key)
            lines += differences(old.get(key, _ABSENT), new.get(key, _ABSENT), inner)
        return lines
    same = old == new and isinstance(old, bool) == isinstance(new, bool)
    return [] if same else [f"{path}: {_short(old)} -> {_short(new)}"]


class _Absent:
    """The value of a setting that a record lacks."""

    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:60] + "..." + text[-20:]


UNANNOTATED = inspect.Parameter.empty  # the annotation or the default that a parameter lacks
CALLABLE = "package.module:name or file.py:name"
SHOWN_NAMES = 8  # of functions that a message lists; of more it shows a few


# Python files and functions


def find_file(path: str) -> Path:
    """Resolve a path from the working directory, else from ROOT. Raises FileNotFoundError."""
    for folder in (Path.cwd(), ROOT):
        if (folder / path).is_file():
            return (folder / path).resolve()
    folder = Path(path).parent
    beside = sorted((folder / p.name).as_posix() for p in folder.glob("*.py"))
    configs = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").glob("*.py"))
    near = list(dict.fromkeys([*difflib.get_close_matches(path, beside, 3, 0.5), *nearest(path, configs, 5)]))
    hint = f"; near: {', '.join(near[:5])}" if near else "; correct the path"
    folders = " or ".join(dict.fromkeys(map(str, (Path.cwd(), ROOT))))
    raise FileNotFoundError(f"{path}: no such file in {folders}{hint}")


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with jaxft."""
    return sorted(file.stem for file in (ROOT / "configs").glob("*.py"))


def find_recipe(name: str) -> Path:
    """Resolve the name of a recipe in configs/ or the path of a file. Raises FileNotFoundError, or ValueError
    for a file of another tool's settings.
    """
    if refusal := settings_file(name):
        raise ValueError(refusal)
    if Path(name).suffix or len(Path(name).parts) > 1 or Path(name).is_file():
        return find_file(name)
    if name in recipe_names():
        return ROOT / "configs" / f"{name}.py"
    near = ", ".join(nearest(name, recipe_names(), 5))
    raise FileNotFoundError(
        f"{name}: no recipe has this name; near: {near}. Use one of these or a Python file"
    )


def short_path(file: Path) -> str:
    """Return a file's path relative to the working directory or ROOT, else in full."""
    for folder in (Path.cwd(), ROOT):
        if file.is_relative_to(folder):
            return file.relative_to(folder).as_posix()
    return str(file)


def may_define(file: Path, function: str) -> bool:
    """Return whether the source of a Python file defines or imports a function of this name: False for an
    object such as `config = DPOConfig(...)`, True for a file that cannot be read as Python.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return True
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return True
        if isinstance(node, ast.alias) and {node.name, node.asname} & {function, "*"}:
            return True
        if isinstance(node, ast.Assign) and function in map(ast.unparse, node.targets):
            made = ast.unparse(node.value.func) if isinstance(node.value, ast.Call) else ""
            if not made.rpartition(".")[2][:1].isupper():
                return True
    return False


def run_file(file: Path) -> types.ModuleType:
    """Run a Python file as a module. Its name is its path, so that records have its functions as
    "configs/dpo.py:name".

    Raises ValueError with the line of the file where it failed, also where it calls sys.exit; a ValueError or
    OSError that the file's code raises is passed on.
    """
    module = types.ModuleType(short_path(file))
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        code = compile(file.read_bytes(), str(file), "exec")
    except SyntaxError as error:
        line = f":{error.lineno}" if error.lineno else ""
        raise ValueError(f"{short_path(file)}{line}: syntax error: {error.msg}; correct it") from error
    except ValueError as error:  # a null byte, before Python 3.12
        raise ValueError(f"{short_path(file)}: not a Python file ({error}); name one") from error
    try:
        exec(code, module.__dict__)
    except (ValueError, OSError):
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{short_path(file)}: {format_error(error, file)}") from error
    return module


def format_error(error: BaseException, file: Path) -> str:
    """Return an error's type and text, with the number of the last line of `file` in its traceback."""
    lines, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}" + (f" (line {lines[-1]})" if lines else "")


def load_callable(text: str, or_dict: bool = False) -> Any:
    """Import what `package.module:name` or `file.py:name` names: a function, or a dataclass instance such as
    a reward. or_dict: allow a dict of functions too.

    Raises ValueError for a name that isn't one of these, and FileNotFoundError for a missing file.
    """
    where, _, name = text.rpartition(":")
    if not where or not name:
        raise ValueError(f"{text!r} names no function; write {CALLABLE}")
    if where.endswith(".py"):
        module = run_file(find_file(where))
    else:
        try:
            module = importlib.import_module(where)
        except ImportError as error:
            raise ValueError(f"{text!r}: {error}; write {CALLABLE}") from error
    value: Any = module
    for part in name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            raise ValueError(f"{where} has no {name!r}; {_functions_of(module, name)}") from None
    if or_dict and isinstance(value, dict) and all(map(callable, value.values())):
        return value
    if not callable(value) and not dataclasses.is_dataclass(value):
        raise ValueError(f"{text} has type {type(value).__name__}, not a function; name a function")
    return value


def _functions_of(module: types.ModuleType, name: str) -> str:
    """Return which functions a module has, for an error: all that a user's file defines, in its order; for a
    package only the nearest names.
    """
    named = vars(module).items()
    functions = [n for n, v in named if callable(v) and not isinstance(v, type) and not n.startswith("_")]
    if not module.__name__.endswith(".py"):
        return f"near: {', '.join(nearest(name, functions, 5)) or 'no functions'}"
    tree = ast.parse(Path(str(module.__file__)).read_bytes())
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.asname or alias.name for node in statements for alias in node.names}
    return f"it has: {', '.join(n for n in functions if n not in imported) or 'no functions'}"


# Values


def describe_kind(kind: Any) -> str:
    """Describe how a value of an annotation is written on the command line, for help and errors."""
    members, short, bounds = union_members(kind), short_names(kind), bounds_of(kind)
    if known := choices_of(kind):
        return f"one of {', '.join(known)}"
    if bounds is not None:
        return f"{' or '.join(map(describe_kind, types_and_marks(kind)[0]))}, {bounds}"
    if len(members) > 1:
        return " or ".join(map(describe_kind, members))
    if short:
        named = f"one of {', '.join(short)}"
        if len(short) > SHOWN_NAMES:
            named = f"one of {len(short)} names such as {', '.join(list(short)[:3])}"
        return f"{named}, or {CALLABLE}"
    kind = members[0]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args)) if len(args) > 1 else str(args[0])
    if origin is tuple:
        pairs = any(typing.get_origin(a) is tuple for a in args)
        parts = typing.get_args(args[0]) if pairs else args
        items = dict.fromkeys(_describe_item(a) for a in parts if a is not ...)
        return f"a list {'a:b,c:d' if pairs else 'a,b'} of " + " and ".join(items)
    if kind is bool:
        return "true or false"
    if kind in (None, type(None)):
        return "none"
    if is_callable(kind):
        return CALLABLE
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _describe_item(kind: Any) -> str:
    """Describe the annotation of a tuple's item, with its bounds in brackets."""
    bounds = bounds_of(kind)
    return describe_kind(kind) if bounds is None else f"{describe_kind(union_members(kind)[0])} ({bounds})"


def short_names(kind: Any) -> dict[str, str]:
    """Return {short name: package.module:name} of the ShortNames in an annotation, {} without them."""
    return {name: full for mark in _marks(kind) for name, full in mark.pairs}


def _marks(kind: Any) -> list[ShortNames]:
    marks = typing.get_args(kind)[1:] if typing.get_origin(kind) is typing.Annotated else ()
    return [mark for mark in marks if isinstance(mark, ShortNames)]


def is_callable(kind: Any) -> bool:
    """Return whether an annotation, or a member of a union, is Callable."""
    members = union_members(kind)
    return collections.abc.Callable in (*members, *map(typing.get_origin, members))


def can_be_written(kind: Any) -> bool:
    """Return whether a value of an annotation can be written on the command line."""
    members = union_members(kind)
    if len(members) > 1:
        return any(can_be_written(member) for member in members if member is not type(None))
    kind = members[0]
    if typing.get_origin(kind) is tuple:
        return all(can_be_written(item) for item in typing.get_args(kind) if item is not ...)
    return kind in (bool, int, float, str, Path) or typing.get_origin(kind) is Literal or is_callable(kind)


def parse_value(text: str, kind: Any) -> Any:
    """Parse a value of the annotation `kind`. Raises ValueError that names the expected values."""
    members = union_members(kind)
    if type(None) in members and text.lower() == "none":
        return None
    if len(members) > 1:
        return _parse_union(text, kind, members)
    short = short_names(kind)
    if short and ":" not in text and text not in short:
        known = f"none of {', '.join(short)}"
        if len(short) > SHOWN_NAMES:
            known = f"no known name, near: {', '.join(nearest(text, list(short), 5))}"
        theirs = name_of_loss(text)
        raise ValueError(f"{text!r} is {known}; use one, or {CALLABLE}{f' ({theirs})' if theirs else ''}")
    or_dict = any(mark.or_dict for mark in _marks(kind))
    kind, text = members[0], short.get(text, text)
    origin, args = typing.get_origin(kind) or kind, typing.get_args(kind)
    if is_callable(kind):
        return load_callable(text, or_dict)
    if origin is Literal:
        for choice in args:
            if text == str(choice) or (isinstance(choice, bool) and text.lower() == str(choice).lower()):
                return choice
    elif origin is tuple:
        is_range = args == (int, int) and "," not in text  # 10:15
        return _parse_tuple(text, args, ":" if is_range else ",")
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
        names = ", ".join(f.name for f in dataclasses.fields(kind))
        raise ValueError(f"this is a section; set its fields: {names}")
    else:
        raise ValueError("this setting cannot be set on the command line; set it in the recipe's Python file")
    raise _expected(text, kind)


def _parse_union(text: str, kind: Any, members: tuple[Any, ...]) -> Any:
    # A str takes any text, so it comes last; a tuple comes before it only where there is a comma.
    tuples = "," in text or str not in members
    typed = [k for k in members if k not in (str, type(None))]
    typed = [k for k in typed if tuples or typing.get_origin(k) is not tuple]
    for member in [*typed, *(k for k in members if k is str)]:
        try:
            return parse_value(text, member)
        except ValueError:
            if is_callable(member) and ":" in text:
                raise
    raise _expected(text, kind)


def _expected(text: str, kind: Any) -> ValueError:
    """Return the error of a value that the annotation `kind` does not allow."""
    expected = describe_kind(kind)
    if text.strip("+- ").lower() == "nan":  # a float, but no number
        expected = expected.replace("float", "a finite number")
    return ValueError(f"expected {expected}")


def _json_strings(text: str) -> tuple[str, ...] | None:
    """Return the items of a JSON list of strings, which may contain commas; None for any other text."""
    try:
        items = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return None
    return tuple(items) if isinstance(items, list) and all(isinstance(x, str) for x in items) else None


def _parse_tuple(text: str, args: tuple[Any, ...], separator: str) -> tuple:
    if args == (str, ...) and separator == ",":
        listed = _json_strings(text)
        if listed is not None:
            return listed
    items = [item.strip() for item in text.split(separator)] if text else []
    if items and items[-1] == "":
        items.pop()  # "a," is the tuple of one
    variadic = len(args) == 2 and args[1] is ...
    kinds = args[:1] * len(items) if variadic else args or (str,) * len(items)
    if len(items) != len(kinds):
        raise ValueError(f"expected {len(kinds)} values separated by {separator!r}, got {len(items)}")
    values, where = [], ""
    for item, kind in zip(items, kinds, strict=True):
        if is_callable(kind) and where and ":" not in item and item not in short_names(kind):
            item = f"{where}:{item}"  # tools=my_tools.py:add,search
        where = item.rpartition(":")[0]
        nested = typing.get_origin(kind) is tuple and separator == ","  # a:1,b:2
        values.append(_parse_tuple(item, typing.get_args(kind), ":") if nested else parse_value(item, kind))
    return tuple(values)
