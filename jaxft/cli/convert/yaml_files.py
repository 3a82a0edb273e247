"""YAML of Axolotl, LLaMA-Factory and TRL as options with their lines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxft.cli.convert.source import ForeignConfig, GivenOption, check_count, option_parts
from jaxft.runs.settings.option_names import AXOLOTL, FACTORY, TRL

MOST_NODES = 20_000  # with those that aliases repeat
DEEPEST = 20
FACTORY_KEYS = {"stage", "finetuning_type", "cutoff_len", "template", "dataset_dir", "lora_target", "dataset"}
TRL_KEYS = {"dataset_name", "datasets", "dataset_train_split"}
UNREAD_FILES = {  # keys of files that are not read -> what they are
    "compute_environment": "accelerate's; convert the file or the command that it is started with",
    "distributed_type": "accelerate's; convert the file or the command that it is started with",
    "train_micro_batch_size_per_gpu": "DeepSpeed's; convert the file or the command that it is started with",
}


def read_yaml(file: Path, text: str) -> ForeignConfig:
    """Return the options of a YAML file. Nothing in it is executed.

    Raises ValueError with one line for a file that is no YAML, or of no tool that is known.
    """
    options = yaml_options(file, text)
    keys = {option.name.partition(".")[0] for option in options}
    if "_component_:" in text:
        raise ValueError(
            f"{file}: torchtune's configurations are not read; `jaxft settings` lists what to write"
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
        f"{file}: neither Axolotl's (base_model), LLaMA-Factory's (model_name_or_path and stage) nor TRL's "
        "(model_name_or_path and dataset_name) configuration"
    )


def yaml_options(file: Path, text: str) -> tuple[GivenOption, ...]:
    """Return all options of a YAML file, sections in NESTED with dotted names."""
    content, lines = _load(file, text)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{file}: a list of options `name: value` was expected, not a {type(content).__name__}"
        )
    options: list[GivenOption] = []
    for key, value in content.items():
        name = str(key)
        options += option_parts(GivenOption(name, value, lines.get(name)), lines)
    check_count(file, tuple(options))
    return tuple(options)


def _load(file: Path, text: str) -> tuple[Any, dict[str, int]]:
    """Return (content, line of every dotted name)."""
    loader, lines = yaml.SafeLoader(text), dict[str, int]()
    try:
        node = loader.get_single_node()
        if node is not None:
            _number(node, "", lines, [0])
        content = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        where = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{file}{where}: not YAML: {error.problem}") from error
    except RecursionError as error:
        raise ValueError(f"{file}: nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # such as a date with a 13th month
        raise ValueError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()
    if content is None:
        raise ValueError(f"{file}: the file is empty")
    return content, lines


def _number(node: yaml.Node, name: str, lines: dict[str, int], count: list[int]) -> None:
    """Fill in `lines`, and raise ValueError for more nodes than a configuration has. count: so far."""
    count[0] += 1
    if count[0] > MOST_NODES or name.count(".") > DEEPEST:
        raise ValueError("more values, aliases or levels than a configuration has")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = f"{name}.{key.value}" if name else str(key.value)
            lines.setdefault(inner, key.start_mark.line + 1)
            _number(value, inner, lines, count)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _number(item, f"{name}.", lines, count)
