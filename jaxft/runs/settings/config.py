"""Load a config file and apply the settings of a command line.

A config is a Python file with a function `config(knob=default, ...)` that returns a tree of frozen
dataclasses, such as a `Run`. `knob=value` sets a parameter of that function, `section.field=value` a field of
the value it returns. Knobs come first: `config` is called once, with them, and then the fields are replaced.
A field therefore overrides a knob; `Resolved` has both, and they are printed and recorded with the run.
Values of knobs are checked by their annotations before `config` is called (see annotations.py).

A parameter whose default is a dataclass is a group of knobs that several configs share: its fields are the
knobs.
"""

import ast
import dataclasses
import functools
import inspect
import io
import itertools
import json
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxft.annotations import check_values, types_and_marks
from jaxft.models.model import Model
from jaxft.nn.tree import nearest
from jaxft.runs.settings.setting_names import advice, join_lines, meant_options
from jaxft.runs.settings.setting_values import (
    UNANNOTATED,
    describe,
    describe_kind,
    find_recipe,
    format_error,
    is_callable,
    may_define,
    parse_value,
    run_file,
    short_names,
    short_path,
    union_members,
)
from jaxft.runs.terminal import short_text

Recipe = str | Callable[..., Any]  # the name of one, a Python file, or a function `config` itself
Steps = tuple[str, ...]  # the field names that lead to a setting


class ObjectText(str):
    """An override whose value is a Python object: the text is only how messages name it."""

    value: Any

    @classmethod
    def of(cls, value: Any, key: str = "") -> "ObjectText":
        """Return `key=NAME`, or NAME without a key: the name of a function or class, or of a value's type."""
        named = inspect.isroutine(value) or isinstance(value, type)
        name = value.__qualname__ if named else type(value).__qualname__
        text = cls(f"{key}={name}" if key else name)
        text.value = value
        return text


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A recipe with all of its settings applied.

    value: what the config returned, with fields replaced. knobs: the values of all knobs. fields: the values
    of the fields that dotted keys set. line: the recipe, then the overrides of the command line.
    defaults: the knobs' defaults. chosen: {setting: its value as text} of settings that jaxft chose because
    the user set no value, or auto: the learning rate, and lengths and batches that fit the rows.
    """

    value: Any
    knobs: dict[str, Any]
    fields: dict[str, Any]
    line: tuple[Any, ...] = ()
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    chosen: dict[str, str] = dataclasses.field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return the record of the settings: the value as JSON, and under "command" this object's `knobs`,
        `fields`, `line` ([] if an override is a Python object), and `chosen` unless it is empty.
        """
        is_line = all(isinstance(part, str) and not isinstance(part, ObjectText) for part in self.line)
        line = list(self.line) if is_line else []  # Python's objects are on no command line
        command = {"knobs": self.knobs, "fields": self.fields, "line": line}
        command |= {"chosen": self.chosen} if self.chosen else {}
        return {**describe(self.value), "command": describe(command)}


def load_config(path: str, overrides: list[str], expected: type = object) -> Any:
    """Resolve a config and its overrides as `resolve_config` does, and return only the value."""
    return resolve_config(path, overrides, expected).value


def resolve_config(recipe: Recipe, overrides: list[str], expected: type = object) -> Resolved:
    """Call a file's `config` with the overrides that name knobs, then replace the fields that the remaining
    overrides name. recipe: a recipe's name, a Python file, or the function `config` itself.

    overrides: "knob=value" or "section.field=value"; an ObjectText for a value that is a Python object.
    expected: the type that `config` must return. Raises ValueError or FileNotFoundError that says in one line
    what is wrong.
    """
    fn, _ = _config_function(recipe)
    path = recipe if isinstance(recipe, str) else fn.__qualname__
    knobs = _knobs(fn)
    texts = _split(overrides)
    given = {
        key: _parse_as(key, text, knobs[key].kind, knobs[key].default)
        for key, text in texts.items()
        if key in knobs
    }
    for name, knob in knobs.items():
        if knob.default is UNANNOTATED and name not in given:
            value = "..." if knob.kind is UNANNOTATED else f"<{describe_kind(knob.kind)}>"
            raise ValueError(f"{path}: {name} has no default; give {name}={value}")
    root = _call(fn, knobs, given, path)
    if not dataclasses.is_dataclass(root) or isinstance(root, type) or not isinstance(root, expected):
        name = "frozen dataclass such as Run" if expected is object else expected.__name__
        raise ValueError(f"{path}: config returned type {type(root).__name__}; expected a {name}")
    dotted = {key: text for key, text in texts.items() if key not in knobs}
    value, changed = _with_fields(root, dotted, list(knobs), Path(path).stem)
    defaults = {name: knob.default for name, knob in knobs.items()}
    return Resolved(value, defaults | given, changed, (recipe, *overrides), defaults)


