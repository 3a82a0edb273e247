"""Write a LoRA adapter alone as a GGUF file, for llama.cpp's --lora and Ollama's ADAPTER.

The layout is that of llama.cpp's convert_lora_to_gguf.py, read by its src/llama-adapter.cpp: for a weight W
of the base, W.lora_a [R, in] and W.lora_b [out, R], and W + alpha / R * lora_b @ lora_a.
"""

from functools import partial
from pathlib import Path

import numpy as np

from jaxft.models.model import Model
from jaxft.nn.lora import pairs_by_path
from jaxft.tree import Params
from jaxft.weights.gguf_architectures import ARCHITECTURES, StoredAs, gguf_name, stored_as
from jaxft.weights.gguf_header import FLOAT_TYPES
from jaxft.weights.gguf_metadata import architecture_for
from jaxft.weights.gguf_save import encoded
from jaxft.weights.gguf_types import MIXTURES
from jaxft.weights.gguf_write import Field, GgufTensorToWrite, write_gguf_file
from jaxft.weights.peft_write import pair_tensors
from jaxft.weights.tensors import tensors_of

LORA_PAIR = {"a", "b", "scale"}
MERGE_INSTEAD = "merge it instead, with --gguf and without --adapter-only"


def save_gguf_adapter(
    path: Path, model: Model, adapter: Params, kind: str, architecture: str | None = None
) -> int:
    """Write an adapter's pairs; return the number of adapted weights.

    kind: F32, F16 or BF16. architecture: of the base's GGUF file, None for the one that jaxft writes. Raises
    ValueError, and leaves no file, for an adapter that llama.cpp cannot apply.
    """
    if kind not in FLOAT_TYPES:
        raise ValueError(f"--gguf {kind}: an adapter alone is written as {', '.join(FLOAT_TYPES)}; use F16")
    architecture, pairs = architecture or architecture_for(model.config), pairs_by_path(adapter)
    if not pairs:
        raise ValueError(f"{path}: the adapter has no pairs to write")
    table = tensors_of(model)
    for weight, pair in pairs.items():
        if set(pair) != LORA_PAIR or weight not in table or not table[weight][0].transposed:
            raise ValueError(
                f"adapter of {weight}: llama.cpp's adapters have pairs a and b of linear layers, and no head "
                f"of its own for a tied embedding; this one has {', '.join(sorted(pair))}: {MERGE_INSTEAD}"
            )
    first = next(iter(pairs.values()))
    alpha = float(np.ravel(np.asarray(first["scale"], np.float32))[0]) * first["a"].shape[-1]
    fields = [
        Field("general.type", "STRING", "adapter"),
        Field("general.name", "STRING", path.stem),
        Field("general.file_type", "UINT32", MIXTURES[kind][0]),
        Field("adapter.type", "STRING", "lora"),
        Field("adapter.lora.alpha", "FLOAT32", alpha),
    ]
    tensors: list[GgufTensorToWrite] = []
    for weight, pair in pairs.items():
        rank = pair["a"].shape[-1]
        for tensor in table[weight]:
            name, heads = gguf_name(architecture, tensor.name), (model.config.heads, model.config.kv_heads)
            stored = stored_as(ARCHITECTURES[architecture], tensor.name, *heads)
            a, b = pair_tensors(tensor, pair, rank, alpha / rank)
            encode_a = partial(encoded, a, StoredAs(None, False), kind)
            encode_b = partial(encoded, b, stored, kind)
            tensors.append(GgufTensorToWrite(f"{name}.lora_a", kind, a.shape, encode_a))
            tensors.append(GgufTensorToWrite(f"{name}.lora_b", kind, b.shape, encode_b))
    write_gguf_file(path, architecture, fields, tensors, lambda part: None)
    return len(tensors) // 2
