"""Tool calls in completions: those that the families' templates render come back; all else remains text."""

import json

import pytest
import tiny_served as tiny
from chat_templates import TEMPLATES, stock_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from stock_turns import Turn

from jaxft.data.chat.template import template_of
from jaxft.data.chat.tool_calls import CallStream, call_format, template_tool_format
from jaxft.engine.sampling import Sampling
from jaxft.engine.scheduler import NewTokens, SampledToken, Ticket
from jaxft.serve.generation import choice_texts
from jaxft.serve.openai_api import ChoiceSettings
from jaxft.serve.served_models import ServedModel

CALLS = (("weather", {"city": "Zürich", "days": [1, 2]}), ("send", {}))
FAMILIES = {
    "qwen2.5": "hermes", "qwen3": "hermes", "llama3.1": "llama3", "mistral": "mistral",
    "mistral-7b-v0.3": "mistral", "mistral-nemo": "mistral", "mistral-small": "mistral", "chatml": "none",
    "gemma": "none", "phi4": "none",
}  # fmt: skip


def streamed(format, text, size=3):
    """(text, [(name, arguments)]) of a completion that arrives in pieces of `size` characters."""
    stream = CallStream(call_format(format))
    kept, calls = "", []
    for at in range(0, max(len(text), 1), size):
        piece, found = stream.add(text[at : at + size], at + size >= len(text))
        kept, calls = kept + piece, calls + list(found)
    assert [call.index for call in calls] == list(range(len(calls))) and stream.count == len(calls)
    assert len({call.id for call in calls}) == len(calls)
    return kept, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_calls_that_a_template_renders_are_parsed_again(family):
    """From its tokens, so that special tokens which are a part of the format are seen."""
    tokenizer = stock_tokenizer(family)
    format = template_tool_format(template_of(tokenizer).source)
    assert format == FAMILIES[family]
    if format == "none":
        assert call_format(format) is None
        return
    calls = CALLS[:1] if family == "llama3.1" else CALLS  # whose template allows one
    text = TEMPLATES[family].shown([Turn("user", "a"), Turn("assistant", None, calls=calls)], 1)
    model = ServedModel("m", tokenizer, (), len(tokenizer), tools=format)
    for size in (1, 4):
        (choice,) = choice_texts(model, ChoiceSettings(Sampling(999), 0, (), 1, None), 1, True)
        ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        parts = [ids[at : at + size] for at in range(0, len(ids), size)]
        pieces = [
            choice.piece(
                NewTokens(tuple(SampledToken(i, 0.0) for i in part), "stop" if part is parts[-1] else None)
            )
            for part in parts
        ]
        found = [(call.name, json.loads(call.arguments)) for piece in pieces for call in piece.calls]
        assert tuple(found) == calls and pieces[-1].finish == "tool_calls"
        assert "".join(piece.text for piece in pieces).strip() in ("", "<think>\n\n</think>")
        assert {len(call.id) for piece in pieces for call in piece.calls} == {
            9 if format == "mistral" else 29
        }


