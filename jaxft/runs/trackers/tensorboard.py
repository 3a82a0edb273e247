"""TensorBoard event files.

tensorboardX's SummaryWriter writes in a thread that dies on a full disk, and the run then waits for it
forever. Its messages are therefore written here, without that thread.
"""

import math
import os
import platform
import struct
import time
from pathlib import Path
from typing import Any

from jaxft.runs.trackers.tracker import RunEnd, Tracker, with_perf


class TensorBoard:
    """Appends scalars to an event file."""

    def __init__(self, path: Path, start_step: int):
        # Imported here, because tensorboardX imports torch where that is installed, which takes seconds.
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import masked_crc32c
        from tensorboardX.summary import scalar

        self._event, self._scalar, self._crc32c = Event, scalar, masked_crc32c
        self._file = path.open("ab")
        self._write(file_version="brain.Event:2")
        # A session that starts at a step hides the entries of an earlier process for later steps.
        start = SessionLog(status=SessionLog.START)
        self._write(step=start_step + 1 if start_step else 0, session_log=start)

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """Write the finite metrics, and flush: a killed run loses nothing."""
        for tag, value in with_perf(metrics, perf).items():
            if math.isfinite(value):
                self._write(step=step, summary=self._scalar(tag, value))
        self._file.flush()

    def close(self, end: RunEnd) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, **fields: Any) -> None:
        data = self._event(wall_time=time.time(), **fields).SerializeToString()
        size = struct.pack("<Q", len(data))
        checks = [struct.pack("<I", self._crc32c(part)) for part in (size, data)]
        self._file.write(size + checks[0] + data + checks[1])


def open_tracker(folder: Path, start_step: int) -> Tracker:
    """Open a new event file in the run folder's tensorboard/."""
    (folder / "tensorboard").mkdir(exist_ok=True)
    name = f"events.out.tfevents.{int(time.time())}.{platform.node()}.{os.getpid()}"
    return TensorBoard(folder / "tensorboard" / name, start_step)
