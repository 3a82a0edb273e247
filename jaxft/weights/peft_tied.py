"""Adapters that PEFT keeps tied on a base whose head is tied to its embeddings (ensure_weight_tying=true).

Such an adapter's configuration lists the embeddings only, and its files have the parameters twice: as those
of the embeddings and as those of the head. jaxft reads both, so that logits are PEFT's. A run that starts
from the adapter trains them apart, as it does without ensure_weight_tying.
"""

from typing import Any

import numpy as np

from jaxft.nn.lora_patterns import is_listed, is_saved
from jaxft.nn.tensor_names import HEAD_MODULE
from jaxft.weights.hf import EMBEDDING
from jaxft.weights.peft_names import PREFIX
from jaxft.weights.safetensors import SafetensorsFiles, read_tensor

TABLE_MODULE = EMBEDDING.removesuffix(".weight")
# Tensors of the head, those of the table that they equal, and whether one is the other transposed.
TIED_TENSORS = (
    ("weight", "weight", False),
    ("lora_A.weight", "lora_embedding_B", True),
    ("lora_B.weight", "lora_embedding_A", True),
)


def with_tied_head(config: dict[str, Any]) -> dict[str, Any]:
    """Return an adapter's configuration with lm_head in modules_to_save or target_modules, whichever lists
    the embeddings.
    """
    saved, targets = config.get("modules_to_save") or [], config.get("target_modules") or []
    if isinstance(saved, list) and any(is_saved(str(one), TABLE_MODULE) for one in saved):
        return {**config, "modules_to_save": [*saved, HEAD_MODULE]}
    if isinstance(targets, list) and is_listed(targets, (TABLE_MODULE,), "target_modules"):
        return {**config, "target_modules": [*targets, HEAD_MODULE]}
    return config


def check_tied(files: SafetensorsFiles) -> None:
    """Raise ValueError if an adapter's files have other values for the head than for the embeddings."""
    for of_head, of_table, transposed in TIED_TENSORS:
        head, table = f"{PREFIX}{HEAD_MODULE}.{of_head}", f"{PREFIX}{TABLE_MODULE}.{of_table}"
        if head not in files.shapes or table not in files.shapes:
            continue
        value = read_tensor(files, table)
        if not np.array_equal(read_tensor(files, head), value.T if transposed else value):
            raise ValueError(
                f"{files.where}: tensor {head} is not {table}, but adapter_config.json has "
                "ensure_weight_tying=true; save the adapter with peft again, or set it to false and list "
                "lm_head"
            )
