"""The options that a configuration of another tool gives, whatever the kind of its file."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

LARGEST_FILE = 2**20  # bytes of a file
MOST_OPTIONS = 2000
LONGEST_VALUE = 80  # characters of a value in messages
NESTED = ("trl", "peft", "special_tokens", "fsdp_config", "env", "model_init_kwargs", "dynamic_checkpoint")


@dataclass(frozen=True)
class Expression:
    """A value that only running the file would give; text: as the file has it."""

    text: str

    def __str__(self) -> str:
        return self.text


class GivenOption(NamedTuple):
    """An option as a file has it. name: with dots for sections, such as fsdp_config.fsdp_offload_params.

    value: an Expression where it is no literal. line: its line in the file, counted from 1. remark: why it
    cannot be expressed, "" for an option that is converted.
    """

    name: str
    value: Any
    line: int | None = None
    remark: str = ""

    @property
    def empty(self) -> bool:
        """Whether the file has the name without a value, which leaves the tool's default."""
        return self.value is None or self.value == "" or self.value == {} or self.value == []

    def __str__(self) -> str:
        text = f"{self.name}: {short_value(self.value)}"
        return text if self.line is None else f"line {self.line}  {text}"


@dataclass(frozen=True)
class ForeignConfig:
    """A configuration of another tool.

    file: where it was read. tool: one of option_names.py. trainer: what it trains by, as the tool names
    it ("dpo", "kto", ...), "" where the options must tell. lora: whether an adapter is trained, None where
    the options must tell. devices: how many, None if the file doesn't tell. notes: lines about the file.
    """

    file: Path
    tool: str
    options: tuple[GivenOption, ...]
    trainer: str = ""
    lora: bool | None = None
    devices: int | None = None
    notes: tuple[str, ...] = field(default=())


def short_value(value: Any) -> str:
    """A value in one line for messages."""
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def read_config_text(file: Path) -> str:
    """Return a file's text. Raises ValueError for a folder, and a file that is too large or not UTF-8."""
    if file.exists() and not file.is_file():
        raise ValueError(f"{file}: not a file; name a configuration")
    with file.open("rb") as stream:
        data = stream.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise ValueError(f"{file}: larger than {LARGEST_FILE >> 20} MiB; a configuration is smaller")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: byte {error.start} is not UTF-8; save it as UTF-8") from error


def option_parts(
    option: GivenOption, lines: Mapping[str, int] = MappingProxyType({})
) -> Iterator[GivenOption]:
    """The options of a section with dotted names, or the option itself if it is none of NESTED.

    lines: dotted name -> its line; others have the section's.
    """
    if option.name.partition(".")[0] in NESTED and isinstance(option.value, Mapping) and option.value:
        for key, value in option.value.items():
            name = f"{option.name}.{key}"
            yield from option_parts(GivenOption(name, value, lines.get(name, option.line)), lines)
    else:
        yield option


def check_count(file: Path, options: tuple[GivenOption, ...]) -> None:
    """Raise ValueError for a file without options, or with too many."""
    if not options:
        raise ValueError(f"{file}: it gives no options of TRL, Axolotl, LLaMA-Factory or Unsloth")
    if len(options) > MOST_OPTIONS:
        raise ValueError(f"{file}: more than {MOST_OPTIONS} options; a configuration has fewer")
