"""Write GGUF files: metadata and tensors, one tensor at a time.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package's writer keeps all tensors
in memory, or writes them twice.
"""

import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft.distributed.disk import publish
from jaxft.weights.gguf.gguf_header import ARRAY, SCALARS, STRING, block_size
from jaxft.weights.tensors import errors_name

ALIGNMENT = 32  # of tensors, bytes; the format's default
KIND_CODES = {"UINT32": 4, "INT32": 5, "FLOAT32": 6, "BOOL": 7, "STRING": STRING}


class Field(NamedTuple):
    """A metadata entry.

    kind: its type, of KIND_CODES; that of the items if value is a list; RAW for a value with its type as
    bytes of another file.
    """

    key: str
    kind: str
    value: Any


@dataclass(frozen=True)
class GgufTensorToWrite:
    """A tensor of a file to be written.

    kind: name of its type, such as Q8_0. shape: rows first. fetch() returns its bytes as a uint8 array, row
    by row, when they are needed.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
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

    check(part): called with the unfinished file, whose header and 1-D tensors are complete, before the
    matrices are fetched; what it raises ends the writing. Raises ValueError for a tensor whose values are not
    finite.
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
                    raise ValueError(f"{tensor.name}: expected {tensor.size} bytes, got {raw.nbytes}")
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
    """Pack a metadata value with its type; RAW is packed already."""
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
