"""Episodes without a model: turns are scripted, the chat template and the tokenizer are real."""

import asyncio
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Literal

import jax
import numpy as np
import pytest
from chat_templates import TEMPLATES, stock_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_session import ScriptedSampler
from tiny_tokenizers import tiny

from jaxft.data.chat.loss_mask import example_prompt_ids
from jaxft.data.packing.row_tasks import TokenisedPrompts
from jaxft.data.prompts import read_prompts
from jaxft.data.row_settings import DEFAULT_TEMPLATE_SETTINGS
from jaxft.data.rows.example import Chat
from jaxft.distributed import processes
from jaxft.rl.environments.environment import EnvironmentClass, environment_of, single_turn
from jaxft.rl.environments.shipped_environments import Calculator
from jaxft.rl.episodes import EpisodeLimits, Play, rollout
from jaxft.rl.rewards import EnvironmentReward, RewardScores, exact
from jaxft.rl.rollout_metrics import score_metrics
from jaxft.rl.rollout_rules import Rules
from jaxft.rl.rollout_source import Rollouts
from jaxft.rl.trajectory import collect
from jaxft.runs.settings.setting_values import parse_value
from jaxft.weights.edit import extended_model

KEY = jax.random.key(0)
LIMITS = EpisodeLimits(turns=4, turn_tokens=200, tokens=1500, prompt=2000, timeout=5.0, observation=200)


def rows_of(tokenizer, questions, how, tools=None, **columns):
    chats = [
        Chat(f"r:{i}", ({"role": "user", "content": q},), 1, tools=tools) for i, q in enumerate(questions)
    ]
    ids = tuple(map(tuple, example_prompt_ids(chats, tokenizer, how)))
    fields = tuple({"question": q, "number": i, **columns} for i, q in enumerate(questions))
    return TokenisedPrompts(ids, tuple(c.name for c in chats), tuple(chats), fields, how)


def stop_of(tokenizer):
    return (tokenizer.eos_token_id,)


def say(tokenizer, texts):
    """A script: turn k of an episode says texts[k], the last again and again."""

    def write(ids, episode):
        said[episode] = said.get(episode, -1) + 1
        text = texts[min(said[episode], len(texts) - 1)]
        return [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id], True

    said = {}
    return write


def played(environment, texts, name="qwen2.5", questions=("q",), limits=LIMITS, group=1):
    tokenizer, how = stock_tokenizer(name), TEMPLATES[name].settings
    play = Play(environment, tokenizer, stop_of(tokenizer), limits)
    sampler = ScriptedSampler(say(tokenizer, texts))
    rows = rows_of(tokenizer, questions, how, list(environment.schemas) or None)
    episodes = rollout(sampler, play, rows, group, KEY)
    assert not sampler.opened.ids, "each row is dropped"
    return episodes


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


# ---- token-exact turns


@cache
def shipped_tokenizer(name):
    """A tokenizer with one of jaxft's named templates and its tokens."""
    template = extended_model.TEMPLATES[name.removeprefix("shipped ")]
    ends = [token for token in template.tokens if re.search("end|eot", token)]
    tokenizer = tiny.__wrapped__("none")
    tokens = {"bos_token": "<s>", "eos_token": (ends or ["</s>"])[-1]}
    tokenizer.add_special_tokens(tokens | {"additional_special_tokens": list(template.tokens)})
    tokenizer.chat_template = template.source
    return tokenizer


SHIPPED = [f"shipped {name}" for name in extended_model.TEMPLATES]
FAULTS = (
    RuntimeError("the tool is out"),
    ValueError("not such arguments"),
    KeyError("x"),
    None,
    3.5,
    object(),
)


