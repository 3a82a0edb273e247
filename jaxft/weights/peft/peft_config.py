"""PEFT's adapter_config.json: read it and check it; names of the tensors in PEFT's layout.

PEFT's `save_pretrained` writes `base_model.model.MODULE.lora_A.weight`. State dicts of the wrapped model, and
trainers that save these, add the adapter's name (`lora_A.default.weight`, `modules_to_save.default.weight`),
repeat or omit the prefix, or add the names of wrappers (torch.compile, FSDP, activation checkpointing).
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxft.models.model_types import decoder_prefix, full_name, text_tensor
from jaxft.nn import tree
from jaxft.nn.tensor_names import is_listed, matches_module
from jaxft.weights.hf.safetensors import SafetensorsFiles, read_model_json

MERGE = "merge it with peft (merge_and_unload, save_pretrained) and use the merged folder as model="

# Fields of adapter_config.json that may change the arithmetic, with the values that leave it plain LoRA.
PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", "TRAINABLE_TOKENS"),
    "bias": ("none", "all", "lora_only"),
    "fan_in_fan_out": (False,),
    "use_dora": (False, True),
    "use_rslora": (False, True, None),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "ensure_weight_tying": (False, True, None),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica", "pissa", "olora"),
}
# Fields that are read elsewhere, or that do not change what a trained adapter computes.
OTHERS = (
    "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "task_type",
    "modules_to_save", "trainable_token_indices", "token_indices", "init_weights",
    "auto_mapping", "base_model_name_or_path", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
)  # fmt: skip
# Initialisations that change the base by a first pair which does not follow from the base alone.
UNKNOWN_START = ("pissa_niter", "corda", "lora_ga")
CONVERT = (
    "the adapter belongs to weights that its initialisation has changed; write it as plain LoRA with peft: "
    "model.save_pretrained(FOLDER, path_initial_model_for_weight_conversion=START), where START is the "
    "folder of the adapter as it was before training"
)
QUANTISED_BASE = (
    "the adapter belongs to the quantised weights that LoftQ has made; merge it with peft on these weights "
    "(merge_and_unload, save_pretrained) and use the merged folder as model="
)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises FileNotFoundError if it is missing, with the names of adapters in
    subfolders, and ValueError if it is not a JSON object.
    """
    path = folder / "adapter_config.json"
    if folder.is_dir() and not path.is_file():
        named = sorted(p.parent.name for p in folder.glob("*/adapter_config.json"))
        if named:
            raise FileNotFoundError(
                f"{path}: no such file, but adapters are in its subfolders ({', '.join(named)}), as peft "
                f"saves adapters with names; use one of them, such as {folder / named[0]}"
            )
        if (folder / "model" / "config.json").is_file():
            raise FileNotFoundError(
                f"{path}: no such file; {folder} has a model and no adapter, so use "
                f"model={folder / 'model'}"
            )
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file; expected a PEFT adapter's folder, or a run's with one"
        )
    config = read_model_json(path)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() in ("gaussian", "mica", "olora"):  # as peft, in any case
        config["init_lora_weights"] = start.lower()
    return config


