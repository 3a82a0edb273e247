"""Types of a conversion: an option of another tool's file, all options of a file, and a draft of the recipe.

Options are converted one after the other, or several together; most by the table option_names.OPTIONS.
"""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxft.runs.settings.option import AXOLOTL, FACTORY, PEFT, TRL, UNSLOTH, Option, as_text, normalised
from jaxft.runs.settings.option_names import OPTIONS, find_options
from jaxft.runs.terminal import short_text

LARGEST_FILE = 2**20  # bytes of a file
MOST_OPTIONS = 2000
LONGEST_VALUE = 80  # characters of a value in messages
# Sections whose keys are options too, such as trl.beta
NESTED = ("trl", "peft", "special_tokens", "fsdp_config", "env", "model_init_kwargs", "dynamic_checkpoint")


@dataclass(frozen=True)
class Expression:
    """A value that would be known only if the file ran, such as a variable. text: its source."""

    text: str

    def __str__(self) -> str:
        return self.text


class GivenOption(NamedTuple):
    """An option as a file has it. name: dotted in a section, such as fsdp_config.fsdp_offload_params.

    value: an Expression if it cannot be known. line: its line in the file, counted from 1; None if unknown.
    remark: why it is not converted, or what to do instead; "" for an option to convert.
    """

    name: str
    value: Any
    line: int | None = None
    remark: str = ""

    @property
    def empty(self) -> bool:
        """Whether the file has the name without a value, so that the tool's default applies."""
        return self.value in (None, "", {}, [])

    def __str__(self) -> str:
        return f"{self.name}: {short_value(self.value)}"


@dataclass(frozen=True)
class ForeignConfig:
    """The options of a file of another tool.

    file: its path. tool: TRL, AXOLOTL, FACTORY or UNSLOTH. trainer: the training method as the tool calls it
    ("dpo", "kto", ...), "" if it follows from the options. lora: whether an adapter is trained, None if that
    follows from the options. devices: number of devices of the run, None if the file does not state it.
    notes: lines for the report.
    """

    file: Path
    tool: str
    options: tuple[GivenOption, ...]
    trainer: str = ""
    lora: bool | None = None
    devices: int | None = None
    notes: tuple[str, ...] = ()


def short_value(value: Any) -> str:
    """Return a value as one line of at most LONGEST_VALUE characters."""
    return short_text(" ".join(str(value).split()), LONGEST_VALUE)


def read_config_text(file: Path) -> str:
    """Return a file's text. Raises ValueError for a folder, a file above LARGEST_FILE or one that is not
    UTF-8; OSError if it cannot be read.
    """
    if file.exists() and not file.is_file():
        raise ValueError(f"{file}: not a file; name a configuration file")
    with file.open("rb") as stream:
        data = stream.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise ValueError(f"{file}: larger than {LARGEST_FILE >> 20} MiB; name a configuration file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: byte {error.start} is not UTF-8; save it as UTF-8") from error


def option_parts(
    option: GivenOption, lines: Mapping[str, int] = MappingProxyType({})
) -> Iterator[GivenOption]:
    """Yield the options of a section (see NESTED) under dotted names; any other option is yielded unchanged.

    lines: dotted name -> line in the file; an option that is missing there gets the section's line.

    >>> [option.name for option in option_parts(GivenOption("trl", {"beta": 0.1, "use_vllm": True}))]
    ['trl.beta', 'trl.use_vllm']
    """
    if option.name.partition(".")[0] in NESTED and isinstance(option.value, Mapping) and option.value:
        for key, value in option.value.items():
            name = f"{option.name}.{key}"
            yield from option_parts(GivenOption(name, value, lines.get(name, option.line)), lines)
    else:
        yield option


def check_count(file: Path, options: tuple[GivenOption, ...]) -> None:
    """Raise ValueError if a file has no options, or more than MOST_OPTIONS."""
    if not options:
        raise ValueError(
            f"{file}: it has no options of TRL, Axolotl, LLaMA-Factory or Unsloth; name a configuration of "
            "one of them"
        )
    if len(options) > MOST_OPTIONS:
        raise ValueError(f"{file}: more than {MOST_OPTIONS} options; name a configuration file")


FIRST_SETTINGS = ("model", "data", "held_out", "start", "name")  # settings at the beginning of a command line
LARGEST_NUMBER = 2**53  # above, a float does not show every integer
LOOKUP = {  # tool -> tools whose rows in OPTIONS are searched, in this order; after them, rows of any tool
    TRL: (TRL, PEFT),
    UNSLOTH: (UNSLOTH, TRL, PEFT),
    AXOLOTL: (AXOLOTL,),
    FACTORY: (FACTORY,),
}