@pytest.mark.quick_cases("llama3.1", "phi3", "qwen2.5", "qwen3", "mistral-nemo", "gemma", "shipped [qz]*")
@pytest.mark.parametrize("name", [*TEMPLATES, *SHIPPED])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_trained_ids_are_sampled_and_given_ids(name, seed):
    """With random turns, tools, truncations and faults: each training row is what its session's row was, and
    exactly the ids that the session sampled have log-probs.
    """
    rng, is_shipped = random.Random(seed), name in SHIPPED
    tokenizer = shipped_tokenizer(name) if is_shipped else stock_tokenizer(name)
    how = DEFAULT_TEMPLATE_SETTINGS if is_shipped else TEMPLATES[name].settings
    sampled = {}  # by episode: the turns as they were sampled

    def write(ids, episode):
        call = rng.choice(
            (CALL, CALL.replace("add", "nothing"), CALL[:-9], '{"name": "add", "parameters": {}}')
        )
        text = rng.choice((call, f"<think>\nhm {rng.random()}\n</think>\n\n{call}", "é漢🙂 17", "", " x "))
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        tokens = [*tokens, *rng.choices(range(200), k=rng.randrange(3))]  # no text encodes to such ids
        stopped = rng.random() < 0.7
        tokens = [*tokens, tokenizer.eos_token_id] if stopped else tokens[: rng.randrange(1, 40)] or [5]
        sampled.setdefault(episode, []).append(tokens[: LIMITS.turn_tokens])
        return tokens, stopped

    class Moody:
        def reset(self, row):
            return rng.choice((None, "", " More."))

        def step(self, state, text):
            fault = rng.choice(FAULTS) if rng.random() < 0.1 else 0
            if isinstance(fault, Exception):
                raise fault
            answer = (
                rng.choice(("", "go on", "ok " * 3)),
                rng.choice((None, 1.0)),
                rng.random() < 0.2,
                state,
            )
            return fault if fault != 0 else answer

    try:
        play = Play(environment_of(Moody, [add]), tokenizer, stop_of(tokenizer), LIMITS)
    except ValueError:  # a template without a format of calls
        play = Play(environment_of(Moody), tokenizer, stop_of(tokenizer), LIMITS)
    sampler = ScriptedSampler(write, at_once=2)
    rows = rows_of(tokenizer, ["q", "what?"], how, list(play.environment.schemas) or None)
    episodes = rollout(sampler, play, rows, 2, KEY)
    by_session = {}
    for episode, ids in sampler.opened.dropped:
        by_session.setdefault(episode, []).append(ids)
    assert [episode.prompt for episode in episodes] == [0, 0, 1, 1]
    for number, episode in enumerate(episodes):
        rows = episode.rows()
        assert [row.ids.tolist() for row in rows if row.start] == by_session.get(number, [])
        turns = [s.tokens.tolist() for s in episode.sampled]
        for got, wrote in zip(turns, sampled.get(number, []), strict=True):
            assert got == wrote[: len(got)] and (len(got) == len(wrote) or not episode.ended)
        masked = [i for row in rows for i in row.ids[row.sampled].tolist()]
        assert masked == sum(turns, [])
        assert sum(len(row.ids) for row in rows) - len(episode.start) <= LIMITS.tokens


