"""Rollouts: what rows hold, that the sampler and the trainer are one model, and whole runs that are taught by rewards."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rl_place
import tiny_model
from safetensors.numpy import load_file
from tiny_run import Place

from jaxft import tree
from jaxft.data import prompts
from jaxft.data.prompts import Asked, Prompts, Room
from jaxft.data.rows import Row
from jaxft.inference import generate
from jaxft.models import heads
from jaxft.models.adapted import adapted
from jaxft.models.llama import llama
from jaxft.nn import param
from jaxft.nn.lora import Adapter
from jaxft.objectives.policy import policy
from jaxft.objectives.policy_losses import clipped
from jaxft.objectives.preference import preference, summed_logp
from jaxft.rl import advantages, reward_models, rewards, sampler
from jaxft.rl.completions import ByScorer, Rules, by_read, by_token, fits, laid
from jaxft.rl.estimators import by_group
from jaxft.rl.online_pairs import pairs_of
from jaxft.rl.rollout import BoundRun, Rollouts, RolloutSource, source_info


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl")
    rl_place.write_place(folder)
    return Place(folder)


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def some(lengths, seed=0, size=7):
    """(prompts, tokens [G, N, S]) of a tiny vocabulary; prompts of 2, 3, 4, ... tokens."""
    rng = np.random.default_rng(seed)
    ids = tuple(tuple(rng.integers(0, 40, 2 + i).tolist()) for i in range(len(lengths)))
    tokens = rng.integers(0, 40, (*lengths.shape, size))
    tokens[np.arange(size) >= lengths[..., None]] = -1
    nothing = ("",) * len(ids)
    return Asked(ids, nothing, nothing, ({},) * len(ids)), tokens


LENGTHS = np.array([[3, 0, 7], [1, 5, 2]])


def test_numbers_of_tokens_come_back_from_the_rows():
    x = np.random.default_rng(1).normal(size=(6, 7)).astype(np.float32)
    inside = np.arange(7) < LENGTHS.reshape(6, 1)
    rows = by_read(x, LENGTHS, 16)
    assert (rows[:, 10:] == 0).all() and (rows != 0).sum() == LENGTHS.sum()
    np.testing.assert_array_equal(by_token(rows, LENGTHS, 7), np.where(inside, x, 0))


def test_a_row_of_many_completions_has_the_log_probs_of_each_alone(wide):
    model, whole = tiny_model.tiny(adapter=Adapter(rank=2))
    asked, tokens = some(LENGTHS)
    objective = policy(model, clipped, temperature=0.7)
    rows = laid(asked, tokens, LENGTHS, Room(32, 16))
    found = by_token(np.asarray(objective.score(whole, rows, {}).logps), LENGTHS, 7)
    for g, prompt in enumerate(asked.ids):
        for n, count in enumerate(LENGTHS[g]):
            if not count:
                continue
            text = np.array([*prompt, *tokens[g, n, :count]])
            alone = tiny_model.batch_of([[(text, len(prompt))]], 16, 8, 1.0)
            logits = model.logits(model.head(whole), model.hidden(whole, alone))[0] / 0.7
            logp = jax.nn.log_softmax(logits)[np.arange(len(prompt) - 1, len(text) - 1), text[len(prompt) :]]
            np.testing.assert_allclose(found[g * 3 + n][:count], logp, rtol=1e-10)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.7, None), (0.7, 5), (0.0, None)])
def test_the_sampler_has_the_trainers_log_probs(group, temperature, top_k):
    model, whole = tiny_model.tiny(jnp.float32, adapter=Adapter(rank=2))
    asked, _ = some(np.ones((3, group), int))
    stop = (7, 11)
    run = generate.make_sampler(model, generate.Sampling(12, temperature, top_k), stop, group)
    out, drawn = map(np.asarray, run(whole, generate.left_pad(asked.ids, 3), jax.random.key(3)))
    lengths = (out >= 0).sum(1).reshape(3, group)
    ended = np.isin(out[np.arange(len(out)), lengths.ravel() - 1], stop)
    assert (ended | (lengths.ravel() == 12)).all() and ((out >= 0) == (drawn != 0)).all()
    rows = laid(asked, out.reshape(3, group, 12), lengths, Room(64, 64))
    logps = policy(model, clipped, temperature=temperature or 1.0).logps(whole, rows).logp
    np.testing.assert_allclose(by_token(np.asarray(logps), lengths, 12), drawn, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "most_away", "mean_away"), [(jnp.float32, 1e-4, 2e-5), (jnp.bfloat16, 0.5, 0.03)]
)
def test_the_trainer_sees_what_the_sampler_drew_in_every_bucket(dtype, most_away, mean_away):
    """Rows of all the lengths that a run compiles. In bfloat16 the two programs round apart: by 0.014 nats a token in the mean of
    this model of random weights, once by 0.34."""
    model, whole = tiny_model.tiny(dtype, adapter=Adapter(rank=2))
    data = Rollouts("x", max_new=48, group=4, batch=3, rules=Rules((rewards.number,)))
    asked, _ = some(np.ones((3, 4), int))
    tokenizer = SimpleNamespace(decode=lambda *a, **k: "", eos_token_id=0)
    source = RolloutSource(source_info(data, tokenizer, asked, asked), data, tokenizer, asked, asked, 1)
    assert len(source.rooms) == 3
    run = generate.make_sampler(model, generate.Sampling(48, 1.0), (), 4)
    out, drawn = map(np.asarray, run(whole, generate.left_pad(asked.ids, 3), jax.random.key(3)))
    logps = jax.jit(policy(model, clipped).logps)
    for room, most in zip(source.rooms, (12, 24, 48), strict=True):
        lengths = np.minimum(np.random.default_rng(most).integers(1, most + 1, (3, 4)), most)
        lengths[0] = most
        tokens = np.where(np.arange(48) < lengths[..., None], out.reshape(3, 4, 48), -1)
        assert fits(asked, lengths, room) and (
            room is source.rooms[0] or not fits(asked, lengths, source.rooms[0])
        )
        found = by_token(np.asarray(logps(whole, laid(asked, tokens, lengths, room)).logp), lengths, 48)
        away = np.abs(found - drawn)[np.arange(48) < lengths.reshape(12, 1)]
        assert away.max() < most_away and away.mean() < mean_away, (room, away.max(), away.mean())


def test_completions_of_a_prompt_differ_and_are_those_of_the_prompt_alone():
    model, whole = tiny_model.tiny(jnp.float32)
    asked, _ = some(np.ones((2, 2), int))
    greedy = generate.Sampling(6, 0.0)
    many = np.asarray(
        generate.make_sampler(model, greedy, (), 2)(
            whole, generate.left_pad(asked.ids, 2), jax.random.key(0)
        )[0]
    )
    one = np.asarray(
        generate.make_generate(model, greedy, ())(whole, generate.left_pad(asked.ids, 2), jax.random.key(0))
    )
    np.testing.assert_array_equal(many, np.repeat(one, 2, 0))
    warm = generate.make_sampler(model, generate.Sampling(6, 1.0), (), 2)
    drawn = np.asarray(warm(whole, generate.left_pad(asked.ids, 2), jax.random.key(0))[0])
    assert (drawn[0] != drawn[1]).any() and (drawn[2] != drawn[3]).any()


def test_prompts_come_in_an_order_of_seed_and_rollout_and_all_come():
    data = Prompts("x", batch=6, minibatches=3, passes=2)
    seen = np.concatenate([prompts.drawn(data, 10, k) for k in range(5)])
    assert [sorted(seen[i : i + 10].tolist()) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert seen[:10].tolist() != seen[10:20].tolist()
    for turn in (0, 3):
        parts = np.concatenate([prompts.dealt(data, 4, turn + k) for k in range(3)])
        assert sorted(parts.tolist()) == list(range(6))


def test_weights_of_tokens_may_ask_for_the_limit():
    rules = Rules((rewards.number,), weigh=advantages.constant_length)
    lengths, keep = np.array([[3, 0, 7]]), np.ones((1, 3), bool)
    np.testing.assert_array_equal(
        rules.weighed(lengths, keep, 8), advantages.constant_length(lengths, keep, 8)
    )
    own = Rules(
        (rewards.number,), weigh=partial(advantages.constant_length, most=20)
    )  # a value that is given stays
    np.testing.assert_array_equal(
        own.weighed(lengths, keep, 8), advantages.constant_length(lengths, keep, 20)
    )
    np.testing.assert_array_equal(
        Rules((rewards.number,)).weighed(lengths, keep, 8), advantages.token_mean(lengths, keep)
    )


@pytest.mark.parametrize(
    "asked", [{"warm_up": 1}, {"target_kl": 0.1}, {"keep": advantages.varied}, {"cut_off": False}]
)
def test_a_policy_that_is_to_rest_is_not_updated_inside_the_backward_pass(asked):
    one = some(np.ones((1, 1), int))[0]
    tokenizer = SimpleNamespace(decode=lambda *a, **k: "", eos_token_id=0)
    data = Rollouts("x", group=2, passes=2, rules=Rules((rewards.number,), **asked))
    source = RolloutSource(source_info(data, tokenizer, one, one), data, tokenizer, one, one, 1)
    programs = SimpleNamespace(objective=None, optimizer=SimpleNamespace(fused_backward=True))
    with pytest.raises(ValueError, match="optim.fused_backward can't let a policy rest"):
        source.bind(BoundRun(programs, None, (), None), None)


def test_a_policy_learns_what_is_rewarded(place):
    assert (
        place.run("name=learns", "steps=16", "passes=1", "beta=0.0", "batch=8", "group=8", "lr=3e-2") == 0
    ), place.err()
    lines = place.metrics("learns")
    got = [line["reward"] for line in lines if "reward" in line]
    assert len(got) == 16 and np.mean(got[-3:]) > 2 * np.mean(got[:3])
    assert lines[-1]["eval_reward"] > 2 * lines[0]["eval_reward"]
    table = [
        json.loads(line) for line in (place.runs("learns") / "completions.jsonl").read_text().splitlines()
    ]
    assert len(table) == 16 * 8 and {"step", "prompt", "completion", "reward", "rewards"} <= table[0].keys()


def methods():
    """(name, settings) of each method that the docstring of configs/grpo.py lists."""
    text = (
        (Path(__file__).resolve().parents[2] / "configs" / "grpo.py")
        .read_text()
        .split('"""')[1]
        .split("combine freely:\n")[1]
    )
    rows = re.split(r"\n    (?=\S)", text)[1:]
    return [(re.split("  +", row)[0], re.findall(r"(?<!\S)\w+=[\w.:]+", row)) for row in rows]


