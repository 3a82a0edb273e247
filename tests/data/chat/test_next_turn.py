"""The tokens between two turns: what the template adds, and nothing of what is before it."""

import pytest
from chat_templates import ARGUMENTS, NAMES, TEMPLATES, TOOLS, WORD, stock_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from stock_turns import HIDDEN, Rejected, Turn, messages_of
from tiny_tokenizers import tiny

from jaxft.data.chat.loss_mask import example_prompt_ids
from jaxft.data.chat.next_turn import TurnWording, next_prompt, restart_notes
from jaxft.data.chat.template import render_messages, template_of
from jaxft.data.row_settings import DEFAULT_TEMPLATE_SETTINGS
from jaxft.data.rows.example import Chat
from jaxft.data.rows.invalid_rows import InvalidRow


def conversation(messages, tools=None):
    return Chat("rows.jsonl:7", tuple(messages), len(messages), tools=tools)


@st.composite
def exchanges(draw):
    """Turns up to an assistant's, and what answers it: results of its calls, or the user."""
    turns = [Turn("system", draw(WORD))] if draw(st.booleans()) else []
    turns.append(Turn("user", draw(WORD)))
    if draw(st.booleans()):
        turns += [Turn("assistant", draw(WORD)), Turn("user", draw(WORD))]
    calls = tuple(draw(st.lists(st.tuples(NAMES, ARGUMENTS), max_size=2)))
    thought = draw(WORD) if draw(st.integers(0, 3)) == 0 else ""
    turns.append(Turn("assistant", draw(WORD) if not calls else "", thought, False, calls))
    answers = [Turn("tool", draw(WORD)) for _ in calls] or [Turn("user", draw(WORD))]
    return turns, answers


@pytest.mark.quick_cases("llama3.1", "phi3", "qwen2.5", "qwen3", "deepseek-v3", "mistral-nemo", "marked")
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(exchange=exchanges(), stopped=st.booleans())
def test_ids_so_far_and_the_suffix_are_the_rendered_conversation(name, exchange, stopped):
    """Prompt, the turn as the template writes it, and the suffix: together the text of the whole."""
    (before, answers), tokenizer, how = exchange, stock_tokenizer(name), TEMPLATES[name].settings
    turns = (*before, *answers)
    tools = TOOLS if before[-1].calls else None
    *prompt, turn = messages_of(before)
    template = template_of(tokenizer, how).of_chat(conversation(prompt, tools))
    try:
        shown = TEMPLATES[name].shown(turns, len(before) - 1)
        whole = render_messages(template, messages_of(turns), tools, generation=True)
        start = render_messages(template, prompt, tools, generation=True)
    except (Rejected, Exception) as error:
        assert isinstance(error, (Rejected, ValueError, TypeError)) or "Template" in type(error).__name__
        return
    ways = [TurnWording(turn, messages_of(turns)[len(before) :])]
    found = next_prompt(conversation(prompt, tools), ways, stopped, tokenizer, how)
    assert found.messages == messages_of(turns)
    text = tokenizer.decode(found.ids)
    if found.restarts:
        hidden = shown is HIDDEN or any(
            "".join(a.text.split()) not in "".join(whole.split()) for a in answers
        )
        assert hidden or not whole.startswith(start) or not shows(whole, start, shown)
        assert text == whole
        return
    end = next((x for x in template.ends if shown.endswith(x)), "")
    given_end = end if not stopped else ""
    assert whole.startswith(start) and whole.endswith(text.removeprefix(given_end))
    sampled = whole[len(start) : len(whole) - len(text)] + given_end
    assert sampled.strip() == shown.strip()


def shows(whole, start, shown):
    """Whether a turn follows its prompt, up to whitespace that the template adds."""
    return whole.removeprefix(start).lstrip().startswith(shown.strip())


QUESTION = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
WHY = {"role": "user", "content": "Why?"}


