"""The config that all dense decoder families share: its fields, and how config.json is read and written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from jaxft.annotations import POSITIVE_FLOAT32, between, check_bounds
from jaxft.nn.attention.layer_attention import AttentionLayers, LayerKind
from jaxft.nn.rope import USED, Rope, check_rope
from jaxft.nn.tree import nearest

FULL, SLIDING = LAYER_TYPES = ("full_attention", "sliding_attention")
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

    heads * head_dim may differ from width. mlp: the MLP's hidden size. tied: the embedding is also the head.
    rope: of all layers; in families with a second rope, of the layers with full attention. max_positions:
    the maximum number of tokens of a row. activation: the gated MLP's; gelu is exact, gelu_tanh its tanh
    approximation. Raises ValueError for a value out of range.
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
                raise ValueError(
                    f"config: bos and eos must be token ids, whole numbers from 0 on; got {token!r}"
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"config: {self.heads} query heads are not divisible by {self.kv_heads} kv heads; "
                "correct num_attention_heads or num_key_value_heads"
            )
        check_rope(self.rope, self.head_dim, self.max_positions)


@dataclass(frozen=True)
class WindowConfig(DenseConfig):
    """Sizes of a model whose layers may have a sliding window. window: the number of keys that a query
    attends to in layers of type "sliding_attention". layer_types: () for full attention in all layers.
    """

    window: int | None = None
    layer_types: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if len(self.types) != self.layers:
            raise ValueError(
                f"config: layer_types must have a type for each of the {self.layers} layers, got "
                f"{len(self.types)} types"
            )
        if self.window is None and SLIDING in self.types:
            raise ValueError(
                f"config: layer_types has {SLIDING}, but sliding_window is null"
                f"; set it, or make every layer {FULL}"
            )

    @property
    def types(self) -> tuple[str, ...]:
        """The type of each layer."""
        return self.layer_types or (FULL,) * self.layers


# transformers' default of each setting, for a config.json that lacks it.
DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048, "bos_token_id": 1,
    "eos_token_id": 2, "rope_theta": 10000.0, "hidden_act": "silu", "head_dim": None,
}  # fmt: skip
SIZE_KEYS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclass(frozen=True)
class ConfigFormat:
    """Differences of one family's config.json from other dense families'.

    fixed: settings that would change the arithmetic, each with the only supported value; exports write them.
    defaults: the family's defaults of settings where they differ from DEFAULTS; rope_theta may have one value
    per layer type. more: settings that only this family has, with their defaults; each is also the name of a
    field of its config. activation: the name of the setting for the MLP's activation. partial_rope: whether
    rope may rotate only a part of each head. local_theta: for families with one rope per layer type, the
    setting in which transformers 4 has the theta of sliding attention (see ropes_from_hf).
    """

    model_type: str
    architecture: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, bool | float] = field(default_factory=dict)
    activation: str = "hidden_act"
    partial_rope: bool = False
    local_theta: str | None = None


def fields_from_hf(hf: dict[str, Any], form: ConfigFormat) -> dict[str, Any]:
    """Return the fields of a DenseConfig from the dict of a config.json, as transformers 4 or 5 writes it.

    With form.local_theta the result also has local_rope, the Rope of sliding attention. Raises ValueError for
    a missing or unsupported setting.
    """
    if hf.get("model_type", form.model_type) != form.model_type:
        raise ValueError(
            f"config: model_type {hf['model_type']!r} is not {form.model_type!r}; "
            "use the family of that model_type"
        )
    for name, only in form.fixed.items():
        if hf.get(name, only) != only:
            raise ValueError(f"config: {name}={hf[name]!r} is not supported; use {name}={only!r}")
    for name in SIZE_KEYS:
        if name not in hf:
            raise ValueError(f"config: {name} is missing; add it")
        if type(hf[name]) is not int or hf[name] < 1:
            raise ValueError(f"config: {name} must be a positive whole number, got {hf[name]!r:.60}")

    def get(name: str) -> Any:
        return hf.get(name, form.defaults.get(name, DEFAULTS.get(name)))

    width, heads, eos = hf["hidden_size"], hf["num_attention_heads"], get("eos_token_id")
    kv_heads, head_dim = get("num_key_value_heads"), get("head_dim")
    more = {name: hf.get(name, usual) for name, usual in form.more.items()}
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
        **{name: bool(x) if isinstance(form.more[name], bool) else x for name, x in more.items()},
    }


def token_ids(value: Any, name: str, vocab: int) -> list[int]:
    """Return the token ids of a setting in a JSON file, whose value may be an id, a list of ids or null.

    name: the setting's name, for errors. vocab: the vocabulary's size. Raises ValueError for an id outside of
    it.
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
        raise ValueError(
            f"config: {name} must be a finite number above 0 (not a string or a Boolean), got {value!r:.60}"
        )
    return float(value)


