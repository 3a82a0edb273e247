"""Rewards of several sources of prompts: each is the mean over that source's scored completions alone."""

import json
from collections import defaultdict

import numpy as np
import pytest
from rl_completions import TOKENIZER
from test_rollout_source import bound_run, bound_to_sampler, state_at
from tiny_tokenizers import tiny

from jaxft.data.prompts import split_prompts
from jaxft.rl.online_pairs import OnlinePairs
from jaxft.rl.rollout_rules import Rules
from jaxft.rl.rollout_source import PromptSource, Rollouts

KINDS = {"policy": Rollouts, "online pairs": OnlinePairs}


class Recorder:
    """A reward that depends on the source, fails for some rows of b, and stores its scores by source."""

    __name__ = "recorder"

    def __init__(self):
        self.scores = defaultdict(list)

    def __call__(self, prompt, completion, row):
        if row["source"] == "b" and row["number"] % 3 == 0:
            return None
        score = len(completion) + {"a": 0.0, "b": 20.0, "c": -5.0}[row["source"]]
        self.scores[row["source"]].append(score)
        return score

    def means(self):
        """The mean of all scores and of each source since the last call."""
        found = {f"reward/{name}": np.mean(scores) for name, scores in self.scores.items()}
        found["reward"] = np.mean(np.concatenate(list(self.scores.values())))
        self.scores.clear()
        return found


def bound(folder, kind, train, reward):
    settings = {"format": "plain", "held_out": 0.2, "batch": 12, "group": 3, "max_new": 6, "max_prompt": 16}
    data = KINDS[kind](train, rules=Rules((reward,)), **settings)
    source = PromptSource(data, TOKENIZER, *split_prompts(data, tiny("llama3"), folder))
    return bound_to_sampler(source, bound_run(folder))


def write_prompts(folder, name, count):
    rows = [{"prompt": f"{name} {i}", "source": name, "number": i} for i in range(count)]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reward_of_a_source_is_the_mean_of_its_scores(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 30), ("b", 20), ("c", 10)):
        write_prompts(tmp_path, name, count)
    reward = Recorder()
    source = bound(tmp_path, kind, "a.jsonl:0.5,b.jsonl:0.3,c.jsonl:0.2", reward)
    for step in range(2):
        found = source.batch(step * source.data.steps_per_rollout, state_at(step))[1]
        means = {name: x.total / x.weight for name, x in found.items() if name.startswith("reward/")}
        means["reward"] = found["reward"].total / found["reward"].weight
        assert means == pytest.approx(reward.means(), rel=1e-12) and len(means) == 4
    evaluated = source.evaluate(state_at(2))
    means = {name: x for name, x in evaluated.metrics.items() if name.partition("/")[0] == "reward"}
    assert means == pytest.approx(reward.means(), rel=1e-12) and len(means) == 4
    of_prompts = [values["reward"] for values in evaluated.rows.values()]
    names = [source.held_out_name(number) for number in evaluated.rows]
    assert np.mean(of_prompts) == pytest.approx(means["reward"]) and len(set(names)) == len(of_prompts) > 1


def test_one_source_has_no_reward_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path, "a", 30)
    source = bound(tmp_path, "policy", "a.jsonl", Recorder())
    names = [*source.batch(0, state_at(0))[1], *source.evaluate(state_at(0)).metrics]
    assert not [name for name in names if name.startswith("reward/")]
