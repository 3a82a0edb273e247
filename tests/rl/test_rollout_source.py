"""Rollouts: batches as a function of step and state, with completions of a fake sampler."""

import itertools
import json
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rl_completions import TOKENIZER, episodes_of, random_prompts, stored_prompts
from tiny_llama import tiny_tokenizer

from jaxft.batch import TrainState
from jaxft.data import prompts
from jaxft.nn.attention.layer_attention import uniform
from jaxft.nn.rope import Rope
from jaxft.objectives.metrics import Sum
from jaxft.objectives.objective import Facts, Objective, Scores
from jaxft.objectives.policy import with_target_kl
from jaxft.rl import rollout_source
from jaxft.rl.advantages import centred, grpo, nonconstant_groups, rloo, scale_scores, update_moments
from jaxft.rl.estimators import actor_critic, by_each, by_group, group_whitened, reinforce
from jaxft.rl.online_pairs import OnlinePairs
from jaxft.rl.rewards import number
from jaxft.rl.rollout_layout import BoundRun, rollout_shapes
from jaxft.rl.rollout_rules import Rules, shape_scores
from jaxft.rl.rollout_source import History, PromptSource, Rollouts, RolloutSource
from jaxft.rl.token_weights import masked_completions, truncated_tokens


def word_length(prompt, completion, row):
    return float(len(completion))


def bound_run(folder=None, fused_backward=False, **facts):
    """A run with an objective of these facts and without programs."""
    objective = SimpleNamespace(facts=Facts(**facts))
    return BoundRun(None, None, objective, None, None, None, (), folder, fused_backward)


def state_at(step, approx_kl=(0.0, 0.0), bad=(0, 0)):
    """A TrainState in which only step, the approximate KL and the count of non-finite steps matter."""
    aux = {"approx_kl": jnp.asarray(approx_kl, jnp.float32)}
    return TrainState(jnp.int32(step), {}, {}, aux, jnp.asarray(bad, jnp.int32))


class FakeSampler:
    """Completions of random lengths that depend on the rollout's number and the state's step."""

    def __init__(self, data):
        self.data, self.calls = data, []

    def __call__(self, batch_prompts, group, number, state):
        data = self.data
        self.calls.append((number, int(state.step)))
        rng = np.random.default_rng((number, int(state.step)))
        lengths = rng.integers(1, data.max_new + 1, (len(batch_prompts), group))
        tokens = rng.integers(1, 40, (*lengths.shape, data.max_new))
        return episodes_of(batch_prompts, tokens, lengths, np.full(tokens.shape, -1.0))


NEW = History()


def bound_source(folder, rules=None, history=NEW, **settings):
    """Rollouts of 8 prompts, sampled by FakeSampler and scored by the length of each completion."""
    rules, facts = rules or Rules((word_length,)), settings.pop("facts", {})
    data = Rollouts("x", rules=rules, **{"batch": 4, "group": 2, "max_new": 6, "passes": 2, **settings})
    batch_prompts = stored_prompts(8)
    source = PromptSource(data, TOKENIZER, batch_prompts, replace(batch_prompts, chosen=np.arange(0)))
    return bound_to_sampler(source, bound_run(folder, **facts), history)


def bound_to_sampler(source, run, history=NEW):
    """A source of prompts as it is after `bind`, with FakeSampler and without a pass over rows."""
    data = source.data
    return RolloutSource(
        **vars(source),
        run=run,
        sample=FakeSampler(data),
        rewards=tuple(reward.prepare(None) for reward in data.rules.rewards),
        token_scores=None,
        row_shapes=tuple(rollout_shapes(data, source.longest, source.shards)),
        batch_shapes=source.shapes,
        history=history,
    )


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_batch_depends_on_step_and_state_alone(tmp_path):
    source, again = bound_source(tmp_path), bound_source(tmp_path)
    batches = [source.batch(step, state_at(step)) for step in range(4)]
    assert source.sample.calls == [(0, 0), (1, 2)]  # sampled at a rollout's first step, with its state
    for step in (2, 3, 3):  # without the rollout before, and twice
        assert_same(again.batch(step, state_at(step)), batches[step])
    assert batches[0][1] == batches[1][1] and batches[2][1] != batches[0][1]  # metrics are the rollout's


