"""A run goes on when standard output and error are closed, full or gone, and treats SIGHUP like SIGTERM."""

import contextlib
import errno
import io
import os
import signal

import pytest
from tiny_run import SLOW_STEPS, Place, write_place

from jaxft.distributed import exit
from jaxft.runs import terminal


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("console")
    write_place(folder)
    return Place(folder)


@pytest.fixture(scope="module")
def expected(place):
    assert place.run("name=normal") == 0, place.err()
    return place.results("normal", 4)


LOST = {
    # `| head`: the reader is gone
    "pipe": """
import os
read, write = os.pipe()
os.dup2(write, 1)
os.dup2(write, 2)
os.close(read)
""",
    # `>&- 2>&-`: no descriptors, as Python starts with them
    "closed": """
import os, sys
os.close(1)
os.close(2)
sys.stdout = sys.stderr = None
""",
    # a terminal with the live view that hangs up in the second step
    "terminal": """
import os
from jaxft.train.logs import meter
controller, terminal = os.openpty()
os.dup2(terminal, 1)
os.dup2(terminal, 2)
os.close(terminal)
add = meter.Meter.add
def hang_up(self, step, *args):
    if step == 1:
        assert os.isatty(1)
        os.close(controller)
    return add(self, step, *args)
meter.Meter.add = hang_up
""",
}


@pytest.mark.quick_cases("closed")
@pytest.mark.parametrize("kind", LOST)
def test_a_run_without_a_console_has_the_results_of_one_with_it(place, expected, kind):
    assert place.run(f"name={kind}", hook=LOST[kind]) == 0, place.err()
    found = place.results(kind, 4)
    assert found["metrics"] == expected["metrics"] and found["leaves"] == expected["leaves"]
    assert found["files"].keys() == expected["files"].keys()
    if kind == "closed":  # no file got the descriptors 1 and 2, nor what is printed
        for path in place.runs(kind).rglob("*.json*"):
            assert b"step 1/4" not in path.read_bytes()


def test_a_hangup_saves_and_the_same_command_resumes(place, expected):
    process = place.start("name=hangup", "loop.save_every=100", hook=SLOW_STEPS)
    place.wait_for(process, place.loops)
    os.kill(process.pid, signal.SIGHUP)
    place.wait_for(process, lambda: "SIGHUP" in place.err())
    os.kill(process.pid, signal.SIGHUP)  # the shell sends it too
    process.join()
    assert process.exitcode == 129, place.err()
    assert f"stopped by SIGHUP after step {place.checkpoints('hangup')[-1]}, saved" in place.out()
    assert place.run("name=hangup", "loop.save_every=100") == 0, place.err()
    assert place.results("hangup", 4)["leaves"] == expected["leaves"]


def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with exit.Interrupt() as found:
            os.kill(os.getpid(), signal.SIGHUP)
            assert found.signal == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def pipe():
    """(read end, LastingFile on the write end)."""
    read, write = os.pipe()
    with terminal.LastingFile(write, "w") as file:
        yield read, file
    with contextlib.suppress(OSError):  # a test may have closed it
        os.close(read)


def test_a_lasting_file_writes_while_it_can_and_then_drops_all(pipe):
    read, file = pipe
    assert file.write(b"one") == 3 and os.read(read, 10) == b"one"
    os.close(read)
    for _ in range(2):
        assert file.write(b"two") == 3
    text = terminal._text_file(file, io.TextIOWrapper(io.BytesIO(), "ascii"))
    print("\u00fc" * 10_000, file=text, flush=True)  # longer than a pipe, and not ASCII


def test_a_full_stream_that_does_not_block_is_waited_for_and_then_dropped(pipe, monkeypatch):
    read, file = pipe
    monkeypatch.setattr(terminal, "PATIENCE", 0.01)
    os.set_blocking(file.fileno(), False)
    total = sum(file.write(bytes(1 << 16)) for _ in range(4))
    assert total == 4 << 16
    os.read(read, 1 << 16)


def test_a_command_whose_reader_is_gone_ends_silently(capsys):
    def reader_is_gone():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    kept = os.dup(1)
    try:
        assert terminal.one_line_errors(reader_is_gone) == terminal.READER_GONE == 128 + signal.SIGPIPE
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert capsys.readouterr().err == ""


def test_results_that_do_not_fit_on_the_disk_are_an_error(capsys, monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    kept = os.dup(1)
    monkeypatch.setattr("sys.stdout", Full())
    try:
        assert terminal.one_line_errors(lambda: 0) == 1
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert capsys.readouterr().err == "error: standard output: No space left on device\n"
