"""Checkpoints that are verified. Orbax writes and reads the arrays; a manifest says what they must be.

`<folder>/<step>/state` is Orbax's, a flat dict of the leaves by their paths; `<folder>/<step>/manifest.json` holds shape, dtype
and hash of every leaf as it was in memory, hashes of all files, library versions and what the caller adds. A save goes to
`<step>.tmp`, is read back and compared, and only then takes its name. What doesn't match its manifest later is renamed to
`<step>.bad`.
"""

import contextlib
import errno
import importlib.metadata
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import xxhash

from jaxft import tree

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
GROUP_BYTES = 256 << 20  # leaves are read back in groups of about this size


class _Bad(Exception):
    """A checkpoint that is not what its manifest says."""


def hash_array(array: np.ndarray) -> str:
    """xxh3-128 of the bytes in C order."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _hash_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _leaves(state: Any) -> dict[str, Any]:
    """Leaf by the name it has on disk: its path with dots, the separator that Orbax uses."""
    flat = tree.paths(state)
    named = {path.replace("/", "."): leaf for path, leaf in flat.items()}
    if len(named) != len(jax.tree.leaves(state)):
        raise ValueError("two leaves of the state have the same path; names in it must not contain '.' or '/'")
    for name, leaf in named.items():
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
            raise ValueError(f"{name} is a typed PRNG key, which has no bytes to save; keep jax.random.key_data of it")
    return named


def _groups(names: list[str], bytes_of: Callable[[str], int]) -> Iterator[list[str]]:
    group: list[str] = []
    for name in names:
        if group and sum(map(bytes_of, group)) + bytes_of(name) > GROUP_BYTES:
            yield group
            group = []
        group.append(name)
    if group:
        yield group


def _seal(body: dict[str, Any]) -> str:
    """The manifest's text, with a hash of itself."""
    text = json.dumps(body, sort_keys=True)
    return json.dumps({"xxh3": xxhash.xxh3_128_hexdigest(text.encode()), **body}, indent=1)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        body = json.loads((folder / "manifest.json").read_bytes())
        seal = body.pop("xxh3")
    except FileNotFoundError as error:
        raise _Bad("manifest.json is missing") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _Bad("manifest.json is damaged") from error
    if seal != xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode()):
        raise _Bad("manifest.json is damaged")
    return body


def _read_group(folder: Path, leaves: dict[str, Any]) -> dict[str, np.ndarray]:
    """Some leaves as host arrays, checked against their entries of the manifest."""
    stored = [name for name, entry in leaves.items() if math.prod(entry["shape"])]
    arrays = {name: np.zeros(leaves[name]["shape"], leaves[name]["dtype"]) for name in leaves if name not in stored}
    if stored:
        args = ocp.args.PyTreeRestore(
            item=dict.fromkeys(stored, 0),
            restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in stored},
            partial_restore=True,
        )
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                arrays.update(reader.restore(folder / "state", args=args))
        except (MemoryError, PermissionError):
            raise
        except Exception as error:
            raise _Bad(f"Orbax can't read it: {_first_line(error)}") from error
    for name, entry in leaves.items():
        array = arrays[name]
        found = {"shape": list(array.shape), "dtype": array.dtype.name, "xxh3": hash_array(array)}
        for key, value in found.items():
            if value != entry[key]:
                raise _Bad(f"leaf {name}: {key} is {value}, the manifest says {entry[key]}")
    return arrays