def test_policy_weights_of_a_batch_sum_to_1(tmp_path):
    batch, _ = bound_source(tmp_path, minibatches=2).batch(0, state_at(0))
    assert (
        batch.policy_weights.sum() == pytest.approx(1, abs=1e-6) and batch.policy_weights.dtype == np.float32
    )


def test_a_run_cannot_resume_inside_a_rollout(tmp_path):
    with pytest.raises(ValueError, match="step 3 is inside rollout 1"):
        bound_source(tmp_path).batch(3, state_at(3))


def test_moments_of_scores_are_in_the_state_dict_and_come_back(tmp_path):
    source = bound_source(tmp_path)
    for step in range(4):
        source.batch(step, state_at(step))
    lengths = [source.sample(random_prompts(4), 2, number, state_at(2 * number)).lengths for number in (0, 1)]
    expected = np.zeros(3)
    for part in lengths:
        expected = update_moments(expected, part.astype(float))
    saved = json.loads(json.dumps(source.state_dict()))
    assert saved == {"moments": expected.tolist(), "reported": []}
    again = bound_source(tmp_path, history=History(**saved))
    again.batch(4, state_at(4))
    source.batch(4, state_at(4))
    assert again.state_dict() == source.state_dict() != saved


def test_a_source_without_a_run_has_the_prompts_of_each_step_alone(tmp_path):
    rules = Rules((number,))
    data = Rollouts("x", rules=rules, batch=4, group=2, max_new=6, passes=2, minibatches=2)
    stored = stored_prompts(8)
    source = PromptSource(data, TOKENIZER, stored, replace(stored, chosen=np.arange(0)), shards=3)
    assert source.evaluate(state_at(0)) == ({}, {})
    assert source.state_dict() == {} and source.held_out == ()
    for step in range(8):
        given, metrics = source.batch(step, state_at(step))
        # two rows, and an empty one
        assert metrics == {} and given.ids.shape == given.segments.shape == (1, 3, 64)
        numbers = [list(stored.names).index(name) for name in source.row_names(step)]
        assert len(numbers) == 2 and not given.segments[0, 2].any()
        for row, i in enumerate(numbers):
            used = given.segments[0, row] > 0
            assert tuple(given.ids[0, row][used]) == stored.token_ids[i]
            assert used[: used.sum()].all() and not given.ids[0, row][~used].any()
            assert given.positions[0, row][used].tolist() == list(range(used.sum()))


def test_the_policy_waits_for_the_next_rollout_beyond_target_kl(tmp_path):
    settings = {"facts": {"target_kl": 0.5}, "passes": 4}

    def trains(step, **state):
        source = bound_source(tmp_path, **settings)
        source.batch(step - step % 4, state_at(step - step % 4))
        return bool(source.batch(step, state_at(step, **state))[0].policy_weights.any())

    far, near = {"approx_kl": (6.0, 10.0)}, {"approx_kl": (4.0, 10.0)}
    assert trains(1, **near) and not trains(1, **far) and not trains(3, **far)
    assert trains(4, **far)  # a new rollout; the KL is that of the rollout before
    assert trains(1, **far, bad=(1, 1)) and not trains(
        2, **far, bad=(1, 1)
    )  # no finite step has trained it yet


