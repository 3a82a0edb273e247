"""Runs of PPO and GRPO: named methods and their help, what runs learn, how they end, resume and report."""

import json
import re
from collections import Counter
from functools import partial

import numpy as np
import pytest
import rl_workdir
import simulated_devices
from prepared import load_and_compile, prepare
from safetensors.numpy import load_file
from tiny_run import Place, write_rows

from jaxft.data.rows.shipped import ROOT
from jaxft.objectives.losses.policy_losses import (
    FixedKL,
    KLInReward,
    clipped,
    dppo_tv,
    gspo,
    k1,
    policy_gradient,
)
from jaxft.rl import advantages, estimators, token_weights
from jaxft.runs.settings.config import load_config
from jaxft.runs.settings.setting_values import differences, find_file, run_file
from jaxft.runs.settings.settings_list import help_text


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl")
    rl_workdir.write_workdir(folder)
    return Place(folder)


@pytest.mark.slow
def test_a_policy_learns_what_is_rewarded(workdir):
    argv = ["steps=16", "passes=1", "beta=0.0", "batch=8", "group=8", "lr=3e-2"]
    assert workdir.run("name=learns", *argv) == 0, workdir.err()
    lines = workdir.metrics("learns")
    rewards = [line["reward"] for line in lines if "reward" in line]
    assert len(rewards) == 16 and np.mean(rewards[-3:]) > 2 * np.mean(rewards[:3])
    assert lines[-1]["eval_reward"] > 2 * lines[0]["eval_reward"]
    table = rl_workdir.table(workdir, "learns")
    assert len(table) == 16 * 8 and {"step", "prompt", "completion", "reward", "rewards"} <= table[0].keys()


METHODS = run_file(find_file("configs/grpo.py")).METHODS


def test_the_help_of_grpo_lists_every_method_with_its_settings():
    text = help_text("configs/grpo.py")
    assert (
        all(f"{name}:\n        {settings}\n" in text for name, settings in METHODS.items())
        and len(METHODS) == 14
    )


PARTS = {  # advantage, weights of tokens, loss and KL penalty of each method's paper
    "GRPO": (advantages.grpo, token_weights.sequence_mean, clipped, 0.0),
    "Dr. GRPO": (advantages.centred, token_weights.constant_length, clipped, 0.0),
    "DAPO": (advantages.grpo, token_weights.token_mean, partial(clipped, eps_high=0.28), 0.0),
    "GSPO": (advantages.grpo, token_weights.sequence_mean, gspo, 0.0),
    "RLOO": (advantages.rloo, token_weights.sequence_sum, policy_gradient, KLInReward(FixedKL(0.05, k1))),
    "REINFORCE++": (
        estimators.reinforce, token_weights.token_mean, clipped, KLInReward(FixedKL(0.01, k1)),
    ),
    "REINFORCE++ with the group's mean as baseline": (
        estimators.group_whitened, token_weights.token_mean, clipped, 0.0,
    ),
    "DPPO": (advantages.centred, token_weights.constant_length, dppo_tv, 0.0),
    "MaxRL": (advantages.maxrl, token_weights.token_mean, clipped, 0.0),
    "GDPO, of several rewards": (estimators.by_each, token_weights.token_mean, clipped, 0.0),
    "GFPO, the shorter half of each group": (advantages.gfpo, token_weights.token_mean, clipped, 0.0),
    "GFPO, more of the groups of harder prompts": (
        advantages.adaptive_gfpo, token_weights.token_mean, clipped, 0.0,
    ),
    "with truncated importance sampling, TIS": (advantages.grpo, token_weights.token_mean, clipped, 0.0),
    "with masked importance sampling, MIS": (advantages.grpo, token_weights.token_mean, clipped, 0.0),
}  # fmt: skip
ESTIMATORS = (estimators.reinforce, estimators.group_whitened, estimators.by_each)
CORRECTIONS = {"TIS": token_weights.truncated_tokens, "MIS": token_weights.masked_completions}


