"""The settings of a recipe read from source, for the shell's completion: without jax, in a few milliseconds.

Names are as `jaxft settings` lists them; values are of booleans, literals and short names of functions.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxft import annotations
from jaxft.data.rows.shipped import PACKAGE

RUN_FILE = PACKAGE / "train" / "settings.py"
WRITABLE = ("bool", "int", "float", "str", "Path")
ASSIGNED = r"(?:\w+(?:, \w+)*(?:: [^=\n]+)? = )+"  # `A = `, `A: int = `, `A, B = C = `
STATEMENT = re.compile(rf"@|class |def |from |{ASSIGNED}")  # at the beginning of a line


class Definition(NamedTuple):
    """A syntax node and the file in whose names it is written."""

    node: ast.AST
    file: Path


class SettingSource(NamedTuple):
    """A knob or a dotted field, and its annotation."""

    name: str
    kind: Definition | None


@functools.cache
def statements(file: Path) -> dict[str, str]:
    """Return name -> source of the class, function, assignment or import at the top of a file that defines
    it; {} for a file that cannot be read.

    A statement begins at a line that is not indented. Parsing all of a file would take most of the time.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, ValueError):
        return {}
    starts = [
        number
        for number, line in enumerate(lines)
        if STATEMENT.match(line) and not (number and lines[number - 1].startswith("@"))
    ]
    found: dict[str, str] = {}
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        source = "".join(lines[start:end])
        found |= dict.fromkeys(defined_names(source), source)
    return found


def defined_names(source: str) -> list[str]:
    """Return the names that a statement defines."""
    if match := re.search(r"\A(?:@.*\n)*(?:class|def) (\w+)", source):
        return [match[1]]
    if match := re.match(r"from \S+ import (.*)", source, re.DOTALL):
        names = re.sub(r"#.*|[()]", "", match[1]).split(",")
        return [name.split()[-1] for name in names if name.strip()]
    match = re.match(ASSIGNED, source)
    return re.findall(r"\w+", re.sub(r": [^=]+", " ", match[0])) if match else []


@functools.cache
def definition(name: str, file: Path) -> ast.AST | None:
    """Return the class, function, assigned value or import of a name at the top of a file."""
    source = statements(file).get(name, "")
    if re.search(r"^class ", source, re.MULTILINE):
        source = re.split(r"\n\n    (?:def|@)", source)[0]  # its fields, without methods
    try:
        node = ast.parse(source).body[0]
    except (SyntaxError, ValueError, IndexError):
        return None
    return node.value if isinstance(node, ast.Assign | ast.AnnAssign) else node


def defined_as(name: ast.AST, file: Path) -> Definition | None:
    """Return the definition of a name, or of a name in an imported module, in jaxft or in the file."""
    if isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name):  # processes.Hosts
        statement = definition(name.value.id, file)
        if isinstance(statement, ast.ImportFrom):
            return defined_as(ast.Name(name.attr), module_file(f"{statement.module}.{name.value.id}"))
    found = definition(name.id, file) if isinstance(name, ast.Name) else None
    if isinstance(found, ast.ImportFrom) and (found.module or "").startswith("jaxft."):
        return defined_as(name, module_file(found.module or ""))
    return None if found is None or isinstance(found, ast.ImportFrom) else Definition(found, file)


def module_file(module: str) -> Path:
    """Return the file of a module of jaxft."""
    return PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")


def members(kind: Definition) -> list[Definition]:
    """Return the members of a union, or the annotation alone; aliases and Annotated are looked through."""
    node, file = kind
    if isinstance(node, ast.BinOp):
        return [m for side in (node.left, node.right) for m in members(Definition(side, file))]
    if isinstance(node, ast.Name | ast.Attribute):
        found = defined_as(node, file)
        return members(found) if found and not isinstance(found.node, ast.ClassDef) else [kind]
    return [kind]


def section_class(kind: Definition) -> Definition | None:
    """Return the dataclass among the members of an annotation, None without one."""
    for member in members(kind):
        found = defined_as(member.node, member.file)
        if found and isinstance(found.node, ast.ClassDef) and found.node.name != "Model":
            marks = [ast.unparse(mark) for mark in found.node.decorator_list]
            if any(mark.startswith("dataclass") for mark in marks):
                return found
    return None


def base_classes(cls: Definition) -> Iterator[Definition]:
    """Yield a class's bases in jaxft and theirs, then the class itself."""
    assert isinstance(cls.node, ast.ClassDef)
    for base in cls.node.bases:
        found = defined_as(base, cls.file)
        if found and isinstance(found.node, ast.ClassDef):
            yield from base_classes(found)
    yield cls


def fields_of(cls: Definition) -> dict[str, Definition]:
    """Return field -> annotation of a dataclass and its bases, in order."""
    return {
        line.target.id: Definition(line.annotation, base.file)
        for base in base_classes(cls)
        for line in base.node.body  # type: ignore[attr-defined]
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and "ClassVar" not in ast.unparse(line.annotation)
    }


