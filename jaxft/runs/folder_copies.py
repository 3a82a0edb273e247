"""Copies of runs in object stores. A run's folder is copied there at every checkpoint and at the end, and
fetched where the run is resumed or a command names it.

A run writes its folder on disk, because an object store has neither renames nor locks nor files that grow.
Verified checkpoints are copied in the background, each with the other files of the folder that have changed.
A checkpoint is skipped if a newer one exists by then. `index.json` has the sizes and hashes of the files,
and the process that sends them: the last one whose settings were accepted. A checkpoint's manifest is sent
last: a checkpoint without one is incomplete, and one with a manifest has its logs. A process that starts the
run fetches the folder first if the store has a newer checkpoint than the disk, and a checkpoint if the one on
disk is damaged. If its settings differ from the run in the store, it ends and leaves the store as it is.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from jaxft.distributed.disk import make_folder, publish, write_durably
from jaxft.distributed.exit import RestartError
from jaxft.runs import manifest
from jaxft.runs.object_store import Store, StoreError, check_store_url, open_store
from jaxft.runs.run_record import (
    CHECKPOINTS,
    NO_DEFAULTS,
    RESULTS,
    SUMMARY,
    permitted_changes,
    read_saved_json,
    setting_changes,
)
from jaxft.weights.hf.complete_folders import cache_folder

INDEX = "index.json"
LOCAL_FILES = ("lock", INDEX)  # of this machine alone
TEMPORARY = (".part", ".tmp")
Records = Mapping[str, dict[str, Any]]  # settings of a run, or of a sweep's members, by path in the folder


def _nowhere(*step: int) -> None:
    """Copy and fetch nothing."""


class Copies(NamedTuple):
    """The functions that a run calls so that its folder is copied to a store. Without a store they do
    nothing, and `sending` returns an empty set.

    accepted(): call it once the run's settings and lock are accepted. published(step): copy the new
    checkpoint of this step in the background. sending(): the steps of the checkpoints that are being copied
    and must stay on disk. settle(): wait for the copy under way; later checkpoints are copied at the end of
    the run. stopped(): call it when a signal has ended the run; a store that fails at the end is then only a
    warning. fetch(limit): see Mirror.fetch_step.
    """

    accepted: Callable[[], None] = _nowhere
    published: Callable[[int], None] = _nowhere
    sending: Callable[[], Set[int]] = frozenset
    settle: Callable[[], None] = _nowhere
    stopped: Callable[[], None] = _nowhere
    fetch: Callable[[int], int | None] = _nowhere


LOCAL_ONLY = Copies()


class Damaged(Exception):
    """A file of weights in a store, such as one in adapter/, does not match its hash in index.json."""


class Mirror:
    """The copy of a run's folder in a store. report: called with a line for the user about each event, such
    as a damaged file. defaults: {dotted name: default} of the settings; they stand for settings that the
    record of an older run in the store lacks.
    """

    def __init__(
        self,
        folder: Path,
        store: Store,
        report: Callable[[str], None] = print,
        defaults: Mapping[str, Any] = NO_DEFAULTS,
    ):
        self.folder, self.store, self.report, self._defaults = folder, store, report, defaults
        self.owner = {
            "id": secrets.token_hex(8),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.is_accepted = False  # whether this start sends the run
        self.is_stopped = False  # whether a signal has ended the run
        self.sending: frozenset[int] = frozenset()  # steps of checkpoints that are being copied
        self._copying = ThreadPoolExecutor(1, thread_name_prefix="copy")
        self._newest: float = -1  # the checkpoint to copy; infinite when no more are to be copied
        self._fails_since = ""
        self._sent: dict[str, list[Any]] = {}  # size and hash of the store's files
        self._damaged: set[str] = set()  # files in the store that do not match their entry
        self._read: dict[str, int] = {}  # modification times of files that the store has

    # From the store

    def open(self, records: Records) -> None:
        """Fetch the run if the store has a later checkpoint than the folder, or results that the folder
        lacks. Nothing is written to the store.

        records: this process's settings as JSON, by file: {"config.json": ...}. Raises ValueError,
        before anything is fetched, if the store has a checkpoint or results of a run with other settings, or
        of another run than the folder; OSError if the store fails.
        """
        self._sent = self._read_index()["files"]
        stored, local = _complete_steps(self.store.names(f"{CHECKPOINTS}/")), self._local_steps()
        ahead = max(stored, default=-1), SUMMARY in self._sent
        if stored or SUMMARY in self._sent:  # without them there is nothing to resume, as in a folder
            self._check_settings(records)
        if ahead > (max(local, default=-1), (self.folder / SUMMARY).is_file()):
            self._check_folder(records)
            self.report(f"fetching step {max(stored, default='')} of this run from {self.store.url}")
            for name in self._sent:
                try:
                    self._fetch_file(name)
                except Damaged as error:
                    self.report(f"warning: {error}; it is written again from the last checkpoint")
            for step in sorted(set(stored) - set(local)):  # the newest last: a killed start fetches again
                self._fetch_checkpoint(step)

    def fetch_step(self, limit: int) -> int | None:
        """Fetch the store's newest intact checkpoint of at most step `limit`, if it is newer than the disk's.
        Return its step, None if nothing was fetched. Raises OSError if the store fails.
        """
        local = max((step for step in self._local_steps() if step <= limit), default=-1)
        stored = _complete_steps(self.store.names(f"{CHECKPOINTS}/")) if local < limit else []
        for step in sorted((step for step in stored if local < step <= limit), reverse=True):
            self.report(f"fetching step {step} of this run from {self.store.url}")
            if self._fetch_checkpoint(step):
                return step
        return None

    def accept(self) -> None:
        """Take over the copying of this run: an earlier process that copied it then stops.

        Call it when the settings are accepted: a start that is refused must not stop the copies of a live
        run. Raises OSError if the store fails.
        """
        files = self._read_index()["files"]  # another start may have sent more since `open`
        self._sent = {name: entry for name, entry in files.items() if name not in self._damaged}
        self._write_index()
        self.is_accepted = True

    def _read_index(self) -> dict[str, dict[str, Any]]:
        """Return {"owner", "files"} of index.json, each {} where it is missing."""
        try:
            index = json.loads(self.store.read(INDEX) or b"{}")
        except ValueError as error:
            raise ValueError(
                f"{self.store.url}/{INDEX}: not JSON; delete it, and all files are copied again"
            ) from error
        parts = index if isinstance(index, dict) else {}
        return {key: part if isinstance(part := parts.get(key), dict) else {} for key in ("owner", "files")}

    def _local_steps(self) -> list[int]:
        manifests = (self.folder / CHECKPOINTS).glob(f"*/{manifest.NAME}")
        return [int(path.parent.name) for path in manifests if path.parent.name.isdecimal()]

    def _check_settings(self, records: Records) -> None:
        """Raise ValueError if the run in the store has other settings. records: as in `open`."""
        for place, old, record in self._compared(records):
            try:
                permitted_changes(place, old, record, self._defaults)
            except ValueError as error:
                raise ValueError(f"{error} or loop.store=...") from error

    def _compared(self, records: Records) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """Yield (URL, the store's settings, `records`' settings) of each file that the store has."""
        for name, record in records.items():
            place, content = f"{self.store.url}/{name}", self.store.read(name)
            if content is None:
                continue
            try:
                stored = json.loads(content)
            except ValueError as error:
                raise ValueError(f"{place}: not JSON; choose another name=... or loop.store=...") from error
            old = stored if isinstance(stored, dict) else {}
            if "members" in {**old, **record}:  # a sweep's, which may change at_once
                old, record = ({"members": side.get("members")} for side in (old, record))
            yield place, old, record

    def _check_folder(self, records: Records) -> None:
        """Raise ValueError if the folder has another run than the store. records: as in `open`."""
        paths = {name: self.folder / name for name in records}
        local = {name: read_saved_json(path) for name, path in paths.items() if path.is_file()}
        for place, old, record in self._compared(local):
            if refused := setting_changes(old, record, self._defaults)[1]:
                raise ValueError(
                    f"{self.folder} and {self.store.url} have different runs: from {place} to the folder, "
                    f"{'; '.join(refused)}. Move the folder away to continue the stored run, or choose "
                    "another name=... or loop.store=..."
                )

    def fetch_results(self) -> list[str]:
        """Write the files of the store, without checkpoints, into the folder; return their names, [] if the
        store has no run. Files that the folder has already are not fetched. Raises OSError if the store
        fails, and ValueError for damaged weights.
        """
        self._sent = self._read_index()["files"]
        paths = {name: self._path_of(name) for name in self._sent}
        absent = [
            name
            for name, path in paths.items()
            if not (path.is_file() and _entry_of(path.read_bytes()) == self._sent[name])
        ]
        if absent:
            self.report(f"fetching {len(absent)} files of {self.store.url} to {self.folder}")
        for name in absent:
            try:
                self._fetch_file(name)
            except Damaged as error:
                raise ValueError(
                    f"{error}. On the machine with the run's folder, delete {INDEX} in the store and start "
                    "the run's command again, which copies the file; without that folder, the command alone "
                    "writes the file again from the last checkpoint"
                ) from error
        return list(self._sent)

    def _fetch_file(self, name: str) -> None:
        """Write a file of the store into the folder. Raises Damaged for a result that does not match the
        index; a log may be newer, because the index is sent after it.
        """
        path, content = self._path_of(name), self._read_object(name)
        if _entry_of(content) != self._sent[name]:
            self._damaged.add(name)
            place = f"{self.store.url}/{name}"
            text = f"{place} does not match {INDEX}: it is damaged, or its copy was interrupted"
            if self._is_result(path):
                raise Damaged(text)
            self.report(f"warning: {text}; what can be read of it is used")
        make_folder(path.parent)
        write_durably(path, content)

    def _fetch_checkpoint(self, step: int) -> bool:
        """Write a checkpoint of the store into the folder; if it is damaged, report that and return False."""
        part = self.folder / CHECKPOINTS / f"{step}.tmp"
        shutil.rmtree(part, ignore_errors=True)
        make_folder(part.parent)
        for name in self.store.names(f"{CHECKPOINTS}/{step}/"):
            if name.endswith("/"):  # object browsers write such empty objects as folders
                continue
            path = self._path_of(name.replace(f"/{step}/", f"/{step}.tmp/", 1))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._read_object(name))
        try:
            manifest.check_files(part, manifest.read_manifest(part)["files"])
        except manifest.Corrupt as error:
            shutil.rmtree(part, ignore_errors=True)
            self.report(f"warning: the checkpoint of step {step} in {self.store.url} is damaged: {error}")
            return False
        final = part.with_name(str(step))
        if final.exists():
            manifest.set_aside(final)
        publish(part, final)
        return True

    def _read_object(self, name: str) -> bytes:
        content = self.store.read(name)
        if content is None:
            raise OSError(f"{self.store.url}/{name}: it is listed, but was deleted meanwhile; start again")
        return content

    def _path_of(self, name: str) -> Path:
        """Return the path of an object's file. Raises ValueError for a name that leads out of the folder."""
        path = self.folder / name
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(
                f"{self.store.url}: the path of {name!r} is outside the run's folder, so nothing more is "
                f"downloaded; delete this object, or its entry in {INDEX}, in the store"
            )
        return path

    # To the store

    def published(self, step: int) -> None:
        """Copy a new checkpoint in the background, unless a newer one is there by the time that it begins."""
        self._newest = step
        self._copying.submit(self._copy, step)

    def settle(self) -> None:
        """Wait for the copy under way. Later checkpoints are copied by `finish`."""
        self._newest = math.inf
        self._copying.submit(int).result()

    def _copy(self, step: int) -> None:
        """Send the checkpoint of a step, checkpoints on disk that the store lacks, and changed logs. Delete
        checkpoints from the store that are no longer on disk.

        Nothing is sent if a newer checkpoint waits to be copied, if `settle` has been called, or if the store
        has a later checkpoint: then the run has gone back, because later ones on disk were damaged. An error
        is only reported; the next call sends the missing files.
        """
        if step < self._newest:
            return
        try:
            self.sending = frozenset(self._local_steps())
            self._check_owner()
            stored = self.store.names(f"{CHECKPOINTS}/")
            kept = self._local_steps()
            if self._is_behind(stored, step):
                return
            self._send_checkpoints([i for i in kept if i == step or _marker(i) not in stored], stored)
            stored_steps = re.findall(rf"(?m)^{CHECKPOINTS}/(\d+)/", "\n".join(stored))
            for old in sorted(set(map(int, stored_steps)) - set(kept)):
                self._delete_checkpoint(old)
            self._fails_since = ""
        except Exception as error:
            if isinstance(error, FileNotFoundError) and step < self._newest:
                return  # a newer one has replaced it before it was sent
            since = self._fails_since and f"; the store has failed since {self._fails_since}"
            now = datetime.now().isoformat(" ", "seconds")
            self._fails_since = self._fails_since or f"step {step} at {now}"
            self.report(
                f"warning: the checkpoint of step {step} was not copied ({_reason(error)}); it is in "
                f"{self.folder}, and the next one tries again{since}"
            )
        finally:
            self.sending = frozenset()

    def finish(self) -> None:
        """Send the files that have changed. Raises OSError if files could not be sent: RestartError if the
        store failed.
        """
        try:
            if self.is_accepted:
                self._check_owner()
            else:  # a start that had nothing to do
                self.accept()
            stored = self.store.names(f"{CHECKPOINTS}/")
            local = self._local_steps()
            if local and not (self.folder / SUMMARY).is_file() and self._is_behind(stored, max(local)):
                return
            missing = [step for step in local if _marker(step) not in stored]
            if missing:
                self._send_checkpoints(missing, stored)
            self._send_files(self._files())
        except Exception as error:
            kind = RestartError if isinstance(error, StoreError) else OSError
            raise kind(
                f"the end of this run was not copied: {_reason(error)}; all of it is in {self.folder}, and "
                "the same command copies it"
            ) from error
        self.report(f"all files of this run are in {self.store.url} too")

    def try_to_finish(self) -> None:
        """Send the files that have changed; an error is a warning."""
        try:
            self.finish()
        except OSError as error:
            self.report(f"warning: {error}")

    def stop(self) -> None:
        """Note that a signal has ended the run, so that a failing store doesn't change its exit code."""
        self.is_stopped = True

    def _is_behind(self, stored: list[str], step: int) -> bool:
        """Report and return whether the store has a later checkpoint than `step`. stored: its names."""
        latest = max(_complete_steps(stored), default=step)
        if latest > step:
            self.report(f"{self.store.url} has step {latest}: nothing is copied before the run has passed it")
        return latest > step

    def _check_owner(self) -> None:
        """Raise OSError if another process has taken over the copying of this run."""
        owner = self._read_index()["owner"]
        if owner.get("id", self.owner["id"]) != self.owner["id"]:
            where = "pid {} on {} since {}".format(*(owner.get(k, "?") for k in ("pid", "host", "since")))
            raise OSError(f"{self.store.url} is written by another process of this run, {where}; stop one")

    def _send_checkpoints(self, steps: list[int], stored: list[str]) -> None:
        """Send the states of checkpoints, then the logs of the run, then the manifests. Results, which may be
        written meanwhile, are sent at the end.

        stored: names of the objects of checkpoints.
        """
        for step in steps:
            folder, prefix = self.folder / CHECKPOINTS / str(step), f"{CHECKPOINTS}/{step}/"
            if any(name.startswith(prefix) for name in stored):
                self._delete_checkpoint(step)
            files = sorted(x for x in folder.rglob("*") if x.is_file() and x.name != manifest.NAME)
            self.store.write_files((prefix + file.relative_to(folder).as_posix(), file) for file in files)
        logs = [path for path in self._files() if path.name != SUMMARY and not self._is_result(path)]
        self._send_files(logs)
        for step in sorted(steps):
            self.store.write(_marker(step), (self.folder / _marker(step)).read_bytes())

    def _delete_checkpoint(self, step: int) -> None:
        self.store.delete(_marker(step))
        self.store.delete(f"{CHECKPOINTS}/{step}/")

    def _send_files(self, paths: list[Path]) -> None:
        """Send the files that are not in the store in their present state, then the index."""
        for path in paths:
            name = path.relative_to(self.folder).as_posix()
            with contextlib.suppress(FileNotFoundError):  # replaced just now; the next call sends it
                modified = path.stat().st_mtime_ns
                if self._read.get(name) == modified:
                    continue
                content = path.read_bytes()
                entry = _entry_of(content)
                if self._sent.get(name) != entry:
                    self.store.write(name, content)
                    self._sent[name] = entry
                self._read[name] = modified
        self._check_owner()
        self._write_index()

    def _files(self) -> list[Path]:
        """Return the paths of the run's files to send, summary.json last. Left out are checkpoints, links,
        the lock, index.json, temporary files (.part, .tmp) and folders that were renamed as damaged (.bad).
        """
        is_bad = re.compile(rf".*{re.escape(manifest.SET_ASIDE)}\d*").fullmatch
        paths = []
        for path in self.folder.rglob("*"):
            *folders, _ = parts = path.relative_to(self.folder).parts
            is_kept = parts[0] not in (CHECKPOINTS, *LOCAL_FILES) and path.suffix not in TEMPORARY
            if is_kept and path.is_file() and not path.is_symlink() and not any(map(is_bad, folders)):
                paths.append(path)
        return sorted(paths, key=lambda path: (path.name == SUMMARY, path))

    def _is_result(self, path: Path) -> bool:
        return not {*RESULTS}.isdisjoint(path.relative_to(self.folder).parts[:-1])

    def _write_index(self) -> None:
        self.store.write(INDEX, json.dumps({"owner": self.owner, "files": self._sent}, indent=1).encode())


