"""Bodies of OpenAI's API: what is accepted, and what is refused in one line that names the field."""

import json

import pytest

from jaxft.serve.openai_api import ApiError, parse_chat, parse_completion, parse_json

MESSAGES = [{"role": "user", "content": "a"}]
BAD = {  # field of a chat request -> values
    "messages": [None, [], "a", {}],
    "model": [1, ["a"]],
    "max_tokens": [0, -1, 1.5, "3", True, 2**31],
    "max_completion_tokens": [0],
    "temperature": [-0.1, 2.1, "1", True, 1e-9, 10**400],
    "top_p": [0, 1.1, -1],
    "min_p": [1.1, -1],
    "top_k": [1.0, -2],
    "seed": [-1, 2**63, 0.5],
    "stop": ["", ["a"] * 5, [""], [1], 3, "a" * 1000],
    "n": [0, 65, "1"],
    "stream": [1, "true"],
    "stream_options": [True, {"include_usage": 1}],
    "logprobs": [3, "yes"],
    "top_logprobs": [2],
    "tools": [{}, ["a"]],
    "tool_choice": ["required", {"type": "function"}, {"function": {"name": "f"}}, 3],
    "parallel_tool_calls": [1, "no"],
    "chat_template_kwargs": ["a", [1]],
    "logit_bias": [{"1": 2}],
    "frequency_penalty": [0.5, False],
    "response_format": [
        3,
        "json",
        {"type": "yaml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {}},
    ],
    "temprature": [1],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD for value in BAD[name]], ids=repr)
def test_a_wrong_field_is_named_in_one_line(name, value):
    with pytest.raises(ApiError) as found:
        parse_chat({"messages": MESSAGES, name: value}, 16)
    error = found.value.body()["error"]
    assert found.value.status == 400 and name in error["message"] and "\n" not in error["message"]
    assert len(error["message"]) <= 500 and error["param"] == name


@pytest.mark.parametrize(
    "prompt", [None, 3, {}, [], [[]], [1, "a"], [[1], "a", 2], [True], ["a", None]], ids=repr
)
def test_a_wrong_prompt_is_refused(prompt):
    with pytest.raises(ApiError, match="prompt must be"):
        parse_completion({"prompt": prompt}, 16)


BODIES = [b"", b"{", b"[1]", b"1", b'{"a": NaN}', b'{"a": "\\ud800"}', b"\xff{}", b"[" * 100_000, b"9" * 5000]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:12]))
def test_a_body_that_is_no_json_object_is_refused_in_one_line(body):
    with pytest.raises(ApiError, match="body") as found:
        parse_json(body)
    assert found.value.status == 400 and "\n" not in found.value.message


def test_the_defaults_are_those_of_openai_and_null_is_a_default():
    fields = {
        "messages": MESSAGES,
        "temperature": None,
        "stop": None,
        "tools": None,
        "user": "me",
        "logit_bias": {},
    }
    found = parse_chat(parse_json(json.dumps(fields).encode()), 16)
    sampling = found.choice.sampling
    assert (sampling.max_new, sampling.temperature, sampling.top_k, sampling.top_p) == (16, 1.0, None, None)
    assert found.choice[1:] == (None, (), 1, None, None)
    assert found.streaming == (False, False) and found.tools is None
    asked = {
        "max_tokens": 3,
        "stop": "x",
        "seed": 5,
        "logprobs": True,
        "top_logprobs": 4,
        "tool_choice": "none",
    }
    found = parse_chat({"messages": MESSAGES, "tools": [{}], **asked}, 16)
    assert found.choice[1:] == (5, ("x",), 1, 4, None)
    assert found.choice.sampling.max_new == 3 and found.tools is None


ADD = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {}}}}}
NOW = {"type": "function", "function": {"name": "now"}}
ADD_CALL = {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}
NOW_CALL = {"name": "now", "parameters": {"type": "object"}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"tool_choice": "auto"}, None),
        ({"tool_choice": "required"}, ((ADD_CALL, NOW_CALL), False)),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ((ADD_CALL, NOW_CALL), True)),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, ((NOW_CALL,), True)),
    ],
)
def test_tool_choice_names_the_functions_of_which_one_must_be_called(fields, expected):
    assert parse_chat({"messages": MESSAGES, "tools": [ADD, NOW], **fields}, 16).required == expected


def test_a_response_format_is_a_json_schema():
    schema = {"type": "array"}
    for value, expected in (
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}, schema),
    ):
        assert parse_chat({"messages": MESSAGES, "response_format": value}, 16).choice.schema == expected
        assert parse_completion({"prompt": "a", "response_format": value}, 16).choice.schema == expected


def test_prompts_are_texts_or_token_ids():
    for prompt, expected in (
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2]], ((1,), (2,))),
    ):
        assert parse_completion({"prompt": prompt}, 16).prompts == expected
    with pytest.raises(ApiError, match="64 choices"):
        parse_completion({"prompt": ["a"] * 33, "n": 2}, 16)
