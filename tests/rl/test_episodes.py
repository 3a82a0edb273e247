"""Episodes of several turns on the host: values of sampled tokens alone, estimates, metrics and records."""

import io
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from rl_completions import random_episodes, random_prompts

from jaxft.annotations import TOKEN_WEIGHTS
from jaxft.report.sections import turns_html
from jaxft.rl import token_weights
from jaxft.rl.advantages import centred, grpo
from jaxft.rl.estimators import RolloutScores, actor_critic, by_group, by_turn, reinforce
from jaxft.rl.rewards import EnvironmentReward, RewardScores
from jaxft.rl.rollout_metrics import episode_metrics, rollout_metrics
from jaxft.rl.rollout_rules import Rules
from jaxft.rl.rollout_sampler import (
    RolloutRecord,
    append_table,
    from_bytes,
    inspect_episodes,
    prompts_hash,
    to_bytes,
)
from jaxft.rl.trajectory import Fault, Segment, Trajectory, collect

CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}],
}
TURNS = (
    {"role": "user", "content": "What is 1 + 2?"},
    CALL,
    {"role": "tool", "name": "add", "content": '{"error": "b is missing"}'},
    {"role": "assistant", "content": "It is <3."},
)


def without_given(episodes):
    """The same episodes as if nothing had been given to the policy."""
    alone = [replace(t, segments=tuple(t.sampled)) for t in episodes.trajectories]
    return collect(episodes.prompts, alone, episodes.size, episodes.longest, 6)


def scores_of(episodes, **more):
    """The RolloutScores of episodes with random values, which depend on the sampled tokens alone."""
    rng = np.random.default_rng(1)
    n, size = episodes.logps.shape
    scores = np.where(episodes.valid.ravel(), episodes.scores, np.nan).reshape(episodes.lengths.shape)
    found = {"values": rng.normal(size=(n, size)), "reference": rng.normal(-3, 1, (n, size)), **more}
    return RolloutScores(
        scores, episodes.lengths, episodes.ended, episodes.logps.astype(np.float64), found["reference"],
        found["values"], scores[..., None], (1.0,), 0.1, episodes.turns, episodes.turn_rewards,
    )  # fmt: skip


def test_arrays_have_the_sampled_tokens_of_all_training_rows_in_order():
    episodes = random_episodes()
    for i, trajectory in enumerate(episodes.trajectories):
        segments = [s for s in trajectory.segments if s.sampled]
        count = sum(len(s.tokens) for s in segments)
        assert episodes.lengths.ravel()[i] == count
        logps = np.concatenate([np.zeros(0), *(s.logps for s in segments)])
        np.testing.assert_array_equal(episodes.logps[i, :count], logps.astype(np.float32))
        turns = [turn for turn, s in enumerate(segments) for _ in s.tokens]
        assert episodes.turns[i, :count].tolist() == turns and trajectory.sampled_count == count
        rewards = [x for s in segments for x in [0.0] * (len(s.tokens) - 1) + [np.nan_to_num(s.reward)]]
        assert episodes.turn_rewards[i, :count].tolist() == rewards
        assert not episodes.logps[i, count:].any() and not episodes.turn_rewards[i, count:].any()
    assert episodes.valid.tolist() == [[True, True], [False, True]]
    # given tokens after an episode's prompt, those of the start of its second row included
    assert [t.given_count for t in episodes.trajectories] == [9, 3 + 5, 0, 2]


@pytest.mark.parametrize("estimate", [by_group, by_turn, reinforce, actor_critic])
def test_advantages_are_those_of_the_same_episodes_without_given_tokens(estimate):
    """So generalised advantages go from one turn's last token to the next one's first."""
    episodes = random_episodes()
    found, alone = scores_of(episodes), scores_of(without_given(episodes))
    coef = {"kl_coef": None} if estimate is by_turn else {}
    one, other = (estimate(replace(x, **coef)) for x in (found, alone))
    np.testing.assert_array_equal(one.advantages, other.advantages)
    assert one.advantages.any() and one.metrics == other.metrics
    assert (one.returns is None) or (one.returns == other.returns).all()


def test_given_tokens_count_in_no_normalising_length():
    episodes = random_episodes(), without_given(random_episodes())
    for rule in TOKEN_WEIGHTS.values():
        weigh = getattr(token_weights, rule.partition(":")[2])
        np.testing.assert_array_equal(*(weigh(x.lengths, x.valid, x.size) for x in episodes))


