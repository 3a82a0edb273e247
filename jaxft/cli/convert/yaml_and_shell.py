"""Read the options of Axolotl, LLaMA-Factory and TRL from YAML, command lines and shell scripts."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jaxft.cli.convert.draft import (
    Expression,
    ForeignConfig,
    GivenOption,
    check_count,
    option_parts,
    read_config_text,
)
from jaxft.runs.settings.option import AXOLOTL, FACTORY, TRL, UNSLOTH

MOST_NODES = 20_000  # of a YAML file; each use of an alias counts
DEEPEST = 20  # levels
FACTORY_KEYS = {"stage", "finetuning_type", "cutoff_len", "template", "dataset_dir", "lora_target", "dataset"}
TRL_KEYS = {"dataset_name", "datasets", "dataset_train_split"}
UNREAD_FILES = {  # key of a file that convert does not read -> whose file it is
    "compute_environment": "accelerate's; convert the training script or the command that uses it",
    "distributed_type": "accelerate's; convert the training script or the command that uses it",
    "train_micro_batch_size_per_gpu": "DeepSpeed's; convert the training script or the command that uses it",
}


def read_yaml(file: Path, text: str) -> ForeignConfig:
    """Return the options of a YAML file of Axolotl, LLaMA-Factory or TRL. Nothing in it is executed.

    Raises ValueError with one line for a file that is not YAML, or of another tool.
    """
    options = yaml_options(file, text)
    keys = {option.name.partition(".")[0] for option in options}
    if "_component_:" in text:
        raise ValueError(
            f"{file}: torchtune's configurations are not read; `jaxft settings` lists the settings to write"
        )
    for key, what in UNREAD_FILES.items():
        if key in keys:
            raise ValueError(f"{file}: the file is {what}")
    if "base_model" in keys:
        return ForeignConfig(file, AXOLOTL, options)
    if "model_name_or_path" in keys and keys & FACTORY_KEYS:
        return ForeignConfig(file, FACTORY, options)
    if "model_name_or_path" in keys or keys & TRL_KEYS:
        return ForeignConfig(file, TRL, options)
    raise ValueError(
        f"{file}: not a configuration of Axolotl, LLaMA-Factory or TRL, because it has none of the keys "
        f"base_model, model_name_or_path, {', '.join(sorted(TRL_KEYS))}; name a file of one of them"
    )


def yaml_options(file: Path, text: str) -> tuple[GivenOption, ...]:
    """Return all options of a YAML file; those of a section in draft.NESTED have dotted names. file: for
    errors. text: its contents. Raises ValueError for a text that is not a mapping of options.
    """
    content, lines = _load(file, text)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{file}: expected options as `name: value`, got a {type(content).__name__}; correct the file"
        )
    named = [GivenOption(str(key), value, lines.get(str(key))) for key, value in content.items()]
    options = tuple(part for option in named for part in option_parts(option, lines))
    check_count(file, options)
    return options


def _load(file: Path, text: str) -> tuple[Any, dict[str, int]]:
    """Parse YAML and return (content, dotted name -> line). file: for errors. Raises ValueError if `text` is
    empty or not YAML.
    """
    loader, lines = yaml.SafeLoader(text), dict[str, int]()
    try:
        node = loader.get_single_node()
        if node is not None:
            _number(node, "", lines, [0])
        content = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        where = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{file}{where}: not YAML: {error.problem}; correct the file") from error
    except RecursionError as error:
        raise ValueError(f"{file}: nested too deeply; name a configuration file") from error
    except (yaml.YAMLError, ValueError) as error:  # such as a date with a 13th month
        raise ValueError(f"{file}: not YAML: {' '.join(str(error).split())}; correct the file") from error
    finally:
        loader.dispose()
    if content is None:
        raise ValueError(f"{file}: the file is empty; name a configuration file")
    return content, lines


def _number(node: yaml.Node, name: str, lines: dict[str, int], count: list[int]) -> None:
    """Add dotted name -> line to `lines` for a node (`name`, "" for the root) and all below it. count: [nodes
    so far], changed in place. Raises ValueError above MOST_NODES nodes or DEEPEST levels, since aliases can
    repeat a node without end.
    """
    count[0] += 1
    if count[0] > MOST_NODES or name.count(".") > DEEPEST:
        raise ValueError(f"more than {MOST_NODES:,} values (each use of an alias counts) or {DEEPEST} levels")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = f"{name}.{key.value}" if name else str(key.value)
            lines.setdefault(inner, key.start_mark.line + 1)
            _number(value, inner, lines, count)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _number(item, f"{name}.", lines, count)


DEVICE_OPTIONS = ("num_processes", "nproc_per_node", "num_gpus")  # of torchrun, accelerate and deepspeed
ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)")
SHELL_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+))")
TRAINERS = (
    "sft", "dpo", "kto", "grpo", "rloo", "reward", "orpo", "cpo", "online_dpo", "ppo", "gkd", "bco",
    "prm",
)  # fmt: skip
# Program -> its commands that train
COMMANDS_OF = {"trl": TRAINERS, "llamafactory-cli": ("train",), "lmf": ("train",), "axolotl": ("train",)}


class Started(NamedTuple):
    """A command of a shell script. words: as the shell splits them. line: where the command begins in the
    file. variables: shell variables that lines above set, name -> value.
    """

    words: list[str]
    line: int
    variables: dict[str, str]


def read_commands(file: Path, text: str, first_line: int = 1) -> ForeignConfig:
    """Return the options of the first command in a text that starts a trainer.

    first_line: the line of the file where the text begins. Raises ValueError if there is no such command.
    """
    trainers = [
        (command, at) for command in _commands(text, first_line) if (at := _trainer(command.words)) >= 0
    ]
    if not trainers:
        raise ValueError(
            f"{file}: no command that starts a trainer, such as trl sft, llamafactory-cli train, axolotl "
            "train or python sft.py --model_name_or_path org/name; "
            "name a file with one"
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
    """Split a shell script into commands. first_line: the line of the file where the text begins."""
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
    """Replace $NAME, ${NAME} and ${NAME:-default}; a variable without value or default stays as it is."""

    def value(match: re.Match) -> str:
        return variables.get(match[1] or match[3], match[2] if match[2] is not None else match[0])

    return SHELL_VARIABLE.sub(value, text)


def _trainer(words: Sequence[str]) -> int:
    """Return the index of the word that starts a trainer (trl, axolotl, a script.py), -1 without one."""
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
    counts = [str(launched[name]) for name in DEVICE_OPTIONS if name in launched]
    devices = next((int(count) for count in counts if count.isdigit()), None)
    options: list[GivenOption] = []
    config = str(launched.get("config_file", ""))
    if "deepspeed" in config or "zero" in config:
        options.append(GivenOption("deepspeed", config, command.line))
    elif "fsdp" in config:
        options.append(GivenOption("fsdp", config, command.line))
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
    names = {option.name for option in given}
    if configured is not None:
        tool = configured.tool
    elif {"stage", "finetuning_type"} & names:  # only LLaMA-Factory's, whose scripts have any name
        tool = FACTORY
    kept = [option for option in (configured.options if configured else ()) if option.name not in names]
    return ForeignConfig(file, tool, (*kept, *given, *options), trainer, None, devices)


def trainer_of(name: str) -> str:
    """Return the training method in a script's file name: dpo for run_dpo.py; sft if it has none."""
    stem = Path(name).stem.lower()
    if "reward" in stem:
        return "reward"
    return next((trainer for trainer in sorted(TRAINERS, key=len, reverse=True) if trainer in stem), "sft")


def _config(file: Path, name: str, tool: str) -> ForeignConfig:
    """Read the YAML file that a command names, relative to the working directory or to a folder above the
    script. file: the script. name: the path in the command. tool: the command's; if it is not AXOLOTL, the
    YAML's options show the tool.
    """
    for folder in (Path.cwd(), file.parent, *list(file.resolve().parents)[:4]):
        if (folder / name).is_file():
            path = folder / name
            text = read_config_text(path)
            if tool == AXOLOTL:
                return ForeignConfig(path, tool, yaml_options(path, text))
            return read_yaml(path, text)
    raise ValueError(
        f"{file}: its command reads {name}, which is neither in the working directory nor above the script; "
        f"run jaxft convert on {Path(name).name} itself"
    )


def _arguments(words: Sequence[str]) -> list[tuple[str, Any]]:
    """Return (name, value) for `--name value ...`, `--name=value`, `name=value` and `--flag` (True)."""
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
