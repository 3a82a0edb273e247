"""Names of tensors in PEFT adapters as save_pretrained writes them, from what else is in use.

PEFT's `save_pretrained` writes `base_model.model.MODULE.lora_A.weight`. State dicts of the wrapped model, and
trainers that save these, have the adapter's name in it (`lora_A.default.weight`,
`modules_to_save.default.weight`), a second prefix, none, or the names of wrappers (torch.compile, FSDP,
activation checkpointing).
"""

import re
from dataclasses import replace

from jaxft.weights.safetensors import SafetensorsFiles

PREFIX = "base_model.model."
WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\.")
# MODULE.lora_A[.NAME].weight and so on; a bias of lora_A belongs to no plain LoRA and is not renamed
_PAIR = re.compile(r"(?P<stem>.+\.lora_[AB])(?:\.(?P<name>[^.]+))?\.weight")
_VECTOR = re.compile(
    r"(?P<stem>.+\.(?:lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta))"
    r"(?:\.(?P<name>(?!weight\b)[^.]+))?(?:\.weight)?"
)
_SAVED = re.compile(r"(?P<stem>.+)\.modules_to_save(?:\.(?P<name>[^.]+))?\.(?P<end>weight|bias)")
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


def renamed(files: SafetensorsFiles, stored: dict[str, str]) -> SafetensorsFiles:
    """Return the tensors `stored`: the names in `files` by new name."""
    return replace(files, tensors={new: files.tensors[old] for new, old in stored.items()})