def recipe_defaults(path: str) -> Any:
    """Return what a config returns with its defaults; None if a knob has no default or the config raises an
    error.
    """
    try:
        return load_config(path, [])
    except (ValueError, OSError):
        return None


def recipe_knobs(recipe: Recipe) -> "dict[str, Knob]":
    """Return a config file's knobs by name, in order."""
    return _knobs(_config_function(recipe)[0])


def with_fields(value: Any, *overrides: str) -> Any:
    """Return a config's value with dotted fields replaced, as a command line does.

    Example: with_fields(run, "optim.schedule=linear", "loop.steps=100").
    """
    return _with_fields(value, _split(list(overrides)), [], "recipe")[0]


# Knobs


def _config_function(path: Recipe) -> tuple[Callable, types.ModuleType | None]:
    if inspect.isfunction(path):
        return path, inspect.getmodule(path)
    if not isinstance(path, str):
        raise ValueError(f"a recipe is a name, a Python file or a function, not {type(path).__name__}")
    file = find_recipe(path)
    missing = f"{path}: no function `config`; a config file defines def config(knob=default, ...) -> Run"
    if not may_define(file, "config"):  # another program, which would start its own work
        raise ValueError(f"{missing}. A script of another tool is for `jaxft convert {path}`")
    module = run_file(file)
    fn = vars(module).get("config")
    if not inspect.isfunction(fn):
        raise ValueError(missing)
    return fn, module


@dataclasses.dataclass(frozen=True)
class Knob:
    """A parameter of `config`, or a field of its parameter `group`. kind: its annotation. kind and default
    are UNANNOTATED where the parameter has none.
    """

    kind: Any
    default: Any
    group: str | None = None

    @property
    def written_kind(self) -> str:
        """How a value is written on the command line, for help: "true or false"."""
        return describe_kind(type(self.default) if self.kind in (UNANNOTATED, Any) else self.kind)

    @property
    def written(self) -> str | None:
        """The default as on the command line, None without one."""
        return None if self.default is UNANNOTATED else as_written(self.default, self.kind)


def _knobs(fn: Callable) -> dict[str, Knob]:
    hints = type_hints(fn)
    knobs: dict[str, Knob] = {}
    for name, p in inspect.signature(fn).parameters.items():
        default, members = p.default, {name: Knob(hints.get(name, UNANNOTATED), p.default)}
        if _is_group(default):
            kinds, names = type_hints(type(default)), [f.name for f in dataclasses.fields(default)]
            members = {x: Knob(kinds[x], getattr(default, x), name) for x in names}
        twice = sorted(members.keys() & knobs.keys())
        if twice:
            raise ValueError(f"{fn.__module__}:{fn.__qualname__} has two knobs called {twice[0]}; rename one")
        knobs |= members
    return knobs


def type_hints(thing: Any) -> dict[str, Any]:
    """Return the annotations of a function or class, with Annotated. Raises ValueError for unknown names."""
    try:
        return typing.get_type_hints(thing, include_extras=True)
    except NameError as error:
        name, file = thing.__qualname__, thing.__module__
        text = f"cannot read the annotations of {name}: {error}; import it in {file}"
        raise ValueError(text) from error


def _split(overrides: list[str]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r} must be of the form knob=value or section.field=value")
        if isinstance(override, ObjectText):
            text = ObjectText.of(override.value)
        if key in texts:
            raise ValueError(f"{key} is given twice: {texts[key]} and {text}; keep one")
        texts[key] = text
    return texts