def _activation(name: Any, key: str) -> Activation:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"config: {key}={name!r:.60} is not supported; use {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def fields_to_hf(c: DenseConfig, form: ConfigFormat, local_rope: Rope | None = None) -> dict[str, Any]:
    """Return the dict of the config.json for a config, with rope settings that transformers 4 and 5 both
    read.

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
        **{name: getattr(c, name) for name in form.more},
    }


def read_layer_types(hf: Mapping[str, Any], default: Sequence[str]) -> tuple[str, ...]:
    """Return the type of each layer, from config.json's layer_types or the family's default. Raises
    ValueError unless the list has one known type per layer.
    """
    types = hf.get("layer_types")
    if types is None:
        return tuple(default)
    count = hf["num_hidden_layers"]
    if not isinstance(types, list | tuple) or len(types) != count:
        raise ValueError(
            f"config: layer_types must be a list of {count} types, one per layer, got {types!r:.80}"
        )
    if unknown := [kind for kind in types if kind not in (FULL, SLIDING)]:
        raise ValueError(
            f"config: layer type {unknown[0]!r:.60} is not supported; jaxft has {FULL} and {SLIDING}"
        )
    return tuple(types)


def window_from_hf(hf: Mapping[str, Any]) -> int | None:
    """Return config.json's sliding_window. Raises ValueError unless it is null or a positive number."""
    window = hf.get("sliding_window")
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(
            f"config: sliding_window must be a positive whole number or null, got {window!r:.60}"
        )
    return window


def typed_layers(c: WindowConfig, kinds: Mapping[str, LayerKind]) -> AttentionLayers:
    """Return the AttentionLayers of a config's layer_types. kinds: the LayerKind of each type."""
    used = list(dict.fromkeys(c.types))
    return AttentionLayers(
        tuple(kinds[name] for name in used), tuple(used.index(name) for name in c.types), c.head_dim
    )


# Rope: settings of transformers 4 and 5.
#
# transformers 4 has rope_theta, partial_rotary_factor, original_max_position_embeddings and an object
# rope_scaling at the top level; 5 has one object rope_parameters, which some families split into one for each
# layer type.

