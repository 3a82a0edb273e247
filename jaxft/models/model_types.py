"""The family of each `model_type` in config.json; the text decoder of multimodal checkpoints; and the error
for an unsupported model, which names the parts of it that jaxft lacks.

To add a family, write its file next to llama.py and name it in FAMILIES.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxft.models.dense import Family
from jaxft.models.dense_config import ACTIVATIONS, DenseConfig
from jaxft.models.families import gemma, llama, olmo, phi3, qwen
from jaxft.models.families.gemma import GEMMA3_DEFAULTS
from jaxft.models.model import Model
from jaxft.nn.tree import nearest

FAMILIES: dict[str, Family] = {
    family.form.model_type: family
    for family in (
        llama.LLAMA, llama.MISTRAL, llama.MINISTRAL, qwen.QWEN2, qwen.QWEN3, olmo.OLMO2, olmo.OLMO3,
        llama.GRANITE, olmo.EXAONE4, llama.SEED_OSS, llama.CWM, llama.INTERNLM3, llama.IQUEST_CODER,
        gemma.GEMMA, gemma.GEMMA2, gemma.VAULT_GEMMA, gemma.GEMMA3, phi3.PHI3, llama.SMOLLM3,
    )
}  # fmt: skip


def preset_config(ref: str) -> DenseConfig | None:
    """Return the config of a checkpoint name that is a preset of a family; None for other names."""
    return next((f.presets[ref] for f in FAMILIES.values() if ref in f.presets), None)


def preset(ref: str, **options: Any) -> Model | None:
    """Build the model of a checkpoint name that is a preset of a family; return None for other names.

    options: see Family.build.
    """
    config = preset_config(ref)
    return None if config is None else _family_with(config).build(config, **options)


def _family_with(config: DenseConfig) -> Family:
    """Return the family whose configs have the class of `config`."""
    return next(family for family in FAMILIES.values() if type(config) is family.config)


def family_of(hf_config: dict[str, Any]) -> Family:
    """Return the family of a config.json. Raises ValueError for an unsupported model_type; the error names
    the parts of the model that jaxft lacks.
    """
    kind = hf_config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(refusal(hf_config, list(FAMILIES)))
    return FAMILIES[kind]


# Model types without a sequence classifier in transformers 5.
WITHOUT_CLASSIFIER = ("granite", "cwm", "internlm3", "iquestcoder", "vaultgemma")


def has_classifier(config: DenseConfig) -> bool:
    """Return whether transformers has a sequence classifier for this family, which can load jaxft's reward
    models; True for a config of no family.
    """
    has_family = any(type(config) is family.config for family in FAMILIES.values())
    return not has_family or config_to_hf(config)["model_type"] not in WITHOUT_CLASSIFIER


def with_vocab(model: Model, vocab: int) -> Model:
    """Return the Model of the same family and config, but with an embedding table of `vocab` rows. It has the
    dtype of `model`, and the defaults of all other options.
    """
    config: Any = model.config
    return _family_with(config).build(replace(config, vocab=vocab), dtype=model.dtype)


def config_to_hf(config: DenseConfig) -> dict[str, Any]:
    """Return the dict of the config.json for a config of any family."""
    return _family_with(config).to_hf(config)


# The error for an unsupported model_type


RECURRENT = "state-space, recurrent, convolution or linear-attention layers"
# Parts that jaxft lacks. Each has two patterns: settings of config.json that show it (their value is not
# null, false, 0 or empty), and model types that have it, for a config.json that lacks these settings.
PARTS = {
    "an encoder next to its decoder": (
        r"is_encoder_decoder|(num_)?(encoder|decoder)_layers",
        r"m?t5.*|m?bart|pegasus.*|whisper",
    ),
    "parts for images, audio or video": (
        r"(vision|audio|image|speech|text|thinker|talker|vit|vq|vqgan|backbone)_(tower_)?config"
        r"|(image|audio|video)_token_(id|index)|mm_vision_tower",
        r".*_vl(_moe)?|.*llava.*|idefics.*|voxtral|.*vision.*|.*multimodal|.*_omni|mllama|pixtral|paligemma",
    ),
    "mixture-of-experts layers": (
        r".*experts?|moe_.*|.*_moe_.*",
        r".*moe.*|mixtral|deepseek_v[23].*|gpt_oss|dbrx|jamba|llama4.*",
    ),
    RECURRENT: (
        r".*mamba_.*|mamba_.*|ssm_.*|state_size|conv_kernel|conv_L_cache|lru_width|linear_.*heads|.*recurrent_.*"
        r"|layers_block_type|block_types|qk_dim_factor",
        r".*mamba.*|jamba|rwkv.*|xlstm|lfm[23].*|zamba.*|bamba|falcon_h1|qwen3_(next|5.*)|recurrent_gemma"
        r"|.*hybrid|nemotron_h|minimax",
    ),
    "multi-head latent attention": (r"kv_lora_rank", r"deepseek_v[23]|minicpm3"),
    "an encoder with attention in both directions": (r"type_vocab_size", r".*bert.*"),
}
# Named only for a model that has none of PARTS.
LAYER_NORM = "layer norms with a mean"
LAYER_NORMS = re.compile(r"layer_?norm_eps(ilon)?|norm_epsilon|layernorm_epsilon")
OTHER_TYPES = {
    r"glm4?|helium|ernie4_5": "rope that rotates neighbouring dimensions",
    r"hunyuan_v1_dense": "norms of queries and keys after rope",
    r"ministral3": "queries that are scaled by their position",
    r"granite_swa": "attention sinks",
    r"diffllama": "differential attention",
    r"gemma3n_text|gemma4.*": "embeddings for each layer",
    r"gpt2|gpt_neox|gptj|opt|bloom|falcon|phi|stablelm|starcoder2|cohere2?|mpt|olmo": LAYER_NORM,
}
LAYER_KINDS = re.compile(r"linear_attention|.*conv|mamba.*|recurrent|gated_delta.*")  # of layer_types


def missing_parts(hf: Mapping[str, Any]) -> list[str]:
    """Return the parts that a model needs and jaxft lacks, such as "mixture-of-experts layers", by the
    model_type and settings in its config.json; [] if these show none.
    """
    kind = str(hf.get("model_type"))
    shown = [name for name, value in _flat(hf) if value not in (None, False, 0, "", [], {})]
    missing = [
        part
        for part, (settings, types) in PARTS.items()
        if re.fullmatch(types, kind) or any(re.fullmatch(settings, name) for name in shown)
    ]
    types = hf.get("layer_types")
    if (
        RECURRENT not in missing
        and isinstance(types, list)
        and any(LAYER_KINDS.fullmatch(str(t)) for t in types)
    ):
        missing.append(RECURRENT)
    return missing or _other(hf, kind, shown)


def _other(hf: Mapping[str, Any], kind: str, shown: list[str]) -> list[str]:
    parts = [part for types, part in OTHER_TYPES.items() if re.fullmatch(types, kind)]
    if not parts and any(map(LAYER_NORMS.fullmatch, shown)):
        parts = [LAYER_NORM]
    activation = hf.get("hidden_act")
    if not parts and isinstance(activation, str) and activation not in ACTIVATIONS:
        parts = [f"the activation {activation}"]
    return parts


def _flat(hf: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the (name, value) settings of a config.json: at its top level, in attn_config and ffn_config."""
    inner = [hf.get(name) for name in ("attn_config", "ffn_config")]
    return [*hf.items(), *(item for group in inner if isinstance(group, Mapping) for item in group.items())]


