"""The GGUF file format: headers (metadata and tensor table) read, files written one tensor at a time.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package's reader takes seconds for
a vocabulary; its writer keeps all tensors in memory, or writes them twice.
"""

import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import ml_dtypes
import numpy as np

from jaxft.distributed.disk import publish
from jaxft.weights.tensors import errors_name

LENGTH = struct.Struct("<Q")
SCALARS = {  # by the code of a metadata value's type
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
    12: "<f8",
}  # fmt: skip
STRING, ARRAY = 8, 9
DEEPEST_ARRAY = 5  # arrays within arrays, so that a damaged file is no RecursionError
KIND_CODES = {"UINT32": 4, "INT32": 5, "FLOAT32": 6, "BOOL": 7, "STRING": STRING}  # of written metadata
ALIGNMENT = 32  # of tensors, bytes; the format's default
# Types of tensors without blocks.
FLOAT_TYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}

T = TypeVar("T", int, float, str, bool)
GGUF_ADVICE = "use another GGUF file of the model, or its Hugging Face folder"
TYPE_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "a Boolean"}
PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")  # of llama.cpp's split files, counted from 1


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a GGUF file. kind: its type, such as Q8_0. shape: [rows, columns] of a matrix. offset: the
    byte of the file at which it begins.
    """

    path: Path
    kind: str
    shape: tuple[int, ...]
    row_bytes: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors of a GGUF file. path: the file, or the first part of a split file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """Name of the architecture, the prefix of its metadata."""
        return self.required("general.architecture", str)

    def key(self, name: str) -> str:
        """Return the metadata key of a setting of the architecture: llama.block_count for block_count."""
        return f"{self.architecture}.{name}"

    def required(self, key: str, kind: type[T]) -> T:
        """Return a metadata value. Raises ValueError if it is missing or of another type."""
        if key not in self.metadata:
            raise ValueError(f"{self.path}: metadata {key} is missing; use a GGUF file of a language model")
        value = self.metadata[key]
        if not _has_type(value, kind):
            self._refuse(key, value, kind)
        return kind(value)

    def optional(self, key: str, default: T) -> T:
        """Return a metadata value, or the default without one. Raises ValueError if it is of another type."""
        return self.required(key, type(default)) if key in self.metadata else default

    def array(self, key: str, kind: type[T]) -> list[T] | None:
        """Return a metadata array, None without one. Raises ValueError unless its items are of this type."""
        if key not in self.metadata:
            return None
        items = self.metadata[key]
        if not isinstance(items, list):
            raise ValueError(
                f"{self.path}: metadata {key} must be an array, got {_short(items)}; {GGUF_ADVICE}"
            )
        wrong = next((i for i, item in enumerate(items) if not _has_type(item, kind)), None)
        if wrong is not None:
            self._refuse(f"{key}[{wrong}]", items[wrong], kind)
        return items

    def _refuse(self, key: str, value: Any, kind: type) -> NoReturn:
        raise ValueError(
            f"{self.path}: metadata {key} must be {TYPE_NAMES[kind]}, got {_short(value)}; {GGUF_ADVICE}"
        )


def _has_type(value: Any, kind: type) -> bool:
    """Return whether a metadata value has this type; a whole number is a number too, a Boolean is neither."""
    accepted: Any = (int, float) if kind is float else kind
    return isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)


def _short(value: Any) -> str:
    """Return a metadata value as text of at most 60 characters, for a message."""
    text = f"an array of {len(value)}" if isinstance(value, list) else ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _UnknownType(ValueError):
    """A tensor's type is not in the installed package gguf."""