FOUND = [  # format, completion, text, calls
    ("hermes", 'Wait.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "Wait.", ["f"]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}\n', "", ["f"]),  # it stopped before the end tag
    ("hermes", '<tool_call>{"name": "f", "parameters": {}}</tool_call>\n\nDone. ', "\n\nDone. ", ["f"]),
    ("hermes", '<tool_call>[{"name": "f", "arguments": "{}"}, {"name": "g", "arguments": {}}]</tool_call>',
     "", ["f", "g"]),
    ("hermes", '<tool_call>no</tool_call> <tool_call>{"name": "g", "arguments": {}}</tool_call>',
     "<tool_call>no</tool_call>", ["g"]),
    ("hermes", '<tool_call>say "x</tool_call> <tool_call>{"name": "g", "arguments": {}}</tool_call>',
     '<tool_call>say "x</tool_call>', ["g"]),  # a string without an end
    ("hermes", '<tool_call>{"a": "\n</tool_call><tool_call>{"name": "g", "arguments": {}}</tool_call>',
     '<tool_call>{"a": "\n</tool_call>', ["g"]),
    ("llama3", '<|python_tag|>{"name": "f", "parameters": {"a": "}"}}; {"name": "g", "parameters": {}}',
     "", ["f", "g"]),
    ("llama3", '\n{"name": "f", "arguments": {}}', "", ["f"]),
    ("mistral", 'So[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g{"b": 1}', "So", ["f", "g"]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", ["f"]),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]aB3[ARGS]{}', "", ["f"]),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "x"}]', "", ["f"]),
]  # fmt: skip
MARKS = ["</tool_call>", "<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", '"', "\\", '\\"', "</tool_", "{"]
TEXT = [
    ("hermes", " \n"), ("hermes", "a < b <tool"), ("hermes", '{"name": "f", "arguments": {}}'),
    ("hermes", "<tool_call>\n</tool_call> "), ("llama3", '{"name": "f"}'),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes", "<tool_call>[]</tool_call>"),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>'),
    ("hermes", "<tool_call>" + "[" * 20_000), ("hermes", f"<tool_call>{'9' * 5000}</tool_call>"),
    ("llama3", '{"name": "f", "parameters": {}} is JSON'), ("llama3", '{"name": "f"'), ("llama3", '{"a": 1}'),
    ("llama3", 'See: {"name": "f", "parameters": {}}'), ("llama3", "<|python_tag|>f.call(a=1)"),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": '), ("mistral", "[TOOL_CALLS]"), ("mistral", "[TOOL_CALLS][1]"),
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 5, 10_000])
def test_calls_and_the_text_around_them_do_not_depend_on_the_pieces(size):
    for format, completion, text, names in FOUND:
        kept, calls = streamed(format, completion, size)
        assert (kept, [name for name, _ in calls]) == (text, names), completion


@given(st.sampled_from([1, 2, 999]), st.lists(st.sampled_from([*MARKS, " a"]), max_size=4).map("".join))
def test_a_mark_within_a_string_does_not_end_the_call(size, words):
    arguments, (name, more) = json.dumps({"a": words, words: [words]}), CALLS[0]
    other = json.dumps({"name": name, "arguments": more})
    hermes = (
        f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>\n<tool_call>{other}</tool_call>'
    )
    mistral = f"[TOOL_CALLS]f[ARGS]{arguments}[TOOL_CALLS]{name}{json.dumps(more)}"
    llama = f'<|python_tag|>{{"name": "f", "parameters": {arguments}}}<|python_tag|>{other}'
    for format, text in (("hermes", hermes), ("mistral", mistral), ("llama3", llama)):
        calls = [("f", {"a": words, words: [words]}), CALLS[0]]
        assert streamed(format, f"So {text}", size) == ("So", calls)


@pytest.mark.parametrize("size", [1, 5, 50_000])
def test_a_malformed_call_remains_text(size):
    for format, completion in TEXT:
        assert streamed(format, completion, size) == (completion, []), completion


PARTS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "[ARGS]", "f", " ", "\n", "{", "}", "<",
    '{"name": "f", "arguments": {}}', "[", "]", ";", "text",
]  # fmt: skip


@given(st.sampled_from(["hermes", "llama3", "mistral"]), st.lists(st.sampled_from(PARTS), max_size=8))
def test_any_completion_is_parsed_alike_whatever_its_pieces(format, parts):
    text = "".join(parts)
    whole = streamed(format, text, 1000)
    assert streamed(format, text, 1) == streamed(format, text, 4) == whole
    assert whole[1] or whole[0] == text


def test_text_before_a_call_is_not_delayed():
    stream = CallStream(call_format("hermes"))
    pieces = [stream.add(text, False) for text in ("Let", " me", " look", ". ", "<", "b> ", "<tool_")]
    assert [text for text, _ in pieces] == ["Let", " me", " look", ".", "", " <b>", ""]
    _, (call,) = stream.add('call>{"name": "f", "arguments": {}}</tool_call>', False)
    assert call.name == "f" and stream.add(" ", True) == ("", ())


