"""A conversion under way: options that are left, settings that are found, and lines about the rest."""

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from jaxft.cli.convert.source import Expression, ForeignConfig, GivenOption, short_value
from jaxft.runs.settings.option_names import (
    AXOLOTL,
    FACTORY,
    OPTIONS,
    PEFT,
    TRL,
    UNSLOTH,
    Option,
    as_text,
    find_options,
    normalised,
)

LARGEST_NUMBER = 2**53
LOOKUP = {  # tool -> the tools whose options its files have, most specific first; then any
    TRL: (TRL, PEFT),
    UNSLOTH: (UNSLOTH, TRL, PEFT),
    AXOLOTL: (AXOLOTL,),
    FACTORY: (FACTORY,),
}


@dataclass
class Draft:
    """A conversion under way.

    method: what the file trains by, in its tool's word. recipe: of jaxft. full: whether all weights are
    trained. all: the options of the file. options: those that no rule has taken yet, by name. settings: knob
    or field -> text. same, otherwise, lost, unneeded: options that are expressed as they are, otherwise or
    not at all (with a remark), or that need no setting. defaults: settings that are the tool's defaults.
    """

    source: ForeignConfig
    devices: int
    method: str
    recipe: str
    full: bool
    all: tuple[GivenOption, ...]
    options: dict[str, GivenOption]
    settings: dict[str, str] = field(default_factory=dict)
    same: list[GivenOption] = field(default_factory=list)
    otherwise: list[tuple[GivenOption, str]] = field(default_factory=list)
    lost: list[tuple[GivenOption, str]] = field(default_factory=list)
    unneeded: list[GivenOption] = field(default_factory=list)
    defaults: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take(self, *names: str) -> GivenOption | None:
        """Remove and return the first of these options that the file gives, None without one."""
        return next((self.options.pop(name) for name in names if name in self.options), None)

    def peek(self, *names: str) -> Any:
        """Return the value of the first of these options that the file gives, None without one."""
        return next((self.options[name].value for name in names if name in self.options), None)

    def number(self, *names: str) -> float | None:
        """Return an option as a number and leave it; None if it is missing or no finite number."""
        value = self.peek(*names)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            return None
        return number if abs(number) < LARGEST_NUMBER else None

    def put(self, override: str) -> None:
        """Set `setting=value`; the last one counts."""
        name, _, text = override.partition("=")
        self.settings[name] = text

    def express(self, option: GivenOption | None, overrides: Iterable[str], note: str = "") -> None:
        """Set what an option becomes. note: how it differs; without one it is the same."""
        overrides = list(overrides)
        for override in overrides:
            self.put(override)
        if option is None:
            return
        if note:
            written = " ".join(overrides)
            self.otherwise.append((option, f"{written}; {note}" if written else note))
        else:
            self.same.append(option)

    def lose(self, option: GivenOption | None, why: str) -> None:
        """Report an option that cannot be expressed."""
        if option is not None:
            self.lost.append((option, why))

    def drop(self, *names: str) -> None:
        """Take options that need no setting."""
        self.unneeded += [self.options.pop(name) for name in names if name in self.options]

    def default(self, override: str) -> None:
        """Set `setting=value` because the tool does so by default."""
        name, _, text = override.partition("=")
        self.settings[name] = self.defaults[name] = text

    def missing(self) -> list[GivenOption]:
        """Return the options of the file that no list has."""
        told = {option.name for option in (*self.same, *self.unneeded)}
        told |= {option.name for option, _ in (*self.otherwise, *self.lost)}
        return [option for option in self.all if option.name not in told]


def table_rows(tool: str, name: str, recipe: str) -> tuple[Option, ...]:
    """Return the rows of the table for a name in a file of this tool."""
    for lookup in (*LOOKUP[tool], None):
        rows = find_options(name.rpartition(".")[2], lookup, recipe)
        if rows:
            return rows
    return ()


def by_table(draft: Draft, option: GivenOption) -> None:
    """Convert one option by its row in the table."""
    if isinstance(option.value, Expression):
        setting = meant_setting(draft, option)
        remedy = f"; set {setting}= yourself" if setting else ""
        kind = "a variable" if option.value.text.isidentifier() else "an expression, which is not run"
        draft.lose(option, f"{kind}{remedy}")
        return
    rows = table_rows(draft.source.tool, option.name, draft.recipe)
    if not rows:
        tools = LOOKUP[draft.source.tool]
        known = [each.name for each in OPTIONS if {*tools} & {*each.tools}]
        near = difflib.get_close_matches(normalised(option.name.rpartition(".")[2]), known, 1, 0.8)
        meant = f"; did you mean {near[0]}?" if near else ""
        why = f"not an option of {draft.source.tool} that jaxft knows; nothing is set for it{meant}"
        draft.lose(option, why)
        return
    row = rows[0]
    try:
        if row.kind == "unneeded":
            draft.unneeded.append(option)
            return
        overrides = row.overrides(option.value)
    except ValueError as error:
        draft.lose(option, str(error))
        return
    if row.kind == "absent":
        draft.unneeded.append(option)
    else:
        draft.express(option, overrides, _difference(row, option.value))


def meant_setting(draft: Draft, option: GivenOption) -> str | None:
    """Return the setting of an option in the table, None without one."""
    rows = table_rows(draft.source.tool, option.name, draft.recipe)
    return rows[0].setting if rows else None


def _difference(row: Option, value: Any) -> str:
    """A remark about a value that trains a little differently here, "" for most."""
    text = as_text(value).lower()
    if row.setting == "optim.optimizer":
        if text.startswith("paged"):
            return "the same update; its state stays on the device"
        if text == "adafactor":
            return "without the first moment, and not scaled by the parameter"
    if row.name in ("fp16", "float16") and text == "true":
        return "bfloat16 in place of float16"
    if row.setting == "quant" and text == "true" and row.name == "load_in_8bit":
        return "a scale per output channel, where bitsandbytes has outliers in 16 bits"
    return ""


def run_name(text: str) -> str:
    """Return a run's name for the last part of a path: ./outputs/My Run is My-Run."""
    last = text.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "converted"


def short(option: GivenOption) -> str:
    """An option in one line without its line number."""
    return f"{option.name}: {short_value(option.value)}"