def test_the_docstring_of_grpo_names_methods():
    assert [name for name, _ in methods()][:6] == ["GRPO", "Dr. GRPO", "DAPO", "GSPO", "RLOO", "REINFORCE++"]
    assert dict(methods())["RLOO"][-2:] == ["beta=0.05", "kl_in=rewards"]


@pytest.mark.parametrize("name, settings", methods(), ids=[name for name, _ in methods()])
def test_every_method_that_has_a_name_runs(place, name, settings):
    argv = (
        "model=base",
        "data=asked.jsonl",
        "held_out=0.2",
        "rewards=config.py:ascii",
        "general=none",
        "batch=4",
        "group=4",
    )
    folder = "method-" + re.sub(r"\W", "", name)
    more = (
        f"name={folder}",
        "rank=4",
        "dtype=float32",
        "loop.steps=2",
        "loop.eval_every=none",
        "samples=0",
        "lr=1e-2",
    )
    assert place.run("--config", "configs/grpo.py", *argv, *more, *settings) == 0, place.err()
    lines = [line for line in place.metrics(folder) if "reward" in line]
    assert len(lines) == 2 and all(line["grad_norm"] > 0 for line in lines)
    assert ("objective/kl" in lines[0]) == ("kl_in=rewards" in settings)


def test_a_run_killed_inside_a_rollout_ends_as_one_left_alone(place):
    """PPO, with a critic and a KL controller: killed between two minibatches, and between drawing and learning."""
    argv = ("steps=8", "passes=2", "minibatches=2", "save=4", "ppo=true", "group=1", "batch=8")
    assert place.run(*argv, "name=whole") == 0, place.err()
    assert len({line["kl_coef"] for line in place.metrics("whole") if "kl_coef" in line}) > 4
    for hook, name in ((KILL.format(step=6), "inside"), (KILL_DRAWING, "drawing")):
        process = place.start(*argv, f"name={name}", hook=hook)
        process.join()
        assert process.exitcode == -9 and place.checkpoints(name) == [4], place.err()
        assert place.run(*argv, f"name={name}") == 0, place.err()
        assert place.results(name, 8) == place.results("whole", 8)
        table = [(place.runs(run) / "completions.jsonl").read_text() for run in (name, "whole")]
        assert table[0] == table[1]


