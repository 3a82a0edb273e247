"""Record which files would survive a power cut, from this process's calls of os.fsync. Writes, syncs and
renames by libraries other than Python's os are seen only by `support/system_calls.py`.

`record(outputs, report)`: a rename to an output's name, to a checkpoint's or to summary.json announces that
files are complete; then report(line) is called for each of them whose present state is not synced.
"""

import json
import os
import stat
from pathlib import Path

RESULTS = ("adapter", "model", "best")
WRITTEN = (".json", ".jsonl", ".md", ".png")


def state_of(path):
    """What a power cut could lose: a file's content, by its size and time, or a folder's names, by inode."""
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        return {entry.name: entry.inode() for entry in os.scandir(path)}
    return found.st_size, found.st_mtime_ns


class DiskLog:
    """The states of files and folders when they were synced, by inode."""

    def __init__(self):
        self.synced = {}
        self.owed = {}  # folders with a new name of which an announcement is not on disk yet

    def add(self, descriptor):
        found = os.fstat(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self.synced[found.st_ino] = state_of(path)
        self.owed.pop(path, None)

    def lost(self, path, below=True):
        """The paths of a file, or a folder and all that is below it, that are not on disk as they are."""
        known, now = self.synced.get(os.stat(path).st_ino), state_of(path)
        if path.is_dir():
            now = {name: inode for name, inode in now.items() if not name.endswith((".part", ".tmp"))}
            is_safe = known is not None and now.items() <= known.items()
            inner = [lost for name in now for lost in self.lost(path / name)] if below else []
            return [*([] if is_safe else [path]), *inner]
        return [] if known == now else [path]

    def lost_log(self, path, step):
        """The path of a log whose entries up to `step` are not on disk; it may have grown since."""
        if not path.exists():
            return []
        size = self.synced.get(os.stat(path).st_ino, (0,))[0]
        lines = path.read_bytes()[:size].splitlines()
        return [] if lines and json.loads(lines[-1])["step"] >= step else [path]

    def announced(self, source, target):
        """The paths that are not on disk when `source` gets the name `target`, and are announced by that."""
        run = target.parent
        if run.name == "checkpoints":
            run, step = run.parent, int(target.name)
            logs = [*self.lost_log(run / "metrics.jsonl", step), *self.lost_log(run / "completions.jsonl", 1)]
            return [*self.lost(source), *logs, *self.lost(run, False), *self.lost(run.parent, False)]
        lost = [*self.lost(source), *self.lost(run, False)] if target.name == "summary.json" else []
        for path in run.iterdir() if target.name == "summary.json" else [source]:
            if target.name != "summary.json" or path.name in RESULTS or path.suffix in WRITTEN:
                lost += self.lost(path)
        return lost


def record(outputs, report):
    """Watch os.fsync, os.rename and os.replace. outputs: absolute paths that a command announces."""
    log, fsync = DiskLog(), os.fsync

    def synced(descriptor):
        fsync(descriptor)
        log.add(descriptor if isinstance(descriptor, int) else descriptor.fileno())

    def watched(rename):
        def act(source, target, **options):
            end = Path(os.path.abspath(target))
            is_step = end.parent.name == "checkpoints" and end.name.isdigit()
            is_announced = is_step or end.name == "summary.json" or str(end) in outputs
            if is_announced:
                lost = log.announced(Path(source), end)
                owed = [f"{folder} with the name of {name}" for folder, name in log.owed.items()]
                report(f"{end.name}: {' '.join([*map(str, lost), *owed]) or 'on disk'}")
                log.owed[str(end.parent)] = end.name
            rename(source, target, **options)

        return act

    os.fsync, os.rename, os.replace = synced, watched(os.rename), watched(os.replace)
    return log
