"""A conversion as text: a `jaxft train` command, a report about the options, and a recipe file.

The recipe file is a copy of a shipped recipe whose defaults are the converted settings.
"""

import ast
import json
import re
import shlex
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.cli.convert.draft import Draft, GivenOption
from jaxft.data.rows.shipped import ROOT
from jaxft.runs.settings.config import Knob, recipe_knobs
from jaxft.runs.settings.setting_values import describe, parse_value
from jaxft.runs.terminal import printable_line

UNKNOWN_HARDWARE = "not known; not measured"  # the line that jaxft list reads


class Edit(NamedTuple):
    """A replacement in a source file: `text` in place of the bytes from `start` up to `end`."""

    start: int
    end: int
    text: str


def write_recipe(path: Path, draft: Draft, lines: list[str]) -> None:
    """Write a recipe with a conversion's settings. lines: comments below its docstring. Raises ValueError if
    `path` exists or does not end in .py.
    """
    if path.suffix != ".py":
        better = path / "mine.py" if path.is_dir() else path.with_suffix(".py")
        raise ValueError(f"--out {path}: a recipe is a Python file; write --out {better}")
    if path.exists():
        raise ValueError(f"--out {path}: the file exists; remove it, or write another name")
    path.write_text(recipe_text(draft, lines), encoding="utf-8")


def recipe_text(draft: Draft, lines: list[str]) -> str:
    """Return the source of a recipe with a conversion's settings. lines: comments below its docstring."""
    head, returned, tail = (ROOT / "configs" / f"{draft.recipe}.py").read_bytes().rpartition(b"\n    return ")
    source = head + returned + re.sub(rb"  # .*", b"", tail)  # without remarks about the recipe's own rows
    tree = ast.parse(source)
    knobs = recipe_knobs(draft.recipe)
    given = [(setting, *setting.partition("=")[::2]) for setting in draft.settings]
    values = {name: _Code.of(parse_value(text, knobs[name].kind)) for _, name, text in given if name in knobs}
    fields = [setting for setting, name, _ in given if name not in knobs]
    config = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "config")
    edits = [_docstring(source, tree, draft, lines), *_defaults(source, config, knobs, values)]
    imports = sorted({line for code in values.values() for line in code.imports})
    if fields:
        edits.append(_returned(source, config, fields))
        imports.append("from jaxft.runs.settings.config import with_fields")
    last = max(n.end_lineno or 0 for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom))
    at = _offset(source, last + 1, 0)
    edits.append(Edit(at, at, "".join(f"{line}\n" for line in imports)))
    for edit in sorted(edits, reverse=True):
        source = source[: edit.start] + edit.text.encode() + source[edit.end :]
    compile(source, "recipe", "exec")
    return source.decode()


class _Code(NamedTuple):
    """A value as Python source, and the imports that it needs."""

    text: str
    imports: tuple[str, ...] = ()

    @classmethod
    def of(cls, value: Any) -> "_Code":
        """Return the source of a value, with double quotes."""
        if callable(value):
            module, _, name = str(describe(value)["callable"]).rpartition(":")
            return cls(name, (f"from {module} import {name}",))
        if isinstance(value, tuple):
            parts = [cls.of(item) for item in value]
            imports = tuple(line for part in parts for line in part.imports)
            return cls(f"({''.join(f'{part.text}, ' for part in parts).rstrip()})", imports)
        return cls(json.dumps(value) if isinstance(value, str) else repr(value))


def _docstring(source: bytes, tree: ast.Module, draft: Draft, lines: list[str]) -> Edit:
    """Return the edit that replaces a recipe's docstring by one about the conversion.

    source, tree: the shipped recipe as text and parsed. lines: comments below the docstring.
    """
    name = re.sub(r"[^\w .-]", "_", draft.source.file.name)
    comments = [
        part
        for line in map(printable_line, lines)
        for part in textwrap.wrap(line, 108, initial_indent="# ", subsequent_indent="#     ")
    ]
    text = (
        f'"""The settings of {name}, a configuration of {draft.source.tool}, by jaxft convert.\n\n'
        f'Hardware: {UNKNOWN_HARDWARE}.\n"""\n\n' + "\n".join(comments)
    )
    return _replacement(source, tree.body[0], text)


def _defaults(
    source: bytes, config: ast.FunctionDef, knobs: dict[str, Knob], values: dict[str, _Code]
) -> list[Edit]:
    """Return the edits that change the defaults of a recipe's parameters.

    config: the recipe's function. knobs: its knobs by name. values: knob -> its new default.

    A knob of a group, such as RowKnobs, changes the call that is the default of the group's parameter.
    """
    arguments = config.args.args
    first = len(arguments) - len(config.args.defaults)
    edits = []
    for argument, default in zip(arguments[first:], config.args.defaults, strict=True):
        inside = {name: code for name, code in values.items() if knobs[name].group == argument.arg}
        if inside:
            edits.append(_replacement(source, default, _group(source, default, knobs, inside)))
        elif argument.arg in values:
            edits.append(_replacement(source, default, values[argument.arg].text))
    return edits


