"""Write LoRA adapters, and heads with them, in PEFT's layout: adapter_config.json and
adapter_model.safetensors.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.distributed import sync
from jaxft.models.model import Model
from jaxft.models.model_types import full_name
from jaxft.nn.adapters.full_modules import is_replacement
from jaxft.nn.adapters.lora import Adapter, pairs_by_path
from jaxft.nn.adapters.lora_specs import PairRanks, pair_layouts
from jaxft.nn.tree import Params
from jaxft.weights.hf import hf_read, hub
from jaxft.weights.hf.safetensors import TensorToWrite, write_model_json, write_safetensors
from jaxft.weights.peft.peft_config import PREFIX
from jaxft.weights.peft.peft_read import SCORE_TENSOR, SEQ_CLS
from jaxft.weights.peft.peft_tensors import (
    NO_TARGETS,
    ONLY_TOKENS,
    module_fields,
    module_tensors,
    pair_names,
    ranked_modules,
    with_module_names,
)
from jaxft.weights.tensors import Tensor, layer_on_host

PEFT_VERSION = "0.17.0"  # the PEFT version of these fields; all later versions read them


def save_adapter(
    folder: str | Path, adapter: Params, settings: Adapter, model: Model, base_ref: str, score: Any = None
) -> None:
    """Write an adapter tree so that `peft.PeftModel.from_pretrained(base, folder)` and vLLM load it.

    base_ref: the base model; if it is multimodal, modules have the names of transformers' multimodal class,
    or with a score the names of the text-only model, since few multimodal classes have a classifier. score: a
    scalar head [D, 1], which makes it an adapter for sequence classification with one label. Raises
    ValueError without pairs, and unless they fit the settings. With several processes, all call this, and
    process 0 writes.
    """
    folder = Path(folder)
    pairs = pairs_by_path(adapter)
    if not pairs:
        raise ValueError(f"{folder}: the adapter has no pairs to write; train some, or save the base")
    nodes = {path: node for path, node in pairs.items() if is_replacement(node)}
    pairs = {path: pair for path, pair in pairs.items() if path not in nodes}
    layouts = pair_layouts(model.specs.get("base", model.specs), settings, model.weight_names)
    for path, pair in pairs.items():
        _check_pair(path, pair, layouts.get(path))
    if missing := layouts.keys() - pairs.keys():
        raise ValueError(
            f"{folder}: the adapter has no pair of {min(missing)}, which its settings declare; add the "
            "module to exclude_modules of the settings"
        )
    tensors, ranked = [], ranked_modules({path: layouts[path] for path in pairs}, model)
    for tensor, (rank, alpha) in ranked.items():
        tensors += pair_tensors(tensor, pairs[tensor.path], rank, settings.scale_of(rank, alpha))
    part = hf_read.text_part_of(base_ref)
    # on a multimodal base, ends of names would also match modules outside the text decoder
    declared = with_module_names(settings, layouts, model, full_names=part is not None)
    prefix = "model." if part is None or score is not None else part.prefix
    only_tokens = not pairs and score is None and all("rows" in node for node in nodes.values())
    tensors += module_tensors(nodes, model, {tensor.module for tensor in ranked}, only_tokens)
    if score is not None:
        dtype, shape = np.dtype(score.dtype), score.shape[::-1]
        tensors.append(TensorToWrite(SCORE_TENSOR, dtype, shape, lambda: layer_on_host(score).T))
    sync.exchange_first(sync.gather_texts, lambda: folder.mkdir(parents=True, exist_ok=True))
    in_base = [replace(x, name=PREFIX + full_name(x.name.removeprefix(PREFIX), prefix)) for x in tensors]
    write_safetensors(folder / "adapter_model.safetensors", in_base)
    fields = module_fields(nodes, settings, model, full_names=part is not None)
    base, revision = hub.hub_name(base_ref) or (base_ref, None)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if score is None else SEQ_CLS,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": settings.rank,
        "lora_alpha": _whole(settings.alpha),
        "lora_dropout": settings.dropout,
        "target_modules": [full_name(x, prefix) for x in declared.targets] or NO_TARGETS,
        "bias": fields["bias"],
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": [
            *(full_name(x, prefix) for x in fields["modules_to_save"] or []),
            *([] if score is None else ["score"]),
        ]
        or None,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "rank_pattern": {full_name(x, prefix): rank for x, rank in declared.rank_pattern},
        "alpha_pattern": {full_name(x, prefix): _whole(alpha) for x, alpha in declared.alpha_pattern},
        "layers_to_transform": declared.layers_to_transform and list(declared.layers_to_transform),
        "layers_pattern": None,
        "peft_version": PEFT_VERSION,
    }
    if "trainable_token_indices" in fields:
        config["trainable_token_indices"] = fields["trainable_token_indices"]
        if only_tokens:
            config = _only_tokens(config, with_head="head" in nodes)
    sync.exchange_first(
        sync.gather_texts, lambda: write_model_json(folder / "adapter_config.json", config, sort=True)
    )


def _only_tokens(config: dict[str, Any], with_head: bool) -> dict[str, Any]:
    """Convert adapter_config.json to PEFT's type TRAINABLE_TOKENS, for an adapter of token rows only."""
    ids = config["trainable_token_indices"]
    common = ("task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version")
    return {
        **{name: config[name] for name in common},
        "peft_type": ONLY_TOKENS,
        "target_modules": ["embed_tokens", "lm_head"] if with_head else ["embed_tokens"],
        "token_indices": ids["embed_tokens"] if with_head else ids,
        "init_weights": True,
    }


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