def test_ppo_teaches_the_policy_and_its_critic(place):
    """And before the critic's warm-up is over the policy stands still."""
    argv = ("passes=2", "beta=0.0", "batch=64", "group=1", "lr=2e-2", "ppo=true", "save=100", "max_new=12")
    argv = (*argv, "rewards=config.py:ascii")
    assert place.run("name=ppo", "steps=32", *argv) == 0, place.err()
    lines = [line for line in place.metrics("ppo") if "reward" in line]
    assert np.mean([line["reward"] for line in lines[-4:]]) > 1.2 * np.mean(
        [line["reward"] for line in lines[:4]]
    )
    assert lines[-1]["loss/value_avg"] < lines[0]["loss/value_avg"] / 2
    assert max(line["sampling/sampling_logp_difference/max"] for line in lines) < 1e-4
    ratios = [
        abs(line["val/ratio"] - 1) for line in lines
    ]  # the first of two passes is over what this very policy drew
    assert max(ratios[::2]) < 1e-6 < np.median(ratios[1::2])
    assert place.run("name=warm", "steps=4", *argv, "warm_up=100") == 0, place.err()
    warm = [line for line in place.metrics("warm") if "reward" in line]
    assert len(warm) == 4 and all(line["objective/kl"] == 0 and abs(line["kl"]) < 1e-6 for line in warm)


