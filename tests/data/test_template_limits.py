"""Chat templates are programs of others: what they may cost, and what is refused whatever the row."""

import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_tokenizers import tiny
from tokenizers import normalizers

from jaxft.data.chat import confined, loss_mask
from jaxft.data.chat.template import UnusableTemplate
from jaxft.data.rows import limits
from jaxft.data.rows.example import Chat, Completion, Text
from jaxft.data.rows.invalid import InvalidRow
from jaxft.data.sft import Rows

LOOP = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
HUGE_POWER = "{% set power = 9 ** (9 ** 9) %}"


def tokenizer_with(before, template=None):
    tokenizer = tiny.__wrapped__("chatml")
    tokenizer.chat_template = before + (template or tokenizer.chat_template)
    return tokenizer


def for_row(text, template):
    return f"{{% if '{text}' in messages[0].content %}}{template}{{% endif %}}"


def asked(name, text):
    return Chat(name, ({"role": "user", "content": text}, {"role": "assistant", "content": "a"}), 1)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(limits, "RENDER_SECONDS", 0.3)
    monkeypatch.setattr(limits, "RENDER_BYTES", 64 << 20)


@pytest.mark.parametrize("text", ["{{ 'a' * 2 * 10**8 }}", "{% set x = 'a' * 2 * 10**8 %}"])
def test_a_row_for_which_the_template_takes_much_memory_is_invalid(small, text):
    before = resource.getrlimit(resource.RLIMIT_AS)
    tokenizer = tokenizer_with(for_row("big", text))
    rows = [asked("r:1", "big"), asked("r:2", "small")]
    first, (ids, _) = loss_mask.tokenise_examples(rows, tokenizer)
    assert isinstance(first, InvalidRow) and len(ids)
    assert "takes more than 67108864 bytes of memory" in str(first)
    (prompt,) = loss_mask.example_prompt_ids(rows[:1], tokenizer)
    assert isinstance(prompt, InvalidRow)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize("text", [LOOP, HUGE_POWER])
def test_a_template_that_takes_too_long_for_a_row_ends_the_run_at_once(small, tmp_path, text):
    tokenizer = tokenizer_with(for_row("slow", text))
    rows = [asked("r:1", "quick"), *(asked(f"r:{i}", "slow") for i in range(2, 99))]
    line = r"^r:2: the chat template of the tokenizer takes more than 0.3 s .*; use another tokenizer$"
    with pytest.raises(UnusableTemplate, match=line):
        list(loss_mask.tokenise_examples(rows, tokenizer))
    with pytest.raises(UnusableTemplate, match=line):
        list(loss_mask.example_prompt_ids(rows, tokenizer))
    (tmp_path / "r.jsonl").write_text(
        "\n".join(json.dumps({"prompt": p, "completion": "a"}) for p in ("quick", "slow"))
    )
    with pytest.raises(UnusableTemplate, match="r.jsonl:2"):
        Rows(str(tmp_path / "r.jsonl"), held_out=None, invalid="drop").open(tokenizer, cache=tmp_path)


def test_a_template_that_always_takes_too_long_is_refused_with_the_tokenizer(small):
    with pytest.raises(UnusableTemplate, match="^the chat template of the tokenizer takes more than 0.3 s"):
        loss_mask.template_of(tokenizer_with(LOOP))


