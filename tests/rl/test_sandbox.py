"""Code in the sandbox: its output, and what each limit stops."""

import time
from pathlib import Path

import pytest

from jaxft.rl.environments.sandbox import SandboxLimits, run_python

QUICK = SandboxLimits(seconds=1.0)


def test_output_and_errors_are_returned():
    found = run_python("print(2 ** 10)")
    assert (found.output, found.code) == ("1024\n", 0)
    failed = run_python("print(1)\nx = 1 / 0")
    assert failed.code == 1 and failed.output.startswith("1\nTraceback")
    assert failed.output.endswith(
        'File "code.py", line 2, in <module>\nZeroDivisionError: division by zero\n'
    )
    assert run_python("import sys; sys.exit(3)").code == 3


STOPPED = {
    "memory": ("x = bytearray(1 << 31)", "MemoryError"),
    "files": ("open('big', 'wb').write(b'x' * (1 << 22))", "File too large"),
    "syntax": ("print(", "SyntaxError"),
    "secrets": ("import os; print(sorted(os.environ), os.listdir())", "'PATH'] []"),
}


@pytest.mark.parametrize("what", STOPPED)
def test_limits_hold(what):
    code, shown = STOPPED[what]
    assert shown in run_python(code, QUICK).output


def test_a_long_output_is_cut():
    found = run_python("print('x' * 100000)", SandboxLimits(output=10))
    assert found.output == "x" * 10 + "\n[output cut]"


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)"])
def test_code_that_does_not_end_is_killed(code):
    began = time.monotonic()
    found = run_python(code, QUICK)
    assert found.code != 0 and time.monotonic() - began < 5


def test_there_is_no_network_and_no_process_is_left():
    """Where user namespaces are permitted."""
    code = "import os, socket, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(60)\n"
    code += "print(os.getcwd(), flush=True)\n"
    found = run_python(code + "socket.create_connection(('127.0.0.1', 9), 1)", QUICK)
    if not found.isolated:
        pytest.skip("no user namespaces here")
    assert "Network is unreachable" in found.output
    place = found.output.split("/work")[0]
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if place in p.read_text(errors="ignore")]