def test_a_mesh_draws_and_learns_as_one_device_does(place):
    """Greedy, so that rounding changes no token: rows, weights and products are cut."""
    argv = (
        "steps=2",
        "passes=2",
        "batch=8",
        "group=2",
        "ppo=true",
        "save=100",
        "data.top_k=1",
        "rewards=config.py:ascii",
    )
    assert place.run("name=one", *argv) == 0, place.err()
    cut = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    assert place.run("name=many", *argv, *cut, devices=8) == 0, place.err()
    tables = [(place.runs(name) / "completions.jsonl").read_text() for name in ("one", "many")]
    assert tables[0] == tables[1] and tables[0]
    for one, many in zip(*(place.metrics(name) for name in ("one", "many")), strict=True):
        assert one.keys() == many.keys()
        for name in ("loss", "loss/value_avg", "grad_norm", "objective/kl", "eval_reward", "entropy"):
            if name in one:
                np.testing.assert_allclose(one[name], many[name], rtol=2e-4, atol=2e-5, err_msg=name)


def test_a_policy_that_has_gone_far_enough_waits_for_the_next_rollout(place):
    argv = ("steps=8", "passes=4", "batch=8", "group=1", "ppo=true", "save=100", "target_kl=1e-6", "lr=2e-2")
    assert place.run("name=far", *argv) == 0, place.err()
    lines = {line["step"]: line for line in place.metrics("far") if "reward" in line}
    taught = [lines[step].get("policy/approxkl_avg") for step in (5, 6, 7, 8)]
    assert taught[0] < 1e-6 < taught[1] and taught[2:] == [None, None]
    assert all("loss/value_avg" in lines[step] for step in (7, 8))


