"""Code in the sandbox: its output, and what each limit stops."""

import time
from pathlib import Path

import pytest

from jaxft.rl.environments import shipped_environments
from jaxft.rl.environments.shipped_environments import SandboxLimits, run_python

QUICK = SandboxLimits(seconds=1.0)


def test_output_and_errors_are_returned():
    found = run_python("print(2 ** 10)")
    assert (found.output, found.code) == ("1024\n", 0)
    failed = run_python("print(1)\nx = 1 / 0")
    assert failed.code == 1 and failed.output.startswith("1\nTraceback")
    assert 'File "program.py", line 2, in <module>\n    x = 1 / 0\n' in failed.output
    assert failed.output.endswith("\nZeroDivisionError: division by zero\n")
    assert run_python("import sys; sys.exit(3)").code == 3


def test_functions_of_the_code_are_those_of_its_main_module():
    code = "import pickle\ndef f(): return 3\nprint(pickle.loads(pickle.dumps(f))(), __name__)"
    assert run_python(code).output == "3 __main__\n"


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


ISOLATED = {
    "all files together": (
        "for i in range(9): open(f'f{i}', 'wb').write(b'x' * (1 << 18))",
        "No space left on device",
    ),
    "writing elsewhere": ("open('../output', 'w')", "Read-only file system"),
    "removing files": ("import os; os.remove('../program.py')", "Read-only file system"),
}


@pytest.mark.parametrize("what", ISOLATED)
def test_files_are_limited_in_sum_and_to_its_folder(what):
    """Where user namespaces are permitted."""
    code, shown = ISOLATED[what]
    found = run_python(code, QUICK)
    if not found.isolated:
        pytest.skip("no user namespaces here")
    assert shown in found.output


@pytest.mark.parametrize("does", ["os.mkfifo(f'{x}/output')", "shutil.rmtree(x)", "os.chmod(x, 0)"])
def test_what_code_does_to_its_folders_neither_blocks_nor_raises(does, monkeypatch, tmp_path):
    """Also where no namespace keeps it from doing so."""
    program = shipped_environments._PROGRAM.read_text()
    assert program.count('sys.platform == "linux"') == 1
    (tmp_path / "child.py").write_text(program.replace('sys.platform == "linux"', "False"))
    monkeypatch.setattr(shipped_environments, "_PROGRAM", tmp_path / "child.py")
    code = f"import os, shutil\nfor x in ('.', '..'):\n  try: {does}\n  except OSError: pass\nprint('end')"
    found = run_python(code, QUICK)
    assert (found.output, found.isolated) == ("end\n", False)


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
