"""Record which files would survive a power cut, from the system calls of all threads of a command.
`support/disk_log.py` watches only calls of Python's os module, in less time.
"""

import re
import shutil
import subprocess
from pathlib import Path

CALLS = (
    "write,pwrite64,writev,pwritev,pwritev2,ftruncate,copy_file_range,sendfile,fsync,fdatasync,openat,creat,"
    "mkdir,mkdirat,link,linkat,symlink,symlinkat,rename,renameat,renameat2"
)
LINE = re.compile(r"(\d+) +(\w+)\((.*)\) += (\d+)(?:<(.*)>)?$")
UNFINISHED = re.compile(r"(\d+) +((\w+)\(.*) <unfinished \.\.\.>$")
RESUMED = re.compile(r"(\d+) +<\.\.\. \w+ resumed>(.*)$")
OPENED = re.compile(r"\d+<([^>]*)>")
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


def strace_failure():
    """Return why no command can be traced here, None if one can."""
    if not shutil.which("strace"):
        return "strace is not installed"
    done = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, text=True)
    return done.stderr if done.returncode else None


def traced(command, out):
    """Return a command line that writes its system calls to the file `out`."""
    options = ["-f", "--seccomp-bpf", "-qq", "-y", "-s", "24", "-e"]
    return ["strace", *options, f"trace={CALLS}", "-o", out, *command]


class SystemCalls:
    """Follow a trace. owed: by path, what was written to a file, or named in a folder, since its sync."""

    def __init__(self, cwd, announced):
        """announced(self, source, target) is called before each rename that took place."""
        self.cwd, self.announced, self.owed = Path(cwd), announced, {}
        self._named, self._begun = set(), {}

    def follow(self, lines):
        """Read the lines of a trace. A sync covers what was written before it began, once it has returned."""
        for line in lines:
            if begun := UNFINISHED.match(line):
                process, text, name = begun.groups()
                path = OPENED.search(text) if name in ("fsync", "fdatasync") else None
                self._begun[process] = text, list(self.owed.get(Path(path[1]), ())) if path else []
                if "write" in name:
                    self._act(name, text, None)
                continue
            covered = None
            if resumed := RESUMED.match(line):
                text, covered = self._begun.pop(resumed[1])
                line = f"{resumed[1]} {text}{resumed[2]}"
            if call := LINE.match(line):
                _, name, arguments, _, opened = call.groups()
                if covered is None or "write" not in name:
                    self._act(name, arguments, opened, covered)

    def _act(self, name, arguments, opened, covered=None):
        handle, texts = OPENED.search(arguments), QUOTED.findall(arguments)
        if name in ("fsync", "fdatasync"):
            path = Path(handle[1])
            self.owed[path] = [] if covered is None else self.owed.get(path, [])[len(covered) :]
        elif name in ("openat", "creat"):
            if opened and ("O_CREAT" in arguments or name == "creat"):
                self._name(Path(opened))
        elif name.startswith(("mkdir", "link", "symlink")):
            self._name(self.cwd / texts[-1])
        elif name.startswith("rename"):
            source, target = (self.cwd / text for text in texts)
            self.announced(self, source, target)
            for path in [path for path in self.owed if path == source or source in path.parents]:
                self.owed[target / path.relative_to(source)] = self.owed.pop(path)
            self._named.add(target)
            self.owed.setdefault(target.parent, []).append(target.name)
        elif handle:
            self.owed.setdefault(Path(handle[1]), []).append((texts or [name])[0])

    def _name(self, path):
        if path not in self._named:
            self._named.add(path)
            self.owed.setdefault(path.parent, []).append(path.name)

    def owed_in(self, folder):
        """What is owed of a folder and all that is below it."""
        return {path: x for path, x in self.owed.items() if x and (path == folder or folder in path.parents)}
