"""The settings of a run as `jaxft settings` lists them: name, default, type, and their description in the
docstring of their section.
"""

import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.annotations import about
from jaxft.data.rows.shipped import ROOT, own_commands
from jaxft.models.model import Model
from jaxft.runs.settings.config import (
    as_written,
    described_names,
    knob_comments,
    knob_owners,
    recipe_docstring,
    recipe_knobs,
    type_hints,
)
from jaxft.runs.settings.option_names import OPTIONS
from jaxft.runs.settings.setting_values import (
    SHOWN_NAMES,
    can_be_written,
    describe_kind,
    find_recipe,
    short_names,
    union_members,
)

REQUIRED = dataclasses.MISSING
KNOBS = "Knobs (knob=value; other settings as section.field=value, see python scripts/settings.py {name}):"
LONGEST_KIND = 60  # characters in a recipe's table; a longer entry moves only its own comment


@dataclass(frozen=True)
class Setting:
    """A setting as `--help` lists it: a recipe's knob or a dotted field such as optim.lr.

    kind: how its values are written. default: as written, None where a recipe must set it. text: its
    description. section: the description of its section. names: names of functions, if they are too many for
    `kind`. elsewhere: (recipes, value) of recipes with another default.
    """

    name: str
    kind: str
    default: str | None
    text: str
    section: str = dataclasses.field(default="", compare=False)
    names: tuple[str, ...] = ()
    elsewhere: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False)

    @property
    def other_names(self) -> tuple[str, ...]:
        """Options of other tools that are this setting."""
        last = self.name.rpartition(".")[2]
        return tuple(option.name for option in OPTIONS if option.setting in (self.name, last))


def settings_of(section: Any, prefix: str = "") -> Iterator[Setting]:
    """Yield the settings of a section, a dataclass or an instance of one, and of the sections in it.

    An instance's values are the defaults. A section that is None is listed with the defaults of its class.
    """
    cls = section if isinstance(section, type) else type(section)
    texts, hints = descriptions(cls), type_hints(cls)
    for field in dataclasses.fields(cls):
        value = _default(field) if section is cls else getattr(section, field.name)
        kind, name = hints[field.name], f"{prefix}{field.name}"
        if not field.init or isinstance(value, Model) or _has_model(kind):
            continue
        inner = _section(value, kind)
        if inner is not None:
            yield from settings_of(inner, f"{name}.")
        elif can_be_written(kind):
            default = None if value is REQUIRED else as_written(value, kind)
            yield Setting(name, describe_kind(kind), default, texts.get(field.name, ""), _summary(cls))


def knobs_of(recipe: str, fields: Iterable[Setting]) -> Iterator[Setting]:
    """Yield the knobs of a recipe. fields: the dotted fields of its run.

    A knob's description is its comment in the recipe or its text in the docstring of `config`, or About(...)
    in its annotation; without these, that of the field that the recipe sets to it, as for micro of
    data.micro. A comment that begins with a field, such as `data.batch; ...`, stands for that field's
    description and adds to it.
    """
    by_name = {setting.name: setting for setting in fields}
    shortest_first = sorted(by_name.values(), key=lambda s: s.name.count("."))  # seed, not data.seed
    comments, owners = knob_comments(recipe), knob_owners(recipe)
    for name, knob in recipe_knobs(recipe).items():
        names = tuple(n for kind in (knob.kind, *union_members(knob.kind)) for n in short_names(kind))
        more = names if len(names) > SHOWN_NAMES else ()
        text = comments.get(name) or about(knob.kind) or _field_text(name, owners[name], shortest_first)
        field, _, addition = text.partition("; ")
        if "." in field and " " not in field:  # of a run that lacks the field, the addition is all there is
            described = first_sentence(by_name[field].text) if field in by_name else ""
            text = "; ".join(part for part in (described, addition) if part)
        yield Setting(name, knob.written_kind, knob.written, text, names=more)


def _field_text(name: str, owners: Collection[type], fields: Iterable[Setting]) -> str:
    """Return the description of the first of `fields` that a knob sets, of those with its name; "" without
    one. owners: see knob_owners. A group of knobs is no section, and its knob sets any field of that name.
    """
    sections = {_summary(base) for cls in owners for base in inspect.getmro(cls)}
    texts = [(f.section in sections, f.text) for f in fields if f.name.rpartition(".")[2] == name]
    return next((text for _, text in sorted(texts, key=lambda t: not t[0])), "") if owners else ""


def _summary(cls: type) -> str:
    """Return the first sentence of a class's docstring."""
    return first_sentence(" ".join((cls.__doc__ or "").split("\n\n")[0].split()))