def test_online_dpo_teaches_what_is_rewarded_and_resumes(place):
    argv = (
        "batch=16",
        "group=4",
        "passes=1",
        "lr=1e-2",
        "online=true",
        "max_new=12",
        "rewards=config.py:ascii",
        "save=6",
    )
    assert place.run("name=online", "steps=18", *argv) == 0, place.err()
    lines = [line for line in place.metrics("online") if "reward" in line]
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert np.mean([line["reward"] for line in lines[-3:]]) > 1.2 * np.mean(
        [line["reward"] for line in lines[:3]]
    )
    process = place.start(
        "name=again", "steps=18", *argv, hook=KILL.format(step=8).replace("runs/inside", "runs/again")
    )
    process.join()
    assert process.exitcode == -9
    assert place.run("name=again", "steps=18", *argv) == 0, place.err()
    assert place.results("again", 18) == place.results("online", 18)


def test_pairs_of_a_rollout_score_each_answer_as_it_is_alone(wide):
    model, whole = tiny_model.tiny(adapter=Adapter(rank=2))
    lengths = np.array([[3, 7], [5, 2]])
    asked, tokens = some(lengths)
    pairs = pairs_of(laid(asked, tokens, lengths, Room(32, 16)))
    pairs = replace(pairs, pair_weights=np.full((2, 1), 0.5), mean_lengths=np.ones((2, 1, 2)))
    objective = preference(
        model, lambda pair: pair.chosen.logp - 2 * pair.rejected.logp, reference=None, reward=summed_logp
    )
    value, found = objective(whole, pairs, None, {})
    wanted = []
    for g, prompt in enumerate(asked.ids):
        for n, count in enumerate(lengths[g]):
            text = np.array([*prompt, *tokens[g, n, :count]])
            alone = tiny_model.batch_of([[(text, len(prompt))]], 16, 8, 1.0)
            logits = model.logits(model.head(whole), model.hidden(whole, alone))[0]
            logp = jax.nn.log_softmax(logits)[np.arange(len(prompt) - 1, len(text) - 1), text[len(prompt) :]]
            wanted.append(float(logp.sum()))
            assert pairs.last[g, 0, n] == len(prompt) + lengths[g, : n + 1].sum() - 1
    np.testing.assert_allclose(
        value, 0.5 * (wanted[0] - 2 * wanted[1] + wanted[2] - 2 * wanted[3]), rtol=1e-10
    )
    assert pairs.places[0, :10].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6]


def test_a_scorer_beside_the_policy_reads_each_completion_at_its_end(wide):
    beside = {"reward": heads.HeadSettings(Adapter(rank=2))}
    whole_model = adapted(heads.with_heads(llama(tiny_model.CONFIG, jnp.float64), beside), Adapter(rank=2))
    random = lambda path, x: 0.1 * jax.random.normal(jax.random.key(len(path)), x.shape, x.dtype)  # noqa: E731
    whole = tree.map_with_path(random, param.init_params(whole_model.specs, jax.random.key(0), jnp.float64))
    asked, tokens = some(LENGTHS)
    rows = jax.tree.map(lambda x: x[None], laid(asked, tokens, LENGTHS, Room(32, 16)))
    found = np.asarray(sampler.scored(whole_model, ByScorer("reward"), whole, {}, rows))[0]
    for g, prompt in enumerate(asked.ids):
        for n in np.flatnonzero(LENGTHS[g]):
            text = np.array([*prompt, *tokens[g, n, : LENGTHS[g, n]]])
            alone = tiny_model.batch_of([[(text, 1)]], 16, 16, 1.0)
            h = whole_model.hidden(heads.view(whole, "reward"), alone)[0, len(text) - 1]
            np.testing.assert_allclose(found[g, n], h @ whole["reward"]["score"][:, 0], rtol=1e-10)
    for n in (0, 1):  # a completion of that token alone is read at its prompt, whatever stands beside it
        short = np.where(np.arange(2) == n, 1, [[2, 3], [5, 5]])
        rows = jax.tree.map(lambda x: x[None], laid(asked, tokens, short, Room(32, 16)))
        only = int(tokens[0, n, 0])
        apart = np.asarray(sampler.scored(whole_model, ByScorer("reward", only), whole, {}, rows))[0]
        text = np.array(asked.ids[0])
        h = whole_model.hidden(heads.view(whole, "reward"), tiny_model.batch_of([[(text, 1)]], 16, 16, 1.0))[
            0, len(text) - 1
        ]
        np.testing.assert_allclose(apart[0, n], h @ whole["reward"]["score"][:, 0], rtol=1e-10)
    rows = jax.tree.map(lambda x: x[None], laid(asked, tokens, LENGTHS, Room(32, 16)))
    end = int(tokens[1, 1, 4])  # the last token of one of them
    apart = np.asarray(sampler.scored(whole_model, ByScorer("reward", end), whole, {}, rows))[0]
    text = np.array([*asked.ids[1], *tokens[1, 1, :4]])
    h = whole_model.hidden(heads.view(whole, "reward"), tiny_model.batch_of([[(text, 1)]], 16, 16, 1.0))[
        0, len(text) - 1
    ]
    np.testing.assert_allclose(apart[1, 1], h @ whole["reward"]["score"][:, 0], rtol=1e-10)


