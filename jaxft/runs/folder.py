"""A run's folder `runs/<name>/`: its lock, its record of settings, and the rules for resuming it."""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import jax

from jaxft.runs.record import differences
from jaxft.runs.trackers.jsonl import json_value
from jaxft.weights import hf, hub

# Settings that may change when a run is resumed; any other change would make it a different run.
MAY_CHANGE = (
    "weights_path",
    "loop",
    "data.epochs",
    "trackers",
    "samples",
    "sampling",
    "general",
    "mesh",
    "hosts",
)
NOT_COMPARED = ("command",)  # the overrides; their result is in the other fields

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
SAMPLE_BYTES = 1 << 16


# The folder and its files


def folder_of(root: Path, name: str) -> Path:
    """The folder of the run called `name`. Raises ValueError for a name that leads out of `root`."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise ValueError(f"name={name!r} is not the name of a folder in {root}; use letters, digits, - and _")
    return root / name


def lock(folder: Path) -> TextIO:
    """Lock the run folder until the returned file is closed. Raises OSError if another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        text = f"{folder}: another process is running this run; wait for it, or choose another name=..."
        raise OSError(text) from None
    return file


def write_durable_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: a reader sees the old file or the new one."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        file.write(json.dumps(json_value(value), indent=2, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read_saved_json(path: Path) -> Any:
    """Read a JSON file of the run folder. Raises ValueError that names a damaged one."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}); restore it, or choose another name=..."
        ) from error


def environment() -> dict[str, Any]:
    """Versions, devices and the git commit of this process."""
    root = Path(__file__).resolve().parents[2]
    commit = None
    with contextlib.suppress(OSError):  # git is not installed
        git = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        commit = git.stdout.strip() or None
    return {
        **_versions(),
        "devices": [d.device_kind for d in jax.devices()],
        "processes": jax.process_count(),
        "commit": commit,
    }


def _versions() -> dict[str, Any]:
    packages = {name: metadata.version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), "packages": packages}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write config.json and env.json."""
    write_durable_json(folder / "config.json", record)
    write_durable_json(folder / "env.json", environment())


# Resuming


def finished_steps(folder: Path) -> int:
    """The number of steps of a finished run, 0 for one that is not finished."""
    path = folder / "summary.json"
    return int(read_saved_json(path)["steps"]) if path.exists() else 0


def changes_since_start(folder: Path, record: dict[str, Any]) -> list[str]:
    """`permitted_changes` to the settings in the folder's config.json, if it has one."""
    path = folder / "config.json"
    return permitted_changes(folder, read_saved_json(path), record) if path.exists() else []


def permitted_changes(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The differences between a run's original settings and today's, one line each.

    Raises ValueError that lists those which would change what the run computes.
    """
    old, new = ({k: v for k, v in r.items() if k not in NOT_COMPARED} for r in (old, new))
    found = differences(old, json.loads(json.dumps(new)))
    permitted = re.compile(rf"({'|'.join(map(re.escape, MAY_CHANGE))})[.:]")
    refused = [line for line in found if not permitted.match(line)]
    if refused:
        raise ValueError(
            f"{folder}: cannot resume, these settings differ from the original run: {'; '.join(refused)}. "
            "Restore them, or choose another name=..."
        )
    return found


def process_independent(record: dict[str, Any]) -> dict[str, Any]:
    """The settings and library versions that every process of a run must agree on."""
    own = ("weights_path", "hosts", *NOT_COMPARED)
    return {**{name: value for name, value in record.items() if name not in own}, **_versions()}


# Weights


def trained_weights(folder: Path) -> tuple[str, Path | None, dict[str, Any]]:
    """(reference of the weights, adapter folder or None, settings) of a run that has written its weights.

    Raises FileNotFoundError for a folder that is no run's, or one without weights yet.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: not a run's folder, it has no config.json; runs are in runs/<name>"
        )
    record = read_saved_json(folder / "config.json")
    if (folder / "adapter" / "adapter_config.json").is_file():
        return _base_weights(folder, record), folder / "adapter", record
    if (folder / "model" / "config.json").is_file():
        return str(folder / "model"), None, record
    raise FileNotFoundError(
        f"{folder}: has neither adapter/ nor model/; finish the run with the command that started it"
    )


def _base_weights(folder: Path, record: dict[str, Any]) -> str:
    """Where a run's base weights are now. Raises ValueError if they are not those that it was trained on."""
    ref, path = record["weights"], record.get("weights_path")
    if path and not Path(ref).exists():
        ref = path
    fingerprint = weights_fingerprint(ref)
    if fingerprint != record.get("weights_fingerprint", fingerprint):
        raise ValueError(
            f"{folder}: the weights in {ref} have changed since this run was trained; "
            "restore them, or use --model"
        )
    return ref


def weights_fingerprint(ref: str) -> str:
    """Identify the weights behind `ref`: a hub model's commit, else a hash of samples of the files."""
    located = hub.locate(ref)
    if located.revision:
        return located.revision
    digest = hashlib.sha256()
    files = [located.path] if located.kind == "gguf" else hf.weight_files(located.path)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        starts = {0, max(0, size - SAMPLE_BYTES), *range(0, size, max(SAMPLE_BYTES, size // 64))}
        with path.open("rb") as file:
            for start in sorted(starts):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def adapter_fingerprint(folder: Path) -> str:
    """A hash of an adapter's files. Raises FileNotFoundError where one is missing."""
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; expected a PEFT adapter's folder, or a run's with one"
            )
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]
