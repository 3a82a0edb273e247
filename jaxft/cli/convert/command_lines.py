"""Command lines and shell scripts that start TRL, LLaMA-Factory or Axolotl, as options."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.cli.convert.source import Expression, ForeignConfig, GivenOption, check_count, read_config_text
from jaxft.cli.convert.yaml_files import read_yaml, yaml_options
from jaxft.runs.settings.option_names import AXOLOTL, FACTORY, TRL, UNSLOTH

DEVICE_OPTIONS = ("num_processes", "nproc_per_node", "num_gpus")  # of launchers
ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)")
SHELL_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+))")
TRAINERS = (
    "sft", "dpo", "kto", "grpo", "rloo", "reward", "orpo", "cpo", "online_dpo", "ppo", "gkd", "bco",
    "prm",
)  # fmt: skip
COMMANDS_OF = {"trl": TRAINERS, "llamafactory-cli": ("train",), "lmf": ("train",), "axolotl": ("train",)}


class Started(NamedTuple):
    """A command of a script. line: of its first word. variables: of the shell, as far as they are known."""

    words: list[str]
    line: int
    variables: dict[str, str]


def read_commands(file: Path, text: str, first_line: int = 1) -> ForeignConfig:
    """Return the options of the first command in a text that starts a trainer.

    first_line: the line of the file where the text begins. Raises ValueError for a text without one.
    """
    trainers = [
        (command, at) for command in _commands(text, first_line) if (at := _trainer(command.words)) >= 0
    ]
    if not trainers:
        raise ValueError(
            f"{file}: no command that starts a trainer, such as trl sft, llamafactory-cli train, axolotl "
            "train or python sft.py --model_name_or_path org/name"
        )
    command, at = trainers[0]
    source = _source(file, command, at)
    if len(trainers) > 1:
        rest = ", ".join(str(other.line) for other, _ in trainers[1:8])
        note = f"the command of line {command.line} is converted; others begin in lines {rest}"
        source = replace(source, notes=(*source.notes, note))
    check_count(file, source.options)
    return source


def _commands(text: str, first_line: int) -> list[Started]:
    """Split a text into commands; lines that continue with a backslash are one."""
    commands: list[Started] = []
    variables: dict[str, str] = {}
    joined, start = "", first_line
    for number, line in enumerate(text.splitlines(), first_line):
        start = start if joined else number
        stripped = line.rstrip()
        if stripped.endswith("\\") and not stripped.lstrip().startswith("#"):
            joined += stripped[:-1] + " "
            continue
        joined += stripped
        try:
            words = shlex.split(joined.lstrip("$> "), comments=True)
        except ValueError:  # an apostrophe in a text around the command
            words = []
        joined = ""
        while words and (match := ASSIGNMENT.fullmatch(words[0])) and not words[0].startswith("-"):
            if len(words) == 1:
                variables[match[1]] = _expanded(match[2], variables)
            words = words[1:]
        if words and words[0] == "export":
            for word in words[1:]:
                if match := ASSIGNMENT.fullmatch(word):
                    variables[match[1]] = _expanded(match[2], variables)
            continue
        if words:
            commands.append(Started(words, start, dict(variables)))
    return commands


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    """Replace the variables that the script sets; others stay as they are."""

    def value(match: re.Match) -> str:
        return variables.get(match[1] or match[3], match[2] if match[2] is not None else match[0])

    return SHELL_VARIABLE.sub(value, text)


def _trainer(words: Sequence[str]) -> int:
    """Return the position of the word that names the trainer, or -1."""
    for at, word in enumerate(words):
        name = Path(word).name
        further = words[at + 1 : at + 2]
        if further and further[0] in COMMANDS_OF.get(name, ()):
            return at
        if word in ("axolotl.cli.train", "trl.scripts.sft"):
            return at
        if name.endswith(".py") and any(other.startswith("--") for other in words[at + 1 :]):
            return at
    return -1


def _source(file: Path, command: Started, at: int) -> ForeignConfig:
    words = [_expanded(word, command.variables) for word in command.words]
    launcher, name, rest = words[:at], Path(words[at]).name, words[at + 1 :]
    launched = dict(_arguments(launcher))
    devices = next(
        (int(str(launched[n])) for n in DEVICE_OPTIONS if str(launched.get(n, "")).isdigit()), None
    )
    options = [
        GivenOption("deepspeed" if "deepspeed" in str(launched[n]) or "zero" in str(launched[n]) else "fsdp",
              launched[n], command.line)
        for n in ("config_file",) if n in launched and re.search("fsdp|deepspeed|zero", str(launched[n]))
    ]  # fmt: skip
    trainer, tool = "", TRL
    if name == "trl":
        trainer, rest = rest[0], rest[1:]
    elif name in ("llamafactory-cli", "lmf"):
        tool, rest = FACTORY, rest[1:]
    elif name == "axolotl":
        tool, rest = AXOLOTL, rest[1:]
    elif name == "axolotl.cli.train":
        tool = AXOLOTL
    else:
        trainer, tool = trainer_of(name), UNSLOTH if "unsloth" in name else TRL
    given: list[GivenOption] = []
    configured: ForeignConfig | None = None
    if rest and not rest[0].startswith("-") and rest[0].endswith((".yml", ".yaml")):
        configured = _config(file, rest[0], tool)
        rest = rest[1:]
    for key, value in _arguments(rest):
        if key == "config" and isinstance(value, str) and value.endswith((".yml", ".yaml")):
            configured = _config(file, value, tool)
        elif tool == TRL and key == "accelerate_config":
            options.append(GivenOption("fsdp", value, command.line))
        else:
            given.append(GivenOption(key, value, command.line))
    tool = _tool_of(given, tool) if configured is None else configured.tool
    before = () if configured is None else configured.options
    names = {option.name for option in given}
    kept = [option for option in before if option.name not in names]
    return ForeignConfig(file, tool, (*kept, *given, *options), trainer, None, devices)


def trainer_of(name: str) -> str:
    """Return the trainer that a script's name has, such as dpo for run_dpo.py; sft for others."""
    stem = Path(name).stem.lower()
    if "reward" in stem:
        return "reward"
    return next((trainer for trainer in sorted(TRAINERS, key=len, reverse=True) if trainer in stem), "sft")


