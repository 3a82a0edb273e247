"""Tensors in safetensors files, read in part and written one at a time; and the JSON files next to them."""

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from jaxft.distributed import sync
from jaxft.weights.tensors import Index, errors_name, full_index, lengths, require_finite

FLOAT8 = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)}
FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    **FLOAT8,
}
DTYPES = FLOATS | {"U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "I32": np.dtype(np.int32)}
CODES = {dtype: code for code, dtype in DTYPES.items()} | {np.dtype(np.int64): "I64"}  # of written tensors
UNSUPPORTED = np.dtype(np.void)
HEADER_BYTES = 32 << 20  # of one file: about 300,000 tensors
COPIED_BYTES = 8 << 20  # at a time
WRITE_ADVICE = "find the step that made them, or, if it is only the range of the dtype, choose a wider one"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file. name: its name there. offset: the byte of the file at which it begins.
    dtype: one of DTYPES, else UNSUPPORTED.
    """

    path: Path
    name: str
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SafetensorsFiles:
    """The tensors of one or more safetensors files by name. where: the file or folder, for messages."""

    where: str
    tensors: dict[str, StoredTensor]


def open_safetensors(where: Path, paths: Iterable[Path]) -> SafetensorsFiles:
    """Open safetensors files. Raises ValueError for an incomplete file and for a tensor in two files."""
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        with _open(path):  # the library has checked the header
            header, begin = _read_header(path)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name in tensors:
                raise ValueError(
                    f"{path}: tensor {name} is in {tensors[name].path.name} too; remove one of the files"
                )
            offset, dtype = begin + entry["data_offsets"][0], DTYPES.get(entry["dtype"], UNSUPPORTED)
            tensors[name] = StoredTensor(path, name, offset, dtype, tuple(entry["shape"]))
    return SafetensorsFiles(str(where), tensors)


def _open(path: Path) -> safe_open:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; download or export its folder again")
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file; use a safetensors file")
    total = path.stat().st_size
    if not total:
        raise ValueError(f"{path}: not a complete safetensors file (it is empty); download it again")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if HEADER_BYTES < size < total:  # the library would read it
        limit = f"above the limit of {HEADER_BYTES >> 20} MiB"
        raise ValueError(f"{path}: its header has {size >> 20} MiB, {limit}; use another file")
    try:
        return safe_open(path, framework="np")
    except SafetensorError as e:
        reason = " ".join(str(e).split())
        raise ValueError(f"{path}: not a complete safetensors file ({reason}); download it again") from e


def required(files: SafetensorsFiles, name: str, shape: tuple[int, ...] | None = None) -> StoredTensor:
    """Return a tensor. Raises ValueError if it is missing or has another shape. shape: None for any."""
    if name not in files.tensors:
        raise ValueError(f"{files.where}: {name} is missing; download the model again")
    tensor = files.tensors[name]
    if shape is not None and tensor.shape != shape:
        raise ValueError(
            f"{files.where}: {name} has shape {tensor.shape}, expected {shape}; use the file that belongs to "
            "this model"
        )
    return tensor


def read_tensor(
    files: SafetensorsFiles, name: str, index: Index = (), shape: tuple[int, ...] | None = None
) -> np.ndarray:
    """Read a tensor, or the part of it at `index`, into fresh memory. Raises ValueError for a missing tensor,
    another shape than `shape`, and an unsupported dtype.
    """
    return read_stored(required(files, name, shape), index)


def read_stored(tensor: StoredTensor, index: Index = ()) -> np.ndarray:
    """Read a tensor, or the part of it at `index`. Raises ValueError for an unsupported dtype."""
    if tensor.dtype == UNSUPPORTED:
        raise ValueError(
            f"{tensor.path}: the dtype of tensor {tensor.name} is not supported; write the file again with "
            f"one of {', '.join(DTYPES)}"
        )
    index = full_index(index, tensor.shape)
    if tensor.dtype in FLOAT8.values() or not math.prod(lengths(index)) or not tensor.shape:
        return read_view(tensor, tensor.dtype, tensor.shape, index)  # get_slice does not support these
    with _open(tensor.path) as file:
        return file.get_slice(tensor.name)[index]


def read_view(
    tensor: StoredTensor, dtype: DTypeLike, shape: tuple[int, ...], index: Index = ()
) -> np.ndarray:
    """Read the part at `index` of a tensor after viewing its bytes as an array of this dtype and shape."""
    index = full_index(index, shape)
    if not math.prod(lengths(index)):
        return np.empty(lengths(index), dtype)
    return map_array(tensor.path, dtype, tensor.offset, shape, index)


def map_array(path: Path, dtype: DTypeLike, offset: int, shape: tuple[int, ...], index: Index) -> np.ndarray:
    """Copy the part at `index` of an array stored at byte `offset` of a file, reading no other pages. Raises
    OSError or ValueError, with the path, if the file cannot be read or ends in the array.
    """
    try:
        return np.array(np.memmap(path, dtype, "r", offset, shape)[index])
    except OSError as e:
        raise OSError(e.errno, e.strerror or str(e), str(path)) from e
    except ValueError as e:
        raise ValueError(f"{path}: ends inside a tensor: it changed while it was read; start again") from e


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor of a file to be written; `fetch()` returns its values when they are needed."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: list[TensorToWrite], source: Path | None = None) -> None:
    """Write a safetensors file one tensor at a time, and rename it into place when it is complete. Its folder
    is not synced; distributed.disk.publish does that.

    source: a safetensors file whose tensors are copied unchanged unless `tensors` has them. With several
    processes, all call this and fetch the same tensors; process 0 writes, and its error is raised on all.
    Raises ValueError, and leaves no file, if a tensor has values that are not finite.
    """

    def write() -> None:
        if sync.is_first():
            write_here(path, tensors, source)
        else:
            _fetch_all(tensors)

    sync.run_on_all(sync.gather_texts, write)


def _fetch_all(tensors: list[TensorToWrite]) -> None:
    for tensor in tensors:
        tensor.fetch()


def write_here(path: Path, tensors: list[TensorToWrite], source: Path | None = None) -> None:
    """Write a safetensors file as write_safetensors does, but from this process alone."""
    stored: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which older transformers require
    part = path.with_name(path.name + ".part")
    stored_at = fetched = 0
    try:
        if source is not None:
            stored, stored_at = _read_header(source)
        header, starts = _header(stored, tensors)
        with part.open("wb") as file:
            file.write(header)
            for name in starts.keys() & stored.keys() - {tensor.name for tensor in tensors}:
                file.seek(starts[name])
                start, end = stored[name]["data_offsets"]
                _copy_bytes(source or path, stored_at + start, end - start, file)
            for tensor in tensors:
                fetched += 1
                file.seek(starts[tensor.name])
                value = np.asarray(tensor.fetch(), order="C")  # ascontiguousarray would make a scalar 1-D
                if value.shape != tensor.shape or value.dtype != tensor.dtype:
                    raise ValueError(
                        f"{tensor.name}: its values are {value.dtype}{value.shape}, but the file's header "
                        f"has {tensor.dtype}{tensor.shape}; correct the shapes in the model's family"
                    )
                with errors_name(f"{path}: not written: tensor {tensor.name}"):
                    require_finite(value, WRITE_ADVICE)
                # not tofile, whose error for a full disk has no errno
                file.write(value.reshape(-1).view(np.uint8).data)
        os.replace(part, path)
    except Exception:
        if jax.process_count() > 1:
            _fetch_all(tensors[fetched:])  # the other processes wait for this one's part of each
        raise
    finally:
        part.unlink(missing_ok=True)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and the byte at which the tensors begin."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


def _copy_bytes(source: Path, start: int, size: int, out: BinaryIO) -> None:
    with source.open("rb") as file:
        file.seek(start)
        while size:
            piece = file.read(min(COPIED_BYTES, size))
            if not piece:
                raise ValueError(
                    f"{source}: ends inside a tensor; the file changed while it was read; start again"
                )
            out.write(piece)
            size -= len(piece)


def _header(stored: dict[str, Any], tensors: list[TensorToWrite]) -> tuple[bytes, dict[str, int]]:
    """Return the first bytes of a safetensors file, and the byte at which each tensor begins.

    stored: header of the file whose tensors are copied, or only {"__metadata__": ...} without copies. Wide
    dtypes come first, so that each tensor is aligned.
    """
    new = {
        tensor.name: {
            "dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [0, tensor.size]
        }
        for tensor in tensors
    }  # fmt: skip
    others = [name for name in stored if name != "__metadata__"]
    others.sort(key=lambda name: stored[name]["data_offsets"][0])
    entries = {name: stored[name] for name in others} | new
    sizes = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries.items()}
    header: dict[str, Any] = {"__metadata__": stored["__metadata__"]} if "__metadata__" in stored else {}
    offset = 0
    for name in sorted(entries, key=lambda name: -sizes[name] // max(1, math.prod(entries[name]["shape"]))):
        header[name] = {**entries[name], "data_offsets": [offset, offset + sizes[name]]}
        offset += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    starts = {name: begin + header[name]["data_offsets"][0] for name in entries}
    return len(text).to_bytes(8, "little") + text, starts


def write_model_json(path: Path, value: dict[str, Any], sort: bool = False) -> None:
    """Write a JSON file, indented by 2, and rename it into place when it is complete. sort: sort the keys."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, sort_keys=sort) + "\n")
    os.replace(part, path)


def read_model_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises FileNotFoundError or ValueError with the path."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not JSON (it is not a regular file); replace it by a file")
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{path}: no such file; use a Hugging Face model folder") from e
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ValueError(f"{path}: not JSON ({e}); correct or download it again") from e
    except ValueError as e:
        raise ValueError(f"{path}: not JSON (a number has thousands of digits); correct it") from e
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}; correct the file")
    return value
