"""Rows of a prompt and its episodes, against each episode alone."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_model
from rl_completions import LENGTHS, episodes_of, random_completions, random_episodes

from jaxft.data.packing.pack import RowShape
from jaxft.data.prompts import Prompts
from jaxft.nn.adapters.lora import Adapter
from jaxft.objectives.losses.policy_losses import clipped
from jaxft.objectives.policy import policy
from jaxft.rl.rollout_layout import pack_episodes, per_episode, rollout_shapes, to_microbatches
from jaxft.rl.trajectory import collect


def test_values_of_tokens_come_back_from_rows():
    episodes = episodes_of(*random_completions(LENGTHS), LENGTHS)
    packed = pack_episodes(episodes, [RowShape(32, 16)], (3, 4))
    x = np.random.default_rng(1).normal(size=(6, 7)).astype(np.float32)
    mask = np.arange(7) < LENGTHS.reshape(6, 1)
    rows = packed.from_tokens(x)
    assert rows.shape == (3, 16) and (rows[:, 10:] == 0).all() and (rows != 0).sum() == LENGTHS.sum()
    np.testing.assert_array_equal(packed.to_tokens(rows, episodes), np.where(mask, x, 0))


def test_a_value_of_an_episode_is_at_its_own_read_positions():
    packed = pack_episodes(episodes_of(*random_completions(LENGTHS), LENGTHS), [RowShape(32, 16)], (2, 4))
    values = 1.0 + np.arange(6).reshape(2, 3)
    expected = [np.repeat(own, count) for own, count in zip(values, LENGTHS, strict=True)]
    rows = per_episode(values, packed.rows)
    for row, own in zip(rows, expected, strict=True):
        assert row[: len(own)].tolist() == own.tolist() and not row[len(own) :].any()


def test_a_row_of_several_completions_has_the_log_probs_of_each_alone(x64):
    model, params = tiny_model.tiny(adapter=Adapter(rank=2))
    episodes = episodes_of(*random_completions(LENGTHS), LENGTHS)
    check_log_probs(model, params, episodes, RowShape(32, 16))


def test_a_row_of_episodes_has_the_log_probs_of_each_training_row_alone(x64):
    """With given tokens between sampled ones, a later training row, an own prompt, and one without tokens."""
    model, params = tiny_model.tiny(adapter=Adapter(rank=2))
    check_log_probs(model, params, random_episodes(), RowShape(96, 32))


def check_log_probs(model, params, episodes, shape):
    """The log-probs of rows are those of each trajectory alone, at its sampled tokens."""
    packed = pack_episodes(episodes, [shape])
    logps = policy(model, clipped, temperature=0.7).score(params, packed.rows, {}).logps
    found = packed.to_tokens(np.asarray(logps), episodes)
    for own, trajectory in zip(found, episodes.trajectories, strict=True):
        expected = []
        for start, text, mask in trajectory.rows():
            sampled = np.flatnonzero(mask)
            if len(sampled):
                alone = tiny_model.batch_of([[(text, start)]], 64, 48, 1.0)
                logits = model.logits(model.head(params), model.hidden(params, alone)[0])[0] / 0.7
                expected += np.asarray(jax.nn.log_softmax(logits))[sampled - 1, text[sampled]].tolist()
        np.testing.assert_allclose(own[: len(expected)], expected, rtol=1e-10)
        assert not own[len(expected) :].any()


def test_given_tokens_are_in_the_row_and_have_no_read_position():
    episodes = random_episodes()
    rows = pack_episodes(episodes, [RowShape(96, 32)]).rows
    for g in range(len(rows.ids)):
        own = episodes.trajectories[2 * g : 2 * g + 2]
        is_read = rows.responses[g] < 2
        sampled = [s.tokens for trajectory in own for s in trajectory.sampled]
        assert sorted(rows.targets[g][is_read]) == sorted(np.concatenate(sampled))
        assert is_read.sum() == episodes.lengths[g].sum() == rows.lengths[g].sum()
        # of the last sampled token of each episode, behind which nothing of it is in the row
        for slot, trajectory in enumerate(own):
            if rows.lengths[g, slot]:
                assert rows.ids[g, rows.last[g, slot]] == trajectory.sampled[-1].tokens[-1]


def test_episodes_that_do_not_fit_into_their_rows_are_faults():
    episodes = random_episodes()
    lengths = [sum(len(row.ids) for row in t.rows()) - len(t.start) for t in episodes.trajectories]
    limit = sorted(lengths)[-2]
    found = collect(episodes.prompts, episodes.trajectories, episodes.size, limit)
    assert [t.fault == "too_long" for t in found.trajectories] == [n > limit for n in lengths]
    assert (found.lengths.ravel() == 0).tolist() == [
        n > limit or not count for n, count in zip(lengths, episodes.lengths.ravel(), strict=True)
    ]


@pytest.mark.parametrize("turns", [1, 3])
def test_the_smallest_row_shape_that_holds_a_rollout_is_used(turns):
    more = {"max_turns": 3, "max_episode": 90} if turns > 1 else {}
    data = Prompts("x", max_new=40, group=4, batch=2, **more)
    shapes = [*rollout_shapes(data, 20, shards=1)]
    sampled, longest = (40, 40) if turns == 1 else (90, 90)
    assert shapes[-1].length >= 20 + 4 * longest and shapes[-1].reads >= 4 * sampled
    prompts, tokens = random_completions(np.full((2, 4), 40), size=40)
    for count, expected in ((9, 0), (40, 1 if turns == 3 else 2)):
        lengths = np.full((2, 4), count)
        episodes = replace(episodes_of(prompts, tokens, lengths), longest=longest)
        assert pack_episodes(episodes, shapes).shape == shapes[expected]


def test_microbatches_are_padded_with_empty_rows():
    rows = pack_episodes(episodes_of(*random_completions(LENGTHS), LENGTHS), [RowShape(32, 16)]).rows
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, 4, x.shape[-1]), x.dtype), rows)
    batch = to_microbatches(rows, like)
    assert jax.tree.map(np.shape, batch) == jax.tree.map(lambda s: s.shape, like)
    for i in range(2):
        np.testing.assert_array_equal(batch.ids[i, 0], rows.ids[i])
        assert not batch.segments[i, 1:].any() and (batch.responses[i, 1:] == 3).all()
