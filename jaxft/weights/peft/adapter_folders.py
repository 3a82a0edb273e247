"""Adapters in folders: their settings, their weights, and the base that they were trained on."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import DTypeLike

from jaxft.data.rows.shipped import script_command
from jaxft.distributed import sharding
from jaxft.distributed.exit import shorten_error
from jaxft.models.adapted import HeadSettings
from jaxft.models.model import Model
from jaxft.nn import param_spec
from jaxft.nn.adapters.full_modules import unties
from jaxft.nn.adapters.lora import Adapter, pairs_by_path
from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.nn.quant import RESIDUAL_INITS, Quant
from jaxft.nn.tree import Params
from jaxft.weights import pretrained
from jaxft.weights.hf import hub
from jaxft.weights.hf.complete_folders import check_new_folder, new_folder
from jaxft.weights.hf.model_card import Card, write_card
from jaxft.weights.hf.safetensors import read_model_json
from jaxft.weights.hf.tokenizer_files import write_tokenizer
from jaxft.weights.param_loading import shard_host_array
from jaxft.weights.peft import peft_read, peft_write
from jaxft.weights.peft.peft_config import read_adapter_config


def adapter_folder(start: str) -> Path:
    """Return the PEFT folder that `start` names: `adapter` in a run's folder, the only subfolder with an
    adapter (peft saves a named adapter there), else the folder itself, which may not exist.
    """
    folder, inner = Path(start), Path(start) / "adapter"
    if inner.is_dir() or not folder.is_dir() or (folder / "adapter_config.json").is_file():
        return inner if inner.is_dir() else folder
    named = [path.parent for path in folder.glob("*/adapter_config.json")]
    return named[0] if len(named) == 1 else folder


def read_adapter_settings(start: str, model: Model) -> Adapter:
    """Read the settings of the adapter in a PEFT folder, or in the folder of a run that wrote one."""
    return peft_read.read_declared(adapter_folder(start), model)[1]


def adapter_settings(start: str | None, rank: int | None, model: Model) -> Adapter:
    """Return the settings of a fresh adapter of this rank (None: 16) if `start` is None, else of the adapter
    in `start`, a run's or a PEFT folder. Raises ValueError if both are set.

    A fresh adapter has the same alpha for every rank, so that the best learning rate is about the same too
    (https://thinkingmachines.ai/blog/lora).
    """
    if start is None:
        return Adapter() if rank is None else Adapter(rank=rank)
    if rank is not None:
        raise ValueError(
            f"rank={rank} is for a fresh adapter, and the adapter in {start} has its own rank; set "
            "only one of them"
        )
    return read_adapter_settings(start, model)


def reward_head_settings(start: str, model: Model) -> HeadSettings:
    """Return the settings of a frozen reward model on the run's base. start: a run's folder or a PEFT folder
    with a head.

    If the folder does not exist, return the defaults of configs/reward.py: a plan needs no weights, and a run
    raises an error when it starts.
    """
    settings = (
        read_adapter_settings(start, model) if Path(start).exists() else adapter_settings(None, None, model)
    )
    return HeadSettings(settings, start, trained=False)


def load_adapter(folder: str | Path, model: Model, mesh: Mesh, ref: str) -> tuple[Params, Adapter]:
    """Load a PEFT adapter folder for the base `ref` onto the mesh; return it and its settings. Raises
    ValueError if it does not fit the model.
    """
    loaded, settings = peft_read.read_adapter(folder, model, pretrained.open_files(ref))
    dtype = np.promote_types(model.dtype, np.float32)
    shardings = param_spec.shardings(adapter_specs(model.specs, settings, model.weight_names), mesh)
    params = jax.tree.map(lambda x, sharding: shard_host_array(x.astype(dtype), sharding), loaded, shardings)
    return params, settings


def on_every_device(tree: Params, dtype: DTypeLike | None, mesh: Mesh) -> Params:
    """Replicate host arrays over the mesh, cast to `dtype`; None keeps their dtypes."""
    everywhere = sharding.replicated(mesh)
    return jax.tree.map(lambda x: shard_host_array(x.astype(dtype or x.dtype), everywhere), tree)


def untying_notes(model: Model, settings: Adapter | None) -> list[str]:
    """Return a line if merging an adapter unties the head of a model with tied embeddings, else []."""
    if settings is None or not model.generates or "head" in model.specs:
        return []
    nodes = pairs_by_path(adapter_specs(model.specs, settings, model.weight_names))
    if not unties(nodes):
        return []
    changed = "head" if "head" in nodes else "embedding table"
    return [
        f"the adapter changes the {changed} only, and this model's head is tied to its embeddings: merged, "
        "the head is a matrix of its own (tie_word_embeddings=false)"
    ]


def cached_base_notes(folder: Path, ref: str) -> list[str]:
    """Return a line if an adapter's base `ref` exists only in this machine's cache, else []."""
    if not hub.is_extended(ref):
        return []
    merged = (
        f"the merged model ({script_command('export')} --adapter {shlex.quote(str(folder))} --out merged)"
    )
    if any(file.is_symlink() for file in Path(ref).glob("*.safetensors")):  # the weights of another model
        return [
            f"the adapter's base is in this machine's cache ({ref}); elsewhere use {merged}, or the "
            "model from which the cached one was made, which has the same weights, as the base"
        ]
    return [
        f"the adapter is for a base with new tokens that is only in this machine's cache ({ref}); elsewhere "
        f"use {merged}, or copy that folder and name it as the base"
    ]


def left_out_notes(model: Model, start: str | None) -> list[str]:
    """Return a line if the adapter in `start` trained a language model head that `model` lacks, else []."""
    if model.generates or start is None or not peft_read.has_language_head(adapter_folder(start)):
        return []
    return [
        f"the adapter in {start} trained the language model head, which is left out: this run's model has a "
        "score head in its place"
    ]


@dataclass(frozen=True)
class NewAdapter:
    """An adapter to write. ref: its base model. description: text for the model card. tokenizer_from: a
    folder whose tokenizer is written with the adapter; None writes none.
    """

    params: Params
    settings: Adapter
    ref: str
    description: str
    tokenizer_from: Path | None = None


def write_adapter(out: Path, adapter: NewAdapter, model: Model) -> None:
    """Write an adapter in PEFT's layout with its card to a new folder, all files or none.

    Raises ValueError if `out` is a file or a folder that is not empty.
    """
    with new_folder(out) as part:
        peft_write.save_adapter(part, adapter.params, adapter.settings, model, adapter.ref)
        write_card(part, Card(part.name, adapter.ref, "adapter", "peft", adapter.description))
        if adapter.tokenizer_from is not None:
            write_tokenizer(part, pretrained.load_tokenizer(str(adapter.tokenizer_from)))


def check_adapter_output(out: Path, inputs: Sequence[Path]) -> None:
    """Raise ValueError if an adapter cannot be written to `out`, because it is one of the folders `inputs`
    that are read, or not a new folder.
    """
    if out.resolve() in [path.resolve() for path in inputs]:
        raise ValueError(f"--out {out} is also an input; choose another folder")
    check_new_folder(out)


def run_of_adapter(folder: Path) -> Path | None:
    """Return the folder of the run that wrote an adapter (`RUN/adapter` or `RUN/best/adapter`), else None."""
    above = folder.resolve().parent
    run = above.parent if above.name == "best" else above
    if folder.resolve().name != "adapter" or not (run / "config.json").is_file():
        return None
    is_record = isinstance(read_model_json(run / "config.json").get("weights"), str)  # else a model's
    return run if is_record else None


def other_base_name(folder: Path, ref: str) -> list[str]:
    """Return a warning if an adapter's configuration names another base than `ref`, else []."""
    name = read_adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or name in ("", ref):
        return []
    theirs, ours = hub.hub_name(name), hub.hub_name(ref)
    if theirs and ours and theirs[0].casefold() == ours[0].casefold():
        return []
    if hub.is_same_file(name, ref):
        return []
    shown = shorten_error(repr(name))
    return [f"warning: the adapter in {folder} is for the base {shown}, but it is used with {ref}"]


def base_differences(
    start: str, ref: str, fingerprint: str, quant: Quant | None, adapter: Adapter | None = None
) -> list[str]:
    """Return a line for each way in which the base differs from the one that the adapter in `start` was
    trained on.

    ref, fingerprint: this run's base, and its weights_fingerprint (runs/run_record.py). adapter: settings of
    the policy's adapter, on which the stored base depends if its init is pissa, olora, loftq or qera; None
    without an adapter. If `start` is not a run's folder, only the name of the base is compared.
    """
    path = Path(start) / "config.json"
    if not path.is_file() or adapter_folder(start) == Path(start):
        config = adapter_folder(start) / "adapter_config.json"
        return other_base_name(config.parent, ref) if config.is_file() else []
    record, lines = read_model_json(path), []
    if record.get("weights_fingerprint", fingerprint) != fingerprint:
        lines.append(
            f"the adapter in {start} was trained on {record.get('weights')}, whose weights differ from this "
            "run's"
        )
    before, now = (
        settings.get("kind") if isinstance(settings, dict) else "none"
        for settings in (record.get("quant"), asdict(quant) if quant else None)
    )
    init, own_init = (record.get("adapter") or {}).get("init"), adapter.init if adapter else "default"
    here = f"this run has quant={now}"
    if own_init in RESIDUAL_INITS and _stored_alike(record, adapter, quant):
        return lines
    if init in RESIDUAL_INITS:
        if now != "none":
            lines.append(
                f"the adapter in {start} (adapter.init={init}) is for the base in its own precision, but "
                f"{here}: write the merged model with scripts/export.py and use that"
            )
    elif before != now:
        lines.append(f"the adapter in {start} was trained on a base with quant={before}, but {here}")
    elif now != "none" and own_init in RESIDUAL_INITS:
        lines.append(
            f"the adapter in {start} was trained on a base with quant={before}, but {here} with "
            f"adapter.init={own_init}, which rounds the base differently"
        )
    return lines


def _stored_alike(record: dict[str, Any], adapter: Adapter | None, quant: Quant | None) -> bool:
    """Return whether a recorded run has the same adapter and quant settings, except for dropout. It then
    stored the same base, and its adapter, such as a reward model's, fits this run's.
    """

    def facts(settings: Any) -> Any:
        return {**settings, "dropout": None} if isinstance(settings, dict) else settings

    ours = json.loads(json.dumps([asdict(x) if x else None for x in (adapter, quant)]))
    return [facts(record.get(name)) for name in ("adapter", "quant")] == list(map(facts, ours))
