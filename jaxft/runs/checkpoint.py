"""Verified checkpoints. Orbax writes and reads the arrays; a manifest lists the expected shapes, dtypes and
hashes.

`<folder>/<step>/state` is Orbax's, a flat dict of the leaves by path. `<folder>/<step>/manifest.json` has the
shape and dtype of each leaf, hashes of its shards as they were in memory, hashes of all files, library
versions and the caller's metadata. A save goes to `<step>.tmp`, is read back and compared, and only then
renamed to `<step>`. A checkpoint that does not match its manifest later is renamed to `<step>.bad`.

Each of several processes writes, hashes and reads its own shards, in a folder that all of them see. They go
from one stage of a save to the next together, and an error of one process is raised on all. No process has
more of a leaf in memory than its own shards, or one slab: a slice of the leaf that is read for a check.

Publishing and pruning are not left to orbax's CheckpointManager, for two reasons. It publishes a step and
deletes older ones before the step has been read back, so a disk that corrupts writes can destroy the last
good checkpoint. And if a write fails on one process, the others wait at the manager's barriers until these
time out after 5 to 20 minutes.
"""

import asyncio
import concurrent.futures
import contextlib
import errno
import math
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxft.distributed import processes, sync
from jaxft.distributed.disk import fsync, make_folder, sync_tree, write_durably
from jaxft.distributed.exit import PeerLostError
from jaxft.runs import manifest
from jaxft.runs.folder_copies import LOCAL_ONLY, Copies
from jaxft.runs.manifest import Corrupt, first_line
from jaxft.runs.versions_and_devices import versions

CHUNK_BYTES = 64 << 20  # the unit of decoding, so that shards of another mesh are read without the whole leaf
IN_FLIGHT_BYTES = 256_000_000  # of leaves that are encoded and written at a time; each takes a copy of itself
TIMEOUT_S = 1200.0  # for processes that wait for one another while they save; Orbax has the same
EXCHANGE = ".exchange"  # a folder for messages between the processes of a save


