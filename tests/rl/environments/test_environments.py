"""Environments that ship with jaxft, played by scripts that know the answer, and OpenEnv's clients."""

import http.server
import json
import re
import runpy
import threading
import time
import urllib.request
from types import SimpleNamespace

import pytest
from chat_templates import stock_tokenizer
from scripted_session import ScriptedSampler
from test_scripted_episodes import KEY, LIMITS, rows_of

from jaxft.data.chat.tool_calls import TOOL_FORMATS, call_format
from jaxft.data.row_settings import DEFAULT_TEMPLATE_SETTINGS
from jaxft.data.rows.shipped import ROOT
from jaxft.rl.environments.environment import environment_of, observation_text, openenv
from jaxft.rl.environments.shipped_environments import (
    Calculator,
    CodeInterpreter,
    GuessNumber,
    Search,
    best_passages,
    calculator_rows,
    guess_rows,
    search_rows,
    villages,
)
from jaxft.rl.environments.tools import parse_turn
from jaxft.rl.episodes import Play, rollout
from jaxft.serve.terminal_chat import TypedTurns, result_line, written_call


def test_a_tool_that_the_environment_has_too_is_refused_with_the_setting_that_leaves_it_out():
    def add(a: float, b: float) -> float:
        """Add two numbers."""
        return a + b

    with pytest.raises(
        ValueError, match="environment Calculator already has a tool add. .* environment=none"
    ):
        environment_of(Calculator, (add,))


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def episodes(environment, rows, turn):
    """Play rows; turn(the last message, the row) -> text."""
    tokenizer = stock_tokenizer("qwen2.5")
    how, schemas = DEFAULT_TEMPLATE_SETTINGS, list(environment_of(environment).schemas)
    prompts = rows_of(tokenizer, [row["prompt"] for row in rows], how, schemas or None)
    prompts = prompts.__class__(**{**vars(prompts), "fields": tuple(rows)})

    def write(ids, episode):
        shown = tokenizer.decode(ids).split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]
        text = turn(shown, rows[episode])
        return [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id], True

    play = Play(environment_of(environment), tokenizer, (tokenizer.eos_token_id,), LIMITS)
    return rollout(ScriptedSampler(write), play, prompts, 1, KEY)


def test_a_calculator_question_takes_both_tools_one_after_the_other():
    rows = calculator_rows(8, 0)
    assert {row["prompt"][8] == "(" for row in rows} == {True, False}  # either tool may be the first

    def turn(shown, row):
        expression = row["prompt"].removeprefix("What is ")[:-1]
        a, b, c = (int(x) for x in re.findall(r"\d+", expression))
        assert eval(expression) == int(row["answer"])
        first, second = ("add", "multiply") if "(" in expression else ("multiply", "add")
        if shown == row["prompt"]:
            return call(first, a=a, b=b)
        result = shown.removeprefix("<tool_response>\n").removesuffix("\n</tool_response>")
        if result == row["answer"]:
            return f"It is {result}."
        return call(second, a=int(result), b=c)

    found = episodes(Calculator, rows, turn)
    assert [part.score for part in found] == [1.0] * 8
    assert all(len([s for s in part.segments if s.sampled]) == 3 for part in found)
    assert [part.score for part in episodes(Calculator, rows, lambda shown, row: "It is 5.")] == [0.0] * 8


def test_the_example_of_tools_that_fail_has_the_calculators_tools():
    faulty = runpy.run_path(str(ROOT / "configs/examples/faulty_calculator.py"))["Faulty"]
    assert environment_of(faulty).schemas == environment_of(Calculator).schemas
    results = []
    for _ in range(400):
        try:
            results.append(faulty().add(2, 3))
        except ConnectionError:
            continue
    assert set(results) == {5} and 330 < len(results) < 390


def test_no_held_out_question_is_a_training_question():
    train, held_out = (
        [json.loads(line)["prompt"] for line in (ROOT / f"configs/data/{name}.jsonl").open()]
        for name in ("calculator", "calculator_held_out")
    )
    assert len({*train, *held_out}) == len({*train}) + len({*held_out})


def test_a_reset_that_returns_none_by_its_annotation_shares_the_rows_prompt():
    """Then the episodes of a group need one prompt; see Rollouts.starts_per_row."""

    class Mute:
        def reset(self, **row):
            return None

    assert not any(environment_of(x).resets for x in (Calculator, Search, GuessNumber, CodeInterpreter, None))
    assert environment_of(Mute).resets and not environment_of(lambda state, text, row: None).resets


def test_the_calculators_questions_are_a_function_of_the_seed():
    assert calculator_rows(3, 5) == calculator_rows(3, 5) != calculator_rows(3, 6)


