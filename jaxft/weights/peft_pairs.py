"""LoRA pairs of modules in adapters' files, and pairs of all layers as the leaves of an adapter's tree."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxft import tree
from jaxft.nn.lora import Adapter
from jaxft.weights.peft_modules import read_float
from jaxft.weights.peft_names import PREFIX
from jaxft.weights.safetensors import SafetensorsFiles

MAGNITUDE = "lora_magnitude_vector"  # of DoRA


class Pair(NamedTuple):
    """A LoRA pair of one module: a [in, R], b [R, out], alpha; with DoRA magnitude [out]."""

    a: np.ndarray
    b: np.ndarray
    alpha: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """0 stands for a module without a pair."""
        return self.a.shape[1]


def read_pair(
    files: SafetensorsFiles,
    module: str,
    tensors: tuple[tuple[str, str], tuple[int, ...]],
    config: dict[str, Any],
) -> Pair:
    """Read the pair of a module. tensors: their names, and the shape [in, out] of the module's weight."""
    names, shape = tensors
    arrays = []
    for name in names:
        if name not in files.shapes:
            raise ValueError(f"{files.where}: tensor {name} is missing")
        if len(files.shapes[name]) != 2:
            raise ValueError(f"{files.where}: {name} has shape {files.shapes[name]}, expected two dimensions")
        arrays.append(read_float(files, name).T)
    a, b = arrays
    rank = _matching(config, "rank_pattern", module, config["r"])
    if a.shape != (shape[0], rank) or b.shape != (rank, shape[1]):
        raise ValueError(
            f"{files.where}: {module} has lora_A {a.T.shape} and lora_B {b.T.shape}; "
            f"rank {rank} on this model needs {(rank, shape[0])} and {(shape[1], rank)}"
        )
    alpha = float(_matching(config, "alpha_pattern", module, config["lora_alpha"]))
    return Pair(a, b, alpha, _read_magnitude(files, module, shape[1]) if config.get("use_dora") else None)


def _read_magnitude(files: SafetensorsFiles, module: str, outs: int) -> np.ndarray:
    name = f"{PREFIX}{module}.{MAGNITUDE}"
    if name not in files.shapes:
        raise ValueError(f"{files.where}: tensor {name} is missing, and the configuration has use_dora=true")
    if files.shapes[name] != (outs,):
        raise ValueError(f"{files.where}: {name} has shape {files.shapes[name]}, expected {(outs,)}")
    return read_float(files, name)


def _matching(config: dict[str, Any], key: str, module: str, default: Any) -> Any:
    """Apply PEFT's rule: the first pattern that matches the end of the module's name after a dot, or the
    whole name.
    """
    for pattern, value in (config.get(key) or {}).items():
        if tree.regex(rf"(.*\.)?({pattern})", key).fullmatch(module):
            return value
    return default


def stack_pairs(pairs: list[Pair], settings: Adapter, stacked: bool) -> dict[str, np.ndarray]:
    """Stack pairs to leaves [L, in, R], [L, R, out], [L], zero-padded to the largest rank; without layers the
    only pair.
    """
    ranks = [p.rank for p in pairs]
    rank = max(ranks)
    dtypes = {pair.a.dtype for pair in pairs}
    dtype = np.result_type(np.float32) if len(dtypes) > 1 else pairs[0].a.dtype
    a = np.stack([np.pad(p.a, ((0, 0), (0, rank - p.a.shape[1]))).astype(dtype) for p in pairs])
    b = np.stack([np.pad(p.b, ((0, rank - p.b.shape[0]), (0, 0))).astype(dtype) for p in pairs])
    scales = [
        settings.scale_of(r, p.alpha) if r else settings.scale for r, p in zip(ranks, pairs, strict=True)
    ]
    scale = np.array(scales, np.float32)
    leaves = {"a": a, "b": b, "scale": scale}
    magnitudes = [p.magnitude for p in pairs if p.magnitude is not None]
    leaves |= {"magnitude": np.stack(magnitudes).astype(dtype)} if magnitudes else {}
    return leaves if stacked else jax.tree.map(lambda x: x[0], leaves)