def test_a_kl_from_before_the_rollout_does_not_count(tmp_path):
    """The first minibatch has no completion to train on, so the KL in aux is that of the rollout before."""
    rules = Rules(
        (word_length,), filter=lambda scores: np.arange(4)[:, None] + np.zeros(2) >= first_minibatch
    )
    source = bound_source(tmp_path, rules, facts={"target_kl": 0.5}, passes=1, minibatches=4)
    order = [int(prompts.prompts_of_step(source.data, 0, part)[0]) for part in range(4)]
    first_minibatch = order[0] + 1
    trained = [p for p in order if p >= first_minibatch]
    if not trained:
        pytest.skip("the first minibatch has the last prompt")
    weights = [
        source.batch(step, state_at(step, approx_kl=(9.0, 1.0)))[0].policy_weights.any() for step in range(4)
    ]
    assert weights == [p == trained[0] for p in order]  # after it, the KL is this rollout's


def test_aux_has_the_kl_of_the_newest_step_that_trained_the_policy():
    objective = with_target_kl(Objective(forward=None, loss=None), 0.5)
    assert objective.facts.target_kl == 0.5
    aux = objective.init({}, True)
    np.testing.assert_array_equal(aux["approx_kl"], [0, 0])
    for total, weight, expected in ((3.0, 6.0, [3, 6]), (0.0, 0.0, [3, 6]), (1.0, 4.0, [1, 4])):
        kl = Sum(jnp.float32(total), jnp.float32(weight))
        aux = objective.update(aux, {}, {"policy/approxkl_avg": kl})
        np.testing.assert_array_equal(aux["approx_kl"], expected)
    with pytest.raises(ValueError, match="target_kl=0"):
        with_target_kl(objective, 0.0)


@pytest.mark.parametrize("advantage", [grpo, rloo, centred])
def test_advantages_relative_to_a_group_of_one_are_refused(tmp_path, advantage):
    rules = Rules((word_length,), partial(by_group, advantage=advantage))
    with pytest.raises(ValueError, match="data.group=1: advantages relative to a group of one are all 0"):
        bound_source(tmp_path, rules, group=1).batch(0, state_at(0))


@pytest.mark.parametrize(
    "estimate", [reinforce, partial(by_group, advantage=lambda scores, lengths: scores - 0.5)]
)
def test_a_group_of_one_trains_with_other_estimators(tmp_path, estimate):
    batch, _ = bound_source(tmp_path, Rules((word_length,), estimate), group=1).batch(0, state_at(0))
    assert batch.advantages.any()


def test_by_each_in_a_group_of_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data.group=1"):
        bound_source(tmp_path, Rules((word_length,), by_each), group=1).batch(0, state_at(0))


@pytest.mark.parametrize(
    "rules, facts, message",
    [
        (Rules((number,), by_each), {}, "data.group=1: advantages relative to a group of one are all 0"),
        (Rules((number,), partial(by_group, advantage=lambda scores: scores)), {}, "can.t be called with"),
        (Rules((number,), actor_critic), {}, "actor_critic needs a critic's values"),
        (
            Rules((number,), group_whitened),
            {"kl_in_rewards": True},
            "estimator group_whitened ignores it",
        ),
    ],
)
def test_an_estimator_that_does_not_fit_the_run_is_refused_before_sampling(rules, facts, message):
    with pytest.raises(ValueError, match=message):
        rollout_source.check_policy_run(Rollouts("x", rules=rules, group=1), bound_run(**facts))
    fits = Rollouts("x", rules=Rules((number,), actor_critic), group=1)
    rollout_source.check_policy_run(fits, bound_run(critic=True, reference="start", kl_in_rewards=True))


def test_completions_outside_of_the_policy_mask_have_no_weight(tmp_path):
    rules = Rules((word_length,), train_on_truncated=False, filter=nonconstant_groups)
    batch, metrics = bound_source(tmp_path, rules).batch(0, state_at(0))
    weights, lengths = batch.policy_weights[0], batch.lengths[0]
    for row in range(len(weights)):
        for slot, length in enumerate(lengths[row]):
            own = weights[row][batch.responses[0, row] == slot]
            assert own.any() == (length < 6 and lengths[row, 0] != lengths[row, 1])
    assert 0 < metrics["frac_learned"].total < metrics["frac_learned"].weight


