"""Names of settings, without importing jax: read from a recipe's source, or meant by a name of another tool.

Completion of the shell reads a recipe's settings from its source in a few milliseconds: names as `jaxft
settings` lists them; values of booleans, literals and short names of functions.

TRL, Axolotl, LLaMA-Factory and Unsloth have other names for the same settings (see option_names.py), pass
them as `--name value`, and read YAML or JSON: `learning_rate=1e-4`, `--lr 1e-4`, `lora.yml`. Errors say what
to write.
"""

import ast
import difflib
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxft import annotations
from jaxft.data.rows.shipped import PACKAGE, ROOT
from jaxft.runs.settings.option import Option, normalised
from jaxft.runs.settings.option_names import find_options

RUN_FILE = PACKAGE / "train" / "settings.py"
WRITABLE = ("bool", "int", "float", "str", "Path")
ASSIGNED = r"(?:\w+(?:, \w+)*(?:: [^=\n]+)? = )+"  # `A = `, `A: int = `, `A, B = C = `
STATEMENT = re.compile(rf"@|class |def |from |{ASSIGNED}")  # at the beginning of a line


class Definition(NamedTuple):
    """A piece of source code, such as an annotation, and the file whose names it uses."""

    node: ast.AST
    file: Path


class SettingSource(NamedTuple):
    """A setting by name, a recipe's knob or a dotted field, with its annotation."""

    name: str
    kind: Definition | None


@functools.cache
def statements(file: Path) -> dict[str, str]:
    """Return the source of each class, function, assignment and import at the top of a file, by the names
    that it defines; {} for a file that cannot be read.

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
    sources: dict[str, str] = {}
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        source = "".join(lines[start:end])
        sources |= dict.fromkeys(defined_names(source), source)
    return sources


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
    """Return the class, function, assigned value or import of a name at the top of a file, or None."""
    source = statements(file).get(name, "")
    if re.search(r"^class ", source, re.MULTILINE):
        source = re.split(r"\n\n    (?:def|@)", source)[0]  # its fields, without methods
    try:
        node = ast.parse(source).body[0]
    except (SyntaxError, ValueError, IndexError):
        return None
    return node.value if isinstance(node, ast.Assign | ast.AnnAssign) else node


def defined_as(name: ast.AST, file: Path) -> Definition | None:
    """Return the definition that the expression NAME or MODULE.NAME refers to in `file`: from `file`, or from
    the module of jaxft that it imports it from; None for any other expression or name.
    """
    if isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name):  # processes.Hosts
        statement = definition(name.value.id, file)
        if isinstance(statement, ast.ImportFrom):
            return defined_as(ast.Name(name.attr), module_file(f"{statement.module}.{name.value.id}"))
    defined = definition(name.id, file) if isinstance(name, ast.Name) else None
    if isinstance(defined, ast.ImportFrom) and (defined.module or "").startswith("jaxft."):
        return defined_as(name, module_file(defined.module or ""))
    return None if defined is None or isinstance(defined, ast.ImportFrom) else Definition(defined, file)


def module_file(module: str) -> Path:
    """Return the file of a module of jaxft."""
    return PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")


def members(kind: Definition) -> list[Definition]:
    """Return the parts of a union annotation, such as int and None of `int | None`; [kind] for an annotation
    that is no union. A type alias is replaced by its value.
    """
    node, file = kind
    if isinstance(node, ast.BinOp):
        return [m for side in (node.left, node.right) for m in members(Definition(side, file))]
    if isinstance(node, ast.Name | ast.Attribute):
        defined = defined_as(node, file)
        return members(defined) if defined and not isinstance(defined.node, ast.ClassDef) else [kind]
    return [kind]


def section_class(kind: Definition) -> Definition | None:
    """Return the dataclass among the members of an annotation, None without one."""
    for member in members(kind):
        defined = defined_as(member.node, member.file)
        if defined and isinstance(defined.node, ast.ClassDef) and defined.node.name != "Model":
            marks = [ast.unparse(mark) for mark in defined.node.decorator_list]
            if any(mark.startswith("dataclass") for mark in marks):
                return defined
    return None


def base_classes(cls: Definition) -> Iterator[Definition]:
    """Yield the base classes of a class that jaxft defines, the topmost first, then the class itself."""
    assert isinstance(cls.node, ast.ClassDef)
    for base in cls.node.bases:
        defined = defined_as(base, cls.file)
        if defined and isinstance(defined.node, ast.ClassDef):
            yield from base_classes(defined)
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
    listed = []
    for argument in (*config.args.args, *config.args.kwonlyargs):
        kind = Definition(argument.annotation, recipe) if argument.annotation else None
        group = section_class(kind) if kind else None
        inner = fields_of(group) if group else {argument.arg: kind}
        listed += [SettingSource(name, annotation) for name, annotation in inner.items()]
    return listed


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
    """Return the DataSettings class of jaxft that a recipe's `config` names, None if it names none."""
    config = definition("config", recipe)
    for node in ast.walk(config) if config else ():
        is_class = isinstance(node, ast.Name) and node.id[:1].isupper()
        defined = defined_as(node, recipe) if is_class else None
        if defined and isinstance(defined.node, ast.ClassDef):
            names = [base.node.name for base in base_classes(defined)]  # type: ignore[attr-defined]
            if "DataSettings" in names:
                return defined
    return None


