"""The type of each tensor in a GGUF file of a named mixture, such as Q4_K_M.

The mixtures are those of llama.cpp's llama-quantize (src/llama-quant.cpp), for dense models.
"""

import re
from dataclasses import dataclass

from jaxft.tree import nearest
from jaxft.weights.gguf.gguf_header import FLOAT_TYPES, block_size

# name -> number in general.file_type, type of most matrices
MIXTURES = {
    "F32": (0, "F32"),
    "F16": (1, "F16"),
    "BF16": (32, "BF16"),
    "Q8_0": (7, "Q8_0"),
    "Q6_K": (18, "Q6_K"),
    "Q5_K_M": (17, "Q5_K"),
    "Q5_K_S": (16, "Q5_K"),
    "Q5_1": (9, "Q5_1"),
    "Q5_0": (8, "Q5_0"),
    "Q4_K_M": (15, "Q4_K"),
    "Q4_K_S": (14, "Q4_K"),
    "Q4_1": (3, "Q4_1"),
    "Q4_0": (2, "Q4_0"),
}
ALIASES = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
# Types for a matrix whose inputs are not a multiple of 256, and the last resort.
FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
LAST_FALLBACK = "F16"


@dataclass(frozen=True)
class MixtureModel:
    """The facts that the choice of types depends on besides a tensor's name and shape. weighted: whether
    inputs have importances; tied: whether the embedding is the head too; layers, heads and kv_heads of an
    architecture.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    weighted: bool = False


def mixture_named(name: str) -> str:
    """Return the mixture of a name as users write it (q4_k_m, Q4_K). Raises ValueError for an unknown one."""
    found = name.upper().replace("-", "_")
    found = ALIASES.get(found, found)
    if found not in MIXTURES:
        near = ", ".join(nearest(found, list(MIXTURES)))
        raise ValueError(
            f"--gguf {name[:40]}: not a type of GGUF files that jaxft writes; near: {near}; all: "
            f"{', '.join(MIXTURES)}"
        )
    return found


def tensor_kind(name: str, shape: tuple[int, ...], mixture: str, model: MixtureModel) -> str:
    """Return the type of a tensor: F32 for vectors, that of the mixture for matrices, or a fallback where the
    inputs are not a multiple of the type's block.
    """
    if len(shape) < 2:
        return "F32"
    default = MIXTURES[mixture][1]
    if default in FLOAT_TYPES:
        return default
    chosen = _mixed(name, shape[-1], mixture, model)
    if shape[-1] % block_size(chosen)[0]:
        chosen = FALLBACKS.get(chosen, LAST_FALLBACK)
    return chosen if shape[-1] % block_size(chosen)[0] == 0 else LAST_FALLBACK


def _mixed(name: str, inputs: int, mixture: str, model: MixtureModel) -> str:
    default = MIXTURES[mixture][1]
    if name == "output.weight" or (model.tied and name == "token_embd.weight"):
        if inputs % block_size(default)[0] or default == "Q8_0":
            return "Q8_0"
        return "Q6_K"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None:
        return default
    layer, module, layers = int(match[1]), match[2], model.layers
    few = layer < layers // 8
    many = few or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    if module in ("attn_v", "attn_qkv"):
        chosen = default
        if mixture in ("Q4_K_M", "Q5_K_M") and many:
            chosen = "Q6_K"
        elif mixture == "Q4_K_S" and layer < 4:
            chosen = "Q5_K"
        is_70b = model.architecture == "llama" and layers == 80 and model.heads != model.kv_heads
        return "Q5_K" if is_70b and chosen == "Q4_K" else chosen
    if module == "ffn_down":
        if mixture in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if many else default
        if few and mixture == "Q4_K_S":
            return "Q5_K"
        if few and model.weighted and mixture in ("Q4_0", "Q5_0"):
            return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[mixture]
    return default