def test_every_named_method_has_the_parts_of_its_paper(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert METHODS.keys() == PARTS.keys()
    for name, settings in METHODS.items():
        run = load_config("configs/grpo.py", settings.split())
        rules, (advantage, weights, loss, beta) = run.data.rules, PARTS[name]
        if advantage not in ESTIMATORS:
            advantage = partial(estimators.by_group, advantage=advantage)
        objective = run.objective.keywords
        found = rules.estimate, rules.token_weights, objective["loss"]
        assert [*map(called, found)] == [*map(called, (advantage, weights, loss))], name
        assert objective["beta"] == beta, name
        assert (rules.filter, rules.shape.keywords["overlong"]) == (
            (advantages.nonconstant_groups, (run.data.max_new, 2)) if name == "DAPO" else (None, None)
        ), name
        assert rules.correction == CORRECTIONS.get(name[-3:]), name
        assert rules.ratio_to_sampler == (name == "DPPO"), name
        assert run.data.group == (16 if name.startswith("GFPO") else 8), name


def test_the_overlong_penalty_begins_before_the_limit_of_all_turns(monkeypatch):
    """Four turns of 32 tokens may have 128: an episode of 120 ends where the penalty begins."""
    monkeypatch.chdir(ROOT)
    turns = ["environment=guess_number", "max_turns=4", "max_episode=256", "max_new=32", "overlong=8"]
    rules = load_config("configs/grpo.py", turns).data.rules
    lengths = np.array([[10, 60, 120, 124, 128]])
    scores = rules.shape(np.zeros((1, 5)), lengths, np.ones((1, 5), bool))
    assert scores.tolist() == [[0, 0, 0, -0.5, -1]]


def test_a_correction_takes_its_bounds_from_the_recipe(monkeypatch):
    monkeypatch.chdir(ROOT)
    run = load_config("configs/grpo.py", ["correction=masked_tokens", "correction_bounds=0.5,5"])
    assert called(run.data.rules.correction) == (token_weights.masked_tokens, {"least": 0.5, "most": 5.0})
    with pytest.raises(ValueError, match="correction_bounds needs a correction, such as"):
        load_config("configs/grpo.py", ["correction_bounds=0.5,5"])
    with pytest.raises(ValueError, match=r"correction_bounds=3,1 .* Use 0 <= least < most"):
        load_config("configs/grpo.py", ["correction=masked_tokens", "correction_bounds=3,1"])


@pytest.mark.parametrize("penalty", ["missing_eos=1", "overlong=2", "kl_in=rewards beta=0.1"])
def test_maxrl_refuses_penalties_before_the_run(monkeypatch, penalty):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="advantage=maxrl divides by the mean score, which missing_eos"):
        load_config("configs/grpo.py", ["advantage=maxrl", *penalty.split()])


def called(function):
    """A function and what it is called with."""
    return (function.func, function.keywords) if isinstance(function, partial) else (function, {})


@pytest.mark.quick_cases("DAPO")  # it has a filter of groups
@pytest.mark.parametrize("name, settings", METHODS.items(), ids=METHODS)
def test_every_named_method_trains(workdir, name, settings):
    folder = "method-" + re.sub(r"\W", "", name)
    argv = ["model=base", "data=prompts.jsonl", "held_out=0.2", "rewards=config.py:ascii", "general=none"]
    argv += [] if "group=" in settings else ["group=4"]
    argv += ["batch=4", "rank=4", "max_new=24", "dtype=float32", "loop.steps=2", "loop.eval_every=none"]
    argv += ["samples=0", "lr=1e-2", f"name={folder}"]
    assert workdir.run("--config", "configs/grpo.py", *argv, *settings.split()) == 0, workdir.err()
    lines = [line for line in workdir.metrics(folder) if "reward" in line]
    assert len(lines) == 2 and all(line["grad_norm"] > 0 for line in lines)
    effective = lines[0].get("sampling/importance_sampling_ratio/effective_samples")
    assert effective == pytest.approx(1, abs=1e-4) if "correction=" in settings else effective is None
    assert ("objective/kl" in lines[0]) == ("kl_in=rewards" in settings)
    held_out = map(json.loads, (workdir.runs(folder) / "held_out.jsonl").read_text().splitlines())
    rewards, mean = (
        {row["row"]: row["reward"] for row in held_out},
        workdir.metrics(folder)[-1]["eval_reward"],
    )
    assert len(rewards) > 1 and np.mean([*rewards.values()]) == pytest.approx(mean)


