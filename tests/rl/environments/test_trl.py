"""Environments in the shapes of TRL's examples, with their reward functions (environments, **kwargs)."""

import asyncio
import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from chat_templates import TEMPLATES, stock_tokenizer
from scripted_session import ScriptedSampler
from test_scripted_episodes import KEY, LIMITS, fault_counts, rows_of, stop_of

from jaxft.data.prompts import read_prompts
from jaxft.rl.environments.environment import environment_of
from jaxft.rl.episodes import Play, rollout
from jaxft.rl.rewards import FunctionReward, exact
from jaxft.rl.rollout_rules import Rules
from jaxft.rl.rollout_sampler import from_bytes, to_bytes
from jaxft.rl.rollout_source import Rollouts
from jaxft.rl.trajectory import collect


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def scored(factory, functions, turns, play=None, **columns):
    """Play an episode for each list of turns, and return the rollout as its rules score it."""
    tokenizer, how = stock_tokenizer("qwen2.5"), TEMPLATES["qwen2.5"].settings
    rules = Rules(functions)
    functions = tuple(reward.fn for reward in rules.rewards)
    play = play or Play(environment_of(factory), tokenizer, stop_of(tokenizer), LIMITS, functions)
    rows = rows_of(tokenizer, ["Play."] * len(turns), how, list(play.environment.schemas))
    fields = tuple({name: values[i] for name, values in columns.items()} for i in range(len(turns)))
    rows = rows.__class__(**{**vars(rows), "fields": fields})
    at = dict.fromkeys(range(len(turns)), 0)

    def write(ids, episode):
        text = [*turns[episode], "done"][at[episode]]
        at[episode] += 1
        return [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id], True

    found = rollout(ScriptedSampler(write), play, rows, 1, KEY)
    replayed = from_bytes(to_bytes(found, 0))
    assert repr([t.rewards for t in replayed]) == repr([t.rewards for t in found])
    episodes = collect(rows, found, 2000, 3000, 4)
    return rules.score(episodes, [r.prepare(None)(episodes, None, None) for r in rules.rewards]), play


class Merging:
    """2048's shape: state in attributes, a public static helper, ValueError for what is not allowed."""

    def reset(self, **kwargs) -> str:
        self.cells, self.score, self.done = [2, 2, 4], 0.0, False
        return f" cells={self.cells}"

    def move(self, direction: str) -> str:
        """
        Move all cells.

        Args:
            direction: One of "left", "right".

        Returns:
            The cells after the move.
        """
        if self.done:
            raise ValueError("Game over.")
        if direction.strip().lower() not in {"left", "right"}:
            raise AssertionError(f"no such direction: {direction}")
        self.cells, gained = self.merged(self.cells)
        self.score += gained
        self.done = len(self.cells) == 1
        return f"cells={self.cells} done={self.done}"

    @staticmethod
    def merged(cells):
        first, second, *rest = cells
        return ([first + second, *rest], first + second) if first == second else (cells, 0)


def reward_score(environments, **kwargs):
    return [env.score for env in environments]


def test_a_game_with_its_score_in_an_attribute():
    """As 2048. An error of a tool is what the model reads, whichever exception it is."""
    left = call("move", direction="left")
    turns = [[left, left], [left, left, left], [call("move", direction="up"), left], []]
    found, _ = scored(Merging, (reward_score,), turns)
    assert found.scores.ravel().tolist() == [12.0, 12.0, 4.0, 0.0]
    third, fourth = (found.episodes.trajectories[i] for i in (1, 2))
    assert json.loads(third.turns[-2]["content"]) == {"error": "ValueError: Game over."}
    assert "no such direction: up" in fourth.turns[2]["content"] and not fourth.fault
    assert fault_counts(found.episodes.trajectories) == {"tool_error": 2}
    assert third.turns[0]["content"] == "Play. cells=[2, 2, 4]"