def _marker(step: int) -> str:
    """Return the name of the object without which a checkpoint is incomplete: its manifest."""
    return f"{CHECKPOINTS}/{step}/{manifest.NAME}"


def _complete_steps(names: list[str]) -> list[int]:
    """Return the steps of the checkpoints that have a manifest. names: the names of all objects."""
    pattern = rf"(?m)^{CHECKPOINTS}/(\d+)/{manifest.NAME}$"
    return [int(step) for step in re.findall(pattern, "\n".join(names))]


def _entry_of(content: bytes) -> list[Any]:
    return [len(content), xxhash.xxh3_128_hexdigest(content)]


def _reason(error: Exception) -> str:
    """Return the text of an error; its type precedes it unless it is an OSError or ValueError."""
    return str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def mirrored(
    folder: Path,
    url: str | None,
    records: Records,
    report: Callable[[str], None] = print,
    defaults: Mapping[str, Any] = NO_DEFAULTS,
) -> Iterator[Copies]:
    """Fetch a run's folder from the store at `url`; yield the functions that copy it there; at the end of the
    block, copy the files that have changed since. If `url` is None, nothing is fetched or copied.

    records: see Mirror.open. defaults: see Mirror. If the block fails before it calls `accepted`, nothing is
    copied. Raises the errors of Mirror.open and Mirror.finish.
    """
    if url is None:
        yield LOCAL_ONLY
        return
    mirror = Mirror(folder, open_store(url), report, defaults)
    mirror.open(records)
    copies = Copies(
        accepted=mirror.accept,
        published=mirror.published,
        sending=lambda: mirror.sending,
        settle=mirror.settle,
        stopped=mirror.stop,
        fetch=mirror.fetch_step,
    )
    try:
        yield copies
        mirror.settle()
    except BaseException:
        mirror.settle()
        if mirror.is_accepted:
            mirror.try_to_finish()
        raise
    if mirror.is_stopped:
        mirror.try_to_finish()
    else:
        mirror.finish()