def test_without_tools_the_same_completion_is_text():
    model = ServedModel("m", tiny.TOKENIZER, (), len(tiny.TOKENIZER), tools="hermes")
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    ids = tiny.TOKENIZER(text, add_special_tokens=False).input_ids
    (choice,) = choice_texts(model, ChoiceSettings(Sampling(99), 0, (), 1, None), 1)
    piece = choice.piece(NewTokens(tuple(SampledToken(i, 0.0) for i in [*ids, tiny.STOP[0]]), "stop"))
    assert (piece.text, piece.calls, piece.finish) == (text, (), "stop")


def test_the_format_is_that_of_the_template():
    llama32 = '<|start_header_id|> ... \'{"name": "\' + call.name + \'", "parameters": \''
    for source, format in {llama32: "llama3", "[TOOL_CALLS]": "mistral", "'<tool_call>'": "hermes"}.items():
        assert template_tool_format(source) == format
    xml = "<tool_call><function={{ name }}>", "<tool_call>{{ name }}<arg_key>"  # Qwen3-Coder, GLM 4.5
    for source in ("<|start_header_id|> {{ message.content }}", *xml):
        assert template_tool_format(source) == "none"


# Through the server, by OpenAI's client


@pytest.fixture(scope="module")
def running():
    from running_server import Running  # skips without openai and uvicorn

    found = Running(models=tiny.tool_models())
    yield found
    found.close()
    assert not found.lines


def scripted(running, monkeypatch, text):
    """Deliver `text` in blocks of 3 tokens, in place of sampled tokens."""
    ids = [*tiny.TOKENIZER(text, add_special_tokens=False).input_ids, tiny.STOP[0]]
    parts = [ids[at : at + 3] for at in range(0, len(ids), 3)]

    def submit(requests):
        for _, deliver in requests:
            for part in parts:
                tokens = tuple(SampledToken(token, -1.0) for token in part)
                deliver(NewTokens(tokens, "stop" if part is parts[-1] else None))
        return [Ticket(*one) for one in requests]

    monkeypatch.setattr(running.scheduler, "submit", submit)


MESSAGES = [{"role": "user", "content": "what is 1 + 2?"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def test_tool_calls_are_those_of_openai_streamed_and_whole(running, monkeypatch):
    text = "Let me see.\n" + "\n".join(
        f'<tool_call>\n{{"name": "add", "arguments": {{"a": {a}}}}}\n</tool_call>' for a in (1, 2)
    )
    scripted(running, monkeypatch, text)
    client, asked = running.client(), dict(model="base", messages=MESSAGES, tools=[TOOL])
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
    calls = [(call.type, call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    assert calls == [("function", "add", '{"a": 1}'), ("function", "add", '{"a": 2}')]
    with client.chat.completions.stream(**asked) as stream:  # the client joins the deltas itself
        (joined,) = stream.get_final_completion().choices
    again = [(call.type, call.function.name, call.function.arguments) for call in joined.message.tool_calls]
    assert again == calls and joined.finish_reason == "tool_calls" and joined.message.content == "Let me see."
    deltas = [c.choices[0].delta for c in client.chat.completions.create(**asked, stream=True, n=1)]
    assert [call.index for delta in deltas for call in delta.tool_calls or []] == [0, 1]
    assert sum(bool(delta.content) for delta in deltas) > 1  # the text before them is not delayed
    for plain in (dict(tool_choice="none"), dict(tools=None)):
        (choice,) = client.chat.completions.create(**{**asked, **plain}).choices
        assert (choice.message.content, choice.finish_reason) == (text, "stop")
    turn = {"role": "assistant", "content": "", "tool_calls": [joined.message.tool_calls[0].model_dump()]}
    result = {"role": "tool", "tool_call_id": joined.message.tool_calls[0].id, "content": "3"}
    assert client.chat.completions.create(**{**asked, "messages": [*MESSAGES, turn, result]}).choices


def test_a_malformed_tool_call_is_the_content(running, monkeypatch):
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 1}\n</tool_call>'
    scripted(running, monkeypatch, text)
    asked = dict(model="base", messages=MESSAGES, tools=[TOOL])
    (choice,) = running.client().chat.completions.create(**asked).choices
    assert (choice.message.content, choice.message.tool_calls) == (
        text,
        None,
    ) and choice.finish_reason == "stop"
    chunks = list(running.client().chat.completions.create(**asked, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
