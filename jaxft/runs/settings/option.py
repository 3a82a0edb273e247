"""An option of another tool, such as TRL, and the functions that write the table of all options.

The table is option_names.OPTIONS. Its rows are made by `same`, `mapped`, `combined`, `unneeded` and `absent`.
Their argument `names` is option names with the letters of their tools (see TOOL_LETTERS), separated by
spaces: "learning_rate:tafu lr:f".
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

TRL, PEFT, AXOLOTL, FACTORY, UNSLOTH = "TRL", "PEFT", "Axolotl", "LLaMA-Factory", "Unsloth"
TOOL_LETTERS = {"t": TRL, "p": PEFT, "a": AXOLOTL, "f": FACTORY, "u": UNSLOTH}  # letter in the table -> tool

# How an option becomes a setting:
# same: the setting takes the option's value, or one that `values` gives for it.
# together: it depends on further options, the rows or the devices; the note says how.
# unneeded: jaxft always does so, or has nothing that it would change.
# absent: jaxft has no equivalent; the note says what to do instead.
Kind = Literal["same", "together", "unneeded", "absent"]


@dataclass(frozen=True)
class Option:
    """An option of other tools, such as learning_rate, and what to write for it in jaxft.

    setting: the knob or dotted field of `recipe` that does the same, or None. values: {value of the option in
    lower case: what to write, such as "quant=nf4", or ""}. only_values: if True, other values have no
    equivalent; if False and kind is "same", `setting` takes them unchanged. example: a value as the tools
    write it. note: advice.
    """

    name: str
    tools: tuple[str, ...]
    setting: str | None
    note: str = ""
    kind: Kind = "same"
    example: Any = None
    values: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    only_values: bool = False
    recipe: str = "sft"

    def overrides(self, value: Any) -> tuple[str, ...]:
        """Return the overrides for a value of the option, such as ("lr=0.0001",); () if none is needed.

        Raises ValueError if the value has no equivalent, or if it alone does not decide the overrides.
        """
        text = as_text(value)
        if text.lower() in self.values:
            return tuple(self.values[text.lower()].split())
        if self.kind != "same" or self.only_values:
            known = ", ".join(self.values)
            raise ValueError(self.note or f"{self.name}={text} has no equivalent; values with one: {known}")
        return (f"{self.setting}={text}",)

    def describe(self) -> str:
        """Return one line that says what to write in place of the option."""
        written = f"{self.name} is {self.setting} here" if self.setting else ""
        if self.setting and self.kind == "same":
            example = " ".join(self.overrides(self.example))
            written += f": {example}" if example else ""
        else:
            written = written or f"{self.name}: {'nothing to set' if self.kind == 'unneeded' else 'none'}"
        return f"{written}; {self.note}" if self.note else written


def as_text(value: Any) -> str:
    """Write a value of a YAML or Python file as on jaxft's command line.

    >>> as_text([True, None, 1e-4, {"q_proj": 8}])
    'true,none,0.0001,q_proj:8'
    """
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ",".join(f"{key}:{as_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        texts = [as_text(item) for item in value]
        as_json = any("," in text for text in texts) and all(isinstance(item, str) for item in value)
        return json.dumps(texts) if as_json else ",".join(texts)
    return str(value)


def normalised(name: str) -> str:
    """Return an option's name as the table has it: `--Learning-Rate` is learning_rate."""
    return name.strip().lstrip("-").replace("-", "_").lower()


def options(names: str, **fields: Any) -> Iterator[Option]:
    """Yield an Option for each "name:letters" in `names`; letters are keys of TOOL_LETTERS. fields: the other
    fields of all these options.
    """
    for item in names.split():
        name, _, letters = item.partition(":")
        yield Option(name, tuple(TOOL_LETTERS[letter] for letter in letters), **fields)


def same(names: str, setting: str, example: Any, note: str = "", recipe: str = "sft") -> Iterator[Option]:
    """Yield options whose values `setting` takes as they are. names: as in `options`."""
    return options(names, setting=setting, note=note, example=example, recipe=recipe)


def mapped(
    names: str, setting: str, values: dict[str, str], note: str = "", recipe: str = "sft"
) -> Iterator[Option]:
    """Yield options whose values jaxft names differently. values: {value: what to write in jaxft}; values
    that it lacks have no equivalent.
    """
    example = next((value for value, ours in values.items() if ours), next(iter(values)))
    fields: dict[str, Any] = {"values": values, "only_values": True, "recipe": recipe}
    return options(names, setting=setting, note=note, example=example, **fields)


def combined(names: str, setting: str | None, note: str, recipe: str = "sft") -> Iterator[Option]:
    """Yield options that cannot be translated by their value alone: what replaces them depends on other
    options, the rows or the devices. note: what to write instead, also the error of Option.overrides.
    """
    return options(names, setting=setting, note=note, kind="together", recipe=recipe)


def unneeded(names: str, note: str) -> Iterator[Option]:
    """Yield options for which there is nothing to set, as the note explains."""
    return options(names, setting=None, note=note, kind="unneeded")


def absent(names: str, note: str, harmless: str = "") -> Iterator[Option]:
    """Yield options without an equivalent. harmless: values, separated by spaces, that need no setting in
    jaxft, as false, none and the empty text never do.
    """
    off = {"false": "", "none": "", "": "", **dict.fromkeys(harmless.split(), "")}
    return options(names, setting=None, note=note, kind="absent", values=off)