EPISODES = ["data.environment=config.py:once_more", "data.max_turns=2", "data.max_episode=80", "max_new=12"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], EPISODES], ids=["completions", "episodes"])
def test_a_run_killed_inside_a_rollout_ends_as_one_that_was_not(workdir, more):
    """PPO with an adaptive KL: killed between two minibatches, and between sampling and training."""
    argv = ["steps=8", "passes=2", "minibatches=2", "save=4", "ppo=true", "group=1", "batch=8", *more]
    whole, inside, sampled = (f"{name}{len(more)}" for name in ("whole", "inside", "sampled"))
    assert workdir.run(*argv, f"name={whole}") == 0, workdir.err()
    assert len({line["kl_coef"] for line in workdir.metrics(whole) if "kl_coef" in line}) > 4
    hooks = {
        inside: rl_workdir.kill_at(6, inside, checkpoint=4),
        sampled: rl_workdir.kill_after_sampling(sampled, checkpoint=4),
    }
    for name, hook in hooks.items():
        process = workdir.start(*argv, f"name={name}", hook=hook)
        process.join()
        assert process.exitcode == -9 and workdir.checkpoints(name) == [4], workdir.err()
        assert workdir.run(*argv, f"name={name}") == 0, workdir.err()
        assert workdir.results(name, 8) == workdir.results(whole, 8)
        tables = [(workdir.runs(run) / "completions.jsonl").read_text() for run in (name, whole)]
        assert tables[0] == tables[1]


# Runs with these settings have the same programs, which the first one compiles.
SMALL = ["passes=1", "beta=0.0", "batch=4", "group=2", "save=100", "samples=0"]


def logged(workdir, name):
    """The metrics of a run, without its timings."""
    return [{k: x for k, x in line.items() if k != "perf"} for line in workdir.metrics(name)]


def test_a_run_replays_the_rollouts_of_another_to_the_bit(workdir):
    argv = ["steps=2", *SMALL, "max_new=8"]
    assert workdir.run("name=first", *argv) == 0, workdir.err()
    assert workdir.run("name=again", "data.replay=runs/first", *argv) == 0, workdir.err()
    assert logged(workdir, "again") == logged(workdir, "first")
    assert rl_workdir.table(workdir, "again") == rl_workdir.table(workdir, "first")
    argv[0] = "steps=3"
    assert workdir.run("name=longer", "data.replay=runs/first", *argv) == 1
    assert "2.npz is missing; this run needs rollout 3" in workdir.err()


def test_a_run_killed_before_its_first_checkpoint_repeats_its_recorded_rollouts(workdir):
    argv, hook = ["name=early", "steps=2", *SMALL, "max_new=8"], rl_workdir.kill_after_sampling("early", 0)
    records, sampled = [workdir.runs("early") / "rollouts" / f"{number}.npz" for number in (0, 1)], []
    for more in ([], ["rewards=config.py:ascii"]):  # other settings sample again
        process = workdir.start(*argv, *more, hook=hook)
        process.join()
        assert process.exitcode == -9 and not workdir.checkpoints("early"), workdir.err()
        sampled.append([path.stat().st_ino for path in records])
    assert not {*sampled[0]} & {*sampled[1]}
    assert workdir.run(*argv, *more) == 0, workdir.err()
    assert "runs/early has no complete checkpoint: the run starts again at step 0" in workdir.out()
    assert [path.stat().st_ino for path in records] == sampled[1]


@pytest.mark.quick_cases("policy")
@pytest.mark.parametrize(
    "more",
    [("passes=2",), ("passes=2", "ppo=true"), ("passes=1", "online=true")],
    ids=["policy", "ppo", "pairs"],
)
def test_a_policy_is_trained_on_episodes_of_two_turns_and_survives_faults(workdir, more):
    name = "episodes-" + more[-1].partition("=")[0]
    argv = ["steps=2", "batch=8", "group=2", "save=100", "samples=0", *EPISODES]
    argv += ["rewards=config.py:letters,reached", *more]
    assert workdir.run(f"name={name}", *argv) == 0, workdir.err()
    assert "raised: " in workdir.out() and "out of order" in workdir.out()
    entries = map(json.loads, (workdir.runs(name) / "metrics.jsonl").read_text().splitlines())
    for line in (entry for entry in entries if "reward" in entry):
        assert line["episodes/turns"] == 2 and line["episodes/given_tokens"] > 4
        assert 0 < line["perf"]["sampling_seconds"] < line["perf"]["seconds"]
        assert 0 < line["episodes/faults/raised"] == line["frac_unscorable"] < 1
        if "online=true" not in more:  # the engine's and the training program's
            assert line["sampling/sampling_logp_difference/max"] < 1e-4
    table = [entry for entry in rl_workdir.table(workdir, name) if not entry["fault"]]
    assert all(len(entry["turns"]) == 4 and entry["rewards"]["reached"] == 1 for entry in table) and table


OPTIMISED = simulated_devices.flags(1, "--xla_backend_optimization_level=1")