@pytest.mark.parametrize("estimate", [by_group, by_turn, partial(by_turn, advantage=centred), actor_critic])
def test_permuting_the_episodes_of_a_group_permutes_their_advantages(estimate):
    episodes = random_episodes()
    order = np.array([[1, 0], [1, 0]])
    rows = (2 * np.arange(2)[:, None] + order).ravel()
    first = scores_of(episodes)
    values, reference = (x[rows] for x in (first.values, first.reference))
    second = scores_of(episodes.pick(order), values=values, reference=reference)
    if estimate is by_group or estimate is actor_critic:
        one, other = estimate(first), estimate(second)
    else:
        one, other = (estimate(replace(x, kl_coef=None)) for x in (first, second))
    np.testing.assert_allclose(other.advantages, one.advantages[rows], rtol=1e-12, atol=1e-14)


def test_returns_to_go_of_turns_have_the_baseline_of_the_same_turn():
    """Episodes of two, two and one turns: returns 3, 5 and 1 from the first turn, 2 and 1 from the second."""
    prompts = random_prompts(1)

    def episode(*turns):
        segments = [Segment(np.ones(n, np.int32), np.zeros(n, np.float32), reward) for n, reward in turns]
        given = Segment(np.ones(1, np.int32), None)
        mixed = [x for s in segments for x in (s, given)][:-1]
        return Trajectory(0, prompts.ids[0], tuple(mixed), float(sum(r for _, r in turns)))

    found = collect(
        prompts, [episode((2, 1.0), (1, 2.0)), episode((1, 4.0), (2, 1.0)), episode((3, 1.0))], 8, 16, 2
    )
    rollout = replace(scores_of(found), kl_coef=None)
    advantages = by_turn(rollout, advantage=centred).advantages
    np.testing.assert_allclose(advantages[:, :3], [[0, 0, 0.5], [2, -0.5, -0.5], [-2, -2, -2]])
    halved = by_turn(rollout, advantage=centred, gamma=0.5).advantages
    np.testing.assert_allclose(halved[:, 0], np.array([2, 4.5, 1]) - 2.5)
    one_turn = replace(rollout, turns=None, turn_rewards=None)
    np.testing.assert_allclose(by_turn(one_turn).advantages, by_group(one_turn).advantages, rtol=1e-12)
    np.testing.assert_allclose(by_group(rollout).advantages[:, 0], grpo(rollout.scores)[0])


def test_a_score_beyond_the_rewards_of_turns_is_a_reward_of_the_last_token():
    episodes = random_episodes()
    rollout = replace(scores_of(episodes, values=np.zeros((4, 12))), reference=None, kl_coef=None)
    returns = actor_critic(rollout, gamma=0.5, lam=1.0).returns
    first = episodes.trajectories[0]  # turns of 3, 1 and 2 tokens with 0.5, none and 1; the score is 1.5
    assert first.score == 1.5 and not returns[2].any()
    np.testing.assert_allclose(returns[0, :6], [0.125 + 1 / 32, 0.25 + 1 / 16, 0.5 + 1 / 8, 0.25, 0.5, 1])
    # turns of 2 and 3 tokens with 0.25 and none; the score is 1, so that 0.75 is left
    np.testing.assert_allclose(returns[1, :5], [0.125 + 0.75 / 16, 0.25 + 0.75 / 8, 0.75 / 4, 0.75 / 2, 0.75])


def scored(episodes):
    rules = Rules((EnvironmentReward(),))
    return rules, rules.score(episodes, [RewardScores(episodes.scores)])


def test_an_episode_with_a_fault_has_no_score_and_is_in_no_mean():
    episodes = random_episodes()
    rules, found = scored(episodes)
    assert (
        np.isnan(found.scores).tolist()
        == [[False, False], [True, False]]
        == (~rules.policy_mask(found)).tolist()
    )
    metrics = rollout_metrics(["environment"], found, scores_of(episodes), rules.policy_mask(found))
    means = {name: x.total / x.weight for name, x in metrics.items() if hasattr(x, "total") and x.weight}
    assert means["reward"] == pytest.approx(1.0) == means["rewards/environment/mean"]
    assert means["completions/mean_length"] == pytest.approx(np.mean([6, 5, 5]))
    assert metrics["completions/min_length"].value == 5 and means["frac_unscorable"] == 0.25


def test_turns_calls_and_faults_of_episodes_are_counted():
    told = (Fault("bad_arguments", "b is missing"),)
    given = [
        replace(t, turns=TURNS, faults=told if t.prompt == 0 else t.faults)
        for t in random_episodes().trajectories
    ]
    episodes = collect(random_prompts(2), given, 12, 24, 6)
    found = {name: x.total / x.weight for name, x in episode_metrics(episodes).items()}
    assert found["episodes/turns"] == pytest.approx((3 + 2 + 2) / 3)
    assert found["episodes/given_tokens"] == pytest.approx((9 + 8 + 2) / 3)
    assert found["tools/call_frequency"] == 1 and found["tools/failure_frequency"] == pytest.approx(2 / 3)
    assert found["tools/errors/bad_arguments"] == 0.5 and found["episodes/faults/raised"] == 0.25
    others = [x for name, x in found.items() if "/errors/" in name or "/faults/" in name]
    assert sum(others) == 0.75 and len(others) > 10
    assert episode_metrics(collect(random_prompts(2), given, 12, 24)) == {}  # of one turn