def test_a_conversation_with_a_tool_is_one_row():
    (episode,) = played(environment_of(None, [add]), [f"I add.\n{CALL}", "It is 5."])
    tokenizer = stock_tokenizer("qwen2.5")
    roles = [turn["role"] for turn in episode.turns]
    assert roles == ["user", "assistant", "tool", "assistant"] and episode.turns[2]["content"] == "5"
    assert episode.turns[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2, "b": 3}}
    first, given_ids, last = episode.segments
    assert (first.sampled, given_ids.sampled, last.sampled) == (True, False, True) and episode.ended
    assert tokenizer.decode(given_ids.tokens) == (
        "\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert "add" in tokenizer.decode(episode.start), "the model is shown the tool"


def test_a_template_that_cuts_reasoning_begins_a_second_row():
    def ask(state, text, row):
        return "And now?", 1.0, False, state

    limits = replace(LIMITS, turns=2)
    episodes = played(environment_of(ask), ["<think>\nhm\n</think>\n\nyes"], "qwen3", limits=limits)
    first, second = episodes[0].rows()
    start = stock_tokenizer("qwen3").decode(second.ids[: second.start])
    assert "hm" not in start and "yes" in start and len(episodes[0].start) == first.start
    assert episodes[0].score == 2.0 and not episodes[0].ended and len(episodes) == 1


def ids_of(episodes):
    return [row.ids.tolist() for episode in episodes for row in episode.rows()]


def test_decisions_reach_other_processes_as_json(monkeypatch):
    """Only the first process has the environment; what it decides is JSON."""

    def through_json(work):
        return json.loads(json.dumps(work()))

    def fail(state, text, row):
        return ("more", 1.0, False, 1) if state is None else (None, 1 / 0, True, None)

    texts, environment = [f"I add.\n{CALL}", "It is 5."], environment_of(fail, [add])
    here = played(environment, texts, questions=("q", "r"))
    monkeypatch.setattr(processes, "from_first_process", through_json)
    there = played(environment, texts, questions=("q", "r"))
    assert [part.turns for part in here] == [part.turns for part in there]
    assert [part.faults for part in here] == [part.faults for part in there] and here[0].fault == "raised"
    assert ids_of(here) == ids_of(there)


# ---- scores and ends


def test_the_score_is_the_sum_of_the_turns_rewards():
    def count(state, text, row):
        turn = (state or 0) + 1
        return "next", float(turn), turn == 3, turn

    (episode,) = played(environment_of(count), ["a"])
    assert [s.reward for s in episode.segments if s.sampled] == [1.0, 2.0, 3.0]
    assert episode.score == 6.0 and episode.ended and not episode.fault


def test_an_episode_at_a_limit_has_a_score_and_has_not_ended():
    def again(state, text, row):
        return "again", 0.5, False, state

    (episode,) = played(environment_of(again), ["a"])
    assert len([s for s in episode.segments if s.sampled]) == LIMITS.turns
    assert episode.score == 2.0 and not episode.ended
    (short,) = played(environment_of(again), ["a"], limits=replace(LIMITS, tokens=30))
    assert short.score and not short.ended and short.segments[-1].sampled


LAST_TURNS = {
    "a call": CALL,
    "a malformed call": CALL[:-9].replace("}}", ""),
    "an unknown tool": CALL.replace("add", "subtract"),
    "a truncated call": CALL.replace("2", "2" * 300),
}


@pytest.mark.parametrize("text", LAST_TURNS.values(), ids=LAST_TURNS)
def test_an_episode_that_calls_tools_up_to_its_limit_counts_as_wrong(text):
    """The mean over eight episodes of a prompt, of which one is right, is 1/8, and all are trained on."""
    tokenizer, how = stock_tokenizer("qwen2.5"), TEMPLATES["qwen2.5"].settings

    def write(ids, episode):
        said = "It is 5." if episode == 0 else text
        return [*tokenizer(said, add_special_tokens=False).input_ids, tokenizer.eos_token_id], True

    play = Play(environment_of(Calculator), tokenizer, stop_of(tokenizer), replace(LIMITS, turns=3))
    rows = rows_of(tokenizer, ["q"], how, answer="5")
    collected = collect(rows, rollout(ScriptedSampler(write), play, rows, 8, KEY), 2000, 3000, 3)
    rules = Rules((EnvironmentReward(),))
    scored = rules.score(collected, [RewardScores(collected.scores)])
    assert scored.scores.tolist() == [[1.0] + [0.0] * 7] and rules.policy_mask(scored).all()
    metrics = score_metrics(scored.scores)
    assert metrics["reward"] == 0.125 and metrics["frac_unscorable"] == 0.0


def test_an_environment_without_rewards_adds_nothing_to_those_of_the_run():
    """Its episodes have the score 0, whoever ends them, so that rewards= decides alone."""

    def twice(state, text, row):
        return "And?", None, state == 1, 1

    class Silent:
        def reset(self, row):
            return None

        def step(self, state, text):
            return None, None, True, state

    for given_by_user in (twice, Silent):
        episodes = played(environment_of(given_by_user), ["a"])
        assert [part.score for part in episodes] == [0.0] and not episodes[0].fault
    several = environment_of({"silent": Silent, "tools": AddsOnly})
    tokenizer = stock_tokenizer("qwen2.5")
    rows = rows_of(tokenizer, ["q"], TEMPLATES["qwen2.5"].settings, environment="tools")
    play = Play(several, tokenizer, stop_of(tokenizer), LIMITS)
    (episode,) = rollout(ScriptedSampler(say(tokenizer, ["a"])), play, rows, 1, KEY)
    assert episode.score == 0.0


class AddsOnly:
    """A class of TRL's environment_factory without get_reward."""

    def reset(self, **row):
        return None

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: the first
            b: the second
        """
        return a + b


def test_an_episode_without_an_environment_is_one_turn():
    episodes = played(single_turn(), ["a", "b"], questions=("q", "r"), group=2)
    assert [part.prompt for part in episodes] == [0, 0, 1, 1]
    assert all(len(part.segments) == 1 and np.isnan(part.score) and part.ended for part in episodes)


def test_trl_environments_run_unchanged():
    """With methods as tools, get_reward, which may be async, and reset's text behind the prompt."""

    class Counter:
        def __init__(self):
            self.count = 0

        def reset(self, **row):
            self.count = row["number"]
            return f" Start at {self.count}."

        def increment(self, step: int) -> int:
            """Increment the counter.

            Args:
                step: by how much
            """
            self.count += step
            return self.count

        async def get_reward(self):
            await asyncio.sleep(0.01)
            return float(self.count)

    call = '<tool_call>\n{"name": "increment", "arguments": {"step": 4}}\n</tool_call>'
    for given_to_trl in (Counter, lambda: Counter()):
        episodes = played(environment_of(given_to_trl), [call, call, "done"], questions=("q", "r"))
        assert [part.score for part in episodes] == [8.0, 9.0]
        assert [part.turns[0]["content"] for part in episodes] == ["q Start at 0.", "r Start at 1."]


def test_the_tools_of_a_prompt_count_in_its_length(tmp_path):
    """One that is too long with them is left out, rather than a fault of every episode."""
    tokenizer = stock_tokenizer("qwen2.5")
    (tmp_path / "r.jsonl").write_text('{"prompt": "q"}\n' + json.dumps({"prompt": "why " * 30}) + "\n")
    rows = Rollouts(str(tmp_path / "r.jsonl"), rules=Rules((exact,)), max_prompt=2000)
    plain = read_prompts(rows.train, rows.reader(tokenizer, tmp_path)).lengths
    with_tools = replace(rows, tools=(add,), max_turns=2)
    prompts = read_prompts(rows.train, with_tools.reader(tokenizer, tmp_path))
    (first, second), shown = prompts.lengths, tokenizer.decode(prompts.token_ids[0])
    assert first - plain[0] == second - plain[1] > 100 and '"name": "add"' in shown
    limited = replace(with_tools, max_prompt=int(first))
    assert first > plain[1] and limited.reader(tokenizer, tmp_path).read(rows.train).dropped == 1


def test_a_row_names_its_environment_of_a_dict_as_with_trl(tmp_path, monkeypatch):
    """It has the prompt's tools, the calls and the score of that one, whose reset is not told the name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "envs.py").write_text(
        "class Adder:\n"
        "    def reset(self, *, number, **row):\n"
        "        assert 'environment' not in row\n"
        "        self.total = number\n"
        "    def more(self, by: int) -> int:\n"
        '        """Add.\n\n        Args:\n            by: how much\n        """\n'
        "        self.total += by\n"
        "        return self.total\n"
        "    def get_reward(self):\n"
        "        return float(self.total)\n"
        "def judge(state, text, row):\n"
        "    return None, -1.0, True, None\n"
        "ENVIRONMENTS = {'adder': Adder, 'judge': judge}\n"
    )
    rows = [{"prompt": "q", "number": i, "environment": x} for i, x in enumerate(("adder", "judge", "none"))]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = parse_value("envs.py:ENVIRONMENTS", EnvironmentClass)
    data = Rollouts("r.jsonl", rules=Rules((exact,)), environment=given, max_prompt=2000, max_turns=2)
    data = replace(data, invalid="drop", invalid_limit=0.5)
    tokenizer, environment = stock_tokenizer("qwen2.5"), environment_of(given)
    prompts = read_prompts("r.jsonl", data.reader(tokenizer, tmp_path))
    (unknown,) = prompts.split.rows.invalid
    assert unknown.first.endswith("'none', which names no environment; use adder, judge")
    call = '<tool_call>\n{"name": "more", "arguments": {"by": 4}}\n</tool_call>'
    sampler = ScriptedSampler(say(tokenizer, [call, "done"]))
    play = Play(environment, tokenizer, stop_of(tokenizer), LIMITS)
    adder, judge = rollout(sampler, play, prompts.select([0, 1]), 1, KEY)
    assert "more" in tokenizer.decode(adder.start) and "more" not in tokenizer.decode(judge.start)
    assert (adder.score, judge.score) == (4.0, -1.0)


def test_scores_arrive_while_other_rows_are_sampled():
    """The first turn of one episode is answered only when another episode has ended."""
    other_ended = threading.Event()
    tokenizer, how = stock_tokenizer("qwen2.5"), TEMPLATES["qwen2.5"].settings

    def patient(state, text, row):
        if row["number"] == 0:
            assert other_ended.wait(5)
        return "next", 1.0, state == 1, 1

    ended = []

    def end(number, trajectory):
        ended.append(number)
        other_ended.set()

    play = Play(environment_of(patient), tokenizer, stop_of(tokenizer), LIMITS)
    sampler = ScriptedSampler(say(tokenizer, ["a"]))
    episodes = rollout(sampler, play, rows_of(tokenizer, ["q", "r"], how), 1, KEY, end)
    assert [part.fault for part in episodes] == ["", ""] and ended == [1, 0]


# ---- faults


def fault_counts(episodes):
    return Counter(fault.kind for episode in episodes for fault in episode.faults)


def hang(state, text, row):
    while True:
        pass


def sleep(state, text, row):
    time.sleep(3)


def leave(state, text, row):
    raise SystemExit(3)


def large(state, text, row):
    return "x" * 10_000_000, 0.0, False, state


def large_elsewhere(state, text, row):
    return [{"role": "user", "content": "a", "name": "x" * 300}], 0.0, False, state


FAULTY = {
    "timeout": (hang, sleep),
    "raised": (leave, lambda state, text, row: 1 / 0),
    "wrong_type": (
        lambda state, text, row: "a text",
        lambda state, text, row: ("a", "much", False, None),
        lambda state, text, row: ("a", float("nan"), False, None),
        lambda state, text, row: ("a", 0.0, "yes", None),
        lambda state, text, row: (7, 0.0, False, None),
        lambda state, text, row: ({"role": "user", "content": "a", "image": object()}, 0.0, False, None),
        lambda state, text, row: ({"role": "assistant", "content": "a", "tool_calls": "b"}, 0.0, False, None),
        lambda state, text, row: ([{"role": "tool", "content": "a"}, "b"], 0.0, False, None),
        lambda state, text, row: (np.array([1, 2]), 0.0, False, None),
    ),
    "large_observation": (large, large_elsewhere),
}


@pytest.mark.parametrize("kind", FAULTY)
def test_a_fault_of_the_environment_excludes_the_episode_alone(kind):
    """Neither one that hangs nor one that exits ends the run; the others keep their scores."""
    for faulty in FAULTY[kind]:

        def some(state, text, row, faulty=faulty):
            return faulty(state, text, row) if row["number"] == 1 else (None, 1.0, True, state)

        environment = environment_of(lambda state, text, row: some(state, text, row))
        limits = replace(LIMITS, timeout=0.2 if kind == "timeout" else 30.0, workers=2)
        episodes = played(environment, ["a"], questions=("q", "r", "s"), limits=limits)
        assert [part.fault for part in episodes] == ["", kind, ""]
        assert [part.score for part in episodes][::2] == [1.0, 1.0] and np.isnan(episodes[1].score)
        assert fault_counts(episodes) == {kind: 1} and episodes[1].faults[0].text
        assert [turn["content"] for turn in episodes[1].turns] == ["r", "a"]


def test_a_reset_that_fails_excludes_the_episode_and_starts_the_others():
    class Failing:
        def reset(self, row):
            if row["number"] == 0:
                raise OSError("no such server")
            return (None, 5, "x" * 9000, "x" * 10_000_000, None)[row["number"]]

        def step(self, state, text):
            return None, 1.0, True, state

    limits = replace(LIMITS, observation=10_000)
    episodes = played(environment_of(Failing), ["a"], questions=tuple("qrstu"), group=2, limits=limits)
    assert [part.fault for part in episodes[::2]] == [
        "raised", "wrong_type", "long_prompt", "large_observation", "",
    ]  # fmt: skip
    assert episodes[0].faults[0].text == "OSError: no such server" and episodes[8].score == 1.0
    assert "tokens, more than data.max_prompt=2000; raise it" in episodes[4].faults[0].text
    assert "more than data.max_observation=10000; raise it" in episodes[6].faults[0].text


def test_text_that_is_no_unicode_reaches_the_model_with_replacements():
    """As a file's bytes may be read: in messages and their other keys, a prompt, results and errors."""

    class Broken:
        def reset(self, row):
            return " caf\udce9"

        def step(self, state, text):
            return {"role": "user", "content": "\ud800 more", "name": "\udce9"}, 1.0, state == 1, 1

        def read(self, path: str):
            """Read a file.

            Args:
                path: of the file
            """
            if path == "b":
                raise ValueError("caf\udce9")
            return path + "\udce9"

    calls = [f'<tool_call>{{"name": "read", "arguments": {{"path": "{path}"}}}}</tool_call>' for path in "ab"]
    (episode,) = played(environment_of(Broken), [*calls, "a"])
    assert not episode.fault and fault_counts([episode]) == {"tool_error": 1} and episode.score == 2.0
    said = [turn["content"] for turn in episode.turns if turn["role"] != "assistant"]
    assert said == ["q caf\ufffd", "a\ufffd", '{"error": "ValueError: caf\ufffd"}', "\ufffd more"]
    json.dumps(episode.turns, ensure_ascii=False).encode()  # as completions.jsonl has them


def test_a_malformed_call_beside_a_right_one_is_counted_and_answered_too():
    bad = "<tool_call>\n{bad\n</tool_call>"
    (episode,) = played(environment_of(None, [add]), [f"{CALL}\n{bad}\n{bad}", "It is 5."])
    assert fault_counts([episode]) == {"malformed_call": 2} and not episode.fault
    results = [turn["content"] for turn in episode.turns if turn["role"] == "tool"]
    assert results[0] == "5" and len(results) == 3 and "not valid JSON" in results[2]


def test_the_error_of_a_tool_is_stored_shortened():
    def fail(a: int):
        """Fail.

        Args:
            a: a number
        """
        raise ValueError("x" * 1_000_000)

    call = '<tool_call>{"name": "fail", "arguments": {"a": 1}}</tool_call>'
    (episode,) = played(environment_of(None, [fail]), [call, "a"])
    assert len(episode.faults[0].text) == 200 and len(episode.turns[2]["content"]) < 250


def test_a_rollout_waits_for_tools_where_no_row_is_in_progress():
    """It asks the session for turns a few times, not in a loop, while a call takes its time."""
    tokenizer, how = stock_tokenizer("qwen2.5"), TEMPLATES["qwen2.5"].settings
    sampler = ScriptedSampler(say(tokenizer, ["a"]))
    session, waits = sampler.opened, []

    class OneRow:
        """A session of one row: a second prompt waits until it is free."""

        def __init__(self):
            self.waiting = []

        def start(self, *given):
            self.waiting.append(given)
            self.begin()

        def begin(self):
            if self.waiting and not session.ids:
                session.start(*self.waiting.pop(0))

        def extend(self, *given):
            session.extend(*given)

        def drop(self, episode):
            session.drop(episode)
            self.begin()

        def wait(self):
            waits.append(1)
            return session.wait()

    def slow(state, text, row):
        time.sleep(0.2)
        return None, 1.0, True, state

    play = Play(environment_of(slow), tokenizer, stop_of(tokenizer), LIMITS)
    row = OneRow()
    episodes = rollout(lambda key: row, play, rows_of(tokenizer, ["q", "r"], how), 1, KEY)
    assert [part.score for part in episodes] == [1.0, 1.0] and len(waits) < 20


ERRORS = {
    "unknown_tool": '<tool_call>\n{"name": "nothing", "arguments": {}}\n</tool_call>',
    "bad_arguments": '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>',
    "malformed_call": '<tool_call>\n{"name": "add", "arg\n</tool_call>',
    "tool_error": '<tool_call>\n{"name": "repeat", "arguments": {"text": "x", "times": -1}}\n</tool_call>',
    "large_result": '<tool_call>\n{"name": "repeat", "arguments": {"text": "x", "times": 201}}\n</tool_call>',
}
WRONG_TYPES = (
    ("add", {"a": "2", "b": 3}, "argument 'a' is \"2\", expected of type integer"),
    ("add", {"a": True, "b": 3}, "argument 'a' is true, expected of type integer"),
    ("add", {"a": None, "b": 3}, "argument 'a' is null, expected of type integer"),
    ("choose", {"colour": "blue"}, "argument 'colour' is \"blue\", expected one of ['red', 'green']"),
    (
        "choose",
        {"colour": "red", "sizes": [1, "2"]},
        "argument 'sizes' is [1, \"2\"], expected of type array",
    ),
)


def repeat(text: str, times: int):
    """Repeat a text.

    Args:
        text: what to repeat
        times: how often
    """
    if times < 0:
        raise ValueError("times is negative")
    return text * times


def choose(colour: Literal["red", "green"], sizes: list[int] = [], weight: float | None = None):  # noqa: B006
    """Choose something.

    Args:
        colour: its colour
        sizes: its sizes
        weight: its weight
    """
    return f"{colour} {sizes} {weight}"


def test_arguments_of_other_types_than_the_schemas_are_returned_to_the_model():
    def told(name, arguments):
        call = f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
        (episode,) = played(environment_of(None, [add, choose]), [call, "a"])
        return episode

    for name, arguments, message in WRONG_TYPES:
        episode = told(name, arguments)
        assert fault_counts([episode]) == {"bad_arguments": 1}
        assert episode.faults[0].text == f"{name}: {message}"
    right = told("choose", {"colour": "red", "sizes": [1, 2], "weight": None})
    assert not right.faults and right.turns[2]["content"] == "red [1, 2] None"
    assert told("choose", {"colour": "green", "weight": 2}).turns[2]["content"] == "green [] 2"


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_in_the_models_call_is_returned_to_the_model(kind):
    limits = replace(LIMITS, turn_tokens=600, tokens=2000)
    (episode,) = played(environment_of(None, [add, repeat]), [ERRORS[kind], "I see."], limits=limits)
    assert not episode.fault and episode.ended and fault_counts([episode]) == {kind: 1}
    assert [turn["role"] for turn in episode.turns] == ["user", "assistant", "tool", "assistant"]
    assert '"error"' in episode.turns[2]["content"]


def test_a_template_that_rejects_an_answer_is_a_fault():
    def answer(state, text, row):
        return {"role": "assistant", "content": "me"}, 0.0, False, state

    (episode,) = played(environment_of(answer), ["a"], "gemma")
    assert episode.fault == "template" and "rejects" in episode.faults[0].text


def test_random_faults_neither_stop_the_rollout_nor_bias_the_mean():
    """Each call fails with probability 0.1 whatever the episode is about."""
    rng = random.Random(1)

    def answer(state, text, row):
        if rng.random() < 0.1:
            raise ConnectionError("reset by peer")
        turn = (state or 0) + 1
        return "more", float(row["number"] % 2), turn == 2, turn

    episodes = played(environment_of(answer), ["a"], questions=["q"] * 200)
    kept = [part.score for part in episodes if not part.fault]
    assert (
        20 <= fault_counts(episodes)["raised"] <= 60 and len(kept) + fault_counts(episodes)["raised"] == 200
    )
    assert abs(np.mean(kept) - 1.0) < 0.2


# ---- what a user sets


class Game:
    """An environment that needs to know where its server is."""

    def __init__(self, url, port=80):
        self.url, self.port = url, port

    def reset(self, row):
        return f" {self.url}:{self.port}"

    def step(self, state, text):
        return None, 1.0, True, state


class Gym:
    """Another library's shape of an environment."""

    def reset(self, seed=None):
        return 0, {}

    def step(self, action):
        return 0, 0.0, True, False, {}


def settings_of_a_run(base=1, prompts=2, name="a", lr=0.1):
    return name


BAD = {
    "takes (prompt, completion); use (state, text, row)": lambda prompt, completion: 0.0,
    "settings_of_a_run takes (base=1, prompts=2, name='a', lr=0.1); use": settings_of_a_run,
    "neither a class nor a function": 3,
    "has no reset": type("Empty", (), {}),
    "missing a required argument: 'url', but jaxft makes its objects without arguments. Set": Game,
    "raised ZeroDivisionError: division by zero; fix that call": lambda: 1 / 0,
    "is an object of class Game, but concurrent episodes need one object each": Game("here"),
    "If step is not a tool: Define reset(self, row) and step(self, state, text)": Gym,
}


def test_a_class_with_arguments_is_given_with_them():
    class Board(dict):  # has no signature
        def reset(self, row):
            return None

        def step(self, state, text):
            return None, 1.0, True, state

    assert environment_of(Board).name == "Board"
    (episode,) = played(environment_of(partial(Game, "here", port=8)), ["a"])
    assert episode.score == 1.0 and episode.turns[0]["content"] == "q here:8"


def test_a_step_with_arguments_of_its_own_is_a_tool_of_a_class_with_get_reward():
    class Walker(AddsOnly):
        def reset(self, prompt):
            self.at = 0

        def step(self, x: int, y: int):
            """Walk.

            Args:
                x: to the right
                y: upwards
            """
            self.at += x + y

        def get_reward(self):
            return float(self.at)

    environment = environment_of(Walker)
    assert [schema["function"]["name"] for schema in environment.schemas] == ["add", "step"]


@pytest.mark.parametrize("message", BAD)
def test_what_is_no_environment_is_refused(message):
    with pytest.raises(ValueError) as error:
        environment_of(BAD[message])
    assert message in str(error.value)


def test_functions_of_one_file_are_named_after_it_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_tools.py").write_text("def add(a): return a\ndef search(q): return q\n")
    (tmp_path / "other.py").write_text("def count(a): return a\n")
    functions = parse_value("my_tools.py:add,search,other.py:count", tuple[Callable, ...])
    assert [function.__name__ for function in functions] == ["add", "search", "count"]
    with pytest.raises(ValueError, match="my_tools.py has no 'serch'; it has: add, search"):
        parse_value("my_tools.py:add,serch", tuple[Callable, ...])


def test_a_tool_that_no_call_can_reach_or_that_is_not_described_is_refused():
    def bare(a):
        return a

    with pytest.raises(ValueError, match="tool bare: .*docstring.* Give each argument a type"):
        environment_of(None, [bare])

    def by_position(a: int, /):
        """Do it.

        Args:
            a: a number
        """

    def any_number(*a: int):
        """Do it.

        Args:
            a: numbers
        """

    def lazy(a: int):
        """Do it.

        Args:
            a: a number
        """
        yield a

    for tool in (by_position, any_number):
        with pytest.raises(ValueError, match=f"tool {tool.__name__}: a call gives each argument by its name"):
            environment_of(None, [tool])
    with pytest.raises(ValueError, match="tool lazy: it is a generator. Return its values"):
        environment_of(None, [lazy])
    with pytest.raises(ValueError, match="two tools are named add"):
        environment_of(None, [add, add])


def test_tools_need_a_template_whose_calls_are_read():
    tokenizer = stock_tokenizer("chatml")
    with pytest.raises(ValueError, match="no format of tool calls that jaxft reads. Set chat_template=qwen"):
        Play(environment_of(None, [add]), tokenizer, ())
    with pytest.raises(ValueError, match="no format of tool calls that jaxft reads"):  # before reading rows
        Rollouts("none.jsonl", rules=Rules((exact,)), tools=(add,), max_turns=2).open(tokenizer)