def _call(fn: Callable, knobs: dict[str, Knob], given: dict[str, Any], path: str) -> Any:
    """Call `config`. Raises ValueError for a value that is not allowed, and for an error in `config`."""
    kinds = {name: knob.kind for name, knob in knobs.items() if knob.kind is not UNANNOTATED}
    check_values(kinds, {name: value for name, value in given.items() if name in kinds})
    own = {name: knobs[name].default for name in kinds if name not in given and knobs[name].group is None}
    try:
        check_values(kinds, {name: value for name, value in own.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"{path}: the default {error}") from error
    arguments: dict[str, Any] = {name: value for name, value in given.items() if knobs[name].group is None}
    for group in dict.fromkeys(knobs[name].group for name in given):
        if group is not None:
            fields = {name: value for name, value in given.items() if knobs[name].group == group}
            arguments[group] = dataclasses.replace(inspect.signature(fn).parameters[group].default, **fields)
    try:
        return fn(**arguments)
    except (ValueError, OSError):
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path}: {format_error(error, Path(fn.__code__.co_filename))}") from error


def _parse_as(key: str, text: str, kind: Any, now: Any) -> Any:
    """Parse the text of a setting by its annotation `kind`; without one, by the type of its value `now`."""
    if isinstance(text, ObjectText):
        return _object_as(key, text, kind)
    if kind in (UNANNOTATED, Any):
        if now is UNANNOTATED or now is None:
            raise ValueError(
                f"{key}={text}: its type is unknown; annotate it or give it a default in the config"
            )
        item = type(now[0]) if isinstance(now, tuple) and now else str
        kind = tuple[item, ...] if isinstance(now, tuple) else Callable if callable(now) else type(now)
    try:
        return parse_value(text, kind)
    except ValueError as error:
        parts = now if isinstance(now, tuple) else (now,)
        plain = all(isinstance(part, bool | int | float | str | None | tuple) for part in parts)
        plain = plain and (now != () or ":" not in text)  # or "default empty" seems to be about the file
        shown = f" (default {as_written(now) or 'empty'})" if plain else ""
        section = next((member for member in union_members(kind) if dataclasses.is_dataclass(member)), None)
        other_tools = advice(key, text) if section else None  # optim=adamw_8bit
        remedy = f"; {other_tools}" if other_tools else ""
        if section and "is a section" not in str(error):
            remedy = f"; its fields are settings: {key}.{dataclasses.fields(section)[0].name}=...{remedy}"
        raise ValueError(f"{key}={short_text(text)}: {error}{shown}{remedy}") from error


def _object_as(key: str, text: ObjectText, kind: Any) -> Any:
    """Return the value of a setting that was set to a Python object, `text.value`. kind: its annotation.

    For a tuple annotation, a list or a single object becomes a tuple, and strings in it are parsed as on the
    command line. Raises ValueError if the object does not have the annotation's type.
    """
    value, members = text.value, types_and_marks(kind)[0]
    origins = [typing.get_origin(member) or member for member in members]
    if tuple in origins:
        items = value if isinstance(value, list | tuple) else (value,)
        item_kind = typing.get_args(members[origins.index(tuple)])[0]
        return tuple(
            parse_value(x, item_kind) if isinstance(x, str) else _object_as(key, ObjectText.of(x), item_kind)
            for x in items
        )
    classes = tuple(origin for origin in origins if isinstance(origin, type))
    takes_any = kind in (UNANNOTATED, Any) or Any in members
    if takes_any or isinstance(value, classes) or (is_callable(kind) and callable(value)):
        return value
    raise ValueError(f"{key}={short_text(text)}: expected {describe_kind(kind)}")


# Dotted fields


def _with_fields(
    root: Any, texts: dict[str, str], knobs: list[str], recipe: str
) -> tuple[Any, dict[str, Any]]:
    """Return (`root` with dotted fields replaced, {dotted key: new value}). texts: {dotted key: text}."""
    fields: dict[Steps, tuple[str, str]] = {}
    refused = list[str]()
    for key, text in texts.items():
        try:
            steps = _steps(root, key, knobs, (text, recipe))
        except ValueError as error:
            refused.append(str(error))
            continue
        if steps in fields:
            raise ValueError(f"{key} and {fields[steps][0]} are the same field; set only one")
        fields[steps] = (key, text)
    if refused:
        raise ValueError(join_lines(refused))
    value = _replace(root, fields)
    return value, {".".join(steps): functools.reduce(getattr, steps, value) for steps in fields}


