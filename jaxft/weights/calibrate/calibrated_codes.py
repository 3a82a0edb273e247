"""Calibrated codes of a model's layers in the cache: a folder with a file for each layer, computed once.

The folder is named by a hash of the model's files, the rows and all settings that the codes depend on. A run
stores this name in its record, and every command that uses the run reads the same codes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.nn.quant import Quant, with_defaults
from jaxft.weights.hf.safetensors import (
    TensorToWrite,
    open_safetensors,
    read_model_json,
    write_here,
    write_model_json,
)
from jaxft.weights.hub import hub
from jaxft.weights.hub.cached_folder import adopt_folder, cached_folder, folder_damage
from jaxft.weights.hub.file_hash import cache_folder, content_sha256, files_sha256
from jaxft.weights.model_files import ModelFiles
from jaxft.weights.quantised.formats import open_tensors, quantised_tensors
from jaxft.weights.quantised.own_arrays import OWN_ARRAYS

VERSION = 1  # of the files; another one if the same settings lead to other codes
CALIBRATED = "calibrated"  # the folder in the cache
_SETTINGS = "calibration.json"
_SIDES = ("pair_a", "pair_b")  # the tensors of a low-rank correction
AGAIN = "Start the run's command again, which computes it, or set --quant (nf4 rounds to nearest)"


@dataclass(frozen=True)
class CalibratedLayer:
    """Codes of the weights of a layer by Hugging Face name, QTensors [in, out] on the host, and low-rank
    corrections (a [in, R], b [R, out]) of some of them: `a b` is to be added to the weight.
    """

    weights: dict[str, Any]
    pairs: dict[str, tuple[np.ndarray, np.ndarray]]


def codes_name(ref: str, quant: Quant, rows: str, ranks: Mapping[str, Any]) -> str:
    """Return the name of a model's calibrated codes. rows: a hash of the calibration rows. ranks: of the
    corrections, by path.
    """
    located = hub.locate(ref)
    files = hub.files_of(located)
    names = [[path.name, sha256] for path, sha256 in zip(files, files_sha256(files), strict=True)]
    format = quant.kind, *with_defaults(quant.kind, quant.block, quant.double)
    key = json.dumps([VERSION, names, format, quant.targets, rows, dict(ranks)])
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    return f"{Path((hub.hub_name(ref) or (str(located.path), None))[0]).name}-{digest}"


def codes_folder(name: str) -> Path:
    """Return the folder of calibrated codes in the cache, which may not exist."""
    return cache_folder() / CALIBRATED / name


def codes_damage(name: str) -> str | None:
    """Return the problem with calibrated codes in the cache; None if they are complete, or not there."""
    folder = codes_folder(name)
    return folder_damage(folder) if folder.is_dir() else None


def confirm_codes(record: Mapping[str, Any]) -> bool:
    """Whether the cache has the codes of a run, or none of their name. record: the run's, of their name and
    codes_sha256. Codes that an earlier version wrote without hashes of their files get these.
    """
    name = str(record.get("codes"))
    if not codes_folder(name).is_dir():
        return True
    if codes_sha256(name) != record.get("sha256"):
        return False
    adopt_folder(codes_folder(name))
    return True


def write_codes(name: str, quant: Quant, layers: Callable[[], Iterable[CalibratedLayer]]) -> Iterator[int]:
    """Compute and write calibrated codes unless the cache has them; yield the number of each layer, from 1,
    when it is written.

    layers: computes them one after the other. The folder appears when it is complete; another process may be
    faster. Damaged codes are replaced. Raises OSError if the cache cannot be written.
    """
    out = codes_folder(name)
    if out.is_dir() and codes_damage(name) is None:
        return
    with cached_folder(out) as part:
        part.mkdir()
        for number, layer in enumerate(layers()):
            _write_layer(part / f"layer-{number:05}.safetensors", layer)
            yield number + 1
        block, double = with_defaults(quant.kind, quant.block, quant.double)
        write_model_json(part / _SETTINGS, {"kind": quant.kind, "block": block, "double": double})


def _write_layer(path: Path, layer: CalibratedLayer) -> None:
    tensors: list[TensorToWrite] = []
    for name, q in layer.weights.items():
        tensors += quantised_tensors(name, q, _returning(q), OWN_ARRAYS.name)
    for name, pair in layer.pairs.items():
        for side, x in zip(_SIDES, pair, strict=True):
            fetch = np.asarray(x, np.float32)
            tensors.append(TensorToWrite(f"{name}.{side}", fetch.dtype, fetch.shape, _returning(fetch)))
    write_here(path, tensors)


def _returning(x: Any) -> Callable[[], Any]:
    return lambda: x


def read_correction(name: str, weight: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the low-rank correction (a [in, R], b [R, out]) of a weight by its Hugging Face name."""
    a, b = (open_codes(name).read(f"{weight}.{side}") for side in _SIDES)
    return a, b


def open_codes(name: str) -> ModelFiles:
    """Open calibrated codes in the cache, weights by Hugging Face name; each process verifies them once.

    Raises FileNotFoundError if the cache does not have them, ValueError if they are damaged.
    """
    folder = codes_folder(name)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: the calibrated base of this run is not in the cache. {AGAIN}")
    files = [path.stat() for path in sorted(folder.iterdir())]
    return _open(folder, tuple((x.st_ino, x.st_size, x.st_mtime_ns) for x in files))


@cache
def _open(folder: Path, version: tuple[tuple[int, int, int], ...]) -> ModelFiles:
    damage = folder_damage(folder)
    if damage is not None:
        raise ValueError(f"the calibrated base of this run cannot be used: {damage}. {AGAIN}")
    files = open_safetensors(folder, sorted(folder.glob("layer-*.safetensors")))
    return open_tensors(files, {"quant_method": OWN_ARRAYS.name, **read_model_json(folder / _SETTINGS)})


def codes_sha256(name: str) -> str:
    """Return a hash of all bytes of calibrated codes in the cache."""
    files = sorted(codes_folder(name).glob("layer-*.safetensors"))
    return hashlib.sha256("".join(files_sha256(files, content_sha256)).encode()).hexdigest()
