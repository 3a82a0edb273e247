"""The config that all dense decoder families share: its fields, and how config.json is read and written."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from jaxft.annotations import POSITIVE_FLOAT32, between, check_bounds
from jaxft.models.rope_config import (
    LAYER_TYPES,
    extended_positions,
    rope_from_hf,
    rope_to_hf,
    ropes_from_hf,
    ropes_to_hf,
)
from jaxft.nn.rope import Rope, check_rope

Size = Annotated[int, between(1, 2**24 - 1)]
Activation = Literal["silu", "gelu", "gelu_tanh"]
# Names of activations in config.json. Exports write the first name of each.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip


@dataclass(frozen=True)
class DenseConfig:
    """Sizes and settings of a dense decoder. Families add their own fields in subclasses.

    heads * head_dim may differ from width. tied: the embedding is also the head. rope: of all layers, or of
    those with full attention in families with a second one. max_positions: tokens of the longest row.
    activation: of the gated MLP; gelu is exact, gelu_tanh its tanh approximation. Raises ValueError for a
    value out of range.
    """

    vocab: Size
    width: Size
    layers: Annotated[int, between(1, 2**12 - 1)]
    heads: Size
    kv_heads: Size
    head_dim: Size
    mlp: Size
    rope: Rope = Rope()
    norm_eps: Annotated[float, POSITIVE_FLOAT32, "rms_norm_eps"] = 1e-5
    tied: bool = False
    max_positions: Size = 2048
    bos: int | None = 1
    eos: tuple[int, ...] = (2,)
    activation: Activation = "silu"

    def __post_init__(self):
        check_bounds(self, "config:")
        for token in (*self.eos, *([] if self.bos is None else [self.bos])):
            if type(token) is not int or token < 0:
                raise ValueError(f"config: bos and eos must be token ids, got {token!r}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"config: {self.heads} query heads are not divisible by {self.kv_heads} kv heads"
            )
        check_rope(self.rope, self.head_dim, self.max_positions)


# transformers' default of each setting, for a config.json that lacks it.
DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048, "bos_token_id": 1,
    "eos_token_id": 2, "rope_theta": 10000.0, "hidden_act": "silu", "head_dim": None,
}  # fmt: skip
SIZE_KEYS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclass(frozen=True)
class ConfigFormat:
    """How one family's config.json differs from that of other dense families.

    fixed: settings that would change the arithmetic, each with the only supported value; exports write them.
    defaults: the family's defaults where they differ from DEFAULTS; rope_theta may have one value per layer
    type. activation: the name of the setting for the MLP's activation. partial_rope: whether rope may rotate
    only a part of each head. local_theta: for families with one rope per layer type, the setting in which
    transformers 4 has the theta of sliding attention (see rope_config.ropes_from_hf).
    """

    model_type: str
    architecture: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    activation: str = "hidden_act"
    partial_rope: bool = False
    local_theta: str | None = None


def fields_from_hf(hf: dict[str, Any], form: ConfigFormat) -> dict[str, Any]:
    """Return the fields of a DenseConfig from the dict of a config.json, as transformers 4 or 5 writes it.

    With form.local_theta the result also has local_rope, the Rope of sliding attention. Raises ValueError
    that names a missing or unsupported setting.
    """
    if hf.get("model_type", form.model_type) != form.model_type:
        raise ValueError(f"config: model_type {hf['model_type']!r} is not {form.model_type!r}")
    for name, only in form.fixed.items():
        if hf.get(name, only) != only:
            raise ValueError(f"config: {name}={hf[name]!r} is not supported; use {name}={only!r}")
    for name in SIZE_KEYS:
        if name not in hf:
            raise ValueError(f"config: {name} is missing")
        if type(hf[name]) is not int or hf[name] < 1:
            raise ValueError(f"config: {name} must be a positive whole number, got {hf[name]!r:.60}")

    def get(name: str) -> Any:
        return hf.get(name, form.defaults.get(name, DEFAULTS.get(name)))

    width, heads, eos = hf["hidden_size"], hf["num_attention_heads"], get("eos_token_id")
    kv_heads, head_dim = hf.get("num_key_value_heads"), get("head_dim")
    for name in ("bos_token_id", "eos_token_id"):
        token_ids(hf.get(name), f"config: {name}", hf["vocab_size"])
    ropes = _ropes(hf, form, get("max_position_embeddings"))
    return {
        "vocab": hf["vocab_size"],
        "width": width,
        "layers": hf["num_hidden_layers"],
        "heads": heads,
        "kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": width // heads if head_dim is None else head_dim,
        "mlp": hf["intermediate_size"],
        "norm_eps": _number(get("rms_norm_eps"), "rms_norm_eps"),
        "tied": bool(get("tie_word_embeddings")),
        "max_positions": extended_positions(ropes["rope"], get("max_position_embeddings")),
        "bos": get("bos_token_id"),
        "eos": tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,),
        "activation": _activation(hf.get(form.activation, DEFAULTS["hidden_act"]), form.activation),
        **ropes,
    }


def token_ids(value: Any, name: str, vocab: int) -> list[int]:
    """Return the token ids of a setting in a JSON file: one, a list of them, or null. name: of the setting.

    Raises ValueError for an id that a vocabulary of this size does not have.
    """
    ids = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab:
            raise ValueError(
                f"{name} has {token!r:.60}, which is not a token id of this model; use 0 to {vocab - 1}"
            )
    return ids


def _ropes(hf: dict[str, Any], form: ConfigFormat, max_positions: Any) -> dict[str, Rope]:
    theta = form.defaults.get("rope_theta", DEFAULTS["rope_theta"])
    if form.local_theta is None:
        ropes = {"rope": rope_from_hf(hf, max_positions, theta)}
    else:
        thetas = theta if isinstance(theta, Mapping) else dict.fromkeys(LAYER_TYPES, theta)
        full, sliding = ropes_from_hf(hf, max_positions, thetas, form.local_theta).values()
        ropes = {"rope": full, "local_rope": sliding}
    for rope in ropes.values():
        if rope.rotated != 1 and not form.partial_rope:
            raise ValueError(
                f"config: partial_rotary_factor={rope.rotated} is not supported for model_type "
                f"{form.model_type!r}; use 1.0"
            )
    return ropes


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        raise ValueError(f"config: {name} must be above 0 and finite, got {value!r:.60}")
    return float(value)


def _activation(name: Any, key: str) -> Activation:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"config: {key}={name!r:.60} is not supported; use {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def fields_to_hf(c: DenseConfig, form: ConfigFormat, local_rope: Rope | None = None) -> dict[str, Any]:
    """Return the dict of a config.json, with rope settings that transformers 4 and 5 both read.

    local_rope: the Rope of sliding attention, for a family with form.local_theta.
    """
    length = c.max_positions
    if c.rope.kind == "dynamic":  # for which max_position_embeddings is the original length
        length = c.rope.original_max_positions or length
    if local_rope is None:
        rope = rope_to_hf(c.rope, length, form.model_type)
    else:
        ropes = dict(zip(LAYER_TYPES, (c.rope, local_rope), strict=True))
        rope = ropes_to_hf(ropes, length, form.model_type)
    names = (name for name, ours in ACTIVATIONS.items() if ours == c.activation)
    return {
        "architectures": [form.architecture],
        "model_type": form.model_type,
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp,
        form.activation: next(names),
        **form.fixed,
        "rms_norm_eps": c.norm_eps,
        **rope,
        "tie_word_embeddings": c.tied,
        "max_position_embeddings": length,
        "bos_token_id": c.bos,
        "eos_token_id": c.eos[0] if len(c.eos) == 1 else list(c.eos) or None,
        "initializer_range": 0.02,
        "use_cache": True,
    }