def is_writable(kind: Definition) -> bool:
    """Return whether the command line can set a value of an annotation, see setting_values.can_be_written."""
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
    texts: list[str] = []
    for node, file in members(kind):
        if isinstance(node, ast.Constant) and node.value is None:
            texts.append("none")
        elif isinstance(node, ast.Name) and node.id == "bool":
            texts += ["true", "false"]
        elif isinstance(node, ast.Subscript):
            inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            outer = ast.unparse(node.value)
            if outer == "Literal":
                for item in inner:
                    literal = isinstance(item, ast.Constant)
                    texts += [str(ast.literal_eval(item))] if literal else choices(Definition(item, file))
            elif outer == "Annotated":
                for mark in inner[1:]:
                    texts += named_by(mark, file)
                texts += choices(Definition(inner[0], file))
            elif outer == "tuple":
                texts += choices(Definition(inner[0], file))
    return list(dict.fromkeys(texts))


def named_by(mark: ast.expr, file: Path) -> list[str]:
    """Return the values in an item of Annotated[...], `ShortNames.of(TABLE)` or `one_of(CHOICES)`."""
    if not isinstance(mark, ast.Call):
        return []
    if ast.unparse(mark.func) == "ShortNames.of":
        return list(annotations.FUNCTION_TABLES.get(ast.unparse(mark.args[0]), ()))
    return list(constant_texts(mark.args[0], file)) if ast.unparse(mark.func) == "one_of" else []


def constant_texts(node: ast.AST, file: Path) -> Iterator[str]:
    """Yield the constants in an expression, a constant or a tuple of them, as on the command line. A name is
    replaced by its value in `file`; anything else is skipped.
    """
    if defined := defined_as(node, file):
        node, file = defined
    if isinstance(node, ast.Constant):
        yield "none" if node.value is None else str(node.value)
    for item in node.elts if isinstance(node, ast.Tuple) else ():
        yield from constant_texts(item.value if isinstance(item, ast.Starred) else item, file)


def takes_text(kind: Definition) -> bool:
    """Return whether an annotation allows values that `choices(kind)` does not list: any text, such as a
    path, or a function as FILE.py:NAME. A tuple allows what its first type allows.
    """
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


SETTINGS_FILES = (".yml", ".yaml", ".json")  # of other tools
ROW_FILES = (".jsonl", ".csv", ".tsv", ".parquet")
ALL_WEIGHTS = {  # advice for full=true in recipes without this knob; in any other: adapter=none
    "sft": "the recipe sft_full trains all weights",
    "sft_full": "this recipe trains all weights; leave it out",
}