def _tool_of(given: Sequence[GivenOption], tool: str) -> str:
    """LLaMA-Factory's scripts are started by other names too; its options tell."""
    return FACTORY if {"stage", "finetuning_type"} & {option.name for option in given} else tool


def _config(file: Path, name: str, tool: str) -> ForeignConfig:
    """Read the YAML file that a command names, from the working directory or next to the script."""
    for folder in (Path.cwd(), file.parent, *list(file.resolve().parents)[:4]):
        if (folder / name).is_file():
            path = folder / name
            text = read_config_text(path)
            if tool == AXOLOTL:
                return ForeignConfig(path, tool, yaml_options(path, text))
            return read_yaml(path, text)
    raise ValueError(f"{file}: its command reads {name}, which is not here; convert that file")


def _arguments(words: Sequence[str]) -> list[tuple[str, Any]]:
    """Return (name, value) of `--name value ...`, `--name=value`, `name=value` and `--flag`."""
    arguments: list[tuple[str, Any]] = []
    values: list[str] | None = None
    for word in words:
        if word in ("&&", "||", ";", "|", "&", ">", ">>", "2>&1"):
            break
        if word.startswith("-") and not _is_number(word):
            name, equals, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            values = [value] if equals else []
            arguments.append((name, values))
        elif values is None:
            key, equals, value = word.partition("=")
            if equals and key.replace("_", "").isalnum():
                arguments.append((key, [value]))
        else:
            values.append(word)
    return [_argument(name, values) for name, values in arguments]


def _argument(name: str, values: list[str]) -> tuple[str, Any]:
    values = [value.rstrip(",") for value in values]  # "q_proj", "v_proj"
    if not values:
        off = re.match(r"no_(.+)", name)
        return (off[1], False) if off else (name, True)
    parsed = [Expression(value) if SHELL_VARIABLE.search(value) else _value(value) for value in values]
    return name, parsed[0] if len(parsed) == 1 else parsed


def _value(text: str) -> Any:
    known = {"true": True, "false": False, "none": None, "null": None}
    return known.get(text.lower(), text)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
