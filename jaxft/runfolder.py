"""A run's folder: a lock, the record of its settings, and the rules for going on with it."""

import fcntl
import json
import os
import platform
import signal
import subprocess
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jaxft.describe import differences

# What may change between a run and its continuation; anything else would make another run of it.
MAY_CHANGE = ("loop.", "trackers", "samples", "sampling", "general", "mesh.")


class Interrupt:
    """Turns the first SIGTERM or SIGINT into `signal`, to be looked at between steps; a second one acts at once."""

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
        self._restore()

    def _restore(self) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    def __exit__(self, *_: Any) -> None:
        self._restore()


def lock(folder: Path) -> Any:
    """Hold the run folder until the returned file is closed. Raises OSError if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    held = (folder / "lock").open("w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        raise OSError(f"{folder}: another process is running this run; wait for it, or choose another run.name") from None
    return held


def write_json(path: Path, value: Any) -> None:
    """Write atomically: a reader sees the old file or the new one."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as f:
        f.write(json.dumps(value, indent=2) + "\n")
        f.flush()
        os.fsync(f.fileno())
    part.replace(path)


def environment() -> dict[str, Any]:
    """Versions, devices and the git commit that a run was made with."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    root = Path(__file__).resolve().parents[1]
    git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in names},
        "devices": [d.device_kind for d in jax.devices()],
        "processes": jax.process_count(),
        "commit": git.stdout.strip() or None,
    }


def read_json(path: Path) -> Any:
    """A JSON file of the run folder. Raises ValueError that names it if it is damaged."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: not valid JSON ({e}); restore it, or choose another run.name") from e


def check(folder: Path, record: dict[str, Any], resuming: bool) -> list[str]:
    """Harmless differences between the settings that a resumed run was started with and today's, one line each.

    Raises ValueError listing the differences that would change what the run computes.
    """
    path = folder / "config.json"
    if not resuming or not path.exists():
        return []
    found = differences(read_json(path), json.loads(json.dumps(record)))
    refused = [line for line in found if not line.startswith(MAY_CHANGE)]
    if refused:
        listed = "; ".join(refused)
        raise ValueError(f"{folder}: the run was started with other settings ({listed}); undo that, or choose another run.name")
    return found


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
        return record["weights"], folder / "adapter", record
    if (folder / "model" / "config.json").is_file():
        return str(folder / "model"), None, record
    raise FileNotFoundError(f"{folder}: neither adapter/ nor model/ is there; finish the run with the command that started it")


def open_record(folder: Path, record: dict[str, Any]) -> None:
    """Write config.json and env.json."""
    write_json(folder / "config.json", record)
    write_json(folder / "env.json", environment())