def refusal(hf: Mapping[str, Any], implemented: list[str]) -> str:
    """Return the error for a config.json whose model_type is not in `implemented`."""
    kind, parts = hf.get("model_type"), missing_parts(hf)
    line = f"model_type {kind!r:.60} is not supported"
    if kind is None:
        line = "config: model_type is missing"
    elif parts:
        line += f": it has {' and '.join(parts)}"
    elif isinstance(kind, str):
        line += f" (near: {', '.join(nearest(kind, implemented))})"
    text = hf.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    if inner in implemented:
        return (
            f"{line}; its text decoder ({inner}) is supported: save it as a separate model with "
            "transformers, and load that"
        )
    return f"{line}; supported types: python scripts/help.py models"


# The text decoder of multimodal checkpoints


@dataclass(frozen=True)
class TextPart:
    """The text decoder of one multimodal model_type.

    decoders: {model_type that text_config may have: model_type of the equal text-only model}; the first one
    is for a text_config without a model_type. prefix: the beginning of the names of the decoder's modules in
    transformers' class. tied: whether the head is tied to the embedding if the config.json does not state it.
    flat: whether older files have the decoder's settings at the top level. ignored: settings that
    transformers applies in the text-only model but not in the multimodal one.
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
SHARED_SETTINGS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "quantization_config",
    "transformers_version", "num_labels", "id2label", "label2id",
)  # fmt: skip
TIED = "tie_word_embeddings"
# Prefixes of the names of the decoder's tensors in files of transformers 5 and 4.
DECODER_PREFIXES = ("model.language_model.", "language_model.model.", "model.text_model.")
HEAD_PREFIXES = ("lm_head.", "score.")


def text_part(hf: Mapping[str, Any]) -> TextPart | None:
    """Return the TextPart of a multimodal model's config.json; None for a text model."""
    kind = hf.get("model_type")
    return TEXT_PARTS.get(kind) if isinstance(kind, str) else None


