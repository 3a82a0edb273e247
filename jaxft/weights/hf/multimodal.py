"""Write a multimodal checkpoint with a trained text decoder: everything else is copied byte for byte."""

import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxft.distributed import sync
from jaxft.weights.hf.hf import EMBEDDING, HEAD, WEIGHT_INDEX, decoder_tensors, weight_files
from jaxft.weights.hf.safetensors import (
    SafetensorsFiles,
    TensorToWrite,
    open_safetensors,
    read_model_json,
    write_model_json,
    write_safetensors,
)
from jaxft.weights.hf.tokenizer_files import TEMPLATES_FOLDER

# Files of processors and tokenizers, and custom code; others in a model's folder may be anything.
SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
NOT_COPIED = ("config.json", "untrained_tokens.json", "adapter_config.json", "trainer_state.json")


def write_weights(folder: Path, source: Path, tensors: Iterable[TensorToWrite], tied: bool) -> None:
    """Write the weights of the multimodal model in the folder `source` with other values of some of its
    decoder's tensors, divided into the same files. With several processes, all call this, and process 0
    writes.

    tensors: under their names in the text-only model. A head that `source` lacks is added. tied: whether the
    head is the embedding. Raises ValueError for another tensor that `source` lacks.
    """
    files, new = weight_files(source), {tensor.name: tensor for tensor in tensors}
    opened = open_safetensors(source, files)
    stored = decoder_tensors(opened.where, opened.tensors)
    if tied and HEAD in stored and EMBEDDING in new:  # some files repeat a tied head
        new[HEAD] = new[EMBEDDING]
    changed = _with_stored_names(opened.where, stored, new)
    home = opened.tensors[stored[EMBEDDING]].path
    of_files: dict[Path, list[TensorToWrite]] = {path: [] for path in files}
    for tensor in changed:
        of_files[opened.tensors[tensor.name].path if tensor.name in opened.tensors else home].append(tensor)
    for path, of_file in of_files.items():
        write_safetensors(folder / path.name, of_file, path)
    sync.exchange_first(sync.gather_texts, lambda: _write_index(folder, opened, changed, home.name))


def _with_stored_names(
    where: str, stored: Mapping[str, str], tensors: Mapping[str, TensorToWrite]
) -> list[TensorToWrite]:
    """Return the tensors under their names in the files."""
    in_old_files = stored[EMBEDDING].startswith("language_model.")
    names = {HEAD: f"language_model.{HEAD}" if in_old_files else HEAD, **stored}
    if missing := [name for name in tensors if name not in names]:
        raise ValueError(
            f"{where}: {missing[0]} of the text decoder is missing; has this folder changed since the "
            "decoder was trained?"
        )
    return [replace(tensor, name=names[name]) for name, tensor in tensors.items()]


def _write_index(folder: Path, opened: SafetensorsFiles, changed: list[TensorToWrite], home: str) -> None:
    """Write the index of several files, with new tensors in the file `home`: a copy if there are none, and
    none has another size.
    """
    path = Path(opened.where) / WEIGHT_INDEX
    if not path.is_file():
        return
    new = [tensor.name for tensor in changed if tensor.name not in opened.tensors]
    sizes = {name: math.prod(x.shape) * x.dtype.itemsize for name, x in opened.tensors.items()}
    grown = sum(tensor.size - sizes.get(tensor.name, 0) for tensor in changed)
    if not new and not grown:
        shutil.copyfile(path, folder / path.name)
        return
    index = read_model_json(path)
    index["weight_map"] |= dict.fromkeys(new, home)
    if isinstance(index.get("metadata"), dict) and isinstance(index["metadata"].get("total_size"), int):
        index["metadata"]["total_size"] += grown
    write_model_json(folder / path.name, index)


def write_config(folder: Path, source: Path, settings: Mapping[str, Any]) -> None:
    """Write config.json of the multimodal model in the folder `source` with other settings of its decoder:
    any of vocab_size, tie_word_embeddings and dtype. Without any, the file is copied.
    """
    if not settings:
        shutil.copyfile(source / "config.json", folder / "config.json")
        return
    config = read_model_json(source / "config.json")
    text = config.get("text_config", config)
    for name, value in settings.items():
        key = "torch_dtype" if name == "dtype" and "torch_dtype" in config else name
        for group, needed in ((config, name != "vocab_size"), (text, name == "vocab_size")):
            if needed or key in group:
                group[key] = value
    write_model_json(folder / "config.json", config)


def copy_small_files(folder: Path, source: Path) -> None:
    """Copy the files of a multimodal model's processor and tokenizer."""
    for path in (*sorted(source.iterdir()), *sorted(source.glob(f"{TEMPLATES_FOLDER}/*.jinja"))):
        skipped = path.name in NOT_COPIED or path.name.endswith(".index.json")
        if path.suffix in SMALL_SUFFIXES and path.is_file() and not skipped:
            out = folder / path.relative_to(source)
            out.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, out)