def _steps(root: Any, key: str, knobs: list[str], use: tuple[str, str]) -> Steps:
    """Split a dotted key into field names; the root may be named by its class, as in `run.name`.

    use: the value that the key is given, and the recipe's name, for the advice in an error.
    """
    steps = tuple(key.split("."))
    field_names = [f.name for f in dataclasses.fields(root)]
    if len(steps) > 1 and steps[0] not in field_names and steps[0] == type(root).__name__.lower():
        steps = steps[1:]
    node = root
    for i, step in enumerate(steps):
        here = ".".join(steps[:i])
        if isinstance(node, Model):
            raise ValueError(f"{key}: {here} is a model; change it by the knobs {', '.join(knobs)}")
        if not dataclasses.is_dataclass(node) or isinstance(node, type):
            what = "none" if node is None else f"a {type(node).__name__}"
            remedy = f"set {here} first, or remove {key}" if node is None else f"remove {key}"
            raise ValueError(f"{key}: {here} is {what} and has no field {step!r}; {remedy}")
        names = [f.name for f in dataclasses.fields(node) if f.init]
        if step not in names:
            candidates = [f"{here}.{n}" if here else n for n in names]
            candidates += [] if i else [*knobs, *_all_fields(root)]
            other_tools = advice(step, None if isinstance(use[0], ObjectText) else use[0], use[1])
            same = {name for name in candidates if name.rpartition(".")[2] == step}
            if other_tools and (not same or same & {option.setting for option in meant_options(step)}):
                raise ValueError(f"{key}={short_text(use[0])}: {other_tools}")
            close = nearest(key, list(dict.fromkeys(candidates)))
            raise ValueError(f"unknown key {key!r}; near: {', '.join(close)}")
        node = getattr(node, step)
    return steps