def text_config(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of a multimodal checkpoint's text decoder as a text-only model. The config.json
    of a text model is returned unchanged.

    Raises ValueError if text_config is missing or not supported.
    """
    part, kind = text_part(hf), hf.get("model_type")
    if part is None:
        return hf
    text = hf.get("text_config")
    if text is None and part.flat and "hidden_size" in hf:
        text = {name: value for name, value in hf.items() if not name.startswith(("model_type", "vision_"))}
    if not isinstance(text, dict):
        raise ValueError(
            f"config: model_type {kind!r} needs an object text_config with the settings of its text decoder, "
            f"got {text!r:.80}; add it"
        )
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
    shared = {name: hf[name] for name in SHARED_SETTINGS if hf.get(name) is not None}
    stated = [group[TIED] for group in (hf, text) if group.get(TIED) is not None]
    shared[TIED] = any(stated) if stated else part.tied
    config = {**_defaults(decoder, text), **_with_plain_rope(text), **shared}
    config |= {"model_type": part.decoders[decoder]}
    family = FAMILIES[config["model_type"]]
    return config | {"architectures": family.to_hf(family.from_hf(config))["architectures"]}


def _refused(text: dict[str, Any], part: TextPart) -> str:
    kind, decoders = text["model_type"], list(dict.fromkeys(part.decoders.values()))
    if kind in FAMILIES:
        return f"model_type {kind!r} is supported alone, but not as its decoder; use one of {decoders}"
    return refusal(text, decoders)


def _defaults(decoder: str, text: dict[str, Any]) -> dict[str, Any]:
    defaults = dict(TEXT_DEFAULTS.get(decoder, {}))
    groups = [text.get(name) for name in ("rope_parameters", "rope_scaling")]
    if any("rope_theta" in group for group in groups if isinstance(group, dict)):
        defaults.pop("rope_theta", None)
    return defaults


def _with_plain_rope(text: dict[str, Any]) -> dict[str, Any]:
    """Remove M-RoPE's settings: the three positions of a token are equal in a text, so it is plain rope."""
    out = dict(text)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(text.get(name), dict):
            rope = {key: value for key, value in text[name].items() if not key.startswith("mrope_")}
            out[name] = {key: "default" if value == "mrope" else value for key, value in rope.items()}
    return out


def decoder_prefix(names: Iterable[str]) -> str | None:
    """Return the prefix that the text decoder's tensors have in a multimodal model's files, or an adapter's.

    names: of all tensors in the files. None if none of them is the decoder's.
    """
    names = list(names)
    plain = ("model.layers.", "model.embed_tokens.", "model.norm.")  # as in Qwen2-VL's first files
    prefixes = (*DECODER_PREFIXES, *(["model."] if any(name.startswith(plain) for name in names) else []))
    return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)), None)


def text_tensor(name: str, prefix: str) -> str | None:
    """Return the text-only model's name for a tensor of a multimodal model; None for a tensor that is not
    part of the text decoder. prefix: see decoder_prefix.
    """
    if name.startswith(prefix) and not name.startswith("model.visual."):
        return f"model.{name.removeprefix(prefix)}"
    head = name.removeprefix("language_model.")
    return head if head.startswith(HEAD_PREFIXES) else None


def full_name(name: str, prefix: str) -> str:
    """Invert text_tensor: return the multimodal model's name for a text-only model's tensor or module."""
    return f"{prefix}{name.removeprefix('model.')}" if name.startswith("model.") else name
