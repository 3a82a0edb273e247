"""The text decoder of multimodal checkpoints: its config.json, and the names of its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.gemma3 import GEMMA3_DEFAULTS


@dataclass(frozen=True)
class TextPart:
    """The text decoder of one multimodal model_type.

    model_type, architecture: of the decoder as a text-only model. defaults: transformers' defaults of
    settings that text_config lacks. ignored: settings that transformers applies in the text-only model but
    not in the multimodal one.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    ignored: tuple[str, ...] = ()


_GEMMA3_SIZES = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8,
}  # fmt: skip
TEXT_PARTS = {
    "gemma3": TextPart(
        "gemma3_text", "Gemma3ForCausalLM", _GEMMA3_SIZES | GEMMA3_DEFAULTS, ("final_logit_softcapping",)
    )
}
# Settings taken from the top level of the multimodal config.json, where text_config may have other values.
SHARED = (
    "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype", "torch_dtype",
    "quantization_config", "transformers_version", "num_labels", "id2label", "label2id",
)  # fmt: skip
# Prefixes of the decoder's tensor names: in multimodal files of transformers 4 and 5, and in text-only ones.
PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
OTHER_PARTS = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)


def text_config(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of a multimodal checkpoint's text decoder. One of a text model is returned
    unchanged.

    Raises ValueError if text_config is missing or not supported.
    """
    kind = hf.get("model_type")
    part = TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if part is None:
        return hf
    text = hf.get("text_config")
    if not isinstance(text, dict) or text.get("model_type", part.model_type) != part.model_type:
        raise ValueError(
            f"config: model_type {kind!r} needs an object text_config of model_type {part.model_type!r}, got "
            f"text_config={text!r:.80}"
        )
    for name in part.ignored:
        if text.get(name) is not None:
            raise ValueError(
                f"config: {name}={text[name]!r:.60} of text_config is not supported, because transformers "
                f"ignores it in model_type {kind!r} but applies it in {part.model_type!r}, which jaxft "
                "exports; set it to null"
            )
    shared = {name: hf[name] for name in SHARED if hf.get(name) is not None}
    own = {"model_type": part.model_type, "architectures": [part.architecture]}
    return {**part.defaults, **text, **shared, **own}


def text_tensor(name: str) -> str | None:
    """Return a tensor's name in the text-only model; None for a tensor that is not part of the decoder."""
    if name.startswith(OTHER_PARTS):
        return None
    return next((new + name.removeprefix(old) for old, new in PREFIXES.items() if name.startswith(old)), name)
