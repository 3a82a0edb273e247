"""Columns as public files have them: JSON that is a text, other names of roles, nulls, empty turns."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parsed_rows import examples, pairs
from tiny_tokenizers import tiny

from jaxft.data.chat import loss_mask
from jaxft.data.rows import columns
from jaxft.data.rows.format_choice import prompt_of
from jaxft.data.rows.invalid_rows import InvalidRow
from jaxft.data.rows.row_files import Row

CALLS = json.dumps([{"name": "get_weather", "arguments": {"city": "Rome"}}])
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def sft(fields):
    (example,) = examples([Row("r:1", fields)])
    return example


def pair(fields):
    return pairs([Row("r:1", fields)])[0].examples


def contents(example):
    return [message["content"] for message in example.messages]


@pytest.mark.parametrize("text", [CALLS, '[{"role": "nurse", "content": "x"}]', '[{"from": 1, "value": 2}]'])
def test_a_string_that_is_a_json_list_of_other_objects_is_a_text(text):
    assert contents(sft({"instruction": "q", "response": text})) == ["q", text]
    assert contents(sft({"prompt": text, "completion": text})) == [text, text]
    assert contents(prompt_of(Row("r:1", {"prompt": text}))) == [text]
    responses = pair({"prompt": text, "chosen": text, "rejected": "no"})
    assert [contents(r) for r in responses.values()] == [[text, text], [text, "no"]]


def test_a_json_string_of_messages_is_messages():
    for turns in (MESSAGES, [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]):
        assert contents(sft({"messages": json.dumps(turns)})) == ["q", "a"]
        assert contents(sft({"prompt": json.dumps(turns[:1]), "completion": "a"})) == ["q", "a"]


NAMES = {
    "user": ("user", "human", "Human"),
    "assistant": ("gpt", "GPT", "chatgpt", "bing", "bard", "Assistant"),
    "system": ("system", "System"),
    "tool": ("observation", "ipython", "Tool"),
}
ROLE_AND_NAME = st.sampled_from([(role, name) for role, names in NAMES.items() for name in names])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([(r, n) for r, names in NAMES.items() for n in names]), min_size=1, max_size=6)
)
def test_every_usual_name_of_a_role_becomes_that_role_and_is_learned(turns):
    named = [{"from": name, "value": f"text {i}"} for i, (_, name) in enumerate(turns)]
    chats = sft({"conversations": [*named, {"from": "gpt", "value": "a"}]})
    assert [m["role"] for m in chats.messages] == [role for role, _ in turns] + ["assistant"]
    rendered = loss_mask.render(chats, loss_mask.template_of(tiny("chatml")), "assistant")
    assert len(rendered.learned) == 1 + sum(role == "assistant" for role, _ in turns)


@settings(max_examples=40, deadline=None)
@given(st.text(min_size=1, max_size=12))
def test_another_role_is_an_invalid_row_that_names_it(name):
    known = {n.lower() for names in NAMES.values() for n in names}
    if name.strip().lower() in known | {"gpt", "model", "bot", "tool", "developer"}:
        return
    with pytest.raises(InvalidRow, match=r"messages\[0\] has role .*; use user, assistant") as raised:
        sft({"messages": [{"role": name, "content": "x"}, *MESSAGES]})
    assert repr(name) in str(raised.value)


def test_the_readme_lists_every_name_of_a_role():
    text = (Path(__file__).parents[3] / "configs/README.md").read_text(encoding="utf-8")
    table = [line.split("|") for line in text.partition("| role | other names |")[2].splitlines()[2:7]]
    names = {line[1].strip(): re.findall(r"`(\w+)`", line[2]) for line in table if len(line) == 4}
    assert [role for cell in names for role in re.findall(r"`(\w+)`", cell)] == list(columns.KNOWN_ROLES)
    for role in ("user", "assistant", "tool"):
        assert names[f"`{role}`"] == [name for name, known in columns.ROLES.items() if known == role]


def test_without_an_assistant_turn_the_roles_are_named():
    with pytest.raises(InvalidRow, match="no assistant turn, only turns of the roles system, user"):
        loss_mask.render(
            sft({"messages": [{"role": "system", "content": "s"}, MESSAGES[0]]}),
            loss_mask.template_of(tiny("chatml")),
            "assistant",
        )


def test_conversations_of_roles_and_contents_are_read():
    assert contents(sft({"conversations": MESSAGES})) == ["q", "a"]


@pytest.mark.parametrize("function", [{"name": None}, {"name": " "}, {"arguments": {}}, None])
def test_a_tool_call_needs_a_name(function):
    call = {"type": "function"} | ({} if function is None else {"function": function})
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    with pytest.raises(InvalidRow, match=r"messages\[1\] calls a tool without a name"):
        sft({"messages": [MESSAGES[0], turn]})


EMPTY = {"role": "user", "content": " "}
ALL_STAGES = (
    lambda turns: sft({"prompt": turns, "completion": "a"}),
    lambda turns: sft({"messages": [*turns, MESSAGES[1]]}),
    lambda turns: pair({"prompt": turns, "chosen": "a", "rejected": "b"}),
    lambda turns: prompt_of(Row("r:1", {"prompt": turns})),
    lambda turns: prompt_of(Row("r:1", {"messages": [*turns, MESSAGES[1]]})),
)


@pytest.mark.parametrize("read", ALL_STAGES)
def test_an_empty_last_question_is_invalid_at_every_stage_and_an_earlier_one_at_none(read):
    read([EMPTY, MESSAGES[1], MESSAGES[0]])
    with pytest.raises(InvalidRow, match="the prompt ends with an empty user turn"):
        read([EMPTY])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"instruction": "q", "response": 3}, "column 'response' is of type int; use a string or a list"),
        ({"prompt": None, "completion": "a"}, "column 'prompt' is null"),
        ({"instruction": None, "response": "a"}, "column 'instruction' is null; fill it or remove the row"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, MESSAGES[1]]},
            r"messages\[0\] has a content part of type 'image_url'; only text is supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"text": "q"}]}, MESSAGES[1]]},
            r"messages\[0\] has a content part without a type",
        ),
        *(
            (
                {"messages": [{"role": "user", "content": [{"type": "text", **part}]}, MESSAGES[1]]},
                r"messages\[0\] has a content part whose text is no string",
            )
            for part in ({"text": {"a": 1}}, {"text": 3}, {"text": None}, {})
        ),
    ],
)
def test_what_is_no_text_is_named(fields, message):
    with pytest.raises(InvalidRow, match=message):
        sft(fields)


def test_a_prompt_that_is_null_is_the_reason_that_a_rollout_counts():
    for read in (pair, lambda fields: prompt_of(Row("r:1", fields))):
        with pytest.raises(InvalidRow, match="column 'prompt' is null") as raised:
            read({"prompt": None, "chosen": "a", "rejected": "b"})
        assert raised.value.reason == "null in column 'prompt'"


@pytest.mark.parametrize("name", ["bos_token", "pad_token", "raise_exception", "namespace", "strftime_now"])
def test_arguments_may_not_replace_what_the_tokenizer_or_jinja_defines(name):
    with pytest.raises(InvalidRow, match=f"column 'chat_template_kwargs' has {name}, which jaxft or the"):
        sft({"prompt": "q", "completion": "a", "chat_template_kwargs": {name: "x"}})
