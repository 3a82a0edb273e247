"""Checkpoints that are verified. Orbax writes and reads the arrays; a manifest says what they must be.

`<folder>/<step>/state` is Orbax's, a flat dict of the leaves by their paths; `<folder>/<step>/manifest.json` holds shape, dtype
and the hashes of every leaf's shards as they were in memory, hashes of all files, library versions and what the caller adds. A
save goes to `<step>.tmp`, is read back and compared, and only then takes its name. What doesn't match its manifest later is
renamed to `<step>.bad`.

Of several processes each writes, hashes and reads its own shards, in a folder that all of them see. They go from one stage of a
save to the next together, and an error of one is the error of all.
"""

import asyncio
import concurrent.futures
import contextlib
import errno
import importlib.metadata
import math
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxft.distributed import sync
from jaxft.runs import manifest, restore
from jaxft.runs.manifest import Bad, first_line

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
CHUNK_BYTES = (
    64 << 20
)  # what a file has to be decoded in, so that another mesh's shards can be read without a whole leaf
LIMIT_S = 1200.0  # that processes wait for one another while they save, as Orbax does


def _saved_as(leaf: Any) -> jax.Array | np.ndarray:
    """What is given to Orbax: an array that each process has for itself is the same on all, and process 0 writes it."""
    is_global = isinstance(leaf, jax.Array) and (jax.process_count() == 1 or not leaf.is_fully_addressable)
    return leaf if is_global else np.asarray(leaf)


