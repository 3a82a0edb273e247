"""Chat templates are programs of others: what they may cost, and what is refused whatever the row."""

import json
import signal
import threading
import time

import pytest
from tiny_tokenizers import tiny
from tokenizers import normalizers

from jaxft.data.chat import loss_mask, template
from jaxft.data.chat.template import UnusableTemplate
from jaxft.data.rows.example import Chat, Completion, Text
from jaxft.data.rows.invalid_rows import InvalidRow
from jaxft.data.sft import Rows

LOOP = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"


def tokenizer_with(before, template=None):
    tokenizer = tiny.__wrapped__("chatml")
    tokenizer.chat_template = before + (template or tokenizer.chat_template)
    return tokenizer


def for_row(text, template):
    return f"{{% if '{text}' in messages[0].content %}}{template}{{% endif %}}"


def asked(name, text):
    return Chat(name, ({"role": "user", "content": text}, {"role": "assistant", "content": "a"}), 1)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(template, "RENDER_SECONDS", 0.3)


def test_a_row_for_which_the_template_renders_a_huge_text_is_invalid():
    tokenizer = tokenizer_with(for_row("big", "{{ 'a' * 3 * 10**6 }}"))
    rows = [asked("r:1", "big"), asked("r:2", "small")]
    first, (ids, *_) = loss_mask.tokenise_examples(rows, tokenizer)
    assert isinstance(first, InvalidRow) and len(ids)
    assert "characters, more than 2097152" in str(first)
    (prompt,) = loss_mask.example_prompt_ids(rows[:1], tokenizer)
    assert isinstance(prompt, InvalidRow)


def test_a_template_that_takes_too_long_for_a_row_ends_the_run_at_once(quick, tmp_path):
    tokenizer = tokenizer_with(for_row("slow", LOOP))
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


def test_a_template_that_always_takes_too_long_is_refused_with_the_tokenizer(quick):
    with pytest.raises(UnusableTemplate, match="^the chat template of the tokenizer takes more than 0.3 s"):
        loss_mask.template_of(tokenizer_with(LOOP))


def test_the_time_limit_leaves_timers_and_handlers_as_they_are_and_other_threads_have_none(quick):
    def handler(signum, frame):
        pass

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    tokenizer, outcomes = tokenizer_with(for_row("slow", LOOP)), []
    try:
        with pytest.raises(UnusableTemplate):
            list(loss_mask.tokenise_examples([asked("r:1", "slow")], tokenizer))
        assert signal.getsignal(signal.SIGALRM) is handler
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000

        def render():
            outcomes.extend(loss_mask.tokenise_examples([asked("r:1", "quick")], tokenizer))

        thread = threading.Thread(target=render)
        thread.start()
        thread.join()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(outcomes) == 1 and not isinstance(outcomes[0], InvalidRow)


def test_one_row_of_very_many_turns_is_refused_at_once():
    """Each learned turn is looked for in renderings of all messages before it."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": "a"} for i in range(60_000)]
    begin = time.monotonic()
    (row,) = loss_mask.tokenise_examples([Chat("r:1", tuple(turns), 59_999)], tiny("chatml"), "assistant")
    assert "r:1: 30000 learned turns in 60000 messages take too long" in str(row)
    assert time.monotonic() - begin < 60


def test_a_text_that_would_take_gigabytes_to_tokenise_is_refused():
    huge = "a b" * (template.LONGEST_TEXT // 3 + 1)
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
    whole = list(loss_mask.tokenise_examples(examples, tokenizer))
    monkeypatch.setattr(loss_mask, "LONGEST_TEXT", 500)
    monkeypatch.setattr(loss_mask, "TEXT_PIECE", 256)
    monkeypatch.setattr(loss_mask, "OVERLAP", 64)
    pieces = list(loss_mask.tokenise_examples(examples, tokenizer))
    for one, other in zip(whole, pieces, strict=True):
        assert one.ids.tolist() == other.ids.tolist() and one.learned.all() and other.learned.all()
    (row,) = loss_mask.tokenise_examples([Text("r:9", " " * 2000)], tiny("none"))
    assert "no token begins near character 288" in str(row)


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