def test_an_answer_that_is_padding_alone_is_read_at_its_prompt():
    asked, tokens = some(np.array([[1, 3], [3, 1]]))
    tokens[0, 0, 0] = tokens[1, 1, 0] = tokens[0, 1, 2] = 45  # which no prompt holds
    pairs = pairs_of(laid(asked, tokens, np.array([[1, 3], [3, 1]]), Room(32, 16)))
    found = reward_models.read_before(jax.tree.map(lambda x: x[None], pairs), 45).last[0, :, 0]
    first, second = (len(ids) - 1 for ids in asked.ids)
    assert found.tolist() == [[first, first + 3], [second + 3, second]]
    apart = replace(
        pairs, branches=None, last=pairs.last + 2
    )  # where each answer has the prompt in front of it
    ids = np.zeros_like(pairs.ids)
    ids[0, pairs.last[0, 0, 1] + 2] = 45
    found = reward_models.read_before(jax.tree.map(lambda x: x[None], replace(apart, ids=ids)), 45).last[
        0, :, 0
    ]
    assert (found - apart.last[:, 0]).tolist() == [[0, -1], [0, 0]]


KILL = """
import glob, os, time
from jaxft.train import meter
add = meter.Meter.add
def killed(self, step, batch, found):
    add(self, step, batch, found)
    if step + 1 == {step}:
        until = time.monotonic() + 60  # what was saved before is written in the background
        while not glob.glob("runs/inside/checkpoints/4") and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
meter.Meter.add = killed
"""
KILL_DRAWING = """
import glob, os, time
from jaxft.rl import sampler
draw = sampler.Player.draw
def killed(self, number, state):
    done = draw(self, number, state)  # its completions are in the table, and nothing is learned from them yet
    if number == 1:
        until = time.monotonic() + 60  # what was saved before is written in the background
        while not glob.glob("runs/drawing/checkpoints/4") and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
    return done
sampler.Player.draw = killed
"""


def test_sigterm_inside_a_rollout_saves_at_its_end(place):
    hook = KILL.format(step=5).replace("9)", "15)").replace("glob.glob", "str")
    process = place.start(
        "steps=12", "passes=4", "save=100", "loop.eval_every=none", "name=asked_to_stop", hook=hook
    )
    process.join()
    assert process.exitcode == 143 and place.checkpoints("asked_to_stop") == [8]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("rewards=config.py:even",), {"frac_reward_zero_std": 1.0, "reward_std": 0.0, "frac_learned": 1.0}),
        (
            ("max_new=2", "cut_off=false", "base=endless"),
            {"completions/clipped_ratio": 1.0, "frac_learned": 0.0},
        ),
    ],
    ids=["equal rewards", "all cut off"],
)
def test_what_teaches_nothing_changes_nothing_and_is_counted(place, argv, told):
    if not (place.folder / "endless").exists():
        rl_place.write_endless(place.folder)
    name = f"name=nothing-{argv[0].partition('=')[0]}"
    assert place.run(name, *argv, "steps=2", "passes=1", "beta=0.0", "batch=4", "group=2", "save=100") == 0, (
        place.err()
    )
    for line in (line for line in place.metrics(name[5:]) if "reward" in line):
        assert line["grad_norm"] == 0 == line.get("loss", 0) and {key: line[key] for key in told} == told