def _check_pair(path: str, pair: dict[str, Any], layout: PairRanks | None) -> None:
    """Raise ValueError unless a pair has its leaves and the rank that the settings declare in `layout`."""
    if set(pair) - {"magnitude"} != {"a", "b", "scale"}:
        raise ValueError(
            f"cannot write the adapter at {path or '/'} as PEFT's LoRA: it needs the leaves a, b and scale, "
            f"or weight, got {sorted(pair)}; merge it into the base instead"
        )
    a, b = pair["a"], pair["b"]
    rank = 0 if layout is None else max(layout.ranks)
    if b.shape[-2] != a.shape[-1] or a.shape[-1] != rank:
        raise ValueError(
            f"adapter at {path}: a has shape {a.shape} and b {b.shape}, but the settings have rank {rank}; "
            "write it with the settings that it was trained with"
        )


def pair_tensors(tensor: Tensor, pair: Mapping[str, Any], rank: int, exact: float) -> list[TensorToWrite]:
    """Return lora_A [R, in] and lora_B [out, R] of one module, with DoRA lora_magnitude_vector [out].

    pair: the kernel's leaves, with zeros beyond `rank`. exact: the scale that PEFT computes from the
    settings; if the pair's scale differs, B is multiplied by their ratio.
    """

    def leaf(name: str) -> np.ndarray:
        return layer_on_host(pair[name], tensor.index)

    def fetch_b() -> np.ndarray:
        value, scale = leaf("b").T[:, :rank], float(leaf("scale"))
        return value if np.isclose(scale, exact, rtol=1e-6) else (value * (scale / exact)).astype(value.dtype)

    (ins, outs), names = tensor.values, pair_names(tensor, dora="magnitude" in pair)
    shapes = {"a": (rank, ins), "b": (outs, rank), "magnitude": (outs,)}
    fetches: dict[str, Callable[[], np.ndarray]] = {
        "a": lambda: leaf("a").T[:rank],
        "b": fetch_b,
        "magnitude": partial(leaf, "magnitude"),
    }
    return [
        TensorToWrite(name, np.dtype(pair[key].dtype), shapes[key], fetches[key])
        for name, key in zip(names, shapes, strict=False)
    ]