def knobs(recipe: Path) -> list[SettingSource]:
    """Return the knobs of a recipe: the parameters of config(...), and the fields of groups of knobs."""
    config = definition("config", recipe)
    if not isinstance(config, ast.FunctionDef):
        return []
    found = []
    for argument in (*config.args.args, *config.args.kwonlyargs):
        kind = Definition(argument.annotation, recipe) if argument.annotation else None
        group = section_class(kind) if kind else None
        inner = fields_of(group) if group else {argument.arg: kind}
        found += [SettingSource(name, annotation) for name, annotation in inner.items()]
    return found


def dotted_fields(recipe: Path) -> list[SettingSource]:
    """Return the fields of a recipe's run that the command line can set."""
    run = defined_as(ast.Name("Run"), RUN_FILE)
    return list(_fields_below(run, "", data_class(recipe))) if run else []


def _fields_below(cls: Definition, prefix: str, data: Definition | None) -> Iterator[SettingSource]:
    for name, kind in fields_of(cls).items():
        inner = data if prefix + name == "data" else section_class(kind)
        if inner is not None and "model" in fields_of(inner):
            continue  # a section with a model, which only a recipe can make
        if inner is not None:
            yield from _fields_below(inner, f"{prefix}{name}.", data)
        elif any(is_writable(member) for member in members(kind)):
            yield SettingSource(prefix + name, kind)


def data_class(recipe: Path) -> Definition | None:
    """Return the class of data that a recipe's `config` names, None if it names none of jaxft's."""
    config = definition("config", recipe)
    for node in ast.walk(config) if config else ():
        is_class = isinstance(node, ast.Name) and node.id[:1].isupper()
        found = defined_as(node, recipe) if is_class else None
        if found and isinstance(found.node, ast.ClassDef):
            names = [base.node.name for base in base_classes(found)]  # type: ignore[attr-defined]
            if "DataSettings" in names:
                return found
    return None


def is_writable(kind: Definition) -> bool:
    """Return whether a member of a union can be written on the command line; see parse.can_be_written."""
    node, file = kind
    if isinstance(node, ast.Constant):
        return node.value is not None and node.value is not Ellipsis
    if isinstance(node, ast.Subscript):
        outer = ast.unparse(node.value)
        if outer == "tuple":
            items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            parts = [part for item in items for part in members(Definition(item, file))]
            return all(is_writable(part) for part in parts if not isinstance(part.node, ast.Constant))
        return outer in ("Literal", "Callable", "Annotated")
    return ast.unparse(node) in (*WRITABLE, "Callable")


def choices(kind: Definition) -> list[str]:
    """Return the values that an annotation lists: of booleans, literals, None, short names of functions."""
    found: list[str] = []
    for node, file in members(kind):
        if isinstance(node, ast.Constant) and node.value is None:
            found.append("none")
        elif isinstance(node, ast.Name) and node.id == "bool":
            found += ["true", "false"]
        elif isinstance(node, ast.Subscript):
            inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            outer = ast.unparse(node.value)
            if outer == "Literal":
                for item in inner:
                    literal = isinstance(item, ast.Constant)
                    found += [str(ast.literal_eval(item))] if literal else choices(Definition(item, file))
            elif outer == "Annotated":
                for mark in inner[1:]:
                    found += named_by(mark, file)
                found += choices(Definition(inner[0], file))
            elif outer == "tuple":
                found += choices(Definition(inner[0], file))
    return list(dict.fromkeys(found))


def named_by(mark: ast.expr, file: Path) -> list[str]:
    """Return the texts that a mark of an annotation lists: `ShortNames.of(TABLE)`, `one_of(CHOICES)`."""
    if not isinstance(mark, ast.Call):
        return []
    if ast.unparse(mark.func) == "ShortNames.of":
        return list(annotations.FUNCTION_TABLES.get(ast.unparse(mark.args[0]), ()))
    return list(constant_texts(mark.args[0], file)) if ast.unparse(mark.func) == "one_of" else []


def constant_texts(node: ast.AST, file: Path) -> Iterator[str]:
    """Yield the constants of a tuple, or one constant, as written; names are looked up, others skipped."""
    if found := defined_as(node, file):
        node, file = found
    if isinstance(node, ast.Constant):
        yield "none" if node.value is None else str(node.value)
    for item in node.elts if isinstance(node, ast.Tuple) else ():
        yield from constant_texts(item.value if isinstance(item, ast.Starred) else item, file)


def takes_text(kind: Definition) -> bool:
    """Return whether an annotation takes other text too, such as the path of a file."""
    for node, file in members(kind):
        inner = node.slice if isinstance(node, ast.Subscript) else None
        first = inner.elts[0] if isinstance(inner, ast.Tuple) else inner
        outer = ast.unparse(node.value if isinstance(node, ast.Subscript) else node)
        if outer in ("str", "Path", "Callable"):
            return True
        closed = inner is not None and "one_of(" in ast.unparse(inner)
        if outer in ("tuple", "Annotated") and first and not closed and takes_text(Definition(first, file)):
            return True
    return False
