"""Chat templates of well-known models: every learned turn is shown in full, or the row is refused."""

import json
from functools import cache
from pathlib import Path

import pytest
from chat_templates import TEMPLATES, TOOLS, conversations, stock_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from parsed_rows import examples
from stock_turns import HIDDEN, Rejected, Turn, messages_of

from jaxft.data.chat import loss_mask
from jaxft.data.pairs import PairRows
from jaxft.data.rows.example import Chat
from jaxft.data.rows.row_files import Row
from jaxft.data.sft import Rows


def row(turns, tools=None):
    """The response is the last assistant turn."""
    return Chat("rows.jsonl:7", messages_of(turns), len(turns) - 1, tools=tools)


def expected(name, turns, loss_on):
    """The texts of the learned turns; None if one of them is hidden, Rejected if the template raises."""
    learned = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    try:
        texts = [TEMPLATES[name].shown(turns, i) for i in learned[-1 if loss_on == "completion" else 0 :]]
    except Rejected:
        return Rejected
    return None if HIDDEN in texts else texts


def squeezed(text):
    return "".join(text.split())


@pytest.mark.quick_cases(
    "llama3.1", "gemma", "phi3", "qwen3", "deepseek-r1", "mistral-nemo", "marked", "smolvlm"
)
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(turns=conversations(), loss_on=st.sampled_from(["assistant", "completion"]))
def test_exactly_the_assistant_turns_are_learned_or_the_row_is_refused(name, turns, loss_on):
    check_learned(name, stock_tokenizer(name), turns, loss_on)


def check_learned(name, tokenizer, turns, loss_on):
    tools, settings = TOOLS if any(turn.calls for turn in turns) else None, TEMPLATES[name].settings
    texts = expected(name, turns, loss_on)
    template = loss_mask.template_of(tokenizer, settings)
    if texts is None or texts is Rejected:
        problem = "rejects the row" if texts is Rejected else "misrenders a turn that is trained on"
        with pytest.raises(ValueError, match=f"rows.jsonl:7: the chat template of stock/{name} {problem}"):
            loss_mask.render(row(turns, tools), template, loss_on)
        return
    rendered = loss_mask.render(row(turns, tools), template, loss_on)
    assert [rendered.text[start:end].strip() for start, end in rendered.learned] == texts
    ((ids, learned, _),) = loss_mask.tokenise_examples([row(turns, tools)], tokenizer, loss_on, settings)
    end = tokenizer.eos_token if rendered.end else ""  # of a last turn that the template does not end
    assert squeezed(tokenizer.decode(ids[learned].tolist())) == squeezed("".join(texts) + end)


OF_TRL = {
    "llama3.0": "llama3", "gemma": "gemma", "gemma3": "gemma3", "phi3": "phi3", "qwen2.5": "qwen2_5",
    "qwen3": "qwen3", "qwen3-no-thinking": "qwen3", "deepseek-r1-distill": "deepseek_r1_distill",
}  # fmt: skip


@pytest.mark.quick_cases("qwen2.5", "gemma3")
@pytest.mark.parametrize("name", OF_TRL)
@settings(max_examples=30, deadline=None)
@given(turns=conversations(), loss_on=st.sampled_from(["assistant", "completion"]))
def test_the_same_is_learned_in_the_copies_that_trl_ships(name, turns, loss_on):
    check_learned(name, tokenizer_of_trl(name), turns, loss_on)


@cache
def tokenizer_of_trl(name):
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    tokenizer = TEMPLATES[name].tokenizer()
    tokenizer.chat_template = (folder / f"{OF_TRL[name]}.jinja").read_text()
    tokenizer.name_or_path = f"stock/{name}"
    return tokenizer


CALL = ("rank", {"name": "A"})
QUESTION, ANSWER, RESULT = Turn("user", "q"), Turn("assistant", "two"), Turn("tool", "3")


def changed(name, old, new):
    """The template `name` with one passage replaced."""
    tokenizer = TEMPLATES[name].tokenizer()
    assert old in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    return loss_mask.template_of(tokenizer)


def test_ends_are_found_in_a_template_that_requires_a_system_message():
    required = "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    template = changed("llama3.0", "{% for m in messages %}", required + "{% for m in messages %}")
    assert template.ends == template.last_ends == ("<|eot_id|>",)
    turns = (Turn("system", "s"), QUESTION, ANSWER, QUESTION, ANSWER)
    rendered = loss_mask.render(row(turns), template, "assistant")
    assert [rendered.text[a:b] for a, b in rendered.learned] == ["two<|eot_id|>"] * 2


def test_a_second_call_with_the_same_arguments_is_missed():
    template = changed("qwen2.5", "for call in m.tool_calls or []", "for call in (m.tool_calls or [])[:1]")
    turns = (QUESTION, Turn("assistant", "", calls=(CALL, CALL)))
    with pytest.raises(ValueError, match="does not show the name of tool call 2 of message 1"):
        loss_mask.render(row(turns), template)


def test_a_part_that_occurs_in_the_text_by_chance_is_missed():
    template = changed("qwen3", "+ content.lstrip('\n') }}", "}}")
    with pytest.raises(ValueError, match="does not show the content of message 1"):
        loss_mask.render(row((QUESTION, Turn("assistant", "think"))), template)


