"""TensorBoard event files, written without tensorboardX.

Its SummaryWriter writes in a thread that dies on a full disk, and the run then waits for it forever; and it
imports torch where that is installed, which takes seconds. The format: records of length, checksum, content
and checksum (tensorflow/core/lib/io/record_writer.h); the content is a protobuf message Event
(tensorflow/core/util/event.proto) with the fields below.
"""

import math
import os
import platform
import re
import struct
import time
from functools import cache
from pathlib import Path

from jaxft.runs.trackers.tracker import Tracker, with_perf

# Numbers of fields: of Event, of Summary and its Value, of SessionLog
WALL_TIME, STEP, FILE_VERSION, SUMMARY, SESSION_LOG = 1, 2, 3, 5, 7
VALUE, TAG, SIMPLE_VALUE = 1, 1, 2
STATUS, START = 1, 1
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
NOT_IN_TAGS = re.compile(r"[^-/\w.]")
CASTAGNOLI = 0x82F63B78  # the reversed polynomial of CRC-32C


class TensorBoard:
    """Appends scalars to an event file."""

    def __init__(self, path: Path, start_step: int):
        self._file = path.open("ab")
        self._write(0, bytes_field(FILE_VERSION, b"brain.Event:2"))
        # A session that starts at a step hides the entries of an earlier process for later steps.
        start = varint(STATUS << 3 | VARINT) + varint(START)
        self._write(start_step + 1 if start_step else 0, bytes_field(SESSION_LOG, start))

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """Write the finite metrics, and flush: a killed run loses nothing."""
        for tag, value in with_perf(metrics, perf).items():
            if math.isfinite(value):
                name = NOT_IN_TAGS.sub("_", tag).lstrip("/").encode()
                single = struct.pack("<Bf", SIMPLE_VALUE << 3 | FIXED32, as_float32(value))
                scalar = bytes_field(VALUE, bytes_field(TAG, name) + single)
                self._write(step, bytes_field(SUMMARY, scalar))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, step: int, content: bytes) -> None:
        data = struct.pack("<Bd", WALL_TIME << 3 | FIXED64, time.time())
        if step:
            data += varint(STEP << 3 | VARINT) + varint(step)
        data += content
        size = struct.pack("<Q", len(data))
        checks = [struct.pack("<I", masked_checksum(part)) for part in (size, data)]
        self._file.write(size + checks[0] + data + checks[1])


def varint(number: int) -> bytes:
    """Return a non-negative integer in protobuf's variable length: 7 bits per byte, the lowest first."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def bytes_field(number: int, content: bytes) -> bytes:
    """Return a protobuf field that contains bytes: a string or a message."""
    return varint(number << 3 | BYTES) + varint(len(content)) + content


def as_float32(value: float) -> float:
    """Return a value that a float32 can hold: infinity beyond its range."""
    return value if abs(value) < 3.4028235e38 else math.copysign(math.inf, value)


@cache
def checksum_table() -> tuple[int, ...]:
    """Return the checksum CRC-32C of each byte."""

    def of_byte(crc: int) -> int:
        for _ in range(8):
            crc = crc >> 1 ^ (CASTAGNOLI if crc & 1 else 0)
        return crc

    return tuple(map(of_byte, range(256)))


def masked_checksum(data: bytes) -> int:
    """Return the checksum CRC-32C as record files store it: rotated by 15 bits, plus a constant."""
    table, crc = checksum_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def open_tracker(folder: Path, start_step: int) -> Tracker:
    """Open a new event file in the run folder's tensorboard/."""
    (folder / "tensorboard").mkdir(exist_ok=True)
    name = f"events.out.tfevents.{int(time.time())}.{platform.node()}.{os.getpid()}"
    return TensorBoard(folder / "tensorboard" / name, start_step)
