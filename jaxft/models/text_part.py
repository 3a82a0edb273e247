"""The text decoder of multimodal checkpoints: its config.json, and the names of its tensors."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.families.gemma import GEMMA3_DEFAULTS
from jaxft.models.model_types import FAMILIES, refusal


@dataclass(frozen=True)
class TextPart:
    """The text decoder of one multimodal model_type.

    decoders: model_types that text_config may have, each with the model_type of the equal text-only model;
    the first is for a text_config without a model_type. prefix: of the names of the decoder's modules in
    transformers' class. tied: whether the head is the embedding if the config.json does not state it. flat:
    whether older files have the decoder's settings at the top level. ignored: settings that transformers
    applies in the text-only model but not in the multimodal one.
    """

    decoders: Mapping[str, str]
    prefix: str = "model.language_model."
    tied: bool = False
    flat: bool = False
    ignored: tuple[str, ...] = ()


# Decoders whose head is a matrix and nothing else, so that they compute the same under any class.
_ANY = {kind: kind for kind in ("llama", "mistral", "qwen2", "qwen3", "phi3")}


def _any(first: str) -> dict[str, str]:
    return {first: first, **_ANY}


TEXT_PARTS = {
    "gemma3": TextPart({"gemma3_text": "gemma3_text"}, tied=True, ignored=("final_logit_softcapping",)),
    "mistral3": TextPart(_any("mistral"), tied=True),
    "llava": TextPart(_any("llama")),
    "llava_next": TextPart(_any("llama")),
    "llava_next_video": TextPart(_any("llama")),
    "llava_onevision": TextPart(_any("qwen2")),
    "vipllava": TextPart(_any("llama")),
    "video_llava": TextPart(_any("llama")),
    "idefics2": TextPart(_any("mistral"), "model.text_model."),
    "idefics3": TextPart(_any("llama"), "model.text_model."),
    "smolvlm": TextPart(_any("llama"), "model.text_model."),
    "internvl": TextPart(_any("qwen2"), tied=True),
    "ovis2": TextPart(_any("qwen2"), tied=True),
    "got_ocr2": TextPart(_any("qwen2"), tied=True),
    "lighton_ocr": TextPart(_any("qwen3"), tied=True),
    "deepseek_vl": TextPart(_any("llama"), tied=True),
    "janus": TextPart(_any("llama"), tied=True),
    "video_llama_3": TextPart(_any("qwen2")),
    "exaone4_5": TextPart({"exaone4": "exaone4"}),
    "qwen2_vl": TextPart({"qwen2_vl_text": "qwen2", "qwen2_vl": "qwen2"}, flat=True),
    "qwen2_5_vl": TextPart({"qwen2_5_vl_text": "qwen2", "qwen2_5_vl": "qwen2"}, flat=True),
    "qwen3_vl": TextPart({"qwen3_vl_text": "qwen3"}),
}


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _sizes(*values: int, **others: Any) -> dict[str, Any]:
    return dict(zip(_SIZES, values, strict=True)) | others


_QWEN_VL = _sizes(152064, 8192, 29568, 80, 64, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6)
# transformers' defaults of settings that text_config may lack, where a text-only model has others or none.
TEXT_DEFAULTS = {
    "gemma3_text": _sizes(262208, 2304, 9216, 26, 8) | GEMMA3_DEFAULTS,
    "llama": _sizes(32000, 4096, 11008, 32, 32),
    "mistral": _sizes(32000, 4096, 14336, 32, 32, num_key_value_heads=8),
    "qwen2": _sizes(151936, 4096, 22016, 32, 32),
    "qwen3": _sizes(151936, 4096, 22016, 32, 32),
    "phi3": _sizes(32064, 3072, 8192, 32, 32),
    "exaone4": _sizes(102400, 4096, 16384, 32, 32),
    "qwen2_vl_text": _QWEN_VL,
    "qwen2_5_vl_text": _QWEN_VL,
    "qwen3_vl_text": _sizes(151936, 4096, 22016, 32, 32, max_position_embeddings=128000, rope_theta=5e5),
}
# Settings taken from the top level of the multimodal config.json, where text_config may have other values.
SHARED = (
    "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "quantization_config",
    "transformers_version", "num_labels", "id2label", "label2id",
)  # fmt: skip
TIED = "tie_word_embeddings"
# Prefixes of the names of the decoder's tensors in files of transformers 5 and 4.
DECODER_PREFIXES = ("model.language_model.", "language_model.model.", "model.text_model.")
HEADS = ("lm_head.", "score.")


def text_part(hf: Mapping[str, Any]) -> TextPart | None:
    """Return the text decoder of a config.json's multimodal model; None for a text model."""
    kind = hf.get("model_type")
    return TEXT_PARTS.get(kind) if isinstance(kind, str) else None