def test_a_tokenizer_without_an_end_token_is_told_and_nothing_ends(place):
    if not (place.folder / "endless").exists():
        rl_place.write_endless(place.folder)
    assert (
        place.run("name=endless", "base=endless", "steps=1", "passes=1", "max_new=4", "batch=4", "save=100")
        == 0
    ), place.err()
    assert "the tokenizer names no end token" in place.out()
    (line,) = [line for line in place.metrics("endless") if "reward" in line]
    assert line["completions/clipped_ratio"] == 1 and line["completions/mean_length"] == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"estimate": partial(by_group, advantage=advantages.remax)},
            "advantage=remax can't be called with (scores)",
        ),
        ({"weigh": advantages.centred}, "weigh=centred can't be called with (lengths, keep)"),
        ({"weights": (math.nan,)}, "weights of rewards are finite"),
        ({"weights": (1.0, 2.0)}, "1 rewards (exact) need as many weights, found 2"),
    ],
)
def test_rules_that_cant_be_followed_are_refused_at_once(settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Rules((rewards.exact,), **settings)


def test_rewards_that_all_fail_end_the_run_in_one_line(place):
    (place.folder / "bad.py").write_text("def bad(prompt, completion, row):\n    return row['missing']\n")
    assert place.run("name=bad", "rewards=bad.py:bad", "held_out=0.0") == 1
    last = place.err().strip().splitlines()[-1]
    assert last.startswith("error: no completion of rollout 1 could be scored: reward bad raised KeyError")
    assert "asked.jsonl:" in last


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": ""}, "bad.jsonl:1: the row is empty"),
        ({"prompt": " ", "answer": 1}, "bad.jsonl:1: column 'prompt' is empty"),
        ({"question": "why?"}, "bad.jsonl:1: found columns question; wanted prompt, messages or instruction"),
        ({"prompt": 7}, "bad.jsonl:1: "),
        ({"messages": [{"role": "user", "content": " "}]}, "bad.jsonl:1: "),
        ({"messages": [{"role": "assistant", "content": "so"}]}, "bad.jsonl:1: "),
        (
            {"prompt": "why " * 99},
            "bad.jsonl: all 1 prompts have more tokens than data.max_prompt=64; raise it",
        ),
    ],
)
def test_prompts_that_cant_be_asked_are_named(place, row, words):
    (place.folder / "bad.jsonl").write_text(json.dumps(row) + "\n")
    assert place.run("name=asks", "data=bad.jsonl", "held_out=0.0") == 1
    last = place.err().strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last


@pytest.mark.parametrize("text", ["[1, 2, 3] sort this list", "[INST] hi [/INST]", "[1, 2]"])
def test_a_prompt_that_begins_with_a_bracket_is_a_text(text):
    assert prompts.prompt_of(Row("rows:1", {"prompt": text})) == text
    turns = [{"role": "user", "content": "why?"}]
    assert prompts.prompt_of(Row("rows:1", {"prompt": json.dumps(turns)})) == turns


def test_a_run_ends_with_a_whole_rollout(place):
    assert place.run("name=half", "steps=5", "passes=2") == 1
    wanted = "error: loop.steps=5 ends inside a rollout, of which each is 2 steps (data.passes x data.minibatches); set 4 or 6"
    assert place.err().strip().splitlines()[-1] == wanted


