"""Run Python code that a model wrote in a process of its own, with limits. Not a security boundary.

The process has limits on its time, memory, files and output, an empty folder as its working directory, and
no environment variables. Where the system permits user namespaces, as most of Linux does, it has no network,
writes nowhere else, and no process outlives it. Elsewhere (`isolated` is false) it has the network, writes
and deletes whatever the user of the run may, and a process that it started may go on.

Not limited: it reads all files that the user of the run may read; `memory` is of each of its
processes, and the number of processes is not limited for root; a fault of the kernel is not kept from it. For
code that is meant to do harm, use a container or a machine of its own.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated, Any

from jaxft.annotations import above, at_least, check_bounds

SPARE_SECONDS = 2.0  # for the start of the process, beyond the limit
_PROGRAM = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of a run of code. seconds: of wall clock and of processor time. memory: bytes of address space
    of each process. files: bytes of all files together, of each where it is not isolated. processes: at once,
    with threads; only where it is isolated, and not for root. output: characters that are returned.
    """

    seconds: Annotated[float, above(0)] = 5.0
    memory: Annotated[int, at_least(1 << 26)] = 1 << 30
    files: Annotated[int, at_least(0)] = 1 << 20
    processes: Annotated[int, at_least(1)] = 64
    output: Annotated[int, at_least(1)] = 4000

    def __post_init__(self) -> None:
        check_bounds(self, "sandbox")


@dataclass(frozen=True)
class SandboxResult:
    """The text that code printed, up to the limit, and how it ended. code: 0 if it ended without an error,
    None if it took too long. isolated: whether it had no network and could write nowhere else.
    """

    output: str
    code: int | None
    isolated: bool


def run_python(code: str, limits: SandboxLimits = SandboxLimits()) -> SandboxResult:
    """Run Python code, and return its output: stdout and stderr together.

    Example: run_python("print(2 ** 10)").output == "1024\\n"
    """
    with (
        tempfile.TemporaryDirectory(prefix="jaxft-sandbox-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as output,  # without a name that the code could remove
    ):
        (Path(folder) / "work").mkdir()
        (Path(folder) / "program.py").write_text(code, encoding="utf-8", errors="surrogatepass")
        ended, isolated = _run(Path(folder), output, limits)
        output.seek(0)
        text = output.read(4 * limits.output).decode(errors="replace")
    if len(text) > limits.output:
        text = text[: limits.output] + "\n[output cut]"
    return SandboxResult(text, ended, isolated)


def _run(folder: Path, output: Any, limits: SandboxLimits) -> tuple[int | None, bool]:
    """Run the code of a folder. Return its exit code, None if it took too long, and its `isolated`."""
    seconds, memory, files, processes, _ = astuple(limits)
    numbers = [str(x) for x in (max(1, round(seconds + 0.5)), memory, files, processes)]
    read, write = os.pipe()  # the process writes to it if it is isolated, and closes it before the code runs
    with os.fdopen(read, "rb") as answer:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_PROGRAM), str(folder), str(write), *numbers],
            cwd=folder / "work", stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[write],
            env={"PATH": os.defpath, "HOME": str(folder / "work"), "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )  # fmt: skip
        os.close(write)
        try:
            ended = process.wait(limits.seconds + SPARE_SECONDS)
        except subprocess.TimeoutExpired:
            ended = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return ended, bool(answer.read(1))
