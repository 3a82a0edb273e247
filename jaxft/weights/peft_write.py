"""Write LoRA adapters, and heads with them, in PEFT's layout: adapter_config.json and
adapter_model.safetensors.
"""

from pathlib import Path
from typing import Any

import numpy as np

from jaxft.distributed import sync
from jaxft.models.model import Model
from jaxft.nn.lora import Adapter, pairs_by_path
from jaxft.tree import Params
from jaxft.weights import hf, hub
from jaxft.weights.gather import layer_on_host
from jaxft.weights.peft import PREFIX, SCORE_TENSOR, SEQ_CLS, linear_weight_names
from jaxft.weights.safetensors import TensorToWrite, write_model_json, write_safetensors

PEFT_VERSION = "0.17.0"  # the PEFT version of these fields; all later versions read them


def save_adapter(
    folder: str | Path, adapter: Params, settings: Adapter, model: Model, base_ref: str, score: Any = None
) -> None:
    """Write an adapter tree so that `peft.PeftModel.from_pretrained(base, folder)` and vLLM load it.

    score: a scalar head [D, 1], which makes it an adapter for sequence classification with one label. Raises
    ValueError for a pair that does not fit the model. With several processes, all call this, and process 0
    writes.
    """
    folder = Path(folder)
    pairs = _pairs(adapter)
    if not pairs:
        raise ValueError(f"{folder}: the adapter has no pairs to write")
    tensors, modules, only_text = [], set(), hf.is_multimodal(model, base_ref)
    for path, pair in pairs.items():
        module = _module_name(model, path)
        count = pair["a"].shape[0] if "{i}" in module else 1
        # full names fit the text decoder alone, so that peft refuses the adapter on the multimodal model
        modules |= {module.format(i=i) for i in range(count)} if only_text else {module.rsplit(".", 1)[-1]}
        for i in range(count):
            tensors += _tensors_of_pair(module.format(i=i), pair, i if "{i}" in module else None, settings)
    if score is not None:
        tensors.append(
            TensorToWrite(
                SCORE_TENSOR,
                np.dtype(score.dtype),
                score.shape[::-1],
                lambda: layer_on_host(score, None, True),
            )
        )
    sync.exchange_first(sync.gather_texts, lambda: folder.mkdir(parents=True, exist_ok=True))
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    base, revision = hub.hub_name(base_ref) or (base_ref, None)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if score is None else SEQ_CLS,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None if score is None else ["score"],
        "use_rslora": settings.rslora,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "peft_version": PEFT_VERSION,
    }
    sync.exchange_first(
        sync.gather_texts, lambda: write_model_json(folder / "adapter_config.json", config, sort=True)
    )


def _pairs(adapter: Params) -> dict[str, dict[str, Any]]:
    """Return {"a", "b", "scale"} of each adapted weight by its path. Raises ValueError for other leaves."""
    found = pairs_by_path(adapter)
    for path, pair in found.items():
        if set(pair) != {"a", "b", "scale"}:
            raise ValueError(
                f"adapter at {path or '/'}: PEFT's LoRA layout has the leaves a, b and scale, got "
                f"{sorted(pair)}"
            )
    return found


def _module_name(model: Model, path: str) -> str:
    """Return the Hugging Face name of an adapted module, with {i} for the layer."""
    names = linear_weight_names(model)
    if path not in names:
        raise ValueError(f"adapter at {path}: not a linear layer of this model, which has {', '.join(names)}")
    return names[path].removesuffix(".weight")


def _tensors_of_pair(
    module: str, pair: dict[str, Any], layer: int | None, settings: Adapter
) -> list[TensorToWrite]:
    """Return lora_A [R, in] and lora_B [out, R] of one module; a scale that differs from the settings' is
    folded into B.
    """
    a, b = pair["a"], pair["b"]
    (size_in, rank), size_out = a.shape[-2:], b.shape[-1]
    if b.shape[-2] != rank or rank != settings.rank:
        raise ValueError(
            f"adapter of {module}: a has shape {a.shape} and b {b.shape}, but the settings have rank "
            f"{settings.rank}"
        )

    def fetch_b() -> np.ndarray:
        value = layer_on_host(b, layer, True)
        scale = float(layer_on_host(pair["scale"], layer, False))
        if np.isclose(scale, settings.scale, rtol=1e-6):
            return value
        return (value * (scale / settings.scale)).astype(value.dtype)

    return [
        TensorToWrite(
            f"{PREFIX}{module}.lora_A.weight",
            np.dtype(a.dtype),
            (rank, size_in),
            lambda: layer_on_host(a, layer, True),
        ),
        TensorToWrite(f"{PREFIX}{module}.lora_B.weight", np.dtype(b.dtype), (size_out, rank), fetch_b),
    ]