class Checkpoints:
    """The checkpoints in a folder.

    keep_last, keep_best: how many of the newest and of the lowest-scored checkpoints to keep. report: called
    with a line about each event that matters to the user. copies: hooks that copy checkpoints to an object
    store (folder_copies.Copies), called on process 0.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int = 2,
        keep_best: int = 1,
        report: Callable[[str], None] = print,
        copies: Copies = LOCAL_ONLY,
    ):
        self.folder, self.report, self.copies = Path(folder).absolute(), report, copies
        self.keep_last, self.keep_best = keep_last, keep_best
        self._orbax: ocp.PyTreeCheckpointHandler | None = None
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None
        self._is_over = False  # whether checkpoints to be deleted are still being copied, see _prune

    # Listing

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints that have a manifest, ascending."""
        return [step for step in self._steps() if (self.folder / str(step) / manifest.NAME).is_file()]

    def _steps(self) -> list[int]:
        """Return the steps of all checkpoints, with or without a manifest, ascending."""
        if not self.folder.is_dir():
            return []
        is_step = re.compile(r"0|[1-9]\d*").fullmatch
        return sorted(int(p.name) for p in self.folder.iterdir() if is_step(p.name) and p.is_dir())

    def latest(self) -> int | None:
        """Return the newest of `steps`, None without any. `restore` verifies its files, this does not."""
        return max(self.steps(), default=None)

    def best(self, member: int = 0) -> tuple[int, float] | None:
        """Return the (step, score) of the checkpoint with the lowest score, None without scores.

        member: the number of a sweep's member, from 0; 0 for a run that is no sweep. Called by every process.
        """
        ranked = sync.exchange_first(sync.gather_texts, self._best_first)
        return tuple(ranked[member][0]) if member < len(ranked) and ranked[member] else None

    def _best_first(self) -> list[list[tuple[int, float]]]:
        """Return each member's (step, score) from the best on; of equal scores the newer comes first."""
        ranked: list[list[tuple[int, float]]] = []
        for step in self.steps():
            with contextlib.suppress(Corrupt, ValueError, OSError):
                scores = manifest.read_manifest(self.folder / str(step)).get("scores", [])
                ranked += [[] for _ in scores[len(ranked) :]]
                for member_scores, score in zip(ranked, scores, strict=False):
                    if score is not None and math.isfinite(score):
                        member_scores.append((step, score))
        return [sorted(member_scores, key=lambda item: (item[1], -item[0])) for member_scores in ranked]

    # Saving

    def save(self, step: int, state: Any, meta: dict[str, Any], scores: Sequence[float | None] = ()) -> None:
        """Begin to save; the state may be donated as soon as this returns. Called by every process.

        meta: JSON that `restore` returns. scores: by which keep_best ranks checkpoints, the lower the better:
        one for each member of a sweep, one for a run alone, None or () without an evaluation. Raises OSError
        if this save cannot begin or an earlier one failed; earlier checkpoints are then intact.
        """
        self.wait()
        leaves = {name: _for_orbax(leaf) for name, leaf in manifest.named_leaves(state).items()}
        body = {
            "layout": manifest.LAYOUT,
            "step": step,
            "scores": [None if score is None else float(score) for score in scores],
            "versions": versions()["packages"],
            "meta": meta,
        }
        manifest.format_manifest(body)  # metadata that isn't JSON fails here, before anything is written
        try:
            topic = sync.exchange_first(sync.gather_texts, lambda: self._begin(step))
            sync.run_on_all(sync.gather_texts, lambda: self._check_visible(step))
        except Exception as error:
            raise self._failed(step, error) from error
        entries: dict[str, Any] = {}
        try:
            entries = {name: manifest.leaf_entry(leaf, sync.is_first()) for name, leaf in leaves.items()}
            self._orbax = self._orbax or ocp.PyTreeCheckpointHandler(
                use_ocdbt=True, use_zarr3=False, save_concurrent_gb=in_flight_gb(leaves.values())
            )
            wait_written = self._start_writing(self.folder / f"{step}.tmp" / "state", leaves)
        except Exception as error:
            failed = concurrent.futures.Future[None]()
            failed.set_exception(error)
            wait_written = failed.result  # raises in the thread, where the other processes learn of it
        exchange = sync.FileExchange(self.folder / EXCHANGE, topic, TIMEOUT_S)
        work = partial(self._finish, body, entries, wait_written, exchange)
        self._thread = threading.Thread(target=work, name=f"checkpoint-{step}")
        self._thread.start()

    def _begin(self, step: int) -> str:
        """On process 0: delete unfinished saves of killed processes and create `<step>.tmp`. Return a unique
        name for this save, under which the processes exchange messages: the topic of its sync.FileExchange.
        """
        make_folder(self.folder)
        for stale in (*self.folder.glob("*.tmp"), *self.folder.glob(EXCHANGE)):  # of a killed process
            shutil.rmtree(stale)
        (self.folder / f"{step}.tmp" / "state").mkdir(parents=True)
        if jax.process_count() > 1:
            (self.folder / EXCHANGE).mkdir()
        return f"checkpoint-{step}-{secrets.token_hex(8)}"

    def _check_visible(self, step: int) -> None:
        if not (self.folder / f"{step}.tmp").is_dir():
            text = f"{self.folder} of process 0 is not visible here; use a folder that all processes share"
            raise OSError(errno.ENOENT, text)

    def _start_writing(self, folder: Path, leaves: dict[str, Any]) -> Callable[[], None]:
        """Pass the arrays to Orbax, which copies them. Return a function that waits until this process has
        written its shards.
        """
        arrays = {name: leaf for name, leaf in leaves.items() if leaf.size}  # zarr has no empty arrays
        chunks = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in arrays}
        args = ocp.args.PyTreeSave(arrays, save_args=chunks)
        orbax = self._orbax
        assert orbax is not None
        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # a notebook's thread has an event loop
            save = pool.submit(lambda: asyncio.run(orbax.async_save(epath.Path(folder), args=args)))
        futures = save.result()

        def wait() -> None:
            for future in futures or ():
                future.result()

        return wait

    def _finish(
        self,
        body: dict[str, Any],
        entries: dict[str, Any],
        wait_written: Callable[[], None],
        exchange: sync.FileExchange,
    ) -> None:
        """Run the stages of a save after `_begin`, each when all processes have finished the one before.

        body: the manifest without leaves and files. entries: this process's part of the manifest's leaves, by
        name. wait_written: the function from _start_writing. exchange: sends messages between the processes
        as files, since this method runs in a thread and must not use devices. An error is stored for `wait`.
        """
        step = body["step"]
        temporary = self.folder / f"{step}.tmp"
        try:
            sync.run_on_all(exchange, wait_written)
            files = sync.exchange_first(exchange, lambda: self._merge(temporary))
            mine = files[jax.process_index() :: jax.process_count()]
            parts = sync.run_on_all(exchange, lambda: [entries, manifest.file_hashes(temporary, mine)])
            body["leaves"] = manifest.join_entries([entries for entries, _ in parts])
            body["files"] = {name: known for _, hashes in parts for name, known in sorted(hashes.items())}
            text = manifest.format_manifest(body)
            sync.exchange_first(exchange, lambda: write_durably(temporary / manifest.NAME, text.encode()))
            sync.run_on_all(exchange, lambda: verify(temporary))
            sync.exchange_first(exchange, lambda: self._publish(step))
            if sync.is_first():
                self.copies.published(step)
        except Exception as error:
            self._error = self._agree_on_error(step, error, exchange)
        if sync.is_first():
            shutil.rmtree(self.folder / EXCHANGE, ignore_errors=True)

    def _merge(self, temporary: Path) -> list[str]:
        """On process 0: merge the files that all processes wrote, and sync them to disk, as Orbax syncs only
        a few. Return the paths of the merged files, relative to `temporary`.
        """
        assert self._orbax is not None
        self._orbax.finalize(epath.Path(temporary / "state"))
        sync_tree(temporary / "state")
        files = [p for p in (temporary / "state").rglob("*") if p.is_file()]
        return sorted(p.relative_to(temporary).as_posix() for p in files)

    def _publish(self, step: int) -> None:
        temporary, final = self.folder / f"{step}.tmp", self.folder / str(step)
        if final.exists():
            final.rename(self.folder / f"{step}.replaced.tmp")
        temporary.rename(final)
        fsync(self.folder)
        self._prune()

    def _prune(self) -> None:
        steps = self.steps()
        best = [step for member_scores in self._best_first() for step, _ in member_scores[: self.keep_best]]
        keep, sent = {*steps[-self.keep_last :], *best}, self.copies.sending()
        self._is_over = not sent <= keep
        keep |= sent
        try:
            for folder in [self.folder / str(step) for step in steps if step not in keep]:
                folder.rename(folder.with_suffix(".tmp"))  # a kill then leaves no incomplete checkpoint
            for folder in self.folder.glob("*.tmp"):
                shutil.rmtree(folder)
        except OSError as error:
            self.report(f"an old checkpoint could not be removed: {error}; the next save tries again")

    def _agree_on_error(self, step: int, error: Exception, exchange: sync.FileExchange) -> OSError:
        """Return the error of a failed save, the same on all processes: process 0's. If process 0 does not
        respond, return the error of this process.
        """
        try:
            if isinstance(error, TimeoutError):
                raise error
            number, text = sync.exchange_first(exchange, lambda: self._clean_up(step, error))
        except OSError:
            return self._failed(step, error)
        return OSError(number, text, str(self.folder))

    def _failed(self, step: int, error: Exception) -> OSError:
        """Remove the files of a failed save. Return its error: a PeerLostError if another process is gone."""
        kind = PeerLostError if processes.is_peer_lost(error, connected=True) else OSError
        return kind(*self._clean_up(step, error), str(self.folder))

    def _clean_up(self, step: int, error: Exception) -> tuple[int, str]:
        """Remove the files of a failed save. Return its errno and a message that lists intact checkpoints."""
        published = (self.folder / str(step)).exists() and not (self.folder / f"{step}.tmp").exists()
        if sync.is_first():
            shutil.rmtree(self.folder / f"{step}.tmp", ignore_errors=True)
            replaced = self.folder / f"{step}.replaced.tmp"
            if replaced.exists() and not (self.folder / str(step)).exists():
                with contextlib.suppress(OSError):
                    replaced.rename(self.folder / str(step))
        number = (error.errno if isinstance(error, OSError) else None) or errno.EIO
        text = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        if number == errno.ENOSPC or re.search(r"No space left|RESOURCE_EXHAUSTED|Disk quota", str(error)):
            number, text = errno.ENOSPC, "no space left on the disk"
        elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
            text = f"the folder cannot be written ({os.strerror(number)})"
        steps = self.steps() if os.access(self.folder, os.R_OK | os.X_OK) else []
        intact = f"checkpoints of steps {', '.join(map(str, steps))} are intact"
        rest = intact if steps else "there is no earlier checkpoint"
        state = "was written, and then" if published else "was not written"
        return number, f"checkpoint of step {step} {state}: {text}; {rest}"

    def wait(self) -> None:
        """Wait until the save under way is complete and verified. Raises its OSError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Wait, release Orbax's threads, and remove checkpoints that were retained only to be copied."""
        try:
            self.wait()
        finally:
            orbax, self._orbax = self._orbax, None
            if orbax is not None:
                with contextlib.suppress(Exception):  # of a failed save, which wait() has raised
                    orbax.close()
            if self._is_over:
                self.copies.settle()
                self._prune()

    # Restoring

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any], int] | None:
        """Return (state, meta, step) of the newest checkpoint that matches its manifest, None without one.

        The leaves get the shardings of `abstract_state`, on any mesh and any number of processes. A corrupt
        checkpoint is renamed to `<step>.bad`; then its copy in the object store, or the next older one, is
        tried. step: restore only this one; FileNotFoundError if it is missing, ValueError if it is corrupt.
        Raises ValueError if names, shapes or dtypes of leaves differ from `abstract_state`, and OSError if
        the disk cannot be read. Called by every process.
        """
        self.wait()
        steps = sync.exchange_first(sync.gather_texts, self._steps)
        if step is not None and step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise FileNotFoundError(f"{self.folder} has no checkpoint of step {step}; it has {known}")
        candidates, fetched = steps if step is None else [step], set[int]()
        while candidates:
            candidate = candidates.pop()
            folder = self.folder / str(candidate)
            restored: dict[str, Any] = {}
            try:
                read = partial(read_checkpoint, folder, abstract_state, restored)
                reasons = [reason for reason in sync.run_on_all(sync.gather_texts, read) if reason]
            except OSError as error:
                text = f"cannot read the checkpoint: {error.strerror}"
                text += "; check disk and permissions, start again"
                raise OSError(error.errno, text, str(folder)) from error
            if not reasons:
                return restored["state"], restored["meta"], candidate
            # The newest step that may be fetched in its place; the store's copy may be damaged too.
            limit = -1 if step is not None else candidate - (candidate in fetched)
            quarantine = partial(self._quarantine, folder, reasons[0], limit)
            instead = sync.exchange_first(sync.gather_texts, quarantine)
            if step is not None:
                raise ValueError(f"{folder}: {reasons[0]}; start again, or restore the folder from a copy")
            if instead is not None:
                fetched.add(instead)
                candidates.append(instead)
        return None

    def _quarantine(self, folder: Path, reason: str, limit: int) -> int | None:
        """Rename a corrupt checkpoint, on process 0. If the store has a newer checkpoint of at most step
        `limit` than the disk, fetch it and return its step; else return None.
        """
        try:
            moved = f"renamed to {manifest.set_aside(folder).name}"
        except OSError as error:
            moved = f"it cannot be renamed ({error.strerror})"
        fetched = self.copies.fetch(limit)
        older = [s for s in self._steps() if s < int(folder.name)]
        then = f"going back to step {older[-1]}" if older else "there is no older one"
        then = then if fetched is None else f"step {fetched} is fetched"
        self.report(f"checkpoint of step {folder.name} is corrupt ({reason}); {moved}, {then}")
        return fetched


