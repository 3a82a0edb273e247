"""LoRA adapters, and heads beside them, in PEFT's layout: adapter_config.json and adapter_model.safetensors, in and out."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft import tree
from jaxft.distributed import sync
from jaxft.models.model import Model
from jaxft.nn.lora import Adapter
from jaxft.nn.param import spec_paths
from jaxft.weights.hf import HEAD, layer_array
from jaxft.weights.safetensors import (
    Entry,
    Outgoing,
    read_header,
    read_json,
    read_tensor,
    write_json,
    write_safetensors,
)

PREFIX = "base_model.model."
SCORE = f"{PREFIX}score.weight"  # of a sequence classification adapter, [1, D]
SEQ_CLS = "SEQ_CLS"
BASE_COPIES = (f"{PREFIX}lm_head.base_layer.weight", f"{PREFIX}model.embed_tokens.weight")
PEFT_VERSION = "0.17.0"  # whose fields these are; every later one reads them

# What an adapter_config.json may switch on that changes the arithmetic, with the values that leave plain LoRA.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "init_lora_weights": (
        True,
        False,
        "gaussian",
        "eva",
        "orthogonal",
    ),  # the others change the base's weights
}


def save_adapter(
    folder: str | Path, adapter: Any, settings: Adapter, model: Model, base_ref: str, score: Any = None
) -> None:
    """Write an adapter tree so that `peft.PeftModel.from_pretrained(base, folder)` and vLLM load it.

    score: a scalar head [D, 1], which makes it an adapter for sequence classification with one label. Raises ValueError for a
    pair whose shapes don't fit the model. Of several processes all call it, and process 0 writes.
    """
    folder = Path(folder)
    pairs = _pairs(adapter)
    if not pairs:
        raise ValueError(f"{folder}: the adapter has no pairs to write")
    tensors, modules = [], set()
    for path, pair in pairs.items():
        name, _ = _name(model, path)
        module = name.removesuffix(".weight")
        modules.add(module.rsplit(".", 1)[-1])
        for i in range(pair["a"].shape[0] if "{i}" in module else 1):
            tensors += _outgoing(module.format(i=i), pair, i if "{i}" in module else None, settings)
    if score is not None:
        tensors.append(
            Outgoing(SCORE, np.dtype(score.dtype), score.shape[::-1], lambda: layer_array(score, None, True))
        )
    sync.by_first(sync.gathered, lambda: folder.mkdir(parents=True, exist_ok=True))
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    repo, _, revision = base_ref.partition("@")
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if score is None else SEQ_CLS,
        "base_model_name_or_path": repo,
        "revision": revision or None,
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
    sync.by_first(sync.gathered, lambda: write_json(folder / "adapter_config.json", config, sort=True))


def _pairs(adapter: Any) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in tree.paths(adapter).items():
        above, _, name = path.rpartition("/")
        found.setdefault(above, {})[name] = leaf
    for path, pair in found.items():
        if set(pair) != {"a", "b", "scale"}:
            raise ValueError(
                f"adapter at {path or '/'}: found leaves {sorted(pair)}, PEFT's LoRA layout holds a, b and scale"
            )
    return found


def _name(model: Model, path: str) -> tuple[str, bool]:
    name, transpose = {"head": HEAD, **model.weight_names}.get(path, (None, False))
    if name is None or not transpose:
        raise ValueError(
            f"adapter at {path}: no linear layer of this model; they are {', '.join(_linear_paths(model))}"
        )
    return name, transpose


def _linear_paths(model: Model) -> list[str]:
    return [
        path
        for path, (_, transpose) in {"head": HEAD, **model.weight_names}.items()
        if transpose and path != "score"
    ]


def _outgoing(module: str, pair: dict[str, Any], layer: int | None, settings: Adapter) -> list[Outgoing]:
    """lora_A [R, in] and lora_B [out, R] of one module; a scale other than the settings' is folded into B."""
    a, b = pair["a"], pair["b"]
    (size_in, rank), size_out = a.shape[-2:], b.shape[-1]
    if b.shape[-2] != rank or rank != settings.rank:
        raise ValueError(
            f"adapter of {module}: a has shape {a.shape} and b {b.shape}, the settings say rank {settings.rank}"
        )

    def fetch_b() -> np.ndarray:
        value = layer_array(b, layer, True)
        scale = float(layer_array(pair["scale"], layer, False))
        return (
            value
            if np.isclose(scale, settings.scale, rtol=1e-6)
            else (value * (scale / settings.scale)).astype(value.dtype)
        )

    return [
        Outgoing(
            f"{PREFIX}{module}.lora_A.weight",
            np.dtype(a.dtype),
            (rank, size_in),
            lambda: layer_array(a, layer, True),
        ),
        Outgoing(f"{PREFIX}{module}.lora_B.weight", np.dtype(b.dtype), (size_out, rank), fetch_b),
    ]