def _all_fields(root: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(root):
        value = getattr(root, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type | Model):
            yield from _all_fields(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _replace(node: Any, fields: dict[Steps, tuple[str, str]]) -> Any:
    """Return `node` with fields replaced, all fields of a dataclass at once, as it checks them together."""
    values: dict[str, Any] = {}
    for name in dict.fromkeys(steps[0] for steps in fields):
        now = getattr(node, name)
        below = {steps[1:]: item for steps, item in fields.items() if steps[0] == name}
        if () in below and len(below) > 1:
            keys = " and ".join(key for key, _ in below.values())
            raise ValueError(f"{keys}: one contains the other; set only one")
        if () in below:
            key, text = below[()]
            kind = type_hints(type(node)).get(name, UNANNOTATED)
            values[name] = _parse_as(key, text, kind, now)
            check_values({key: kind}, {key: values[name]})  # so that errors have the dotted name
        else:
            values[name] = _replace(now, below)
    return dataclasses.replace(node, **values) if values else node


# Help


def recipe_docstring(recipe: str) -> str:
    """Return the docstring of a config file, or its path if it has none."""
    _, module = _config_function(recipe)
    assert module is not None
    return inspect.cleandoc(module.__doc__ or short_path(Path(module.__file__ or recipe)))


def knob_comments(recipe: Recipe) -> dict[str, str]:
    """Return knob -> its description in a config file: the comment at the end of its line, or else
    `knob: text.` in the docstring of `config`.
    """
    fn, comments = _config_function(recipe)[0], dict[str, str]()
    for parameter in inspect.signature(fn).parameters.values():
        if _is_group(parameter.default):
            comments |= _comments(type(parameter.default))
    return comments | described_names(fn.__doc__ or "", _knobs(fn)) | _comments(fn)


def described_names(docstring: str, names: Iterable[str]) -> dict[str, str]:
    """Return name -> its description in a docstring, which ends at the next name or the end of a paragraph.

    >>> described_names("Settings. a: the first. b, c: others. Of both.\\n\\nMore about a.", ["a", "b", "c"])
    {'a': 'the first.', 'b': 'others. Of both.', 'c': 'others. Of both.'}
    """
    name, texts = "|".join(map(re.escape, names)), dict[str, str]()
    for paragraph in re.split(r"\n[ \t]*\n", docstring.partition(">>>")[0]) if name else ():
        parts = re.split(rf"(?:(?<=[.;)] )|^)((?:(?:{name}), )*(?:{name})): ", " ".join(paragraph.split()))
        for label, text in zip(parts[1::2], parts[2::2], strict=True):
            texts |= dict.fromkeys(label.split(", "), text.strip())
    return texts


def knob_owners(recipe: Recipe) -> dict[str, list[type]]:
    """Return knob -> the dataclasses of jaxft with this field that the knob sets: that of its group of knobs,
    and those that `config` passes it to; [] for a knob that only the recipe reads.
    """
    fn = _config_function(recipe)[0]
    groups = {n: type(p.default) for n, p in inspect.signature(fn).parameters.items() if _is_group(p.default)}
    owners: dict[str, list[type]] = {name: [] for name in _knobs(fn)}
    for name, knob in _knobs(fn).items():
        bases = inspect.getmro(groups[knob.group]) if knob.group else ()
        owners[name] += [cls for cls in bases if name in vars(cls).get("__annotations__", {})]
    for name, cls in _passed_on(fn, groups):
        if name in owners:
            owners[name].append(cls)
    return {name: [c for c in of if c.__module__.startswith("jaxft.")] for name, of in owners.items()}


def _passed_on(fn: Callable, groups: dict[str, type]) -> Iterator[tuple[str, type]]:
    """Yield (field, class) for each field of a dataclass that `fn` sets to a value with the variable of the
    same name, as in Rows(seed=seed). The class is that of the group in calls of a group's method, such as
    rows.source(Rows, seed=seed).
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(fn)))
    except (OSError, TypeError, SyntaxError):  # a function without a file
        return
    named = {**inspect.getclosurevars(fn).globals, **groups}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        is_method = isinstance(call.func, ast.Attribute)
        target = call.func.value if isinstance(call.func, ast.Attribute) else call.func
        cls = named.get(target.id) if isinstance(target, ast.Name) else None
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            continue
        fields = [] if is_method else [field.name for field in dataclasses.fields(cls) if field.init]
        positional = itertools.takewhile(lambda value: not isinstance(value, ast.Starred), call.args)
        passed = [*zip(fields, positional, strict=False), *((k.arg, k.value) for k in call.keywords)]
        for field, value in passed:
            if field and any(isinstance(n, ast.Name) and n.id == field for n in ast.walk(value)):
                yield field, cls


def _is_group(default: Any) -> bool:
    return dataclasses.is_dataclass(default) and not isinstance(default, type)


def _comments(definition: Any) -> dict[str, str]:
    """Return the comment at the end of the line of each parameter of a function, or each field of a class and
    its bases, by name. On a line with several, the comment belongs to the last.
    """
    comments: dict[str, str] = {}
    for cls in reversed(inspect.getmro(definition)) if isinstance(definition, type) else [definition]:
        try:
            source = textwrap.dedent("".join(inspect.getsourcelines(cls)[0]))
        except (OSError, TypeError):  # a builtin, or a class without a file
            continue
        node: Any = ast.parse(source).body[0]
        if isinstance(definition, type):
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
            starts = {n.lineno: ast.unparse(n.target) for n in fields}
            end = max((n.end_lineno or n.lineno for n in fields), default=0) + 1
        else:
            parameters = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            starts = {a.lineno: a.arg for a in parameters}
            end = node.body[0].lineno
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            line = token.start[0]
            above = [start for start in starts if start <= line < end]
            if token.type == tokenize.COMMENT and above:
                comments[starts[max(above)]] = token.string.lstrip("# ").strip()
    return comments


def as_written(value: Any, kind: Any = None) -> str:
    """Format a value as on the command line. kind: its annotation, whose short names are used.

    >>> as_written((0.9, None))
    '0.9,none'
    """
    if isinstance(value, tuple):
        if any(isinstance(item, str) and ("," in item or item != item.strip()) for item in value):
            return json.dumps(value)
        item = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None
        return ",".join(as_written(part, item) for part in value) + "," * (len(value) == 1)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if not callable(value):
        return str(value)
    full = str(describe(value).get("callable"))
    names = {long: short for k in (kind, *union_members(kind)) for short, long in short_names(k).items()}
    return names.get(full, full)