def suffix(name, turn, answers, stopped=True, messages=(QUESTION,), tools=None):
    tokenizer = stock_tokenizer(name)
    ways = [TurnWording(turn, tuple(answers))]
    found = next_prompt(conversation(messages, tools), ways, stopped, tokenizer, TEMPLATES[name].settings)
    return found, tokenizer.decode(found.ids)


def test_a_stop_token_that_was_not_sampled_is_given():
    """A turn that ended at its limit gets the end that the template writes."""
    rest = "\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert suffix("qwen2.5", ANSWER, [WHY])[1] == rest
    assert suffix("qwen2.5", ANSWER, [WHY], stopped=False)[1] == "<|im_end|>" + rest


def test_a_turn_without_text_is_continued():
    rest = "\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    found, text = suffix("qwen2.5", {"role": "assistant", "content": ""}, [WHY])
    assert not found.restarts and text == rest


def test_a_template_that_cuts_reasoning_begins_a_new_row_at_the_next_question():
    """Qwen 3 shows reasoning after the last question alone: a tool's result keeps it, a question drops it."""
    thinking = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"}
    result = {"role": "tool", "content": "4"}
    kept, text = suffix("qwen3", thinking, [result])
    assert not kept.restarts and text.startswith("\n<|im_start|>user\n<tool_response>\n4")
    cut, text = suffix("qwen3", thinking, [WHY])
    assert cut.restarts and "hm" not in text and text.endswith("Why?<|im_end|>\n<|im_start|>assistant\n")
    (again,) = example_prompt_ids([conversation([QUESTION, thinking, WHY])], stock_tokenizer("qwen3"))
    assert cut.ids == again


def test_the_first_way_that_the_template_shows_is_used():
    """ChatML has no tool calls: the turn is written as text."""
    calling = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
    }
    plain = {"role": "assistant", "content": "<tool_call>f</tool_call>"}
    ways = [TurnWording(calling, (WHY,)), TurnWording(plain, (WHY,))]
    found = next_prompt(
        conversation([QUESTION]), ways, True, stock_tokenizer("chatml"), DEFAULT_TEMPLATE_SETTINGS
    )
    assert not found.restarts and found.messages == (QUESTION, plain, WHY)


def test_an_answer_that_the_template_drops_is_shown_in_another_way():
    """Phi 3 renders no tool's message."""
    plain, result = {"role": "assistant", "content": "f()"}, {"role": "tool", "content": "7"}
    ways = [TurnWording(plain, ({**result, "role": role},)) for role in ("tool", "user")]
    tokenizer = stock_tokenizer("phi3")
    found = next_prompt(conversation([QUESTION]), ways, True, tokenizer, DEFAULT_TEMPLATE_SETTINGS)
    assert tokenizer.decode(found.ids) == "\n<|user|>\n7<|end|>\n<|assistant|>\n"


def test_rejected_messages_name_the_row():
    with pytest.raises(InvalidRow, match="rows.jsonl:7: the chat template of stock/gemma rejects"):
        suffix("gemma", ANSWER, [ANSWER])


def test_a_tokenizer_without_a_template_has_no_second_turn():
    with pytest.raises(InvalidRow, match="a further turn needs a chat template; set chat_template=chatml"):
        next_prompt(conversation([QUESTION]), [TurnWording(ANSWER, (WHY,))], True, tiny("none"),
                    DEFAULT_TEMPLATE_SETTINGS)  # fmt: skip


def test_a_note_names_the_turns_after_which_a_new_row_begins():
    (note,) = restart_notes(TOOLS, stock_tokenizer("qwen3"), DEFAULT_TEMPLATE_SETTINGS)
    assert "rewrites earlier turns after a turn with a <think> block that the user answers: a new" in note
    assert restart_notes(TOOLS, stock_tokenizer("qwen2.5"), DEFAULT_TEMPLATE_SETTINGS) == ()
    assert restart_notes([], tiny("none"), DEFAULT_TEMPLATE_SETTINGS) == ()
