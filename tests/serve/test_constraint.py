"""Constrained sampling: what grammars accept, and that completions of the server match them."""

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_served as tiny
import tiny_tokenizers
from running_server import CHAT, MESSAGES, Running
from scripts_in_process import call

from jaxft.engine.programs import allowed_logits, compile_engine
from jaxft.engine.sampling import Sampling
from jaxft.engine.session import RequestSettings, Session, generate
from jaxft.engine.state import Decoding, slots_for
from jaxft.models.adapted import adapted
from jaxft.serve.constraint import call_grammar, compile_grammar, either, json_grammar, regex_grammar

pytest.importorskip("llguidance")

# ids 20 and 80, "/" and "k", are stop tokens of the tiny models
ANSWER = {
    "type": "object",
    "properties": {"a": {"enum": ["yes", "no"]}, "n": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["a", "n"],
    "additionalProperties": False,
}
ADD = {"name": "add", "parameters": {**ANSWER, "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}}
NOW = {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}
HERMES = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TWO = f"{HERMES}\n{HERMES}"
NO_TIME = HERMES.replace("add", "time")


def calls(format, *tools, **options):
    return call_grammar(format, tools, tiny.TOKENIZER, **options)


@pytest.mark.parametrize(
    ("grammar", "matching", "others"),
    [
        (json_grammar(), ['{"a": [1, {"b": null}]}', '{\n  "é": 1\n}'], ["[1]", '{"a": 1', "{'a': 1}"]),
        (json_grammar(), ["{}", "{\n" + " " * 24 + "}"], ["{\n" + " " * 25 + "}", "{  }", '{"a": 1} yes']),
        (json_grammar(ANSWER), ['{"a": "no", "n": 3}'], ['{"a": "no"}', '{"a": "no", "n": 10}', "{}"]),
        (regex_grammar("(yes|no)/[0-9]{2}"), ["yes/12"], ["yes/1", "yes/123", "perhaps"]),
        (calls("hermes", ADD, NOW), [HERMES, TWO], [NO_TIME, HERMES.replace("1", "3"), "{}", "yes"]),
        (calls("hermes", ADD, is_single=True), [HERMES], [TWO]),
        (calls("llama3", ADD, NOW), ['{"name": "now", "parameters": {}}'], ['{"name": "now"}']),
        (
            calls("mistral", ADD, NOW),
            ['[TOOL_CALLS][{"name": "add", "arguments": {"a": 2}}, {"name": "now", "arguments": {}}]'],
            ["[TOOL_CALLS][]", '[TOOL_CALLS]add{"a": 2}'],
        ),
        (either(calls("hermes", ADD), json_grammar(ANSWER)), [HERMES, '{"a": "no", "n": 3}'], ["{}", "no"]),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_a_grammar_accepts_what_it_describes_only(grammar, matching, others):
    for text in (*matching, *others):
        matcher = compile_grammar(grammar, tiny.TOKENIZER, [0]).begin()._matcher
        ids = tiny.TOKENIZER.encode(text, add_special_tokens=False)
        accepted = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
        assert accepted == (text in matching), text


def test_marks_of_tool_calls_are_the_special_tokens_of_the_vocabulary():
    tokenizer = tiny_tokenizers.tiny.__wrapped__("chatml")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[ARGS]"]})
    opens, args = tokenizer.convert_tokens_to_ids(["[TOOL_CALLS]", "[ARGS]"])
    grammar = compile_grammar(call_grammar("mistral", [ADD], tokenizer), tokenizer, [0])
    first = np.unpackbits(grammar.begin().allowed().view(np.uint8), bitorder="little")
    assert np.flatnonzero(first).tolist() == [opens]
    call = [opens, *tokenizer.encode("add"), args, *tokenizer.encode('{"a": 1}')]
    assert not grammar.begin().accept([*call, *call])


def test_a_constrained_row_has_the_logits_of_its_allowed_tokens_only():
    logits = jax.random.normal(jax.random.key(0), (3, 70))
    allowed = [{3, 31, 32, 69}, set(range(70)), {0}]
    words = np.zeros((3, 3), np.uint32)
    for row, tokens in enumerate(allowed):
        for token in tokens:
            words[row, token // 32] |= np.uint32(1 << token % 32)
    found = allowed_logits(logits, jnp.asarray(words))
    for row, tokens in enumerate(allowed):
        for token in range(70):
            assert found[row, token] == (logits[row, token] if token in tokens else -jnp.inf)


@pytest.fixture(scope="module")
def running():
    found = Running(models=tiny.tool_models())
    yield found
    found.close()
    assert not found.lines


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def test_a_completion_with_a_schema_fits_it_whatever_the_temperature_and_the_adapter(running):
    asked = dict(messages=MESSAGES, response_format=schema_format({"enum": ["yes", 7]}), max_tokens=24, n=4)
    found = set()
    for model, temperature in (("base", 1.0), ("polite", 2.0), ("terse", 0.0)):
        options = {**asked, "model": model, "temperature": temperature, "seed": 4}
        whole = running.client().chat.completions.create(**options)
        texts = ["", "", "", ""]
        for chunk in running.client().chat.completions.create(**options, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert texts == [choice.message.content for choice in whole.choices]
        assert {choice.finish_reason for choice in whole.choices} == {"stop"}
        found |= {json.loads(text) for text in texts}
    assert found == {"yes", 7}


def test_a_truncated_completion_says_so_and_log_probs_are_those_of_the_model(running):
    asked = dict(model="base", messages=MESSAGES, temperature=0.0, logprobs=True, top_logprobs=2)
    form = schema_format(ANSWER)
    (choice,) = running.client().chat.completions.create(**asked, max_tokens=3, response_format=form).choices
    assert choice.finish_reason == "length" and choice.message.content.startswith("{")
    (free,) = running.client().chat.completions.create(**asked, max_tokens=1).choices
    first, of_model = choice.logprobs.content[0], free.logprobs.content[0]
    assert first.token == "{" != of_model.token and first.logprob < of_model.logprob
    assert first.top_logprobs == of_model.top_logprobs


def test_other_requests_keep_their_completions_and_nothing_is_compiled(running):
    asked = dict(model="base", messages=MESSAGES, temperature=1.0, max_tokens=20)
    form = schema_format(ANSWER)

    def text(seed, **options):
        found = running.client().chat.completions.create(**asked, seed=seed, **options)
        return found.choices[0].message.content

    alone, constrained = [text(seed) for seed in range(6)], text(9, response_format=form)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "compile" in name else None
    )
    try:
        with ThreadPoolExecutor(9) as pool:
            others = [pool.submit(text, 9, response_format=form) for _ in range(3)]
            together = list(pool.map(text, range(6)))
    finally:
        jax.monitoring.clear_event_listeners()
    assert together == alone and [other.result() for other in others] == [constrained] * 3 and not compiled


def test_completions_of_generate_match_their_grammars():
    model = tiny.tool_models()["base"]
    tool = {"name": "f", "parameters": NOW["parameters"]}
    expected = {
        regex_grammar("(yes|no), [a-c]{2}"): re.compile("(yes|no), [a-c]{2}"),
        call_grammar("llama3", [tool], model.tokenizer): re.compile(r'\{"name": "f", .*'),
    }
    decoding = Decoding(adapted(tiny.MODEL, None), Sampling(24, 1.0), tiny.STOP, constrained=True)
    engine, found = compile_engine(decoding, {"base": tiny.base()}, slots_for(3, 1, 2)), []
    for grammar, pattern in expected.items():
        choice = RequestSettings(
            Sampling(24, 1.0), tiny.STOP, grammar=compile_grammar(grammar, model.tokenizer, model.stop)
        )
        session = Session(engine, {"base": tiny.base()}, jax.random.key(0), choice=choice)
        own = generate(session, [[1, 2]] * 3)
        assert all(pattern.fullmatch(tiny.text_of(ids)) and len(ids) <= 24 for ids in own)
        found += own
    assert found[:3] != [found[0]] * 3 and all(ids[-1] in tiny.STOP for ids in found[:3])


def test_a_grammar_that_fails_ends_generate():
    class Failing:
        def begin(self):
            return self

        def allowed(self):
            return np.full(99, 2**32 - 1, np.uint32)

        def accept(self, tokens):
            return "the grammar failed: too complex"

    decoding = Decoding(adapted(tiny.MODEL, None), Sampling(24, 1.0), tiny.STOP, constrained=True)
    engine = compile_engine(decoding, {"base": tiny.base()}, slots_for(3, 1, 2))
    session = Session(
        engine, {"base": tiny.base()}, choice=RequestSettings(Sampling(4, 1.0), grammar=Failing())
    )
    with pytest.raises(ValueError, match="the grammar failed: too complex"):
        generate(session, [[1, 2]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json-schema", "nowhere.json"], "--json-schema nowhere.json: No such file or directory"),
        (["--json-schema", "list.json"], "--json-schema list.json: not a JSON object"),
        (["--json-schema", "list.json", "--regex", "a"], "not allowed with argument --json-schema"),
    ],
)
def test_a_wrong_option_of_generate_is_one_line(tmp_path, monkeypatch, capsys, options, message):
    (tmp_path / "list.json").write_text("[1]")
    monkeypatch.chdir(tmp_path)
    code, out, err = call(monkeypatch, capsys, "generate", "--prompt", "a", *options)
    assert code and not out and message in err and len(err.splitlines()) == 1


def test_without_llguidance_the_error_says_what_to_install(running, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    body = {"messages": MESSAGES, "response_format": {"type": "json_object"}}
    status, reply, _ = running.send("POST", CHAT, body)
    assert status == 501 and "pip install 'jaxft[serve]'" in reply["error"]["message"]


@pytest.mark.slow
def test_smollm2_completes_prompts_as_the_schema_says(tmp_path, monkeypatch, capsys):
    """Also greedily, where free text would begin otherwise."""
    (tmp_path / "schema.json").write_text(json.dumps(ANSWER))
    monkeypatch.chdir(tmp_path)
    prompts = [item for text in ("Is Paris in France?", "Name a colour.") for item in ("--prompt", text)]
    code, out, err = call(
        monkeypatch, capsys, "generate", *prompts, "--json-schema", "schema.json", "--max-new", "40", "--json"
    )
    results = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [result["finish"] for result in results] == ["stop", "stop"], err
    for result in results:
        found = json.loads(result["completion"])
        assert found.keys() == {"a", "n"} and found["a"] in ("yes", "no") and 1 <= found["n"] <= 9


TOOLS = [{"type": "function", "function": ADD}]
WITH_NOT = [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]
REFUSED = {  # fields -> part of the message
    "drops tools": {"tools": TOOLS},
    'Unimplemented keys: ["not"]': {"response_format": schema_format({"not": {}})},
    "Invalid type: objec": {"response_format": schema_format({"type": "objec"})},
    "response_format: failed to compile JSON schema: Invalid type: obj": {
        "tools": TOOLS,
        "response_format": schema_format({"type": "obj"}),
    },
    'tools: failed to compile JSON schema: Unimplemented keys: ["not"]': {
        "tools": WITH_NOT,
        "response_format": schema_format({}),
    },
    "tools: failed to compile": {"tools": WITH_NOT, "tool_choice": "required"},
    "tool_choice names 'f'": {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_constrained_is_refused_in_one_line(running, message):
    server = Running() if message == "drops tools" else running
    status, reply, _ = server.send("POST", CHAT, {"messages": MESSAGES, **REFUSED[message]})
    if server is not running:
        server.close()
    assert status == 400 and message in reply["error"]["message"] and "\n" not in reply["error"]["message"]
