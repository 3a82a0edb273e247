"""The text decoder of checkpoints that have other parts too: its config.json and the names of its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.gemma3 import GEMMA3_DEFAULTS


@dataclass(frozen=True)
class TextPart:
    """The text decoder of one multimodal model_type.

    model_type, architecture: of the decoder as a model of its own. defaults: what transformers takes for the
    settings that text_config doesn't have. ignored: settings that transformers doesn't apply in the
    multimodal model.
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
# Of the multimodal config.json, where the decoder's may have others.
SHARED = (
    "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype", "torch_dtype",
    "quantization_config", "transformers_version", "num_labels", "id2label", "label2id",
)  # fmt: skip
# Beginnings of the decoder's tensors in transformers 4 and 5, and in the decoder as a model of its own.
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
    """Return the config.json of a checkpoint's text decoder; that of a text model is returned as it is.

    Raises ValueError if it has no text_config, or another than is implemented.
    """
    kind = hf.get("model_type")
    part = TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if part is None:
        return hf
    text = hf.get("text_config")
    if not isinstance(text, dict) or text.get("model_type", part.model_type) != part.model_type:
        raise ValueError(
            f"config: model_type {kind!r} needs an object text_config of model_type {part.model_type!r}, got "
            f"{text!r:.80}"
        )
    for name in part.ignored:
        if text.get(name) is not None:
            raise ValueError(
                f"config: {name}={text[name]!r:.60} of text_config is not supported: transformers ignores it "
                f"in {kind!r} and applies it in {part.model_type!r}; use null"
            )
    shared = {name: hf[name] for name in SHARED if hf.get(name) is not None}
    own = {"model_type": part.model_type, "architectures": [part.architecture]}
    return {**part.defaults, **text, **shared, **own}


def text_tensor(name: str) -> str | None:
    """Return a tensor's name in the text decoder as a model of its own; None for other parts' tensors."""
    if name.startswith(OTHER_PARTS):
        return None
    return next((new + name.removeprefix(old) for old, new in PREFIXES.items() if name.startswith(old)), name)