IN_STORE = re.compile(r"(gs|s3)://")
LEVELS = 3  # parts of SWEEP/MEMBER/adapter; the folder in the store may end at any of them
FETCHED = "fetched.json"  # names of the fetched files; it is in the parent folder of the copy


def local_folder(place: str) -> Path:
    """Return the folder of a run on this machine. One in an object store is fetched first; see fetch_run."""
    return fetch_run(place) if IN_STORE.match(place) else Path(place)


def is_fetched(folder: Path) -> bool:
    """Return whether `folder` is a copy that local_folder has fetched."""
    return folder.is_relative_to(cache_folder() / "runs")


def fetch_run(url: str) -> Path:
    """Fetch the folder of a run or a sweep, without checkpoints, into the cache; return its path there.

    url: the address of the folder, or of a folder in it. Files in the cache are not fetched again, and files
    that are gone from the store are deleted. Raises ValueError for a wrong address or damaged weights,
    FileNotFoundError if the store has no run there, and OSError if the store fails.
    """
    check_store_url(url, "run")
    parts = url.rstrip("/").split("/")
    for size in range(len(parts), max(len(parts) - LEVELS, 2), -1):
        root = "/".join(parts[:size])
        place = cache_folder() / "runs" / hashlib.sha256(root.encode()).hexdigest()[:16]
        folder, listed = place / parts[size - 1], place / FETCHED
        report = partial(print, file=sys.stderr, flush=True)
        names = Mirror(folder, open_store(root), report).fetch_results()
        if not names:
            continue
        before = json.loads(listed.read_bytes()) if listed.is_file() else []
        for name in set(before) - set(names):
            (folder / name).unlink(missing_ok=True)
        listed.write_text(json.dumps(names))
        return folder.joinpath(*parts[size:])
    raise FileNotFoundError(
        f"{url}: no run is there; name the folder of one that was trained with loop.store=..., such as "
        "s3://bucket/runs/sft"
    )
