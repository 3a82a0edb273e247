"""A copy of a run's folder in an object store: sent at every checkpoint and at the end, fetched elsewhere.

A run writes its folder on disk, because an object store has neither renames nor locks nor files that grow.
Each verified checkpoint is then copied, its manifest last, so that one without a manifest is incomplete. With
it go the other files of the folder that have changed; `index.json` has their sizes and hashes, and which
process sends them. A start that finds a newer checkpoint in the store than on disk fetches the folder first.
A start with other settings than those of the run in the store is refused and leaves the store as it is.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xxhash

from jaxft.runs import manifest
from jaxft.runs.folder import permitted_changes, read_saved_json
from jaxft.runs.store import Store, open_store

INDEX = "index.json"
CHECKPOINTS = "checkpoints"
SUMMARY = "summary.json"  # of a finished run; it is sent last
LOCAL_FILES = ("lock", INDEX)  # of this machine alone
TEMPORARY = (".part", ".tmp")
Records = Mapping[str, dict[str, Any]]  # settings of a run, or of a sweep's members, by path in the folder
Published = Callable[[int], None]  # is called with the step of each new checkpoint
TakeOver = Callable[[], None]  # is called when the start is accepted


class Mirror:
    """The copy of a run's folder in a store. report: called with a line about each event that matters."""

    def __init__(self, folder: Path, store: Store, report: Callable[[str], None] = print):
        self.folder, self.store, self.report = folder, store, report
        self.owner = {
            "id": secrets.token_hex(8),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.is_owner = False  # whether this process has taken the copy over
        self._sent: dict[str, list[Any]] = {}  # size and hash of what the store has
        self._read: dict[str, int] = {}  # when files were modified that are in the store as they are

    # From the store

    def open(self, records: Records) -> None:
        """Fetch what the store has of a later step; the store stays as it is.

        records: settings of this start. Raises ValueError, before anything is fetched, if the store has a
        checkpoint or results of a run with other settings, or of another run than the folder; OSError if the
        store fails.
        """
        self._sent = self._index().get("files", {})
        stored, local = self._stored_steps(), self._local_steps()
        ahead = max(stored, default=-1), SUMMARY in self._sent
        if stored or SUMMARY in self._sent:  # without them there is nothing to resume, as in a folder
            self._check_settings(records)
        if ahead > (max(local, default=-1), (self.folder / SUMMARY).is_file()):
            self._check_folder(records)
            self._fetch(sorted(set(stored) - set(local)))

    def take_over(self) -> None:
        """Become the process that sends this run; others then send no more. Raises OSError if that fails.

        Call it when the start is accepted: one that is refused must not stop the copies of a live run.
        """
        self._sent = self._index().get("files", {})  # another start may have sent more since `open`
        self._write_index()
        self.is_owner = True

    def _index(self) -> dict[str, Any]:
        content = self.store.read(INDEX)
        try:
            found = json.loads(content or b"{}")
        except ValueError as error:
            raise ValueError(f"{self.store.url}/{INDEX}: not JSON; delete it to send all again") from error
        return found if isinstance(found, dict) else {}

    def _stored_steps(self) -> list[int]:
        """Steps of the complete checkpoints in the store."""
        names = "\n".join(self.store.names(f"{CHECKPOINTS}/"))
        return [int(step) for step in re.findall(rf"(?m)^{CHECKPOINTS}/(\d+)/{manifest.NAME}$", names)]

    def _local_steps(self) -> list[int]:
        found = (self.folder / CHECKPOINTS).glob(f"*/{manifest.NAME}")
        return [int(path.parent.name) for path in found if path.parent.name.isdecimal()]

    def _check_settings(self, records: Records) -> None:
        """Raise ValueError if the settings are not those of the run in the store."""
        for name, record in records.items():
            place, content = f"{self.store.url}/{name}", self.store.read(name)
            if content is None:
                continue
            try:
                found = json.loads(content)
            except ValueError as error:
                raise ValueError(f"{place}: not JSON; choose another name=... or loop.store=...") from error
            old = found if isinstance(found, dict) else {}
            if "members" in {**old, **record}:  # a sweep's, which may change at_once
                old, record = ({"members": one.get("members")} for one in (old, record))
            try:
                permitted_changes(place, old, record)
            except ValueError as error:
                raise ValueError(f"{error} or loop.store=...") from error

    def _check_folder(self, records: Records) -> None:
        """Raise ValueError if the folder has another run than the store. records: as in `open`."""
        paths = {name: self.folder / name for name in records}
        local = {name: read_saved_json(path) for name, path in paths.items() if path.is_file()}
        try:
            self._check_settings(local)
        except ValueError as error:
            raise ValueError(
                f"{self.folder} and {self.store.url} have different runs; choose another name=... or "
                "loop.store=..."
            ) from error

    def _fetch(self, steps: list[int]) -> None:
        """Write the files of the store into the folder, checkpoints in ascending order.

        The newest checkpoint is complete only after all else, so that a start that is killed fetches again.
        """
        self.report(f"fetching step {max(steps, default='')} of this run from {self.store.url}")
        for name in self._sent:
            path = self._path_of(name)
            if (content := self.store.read(name)) is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(path.name + ".part")
                part.write_bytes(content)
                part.replace(path)
        for step in steps:
            part = self.folder / CHECKPOINTS / f"{step}.tmp"
            shutil.rmtree(part, ignore_errors=True)
            for name in self.store.names(f"{CHECKPOINTS}/{step}/"):
                path = self._path_of(name.replace(f"/{step}/", f"/{step}.tmp/", 1))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.store.read(name) or b"")
            part.rename(part.with_name(str(step)))

    def _path_of(self, name: str) -> Path:
        """Where an object's file is. Raises ValueError for a name that leads out of the folder."""
        path = self.folder / name
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"{self.store.url}: it has an object {name!r}, which is no file of a run")
        return path

    # To the store

    def copy(self, step: int) -> None:
        """Send a new checkpoint and the other files that have changed; delete what is not kept here.

        A store that fails is reported; the next call sends what it lacks.
        """
        try:
            self._check_owner()
            stored = self.store.names(f"{CHECKPOINTS}/")
            kept = self._local_steps()
            for one in sorted({step, *kept}):
                marker = f"{CHECKPOINTS}/{one}/{manifest.NAME}"
                if one == step or marker not in stored:
                    self._send_checkpoint(one, replaces=marker in stored)
            self._send_files()
            found = {int(name) for name in re.findall(rf"(?m)^{CHECKPOINTS}/(\d+)/", "\n".join(stored))}
            for old in sorted(found - set(kept)):
                self.store.delete(f"{CHECKPOINTS}/{old}/{manifest.NAME}")
                self.store.delete(f"{CHECKPOINTS}/{old}/")
        except (OSError, ValueError) as error:
            self.report(
                f"warning: the checkpoint of step {step} was not copied ({error}); it is in {self.folder}, "
                "and the next one tries again"
            )

    def finish(self) -> None:
        """Send the files that have changed. Raises OSError if the store lacks something of the folder."""
        try:
            if self.is_owner:
                self._check_owner()
            else:  # a start that had nothing to do
                self.take_over()
            for step in sorted(set(self._local_steps()) - set(self._stored_steps())):
                self._send_checkpoint(step, replaces=False)
            self._send_files()
        except OSError as error:
            raise OSError(
                f"the end of this run was not copied: {error}; all of it is in {self.folder}, and the same "
                "command copies it"
            ) from error
        self.report(f"all files of this run are in {self.store.url} too")

    def _check_owner(self) -> None:
        """Raise OSError if another process sends this run by now."""
        owner = self._index().get("owner", self.owner)
        if owner["id"] != self.owner["id"]:
            where = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
            raise OSError(f"{self.store.url} is written by another start of this run, {where}")

    def _send_checkpoint(self, step: int, replaces: bool) -> None:
        folder, prefix = self.folder / CHECKPOINTS / str(step), f"{CHECKPOINTS}/{step}/"
        if replaces:
            self.store.delete(f"{prefix}{manifest.NAME}")
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != manifest.NAME)
        self.store.write_files((prefix + path.relative_to(folder).as_posix(), path) for path in paths)
        self.store.write(f"{prefix}{manifest.NAME}", (folder / manifest.NAME).read_bytes())

    def _send_files(self) -> None:
        """Send the files outside checkpoints that are not in the store as they are."""
        for path in self._files():
            name = path.relative_to(self.folder).as_posix()
            with contextlib.suppress(FileNotFoundError):  # replaced just now; the next call sends it
                modified = path.stat().st_mtime_ns
                if self._read.get(name) == modified:
                    continue
                content = path.read_bytes()
                entry = [len(content), xxhash.xxh3_128_hexdigest(content)]
                if self._sent.get(name) != entry:
                    self.store.write(name, content)
                    self._sent[name] = entry
                self._read[name] = modified
        self._write_index()

    def _files(self) -> list[Path]:
        """The files of the folder that are sent, the summary last."""
        paths = [
            path
            for path in self.folder.rglob("*")
            if path.is_file()
            and not path.is_symlink()
            and path.relative_to(self.folder).parts[0] not in (CHECKPOINTS, *LOCAL_FILES)
            and path.suffix not in TEMPORARY
        ]
        return sorted(paths, key=lambda path: (path.name == SUMMARY, path))

    def _write_index(self) -> None:
        self.store.write(INDEX, json.dumps({"owner": self.owner, "files": self._sent}, indent=1).encode())


def _nowhere(*step: int) -> None:
    """Copy nothing."""


@contextlib.contextmanager
def mirrored(
    folder: Path, url: str | None, records: Records, report: Callable[[str], None] = print
) -> Iterator[tuple[TakeOver, Published]]:
    """Fetch a run's folder from the store at `url`; yield a function to call when the start is accepted, and
    one that copies a checkpoint there; copy all else at the end. Without a store it does nothing.

    records: settings of this start. A start that fails before it is accepted copies nothing. Raises as
    Mirror.open and Mirror.finish do.
    """
    if url is None:
        yield _nowhere, _nowhere
        return
    mirror = Mirror(folder, open_store(url), report)
    mirror.open(records)
    try:
        yield mirror.take_over, mirror.copy
    except BaseException:
        with contextlib.suppress(OSError):
            if mirror.is_owner:
                mirror.finish()
        raise
    mirror.finish()