# Names of settings in config.json, and of the fields of Rope.
ROPE_NUMBERS = {
    "rope_theta": "theta",
    "factor": "factor",
    "original_max_position_embeddings": "original_max_positions",
    "partial_rotary_factor": "rotated",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "attention_factor": "attention_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
ROPE_LISTS = {"short_factor": "short_factor", "long_factor": "long_factor"}
ROPE_SWITCHES = {"truncate": "truncate"}
ROPE_FIELDS = {**ROPE_NUMBERS, **ROPE_LISTS, **ROPE_SWITCHES}
ROPE_KEYS = ("rope_type", "type", *ROPE_FIELDS)
# Settings that change nothing here. finetuned: the model was trained with the scaled rope. mrope_section: of
# multimodal models; for text, all sections have the same positions.
WITHOUT_EFFECT = ("finetuned", "mrope_section")
TOP_LEVEL_ROPE = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")
ROPE_GROUPS = ("rope_scaling", "rope_parameters")  # the first non-empty one is used, as in transformers
LOCAL_THETA = ("gemma3", "gemma3_text")  # model types with rope_local_base_freq in transformers 4
EXACT_SCALING = ("phi3",)  # transformers 4 allows only type, short_factor and long_factor in rope_scaling
OTHER_NAMES = {"su": "longrope"}  # as Phi-3's first files call it
NEEDED_BY_ROPE = {  # required settings of each kind
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}

Settings = dict[str, Any]


def rope_from_hf(hf: Settings, max_positions: int, theta: float = 10000.0) -> Rope:
    """Return the Rope that transformers uses for a config.json.

    max_positions: its max_position_embeddings; also the original length (see Rope) if no setting states it.
    theta: the family's default of rope_theta. Settings are from rope_scaling or, if that is empty, from
    rope_parameters, then from the top level, then defaults. Raises ValueError for missing or unsupported
    settings, and if another place contradicts the result: it is unknown which one the model was trained with.
    """
    groups = {name: _group(hf.get(name), name) for name in ROPE_GROUPS}
    groups["config.json"] = {name: hf[name] for name in TOP_LEVEL_ROPE if hf.get(name) is not None}
    return _rope(groups, max_positions, theta)


def ropes_from_hf(
    hf: Settings, max_positions: int, thetas: Mapping[str, float], local_theta: str
) -> dict[str, Rope]:
    """Return the Rope of each layer type, full_attention and sliding_attention.

    transformers 5 has an object for each in rope_parameters. In transformers 4, rope_scaling and rope_theta
    apply to full attention only; sliding attention has an unscaled rope whose theta is in the setting
    `local_theta`: rope_local_base_freq (Gemma 3) or rope_theta (OLMo 3). thetas: the family's defaults.
    """
    nested = _nested(hf)
    full, sliding = (nested.get(name, {}) for name in LAYER_TYPES)
    scaling, place = _group(hf.get("rope_scaling"), "rope_scaling"), "rope_parameters."
    top = {name: hf[name] for name in TOP_LEVEL_ROPE if hf.get(name) is not None}
    local = {} if hf.get(local_theta) is None else {"rope_theta": hf[local_theta]}
    groups = {
        "full_attention": {
            "rope_scaling": {**full, **scaling} if scaling else {},
            f"{place}full_attention": full,
            "config.json": top,
        },
        "sliding_attention": {f"{place}sliding_attention": sliding, f"{local_theta} of config.json": local},
    }
    return {name: _rope(groups[name], max_positions, thetas[name]) for name in LAYER_TYPES}


def _nested(hf: Settings) -> dict[str, Settings]:
    """Return the objects in rope_parameters by layer type; {} for a config.json of transformers 4."""
    parameters = hf.get("rope_parameters") or {}
    if not isinstance(parameters, dict) or parameters.keys() - set(LAYER_TYPES):
        raise ValueError(
            f"config: rope_parameters must have one object for {' and one for '.join(LAYER_TYPES)}, got "
            f"{parameters!r:.80}"
        )
    return {name: _group(value, f"rope_parameters.{name}") for name, value in parameters.items()}


def _group(group: Any, where: str) -> Settings:
    """Return the settings of a rope object of config.json, with its type under the name rope_type; {} for an
    empty object or null. where: the object's name in errors, such as rope_parameters.
    """
    if not group:
        return {}
    if not isinstance(group, dict):
        raise ValueError(f"config: {where} must be an object with a rope_type, got {group!r}")
    if group.keys() & set(LAYER_TYPES):
        raise ValueError(
            f"config: {where} has one object per layer type, which this model_type does not support; use one "
            "object for all layers"
        )
    if unknown := group.keys() - {*ROPE_KEYS, *WITHOUT_EFFECT}:
        names = ", ".join(sorted(map(repr, unknown)))
        near = ", ".join(nearest(str(min(unknown, key=str)), list(ROPE_KEYS)))
        raise ValueError(
            f"config: rope setting {names:.60} in {where} is not supported; remove it, or use {near}"
        )
    group = {name: value for name, value in group.items() if value is not None and name not in WITHOUT_EFFECT}
    kinds = [group.pop(name) for name in ("rope_type", "type") if name in group]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise ValueError(f"config: {where} has rope_type={kinds[0]!r} and type={kinds[1]!r}; remove one")
    if "factor" in group and not kinds:
        raise ValueError(
            f"config: {where} has factor={group['factor']!r:.60} but no rope_type; add the type that the "
            "model was trained with, such as linear or yarn"
        )
    kind = [OTHER_NAMES.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds[:1]]
    return group | ({"rope_type": kind[0]} if kind else {})


def _rope(groups: dict[str, Settings], max_positions: int, theta: float) -> Rope:
    settings = _merged(groups, theta)
    kind = settings["rope_type"]
    if not isinstance(kind, str) or kind not in USED or kind == "none":
        known = ", ".join(name for name in USED if name != "none")
        raise ValueError(f"config: rope type {kind!r:.60} is not supported; jaxft has {known}")
    original = settings.get("original_max_position_embeddings")
    if kind == "yarn" and "factor" not in settings and isinstance(original, int) and original > 0:
        settings["factor"] = max_positions / original
    if missing := [name for name in NEEDED_BY_ROPE.get(kind, ()) if name not in settings]:
        raise ValueError(
            f"config: rope type {kind!r} needs {', '.join(missing)}; add them to rope_parameters"
        )
    if "original_max_positions" in USED[kind]:
        if type(max_positions) is not int or max_positions < 1:
            raise ValueError(
                f"config: max_position_embeddings must be a positive whole number, got {max_positions!r:.60}"
            )
        if kind == "dynamic":
            settings["original_max_position_embeddings"] = max_positions
        original = int(settings.setdefault("original_max_position_embeddings", max_positions))
        settings["original_max_position_embeddings"] = original
        if kind == "longrope" and original > 0:
            settings.setdefault("factor", max_positions / original)
    used = {"theta", "rotated", *USED[kind]}
    values = {ours: settings[name] for name, ours in ROPE_FIELDS.items() if ours in used and name in settings}
    numbers = {name: float(values[name]) for name in values.keys() & set(ROPE_NUMBERS.values())}
    lists = {name: tuple(map(float, values[name])) for name in values.keys() & set(ROPE_LISTS)}
    whole = {"original_max_positions": original} if "original_max_positions" in values else {}
    return Rope(kind=kind, **{**values, **numbers, **lists, **whole})


def _merged(groups: dict[str, Settings], theta: float) -> Settings:
    """Return the rope settings in effect: from the first group that is not empty, then from the last one (the
    top level of config.json), then the defaults.

    groups: settings by place in config.json. Raises ValueError if another group contradicts the result, or if
    a value has a wrong type.
    """
    for where, group in groups.items():
        for name, value in group.items():
            _check_value(name, value, where)
    *first, last = groups
    used = next((name for name in first if groups[name]), last)
    rope = {"rope_type": "default", "rope_theta": theta, **groups[last], **groups[used]}
    for where, group in groups.items():
        for name, value in group.items():
            if rope.get(name) != value:
                raise ValueError(
                    f"config: {where} has {name}={value!r}, but {used} takes precedence and results in "
                    f"{name}={rope.get(name)!r}; set both to the value that the model was trained with"
                )
    return rope


def _check_value(name: str, value: Any, where: str) -> None:
    def is_number(x: Any) -> bool:
        return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e300

    if name in ROPE_NUMBERS and not is_number(value):
        raise ValueError(f"config: {name} of {where} must be a finite number, got {value!r:.60}")
    if name in ROPE_LISTS and not (isinstance(value, list | tuple) and all(map(is_number, value))):
        raise ValueError(f"config: {name} of {where} must be a list of finite numbers, got {value!r:.60}")
    if name in ROPE_SWITCHES and not isinstance(value, bool):
        raise ValueError(f"config: {name} of {where} must be true or false, got {value!r:.60}")


def extended_positions(rope: Rope, max_positions: int) -> int:
    """Return the maximum number of tokens of a row: max_positions (the model's max_position_embeddings), or
    with yarn and dynamic the original length times `factor` if that is more.
    """
    if rope.kind not in ("yarn", "dynamic") or rope.original_max_positions is None:
        return max_positions
    return max(max_positions, int(min(rope.original_max_positions * rope.factor, 2.0**31)))


def rope_to_hf(rope: Rope, max_positions: int, model_type: str) -> Settings:
    """Return a Rope as settings of config.json that transformers 4 and 5 both read."""
    return for_transformers_4(_parameters(rope, max_positions), model_type)


def ropes_to_hf(ropes: Mapping[str, Rope], max_positions: int, model_type: str) -> Settings:
    """Return the Rope of each layer type as settings of config.json (see ropes_from_hf)."""
    nested = {name: _parameters(rope, max_positions) for name, rope in ropes.items()}
    return for_transformers_4(nested, model_type) | {"rope_parameters": nested}


def _parameters(rope: Rope, max_positions: int) -> Settings:
    """Return transformers 5's object rope_parameters for a Rope, without settings that have their default."""
    if rope.kind == "none":
        raise ValueError(
            "rope_parameters of config.json cannot describe a layer without RoPE; build the model with a "
            "family whose configuration lists these layers, such as smollm3"
        )
    plain, out = Rope(kind="none"), Settings(rope_type=rope.kind, rope_theta=rope.theta)
    needed = NEEDED_BY_ROPE.get(rope.kind, ())
    for name, ours in ROPE_FIELDS.items():
        value = getattr(rope, ours)
        if ours in USED[rope.kind] and (name in needed or value != getattr(plain, ours)):
            out[name] = list(value) if ours in ROPE_LISTS else value
    if rope.kind == "dynamic":  # transformers uses max_position_embeddings as the original length
        del out["original_max_position_embeddings"]
    if rope.kind == "longrope" and rope.factor == max_positions / out["original_max_position_embeddings"]:
        out.pop("factor", None)  # Phi-3 in transformers 4 refuses it
    if rope.rotated != 1:
        out["partial_rotary_factor"] = rope.rotated
    return out


def for_transformers_4(parameters: Settings, model_type: str) -> Settings:
    """Return rope_parameters as settings that transformers 4 and llama.cpp's converter read.

    parameters: one object, or one per layer type. Unknown settings are copied unchanged.
    """
    if "full_attention" in parameters:
        out = for_transformers_4(parameters["full_attention"], model_type)
        sliding = parameters.get("sliding_attention") or {}
        local = model_type in LOCAL_THETA and "rope_theta" in sliding
        return out | ({"rope_local_base_freq": sliding["rope_theta"]} if local else {})
    group = {name: value for name, value in parameters.items() if value is not None}
    kinds = [group.pop(name) for name in ("rope_type", "type") if name in group]
    kind = kinds[0] if kinds else "default"
    out = {name: group.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in group}
    if kind == "default":
        return out | {"rope_scaling": None}
    original = group.get("original_max_position_embeddings")
    if kind == "longrope" and original is not None:
        out["original_max_position_embeddings"] = original
        if model_type in EXACT_SCALING:
            del group["original_max_position_embeddings"]
            return out | {"rope_scaling": {"type": kind, **group}}
    return out | {"rope_scaling": {"rope_type": kind, **group}}