class FallingBall:
    """A client of a game server, which serves one game at a time; it counts the clients."""

    made = 0

    def __init__(self, base_url):
        FallingBall.made += 1
        self.url, self.thread = base_url, threading.get_ident()

    def reset(self):
        self.at, self.height = 0, 2
        return self.result()

    def step(self, action):
        assert self.thread == threading.get_ident()
        self.at, self.height = self.at + action, self.height - 1
        return self.result()

    def result(self):
        done = self.height == 0
        reward = (1.0 if self.at == 1 else -1.0) if done else None
        return SimpleNamespace(observation=SimpleNamespace(info_state=[self.at], done=done), reward=reward)


def falling_ball(url):
    """Catch's shape: a class in a function, with a client that its __init__ makes."""

    class CatchEnv:
        def __init__(self):
            self.client = FallingBall(base_url=url)
            self.reward = 0.0
            self.done = False

        def reset(self, **kwargs) -> str:
            result = self.client.reset()
            self.reward, self.done = 0.0, result.observation.done
            return str(result.observation.info_state)

        def _act(self, action: int) -> str:
            if self.done:
                raise ValueError("Episode is done.")
            result = self.client.step(action)
            self.reward, self.done = result.reward or 0.0, result.observation.done
            return str(result.observation.info_state)

        def move(self, direction: str) -> str:
            """Move the paddle.

            Args:
                direction: Either "left" or "right".

            Returns:
                The observation after moving.
            """
            return self._act({"left": -1, "right": 1}[direction])

        def stay(self) -> str:
            """Do nothing and let the ball fall one step.

            Returns:
                The observation after staying.
            """
            return self._act(0)

    return CatchEnv


def caught(environments, **kwargs):
    return [max(env.reward, 0.0) if env.done else 0.0 for env in environments]


def test_a_client_that_is_made_once_plays_episode_after_episode():
    """As Catch, Wordle and Echo: as many clients as episodes at once, in all rollouts."""
    FallingBall.made = 0
    turns = [[call("move", direction="right"), call("stay")], [call("stay"), call("stay")], [call("stay")]]
    found, play = scored(falling_ball("http://game"), (caught,), turns)
    assert found.scores.ravel().tolist() == [1.0, 0.0, 0.0]
    again, _ = scored(None, (caught,), turns, play)
    assert again.scores.ravel().tolist() == [1.0, 0.0, 0.0] and FallingBall.made == 3


class TwoGames:
    """The shape of the example with several environments in one class: a column says which."""

    def __init__(self):
        self.active, self.reward = None, 0.0

    def reset(self, **kwargs) -> str | None:
        self.active, self.reward = kwargs.get("env", "words"), 0.0
        return " Guess a word." if self.active == "words" else None

    def guess(self, guess: str) -> str:
        """
        Make a guess.

        Args:
            guess: The guessed word.
        """
        if self.active != "words":
            raise ValueError("guess is only available with words")
        self.reward = float(guess == "[crane]")
        return "GGGGG" if self.reward else "XXYXX"


def words_reward(environments, **kwargs) -> list[float | None]:
    return [env.reward if env.active == "words" else None for env in environments]


def short_reward(environments, completions, env, **kwargs) -> list[float | None]:
    """0.5 for one message, if this is no game of words."""
    return [
        None if x.active == "words" else 0.5 * (len(c) == 1 and c[-1]["role"] == "assistant")
        for x, c, name in zip(environments, completions, env, strict=True)
        if name == x.active
    ]


def test_none_of_a_reward_leaves_the_episode_to_the_others():
    turns = [
        [call("guess", guess="[crane]")],
        [call("guess", guess="[crate]")],
        [],
        [call("guess", guess="x")],
    ]
    found, _ = scored(TwoGames, (words_reward, short_reward), turns, env=["words", "words", "catch", "catch"])
    assert found.scores.ravel().tolist() == [1.0, 0.0, 0.5, 0.0]
    each = found.reward_scores.reshape(4, 2)
    assert np.isnan(each).tolist() == [[False, True]] * 2 + [[True, False]] * 2


class OwnLoop:
    """Harbor's shape: an event loop of its own in a thread, and a reward that a property computes once."""

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._said = None

    def reset(self, task_dir: str | None = None, **kwargs) -> str:
        self._said = None
        return f" The task is in {task_dir}."

    def bash(self, command: str) -> str:
        """Run a command.

        Args:
            command: The command.
        """
        if command == "crash":
            raise RuntimeError("sandbox is gone")
        self._said = command
        return "(empty output, rc=0)"

    @property
    def reward(self) -> float:
        async def verify():
            return float(self._said == "answer")

        return asyncio.run_coroutine_threadsafe(verify(), self._loop).result()


