"""The options that a configuration of another tool gives, whatever the kind of its file."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

LARGEST = 2**20  # bytes of a file
MOST_OPTIONS = 2000
LONGEST_VALUE = 80  # characters of a value in messages


@dataclass(frozen=True)
class Expression:
    """A value that only running the file would give; text: as the file has it."""

    text: str

    def __str__(self) -> str:
        return self.text


class Given(NamedTuple):
    """An option as a file has it. name: with dots for sections, such as fsdp_config.fsdp_offload_params.

    line: its line in the file, counted from 1. expression: whether its value is an expression, not a literal.
    """

    name: str
    value: Any
    line: int | None = None

    @property
    def empty(self) -> bool:
        """Whether the file has the name without a value, which leaves the tool's default."""
        return self.value is None or self.value == "" or self.value == {} or self.value == []

    def __str__(self) -> str:
        text = f"{self.name}: {shown(self.value)}"
        return text if self.line is None else f"line {self.line}  {text}"


@dataclass(frozen=True)
class Source:
    """A configuration of another tool.

    file: where it was read. tool: one of runs/option_names.py. trainer: what it trains by, as the tool names
    it ("dpo", "kto", ...), "" where the options must tell. lora: whether an adapter is trained, None where
    the options must tell. devices: how many, None if the file doesn't tell. notes: lines about the file.
    """

    file: Path
    tool: str
    options: tuple[Given, ...]
    trainer: str = ""
    lora: bool | None = None
    devices: int | None = None
    notes: tuple[str, ...] = field(default=())


def shown(value: Any) -> str:
    """A value in one line for messages."""
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def read_text(file: Path) -> str:
    """Return a file's text. Raises ValueError for one that is too large or not UTF-8."""
    with file.open("rb") as stream:
        data = stream.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"{file}: larger than {LARGEST >> 20} MiB; a configuration is smaller")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: byte {error.start} is not UTF-8; save it as UTF-8") from error


def flatten(name: str, value: Any, line: int | None, lines: Mapping[str, int]) -> Iterator[Given]:
    """The options of a section, `name` with dots, or the option itself. lines: dotted name -> line."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            inner = f"{name}.{key}"
            yield from flatten(inner, item, lines.get(inner, line), lines)
    else:
        yield Given(name, value, line)


def check_count(file: Path, options: tuple[Given, ...]) -> None:
    """Raise ValueError for a file without options, or with too many."""
    if not options:
        raise ValueError(f"{file}: it gives no options of TRL, Axolotl, LLaMA-Factory or Unsloth")
    if len(options) > MOST_OPTIONS:
        raise ValueError(f"{file}: more than {MOST_OPTIONS} options; a configuration has fewer")