def test_a_filter_sees_the_rewards_before_shaping(tmp_path):
    """DAPO (arXiv:2503.14476, eq. 11) keeps groups with some right and some wrong answers. A group that is
    right every time has no advantage but that of its lengths.
    """

    def right(prompt, completion, row):
        return 1.0

    shape = partial(shape_scores, overlong=(6, 5), missing_eos=0.5)
    rules = Rules((right,), shape=shape, filter=nonconstant_groups)
    source = bound_source(tmp_path, rules)
    assert not source.batch(0, state_at(0))[0].policy_weights.any()
    unfiltered = bound_source(tmp_path, Rules((right,), shape=shape)).batch(0, state_at(0))[0]
    assert unfiltered.advantages.any()  # the shaped scores do differ


def bound_to(source, ratio):
    """The source with a training program whose probabilities are `ratio` times the sampler's."""

    def token_scores(packed, episodes, state):  # FakeSampler's log-probs are -1
        return Scores(np.where(episodes.logps < 0, np.log(ratio) - 1, 0.0))

    return replace(source, token_scores=token_scores)


def test_a_correction_multiplies_the_advantages_and_is_logged(tmp_path):
    plain, _ = bound_to(bound_source(tmp_path), 2.0).batch(0, state_at(0))
    for most, factor in ((3.0, 2.0), (1.5, 1.5)):
        rules = Rules((word_length,), correction=partial(truncated_tokens, most=most))
        batch, metrics = bound_to(bound_source(tmp_path, rules), 2.0).batch(0, state_at(0))
        np.testing.assert_allclose(batch.advantages, factor * plain.advantages, rtol=1e-6)
        assert metrics["sampling/importance_sampling_ratio/max"].value == pytest.approx(factor)
        assert metrics["sampling/sampling_logp_difference/max"].value == pytest.approx(np.log(2))
        for name in ("logps", "policy_weights", "ids"):
            assert_same(getattr(batch, name), getattr(plain, name))
    masked = Rules((word_length,), correction=masked_completions)
    batch, _ = bound_to(bound_source(tmp_path, masked), 2.0).batch(0, state_at(0))
    one_token = batch.lengths[0] == 1  # longer ones have a ratio of at least 4
    assert one_token.any() and not one_token.all()
    for row, slot in itertools.product(range(4), range(2)):
        inside = batch.responses[0, row] == slot
        expected = 2 * plain.advantages[0, row][inside] * one_token[row, slot]
        np.testing.assert_allclose(batch.advantages[0, row][inside], expected, rtol=1e-6)


def test_a_ratio_to_the_sampler_has_the_samplers_log_probs(tmp_path):
    rules = Rules((word_length,), ratio_to_sampler=True)
    for source in (bound_source(tmp_path, rules), bound_to(bound_source(tmp_path, rules), 2.0)):
        batch, _ = source.batch(0, state_at(0))
        assert set(np.unique(batch.logps[batch.responses < 2])) == {-1.0}
    trained, _ = bound_to(bound_source(tmp_path), 2.0).batch(0, state_at(0))
    np.testing.assert_allclose(trained.logps[trained.responses < 2], np.log(2) - 1, rtol=1e-6)


def test_a_correction_that_does_not_fit_is_refused_before_sampling():
    with pytest.raises(ValueError, match="ratio_to_sampler=true is a ratio to the sampler. Set only one"):
        Rules((number,), correction=truncated_tokens, ratio_to_sampler=True)
    with pytest.raises(ValueError, match=r"correction=word_length can't be called with .log_ratio, "):
        Rules((number,), correction=word_length)
    with pytest.raises(ValueError, match=r"correction_bounds=3,2 \(least, most\) are not valid"):
        Rules((number,), correction=partial(truncated_tokens, least=3.0, most=2.0))


def test_a_policy_is_frozen_in_the_warm_up(tmp_path):
    source = bound_source(tmp_path, Rules((word_length,), warm_up=1))
    trains = [bool(source.batch(s, state_at(s))[0].policy_weights.any()) for s in range(4)]
    assert trains == [False, False, True, True]


