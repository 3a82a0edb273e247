"""A run's folder: a lock, the record of its settings, and the rules for going on with it."""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jaxft.runs.log import finite
from jaxft.runs.record import differences
from jaxft.weights import hf, hub

# What may change between a run and its continuation; anything else would make another run of it.
MAY_CHANGE = (
    "weights_at",
    "loop",
    "data.epochs",
    "trackers",
    "samples",
    "sampling",
    "general",
    "mesh",
    "hosts",
)

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
SAMPLE = 1 << 16  # bytes


class Interrupt:
    """Turns the first SIGTERM or SIGINT into `signal`, to be looked at between steps; a second one kills at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._seen)
        return self

    def _seen(self, number: int, frame: Any) -> None:
        self.signal = number
        for (
            each
        ) in self._old:  # the system's own way, which also ends a process that is inside a long computation
            signal.signal(each, signal.SIG_DFL)
        if sys.stdout.isatty():
            os.write(
                1, b"\x1b[?25h"
            )  # the live view hides the cursor, and a second signal leaves no time to show it
        os.write(
            2,
            f"\n{signal_name(number)}: finishing this step and saving; a second signal stops at once\n".encode(),
        )

    def __exit__(self, *_: Any) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)


def signal_name(number: int) -> str:
    """SIGTERM for 15."""
    return signal.Signals(number).name


def place(root: Path, name: str) -> Path:
    """The folder of a run of this name. Raises ValueError for a name that leads out of `root`."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise ValueError(f"name={name!r} is no name of a folder below {root}; use letters, digits, - and _")
    return root / name


def lock(folder: Path) -> Any:
    """Hold the run folder until the returned file is closed. Raises OSError if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    held = (folder / "lock").open("a")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        raise OSError(
            f"{folder}: another process is running this run; wait for it, or choose another name=..."
        ) from None
    return held


def write_json(path: Path, value: Any) -> None:
    """Write atomically: a reader sees the old file or the new one."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as f:
        f.write(json.dumps(finite(value), indent=2, allow_nan=False) + "\n")
        f.flush()
        os.fsync(f.fileno())
    part.replace(path)


def environment() -> dict[str, Any]:
    """Versions, devices and the git commit that a run was made with."""
    root = Path(__file__).resolve().parents[2]
    commit = None
    with contextlib.suppress(OSError):  # no git here
        git = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        commit = git.stdout.strip() or None
    return {
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in LIBRARIES},
        "devices": [d.device_kind for d in jax.devices()],
        "processes": jax.process_count(),
        "commit": commit,
    }


def read_json(path: Path) -> Any:
    """A JSON file of the run folder. Raises ValueError that names it if it is damaged."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: not valid JSON ({e}); restore it, or choose another name=...") from e


def check(folder: Path, record: dict[str, Any]) -> list[str]:
    """`compare` with the settings in the folder's config.json, if it is there."""
    path = folder / "config.json"
    return compare(folder, read_json(path), record) if path.exists() else []


def compare(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Harmless differences between the settings that a run was started with and today's, one line each.

    Raises ValueError listing the differences that would change what the run computes.
    """
    found = differences(old, json.loads(json.dumps(new)))
    refused = [line for line in found if not re.match(rf"({'|'.join(map(re.escape, MAY_CHANGE))})[.:]", line)]
    if refused:
        listed = "; ".join(refused)
        raise ValueError(
            f"{folder}: the run was started with other settings ({listed}); undo that, or choose another name=..."
        )
    return found


def standing(folder: Path, record: dict[str, Any], begun: bool) -> tuple[int, list[str]]:
    """(steps of a finished run or 0, harmless differences to the settings it was started with). Raises ValueError for others."""
    done = finished(folder)
    return done, check(folder, record) if done or begun else []


def shared_part(record: dict[str, Any]) -> dict[str, Any]:
    """What must be the same on every process of a run: the record but for places, and the libraries' versions."""
    own = {name: value for name, value in record.items() if name not in ("weights_at", "hosts")}
    return {
        **own,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in LIBRARIES},
    }


def finished(folder: Path) -> int:
    """The steps of a finished run, 0 if it isn't finished."""
    path = folder / "summary.json"
    return int(read_json(path)["steps"]) if path.exists() else 0


def results(folder: Path) -> tuple[str, Path | None, dict[str, Any]]:
    """(the weights' reference, adapter folder or None, the settings) of a run that has written its weights.

    Raises FileNotFoundError for a folder that is no run, or one without weights yet.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: no config.json, so this is no run's folder; runs lie in runs/<name> where they started"
        )
    record = read_json(folder / "config.json")
    if (folder / "adapter" / "adapter_config.json").is_file():
        return _same_weights(folder, record), folder / "adapter", record
    if (folder / "model" / "config.json").is_file():
        return str(folder / "model"), None, record
    raise FileNotFoundError(
        f"{folder}: neither adapter/ nor model/ is there; finish the run with the command that started it"
    )


def _same_weights(folder: Path, record: dict[str, Any]) -> str:
    """Where the base of a run is now. Raises ValueError if other weights lie there than the run was trained on."""
    ref, at = record["weights"], record.get("weights_at")
    if at and not Path(ref).exists():
        ref = at
    if weights_identity(ref) != record.get("weights_identity", weights_identity(ref)):
        raise ValueError(
            f"{folder}: {ref} holds other weights than this run was trained on; put those back, or use --model"
        )
    return ref


def weights_identity(ref: str) -> str:
    """What distinguishes the weights behind `ref` from others: a hub model's commit, else a hash of samples of the files."""
    located = hub.locate(ref)
    if located.revision:
        return located.revision
    digest = hashlib.sha256()
    files = [located.path] if located.kind == "gguf" else hf.weight_files(located.path)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as f:
            for at in sorted({0, max(0, size - SAMPLE), *range(0, size, max(SAMPLE, size // 64))}):
                f.seek(at)
                digest.update(f.read(SAMPLE))
    return digest.hexdigest()[:32]


def adapter_identity(folder: Path) -> str:
    """A hash of an adapter's files."""
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; wanted a PEFT adapter's folder, or that of a run that wrote one"
            )
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def open_record(folder: Path, record: dict[str, Any]) -> None:
    """Write config.json and env.json."""
    write_json(folder / "config.json", record)
    write_json(folder / "env.json", environment())