def test_a_policy_waits_for_a_critic_on_its_own_hidden_states(place):
    argv = (
        "steps=4",
        "passes=2",
        "batch=8",
        "group=1",
        "ppo=true",
        "shared=true",
        "warm_up=100",
        "rewards=config.py:ascii",
    )
    assert place.run("name=waits", *argv, "save=100", "lr=1e-2") == 0, place.err()
    adapter = load_file(place.runs("waits") / "adapter" / "adapter_model.safetensors")
    assert not any(x.any() for name, x in adapter.items() if "lora_B" in name)  # as a fresh adapter begins
    lines = [line for line in place.metrics("waits") if "loss/value_avg" in line]
    assert lines[-1]["loss/value_avg"] < lines[0]["loss/value_avg"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("group=1",), "data.group=1: advantages within a group of one are all 0; wanted at least 2"),
        (("target_kl=0.1", "passes=1"), "target_kl ends a rollout's passes, and here that is one step"),
        (
            ("adapter.dropout=0.3",),
            "adapter.dropout=0.3, and this objective compares log-probs with those at drawing",
        ),
        (("warm_up=-1",), "warm_up is a number of rollouts from 0 up, found -1"),
        (("data.eval_group=5",), "data.eval_group=5 is more than data.group=4"),
        (("data.top_p=7.0",), "data.top_p=7.0; use a number above 0 and at most 1"),
        (("data.temperature=-1.0",), "data.temperature=-1.0; use a number of at least 0 (greedy)"),
        (("online=true", "data.temperature=0.0"), "data.temperature=0 samples the same completion 4 times"),
        (("online=true", "scale=true"), "pairs are made of rewards, weights, combine, shape and cut_off"),
    ],
)
def test_settings_that_would_teach_nothing_or_be_ignored_are_refused(place, argv, words):
    assert place.run("name=refused", *argv) == 1
    assert place.err().strip().splitlines()[-1].startswith(f"error: {words}")


def test_a_reward_that_fails_at_times_is_named_and_an_alarm_is_raised(place):
    odd = "def odd(prompt, completion, row):\n    return 1 / (row['answer'] % 3)\n"
    (place.folder / "odd.py").write_text(odd)
    assert place.run("name=odd", "rewards=odd.py:odd", "steps=2", "passes=1", "beta=0.0", "save=100") == 0, (
        place.err()
    )
    said = place.out()
    assert (
        "reward odd raised ZeroDivisionError" in said
        and "of the rewards raised or gave no finite number" in said
    )
    measured = [line for line in place.metrics("odd") if "eval_reward" in line]
    assert measured and all(0 < line["eval_reward_faults/raised"] < 1 for line in measured)


def test_held_out_prompts_are_answered_eval_group_times(place):
    seen = place.folder / "seen.txt"
    lines = f"    open({str(seen)!r}, 'a').write(prompt + '\\n')\n    return len(completion)\n"
    (place.folder / "told.py").write_text(f"def told(prompt, completion, row):\n{lines}")
    argv = ("rewards=told.py:told", "steps=1", "passes=1", "beta=0.1", "save=100", "data.eval_group=3")
    assert place.run("name=thrice", *argv) == 0, place.err()
    looks = [line for line in place.metrics("thrice") if "eval_reward" in line]
    times = sorted(Counter(seen.read_text().splitlines()).values())
    assert (
        times == [4] * 4 + [3 * len(looks)] * 4
    )  # a group each of what is learned from, then the held-out prompts
    assert all(line["eval_reward_std"] > 0 and np.isfinite(line["eval_objective/kl"]) for line in looks)
    assert looks[0]["eval_objective/kl"] == 0


def test_rows_with_the_same_prompt_are_on_one_side(monkeypatch):
    asked = Asked(tuple((i % 5, 1) for i in range(20)), tuple(map(str, range(20))), ("p",) * 20, ({},) * 20)
    monkeypatch.setattr(prompts, "read", lambda ref, data, tokenizer: asked)
    train, held = prompts.split(Prompts("rows", held_out=0.4, seed=3), None)
    assert len(train) + len(held) == 20 and len(held) == 8 and not set(train.ids) & set(held.ids)


def test_the_table_shows_two_completions_of_each_prompt():
    assert sampler.shown(32, 8) == [0, 1, 8, 9, 16, 17, 24, 25]
    assert sampler.shown(6, 1) == [0, 1, 2, 3, 4, 5]


def test_a_temperature_that_differs_is_refused(place):
    assert place.run("name=warm", "data.temperature=0.5") == 1
    assert "temperature" in place.err().strip().splitlines()[-1]