def test_a_rollout_without_scores_is_an_error_that_names_the_fault(tmp_path):
    def fails(prompt, completion, row):
        return row["missing"]

    message = "no completion of rollout 1 has a score: reward fails raised KeyError: 'missing' (rows:"
    with pytest.raises(ValueError, match=re.escape(message)):
        bound_source(tmp_path, Rules((fails,))).batch(0, state_at(0))


@pytest.mark.parametrize(
    "more",
    [{}, {"estimate": reinforce}, {"filter": nonconstant_groups, "scale": scale_scores}],
    ids=["groups", "reinforce", "filter"],
)
def test_a_later_rollout_without_scores_trains_nothing(tmp_path, capsys, more):
    """The run goes on: a judge or an environment's server may be back soon."""
    calls = []

    def away(prompt, completion, row):
        calls.append(1)
        return 1 / 0 if 8 < len(calls) <= 16 else len(calls)

    source = bound_source(tmp_path, Rules((away,), **more))
    batches = [source.batch(step, state_at(step))[0] for step in range(6)]
    assert [bool(batch.policy_weights.any()) for batch in batches] == [True, True, False, False, True, True]
    assert all(np.isfinite(x).all() for batch in batches for x in (batch.policy_weights, batch.advantages))
    message = "no completion of rollout 2 has a score: reward away raised ZeroDivisionError"
    assert capsys.readouterr().out.count(message) == 1


def test_a_fault_is_printed_once(tmp_path, capsys):
    def short_only(prompt, completion, row):
        return 1 / (6 - len(completion))

    source = bound_source(tmp_path, Rules((short_only,)), batch=8, group=4)
    for step in range(4):
        source.batch(step, state_at(step))
    assert capsys.readouterr().out.count("reward short_only raised ZeroDivisionError") == 1
    assert source.state_dict()["reported"] == ["reward"]


@pytest.mark.parametrize(
    ("rules", "facts"),
    [
        ({"warm_up": 1}, {}),
        ({}, {"target_kl": 0.1}),
        ({"filter": nonconstant_groups}, {}),
        ({"train_on_truncated": False}, {}),
    ],
)
def test_fused_backward_is_refused_if_the_policy_may_be_frozen(rules, facts):
    data = Rollouts("x", group=2, passes=2, rules=Rules((number,), **rules))
    with pytest.raises(ValueError, match="optim.fused_backward=true always updates the policy"):
        rollout_source.check_policy_run(data, bound_run(fused_backward=True, **facts))
    rollout_source.check_policy_run(data, bound_run(**facts))
    data = Rollouts("x", group=2, rules=Rules((number,)))
    rollout_source.check_policy_run(data, bound_run(fused_backward=True))


def test_a_run_that_does_not_fit_its_rollouts_is_refused():
    data = Rollouts("x", group=2, temperature=0.5, rules=Rules((number,)))
    with pytest.raises(ValueError, match="data.temperature=0.5 differs from the objective's 0.9"):
        rollout_source.check_policy_run(data, bound_run(temperature=0.9))
    with pytest.raises(ValueError, match="target_kl=.* skips later steps of a rollout, but each"):
        rollout_source.check_policy_run(data, bound_run(temperature=0.5, target_kl=0.1))


@pytest.mark.parametrize(
    ("settings", "facts", "recompute"),
    [
        ({}, {}, False),
        ({"passes": 2}, {}, True),
        ({"minibatches": 2}, {}, True),
        ({}, {"reference": "start"}, True),
        ({}, {"critic": True}, True),
        ({"kv_cache": "int8"}, {}, True),
        ({"rules": Rules((number,), correction=truncated_tokens)}, {}, True),
        ({"rules": Rules((number,), ratio_to_sampler=True), "passes": 2}, {}, False),
        ({"rules": Rules((number,), ratio_to_sampler=True)}, {"critic": True}, True),
    ],
)
def test_log_probs_are_recomputed_unless_the_ratio_is_1_or_to_the_sampler(settings, facts, recompute):
    data = Rollouts("x", **{"rules": Rules((number,)), **settings})
    assert rollout_source.needs_recomputed_logps(data, SimpleNamespace(facts=Facts(**facts))) == recompute


