"""Run Python code that a model wrote in a process of its own, with limits. Not a security boundary.

The process has limits on its time, memory, files and output, an empty folder as its working directory, no
environment variables and, where the system permits user namespaces, no network and no processes that outlive
it. It may read whatever files the user of the run may read, and a fault of the kernel is not kept from it.
For code that is meant to do harm, use a container or a machine of its own.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from jaxft.bounds import above, at_least, check_bounds

SPARE_SECONDS = 2.0  # for the start of the process, beyond the limit
_PROGRAM = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of a run of code. seconds: of wall clock and of processor time. memory, files: in bytes; of
    address space, and of each file that it writes. output: characters that are returned.
    """

    seconds: Annotated[float, above(0)] = 5.0
    memory: Annotated[int, at_least(1 << 26)] = 1 << 30
    files: Annotated[int, at_least(0)] = 1 << 20
    output: Annotated[int, at_least(1)] = 4000

    def __post_init__(self) -> None:
        check_bounds(self, "sandbox")


@dataclass(frozen=True)
class SandboxResult:
    """What code printed, up to the limit, and how it ended. code: 0 if it ended without an error, None if it
    took too long. isolated: whether it had no network.
    """

    output: str
    code: int | None
    isolated: bool


def run_python(code: str, limits: SandboxLimits = SandboxLimits()) -> SandboxResult:
    """Run Python code, and return its output: stdout and stderr together.

    Example: run_python("print(2 ** 10)").output == "1024\\n"
    """
    with tempfile.TemporaryDirectory(prefix="jaxft-sandbox-") as folder:
        place = Path(folder)
        (place / "work").mkdir()
        (place / "code.py").write_text(code, encoding="utf-8", errors="surrogatepass")
        with (place / "output").open("wb") as output:
            ended = _run(place, output.fileno(), limits)
        with (place / "output").open("rb") as file:
            text = file.read(4 * limits.output).decode(errors="replace")
        isolated = (place / "isolated").exists()
    if len(text) > limits.output:
        text = text[: limits.output] + "\n[output cut]"
    return SandboxResult(text, ended, isolated)


def _run(place: Path, output: int, limits: SandboxLimits) -> int | None:
    """Run the code of a folder and return its exit code, None if it took too long."""
    numbers = [str(x) for x in (max(1, round(limits.seconds + 0.5)), limits.memory, limits.files)]
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", str(_PROGRAM), str(place), *numbers],
        cwd=place / "work", stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        env={"PATH": os.defpath, "HOME": str(place / "work"), "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(limits.seconds + SPARE_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
