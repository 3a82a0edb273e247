"""The header of a GGUF file: metadata and tensor table.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. It is parsed here because the gguf
package's reader takes seconds for a vocabulary.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SCALARS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in the file: name of its type, shape (rows first), bytes per row, and its first byte in the
    file.
    """

    kind: str
    shape: tuple[int, ...]
    row_bytes: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors of a GGUF file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def required(self, key: str) -> Any:
        """Return a metadata value. Raises ValueError if it is missing."""
        if key not in self.metadata:
            raise ValueError(f"{self.path}: metadata {key} is missing; use a GGUF file of a Llama model")
        return self.metadata[key]


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

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in SCALARS:
            return np.frombuffer(self.take(np.dtype(SCALARS[kind]).itemsize), SCALARS[kind])[0].item()
        if kind == STRING:
            return self.text()
        if kind != ARRAY or depth > 4:
            raise ValueError(f"a metadata value has unknown type {kind}")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in SCALARS:
            return np.frombuffer(
                self.take(count * np.dtype(SCALARS[inner]).itemsize), SCALARS[inner]
            ).tolist()
        if count > len(self.data) - self.at:
            raise ValueError("it ends inside its header")
        return [self.value(inner, depth + 1) for _ in range(count)]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read metadata and tensor table of a GGUF file. Raises ValueError for an invalid or incomplete file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not a regular file; use a .gguf file")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            metadata, tensors = _parse(_Cursor(data), len(data))
    except (ValueError, OverflowError, struct.error) as e:
        raise ValueError(f"{path}: not a complete GGUF file: {e}; download it again") from e
    return GgufHeader(path, metadata, tensors)


def _parse(cursor: _Cursor, total: int) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("<I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version:#x}, but only little-endian versions 2 and 3 can be read")
    count, pairs = cursor.number("<Q"), cursor.number("<Q")
    metadata = {}
    for _ in range(pairs):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("<I"))
    listed = []
    for _ in range(count):
        name, rank = cursor.text(), cursor.number("<I")
        if rank > 4:
            raise ValueError(f"tensor {name[:100]} has {rank} dimensions")
        listed.append(
            (
                name,
                struct.unpack(f"<{rank}Q", cursor.take(8 * rank)),
                cursor.number("<I"),
                cursor.number("<Q"),
            )
        )
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or align < 1:
        raise ValueError(f"its alignment is {align}")
    start = -(-cursor.at // align) * align
    tensors = {}
    for name, dims, code, offset in listed:
        try:
            kind = GGMLQuantizationType(code)
            block, size = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as e:
            raise ValueError(f"tensor {name} has type {code}, which this gguf package does not know") from e
        shape = tuple(reversed(dims)) or (1,)
        info = GgufTensor(kind.name, shape, shape[-1] // block * size, start + offset)
        end = info.offset + math.prod(shape[:-1]) * info.row_bytes
        if shape[-1] % block or end > total:
            raise ValueError(f"tensor {name} {shape} ends at byte {end}, the file has {total}")
        tensors[name] = info
    return metadata, tensors
