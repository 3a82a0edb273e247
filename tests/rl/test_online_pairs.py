"""Pairs of a rollout: log-probs of each completion alone, and a run on its best and worst completions."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
import rl_workdir
import tiny_model
from rl_completions import episodes_of, random_completions
from tiny_run import Place

from jaxft.data.packing.pack import RowShape
from jaxft.nn.adapters.lora import Adapter
from jaxft.objectives.preference import preference, summed_logp
from jaxft.rl import reward_models
from jaxft.rl.advantages import scale_scores
from jaxft.rl.online_pairs import OnlinePairs, to_pairs
from jaxft.rl.rewards import exact
from jaxft.rl.rollout_layout import pack_episodes
from jaxft.rl.rollout_rules import Rules


def test_pairs_have_the_log_probs_of_each_completion_alone(x64):
    model, params = tiny_model.tiny(adapter=Adapter(rank=2))
    lengths = np.array([[3, 7], [5, 2]])
    prompts, tokens = random_completions(lengths)
    pairs = to_pairs(pack_episodes(episodes_of(prompts, tokens, lengths), [RowShape(32, 16)]).rows)
    pairs = replace(pairs, pair_weights=np.full((2, 1), 0.5), mean_lengths=np.ones((2, 1, 2)))

    def loss(pair):
        return pair.chosen.logp - 2 * pair.rejected.logp

    value, _ = preference(model, loss, reference=None, reward=summed_logp)(params, pairs, None, {})
    logps = []
    for g, prompt in enumerate(prompts.ids):
        for n, count in enumerate(lengths[g]):
            text = np.array([*prompt, *tokens[g, n, :count]])
            alone = tiny_model.batch_of([[(text, len(prompt))]], 16, 8, 1.0)
            logits = model.logits(model.head(params), model.hidden(params, alone)[0])[0]
            logp = jax.nn.log_softmax(logits)[np.arange(len(prompt) - 1, len(text) - 1), text[len(prompt) :]]
            logps.append(float(logp.sum()))
            assert pairs.last[g, 0, n] == len(prompt) + lengths[g, : n + 1].sum() - 1
    expected = 0.5 * (logps[0] - 2 * logps[1] + logps[2] - 2 * logps[3])
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    assert pairs.offsets[0, :10].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6]


def test_a_response_that_is_padding_alone_is_scored_at_its_prompt():
    lengths = np.array([[1, 3], [3, 1]])
    prompts, tokens = random_completions(lengths)
    tokens[0, 0, 0] = tokens[1, 1, 0] = tokens[0, 1, 2] = 45  # which no prompt has
    pairs = to_pairs(pack_episodes(episodes_of(prompts, tokens, lengths), [RowShape(32, 16)]).rows)
    last = reward_models.read_before_pad(jax.tree.map(lambda x: x[None], pairs), 45).last[0, :, 0]
    first, second = (len(ids) - 1 for ids in prompts.ids)
    assert last.tolist() == [[first, first + 3], [second + 3, second]]
    plain = replace(pairs, branches=None, last=pairs.last + 2)  # each response has the prompt in front of it
    ids = np.zeros_like(pairs.ids)
    ids[0, pairs.last[0, 0, 1] + 2] = 45
    batch = jax.tree.map(lambda x: x[None], replace(plain, ids=ids))
    last = reward_models.read_before_pad(batch, 45).last[0, :, 0]
    assert (last - plain.last[:, 0]).tolist() == [[0, -1], [0, 0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rules": Rules((exact,), scale=scale_scores)},
            "shape and train_on_truncated. Leave scale unset.",
        ),
        ({"group": 1}, "data.group=1; expected at least 2"),
        ({"temperature": 0.0}, "data.temperature=0 samples the same completion 2 times"),
    ],
)
def test_online_pairs_refuse_settings_that_they_would_ignore(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OnlinePairs("x", **{"rules": Rules((exact,)), **settings})


@pytest.mark.slow
def test_online_dpo_raises_the_reward(tmp_path):
    rl_workdir.write_workdir(tmp_path)
    workdir = Place(tmp_path)
    argv = ["batch=16", "group=4", "passes=1", "lr=1e-2", "online=true", "max_new=12", "save=6", "steps=18"]
    argv += ["rewards=config.py:ascii"]
    assert workdir.run("name=online", *argv) == 0, workdir.err()
    lines = [line for line in workdir.metrics("online") if "reward" in line]
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    first, last = ([line["reward"] for line in part] for part in (lines[:3], lines[-3:]))
    assert np.mean(last) > 1.2 * np.mean(first)
