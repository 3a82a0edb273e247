"""ECHO's read positions: tokens that an episode was given, in rows and in batches."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_model
from rl_completions import random_prompts

from jaxft.data.packing.pack import RowShape
from jaxft.nn.adapters.lora import Adapter
from jaxft.objectives.losses.policy_losses import clipped
from jaxft.objectives.objective import Facts
from jaxft.objectives.policy import policy
from jaxft.rl import rollout_source
from jaxft.rl.rewards import number
from jaxft.rl.rollout_layout import BoundRun, pack_episodes
from jaxft.rl.rollout_rules import Rules
from jaxft.rl.rollout_source import Rollouts, TrainingRollout
from jaxft.rl.trajectory import Segment, Trajectory, collect

SAMPLED, GIVEN = True, False
# Two prompts with two episodes each, as (number of tokens, who wrote them). The second one of the first
# prompt is given tokens after its last turn; the second one of the second prompt has a fault.
EPISODES = [
    [(3, SAMPLED), (4, GIVEN), (2, SAMPLED)],
    [(1, SAMPLED), (2, GIVEN), (1, SAMPLED), (3, GIVEN), (1, SAMPLED), (5, GIVEN)],
    [(2, SAMPLED)],
    [(2, SAMPLED), (6, GIVEN), (2, SAMPLED)],
]
OBSERVED = [4, 5, 0, 0]  # given tokens that a later turn follows, in episodes without a fault


def episodes(modulo=1000):
    """The episodes with ids 100, 101, ... in order, so that each token has its own."""
    prompts, following = random_prompts(2), (i % modulo for i in range(100, 200))
    found = []
    for i, segments in enumerate(EPISODES):
        parts = []
        for count, sampled in segments:
            tokens = np.array([next(following) for _ in range(count)], np.int32)
            parts.append(Segment(tokens, np.full(count, -1.0, np.float32) if sampled else None))
        fault = "timeout" if i == 3 else ""
        found.append(Trajectory(i // 2, tuple(prompts.ids[i // 2]), tuple(parts), 1.0, fault=fault))
    return collect(prompts, found, size=8, longest=16)


def given_ids():
    """The ids of the observed tokens of each prompt."""
    ids, following = ([], []), iter(range(100, 200))
    for i, segments in enumerate(EPISODES):
        last = max(j for j, (_, sampled) in enumerate(segments) if sampled)
        for j, (count, sampled) in enumerate(segments):
            own = [next(following) for _ in range(count)]
            ids[i // 2].extend(own if not sampled and j < last and i != 3 else [])
    return ids


def test_given_tokens_are_read_after_all_sampled_ones_and_are_padding_to_the_policy():
    """Each is the target of the position before it; the rest of the rows is as without them."""
    plain, packed = (
        pack_episodes(episodes(), [RowShape(64, 32)], (3, 2), echo).rows for echo in (False, True)
    )
    assert plain.observation_weights is None
    for r in range(3):
        count, given = int(plain.lengths[r].sum()), given_ids()[r] if r < 2 else []
        own = slice(count, count + len(given))
        assert packed.targets[r, own].tolist() == given and len(given) == sum(OBSERVED[2 * r : 2 * r + 2])
        assert packed.ids[r, packed.read[r, own] + 1].tolist() == given
        assert (packed.read[r, own] >= 0).all() and (packed.responses[r, own] == 2).all()
        expected = np.zeros(32)
        expected[own] = 1
        assert packed.observation_weights[r].tolist() == expected.tolist()
        for name in ("read", "targets"):
            assert getattr(packed, name)[r, :count].tolist() == getattr(plain, name)[r, :count].tolist()
    for name in ("ids", "positions", "branches", "segments", "responses", "lengths", "last"):
        np.testing.assert_array_equal(getattr(packed, name), getattr(plain, name))


def test_the_policy_is_read_at_given_tokens_as_in_a_forward_pass_over_the_episode_alone(x64):
    model, params = tiny_model.tiny(adapter=Adapter(rank=2))
    own = episodes(modulo=tiny_model.CONFIG.vocab)
    packed = pack_episodes(own, [RowShape(64, 32)], (2, 2), True)
    scores = policy(model, clipped).score(params, packed.rows, {}).logps
    found = np.asarray(scores)[packed.rows.observation_weights > 0]
    expected = []
    for trajectory in own.trajectories[:2]:
        ((start, ids, mask),) = trajectory.rows()
        alone = tiny_model.batch_of([[(ids, start)]], 32, 32, 1.0)
        logits = model.logits(model.head(params), model.hidden(params, alone)[0])[0]
        last = np.flatnonzero(mask)[-1]
        given = np.setdiff1d(np.arange(start, last), np.flatnonzero(mask))
        expected.extend(jax.nn.log_softmax(logits)[given - 1, ids[given]].tolist())
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_values_of_sampled_tokens_come_back_without_the_given_ones():
    packed = pack_episodes(episodes(), [RowShape(64, 32)], (2, 2), True)
    x = np.where(np.arange(8) < episodes().lengths.reshape(4, 1), np.arange(32.0).reshape(4, 8) + 1, 0)
    rows = packed.from_tokens(x)
    assert not rows[packed.rows.observation_weights > 0].any()
    np.testing.assert_array_equal(packed.to_tokens(rows, episodes()), x)


def data(**settings):
    tools = {"environment": Echoing, "max_turns": 3, "max_episode": 16, "max_new": 4}
    return Rollouts("x", rules=Rules((number,)), batch=2, group=2, **{**tools, **settings})


class Echoing:
    """An environment that repeats what the policy wrote."""

    def reset(self, row):
        return [{"role": "user", "content": row["prompt"]}]

    def step(self, state, text):
        return text, 0.0, False, state


def test_observation_weights_sum_to_1_over_a_batch_and_to_0_while_the_policy_waits():
    packed, own = pack_episodes(episodes(), [RowShape(64, 32)], (2, 2), True), data(observations=True)
    ones = np.ones((2, 2), bool)
    rollout = TrainingRollout(0, packed.rows, episodes().lengths, ones, ones, {})
    like = SimpleNamespace(ids=np.zeros((1, 2, 64)))
    batch = rollout_source.rollout_batch(own, rollout, np.arange(2), True, like)
    found = batch.observation_weights[0][packed.rows.observation_weights > 0]
    np.testing.assert_allclose(found, np.full(9, 1 / 9), rtol=1e-6)
    waits = rollout_source.rollout_batch(own, rollout, np.arange(2), False, like)
    assert not waits.observation_weights.any() and not waits.policy_weights.any()
    nothing = rollout_source.rollout_batch(
        own, rollout, np.array([1]), True, like
    )  # no observed token: no division by 0
    assert not nothing.observation_weights.any()


def test_rows_have_room_for_what_is_given():
    assert data().group_row_shape(10).reads == 64 and data(max_episode=60).group_row_shape(10).reads == 64
    assert data(max_episode=60, observations=True).group_row_shape(10).reads == 128


def guess(number: int) -> str:
    """Guess a number.

    Args:
        number: The number.
    """
    return f"not {number}"


def test_tools_without_a_second_turn_are_refused_and_an_episode_has_a_length():
    with pytest.raises(ValueError, match=r"data.max_turns=1 with tools: .*Set, for example, data.max"):
        data(environment=None, tools=(guess,), max_turns=1, max_episode=None)
    assert data(max_episode=None).episode_length == 3 * 4


def test_echo_without_anything_given_is_refused():
    with pytest.raises(ValueError, match="between turns, and data.max_turns=1 has none. Set"):
        data(environment=None, max_turns=1, max_episode=None, observations=True)
    for own, objective, value in ((data(), True, "false"), (data(observations=True), False, "true")):
        run = BoundRun(
            *[None] * 2, SimpleNamespace(facts=Facts(observations=objective)), *[None] * 3, (), None
        )
        with pytest.raises(ValueError, match=f"data.observations={value} does not fit the objective"):
            rollout_source.check_policy_run(own, run)