@pytest.mark.slow
def test_ppo_trains_the_policy_and_its_critic_and_warm_up_the_critic_alone(workdir):
    argv = ["passes=2", "beta=0.0", "batch=64", "group=1", "lr=2e-2", "ppo=true", "save=100", "max_new=12"]
    argv += ["rewards=config.py:ascii"]
    # 32 steps take longer than compiling with optimisation
    assert workdir.run("name=ppo", "steps=32", *argv, XLA_FLAGS=OPTIMISED) == 0, workdir.err()
    lines = [line for line in workdir.metrics("ppo") if "reward" in line]
    rewards = [line["reward"] for line in lines]
    assert np.mean(rewards[-4:]) > 1.2 * np.mean(rewards[:4])
    assert lines[-1]["loss/value_avg"] < lines[0]["loss/value_avg"] / 2
    assert max(line["sampling/sampling_logp_difference/max"] for line in lines) < 1e-4
    ratios = [abs(line["val/ratio"] - 1) for line in lines]  # the first of two passes is on-policy
    assert max(ratios[::2]) < 1e-6 < np.median(ratios[1::2])
    assert workdir.run("name=warm", "steps=2", *argv, "warm_up=100") == 0, workdir.err()
    warm = [line for line in workdir.metrics("warm") if "reward" in line]
    assert len(warm) == 2 and all(line["objective/kl"] == 0 and abs(line["kl"]) < 1e-6 for line in warm)


@pytest.mark.slow
def test_a_mesh_samples_and_trains_as_one_device_does(workdir):
    """Greedy, so that rounding changes no token: rows, weights and matmuls are sharded."""
    argv = ["steps=2", "passes=2", "batch=8", "group=2", "ppo=true", "save=100", "data.top_k=1"]
    argv += ["rewards=config.py:ascii"]
    assert workdir.run("name=one", *argv) == 0, workdir.err()
    mesh = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    assert workdir.run("name=many", *argv, *mesh, devices=8) == 0, workdir.err()
    tables = [(workdir.runs(name) / "completions.jsonl").read_text() for name in ("one", "many")]
    assert tables[0] == tables[1] and tables[0]
    for one, many in zip(*(workdir.metrics(name) for name in ("one", "many")), strict=True):
        assert one.keys() == many.keys()
        for name in ("loss", "loss/value_avg", "grad_norm", "objective/kl", "eval_reward", "entropy"):
            if name in one:
                np.testing.assert_allclose(one[name], many[name], rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_target_kl_ends_the_passes_over_a_rollout_and_trains_the_critic_on(workdir):
    argv = ["steps=8", "passes=4", "batch=8", "group=1", "ppo=true", "save=100", "target_kl=1e-6", "lr=2e-2"]
    assert workdir.run("name=far", *argv) == 0, workdir.err()
    lines = {line["step"]: line for line in workdir.metrics("far") if "reward" in line}
    approx_kl = [lines[step].get("policy/approxkl_avg") for step in (5, 6, 7, 8)]
    assert approx_kl[0] < 1e-6 < approx_kl[1] and approx_kl[2:] == [None, None]
    assert all("loss/value_avg" in lines[step] for step in (7, 8))


@pytest.mark.slow
def test_sigterm_inside_a_rollout_saves_at_its_end(workdir):
    hook = rl_workdir.kill_at(5, "asked_to_stop", checkpoint=0, signal=15)
    argv = ["steps=12", "passes=4", "save=100", "loop.eval_every=none", "name=asked_to_stop"]
    process = workdir.start(*argv, hook=hook)
    process.join()
    assert process.exitcode == 143 and workdir.checkpoints("asked_to_stop") == [8]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ("rewards=config.py:constant", "max_new=8"),
            {"frac_reward_zero_std": 1.0, "reward_std": 0.0, "frac_learned": 1.0},
        ),
        pytest.param(
            ("max_new=2", "truncated=false", "base=endless"),
            {"completions/clipped_ratio": 1.0, "frac_learned": 0.0},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["equal rewards", "all truncated"],
)
def test_rollouts_without_signal_change_nothing_and_are_counted(workdir, argv, expected):
    if not (workdir.folder / "endless").exists():
        rl_workdir.write_without_eos(workdir.folder)
    name = f"nothing-{argv[0].partition('=')[0]}"
    assert workdir.run(f"name={name}", "steps=2", *SMALL, *argv) == 0, workdir.err()
    for line in (line for line in workdir.metrics(name) if "reward" in line):
        assert line["grad_norm"] == 0 == line.get("loss", 0)
        assert {key: line[key] for key in expected} == expected