def load_adapter(folder: str | Path, model: Model) -> tuple[dict[str, Any], Adapter]:
    """An adapter folder as (tree of numpy arrays, settings).

    Ranks and alphas that differ between modules become one rank, padded with zeros, and each layer's own scale; a layer
    without an adapter is a zero pair. The copy of the head's base weight that peft adds to an adapter on lm_head is not
    read. Raises ValueError for what is not plain LoRA on this model's linear layers, and for a reward model's adapter.
    """
    found, settings = load_parts(folder, model)
    if "score" in found:
        raise ValueError(
            f"{folder}: a reward model's adapter, which gives scores and no text; take a language model's adapter"
        )
    return found["adapter"], settings


def load_parts(folder: str | Path, model: Model) -> tuple[dict[str, Any], Adapter]:
    """load_adapter for any folder: ({"adapter"} or, of a sequence classification adapter, {"adapter", "score" [D, 1]}, settings).

    Raises ValueError too for a head that is missing, or has another number of labels than one.
    """
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json")
    default, scored = _settings(folder, config), _is_scored(folder, config)
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        unsafe = (folder / "adapter_model.bin").is_file()
        how = (
            "; adapter_model.bin is a pickle and not read: load it with peft and save_pretrained it again"
            if unsafe
            else ""
        )
        raise FileNotFoundError(f"{path}: no such file{how}")
    entries = read_header(path)
    rank = max(
        [
            default.rank,
            *(e.shape[0] for name, e in entries.items() if name.endswith("lora_A.weight") and e.shape),
        ]
    )
    settings = replace(default, rank=rank, alpha=default.scale * (rank**0.5 if default.rslora else rank))
    settings = default if rank == default.rank else settings
    specs = spec_paths(model.specs.get("base", model.specs))
    adapter: dict[str, Any] = {}
    used: set[str] = set()
    targets = []
    for base_path in _linear_paths(model):
        name = _name(model, base_path)[0].removesuffix(".weight")
        shape = specs[base_path].shape if base_path in specs else specs["embed"].shape[::-1]
        modules = [name.format(i=i) for i in range(shape[0])] if "{i}" in name else [name]
        found = {m for m in modules if f"{PREFIX}{m}.lora_A.weight" in entries}
        if not found:
            continue
        pairs = []
        for module in modules:
            if module in found:
                pairs.append(_read_pair(path, entries, module, shape[-2:], config))
                used |= {f"{PREFIX}{module}.lora_{x}.weight" for x in "AB"}
            else:
                pairs.append(
                    (
                        np.zeros((shape[-2], 0), np.float32),
                        np.zeros((0, shape[-1]), np.float32),
                        settings.scale,
                    )
                )
        *above, last = base_path.split("/")
        node = adapter
        for key in above:
            node = node.setdefault(key, {})
        node[last] = _stacked(pairs, settings.rank, layered="{i}" in name)
        targets.append(last)
    parts = {"adapter": adapter} | (
        {"score": _read_score(path, entries, model.config.width)} if scored else {}
    )
    used |= {SCORE} if scored else set()
    extra = [name for name in entries if name not in used and not (name in BASE_COPIES and "head" in targets)]
    if extra or not targets:
        what = f"tensor {extra[0]} is no LoRA pair of a linear layer" if extra else "it holds no LoRA pair"
        raise ValueError(f"{path}: {what} of this model; is the adapter for another base model?")
    return parts, replace(settings, targets=tuple(targets))