def test_bisection_guesses_the_number():
    rows = guess_rows(5, 0, most=7)
    bounds = {}

    def turn(shown, row):
        low, high, guess = bounds.get(id(row), (1, 7, 0))
        low, high = (
            (guess + 1, high) if shown == "Higher." else (low, guess - 1) if shown == "Lower." else (1, 7)
        )
        bounds[id(row)] = low, high, (low + high) // 2
        return f"Is it {(low + high) // 2}?"

    assert [part.score for part in episodes(GuessNumber, rows, turn)] == [1.0] * 5
    stuck = episodes(GuessNumber, rows, lambda shown, row: "well")
    assert {part.turns[-2]["content"] for part in stuck} == {"Say a number."} and stuck[0].score == 0.0


def test_search_finds_the_passage_that_shares_rare_words():
    corpus = ("the cat sat", "the dog sat on the mat", "a bird")
    assert best_passages(corpus, "dog", 2) == ["the dog sat on the mat"]
    assert best_passages(corpus, "the cat", 2)[0] == "the cat sat"
    assert best_passages(corpus, "fish", 2) == []


def test_two_searches_answer_any_question_about_the_villages():
    rows = search_rows(8, 0, two_searches=1.0)

    def turn(shown, row):
        if not shown.startswith("<tool_response>"):
            return call("search", query=row["prompt"].split("painter ")[1].split(" was born")[0])
        if "was born in" in shown and "founded" not in shown.split("was born in")[0]:
            return call("search", query=shown.split("was born in ")[1].split(".")[0] + " founded river")
        return shown

    assert [part.score for part in episodes(Search, rows, turn)] == [1.0] * 8
    assert len(set(villages())) == 100


def test_the_code_interpreter_runs_code_and_reads_its_answer():
    rows = [{"prompt": "What is 2 ** 70?", "answer": str(2**70)}, {"prompt": "Say yes.", "answer": "yes"}]

    def turn(shown, row):
        if row["answer"] == "yes":
            return " Yes"
        return (
            shown[len("<tool_response>") :]
            if shown.startswith("<tool")
            else call("python", code="print(2**70)")
        )

    assert [part.score for part in episodes(CodeInterpreter, rows, turn)] == [1.0, 1.0]


def test_an_answer_in_json_is_no_malformed_call():
    """Bare text of Llama 3 is one if it has a call's keys, or is cut off."""
    format = call_format("llama3")
    counts = {
        '{"answer": 3}': 0,
        '{"name": "Bob", "age": 3}': 0,
        "{1, 2}": 0,
        '{"name": "add"}': 1,
        '{"name": "add", "parameters": {"a": 1': 1,
        "<|python_tag|>add.call(a=1)": 1,
    }
    for text, count in counts.items():
        assert parse_turn(text, format, 1)[1:] == ((), count), text
    (called,) = parse_turn('{"name": "add", "parameters": {}}', format, 1).calls
    assert (called.name, called.arguments) == ("add", "{}")


@pytest.mark.parametrize("text", ['{"name": "now"}', '{"name": "now", "arguments": null}'])
def test_a_call_without_arguments_is_one_of_a_tool_that_takes_none(text):
    turn = parse_turn(f"<tool_call>{text}</tool_call>", call_format("hermes"), 1)
    assert [(x.name, x.arguments) for x in turn.calls] == [("now", "{}")] and not turn.malformed


def test_an_answer_that_cannot_be_compared_is_a_fault_and_words_are_compared_whole():
    for environment, answer in ((Calculator, "a lot"), (Search, "?")):
        (found,) = episodes(environment, [{"prompt": "q", "answer": answer}], lambda *_: "I don't know.")
        assert found.fault == "raised" and "column 'answer' has no" in found.faults[0].text
    rows = [{"prompt": "On which river?", "answer": "Ad"}]
    assert episodes(Search, rows, lambda *_: "I had bad luck.")[0].score == 0.0
    assert episodes(Search, rows, lambda *_: "It is on the Ad.")[0].score == 1.0


# ---- played by a person


def test_a_person_plays_what_a_policy_would():
    tokenizer = stock_tokenizer("qwen2.5")
    typed = iter(['/call multiply {"a": 6, "b": 7}', "/call nothing", "It is 42."])
    shown = []
    play = Play(environment_of(Calculator), tokenizer, (tokenizer.eos_token_id,), LIMITS)
    person = TypedTurns(typed.__next__, shown.append, tokenizer, tokenizer.eos_token_id, play.call_format)
    tools = list(play.environment.schemas)
    rows = rows_of(tokenizer, ["What is 6 * 7?"], DEFAULT_TEMPLATE_SETTINGS, tools, answer="42")
    (found,) = rollout(lambda key: person, play, rows, 1, KEY)
    assert "multiply" in shown[0] and "<tool_response>\n42\n</tool_response>" in shown[1]
    assert result_line(found).startswith("[ended; score 1; unknown_tool: there is no tool 'nothing'")


