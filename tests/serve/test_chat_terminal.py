"""The chat on a pseudo-terminal: streaming, two responses side by side, interrupts, the end of the input."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny_served as tiny
from scripts_in_process import SCRIPTS, load
from terminals import Terminal
from tiny_llama import tiny_torch, write_folder

from jaxft.engine.sampling import Sampling
from jaxft.engine.scheduler import NewTokens, SampledToken, Ticket
from jaxft.runs.terminal import printable_text
from jaxft.serve.openai_api import ChoiceSettings
from jaxft.serve.terminal_chat import Conversation

WITH_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # keys such as Ctrl-C then send signals
os.execv(sys.executable, sys.argv[1:])
"""
LONG = "wörld 1 2 3 the rank of a matrix "


def ids_of(text):
    return tiny.TOKENIZER(text, add_special_tokens=False).input_ids


class ScriptedScheduler:
    """Responds with texts in place of sampled ones, 2 tokens at a time; one that ends in ... goes on."""

    def __init__(self, texts):
        self.texts = list(texts)
        self.sizes = tiny.SIZES

    def submit(self, requests):
        text = self.texts.pop(0)
        for (_, deliver), own in zip(requests, text if isinstance(text, list) else [text]):
            ids = ids_of(own.removesuffix("..."))
            for at in range(0, len(ids), 2):
                deliver(NewTokens(tuple(SampledToken(token, -1.0) for token in ids[at : at + 2])))
            if not own.endswith("..."):
                deliver(NewTokens((SampledToken(tiny.STOP[0], -1.0),), "stop"))
        return [Ticket(*one) for one in requests]


@pytest.fixture
def terminal():
    """A terminal of 80 columns."""
    found = Terminal()
    yield found
    found.close()


@contextlib.contextmanager
def standard_streams(terminal):
    """Make the terminal this process's standard streams, within a test: before it, pytest sets its own."""
    with (
        open(os.dup(terminal.slave), encoding="utf-8") as stdin,
        open(os.dup(terminal.slave), "w", encoding="utf-8") as stdout,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, stream in {"stdin": stdin, "stdout": stdout, "stderr": stdout}.items():
            patch.setattr(sys, name, stream)
        yield


def test_a_conversation_on_a_terminal(terminal, monkeypatch, tmp_path):
    """A user's side in a thread; the chat gets interrupts as a main thread does."""
    texts = ["héllo € " + LONG, [LONG, LONG * 2], [LONG, LONG], [LONG * 9 + "END...", LONG], "it goes on..."]
    chat = Conversation(tiny.models(), ("base",), ChoiceSettings(Sampling(24), 0, (), 1, None), 24)
    failures, shown, main, finished = [], {}, threading.get_ident(), threading.Event()

    def interrupt(text):
        """Send SIGINT while the chat waits; once more if it came just before the wait."""
        for _ in range(3):
            time.sleep(0.3)
            signal.pthread_kill(main, signal.SIGINT)
            with contextlib.suppress(AssertionError):
                return terminal.expect(text, 10)
        raise AssertionError(terminal.text)

    def user():
        try:
            terminal.expect("base> ")
            terminal.type("what is à rank?\n")
            shown["one"] = terminal.expect("base> ")
            terminal.type("/system be brief\n/use base,terse\n")
            terminal.expect("base|terse> ")
            terminal.type("and then?\n")
            shown["two"] = terminal.expect("base|terse> ")
            monkeypatch.setenv("COLUMNS", "30")
            terminal.type("/retry\n")
            shown["narrow"] = terminal.expect("base|terse> ")
            terminal.type("/retry\n")
            terminal.expect("END")  # the last lines of what is longer than the screen
            interrupt(" [stopped]\nbase|terse> ")
            terminal.type("/undo\n/use base\n")
            terminal.expect("base> ")
            terminal.type("go\n")
            terminal.expect("it goes on")
            interrupt(" [stopped]\nbase> ")
            interrupt("(/exit leaves)\nbase> ")
            terminal.type(f"/save {tmp_path}/chat.jsonl\n")
            terminal.expect("base> ")
        except BaseException as error:
            failures.append(error)
            chat.done = True
        terminal.type("\x04")
        while not finished.wait(0.02):
            terminal.drain()
            if failures:  # the chat may wait for a response that never ends
                signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=user)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "12")
    # a job in a shell's background, and its children, ignore interrupts
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with standard_streams(terminal), contextlib.suppress(KeyboardInterrupt):  # one more than needed
            thread.start()
            load("chat").chat_loop(ScriptedScheduler(texts), chat)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        finished.set()
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert not failures, failures
    terminal.drain()
    assert shown["one"] == "what is à rank?\n" + texts[0] + "\n"
    lines = shown["two"].splitlines()
    header = [line for line in lines if "base" in line and "terse" in line and "┃" in line]
    assert header and len({len(line) for line in lines[-6:] if line}) == 1  # all of the table's width
    assert "wörld" in lines[-3] and max(map(len, shown["narrow"].splitlines())) <= 30
    assert shown["narrow"].count("wörld") >= 2 and terminal.text.endswith("base> \n")
    assert [turn.responses for turn in chat.turns][-1] == {"base": "it goes on"}
    rows = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert rows[0]["messages"][0] == {"role": "system", "content": "be brief"}
    assert rows[0]["messages"][-1] == {"role": "assistant", "content": "it goes on"}