def test_a_run_whose_log_probs_are_not_recomputed_says_so():
    plain, objective = uniform(2, 8, Rope()), SimpleNamespace(facts=Facts())
    data = Rollouts("x", rules=Rules((number,)), max_prompt=32, max_new=32)
    (line,) = data.start_lines(objective, plain)
    assert line.startswith("log-probs are not recomputed after sampling: each rollout has one update")
    assert line.endswith("data.passes=2 recomputes them, and trains on each rollout twice")
    assert replace(data, passes=2).start_lines(objective, plain) == []
    assert OnlinePairs("x", rules=Rules((number,))).start_lines(objective, plain) == []


def test_a_run_whose_rope_depends_on_the_length_says_which_it_takes():
    objective = SimpleNamespace(facts=Facts(reference="start"))
    data = Rollouts("x", rules=Rules((number,)), max_prompt=32, max_new=32)
    within, beyond = (
        uniform(2, 8, Rope(kind="dynamic", factor=2.0, original_max_positions=n)) for n in (64, 63)
    )
    assert data.start_lines(objective, within) == []
    (line,) = data.start_lines(objective, beyond)
    assert "of the prompt and data.max_new=32 more tokens" in line


def test_the_fingerprint_of_a_reward_model_is_a_dependency():
    reward = SimpleNamespace(name="judge", fingerprint=lambda: "abc")
    rules = SimpleNamespace(rewards=(reward,), train_on_truncated=True, filter=None)
    data = replace(Rollouts("x", rules=Rules((number,))), rules=rules)
    info = rollout_source.rollout_info(data, TOKENIZER, stored_prompts(2), stored_prompts(2))
    assert info.recorded == {"reward_judge_fingerprint": "abc"}
    plain = rollout_source.rollout_info(
        Rollouts("x", rules=Rules((number,))), TOKENIZER, *[stored_prompts(2)] * 2
    )
    assert plain.recorded == {}


def test_tools_that_the_template_leaves_out_of_a_prompt_are_a_warning(tmp_path):
    row = {"prompt": "what is 1 plus 1?", "tools": [{"name": "add"}]}
    (tmp_path / "r.jsonl").write_text(json.dumps(row))
    data = Rollouts(str(tmp_path / "r.jsonl"), held_out=None, rules=Rules((word_length,)))
    (warning,) = data.open(tiny_tokenizer()).info.warnings
    assert warning.startswith("warning: r.jsonl:1: ") and "without the row's tools" in warning


@pytest.mark.parametrize("held_out", [None, "h.jsonl"])
def test_a_message_that_the_template_drops_from_a_prompt_is_a_warning(tmp_path, held_out):
    rows = [{"prompt": f"what is {i} plus 1?"} for i in range(3)]
    with_system = {**rows[2], "system": "answer in French"}
    files = {"r.jsonl": rows} | ({"h.jsonl": [with_system]} if held_out else {})
    files["r.jsonl"] = rows if held_out else [*rows[:2], with_system]
    for name, some in files.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, some)))
    tokenizer = tiny_tokenizer()
    held = None if held_out is None else str(tmp_path / held_out)
    data = Rollouts(str(tmp_path / "r.jsonl"), held_out=held, rules=Rules((word_length,)))
    assert not data.open(tokenizer).info.warnings
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    (warning,) = data.open(tokenizer).info.warnings
    first = "h.jsonl:1" if held_out else "r.jsonl:3"
    assert warning.startswith(f"warning: {first}: ") and warning.endswith("set data.system=merge")
    assert "does not show the content of message 0, a system message" in warning
