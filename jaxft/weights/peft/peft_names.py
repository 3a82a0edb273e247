"""Names of tensors in PEFT adapters as save_pretrained writes them, from what else is in use.

PEFT's `save_pretrained` writes `base_model.model.MODULE.lora_A.weight`. State dicts of the wrapped model, and
trainers that save these, have the adapter's name in it (`lora_A.default.weight`,
`modules_to_save.default.weight`), a second prefix, none, or the names of wrappers (torch.compile, FSDP,
activation checkpointing).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxft import tree
from jaxft.models.text_part import decoder_prefix, full_name, text_tensor
from jaxft.nn.tensor_names import matches_module
from jaxft.weights.hf.safetensors import SafetensorsFiles

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
        found = WRAPPERS.sub("", old)
        bare = found
        while bare.startswith(PREFIX):
            bare = bare.removeprefix(PREFIX)
        found = PREFIX + bare
        if match := _ORIGINAL.fullmatch(found):
            originals.append((old, f"{match['stem']}.{match['end']}"))
            continue
        for pattern, form in ((_PAIR, "{stem}.weight"), (_VECTOR, "{stem}"), (_SAVED, "{stem}.{end}")):
            if match := pattern.fullmatch(found):
                found = form.format(**match.groupdict())
                names.setdefault(match["name"], old)
                break
        twice += [(stored[found], old)] if found in stored else []
        stored[found] = old
    if len(names) > 1:
        shown = ", ".join(f"{repr(name) if name else 'none'} ({one})" for name, one in names.items())
        raise ValueError(
            f"{files.where}: tensors of several adapters, by name: {shown}; save each with peft's "
            "save_pretrained(FOLDER, selected_adapters=[NAME])"
        )
    if twice:
        raise ValueError(
            f"{files.where}: tensors {' and '.join(twice[0])} are the same one; save the adapter "
            "with peft's save_pretrained"
        )
    stored |= {old: old for old, plain in originals if plain not in stored}
    return renamed(files, stored)


def of_decoder(files: SafetensorsFiles) -> tuple[SafetensorsFiles, str | None]:
    """Return the tensors of an adapter on a multimodal model as those of its text decoder, and the prefix of
    their names; those of the other parts change nothing about text. Another adapter is returned as it is,
    with None.
    """
    bare = {name: name.removeprefix(PREFIX) for name in files.tensors}
    prefix = decoder_prefix(bare.values())
    if prefix is None or prefix == "model.":
        kept = {old: old for old, name in bare.items() if not name.startswith("visual.")}
        return renamed(files, kept), None
    text = {old: text_tensor(name, prefix) for old, name in bare.items()}
    return renamed(files, {f"{PREFIX}{new}": old for old, new in text.items() if new}), prefix


def config_of_decoder(config: dict[str, Any], prefix: str | None, modules: Sequence[str]) -> dict[str, Any]:
    """Return the configuration of an adapter on a multimodal model with the names that its text decoder's
    modules have in the text-only model. prefix: see of_decoder. modules: of the text-only model.
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
            out[key] = [_NESTED.sub("model.", one) if isinstance(one, str) else one for one in value]
    for key in ("rank_pattern", "alpha_pattern"):
        values = config.get(key)
        if isinstance(values, dict):
            hits = {
                module: [value for pattern, value in values.items() if matches_module(pattern, (name,), key)]
                for name, module in full.items()
            }
            out[key] = {module: found[0] for module, found in hits.items() if found}
    return out


def renamed(files: SafetensorsFiles, stored: dict[str, str]) -> SafetensorsFiles:
    """Return the tensors `stored`: the names in `files` by new name."""
    return replace(files, tensors={new: files.tensors[old] for new, old in stored.items()})