@dataclass
class Draft:
    """A recipe, its settings, and the outcome of each option of a file; complete when to_recipe.convert
    returns it.

    source: the options of the file. devices: number of devices that the tool used. method: the training
    method as the tool calls it. recipe: the recipe of jaxft. full: whether all weights are trained, not an
    adapter. all: the options of the file that have a value. options: those not converted yet, by name.
    values: knob or dotted field -> its value as text.

    Each option ends in one of four lists. same: its settings have the same meaning. otherwise: (option, its
    settings and how they differ). lost: (option, why no setting expresses it). unneeded: jaxft has nothing to
    set.

    defaults: the `setting=value` that stand for defaults of the tool. notes: lines for the report.
    """

    source: ForeignConfig
    devices: int
    method: str
    recipe: str
    full: bool
    all: tuple[GivenOption, ...]
    options: dict[str, GivenOption]
    values: dict[str, str] = field(default_factory=dict)
    same: list[GivenOption] = field(default_factory=list)
    otherwise: list[tuple[GivenOption, str]] = field(default_factory=list)
    lost: list[tuple[GivenOption, str]] = field(default_factory=list)
    unneeded: list[GivenOption] = field(default_factory=list)
    defaults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def settings(self) -> tuple[str, ...]:
        """`name=value` in the order of a command line: model and rows, then knobs, then dotted fields."""
        first = [name for name in FIRST_SETTINGS if name in self.values]
        others = [name for name in self.values if name not in FIRST_SETTINGS]
        rest = sorted(others, key=lambda name: "." in name)
        return tuple(f"{name}={self.values[name]}" for name in (*first, *rest))

    @property
    def empty(self) -> list[GivenOption]:
        """The options without a value in the file."""
        return [option for option in self.source.options if option.empty]

    def take(self, *names: str) -> GivenOption | None:
        """Remove and return the first option of these names that is not converted yet, None without one."""
        return next((self.options.pop(name) for name in names if name in self.options), None)

    def take_all(self, *names: str) -> list[GivenOption]:
        """Remove and return the options of these names that are not converted yet."""
        return [self.options.pop(name) for name in names if name in self.options]

    def peek(self, *names: str) -> Any:
        """Return the value of the option that `take` would return, and remove nothing; None without one."""
        return next((self.options[name].value for name in names if name in self.options), None)

    def number(self, *names: str) -> float | None:
        """Return the value that `peek` returns as a float, also of a text such as "1e-4". None for any other
        value, and from 2**53 on.
        """
        value = self.peek(*names)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            return None
        return number if abs(number) < LARGEST_NUMBER else None

    def put(self, override: str) -> None:
        """Record a setting, in place of an earlier value. override: `setting=value`."""
        name, _, text = override.partition("=")
        self.values[name] = text

    def express(self, option: GivenOption | None, overrides: Iterable[str], note: str = "") -> None:
        """Record settings as the conversion of `option`; None: record only the settings. overrides:
        `setting=value`. note: how the settings differ from the option, "" for the same meaning.
        """
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

    def carry(self, setting: str, *names: str, note: str = "") -> None:
        """Record the value of the first option of these names, if there is one, as the value of `setting`.
        note: see `express`.
        """
        option = self.take(*names)
        if option is not None:
            self.express(option, [f"{setting}={as_text(option.value)}"], note)

    def lose(self, option: GivenOption | None, why: str) -> None:
        """Record that no setting expresses `option`, and why. None has no effect."""
        if option is not None:
            self.lost.append((option, why))

    def drop(self, *names: str) -> None:
        """Move the options of these names from `options` to `unneeded`; missing ones have no effect."""
        self.unneeded += self.take_all(*names)

    def default(self, override: str) -> None:
        """Record a setting that stands for a default of the tool. override: `setting=value`."""
        self.put(override)
        self.defaults.append(override)

    def missing(self) -> list[GivenOption]:
        """Return the options of the file that are in none of the four lists."""
        listed = [*self.same, *self.unneeded, *(option for option, _ in (*self.otherwise, *self.lost))]
        names = {option.name for option in listed}
        return [option for option in self.all if option.name not in names]


def table_rows(tool: str, name: str, recipe: str) -> tuple[Option, ...]:
    """Return the rows about an option in the table option_names.OPTIONS, () without one.

    tool: the tool of the file; rows of other tools are returned only if it has none (see LOOKUP). name: only
    the part after the last dot counts. recipe: if some rows are for this recipe, only these are returned.
    """
    for lookup in (*LOOKUP[tool], None):
        rows = find_options(name.rpartition(".")[2], lookup, recipe)
        if rows:
            return rows
    return ()


def by_table(draft: Draft, option: GivenOption) -> None:
    """Convert an option by its row in option_names.OPTIONS, and record the outcome in `draft`."""
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
        unknown = f"not an option of {draft.source.tool} that jaxft knows; nothing is set for it{meant}"
        draft.lose(option, unknown)
        return
    row = rows[0]
    if row.kind == "unneeded":
        draft.unneeded.append(option)
        return
    try:
        overrides = row.overrides(option.value)
    except ValueError as error:
        draft.lose(option, str(error))
        return
    if row.kind == "absent":
        draft.unneeded.append(option)
    else:
        draft.express(option, overrides, _difference(row, option.value))


def meant_setting(draft: Draft, option: GivenOption) -> str | None:
    """Return the setting that jaxft has for an option, from option_names.OPTIONS; None without one."""
    rows = table_rows(draft.source.tool, option.name, draft.recipe)
    return rows[0].setting if rows else None


def _difference(row: Option, value: Any) -> str:
    """Return how an option's value differs in jaxft although its row has a setting, "" for most values."""
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
    """Return a name for a run from the last part of a path.

    >>> run_name("./outputs/My Run")
    'My-Run'
    """
    last = text.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "converted"
