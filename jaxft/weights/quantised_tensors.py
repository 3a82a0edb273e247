"""Read the tensors that a quantised weight consists of; shared by the readers of all methods."""

import numpy as np

from jaxft.weights import safetensors
from jaxft.weights.model_files import Index, QuantisedTensor
from jaxft.weights.safetensors import SafetensorsFiles

Found = tuple[
    dict[str, QuantisedTensor], set[str]
]  # quantised weights by name; the tensors that they consist of


def require_tensor(files: SafetensorsFiles, name: str, shape: tuple[int, ...] | None) -> None:
    """Raise ValueError if the tensor is missing or has another shape. shape: None for any."""
    if name not in files.shapes:
        raise ValueError(f"{files.where}: {name} is missing; is the download complete?")
    if shape is not None and files.shapes[name] != shape:
        raise ValueError(f"{files.where}: {name} has shape {files.shapes[name]}, expected {shape}")


def read_part(
    files: SafetensorsFiles, name: str, shape: tuple[int, ...] | None = None, index: Index = ()
) -> np.ndarray:
    """Read a tensor that a quantised weight consists of, or the part of it at `index`; raise ValueError as
    require_tensor does.
    """
    require_tensor(files, name, shape)
    return safetensors.read_tensor(files, name, index)