def test_a_record_has_every_bit_of_its_rollout(tmp_path):
    given = [replace(t, turns=TURNS) for t in random_episodes().trajectories]
    found = from_bytes(to_bytes(given, 7))
    for one, other in zip(given, found, strict=True):
        assert replace(one, segments=(), score=0.0) == replace(other, segments=(), score=0.0)
        np.testing.assert_array_equal(one.score, other.score)
        for a, b in zip(one.segments, other.segments, strict=True):
            assert (a.sampled, a.begins, a.tokens.dtype) == (b.sampled, b.begins, b.tokens.dtype)
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_array_equal(a.reward, b.reward)
            assert (a.logps is None and b.logps is None) or a.logps.tobytes() == b.logps.tobytes()
    assert from_bytes(to_bytes([], 0)) == []

    record = RolloutRecord(tmp_path / "one" / "rollouts", None, 7, "prompts")
    assert record.read(3) is None and record.write(3, given) == given
    assert len(record.read(3)) == len(given)
    assert replace(record, weights=8).read(3) is None  # of another policy
    replayed = RolloutRecord(tmp_path / "two" / "rollouts", str(tmp_path / "one"), 8, "prompts")
    assert len(replayed.read(3)) == len(given)
    with pytest.raises(ValueError, match=r"data.replay=.*one: .*4.npz is missing; this run needs rollout 5"):
        replayed.read(4)
    with pytest.raises(ValueError, match=r"3.npz has episodes of other prompts than this run's rollout 4"):
        replace(replayed, prompts="other prompts").read(3)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "other"])
def test_a_damaged_record_is_sampled_again_and_not_replayed(tmp_path, damage):
    record = RolloutRecord(tmp_path / "rollouts", None, 7, "prompts")
    record.write(0, [*random_episodes().trajectories])
    path = tmp_path / "rollouts" / "0.npz"
    content, other = path.read_bytes(), io.BytesIO()
    np.savez(other, a=np.ones(2))
    damaged = {"truncated": content[:-300], "empty": b"", "text": b"a text", "other": other.getvalue()}
    path.write_bytes(damaged[damage])
    assert record.read(0) is None
    for read in (replace(record, replay=str(tmp_path)).read, lambda n: [*inspect_episodes(tmp_path, n)]):
        with pytest.raises(ValueError, match=r"0.npz is damaged or of another version; remove it"):
            read(0)


def test_the_hash_of_prompts_tells_rows_order_and_group_apart():
    prompts = random_prompts(3)
    order = replace(prompts, ids=(prompts.ids[1], prompts.ids[0], prompts.ids[2]))
    hashes = [prompts_hash(*given) for given in ((prompts, 2), (prompts, 4), (order, 2))]
    assert len({*hashes}) == 3 and hashes[0] == prompts_hash(random_prompts(3), 2)


def test_an_episode_is_shown_turn_by_turn(tmp_path):
    given = [replace(t, turns=TURNS) for t in random_episodes().trajectories]
    episodes = collect(random_prompts(2), given, 12, 24, 6)
    append_table(tmp_path / "completions.jsonl", 1, scored(episodes)[1], ["environment"])
    entries = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [entry["fault"] for entry in entries] == [None, None, "raised", None]
    assert entries[0]["turns"] == list(TURNS) and entries[0]["completion"] == "It is <3."
    html = turns_html(entries[0]["turns"])
    for text in ('turn assistant" title="assistant">add({', 'turn tool" title="tool">', "It is &lt;3."):
        assert text in html
    assert "What is 1" not in html and turns_html(None) == ""
    earlier = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Of the prompt"})
    assert entries[0]["sampled_turns"] == 3 and turns_html([*earlier, *TURNS], 2) == html
    assert "Of the prompt" in turns_html([*earlier, *TURNS])

    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "0.npz").write_bytes(to_bytes(given, 0))
    shown = list(inspect_episodes(tmp_path, 0))
    assert len(shown) == 4 and all(example.in_order for example in shown)
    assert [part.label for part in shown[0].parts] == ["prompt", *["sampled", "given"] * 3]
    assert [set(part.weights) for part in shown[0].parts] == [{0.0}, *[{1.0}, {0.0}] * 3]
    assert "3 turns, 6 sampled and 9 given tokens; score 1.5" in shown[0].facts
    assert "fault raised: it is broken" in shown[2].facts and "2 training rows" in shown[1].facts
    assert [part.label for part in shown[1].parts] == ["prompt", "sampled", "tool"] + [
        "prompt",
        "tool",
        "sampled",
    ]
    with pytest.raises(ValueError, match=r"1.npz is missing: the run has not sampled rollout 2"):
        list(inspect_episodes(tmp_path, 1))