@pytest.mark.slow
def test_a_tokenizer_without_an_end_token_is_reported_and_nothing_ends(workdir):
    if not (workdir.folder / "endless").exists():
        rl_workdir.write_without_eos(workdir.folder)
    argv = ["base=endless", "steps=1", "passes=1", "max_new=4", "batch=4", "save=100"]
    assert workdir.run("name=endless", *argv) == 0, workdir.err()
    assert "the tokenizer has no end token" in workdir.out()
    (line,) = [line for line in workdir.metrics("endless") if "reward" in line]
    assert line["completions/clipped_ratio"] == 1 and line["completions/mean_length"] == 4


def test_a_run_whose_completions_would_end_elsewhere_is_not_resumed(workdir):
    path = workdir.folder / "base" / "generation_config.json"
    before, record = path.read_text(), prepare(workdir.folder).lead.record
    path.write_text(json.dumps({**json.loads(before), "eos_token_id": [257, 3]}))
    changed = prepare(workdir.folder).lead.record
    path.write_text(before)
    assert differences(record, changed) == ["stop_tokens: [257] -> [3, 257]"]


def test_the_last_rollout_of_a_run_is_used_in_full(workdir):
    with pytest.raises(ValueError, match=r"^loop.steps=5 .* set 4 or 6"):
        prepare(workdir.folder, "steps=5", "passes=2")


@pytest.mark.slow
def test_the_policy_is_frozen_while_a_critic_on_its_hidden_states_warms_up(workdir):
    argv = ["steps=4", "passes=2", "batch=8", "group=1", "ppo=true", "shared=true", "warm_up=100"]
    argv += ["rewards=config.py:ascii", "save=100", "lr=1e-2"]
    assert workdir.run("name=waits", *argv) == 0, workdir.err()
    adapter = load_file(workdir.runs("waits") / "adapter" / "adapter_model.safetensors")
    assert not any(x.any() for name, x in adapter.items() if "lora_B" in name)  # as a fresh adapter starts
    lines = [line for line in workdir.metrics("waits") if "loss/value_avg" in line]
    assert lines[-1]["loss/value_avg"] < lines[0]["loss/value_avg"]


def test_dropout_of_a_policy_is_refused(workdir):
    with pytest.raises(ValueError, match="adapter.dropout=0.3"):
        prepare(workdir.folder, "adapter.dropout=0.3")


@pytest.mark.slow
def test_a_reward_that_fails_at_times_is_named_and_raises_an_alarm(workdir):
    text = "def odd(prompt, completion, row):\n    return 1 / (row['answer'] % 3)\n"
    (workdir.folder / "odd.py").write_text(text)
    argv = ["rewards=odd.py:odd", "steps=2", "passes=1", "beta=0.0", "save=100"]
    assert workdir.run("name=odd", *argv) == 0, workdir.err()
    out = workdir.out()
    assert "reward odd raised ZeroDivisionError" in out
    assert "of the rewards raised or" in out  # the alarm
    evaluated = [line for line in workdir.metrics("odd") if "eval_reward" in line]
    assert evaluated and all(0 < line["eval_reward_faults/raised"] < 1 for line in evaluated)


@pytest.mark.slow
def test_held_out_prompts_are_sampled_eval_group_times(workdir):
    calls = workdir.folder / "calls.txt"
    text = f"    open({str(calls)!r}, 'a').write(prompt + '\\n')\n"
    text += "    return len(completion) + (1e5 if 'why' in prompt else 0)\n"
    (workdir.folder / "logged.py").write_text(f"def logged(prompt, completion, row):\n{text}")
    write_rows(workdir.folder / "other.jsonl", [{"prompt": f"why is it {i}?"} for i in range(20)])
    argv = ["rewards=logged.py:logged", "steps=1", "passes=1", "beta=0.1", "save=100", "data.eval_group=3"]
    argv += ["data=prompts.jsonl,other.jsonl"]
    assert workdir.run("name=thrice", *argv) == 0, workdir.err()
    evaluated = [line for line in workdir.metrics("thrice") if "eval_reward" in line]
    counts = sorted(Counter(calls.read_text().splitlines()).values())
    assert counts == [4] * 4 + [3 * len(evaluated)] * 8  # a group of each training prompt, then the held-out
    assert all(line["eval_reward/prompts"] < 1e4 < line["eval_reward/other"] for line in evaluated)
    assert all(line["eval_reward_std"] > 0 and np.isfinite(line["eval_objective/kl"]) for line in evaluated)
    assert evaluated[0]["eval_objective/kl"] == 0


def test_a_sampling_temperature_other_than_that_of_the_objective_is_refused(workdir):
    with pytest.raises(ValueError, match="^data.temperature=0.5 differs"):
        load_and_compile(workdir.folder, "data.temperature=0.5")