@pytest.mark.parametrize("name", [name for name in TOOL_FORMATS if name != "none"])
def test_a_typed_call_is_one_in_each_format(name):
    """Read back by the parser that reads the policy's."""
    format = call_format(name)
    turn = parse_turn(written_call('/call add {"a": 1, "b": [2, "é"]}', format), format, 0)
    assert [(c.name, json.loads(c.arguments)) for c in turn.calls] == [("add", {"a": 1, "b": [2, "é"]})]
    assert not turn.malformed and not turn.text
    for text in ("/call add {", "/caller", "a /call"):
        assert written_call(text, format) == text


# ---- OpenEnv


class EchoServer(http.server.BaseHTTPRequestHandler):
    """Bodies and responses as OpenEnv's: {"action": {...}} -> observation, reward, done."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/reset":
            found = {
                "observation": {"echoed_message": f" Seed {body['seed']}."},
                "reward": None,
                "done": False,
            }
        else:
            text = body["action"]["message"]
            found = {"observation": {"echoed_message": text}, "reward": len(text), "done": text == "end"}
        data = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


class AsyncClient:
    """A client of the shape of openenv's EnvClient."""

    def __init__(self, url, made):
        self.url = url
        made.append(self)

    async def reset(self, **options):
        return self.post("/reset", options)

    async def step(self, action):
        return self.post("/step", {"action": action})

    def post(self, path, body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode())
        with urllib.request.urlopen(request) as response:
            return SimpleNamespace(**json.load(response))


def test_an_openenv_server_is_played_through_its_client():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), EchoServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made = []

    def action(text):
        if text == "?":
            raise ValueError("not a word")
        return {"message": text}

    try:
        url = f"http://127.0.0.1:{server.server_port}"
        environment = openenv(
            lambda: AsyncClient(url, made), action, options=lambda row: {"seed": row["seed"]}
        )
        rows = [{"prompt": "Speak.", "seed": i} for i in range(3)]
        said = {0: ["hello", "end"], 1: ["?", "end"], 2: ["end"]}
        found = episodes(environment, rows, lambda shown, row: said[row["seed"]].pop(0))
    finally:
        server.shutdown()
        server.server_close()
    assert [part.score for part in found] == [8.0, 3.0, 3.0]
    assert [part.turns[0]["content"] for part in found] == [f"Speak. Seed {i}." for i in range(3)]
    assert found[1].turns[2]["content"] == "That is no action: not a word"
    assert len(made) <= 3


class Client:
    """A client of a game in which one word ends the server's session."""

    made, live = 0, set()

    def __init__(self):
        Client.made += 1
        Client.live.add(self)

    def reset(self, **options):
        return SimpleNamespace(observation="Go.", reward=None, done=False)

    def step(self, word):
        if word == "crash":
            raise RuntimeError("session is gone")
        return SimpleNamespace(observation="", reward=1.0, done=True)

    def close(self):
        Client.live.remove(self)


def test_an_openenv_client_whose_episode_had_a_fault_is_closed_and_replaced():
    said = {0: "crash", 1: "move"}
    tokenizer = stock_tokenizer("qwen2.5")

    def write(ids, episode):
        return [*tokenizer(said[episode], add_special_tokens=False).input_ids, tokenizer.eos_token_id], True

    play = Play(openenv(Client, str), tokenizer, (tokenizer.eos_token_id,), LIMITS)
    prompts = rows_of(tokenizer, ["a", "b"], DEFAULT_TEMPLATE_SETTINGS)
    for _ in range(2):
        found = rollout(ScriptedSampler(write), play, prompts, 1, KEY)
        assert [t.fault for t in found] == ["raised", ""]
        said[0], said[1] = said[1], said[0]
        found = rollout(ScriptedSampler(write), play, prompts, 1, KEY)
        assert [t.fault for t in found] == ["", "raised"]
        said[0], said[1] = said[1], said[0]
    until = time.monotonic() + 5
    while len(Client.live) > 1 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(Client.live) == Client.made - 4 == 1


@pytest.mark.parametrize(
    "observation, text",
    [
        ("plain", "plain"),
        ({"echoed_message": "hi", "reward": 0.1, "done": False}, "hi"),
        (SimpleNamespace(board=[0, 1], turn=2, metadata={}), '{"board": [0, 1], "turn": 2}'),
        ({}, ""),
    ],
)
def test_an_observation_is_its_text_or_json(observation, text):
    assert observation_text(observation) == text