def advice(name: str, text: str | None = None, recipe: str | None = None) -> str | None:
    """Return one line of advice for an option of another tool; None for an unknown name, and for a name that
    is a setting of the recipe too.

    text: its value on the command line, None for any. recipe: the recipe's name.

    >>> advice("learning_rate", "1e-4")
    'learning_rate is lr here; write lr=1e-4'
    """
    options = find_options(name, recipe=recipe) if text is None else meant_options(name, recipe)
    lines = {line: option.recipe for option in options if (line := _line(option, text, recipe))}
    if recipe is None and len(set(lines.values())) > 1:
        lines = {f"{line} (recipes such as {of})": of for line, of in lines.items()}
    return "; or ".join(lines) or None


def name_of_loss(theirs: str) -> str | None:
    """Return a sentence with the settings that do the same as a loss_type of TRL, None for an unknown one.

    >>> name_of_loss("dr_grpo")
    "TRL's loss_type dr_grpo is token_weights=constant_length"
    """
    for option in find_options("loss_type"):
        if theirs in option.values:
            ours = option.values[theirs] or f"the default of recipes such as {option.recipe}"
            return f"TRL's loss_type {theirs} is {ours}"
    return None


def meant_options(key: str, recipe: str | None = None) -> tuple[Option, ...]:
    """Return the options of other tools that an unknown key of a command line may mean, () for none.

    >>> [option.name for option in meant_options("dora")]
    ['use_dora']
    """
    if key == "full":  # of a recipe without this knob
        return find_options("full_finetuning", recipe=recipe)
    return find_options(key, recipe=recipe) or find_options(f"use_{normalised(key)}", recipe=recipe)


def _line(option: Option, text: str | None, recipe: str | None) -> str:
    """Return the advice about one option, "" for none. text, recipe: as in `advice`."""
    elsewhere = option.recipe not in ("sft", recipe)
    if option.name == option.setting:
        return f"{option.name} is a setting of recipes such as {option.recipe}" if elsewhere else ""
    if text is None or option.kind != "same" or option.setting is None:
        return option.describe()
    try:
        written = " ".join(option.overrides(text))
    except ValueError:  # the value has no equivalent
        return option.describe()
    if not written:
        return f"{option.name}={text} is the default here; leave it out"
    if written == "full=true" and "full" not in setting_names(recipe or ""):
        return ALL_WEIGHTS.get(recipe or "", "adapter=none trains all weights")
    where = f", in recipes such as {option.recipe}" if elsewhere else ""
    note = f" ({option.note})" if option.note else ""
    return f"{option.name} is {option.setting} here{where}; write {written}{note}"


def options_as_settings(argv: Sequence[str], options: Sequence[str]) -> str | None:
    """Return the text of an error about words --NAME in `argv` that are not in `options`, with the settings
    to write instead; None if there are none. A file of another tool's settings in place of a recipe is an
    error too.

    >>> options_as_settings(["sft", "--lr", "1e-4"], ["--help"])
    '--lr 1e-4: settings are written without dashes; write lr=1e-4'
    """
    recipe = next((word for word in argv if word[:1] != "-" and "=" not in word), "")
    is_recipe = recipe == argv[0] or "--config" in argv  # and no option's value
    if is_recipe and (refusal := settings_file(recipe)):
        return refusal
    given, plain, lines = list[str](), list[str](), list[str]()
    for place, word in enumerate(argv):
        option, equals, text = word.partition("=")
        if not option.startswith("--") or option in options or option == "--":
            continue
        if same := [name for name in options if normalised(name) == normalised(option)]:  # --dry_run
            return f"unrecognized argument {option}; write {same[0]}"
        following = argv[place + 1] if place + 1 < len(argv) else "--"
        has_value = not following.startswith("--") and "=" not in following
        value = text if equals else following if has_value else "true"
        given.append(f"{option} {value}" if equals or has_value else option)
        if line := advice(option, value, Path(recipe).stem):
            lines.append(line)
        elif setting := next(iter(settings_called(normalised(option), recipe)), None):
            plain.append(f"{setting}={value}")
        else:
            near = ", ".join(nearest_settings(normalised(option), [*options, *setting_names(recipe)]))
            return f"unrecognized argument {option}; near: {near}"
    if plain:
        lines.append(f"settings are written without dashes; write {' '.join(plain)}")
    return f"{' '.join(given)}: {join_lines(lines)}" if given else None