def _check_files(folder: Path, files: dict[str, Any]) -> None:
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            raise _Bad(f"{name} is missing")
        if path.stat().st_size != size:
            raise _Bad(f"{name} has {path.stat().st_size} bytes, the manifest says {size}")
        if _hash_file(path) != digest:
            raise _Bad(f"{name} is not what was written")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_durably(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    _fsync(path.parent)


class Checkpoints:
    """The checkpoints of a run. `say` gets a line about each thing that a person should know (print by default)."""

    def __init__(self, folder: Path, keep_last: int = 2, keep_best: int = 1, say: Callable[[str], None] = print):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last is at least 1 and keep_best at least 0, found {keep_last} and {keep_best}")
        self.folder, self.keep_last, self.keep_best, self.say = Path(folder).absolute(), keep_last, keep_best, say
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    # What is there

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        names = [p.name for p in self.folder.iterdir() if re.fullmatch(r"0|[1-9]\d*", p.name) and (p / "manifest.json").is_file()]
        return sorted(map(int, names))

    def latest(self) -> int | None:
        """The newest complete checkpoint's step; it is verified when it is restored."""
        return max(self.steps(), default=None)

    def best(self) -> tuple[int, float] | None:
        """(step, score) of the lowest score, None where no checkpoint has one."""
        return next(((-negative, score) for score, negative in self._scored()), None)

    def _ranked(self) -> list[int]:
        return [-negative for _, negative in self._scored()]

    def _scored(self) -> list[tuple[float, int]]:
        scored = []
        for step in self.steps():
            with contextlib.suppress(_Bad, OSError):
                score = _read_manifest(self.folder / str(step)).get("score")
                if score is not None and math.isfinite(score):
                    scored.append((score, -step))
        return sorted(scored)

    # Writing

    def save(self, step: int, state: Any, meta: dict[str, Any], score: float | None = None) -> None:
        """Begin to save; the state may be donated as soon as this returns.

        Raises OSError if this save can't begin or an earlier one failed; the checkpoints before it are then as they were.
        """
        self.wait()
        named = {name: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for name, leaf in _leaves(state).items()}
        entries = {}
        for name, leaf in named.items():  # leaf by leaf: no second copy of the state
            host = np.asarray(leaf)
            entries[name] = {"shape": list(host.shape), "dtype": host.dtype.name, "xxh3": hash_array(host)}
        body = {
            "step": step,
            "score": None if score is None else float(score),
            "leaves": entries,
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
            "meta": meta,
        }
        _seal(body)  # a meta that isn't JSON fails here, before anything is written
        temporary = self.folder / f"{step}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob("*.tmp"):  # of a process that was killed
                shutil.rmtree(stale)
            temporary.mkdir()
            self._orbax = self._orbax or ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
            arrays = {name: leaf for name, leaf in named.items() if leaf.size}  # zarr has no empty arrays
            self._orbax.save(temporary / "state", args=ocp.args.PyTreeSave(arrays))
        except Exception as error:
            raise self._failed(step, error) from error
        self._thread = threading.Thread(target=self._finish, args=(step, body), name=f"checkpoint-{step}")
        self._thread.start()

    def _finish(self, step: int, body: dict[str, Any]) -> None:
        temporary, final = self.folder / f"{step}.tmp", self.folder / str(step)
        try:
            assert self._orbax is not None
            self._orbax.wait_until_finished()
            files = sorted(p for p in (temporary / "state").rglob("*") if p.is_file())
            body["files"] = {p.relative_to(temporary).as_posix(): [p.stat().st_size, _hash_file(p)] for p in files}
            _write_durably(temporary / "manifest.json", _seal(body))
            for _ in self._read(temporary, _read_manifest(temporary)):
                pass
            if final.exists():
                final.rename(self.folder / f"{step}.replaced.tmp")
            temporary.rename(final)
            _fsync(self.folder)
        except Exception as error:
            self._error = self._failed(step, error)
            return
        self._prune()

    def _failed(self, step: int, error: Exception) -> OSError:
        shutil.rmtree(self.folder / f"{step}.tmp", ignore_errors=True)
        replaced = self.folder / f"{step}.replaced.tmp"
        if replaced.exists() and not (self.folder / str(step)).exists():
            with contextlib.suppress(OSError):
                replaced.rename(self.folder / str(step))
        text, number = _first_line(error), getattr(error, "errno", None) or errno.EIO
        if number == errno.ENOSPC or re.search(r"No space left|RESOURCE_EXHAUSTED|Disk quota", str(error)):
            number, text = errno.ENOSPC, "no space left on the disk"
        elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
            text = f"the folder can't be written ({os.strerror(number)})"
        kept = self.steps() if os.access(self.folder, os.R_OK | os.X_OK) else []
        intact = f"checkpoints of steps {', '.join(map(str, kept))} are intact" if kept else "there is no earlier checkpoint"
        return OSError(number, f"checkpoint of step {step} was not written: {text}; {intact}", str(self.folder))

    def _prune(self) -> None:
        steps = self.steps()
        keep = {*steps[-self.keep_last :], *self._ranked()[: self.keep_best]}
        gone = [self.folder / str(s) for s in steps if s not in keep]
        try:
            for folder in gone:  # first out of the way, so that a kill here leaves no half of a checkpoint
                folder.rename(folder.with_suffix(".tmp"))
            for folder in self.folder.glob("*.tmp"):
                shutil.rmtree(folder)
        except OSError as error:
            self.say(f"an old checkpoint could not be removed: {error}")

    def wait(self) -> None:
        """Until the save under way is complete and verified. Raises its OSError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Wait, then release Orbax's threads."""
        try:
            self.wait()
        finally:
            orbax, self._orbax = self._orbax, None
            if orbax is not None:
                with contextlib.suppress(Exception):  # of a save that failed, which wait() has told
                    orbax.close()

    # Reading

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any], int] | None:
        """(state, meta, step) of the newest checkpoint that is what its manifest says, or None where there is none.

        The leaves take the shardings of `abstract_state`, on any mesh. A bad checkpoint is renamed to `<step>.bad` and the next
        older one is taken. With `step` only that one is tried. Raises ValueError where the checkpoint is of another tree.
        """
        self.wait()
        steps = self.steps()
        if step is not None and step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise FileNotFoundError(f"{self.folder} has no checkpoint of step {step}; it has {known}")
        for candidate in [step] if step is not None else reversed(steps):
            folder = self.folder / str(candidate)
            try:
                manifest = _read_manifest(folder)
                _check_tree(abstract_state, manifest["leaves"], folder)
                _check_files(folder, manifest["files"])
                placed: dict[str, jax.Array] = {}
                wanted = _leaves(abstract_state)
                for arrays in self._read(folder, manifest):
                    placed.update({name: _place(array, wanted[name]) for name, array in arrays.items()})
            except _Bad as error:
                self._quarantine(folder, error)
                if step is not None:
                    raise ValueError(f"{folder}: {error}") from error
                continue
            except OSError as error:
                raise OSError(error.errno, f"the checkpoint can't be read: {error.strerror}", str(folder)) from error
            leaves = [placed[name] for name in wanted]
            return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), manifest["meta"], candidate
        return None

    def _read(self, folder: Path, manifest: dict[str, Any]) -> Iterator[dict[str, np.ndarray]]:
        entries = manifest["leaves"]
        for names in _groups(list(entries), lambda n: math.prod(entries[n]["shape"]) * np.dtype(entries[n]["dtype"]).itemsize):
            yield _read_group(folder, {name: entries[name] for name in names})

    def _quarantine(self, folder: Path, reason: _Bad) -> None:
        target, count = folder.with_suffix(".bad"), 1
        while target.exists():
            count += 1
            target = folder.with_suffix(f".bad{count}")
        older = [s for s in self.steps() if s < int(folder.name)]
        then = f"going back to step {older[-1]}" if older else "no older one is left"
        try:
            folder.rename(target)
            self.say(f"checkpoint of step {folder.name} is bad ({reason}); renamed to {target.name}, {then}")
        except OSError as error:
            self.say(f"checkpoint of step {folder.name} is bad ({reason}); it can't be renamed ({error.strerror}), {then}")


def _check_tree(abstract: Any, entries: dict[str, Any], folder: Path) -> None:
    wanted = {n: (list(leaf.shape), np.dtype(leaf.dtype).name) for n, leaf in _leaves(abstract).items()}
    found = {n: (e["shape"], e["dtype"]) for n, e in entries.items()}
    wrong = [n for n in {**wanted, **found} if wanted.get(n) != found.get(n)]
    if wrong:
        told = [f"{n}: found {_shown(found.get(n))}, wanted {_shown(wanted.get(n))}" for n in wrong[:3]]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{folder} is of other settings: {'; '.join(told)}{more}; go back to them or use another name")


def _shown(entry: tuple[list[int], str] | None) -> str:
    return "nothing" if entry is None else f"{entry[1]}{entry[0]}"


def _place(array: np.ndarray, like: Any) -> jax.Array:
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
