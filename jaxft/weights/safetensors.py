"""Tensors in safetensors files, read and written one at a time; and the JSON files beside them."""

import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxft.distributed import sync
from jaxft.nn.quant import QTensor

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
DTYPES = FLOATS | {
    code: np.dtype(kind) for code, kind in (("U8", np.uint8), ("I8", np.int8), ("I32", np.int32))
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000

Index = tuple[slice, ...]  # of the first dimensions of an array; those after them are whole


@dataclass(frozen=True)
class Packed:
    """A weight [in, out] that the files hold in few bits.

    form: the QTensor of ShapeDtypeStructs that stands for the same numbers, and `read()` gives it as NumPy arrays. None where
    there is no such QTensor; then `read()` gives the numbers in float32. `read(index)`, of a form: part of it, cut between
    blocks, its arrays cut as forms.within says. why: what is in the way of a form, or of a smaller one.
    """

    method: str
    shape: tuple[int, int]
    form: QTensor | None
    read: Callable[..., Any]
    why: str = ""


@dataclass(frozen=True)
class Tensors:
    """The tensors of a checkpoint under their Hugging Face names.

    `read(name)` gives one in its shape and dtype, a float array; of one that is packed, the numbers it stands for.
    `read(name, index)` gives part of it and reads that part alone. packed: those that the files hold in few bits.
    """

    where: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]
    read: Callable[..., np.ndarray]
    packed: Mapping[str, Packed] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One tensor in a safetensors file: its dtype code, shape and position in the file."""

    code: str
    shape: tuple[int, ...]
    offset: int
    size: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, every offset checked against the file's size. Raises ValueError naming the file."""

    def bad(why: str) -> ValueError:
        return ValueError(f"{path}: not a complete safetensors file: {why}; download it again")

    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or length > min(MAX_HEADER, total - 8):
            raise bad(f"its header wants {length} bytes, the file has {total}")
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
            raise bad("its header is not JSON") from e
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object")
    entries = {}
    for name, value in header.items():
        if name == "__metadata__":
            continue
        entry = _entry(value, start=8 + length)
        if entry is None:
            raise bad(f"the header's entry of {name[:100]!r} is malformed")
        if entry.offset + entry.size > total:
            raise bad(f"tensor {name!r} ends at byte {entry.offset + entry.size}, the file has {total}")
        entries[name] = entry
    return entries


def _entry(value: Any, start: int) -> Entry | None:
    if not isinstance(value, dict) or not isinstance(value.get("dtype"), str):
        return None
    shape, offsets = _sizes(value.get("shape")), _sizes(value.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2 or offsets[1] < offsets[0] or len(shape) > 8:
        return None
    size, code = offsets[1] - offsets[0], value["dtype"]
    if code in DTYPES and size != math.prod(shape) * DTYPES[code].itemsize:
        return None
    return Entry(code, shape, start + offsets[0], size)


def _sizes(value: Any) -> tuple[int, ...] | None:
    whole = isinstance(value, list) and all(type(n) is int and 0 <= n < 2**62 for n in value)
    return tuple(value) if whole else None


def spans(index: Index, shape: Sequence[int]) -> Index:
    """The index with a slice(start, stop) for every dimension."""
    cuts = (*index, *(slice(None),) * (len(shape) - len(index)))
    return tuple(slice(*cut.indices(size)[:2]) for cut, size in zip(cuts, shape, strict=True))


def read_tensor(path: Path, name: str, entry: Entry, index: Index = (), view: Any = None) -> np.ndarray:
    """A tensor or part of it, in fresh memory (no map of the file stays behind).

    view: another (dtype, shape) in which its bytes are seen.
    """
    if entry.code not in DTYPES:
        raise ValueError(
            f"{path}: tensor {name} has dtype {entry.code}; weights are one of {', '.join(DTYPES)}"
        )
    dtype, shape = view or (DTYPES[entry.code], entry.shape)
    return read_range(path, f"tensor {name}", Range(np.dtype(dtype), shape, entry.offset), index)


@dataclass(frozen=True)
class Range:
    """An array that lies in a file in row-major order from byte `offset` on."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


def read_range(path: Path, what: str, array: Range, index: Index = ()) -> np.ndarray:
    """Part of an array in a file; of the bytes between its own none is read. Raises ValueError where the file ends too early."""
    cuts, size = spans(index, array.shape), array.dtype.itemsize
    out = np.empty([cut.stop - cut.start for cut in cuts], array.dtype)
    if not out.size:
        return out
    strides = [math.prod(array.shape[i + 1 :]) * size for i in range(len(cuts))]
    last = max(
        (i for i, n in enumerate(array.shape) if out.shape[i] != n), default=0
    )  # from here on a run of bytes
    run = math.prod(out.shape[last:]) * size
    start = array.offset + sum(cut.start * stride for cut, stride in zip(cuts, strides, strict=True))
    rows = itertools.product(*(range(0, n * stride, stride) for n, stride in zip(out.shape[:last], strides)))
    flat: Any = out.reshape(-1).view(np.uint8)
    view = memoryview(flat)
    with path.open("rb", buffering=0) as file:
        for i, row in enumerate(rows):
            if not _read_into(file, view[i * run : (i + 1) * run], start + sum(row)):
                raise ValueError(f"{path}: ends inside {what}; the file changed while it was read")
    return out


def _read_into(file: Any, view: memoryview, start: int) -> bool:
    """Fill `view` from byte `start` of the file on; False where the file ends before."""
    file.seek(start)
    while view and (count := file.readinto(view)):
        view = view[count:]
    return not view


@dataclass(frozen=True)
class Outgoing:
    """A tensor to be written; `fetch()` makes it when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: list[Outgoing]) -> None:
    """A safetensors file, written one tensor at a time and renamed into place when whole.

    Of several processes all call it and fetch the same tensors; process 0 writes, and its error is raised on all.
    """
    tensors = sorted(tensors, key=lambda t: -t.dtype.itemsize)  # wide ones first, so that each stays aligned
    sync.settle(sync.gathered, lambda: _written(path, tensors) if sync.is_first() else _fetched(tensors))


def _fetched(tensors: list[Outgoing]) -> None:
    for t in tensors:
        t.fetch()


def _written(path: Path, tensors: list[Outgoing]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # older transformers insist on it
    offset = 0
    for t in tensors:
        header[t.name] = {
            "dtype": CODES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [offset, offset + t.size],
        }
        offset += t.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    fetched = 0
    try:
        with part.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for t in tensors:
                fetched += 1
                value = np.asarray(t.fetch(), order="C")  # ascontiguousarray would give a number an axis
                if value.shape != t.shape or value.dtype != t.dtype:
                    raise ValueError(
                        f"{t.name}: {value.dtype}{value.shape} came where {t.dtype}{t.shape} was announced"
                    )
                file.write(
                    value.reshape(-1).view(np.uint8).data
                )  # tofile's error for a full disk has no number
        os.replace(part, path)
    except Exception:
        if jax.process_count() > 1:
            _fetched(tensors[fetched:])  # the others wait for this process's part of each
        raise
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: dict[str, Any], sort: bool = False) -> None:
    """A JSON file, indented by 2, renamed into place when whole."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, sort_keys=sort) + "\n")
    os.replace(part, path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises FileNotFoundError or ValueError naming it."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{path}: no such file; is {path.parent} a Hugging Face model folder?") from e
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"{path}: not JSON ({e})") from e
    if not isinstance(value, dict):
        raise ValueError(f"{path}: wanted a JSON object, found {type(value).__name__}")
    return value