class _Cursor:
    """Reads values from a buffer in order. Raises ValueError at its end."""

    def __init__(self, data: Any):
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError("it ends inside its header")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, format: str) -> int:
        return struct.unpack(format, self.take(struct.calcsize(format)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8")

    def texts(self, count: int) -> list[str]:
        """Read `count` strings without a call for each: a tokenizer has a hundred thousand."""
        data, at, end, texts = self.data, self.at, len(self.data), []
        for _ in range(count):
            start = at + 8
            at = start + (LENGTH.unpack_from(data, at)[0] if start <= end else 1)
            if at > end:
                raise ValueError("it ends inside its header")
            texts.append(data[start:at].decode("utf-8"))
        self.at = at
        return texts

    def name(self) -> str:
        """Read the name of a metadata entry or a tensor."""
        name = self.text()
        if not name.isprintable():
            raise ValueError(f"the name {name[:60]!r} in its header has a character that is not printable")
        return name

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in SCALARS:
            return np.frombuffer(self.take(np.dtype(SCALARS[kind]).itemsize), SCALARS[kind])[0].item()
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"a metadata value has unknown type {kind}")
        if depth == DEEPEST_ARRAY:
            raise ValueError(f"a metadata value has arrays nested more than {DEEPEST_ARRAY} deep")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in SCALARS:
            return np.frombuffer(
                self.take(count * np.dtype(SCALARS[inner]).itemsize), SCALARS[inner]
            ).tolist()
        if count > len(self.data) - self.at:
            raise ValueError("it ends inside its header")
        if inner == STRING:
            return self.texts(count)
        return [self.value(inner, depth + 1) for _ in range(count)]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the metadata and the tensor table of a GGUF file. path: the file; for a split file any of its
    parts, of which all are read.

    Raises ValueError for an invalid or incomplete file, FileNotFoundError for a part that is missing.
    """
    parts = part_files(path)
    header = _read_part(parts[0], 0, len(parts))
    for number, part in enumerate(parts[1:], 1):
        tensors = _read_part(part, number, len(parts)).tensors
        if repeated := next(iter(header.tensors.keys() & tensors.keys()), None):
            raise ValueError(f"{part}: tensor {repeated} is in an earlier part too; download the parts again")
        header = replace(header, tensors={**header.tensors, **tensors})
    expected = header.optional("split.tensors.count", len(header.tensors))
    if expected != len(header.tensors):
        raise ValueError(
            f"{header.path}: the parts have {len(header.tensors)} tensors, but its metadata "
            f"split.tensors.count is {expected}; download the parts again"
        )
    return header


def part_files(path: Path) -> list[Path]:
    """Return all parts of a split GGUF file, given any of them; [path] for a file that is not split. Raises
    FileNotFoundError for a part that is missing.
    """
    match = PART_NAME.fullmatch(path.name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return [path]
    count = int(match[3])
    parts = [path.with_name(f"{match[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    for i, part in enumerate(parts, 1):
        if not part.is_file():
            raise FileNotFoundError(
                f"{part}: part {i} of {count} of a split GGUF file is missing; download it to the same folder"
            )
    return parts


def metadata_bytes(path: Path) -> dict[str, bytes]:
    """Return for each metadata key of a GGUF file the bytes that store its type and value."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor, entries = _Cursor(data), {}
        cursor.take(16)  # GGUF, version, count of tensors
        for _ in range(cursor.number("<Q")):
            key, start = cursor.name(), cursor.at
            cursor.value(cursor.number("<I"))
            entries[key] = bytes(data[start : cursor.at])
    return entries


def _read_part(path: Path, number: int, count: int) -> GgufHeader:
    """Read one file, which must be part `number` (counted from 0) of `count`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not a regular file; use a .gguf file")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            metadata, tensors = _parse(_Cursor(data), len(data), path)
    except _UnknownType:
        raise
    except (ValueError, OverflowError, struct.error) as e:
        raise ValueError(
            f"{path}: not a complete GGUF file of version 2 or 3: {e}; download it again, or use another file"
        ) from e
    header = GgufHeader(path, metadata, tensors)
    stated = header.optional("split.no", 0), max(1, header.optional("split.count", 1))
    if stated != (number, count):
        raise ValueError(
            f"{path}: by its metadata it is part {stated[0] + 1} of {stated[1]}, by its name part "
            f"{number + 1} of {count}; the parts must be named NAME-00001-of-{stated[1]:05}.gguf and so on"
        )
    return header


def block_size(kind: str) -> tuple[int, int]:
    """Return (elements, bytes) of a block of a tensor type."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def _parse(cursor: _Cursor, total: int, path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("<I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version:#x}, but jaxft reads little-endian versions 2 and 3")
    count, pairs = cursor.number("<Q"), cursor.number("<Q")
    metadata = {}
    for _ in range(pairs):
        key = cursor.name()
        metadata[key] = cursor.value(cursor.number("<I"))
    listed = []
    for _ in range(count):
        name, rank = cursor.name(), cursor.number("<I")
        if rank > 4:
            raise ValueError(f"tensor {name[:100]} has {rank} dimensions, more than 4")
        dims = struct.unpack(f"<{rank}Q", cursor.take(8 * rank))
        listed.append((name, dims, cursor.number("<I"), cursor.number("<Q")))
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or align < 1:
        raise ValueError(f"its general.alignment is {align}, expected a whole number above 0")
    start = -(-cursor.at // align) * align
    tensors = {}
    for name, dims, code, offset in listed:
        try:
            kind = GGMLQuantizationType(code)
            block, size = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as e:
            raise _UnknownType(
                f"{path}: tensor {name} has type number {code}, which the installed package gguf does not "
                "know; upgrade it (pip install -U gguf) or, if that does not help, download the file again"
            ) from e
        shape = tuple(reversed(dims)) or (1,)
        info = GgufTensor(path, kind.name, shape, shape[-1] // block * size, start + offset)
        end = info.offset + math.prod(shape[:-1]) * info.row_bytes
        if shape[-1] % block or end > total:
            raise ValueError(f"tensor {name} {shape} of {kind.name} does not fit in {total} bytes")
        if name in tensors:
            raise ValueError(f"tensor {name} is in it twice")
        tensors[name] = info
    return metadata, tensors


# Writing


class Field(NamedTuple):
    """A metadata entry.

    kind: a key of KIND_CODES, the type of the value, or of the items of a list; RAW if the value is bytes
    from metadata_bytes.
    """

    key: str
    kind: str
    value: Any


@dataclass(frozen=True)
class GgufTensorToWrite:
    """A tensor of a file to be written.

    kind: name of its type, such as Q8_0. shape: as in NumPy, [rows, inputs]. fetch(): returns the bytes of
    the whole tensor as a uint8 array, the first row first; called only when the tensor is written.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Size in bytes."""
        elements, size = block_size(self.kind)
        return int(np.prod(self.shape)) // elements * size


def write_gguf_file(
    path: Path,
    architecture: str,
    fields: Sequence[Field],
    tensors: Sequence[GgufTensorToWrite],
    check: Callable[[Path], None],
) -> None:
    """Write a GGUF file and rename it into place when it is complete; on an error no file is left.

    check(part): called once the header and the 1-D tensors are written and before the matrices are fetched;
    part: the unfinished file. An error in it ends the writing. Raises ValueError if a tensor's fetch does
    (values that are not finite), or if it returns the wrong number of bytes.
    """
    tensors = sorted(tensors, key=lambda tensor: len(tensor.shape) > 1)  # 1-D ones first
    part = path.with_name(path.name + ".part")
    try:
        _write_header(part, architecture, fields, tensors)
        with part.open("r+b") as file:
            start = file.seek(0, os.SEEK_END)
            start += -start % ALIGNMENT
            ends = np.cumsum([start] + [tensor.size + -tensor.size % ALIGNMENT for tensor in tensors])
            file.truncate(int(ends[-1]))
            checked = False
            for tensor, at in zip(tensors, ends[:-1], strict=True):
                if len(tensor.shape) > 1 and not checked:
                    file.flush()
                    check(part)
                    checked = True
                with errors_name(f"{path}: not written: tensor {tensor.name}"):
                    raw = np.ascontiguousarray(tensor.fetch())
                if raw.dtype != np.uint8 or raw.size != tensor.size:
                    raise ValueError(
                        f"{tensor.name}: expected {tensor.size} bytes, got {raw.nbytes}; correct its fetch()"
                    )
                file.seek(int(at))
                file.write(raw.reshape(-1).data)
        publish(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_header(
    path: Path, architecture: str, fields: Sequence[Field], tensors: Sequence[GgufTensorToWrite]
) -> None:
    """Write magic, version 3, the counts, metadata and the tensor table."""
    from gguf.constants import GGMLQuantizationType

    fields = [Field("general.architecture", "STRING", architecture), *fields]
    fields = [field for field in fields if field.value != []]  # readers take a missing array as empty
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)))
        for field in fields:
            file.write(_text(field.key) + _value(field))
        at = 0
        for tensor in tensors:
            shape = tensor.shape[::-1]
            kind = GGMLQuantizationType[tensor.kind]
            file.write(_text(tensor.name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, at))
            at += tensor.size + -tensor.size % ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(field: Field) -> bytes:
    """Return the bytes that store a metadata entry's type and value."""
    if field.kind == "RAW":
        return field.value
    code = KIND_CODES[field.kind]
    items = field.value if isinstance(field.value, list) else [field.value]
    if field.kind == "STRING":
        packed = b"".join(map(_text, items))
    else:
        packed = np.asarray(items, SCALARS[code]).tobytes()
    if isinstance(field.value, list):
        return struct.pack("<IIQ", ARRAY, code, len(items)) + packed
    return struct.pack("<I", code) + packed
