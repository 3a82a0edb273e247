"""The process of the sandbox: it limits itself, then runs the code. It imports nothing of jaxft.

python -I sandbox_child.py FOLDER PIPE SECONDS MEMORY FILES PROCESSES
"""

import contextlib
import ctypes
import linecache
import os
import resource
import signal
import sys
import traceback
import types

NEW_USER, NEW_MOUNTS = 0x10000000, 0x20000  # of unshare(2)
NEW_PROCESSES, NEW_NETWORK = 0x20000000, 0x40000000
SET_ATTRIBUTES, HERE, ALL_MOUNTS, READ_ONLY = 442, -100, 0x8000, 1  # of mount_setattr(2)
BIND, NO_SETUID, NO_DEVICES = 4096, 2, 4  # of mount(2)
DIE_WITH_PARENT = 1  # of prctl(2)
CODE_NAME = "program.py"  # of the code in tracebacks


def run_limited() -> None:
    """Read the folder and the limits from sys.argv, apply the limits to this process and run the code."""
    folder, pipe, seconds, memory, files, processes = sys.argv[1], *map(int, sys.argv[2:])
    with open(os.path.join(folder, CODE_NAME), encoding="utf-8", errors="surrogatepass") as file:
        code = file.read()
    isolated = sys.platform == "linux" and _isolate(os.path.join(folder, "work"), files)
    os.write(pipe, b"1" * isolated)
    os.close(pipe)
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, files),
        (resource.RLIMIT_NPROC, processes if isolated else resource.RLIM_INFINITY),  # else of all the user's
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # not on every system
            resource.setrlimit(kind, (most, most))
    sys.argv = [CODE_NAME]
    _run(code)


def _isolate(work: str, files: int) -> bool:
    """Leave the network, and make all files read-only except in a new file system in `work`. Return whether
    the system permits all of it.
    """
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(NEW_USER | NEW_MOUNTS | NEW_PROCESSES | NEW_NETWORK) != 0:
        return False
    ids = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
    failed = True  # without these, no file could be made in the new file system
    with contextlib.suppress(OSError):
        for name, text in ids.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        failed = False
    folder, size = work.encode(), f"mode=700,size={max(files, 4096)}".encode()
    change = (ctypes.c_uint64 * 4)(READ_ONLY)
    failed = failed or libc.syscall(SET_ATTRIBUTES, HERE, b"/", ALL_MOUNTS, change, ctypes.sizeof(change))
    failed = failed or libc.mount(b"none", folder, b"tmpfs", NO_SETUID | NO_DEVICES, size)
    if not failed:
        libc.mount(folder, b"/dev/shm", None, BIND, None)  # for multiprocessing
        os.chdir(work)
    child = os.fork()
    if child:  # in the new namespace, that process is the first: all others end with it
        status = os.waitpid(child, 0)[1]
        os._exit(min(255, abs(os.waitstatus_to_exitcode(status))))
    libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)
    return not failed


def _run(code: str) -> None:
    """Run code as a main program; print the error that it ends with, without the frames of this file."""
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    linecache.cache[CODE_NAME] = len(code), None, code.splitlines(keepends=True), CODE_NAME
    try:
        exec(compile(code, CODE_NAME, "exec"), vars(main))
    except SystemExit:
        raise
    except BaseException as error:
        trace = error.__traceback__
        shown = traceback.TracebackException(type(error), error, trace.tb_next if trace else None)
        sys.stdout.flush()
        print("".join(shown.format()), end="", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_limited()