def test_limits_of_a_template_hit_nothing_else_in_the_process(small):
    """Other threads allocate more than a template may, and timers, signals and limits stay as they are."""

    def state():
        limit = resource.getrlimit(resource.RLIMIT_AS)
        return signal.getsignal(signal.SIGALRM), limit, signal.getitimer(signal.ITIMER_REAL)[0] > 0

    before = signal.signal(signal.SIGALRM, lambda signum, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    tokenizer, seen = tokenizer_with(for_row("slow", LOOP)), []
    loss_mask.template_of(tokenizer)
    first, outcomes = state(), []

    def render():
        with pytest.raises(UnusableTemplate):
            list(loss_mask.tokenise_examples([asked("r:1", "slow")], tokenizer))
        outcomes.append("slow")

    threads = [threading.Thread(target=render) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            seen.append((len(bytearray(limits.RENDER_BYTES * 2)), state()))
            time.sleep(0.02)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert outcomes == ["slow"] * 2 and seen
    assert set(seen) == {(limits.RENDER_BYTES * 2, first)}


def uninterrupted():
    """Render a template that is slow in one operation in C, which no signal handler interrupts."""
    limits._UNINTERRUPTED = 0.2
    with limits.render_limits():
        sum(range(10**12))


def stopped():
    os.kill(os.getpid(), signal.SIGSTOP)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_once(path):
    if not Path(path).exists():
        Path(path).touch()
        killed()
    return os.getpid()


def dead():
    os.write(2, b"traceback\nout of luck\n")
    os._exit(3)


@pytest.mark.quick_cases("uninterrupted*", "stopped*", "dead*")
@pytest.mark.parametrize(
    ("function", "error"),
    [
        (uninterrupted, limits.TooSlow),
        (stopped, confined.Silent),
        (dead, confined.Died),
        (killed, confined.Died),
    ],  # fmt: skip
)
def test_a_process_that_ends_during_a_call_is_replaced(small, monkeypatch, function, error):
    confined.call(os.getpid)  # starts it
    monkeypatch.setattr(confined, "SILENT_SECONDS", 0.6 if function is stopped else 40)
    with pytest.raises(error) as caught:
        confined.call(function)
    if error is confined.Died:
        ends = {dead: (3, "out of luck"), killed: (-signal.SIGKILL, "")}
        assert (caught.value.code, caught.value.reason) == ends[function]
    monkeypatch.undo()
    first = confined.call(os.getpid)
    assert first == confined.call(os.getpid) != os.getpid()


def test_a_call_whose_process_something_else_kills_is_made_once_more(tmp_path):
    """Such as the system, for lack of memory."""
    first = confined.call(os.getpid)
    again = confined.call(killed_once, str(tmp_path / "called"))
    assert again == confined.call(os.getpid) != first


def test_the_process_starts_where_the_working_directory_has_changed(tmp_path, monkeypatch):
    """As in a notebook, whose sys.path has "" for its folder."""
    monkeypatch.setattr("sys.path", ["", *(path for path in sys.path if not (Path(path) / "jaxft").is_dir())])
    monkeypatch.chdir(tmp_path)
    process = confined._Process()
    try:
        assert process.call_all(os.path.basename, [("a/b",)]) == ["b"]
    finally:
        process.stop()


def test_one_row_of_very_many_turns_is_refused_at_once():
    """Each learned turn is looked for in renderings of all messages before it."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": "a"} for i in range(60_000)]
    begin = time.monotonic()
    (row,) = loss_mask.tokenise_examples([Chat("r:1", tuple(turns), 59_999)], tiny("chatml"), "assistant")
    assert "r:1: 30000 learned turns in 60000 messages take too long" in str(row)
    assert time.monotonic() - begin < 60


def test_a_text_that_would_take_gigabytes_to_tokenise_is_refused():
    huge = "a b" * (limits.LONGEST_TEXT // 3 + 1)
    (row,) = loss_mask.tokenise_examples([Completion("r:1", "q", huge)], tiny("none"))
    assert str(row).startswith(f"r:1: its text has {len(huge) + 1} characters, more than 2097152")
    (prompt,) = loss_mask.example_prompt_ids([Completion("r:1", huge, "")], tiny("none"))
    assert isinstance(prompt, InvalidRow)


@pytest.mark.parametrize("spaced", [True, False])
def test_a_long_plain_text_has_the_tokens_of_the_text_as_a_whole(monkeypatch, spaced):
    """With a tokenizer that puts a space in front of a text's first word, and one that does not."""
    tokenizer = tiny.__wrapped__("none")
    if spaced:
        core = tokenizer.backend_tokenizer
        core.normalizer = normalizers.Prepend(" ")
    texts = ["Two  words\nand a ring ☃ of 漢字.\n\n" * 60, "x" * 2000 + "y", "é" * 1999]
    examples = [Text(f"r:{i}", text) for i, text in enumerate(texts)]
    whole = list(loss_mask.tokenise_weighted(examples, tokenizer))
    monkeypatch.setattr(limits, "LONGEST_TEXT", 500)
    monkeypatch.setattr(loss_mask, "TEXT_PIECE", 256)
    monkeypatch.setattr(loss_mask, "OVERLAP", 64)
    pieces = list(loss_mask.tokenise_weighted(examples, tokenizer))
    for one, other in zip(whole, pieces, strict=True):
        assert one.ids.tolist() == other.ids.tolist() and one.learned.all() and other.learned.all()
    (row,) = loss_mask.tokenise_weighted([Text("r:9", " " * 2000)], tiny("none"))
    assert "its tokens cannot be separated at character 288; split the row" in str(row)


@pytest.mark.parametrize(
    ("template", "reason"),
    [("{{ 1/0 }}", "ZeroDivisionError: division by zero"), ("{{ missing.x.y }}", "'missing' is undefined")],
)
def test_a_template_that_fails_on_every_row_is_not_a_fault_of_the_row(tmp_path, template, reason):
    (tmp_path / "r.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a"}))
    data = Rows(str(tmp_path / "r.jsonl"), held_out=None)
    with pytest.raises(UnusableTemplate, match="fails .*; use another tokenizer$") as raised:
        data.open(tokenizer_with(template), cache=tmp_path)
    assert reason in str(raised.value) and "data.invalid" not in str(raised.value)


def test_a_template_that_rejects_even_a_question_says_so():
    tokenizer = tokenizer_with("{{ raise_exception('no chats') }}")
    (row,) = loss_mask.tokenise_examples([asked("r:1", "q")], tokenizer)
    assert "rejects the row: no chats; it rejects even a simple question and response" in str(row)


def test_a_template_that_changes_the_order_of_the_turns_is_refused():
    tokenizer = tiny.__wrapped__("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("in messages", "in messages | reverse")
    with pytest.raises(UnusableTemplate, match="does not render the turns of a conversation in their order"):
        loss_mask.template_of(tokenizer)