@pytest.mark.parametrize("columns", [20, 60])
def test_long_responses_side_by_side_fit_the_terminal_while_they_arrive(columns):
    from rich.console import Console

    script, texts = load("chat"), {"base": LONG * 40, "terse": "\n" * 50 + "short"}
    console = Console(width=columns, height=12, file=open(os.devnull, "w"))  # noqa: SIM115
    lines = console.render_lines(script.side_by_side(texts, console, 7), pad=False)
    text = "\n".join("".join(segment.text for segment in line) for line in lines)
    assert len(lines) <= 11 and "short" in text and "matrix" in text
    assert max(line.count("│") for line in text.splitlines()) == (3 if columns == 60 else 2)
    whole = console.render_lines(script.side_by_side(texts, console, None))
    assert len(whole) > 50


@pytest.mark.slow
def test_the_command_on_a_terminal_of_its_own(tmp_path):
    """With line editing, real signals of the terminal and a change of its size."""
    write_folder(tmp_path / "base", tiny_torch())
    command = [sys.executable, str(SCRIPTS / "chat.py"), "--model", "base", "--dtype", "float32"]
    command += ["--max-prompt", "192", "--max-new", "24", "--seed", "0", "--temperature", "1"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TERM": "xterm"}
    terminal = Terminal(40, 12)
    process = subprocess.Popen(
        [sys.executable, "-c", WITH_TERMINAL, *command], cwd=tmp_path, env=environment,
        stdin=terminal.slave, stdout=terminal.slave, stderr=terminal.slave, start_new_session=True,
    )  # fmt: skip
    try:
        terminal.expect("/help lists the commands", 300)
        terminal.expect("base> ")
        terminal.type("héllo €\n")
        terminal.expect("héllo €\n")
        first = terminal.expect("base> ")
        terminal.type("/history\n")
        assert "**user**: héllo €" in terminal.expect("base> ")
        terminal.resize(20, 12)
        terminal.type("\x1b[A\x1b[A")  # arrow keys: the message before /history
        terminal.expect("héllo €")
        terminal.type("\n")
        terminal.expect("\nbase> ")
        # Python's line editor shows the prompt before it waits for keys, and a signal in between may stay
        # unseen until the next key.
        time.sleep(1)
        terminal.drain()
        terminal.type("\x03")
        if not terminal.has_output(10):
            terminal.type("\x03")
        terminal.expect("(/exit leaves)")
        terminal.expect("base> ")
        terminal.type("/save a.md\n")
        terminal.expect("saved to a.md")
        terminal.expect("base> ")
        terminal.type("\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        terminal.close()
    saved = (tmp_path / "a.md").read_bytes().decode()  # the model may write \r, which read_text replaces
    assert saved.count("**user**: héllo €") == 2 and len(first) > 10
    assert printable_text(saved.split("**base**: ")[1].split("\n\n**user**")[0])[:10] in first
