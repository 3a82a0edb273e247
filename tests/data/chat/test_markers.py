"""{% generation %} markers: exactly the assistant turns are learned, whatever else they enclose."""

import pytest
from chat_templates import TEMPLATES, TOOLS, conversations
from hypothesis import given, settings
from hypothesis import strategies as st
from stock_turns import Turn, as_json, messages_of
from tiny_tokenizers import tiny

from jaxft.data.chat import loss_mask
from jaxft.data.rows.example import Chat

ON, OFF = "{% generation %}", "{% endgeneration %}"
HEAD, CONTENT, END = "{{ '<|im_start|>' + m.role + '\n' }}", "{{ m.content or '' }}", "{{ '<|im_end|>' }}"
CALLS = "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) }}{% endfor %}"
OTHERS = (  # where the markers of a user's, system or tool turn are
    HEAD + CONTENT + END,
    HEAD + ON + CONTENT + OFF + END,
    HEAD + ON + CONTENT + END + OFF,
    ON + HEAD + CONTENT + END + OFF,
)
ASSISTANT = (  # the whole turn is marked
    HEAD + ON + CONTENT + CALLS + OFF + END,
    HEAD + ON + CONTENT + CALLS + END + OFF,
    ON + HEAD + CONTENT + CALLS + END + "\n" + OFF,
    HEAD + ON + CONTENT + OFF + ON + CALLS + END + OFF,
)
UNMARKED_CALLS = HEAD + ON + CONTENT + OFF + CALLS + ON + END + OFF


def template(assistant, others, rest=""):
    tokenizer = tiny.__wrapped__("chatml")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    roles = "".join(
        f"{{% elif m.role == '{role}' %}}{text}" for role, text in zip(("user", "tool", "system"), others)
    )
    tokenizer.chat_template = (
        f"{rest}{{% for m in messages %}}{{% if m.role == 'assistant' %}}{assistant}{roles}{{% endif %}}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return loss_mask.template_of(tokenizer)


def learned(found, turns, loss_on="assistant"):
    row = Chat("rows.jsonl:7", messages_of(turns), len(turns) - 1, tools=TOOLS)
    rendered = loss_mask.render(row, found, loss_on)
    return [rendered.text[a:b].strip() for a, b in rendered.learned]


def shown(turn):
    """What the templates render of an assistant turn."""
    calls = (as_json({"name": name, "arguments": arguments}) for name, arguments in turn.calls)
    return (turn.content or "") + "".join(f"<tool_call>{call}" for call in calls) + "<|im_end|>"


def joined(texts):
    return "".join("".join(texts).split())


@settings(max_examples=60, deadline=None)
@given(
    turns=conversations(),
    assistant=st.sampled_from(ASSISTANT),
    others=st.tuples(*[st.sampled_from(OTHERS)] * 3),
    loss_on=st.sampled_from(["assistant", "completion"]),
)
def test_turns_of_others_that_are_marked_too_are_not_learned(turns, assistant, others, loss_on):
    turns = [Turn(turn.role, turn.content, calls=turn.calls) for turn in turns]
    answers = [shown(turn) for turn in turns if turn.role == "assistant"]
    expected = answers if loss_on == "assistant" else answers[-1:]
    assert joined(learned(template(assistant, others), turns, loss_on)) == joined(expected)


QUESTION, ANSWER = Turn("user", "yes"), Turn("assistant", "yes")


def test_markers_around_the_users_turns_alone_are_refused_even_if_both_say_the_same():
    users = template(HEAD + CONTENT + END, [OTHERS[2]] * 3)
    with pytest.raises(ValueError, match="markers do not enclose message 1, an assistant turn"):
        learned(users, (QUESTION, ANSWER))


def test_a_tool_call_between_two_marked_ranges_is_missed():
    found = template(UNMARKED_CALLS, [OTHERS[0]] * 3)
    assert joined(learned(found, (QUESTION, ANSWER))) == "yes<|im_end|>"
    with pytest.raises(ValueError, match="does not show the name of tool call 1 of message 1"):
        learned(found, (QUESTION, Turn("assistant", "yes", calls=(("rank", {"name": "A"}),))))


def test_one_range_for_each_turn_costs_no_further_rendering(monkeypatch):
    found = loss_mask.template_of(TEMPLATES["marked"].tokenizer())
    count = []
    render = loss_mask.render_messages.__globals__["_render"]
    monkeypatch.setitem(
        loss_mask.render_messages.__globals__, "_render", lambda *a, **k: count.append(1) or render(*a, **k)
    )
    learned(found, (QUESTION, ANSWER))
    assert len(count) == 2  # the text, and each part as a word of its own