def help_text(recipe: str, fields: Iterable[Setting] = ()) -> str:
    """Return the docstring of a config file and its knobs with their defaults, types and descriptions."""
    rows = []
    for knob in knobs_of(recipe, fields):
        setting = knob.name if knob.default is None else f"{knob.name}={knob.default}"
        rows.append((setting, knob.kind + ", required" * (knob.default is None), first_sentence(knob.text)))
    widths = [[len(row[i]) for row in rows if len(row[i]) <= LONGEST_KIND] for i in range(2)]
    width = [max(each, default=0) for each in widths]
    table = [f"  {a:{width[0]}}  {b:{width[1]}}  {c}".rstrip() for a, b, c in rows]
    name = Path(recipe).stem if find_recipe(recipe).parent == ROOT / "configs" else recipe
    heading = own_commands(KNOBS.format(name=name))
    return "\n".join([own_commands(recipe_docstring(recipe)), "", heading, *table])


def with_recipes(settings: Iterable[Setting], recipes: Mapping[str, Any]) -> Iterator[Setting]:
    """Yield the settings with `elsewhere` filled in. recipes: {recipe's name: the run that it returns}."""
    values = {recipe: {s.name: s.default for s in settings_of(run)} for recipe, run in recipes.items()}
    for setting in settings:
        by_value: dict[str, list[str]] = {}
        for recipe, of_run in values.items():
            value = of_run.get(setting.name) or setting.default
            if value != setting.default and setting.default is not None:
                by_value.setdefault(str(value), []).append(recipe)
        elsewhere = tuple((", ".join(recipes), value) for value, recipes in by_value.items())
        yield dataclasses.replace(setting, elsewhere=elsewhere)


def by_section(settings: Iterable[Setting]) -> dict[str, list[Setting]]:
    """Return heading -> settings, with a heading such as `optim: Optimizer settings` for each section."""
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        prefix = setting.name.rpartition(".")[0]
        groups.setdefault(f"{prefix or 'run'}: {setting.section}", []).append(setting)
    return groups


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is REQUIRED else field.default_factory()


def _section(value: Any, kind: Any) -> Any:
    """Return a field's section, None if it is none: its value, or the dataclass in its annotation."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return None if callable(value) else value
    classes = [c for c in union_members(kind) if isinstance(c, type) and dataclasses.is_dataclass(c)]
    return classes[0] if value in (None, REQUIRED) and classes and classes[0] is not Model else None


def _has_model(kind: Any) -> bool:
    """Return whether a field holds a section with a model, which only a recipe can make."""
    sections = (c for c in union_members(kind) if dataclasses.is_dataclass(c) and c is not Model)
    return any(Model in union_members(hint) for c in sections for hint in type_hints(c).values())


def descriptions(cls: type) -> dict[str, str]:
    """Return field -> its description in the docstrings of a dataclass and its bases.

    Docstrings describe fields as `name: text. other, third: text.`, before their examples.
    """
    names, texts = [field.name for field in dataclasses.fields(cls)], dict[str, str]()
    for base in reversed(inspect.getmro(cls)):
        texts |= described_names(vars(base).get("__doc__") or "", names)
    return texts


def matching(settings: Iterable[Setting], word: str) -> list[Setting]:
    """Return the settings whose name, description or name in another tool contains a word."""
    word = word.lower().lstrip("-")
    plain = word.replace("-", "_")
    return [
        s
        for s in settings
        if plain in s.name.lower()
        or re.search(rf"\b{re.escape(word)}", s.text, re.IGNORECASE)
        or plain in (name.lower() for name in s.other_names)
    ]


def listed(groups: Mapping[str, Iterable[Setting]], in_full: bool) -> str:
    """Return settings as text, a heading and a table for each group. in_full: with whole descriptions instead
    of their first sentences.
    """
    width = min(max(shutil.get_terminal_size((110, 20)).columns, 60), 140)
    return "\n\n".join(
        "\n".join([heading, *(line for s in group for line in _lines(s, width, in_full))])
        for heading, group in groups.items()
        if group
    )


def _lines(setting: Setting, width: int, in_full: bool) -> list[str]:
    text = setting.text.rstrip(".") if in_full else first_sentence(setting.text)
    left = f"  {setting.name}" + ("" if setting.default is None else f"={setting.default}")
    kind = setting.kind + ", set by the recipe" * (setting.default is None)
    if setting.elsewhere:
        kind += f" ({'; '.join(f'{recipes}: {value}' for recipes, value in setting.elsewhere)})"
    if in_full and setting.names:
        kind += f". Names: {', '.join(setting.names)}"
    column = min(34, width // 3)
    body = textwrap.wrap(f"{kind}: {text}" if text else kind, width - column - 2)
    if len(left) > column:
        return [left, *(f"{'':{column}}  {line}" for line in body)]
    return [f"{left:{column}}  {body[0]}", *(f"{'':{column}}  {line}" for line in body[1:])]


def first_sentence(text: str) -> str:
    """Return the first sentence of a description, which ends at a full stop before a capital letter."""
    return re.split(r"(?<=[.])(?<!Dr[.])\s+(?=[A-Z\"(])", text)[0].rstrip(".")