async def outcome(environments=None, environment_reward=None, **_) -> list[float]:
    await asyncio.sleep(0)
    return [float(env.reward) for env in environments]


def test_an_environment_with_an_event_loop_of_its_own_and_an_async_reward():
    turns = [[call("bash", command="answer")], [call("bash", command="crash")]]
    found, _ = scored(OwnLoop, (outcome,), turns, task_dir=["a", "b"])
    assert found.scores.ravel().tolist() == [1.0, 0.0]
    assert found.episodes.trajectories[1].turns[0]["content"] == "Play. The task is in b."
    assert "sandbox is gone" in found.episodes.trajectories[1].turns[2]["content"]


def raises(environments, **kwargs):
    return [1 / 0 for _ in environments]


def returns_text(environments, **kwargs):
    return "1"


def returns_two(environments, **kwargs):
    return [1.0, 2.0]


@pytest.mark.parametrize(
    "function, kind", [(raises, "raised"), (returns_text, "wrong_type"), (returns_two, "wrong_type")]
)
def test_a_fault_of_such_a_reward_excludes_the_episode(function, kind):
    found, _ = scored(Merging, (function,), [[]])
    assert found.episodes.trajectories[0].fault == kind and np.isnan(found.scores).all()


def test_such_a_reward_without_an_environment_is_refused():
    with pytest.raises(
        ValueError, match="rewards reward_score have the parameter environments; set environment=my_env.py"
    ):
        Rollouts("r.jsonl", rules=Rules((reward_score, exact))).open(None)
    with pytest.raises(ValueError, match="reward_score.* has the parameter environments, which only"):
        FunctionReward(reward_score)
    with pytest.raises(ValueError, match="rename one of the functions that have the same name"):
        Rollouts("r.jsonl", rules=Rules((caught, caught)), environment=Merging, max_turns=2).open(None)


def test_a_factory_is_called_once_to_learn_its_class():
    made = []

    def factory():
        made.append(Merging())
        return made[-1]

    assert [environment_of(factory).name for _ in range(3)] == ["Merging"] * 3 and len(made) == 1
    assert [s["function"]["name"] for s in environment_of(factory).schemas] == ["move"]


class OwnsItsData:
    """The shape of TRL's documentation: no dataset, the prompt is what reset returns."""

    def reset(self, seed: int = 0, **kwargs) -> str:
        self.target, self.count = 3 + seed, 0
        return f"Increment to {self.target}."

    def increment(self, step: int) -> str:
        """
        Increment the counter.

        Args:
            step: By how much.
        """
        self.count += step
        return str(self.count)

    def get_reward(self) -> float:
        return float(self.count == self.target)


def test_an_environment_that_returns_its_prompt_needs_none_in_the_rows(tmp_path):
    """If reset is annotated to return a string; otherwise a row without a prompt is invalid."""
    tokenizer, path = stock_tokenizer("qwen2.5"), tmp_path / "r.jsonl"
    path.write_text('{"seed": 1}\n{"seed": 2}\n')
    data = Rollouts(str(path), rules=Rules((exact,)), environment=OwnsItsData, max_prompt=2000, max_turns=2)
    rows = read_prompts(data.train, data.reader(tokenizer, tmp_path)).select([0, 1])

    def write(ids, episode):
        text = call("increment", step=5) if "tool_response" not in tokenizer.decode(ids) else "done"
        return [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id], True

    play = Play(data.played, tokenizer, stop_of(tokenizer), LIMITS)
    found = rollout(ScriptedSampler(write), play, rows, 1, KEY)
    assert [t.turns[0]["content"] for t in found] == ["Increment to 4.", "Increment to 5."]
    assert [t.score for t in found] == [0.0, 1.0]
    with pytest.raises(ValueError, match="the columns seed include no prompt"):
        read_prompts(data.train, replace(data, environment=TwoGames).reader(tokenizer, tmp_path))