def in_flight_gb(leaves: Iterable[Any]) -> float:
    """Return how many GB of leaves Orbax may encode and write at a time. Its default of 96 would copy most
    states in full. The limit is larger than the largest leaf, since Orbax refuses a leaf of that size.
    """
    return max(IN_FLIGHT_BYTES, 2 * max((leaf.nbytes for leaf in leaves), default=0) + 1) / 1e9


def _for_orbax(leaf: Any) -> jax.Array | np.ndarray:
    """Return a leaf as Orbax expects it. With several processes, a jax.Array that each of them has in full
    becomes a NumPy array, which process 0 writes.
    """
    is_global = isinstance(leaf, jax.Array) and (jax.process_count() == 1 or not leaf.is_fully_addressable)
    return leaf if is_global else np.asarray(leaf)


GROUP_BYTES = 256 << 20  # leaves are restored in groups of about this size on each process


def _my_part(work: list[Any]) -> list[Any]:
    return work[jax.process_index() :: jax.process_count()]


def verify(folder: Path) -> None:
    """Check the arrays of the checkpoint in `folder` against the hashes that its manifest has from the arrays
    in memory. Each process checks a part of the shards. Raises Corrupt.
    """
    entries = manifest.read_manifest(folder)["leaves"]
    shards = [(name, index) for name, entry in entries.items() for index in entry["shards"]]
    manifest.check_shards(folder, entries, _my_part(shards))