def join_lines(lines: Sequence[str]) -> str:
    """Join lines of advice. Where neighbours have the same text after "; ", it is written once, at the end.

    >>> join_lines(["a is x here; see x", "b is x here; see x"])
    'a is x here, b is x here; see x'
    """
    parts = [line.partition("; ") for line in lines]
    groups = itertools.groupby(parts, key=lambda part: part[2] or part[0])
    return "; ".join(
        ", ".join(head for head, _, _ in group) + (f"; {note}" if note != group[0][0] else "")
        for note, group in ((note, list(group)) for note, group in groups)
    )


def near_options(argv: Sequence[str], options: Sequence[str]) -> str | None:
    """Return the text of an error about the first word --NAME in `argv` that is not in `options`, with
    similar options; None without such a word or a similar option.
    """
    unknown = [word.partition("=")[0] for word in argv if word.startswith("--") and word != "--"]
    wrong = next((option for option in unknown if option not in options), None)
    near = ", ".join(difflib.get_close_matches(wrong or "", options, 3, 0.3))
    return f"unrecognized argument {wrong}; near: {near}" if wrong and near else None


def nearest_settings(name: str, settings: Sequence[str]) -> list[str]:
    """Return the settings and options whose last parts are the most similar to `name`.

    >>> nearest_settings("wramup", ["optim.warmup", "optim.lr", "data.warm_up"])
    ['optim.warmup', 'data.warm_up']
    """
    first = reversed(settings)  # so that of two with the same last part the first wins
    last = {setting.lstrip("-").rpartition(".")[2]: setting for setting in first}
    return [last[near] for near in difflib.get_close_matches(name, last, 3, 0.3)]


def setting_names(recipe: str) -> list[str]:
    """Return the knobs and dotted fields of a recipe; for an unknown one, of sft."""
    shipped = ROOT / "configs" / f"{recipe}.py"
    path = Path(recipe) if recipe.endswith(".py") else shipped
    path = path if path.is_file() else ROOT / "configs" / "sft.py"
    return [setting.name for setting in (*knobs(path), *dotted_fields(path))]


def settings_called(name: str, recipe: str) -> list[str]:
    """Return the setting of a recipe with this name, or else the settings with this last part.

    >>> settings_called("eval_every", "sft")
    ['loop.eval_every']
    """
    names = setting_names(recipe)
    return [name] if name in names else [x for x in names if x.rpartition(".")[2] == name]


def settings_file(path: str) -> str | None:
    """Return advice about a file of rows, or of another tool's settings, in place of a recipe; None for
    other files.
    """
    file, suffix = Path(path), Path(path).suffix.lower()
    if file.is_file() and suffix in (".json", *ROW_FILES):
        with file.open("rb") as stream:
            is_list = stream.read(100).lstrip()[:1] == b"["
        if is_list or suffix != ".json":
            return f"{path}: this is a file of rows; name a recipe first, such as `sft data={path}`"
    if suffix not in SETTINGS_FILES:
        return None
    return (
        f"{path}: a recipe is a Python file, and this is a file of settings; `python scripts/convert.py "
        f"{path}` prints the command for an Axolotl, LLaMA-Factory or TRL file"
    )