def text_config(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of a multimodal checkpoint's text decoder. One of a text model is returned
    unchanged.

    Raises ValueError if text_config is missing or not supported.
    """
    part, kind = text_part(hf), hf.get("model_type")
    if part is None:
        return hf
    text = hf.get("text_config")
    if text is None and part.flat and "hidden_size" in hf:
        text = {name: value for name, value in hf.items() if not name.startswith(("model_type", "vision_"))}
    if not isinstance(text, dict):
        raise ValueError(f"config: model_type {kind!r} needs an object text_config, got {text!r:.80}")
    decoder = text.get("model_type", next(iter(part.decoders)))
    if decoder not in part.decoders:
        raise ValueError(f"config: text_config of this {kind!r}: {_refused(text, part)}")
    for name in part.ignored:
        if text.get(name) is not None:
            raise ValueError(
                f"config: {name}={text[name]!r:.60} of text_config is not supported, because transformers "
                f"ignores it in model_type {kind!r} but applies it in {part.decoders[decoder]!r}; "
                "set it to null"
            )
    shared = {name: hf[name] for name in SHARED if hf.get(name) is not None}
    stated = [group[TIED] for group in (hf, text) if group.get(TIED) is not None]
    shared[TIED] = any(stated) if stated else part.tied
    config = {**_defaults(decoder, text), **_with_plain_rope(text), **shared}
    config |= {"model_type": part.decoders[decoder]}
    family = FAMILIES[config["model_type"]]
    return config | {"architectures": family.to_hf(family.from_hf(config))["architectures"]}


def _refused(text: dict[str, Any], part: TextPart) -> str:
    kind, decoders = text["model_type"], list(dict.fromkeys(part.decoders.values()))
    if kind in FAMILIES:
        return f"model_type {kind!r} is supported alone, but not in this one, which may have {decoders}"
    return refusal(text, decoders)


def _defaults(decoder: str, text: dict[str, Any]) -> dict[str, Any]:
    defaults = dict(TEXT_DEFAULTS.get(decoder, {}))
    groups = [text.get(name) for name in ("rope_parameters", "rope_scaling")]
    if any("rope_theta" in group for group in groups if isinstance(group, dict)):
        defaults.pop("rope_theta", None)
    return defaults


def _with_plain_rope(text: dict[str, Any]) -> dict[str, Any]:
    """Return settings without M-RoPE's sections of positions, which for text are all the same position."""
    out = dict(text)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(text.get(name), dict):
            rope = {key: value for key, value in text[name].items() if not key.startswith("mrope_")}
            out[name] = {key: "default" if value == "mrope" else value for key, value in rope.items()}
    return out


def decoder_prefix(names: Iterable[str]) -> str | None:
    """Return the prefix of the decoder's tensors in the files of a model or of an adapter on it; None if
    they have none of it.
    """
    names = list(names)
    plain = ("model.layers.", "model.embed_tokens.", "model.norm.")  # as in Qwen2-VL's first files
    prefixes = (*DECODER_PREFIXES, *(["model."] if any(name.startswith(plain) for name in names) else []))
    return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)), None)


def text_tensor(name: str, prefix: str) -> str | None:
    """Return a tensor's name in the text-only model; None for a tensor that is not part of the decoder.
    prefix: see decoder_prefix.
    """
    if name.startswith(prefix) and not name.startswith("model.visual."):
        return f"model.{name.removeprefix(prefix)}"
    head = name.removeprefix("language_model.")
    return head if head.startswith(HEADS) else None


def full_name(name: str, prefix: str) -> str:
    """Return the name of a tensor or a module of the decoder in the multimodal model."""
    return f"{prefix}{name.removeprefix('model.')}" if name.startswith("model.") else name