def test_a_turn_without_an_end_is_refused_unless_it_is_the_last():
    template = changed("deepseek-v3", "{{- '<｜tool▁calls▁end｜>' + eos_token }}", "")
    calling = Turn("assistant", "", calls=(CALL,))
    with pytest.raises(ValueError, match="does not end message 1, an assistant turn, with '<｜end▁of▁sent"):
        loss_mask.render(row((QUESTION, calling, RESULT, ANSWER)), template, "assistant")
    last = loss_mask.render(row((QUESTION, calling)), template, "assistant")
    assert last.end and last.text.endswith("<｜tool▁call▁end｜>")  # EOS is added


def test_markers_that_enclose_more_than_the_turn_are_refused():
    template = changed("marked", "{% endgeneration %}", "{{- 'Bye.' }}{% endgeneration %}")
    with pytest.raises(ValueError, match="generation markers enclose 'Bye.' after the end of message 1"):
        loss_mask.render(row((QUESTION, ANSWER)), template)


@pytest.mark.parametrize("content", ["m.content or ''", "m.content | string", "'' + m.content"])
def test_null_beside_tool_calls_is_rendered_as_an_empty_text_where_a_template_needs_one(content):
    """OpenAI's rows have it; a template prints the word None for it, or fails."""
    null, empty = ((QUESTION, Turn("assistant", x, calls=(CALL,)), RESULT, ANSWER) for x in (None, ""))
    template = changed("qwen2.5", "m.content or ''", content)
    assert template.needs_content == (content != "m.content or ''")
    for loss_on in ("assistant", "completion"):
        rendered = loss_mask.render(row(null), template, loss_on)
        assert rendered == loss_mask.render(row(empty), changed("qwen2.5", "", ""), loss_on)
        assert "None" not in rendered.text and "rank" in rendered.text


@pytest.mark.parametrize("content", [None, ""])
def test_a_template_that_drops_tool_calls_is_reported_with_one_that_shows_them(content):
    turns = (QUESTION, Turn("assistant", content, calls=(CALL,)))
    with pytest.raises(ValueError, match="does not show the name of tool call 1 .*; set chat_template=qwen"):
        loss_mask.render(row(turns), loss_mask.template_of(stock_tokenizer("chatml")))


def test_content_that_is_null_stays_null():
    call = {"type": "function", "function": {"name": "rank", "arguments": {}}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    (example,) = examples([Row("rows.jsonl:1", {"messages": messages})])
    assert example.messages[1]["content"] is None


@pytest.mark.quick_cases("chatml", "qwen3", "deepseek-r1")
@pytest.mark.parametrize("name", TEMPLATES)
def test_tools_that_change_nothing_in_the_text_are_a_warning(name, tmp_path):
    messages = [{"role": role, "content": "q"} for role in ("user", "assistant")]
    pair = {"prompt": messages[:1], "chosen": "a", "rejected": "b", "tools": TOOLS}
    (tmp_path / "r.jsonl").write_text(
        "\n".join(json.dumps({"messages": messages, **more}) for more in ({}, {"functions": TOOLS}))
    )
    (tmp_path / "p.jsonl").write_text(json.dumps(pair) + "\n" + json.dumps({**pair, "chosen": "c"}))
    has_tools = name.startswith(("llama3.1", "mistral", "qwen", "marked", "smollm3", "olmo3", "granite"))
    rows = Rows(str(tmp_path / "r.jsonl"), columns=("tools=functions",), held_out=None)
    pairs = PairRows(str(tmp_path / "p.jsonl"), held_out=None, batch=1)
    sources = [(rows, "r.jsonl:2"), (rows, "r.jsonl:2")]  # the second from the cache
    if not name.startswith("deepseek-r1"):  # see the test below
        sources.append((pairs, "p.jsonl:1"))
    for data, first in sources:
        warnings = data.open(stock_tokenizer(name), cache=tmp_path).info.warnings
        warnings = [w for w in warnings if "ends a prompt" not in w]
        text = (
            f"warning: {first}: the chat template of stock/{name} renders the prompt without the row's tools"
        )
        assert not warnings if has_tools else [w.startswith(text) for w in warnings] == [True]


@pytest.mark.quick_cases("qwen3", "deepseek-r1")
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_that_training_does_not_show_is_a_warning(name, tmp_path):
    messages = [{"role": role, "content": "q"} for role in ("user", "assistant")]
    (tmp_path / "r.jsonl").write_text(json.dumps({"messages": messages}))
    data = Rows(str(tmp_path / "r.jsonl"), held_out=None)
    warnings = data.open(stock_tokenizer(name), cache=tmp_path).info.warnings
    if name.startswith("deepseek-r1"):  # generation begins in a thinking block, training without one
        (warning,) = warnings
        assert f"stock/{name} ends a prompt with '<think>\\n', which is not in front of" in warning
    else:
        assert not warnings


def test_the_remedy_for_an_earlier_turn_is_to_learn_the_last_response():
    turns = (QUESTION, Turn("assistant", "one", "why"), QUESTION, ANSWER)
    template = loss_mask.template_of(stock_tokenizer("qwen3"))
    with pytest.raises(
        ValueError, match="does not show the thinking block of message 1.*data.loss_on=completion"
    ):
        loss_mask.render(row(turns), template, "assistant")
    loss_mask.render(row(turns), template, "completion")