def _group(source: bytes, default: ast.expr, knobs: dict[str, Knob], values: dict[str, _Code]) -> str:
    """Return the source of a group's default with changed values, such as RowKnobs(data="rows.jsonl").

    default: the present call. knobs: the recipe's, by name. values: knob of this group -> its new value.
    """
    assert isinstance(default, ast.Call)
    names = [name for name, knob in knobs.items() if knob.group == knobs[next(iter(values))].group]
    texts = dict(zip(names, (_text(source, argument) for argument in default.args)))
    texts |= {keyword.arg or "": _text(source, keyword.value) for keyword in default.keywords}
    texts |= {name: code.text for name, code in values.items()}
    body = "".join(f"        {name}={text},\n" for name, text in texts.items())
    return f"{_text(source, default.func)}(\n{body}    )"


def _returned(source: bytes, config: ast.FunctionDef, fields: list[str]) -> Edit:
    """Return the edit that makes `config` return its Run with other fields. config: the recipe's function.
    fields: `name=value`, such as loop.steps=20.
    """
    returned = next(n for n in ast.walk(config) if isinstance(n, ast.Return))
    written = "".join(f"        {json.dumps(field)},\n" for field in fields)
    text = f"run = {_text(source, returned.value)}\n    return with_fields(\n        run,\n{written}    )"
    return _replacement(source, returned, text)


def _replacement(source: bytes, node: Any, text: str) -> Edit:
    start = _offset(source, node.lineno, node.col_offset)
    return Edit(start, _offset(source, node.end_lineno, node.end_col_offset), text)


def _text(source: bytes, node: Any) -> str:
    return ast.get_source_segment(source.decode(), node) or ""


def _offset(source: bytes, line: int, column: int) -> int:
    """Return the byte offset of a position as ast counts it: lines from 1, columns in bytes from 0."""
    return sum(map(len, source.splitlines(keepends=True)[: line - 1])) + column


LINE = 100  # characters of a line of the command
METHOD = {"sft": "SFT", "sft_full": "SFT", "dpo": "DPO", "kto": "KTO", "orpo": "ORPO", "simpo": "SimPO",
          "reward": "a reward model", "grpo": "GRPO", "ppo": "PPO", "online_dpo": "online DPO",
          "pretrain": "continued pre-training",
          "process_reward": "a process reward model"}  # fmt: skip


def command(draft: Draft) -> str:
    """Return `jaxft train RECIPE NAME=VALUE ...`, quoted for the shell, in lines that end in a backslash."""
    lines, line = [], f"jaxft train {draft.recipe}"
    for setting in map(shlex.quote, draft.settings):
        if len(line) + len(setting) + 3 > LINE:
            lines.append(line)
            line = "   "
        line += f" {setting}"
    return " \\\n".join([*lines, line])


def conversion_lines(draft: Draft) -> list[str]:
    """Return the lines of a report: the tool, counts of options by outcome, the options that are converted
    with a difference or not at all, and notes.
    """
    tool = draft.source.tool
    counts = [
        (len(draft.same), "converted"),
        (len({option.name for option, _ in draft.otherwise}), "converted with a difference"),
        (len({option.name for option, _ in draft.lost}), "not converted"),
        (len(draft.unneeded), "needing no setting"),
        (len(draft.empty), "empty"),
    ]
    listed = ", ".join(f"{count} {how}" for count, how in counts if count)
    lines = [f"{draft.source.file}: {METHOD[draft.recipe]} of {tool}; options: {listed}"]
    lines += _section("converted with a difference", draft.otherwise)
    lines += _section("not converted", draft.lost)
    if draft.unneeded:
        lines.append(f"need no setting: {', '.join(option.name for option in draft.unneeded)}")
    if draft.empty:
        lines.append(f"empty, so the tool's default: {', '.join(option.name for option in draft.empty)}")
    if draft.defaults:
        lines.append(f"set because {tool}'s defaults differ: {' '.join(draft.defaults)}")
    lines += [f"note: {note}" for note in draft.notes]
    return [" " * (len(line) - len(line.lstrip())) + printable_line(line) for line in lines]


def _section(title: str, pairs: Iterable[tuple[GivenOption, str]]) -> list[str]:
    """Return `title` and a line per remark with its options, or [] without pairs. pairs: (option, remark)."""
    by_remark: dict[str, list[GivenOption]] = {}
    for option, remark in pairs:
        by_remark.setdefault(remark, []).append(option)
    lines = []
    for remark, options in by_remark.items():
        where = [str(option.line) for option in options if option.line is not None]
        at = f"line {', '.join(dict.fromkeys(where))} " if where else ""
        lines.append(f"  {at}{'; '.join(map(str, options))} -> {remark}")
    return [f"{title}:", *lines] if lines else []
