"""Rope settings of config.json: read in every format of transformers 4 and 5, and written for both.

transformers 4 has rope_theta, partial_rotary_factor, original_max_position_embeddings and an object
rope_scaling at the top level. transformers 5 has one object rope_parameters, which some families split into
one object per layer type.
"""

from collections.abc import Mapping
from typing import Any

from jaxft.nn.rope import USED, Rope
from jaxft.tree import nearest

# Names of settings in config.json, and of the fields of Rope.
NUMBERS = {
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
LISTS = {"short_factor": "short_factor", "long_factor": "long_factor"}
SWITCHES = {"truncate": "truncate"}
FIELDS = {**NUMBERS, **LISTS, **SWITCHES}
ROPE_KEYS = ("rope_type", "type", *FIELDS)
# Settings that change nothing here. finetuned: the model was trained with the scaled rope. mrope_section: of
# multimodal models; for text, all sections have the same positions.
WITHOUT_EFFECT = ("finetuned", "mrope_section")
TOP_LEVEL = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")
ROPE_GROUPS = ("rope_scaling", "rope_parameters")  # the first non-empty one is used, as in transformers
LAYER_TYPES = ("full_attention", "sliding_attention")
LOCAL_THETA = ("gemma3", "gemma3_text")  # model types with rope_local_base_freq in transformers 4
EXACT_SCALING = ("phi3",)  # transformers 4 allows only type, short_factor and long_factor in rope_scaling
OTHER_NAMES = {"su": "longrope"}  # as Phi-3's first files call it
NEEDED = {  # required settings of each kind
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}

Settings = dict[str, Any]


def rope_from_hf(hf: Settings, max_positions: int, theta: float = 10000.0) -> Rope:
    """Return the Rope that transformers uses for a config.json.

    max_positions: its max_position_embeddings, which is also the original length if no setting states that.
    theta: the family's default of rope_theta. Precedence: rope_scaling, rope_parameters, the top level, the
    defaults. Raises ValueError for missing or unsupported settings, and for contradictory ones, since it is
    unknown which of them the model was trained with.
    """
    groups = {name: _group(hf.get(name), name) for name in ROPE_GROUPS}
    groups["config.json"] = {name: hf[name] for name in TOP_LEVEL if hf.get(name) is not None}
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
    top = {name: hf[name] for name in TOP_LEVEL if hf.get(name) is not None}
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
    """Return the settings in one object of config.json, with the rope type under the name rope_type."""
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
        raise ValueError(f"config: rope setting {names:.60} in {where} is not supported; near: {near}")
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
    if missing := [name for name in NEEDED.get(kind, ()) if name not in settings]:
        raise ValueError(f"config: rope type {kind!r} needs {', '.join(missing)}")
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
    values = {ours: settings[name] for name, ours in FIELDS.items() if ours in used and name in settings}
    numbers = {name: float(values[name]) for name in values.keys() & set(NUMBERS.values())}
    lists = {name: tuple(map(float, values[name])) for name in values.keys() & set(LISTS)}
    whole = {"original_max_positions": original} if "original_max_positions" in values else {}
    return Rope(kind=kind, **{**values, **numbers, **lists, **whole})


def _merged(groups: dict[str, Settings], theta: float) -> Settings:
    """Return the settings in effect: those of the first non-empty group, then those at the top level of
    config.json (the last group), then the defaults.

    Raises ValueError if another group contradicts them, or if a value has a wrong type.
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

    if name in NUMBERS and not is_number(value):
        raise ValueError(f"config: {name} of {where} must be a finite number, got {value!r:.60}")
    if name in LISTS and not (isinstance(value, list | tuple) and all(map(is_number, value))):
        raise ValueError(f"config: {name} of {where} must be a list of finite numbers, got {value!r:.60}")
    if name in SWITCHES and not isinstance(value, bool):
        raise ValueError(f"config: {name} of {where} must be true or false, got {value!r:.60}")


def extended_positions(rope: Rope, max_positions: int) -> int:
    """Return the tokens of the longest row of a model with max_position_embeddings=max_positions.

    yarn and dynamic extend the original length by `factor` if that is more than max_positions.
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
    """Return the object rope_parameters of transformers 5, without settings that have their default."""
    if rope.kind == "none":
        raise ValueError("config.json has no rope_parameters for layers without rope")
    plain, out = Rope(kind="none"), Settings(rope_type=rope.kind, rope_theta=rope.theta)
    needed = NEEDED.get(rope.kind, ())
    for name, ours in FIELDS.items():
        value = getattr(rope, ours)
        if ours in USED[rope.kind] and (name in needed or value != getattr(plain, ours)):
            out[name] = list(value) if ours in LISTS else value
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