def check_plain_lora(where: Path, config: dict[str, Any]) -> None:
    """Raise ValueError, naming the field, for a configuration of anything but plain LoRA."""
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(UNKNOWN_START):
        raise ValueError(f"{where}: init_lora_weights={start!r}: {CONVERT}")
    if start == "loftq":
        raise ValueError(f"{where}: init_lora_weights={start!r}: {QUANTISED_BASE}")
    for key, plain in PLAIN_LORA.items():
        if key in config and not _is_one_of(config[key], plain):
            raise ValueError(
                f"{where}: {key}={_short(config[key])} is not supported; jaxft reads LoRA with {key}="
                f"{' or '.join(repr(value) for value in plain if value != [])}; {MERGE}"
            )
    for key, value in config.items():
        if key not in PLAIN_LORA and key not in OTHERS and not _is_one_of(value, (None, False, [], {})):
            raise ValueError(
                f"{where}: jaxft does not know the field {_short(key)} (={_short(value)}), which may change "
                f"what the adapter computes; set it to null if it does not, else {MERGE}"
            )


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Return whether a JSON value is among `allowed` with its type: 0 is not False."""
    return any(type(value) is type(x) and value == x for x in allowed)


def check_targets(
    where: Path, config: dict[str, Any], present: Iterable[str], absent: Iterable[str] = ()
) -> None:
    """Raise ValueError unless the configuration targets exactly the modules with a LoRA pair.

    peft would silently ignore the pair of a module that is not targeted, and would add a fresh, untrained
    pair to a module that is targeted by its name and has none.

    present, absent: the model's modules with and without a pair, such as model.layers.0.self_attn.q_proj.
    """
    for field in ("target_modules", "exclude_modules"):
        value = config.get(field)
        if not isinstance(value, str | None) and not _are_strings(value):
            raise ValueError(f"{where}: {field}={_short(value)}; correct it to a string or a list of strings")
    targets = config.get("target_modules")
    is_default = targets in (None, "all-linear")  # None: peft's default for the architecture
    left_out_by = _target_rule(where, config, ".*" if is_default else targets)
    for module in present:
        if key := left_out_by(module):
            raise ValueError(
                f"{where}: {key}={_short(config[key])} leaves out {module}, but the adapter has a LoRA pair "
                f"of it, which peft would ignore; correct {key}, or remove the pair's tensors"
            )
    for module in () if is_default or not targets else absent:
        if not left_out_by(module):
            raise ValueError(
                f"{where}: target_modules={_short(targets)} has {module} of this model, but the adapter has "
                "no LoRA pair of it; use the base model of the adapter, or download the adapter again"
            )


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, str) for x in value)


def _target_rule(where: Path, config: dict[str, Any], targets: Any) -> Callable[[str], str | None]:
    """Return a function of a module's name that applies PEFT's rule: it returns None if the configuration
    targets the module, else the field of adapter_config.json that leaves it out.
    """
    excluded, layers = config.get("exclude_modules") or (), config.get("layers_to_transform")
    listed, unlisted = (x if isinstance(x, str) else frozenset(x) for x in (targets, excluded))
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if any(type(x) is not int for x in numbers):
        raise ValueError(f"{where}: layers_to_transform={_short(layers)}; correct it to layer numbers")
    patterns = config.get("layers_pattern") or ".*"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not _are_strings(patterns):
        raise ValueError(f"{where}: layers_pattern={_short(patterns)}; correct it to strings")

    def left_out_by(module: str) -> str | None:
        if not is_listed(listed, (module,), str(where)):
            return "target_modules"
        if unlisted and is_listed(unlisted, (module,), str(where)):
            return "exclude_modules"
        if isinstance(listed, str) or module in listed or not numbers:
            return None  # layers_to_transform counts for lists of ends of names only
        above, *rest = re.split(r"\.(\d+)\.", module, maxsplit=1)
        named = any(matches_module(pattern, (above,), str(where)) for pattern in patterns)
        return None if rest and named and int(rest[0]) in numbers else "layers_to_transform"

    return left_out_by


def check_tensor_names(files: SafetensorsFiles, dora: bool) -> None:
    """Raise ValueError for DoRA tensors if use_dora is false. dora: the configuration's use_dora."""
    for name in files.tensors:
        if "lora_magnitude_vector" in name and not dora:
            raise ValueError(
                f"{files.where}: tensor {name} belongs to DoRA, but adapter_config.json has use_dora=false; "
                "correct the one that is wrong"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# Names of tensors

PREFIX = "base_model.model."
WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\.")
# MODULE.lora_A[.NAME].weight and so on; a bias of lora_A belongs to no plain LoRA and is not renamed
_PAIR = re.compile(r"(?P<stem>.+\.lora_[AB])(?:\.(?P<name>[^.]+))?\.weight")
_VECTOR = re.compile(
    r"(?P<stem>.+\.(?:lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta))"
    r"(?:\.(?P<name>(?!weight\b)[^.]+))?(?:\.weight)?"
)
_SAVED = re.compile(r"(?P<stem>.+)\.modules_to_save(?:\.(?P<name>[^.]+))?\.(?P<end>weight|bias)")
_NESTED = re.compile(r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?")
_ORIGINAL = re.compile(r"(?P<stem>.+)\.original_module\.(?P<end>weight|bias)")


def with_plain_names(files: SafetensorsFiles) -> SafetensorsFiles:
    """Return an adapter's tensors under the names that save_pretrained gives them.

    Copies of the base's modules next to modules_to_save (`original_module`) are left out. Raises ValueError
    for tensors of several adapters, and for two tensors with the same plain name.
    """
    stored, names = dict[str, str](), dict[str | None, str]()
    originals, twice = list[tuple[str, str]](), list[tuple[str, str]]()
    for old in files.tensors:
        plain = WRAPPERS.sub("", old)
        bare = plain
        while bare.startswith(PREFIX):
            bare = bare.removeprefix(PREFIX)
        plain = PREFIX + bare
        if match := _ORIGINAL.fullmatch(plain):
            originals.append((old, f"{match['stem']}.{match['end']}"))
            continue
        for pattern, form in ((_PAIR, "{stem}.weight"), (_VECTOR, "{stem}"), (_SAVED, "{stem}.{end}")):
            if match := pattern.fullmatch(plain):
                plain = form.format(**match.groupdict())
                names.setdefault(match["name"], old)
                break
        twice += [(stored[plain], old)] if plain in stored else []
        stored[plain] = old
    if len(names) > 1:
        shown = ", ".join(f"{repr(name) if name else 'none'} ({problem})" for name, problem in names.items())
        raise ValueError(
            f"{files.where}: tensors of several adapters, by name: {shown}; save each with peft's "
            "save_pretrained(FOLDER, selected_adapters=[NAME])"
        )
    if twice:
        raise ValueError(
            f"{files.where}: tensors {' and '.join(twice[0])} have the same name in PEFT's layout; "
            "save the adapter with peft's save_pretrained"
        )
    stored |= {old: old for old, plain in originals if plain not in stored}
    return renamed(files, stored)


def of_decoder(files: SafetensorsFiles) -> tuple[SafetensorsFiles, str | None]:
    """Convert an adapter on a multimodal model to an adapter on its text decoder: return (files, prefix).

    files: the decoder's tensors, with the names of the text-only model. prefix: the text decoder's prefix in
    the multimodal model's names; None for an adapter on a text model, whose tensors keep their names.
    """
    bare = {name: name.removeprefix(PREFIX) for name in files.tensors}
    prefix = decoder_prefix(bare.values())
    if prefix is None or prefix == "model.":
        kept = {old: old for old, name in bare.items() if not name.startswith("visual.")}
        return renamed(files, kept), None
    text = {old: text_tensor(name, prefix) for old, name in bare.items()}
    return renamed(files, {f"{PREFIX}{new}": old for old, new in text.items() if new}), prefix


def config_of_decoder(config: dict[str, Any], prefix: str | None, modules: Sequence[str]) -> dict[str, Any]:
    """Replace a multimodal model's module names in adapter_config.json by the names in the text-only model.

    prefix: see of_decoder; None returns the configuration unchanged. modules: names in the text-only model.
    """
    if prefix is None:
        return config
    full = {full_name(module, prefix): module for module in modules}
    out = dict(config)
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        value = config.get(key)
        if isinstance(value, str) and value != "all-linear":
            out[key] = [module for name, module in full.items() if tree.regex(value, key).fullmatch(name)]
        elif isinstance(value, list):
            out[key] = [_NESTED.sub("model.", item) if isinstance(item, str) else item for item in value]
    for key in ("rank_pattern", "alpha_pattern"):
        values = config.get(key)
        if isinstance(values, dict):
            hits = {
                module: [value for pattern, value in values.items() if matches_module(pattern, (name,), key)]
                for name, module in full.items()
            }
            out[key] = {module: hit[0] for module, hit in hits.items() if hit}
    return out


def renamed(files: SafetensorsFiles, stored: dict[str, str]) -> SafetensorsFiles:
    """Select and rename tensors. stored: new name -> name in `files`."""
    return replace(files, tensors={new: files.tensors[old] for new, old in stored.items()})