def _awaited(make: Callable[[], Any]) -> Any:
    """The result of a coroutine, from a thread of its own: this one may have a running loop, as in a notebook."""
    with concurrent.futures.ThreadPoolExecutor(1) as one:
        return one.submit(lambda: asyncio.run(make())).result()


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

    def __init__(
        self, folder: Path, keep_last: int = 2, keep_best: int = 1, say: Callable[[str], None] = print
    ):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(
                f"keep_last is at least 1 and keep_best at least 0, found {keep_last} and {keep_best}"
            )
        self.folder, self.keep_last, self.keep_best, self.say = (
            Path(folder).absolute(),
            keep_last,
            keep_best,
            say,
        )
        self._orbax: ocp.PyTreeCheckpointHandler | None = None
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    # What is there

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        names = [
            p.name
            for p in self.folder.iterdir()
            if re.fullmatch(r"0|[1-9]\d*", p.name) and (p / "manifest.json").is_file()
        ]
        return sorted(map(int, names))

    def latest(self) -> int | None:
        """The newest complete checkpoint's step; it is verified when it is restored."""
        return max(self.steps(), default=None)

    def best(self) -> tuple[int, float] | None:
        """(step, score) of the lowest score, None where no checkpoint has one. Every process calls it, and gets the same."""
        found = sync.by_first(sync.gathered, lambda: next(iter(self._scored()), None))
        return None if found is None else (-found[1], found[0])

    def _ranked(self) -> list[int]:
        return [-negative for _, negative in self._scored()]

    def _scored(self) -> list[tuple[float, int]]:
        scored = []
        for step in self.steps():
            with contextlib.suppress(Bad, ValueError, OSError):
                score = manifest.read(self.folder / str(step)).get("score")
                if score is not None and math.isfinite(score):
                    scored.append((score, -step))
        return sorted(scored)

    # Writing

    def save(self, step: int, state: Any, meta: dict[str, Any], score: float | None = None) -> None:
        """Begin to save; the state may be donated as soon as this returns. Every process calls it.

        Raises OSError if this save can't begin or an earlier one failed; the checkpoints before it are then as they were.
        """
        self.wait()
        named = {name: _saved_as(leaf) for name, leaf in manifest.leaves(state).items()}
        body = {
            "layout": manifest.LAYOUT,
            "step": step,
            "score": None if score is None else float(score),
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
            "meta": meta,
        }
        manifest.sealed(body)  # a meta that isn't JSON fails here, before anything is written
        try:
            topic = sync.by_first(sync.gathered, lambda: self._begin(step))
            sync.settle(sync.gathered, lambda: self._see(step))
        except Exception as error:
            raise OSError(*self._undone(step, error), str(self.folder)) from error
        entries, written = {}, lambda: None
        try:
            entries = {name: manifest.entry(leaf, sync.is_first()) for name, leaf in named.items()}
            self._orbax = self._orbax or ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False)
            written = self._written(self.folder / f"{step}.tmp" / "state", named)
        except Exception as error:
            written = _raiser(error)  # where the others hear of it
        told = sync.Files(self.folder / ".told", topic, LIMIT_S)
        self._thread = threading.Thread(
            target=self._finish, args=(body, entries, written, told), name=f"checkpoint-{step}"
        )
        self._thread.start()

    def _begin(self, step: int) -> str:
        """The folders of a save, for process 0 to make. Returns a name that no save had before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in (*self.folder.glob("*.tmp"), *self.folder.glob(".told")):  # of a process that was killed
            shutil.rmtree(stale)
        (self.folder / f"{step}.tmp" / "state").mkdir(parents=True)
        if jax.process_count() > 1:
            (self.folder / ".told").mkdir()
        return f"checkpoint-{step}-{secrets.token_hex(8)}"

    def _see(self, step: int) -> None:
        if not (self.folder / f"{step}.tmp").is_dir():
            text = f"what process 0 made in {self.folder} is not seen; put the run where all processes see the same folder"
            raise OSError(errno.ENOENT, text)

    def _written(self, folder: Path, named: dict[str, Any]) -> Callable[[], None]:
        """Hand the arrays to Orbax, which copies them; returns what waits until this process's are written."""
        arrays = {name: leaf for name, leaf in named.items() if leaf.size}  # zarr has no empty arrays
        how = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in arrays}
        orbax = self._orbax
        assert orbax is not None
        futures = _awaited(
            lambda: orbax.async_save(epath.Path(folder), args=ocp.args.PyTreeSave(arrays, save_args=how))
        )

        def wait() -> None:
            for future in futures or ():
                future.result()

        return wait

    def _finish(
        self, body: dict[str, Any], entries: dict[str, Any], written: Callable[[], None], told: sync.Files
    ) -> None:
        """The stages of a save after its begin, each of them entered when all processes are through the one before.

        A thread's work, so no device takes part.
        """
        step = body["step"]
        temporary = self.folder / f"{step}.tmp"
        try:
            sync.settle(told, written)
            files = sync.by_first(told, lambda: self._merged(temporary))
            mine = files[jax.process_index() :: jax.process_count()]
            said = sync.settle(told, lambda: [entries, manifest.hashes(temporary, mine)])
            body["leaves"] = manifest.joined([part for part, _ in said])
            body["files"] = {name: found for _, part in said for name, found in sorted(part.items())}
            sync.by_first(told, lambda: _write_durably(temporary / "manifest.json", manifest.sealed(body)))
            sync.settle(told, lambda: restore.compare(temporary))
            sync.by_first(told, lambda: self._publish(step))
        except Exception as error:
            self._error = self._heard(step, error, told)
        if sync.is_first():
            shutil.rmtree(self.folder / ".told", ignore_errors=True)

    def _merged(self, temporary: Path) -> list[str]:
        """Make one of what the processes wrote; returns the files that it is in."""
        assert self._orbax is not None
        self._orbax.finalize(epath.Path(temporary / "state"))
        return sorted(
            p.relative_to(temporary).as_posix() for p in (temporary / "state").rglob("*") if p.is_file()
        )

    def _publish(self, step: int) -> None:
        temporary, final = self.folder / f"{step}.tmp", self.folder / str(step)
        if final.exists():
            final.rename(self.folder / f"{step}.replaced.tmp")
        temporary.rename(final)
        _fsync(self.folder)
        self._prune()

    def _heard(self, step: int, error: Exception, told: sync.Files) -> OSError:
        """The error of a save as process 0 puts it; where it can't be asked, as this process does."""
        try:
            if isinstance(error, TimeoutError):
                raise error
            number, text = sync.by_first(told, lambda: self._undone(step, error))
        except OSError:
            number, text = self._undone(step, error)
        return OSError(number, text, str(self.folder))

    def _undone(self, step: int, error: Exception) -> tuple[int, str]:
        """Remove what a failed save left. Returns the errno and the line that says what is still there."""
        if sync.is_first():
            shutil.rmtree(self.folder / f"{step}.tmp", ignore_errors=True)
            replaced = self.folder / f"{step}.replaced.tmp"
            if replaced.exists() and not (self.folder / str(step)).exists():
                with contextlib.suppress(OSError):
                    replaced.rename(self.folder / str(step))
        number = getattr(error, "errno", None) or errno.EIO
        text = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        if number == errno.ENOSPC or re.search(r"No space left|RESOURCE_EXHAUSTED|Disk quota", str(error)):
            number, text = errno.ENOSPC, "no space left on the disk"
        elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
            text = f"the folder can't be written ({os.strerror(number)})"
        kept = self.steps() if os.access(self.folder, os.R_OK | os.X_OK) else []
        intact = (
            f"checkpoints of steps {', '.join(map(str, kept))} are intact"
            if kept
            else "there is no earlier checkpoint"
        )
        return number, f"checkpoint of step {step} was not written: {text}; {intact}"

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

        The leaves take the shardings of `abstract_state`, on any mesh and any number of processes, all of which call this. A bad
        checkpoint is renamed to `<step>.bad` and the next older one is taken. With `step` only that one is tried. Raises
        ValueError where the checkpoint is of another tree.
        """
        self.wait()
        steps = sync.by_first(sync.gathered, self.steps)
        if step is not None and step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise FileNotFoundError(f"{self.folder} has no checkpoint of step {step}; it has {known}")
        for candidate in [step] if step is not None else reversed(steps):
            folder = self.folder / str(candidate)
            found: dict[str, Any] = {}
            try:
                take = partial(restore.take, folder, abstract_state, found)
                bad = [b for b in sync.settle(sync.gathered, take) if b]
            except OSError as error:
                raise OSError(
                    error.errno, f"the checkpoint can't be read: {error.strerror}", str(folder)
                ) from error
            if not bad:
                return found["state"], found["meta"], candidate
            sync.by_first(sync.gathered, lambda: self._quarantine(folder, bad[0]))  # noqa: B023
            if step is not None:
                raise ValueError(f"{folder}: {bad[0]}")
        return None

    def _quarantine(self, folder: Path, reason: str) -> None:
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
            self.say(
                f"checkpoint of step {folder.name} is bad ({reason}); it can't be renamed ({error.strerror}), {then}"
            )


def _raiser(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act
