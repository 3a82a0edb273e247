"""A conversion under way: options that are left, settings that are found, and lines about the rest."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from jaxft.convert.source import Expression, Given, Source, shown
from jaxft.runs.option_names import AXOLOTL, FACTORY, PEFT, TRL, UNSLOTH, Option, as_text, find_options

LOOKUP = {  # tool -> the tools whose options its files have, most specific first; then any
    TRL: (TRL, PEFT),
    UNSLOTH: (UNSLOTH, TRL, PEFT),
    AXOLOTL: (AXOLOTL,),
    FACTORY: (FACTORY,),
}


@dataclass
class Draft:
    """What is known so far of a conversion.

    options: those that no rule has taken yet, by name. recipe: of jaxft. full: whether all weights are
    trained. settings: knob or field -> text. given: how many options the settings come from as they are.
    otherwise, lost, unneeded: what the reader is told about options, in the order of the file.
    """

    source: Source
    devices: int
    recipe: str
    full: bool
    options: dict[str, Given]
    settings: dict[str, str] = field(default_factory=dict)
    same: list[Given] = field(default_factory=list)
    otherwise: list[tuple[Given, str]] = field(default_factory=list)
    lost: list[tuple[Given, str]] = field(default_factory=list)
    unneeded: list[Given] = field(default_factory=list)
    defaults: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take(self, *names: str) -> Given | None:
        """Remove and return the first of these options that the file gives, None without one."""
        found = None
        for name in names:
            option = self.options.pop(name, None)
            found = found or option
        return found

    def peek(self, *names: str) -> Any:
        """Return the value of the first of these options that the file gives, None without one."""
        return next((self.options[name].value for name in names if name in self.options), None)

    def number(self, *names: str) -> float | None:
        """Return an option as a number and leave it; None if it is missing or no number."""
        value = self.peek(*names)
        try:
            return None if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            return None

    def put(self, override: str) -> None:
        """Set `setting=value`; the last one counts."""
        name, _, text = override.partition("=")
        self.settings[name] = text

    def express(self, option: Given | None, overrides: Iterable[str], note: str = "") -> None:
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

    def lose(self, option: Given | None, why: str) -> None:
        """Report an option that cannot be expressed."""
        if option is not None:
            self.lost.append((option, why))

    def drop(self, *names: str) -> None:
        """Take options that need no setting."""
        for name in names:
            option = self.take(name)
            if option is not None:
                self.unneeded.append(option)


def rows_of(tool: str, name: str, recipe: str) -> tuple[Option, ...]:
    """Return the rows of the table for a name in a file of this tool."""
    for lookup in (*LOOKUP[tool], None):
        found = find_options(name.rpartition(".")[2], lookup, recipe)
        if found:
            return found
    return ()


def by_table(draft: Draft, option: Given) -> None:
    """Convert one option by its row in the table."""
    if isinstance(option.value, Expression):
        draft.lose(option, f"an expression, which is not run{_meant(draft, option)}")
        return
    rows = rows_of(draft.source.tool, option.name, draft.recipe)
    if not rows:
        draft.lose(option, f"not an option of {draft.source.tool} that jaxft knows; nothing is set for it")
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


def _meant(draft: Draft, option: Given) -> str:
    rows = rows_of(draft.source.tool, option.name, draft.recipe)
    setting = rows[0].setting if rows else None
    return f"; set {setting}= yourself" if setting else ""


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


def name_of(text: str) -> str:
    """Return a run's name for the last part of a path: ./outputs/My Run is My-Run."""
    last = text.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "converted"


def short(option: Given) -> str:
    """An option in one line without its line number."""
    return f"{option.name}: {shown(option.value)}"
