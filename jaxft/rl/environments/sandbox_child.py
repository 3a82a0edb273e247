"""The process of the sandbox: it limits itself, then runs the code. It imports nothing of jaxft.

python -I sandbox_child.py FOLDER SECONDS MEMORY FILES
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
import traceback

NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000  # of unshare(2)
DIE_WITH_PARENT = 1  # of prctl(2)


def run_limited() -> None:
    """Limit this process and run the code of the folder."""
    folder, seconds, memory, files = sys.argv[1], *map(int, sys.argv[2:])
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux" and libc.unshare(NEW_USER | NEW_PROCESSES | NEW_NETWORK) == 0:
        open(os.path.join(folder, "isolated"), "w").close()
        child = os.fork()
        if child:  # in the new namespace, that process is the first: all others end with it
            status = os.waitpid(child, 0)[1]
            os._exit(min(255, abs(os.waitstatus_to_exitcode(status))))
        libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, files),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # not on every system
            resource.setrlimit(kind, (most, most))
    with open(os.path.join(folder, "code.py"), encoding="utf-8", errors="surrogatepass") as file:
        code = file.read()
    sys.argv = ["code.py"]
    _run(code)


def _run(code: str) -> None:
    """Run code as a main program; print the error that it ends with, without the frames of this file."""
    scope = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        exec(compile(code, "code.py", "exec"), scope)
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