def _is_scored(folder: Path, config: dict[str, Any]) -> bool:
    """Whether it is an adapter with a head for scores. Raises ValueError for another task, or other modules in full."""
    task, saved = config.get("task_type"), config.get("modules_to_save") or []
    fits = (
        task == SEQ_CLS and "score" in saved and set(saved) <= {"score", "classifier"}
    )  # peft names both by default
    if fits or (task in ("CAUSAL_LM", None) and not saved):
        return fits
    raise ValueError(
        f"{folder / 'adapter_config.json'}: task_type={task!r} with modules_to_save={saved!r} is not supported; jaxft reads "
        "plain LoRA with task_type='CAUSAL_LM', and reward models with task_type='SEQ_CLS' and modules_to_save=['score']"
    )


def _read_score(path: Path, entries: dict[str, Entry], width: int) -> np.ndarray:
    if SCORE not in entries:
        raise ValueError(f"{path}: tensor {SCORE} is missing, the head of a sequence classification adapter")
    if entries[SCORE].shape != (1, width):
        raise ValueError(
            f"{path}: {SCORE} has shape {entries[SCORE].shape}, and a reward model's has {(1, width)}: one label"
        )
    return read_tensor(path, SCORE, entries[SCORE]).T


def _settings(folder: Path, config: dict[str, Any]) -> Adapter:
    where = folder / "adapter_config.json"
    for key, plain in PLAIN.items():
        if key in config and config[key] not in plain:
            raise ValueError(
                f"{where}: {key}={config[key]!r} is not supported; jaxft reads plain LoRA with {key}={plain[0]!r}"
            )
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    dropout: Any = config.get("lora_dropout", 0.0)
    if (
        type(rank) is not int
        or not 0 < rank < 2**16
        or not all(isinstance(x, int | float) for x in (alpha, dropout))
    ):
        raise ValueError(
            f"{where}: wanted numbers r, lora_alpha and lora_dropout, found {rank!r}, {alpha!r} and {dropout!r}"
        )
    ranks = (config.get("rank_pattern") or {}).values()
    if not all(type(r) is int and 0 < r < 2**16 for r in ranks):
        raise ValueError(f"{where}: rank_pattern holds something else than ranks")
    return Adapter(rank, float(alpha), float(dropout), "all-linear", bool(config.get("use_rslora", False)))


def _read_pair(
    path: Path, entries: dict[str, Entry], module: str, shape: tuple[int, ...], config: dict[str, Any]
) -> tuple:
    """a [in, R], b [R, out] and scale of one module."""
    arrays = []
    for letter in "AB":
        name = f"{PREFIX}{module}.lora_{letter}.weight"
        if name not in entries:
            raise ValueError(f"{path}: tensor {name} is missing")
        if len(entries[name].shape) != 2:
            raise ValueError(f"{path}: {name} has shape {entries[name].shape}, wanted two dimensions")
        arrays.append(read_tensor(path, name, entries[name]).T)
    a, b = arrays
    rank = _pattern(config, "rank_pattern", module, config["r"])
    if a.shape != (shape[0], rank) or b.shape != (rank, shape[1]):
        raise ValueError(
            f"{path}: {module} has lora_A {a.T.shape} and lora_B {b.T.shape}; "
            f"rank {rank} on this model wants {(rank, shape[0])} and {(shape[1], rank)}"
        )
    alpha = _pattern(config, "alpha_pattern", module, config["lora_alpha"])
    return a, b, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _pattern(config: dict[str, Any], key: str, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name after a dot, or the whole name."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _stacked(parts: list[tuple], rank: int, layered: bool) -> dict[str, np.ndarray]:
    """One leaf set of [L, in, R], [L, R, out], [L], zero-padded to `rank`."""
    dtype = np.result_type(np.float32) if len({a.dtype for a, _, _ in parts}) > 1 else parts[0][0].dtype
    a = np.stack([np.pad(a, ((0, 0), (0, rank - a.shape[1]))).astype(dtype) for a, _, _ in parts])
    b = np.stack([np.pad(b, ((0, rank - b.shape[0]), (0, 0))).astype(dtype) for _, b, _ in parts])
    scale = np.array([s for _, _, s in parts], np.float32)
    out = {"a": a, "b": b, "scale": scale}
    return out if layered else jax.tree.map(lambda x: x[0], out)