def read_checkpoint(folder: Path, abstract_state: Any, restored: dict[str, Any]) -> str | None:
    """Read a checkpoint into restored["state"] and restored["meta"]. If it does not match its manifest,
    leave `restored` as it is and return the reason as text; else return None.
    """
    try:
        body, expected = manifest.read_manifest(folder), manifest.named_leaves(abstract_state)
        manifest.check_tree(expected, body["leaves"], folder)
        manifest.check_files(folder, dict(_my_part(list(body["files"].items()))))
        arrays = _read_leaves(folder, expected, body["leaves"])
    except Corrupt as error:
        return str(error)
    leaves = [arrays[name] for name in expected]
    restored["state"] = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
    restored["meta"] = body["meta"]
    return None


def _read_leaves(folder: Path, expected: dict[str, Any], entries: dict[str, Any]) -> dict[str, jax.Array]:
    """Read this process's shards of all leaves. Raises Corrupt if a hash differs.

    expected: abstract arrays by name. entries: the manifest's leaves. A shard that was saved with the index
    with which it is loaded is hashed after loading. Other saved shards are read a second time for their
    hashes, each by one process.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = {name: leaf.sharding or here for name, leaf in expected.items()}
    arriving = {
        (name, manifest.format_index(index, leaf.shape))
        for name, leaf in expected.items()
        for index in shardings[name].devices_indices_map(leaf.shape).values()
    }
    shards = [(name, index) for name, entry in entries.items() for index in entry["shards"]]
    manifest.check_shards(folder, entries, _my_part([shard for shard in shards if shard not in arriving]))

    def local_bytes(name: str) -> int:
        leaf, sharding = expected[name], shardings[name]
        shard = math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        return shard * len(sharding.addressable_devices)

    arrays: dict[str, jax.Array] = {}
    for names in _groups(list(expected), local_bytes):
        group = _read_group(folder, {n: shardings[n] for n in names if math.prod(expected[n].shape)})
        for name, array in group.items():
            _check_arrived(name, array, entries[name])
        arrays.update(group)
    for name in expected.keys() - arrays.keys():  # empty ones; device_put would be a collective
        zeros = np.zeros(expected[name].shape, expected[name].dtype)
        arrays[name] = jax.make_array_from_callback(zeros.shape, shardings[name], zeros.__getitem__)
    return arrays


def _groups(names: list[str], bytes_of: Callable[[str], int]) -> Iterator[list[str]]:
    group: list[str] = []
    for name in names:
        if group and sum(map(bytes_of, group)) + bytes_of(name) > GROUP_BYTES:
            yield group
            group = []
        group.append(name)
    if group:
        yield group


def _read_group(folder: Path, shardings: dict[str, jax.sharding.Sharding]) -> dict[str, jax.Array]:
    if not shardings:
        return {}
    args = ocp.args.PyTreeRestore(
        item=dict.fromkeys(shardings, 0),
        restore_args={name: ocp.ArrayRestoreArgs(sharding=each) for name, each in shardings.items()},
        partial_restore=True,
    )
    reader = ocp.PyTreeCheckpointHandler()
    try:
        return reader.restore(epath.Path(folder / "state"), args=args)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        raise Corrupt(f"Orbax cannot read it: {first_line(error)}") from error
    finally:
        reader.close()


def _check_arrived(name: str, array: jax.Array, entry: dict[str, Any]) -> None:
    """Raise Corrupt if a shard on this process's devices does not match its hash in the manifest."""
    manifest.check_leaf(name, array.shape, np.dtype(array.dtype), entry)
    each = array.addressable_shards
    shards = {manifest.format_index(shard.index, array.shape): shard.data for shard in each}
    for index, data in shards.items():
        if index in entry["shards"]:
            manifest.check_hash(name, entry, index, manifest.hash_array(np.asarray(data)))
