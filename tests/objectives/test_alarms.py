"""Alarms that fire where they should and nowhere else, and the summary of a preference run."""

import json
import math
import re

import numpy as np
import pytest
from dpo_place import write_pair_place
from tiny_run import Place

from jaxft.objectives.alarms import (
    FALLS,
    WINDOW_STEPS,
    preference_alarms,
    preference_summary,
    rollout_alarms,
)
from jaxft.objectives.objective import Objective
from jaxft.runs.log import Log
from jaxft.runs.metrics_log import read_entries

BETA = 0.1


def report_of(entries, beta=BETA, total=None):
    """(messages, [(step, alarm)]) of a run's entries."""
    memory, messages, alarms = {}, [], []
    for entry in entries:
        memory, new, found = preference_alarms(
            beta, memory, entry, entry["step"] == total and "loss" not in entry
        )
        messages += new
        alarms += [(entry["step"], text) for text in found]
    return messages, alarms


def train_entries(ratios, logp=-100.0):
    """Entries of training steps whose chosen responses are at these log-ratios to the reference, in nats."""
    numbers = enumerate(np.asarray(ratios, float), 1)
    return [
        {"step": i, "loss": 0.6, "rewards/chosen": BETA * x, "logps/chosen": logp + x} for i, x in numbers
    ]


def held_out_entries(curve, every=10, **more):
    """Entries of evaluations of the held-out chosen responses' log-prob."""
    return [
        {"step": every * i, "eval_logps/chosen": x, **{k: v[i] for k, v in more.items()}}
        for i, x in enumerate(curve)
    ]


def noise(seed, steps, size=4.0):
    return np.random.default_rng(seed).normal(0, size, steps)


def test_a_falling_log_prob_raises_an_alarm_once_and_again_when_it_has_doubled():
    _, alarms = report_of(train_entries(-0.3 * np.arange(200) + noise(0, 200, 1.5)))
    assert alarms[0][0] <= 40 and 3 <= len(alarms) <= 5
    depths = [
        float(re.search(r"([\d.]+) nats per response below the reference", text)[1]) for _, text in alarms
    ]
    assert depths[0] > 3 and all(b > 2 * a for a, b in zip(depths, depths[1:], strict=False))
    for word in ("optim.lr", "beta", "dpop", "mix", "arXiv:2410.08847"):
        assert word in alarms[0][1]


def test_three_windows_can_suffice_and_a_slow_fall_in_noise_is_detected():
    assert report_of(train_entries(-1.0 * np.arange(15)))[1][0][0] == FALLS * WINDOW_STEPS == 15
    for seed in range(20):
        assert report_of(train_entries(-0.02 * np.arange(1500) + noise(seed, 1500)))[1]


@pytest.mark.parametrize("curve", ["noise", "rise", "fall and back", "a little below"])
def test_a_log_prob_that_does_not_keep_falling_raises_no_alarm(curve):
    for seed in range(20):
        x, t = noise(seed, 400), np.arange(400)
        shape = {
            "noise": 0.0 * t,
            "rise": 0.2 * t,
            "fall and back": np.where(t < 10, -t, 0.1 * t),
            "a little below": np.maximum(-0.01 * t, -1.5),
        }[curve]
        assert report_of(train_entries(shape + x))[1] == []


def test_long_responses_may_lose_more():
    falling = -0.25 * np.arange(60)
    assert (
        report_of(train_entries(falling, logp=-100))[1]
        and not report_of(train_entries(falling, logp=-1000))[1]
    )
    assert (
        report_of(held_out_entries([-100, -104, -108]))[1]
        and not report_of(held_out_entries([-1000, -1004, -1008]))[1]
    )


def test_held_out_log_probs_are_compared_with_step_0():
    assert [step for step, _ in report_of(held_out_entries([-100, -102, -105, -104, -106]))[1]] == [20]
    assert (
        "5.0 nats per response below step 0 on the held-out pairs"
        in report_of(held_out_entries([-100, -102, -105]))[1][0][1]
    )
    for curve in (
        [-100, -105, -104, -106, -105],
        [-100, -101, -102],
        [-100, -90, -95, -99],
        [-100, -100, -100],
    ):
        assert report_of(held_out_entries(curve))[1] == [], curve
    assert [step for step, _ in report_of(held_out_entries([-100, -110]), total=10)[1]] == [
        10
    ]  # at the end two evaluations suffice


def test_without_a_reference_only_held_out_pairs_raise_the_alarm():
    assert report_of(train_entries(-1.0 * np.arange(100)), beta=None)[1] == []
    assert report_of(held_out_entries([-100, -105, -110]), beta=None)[1]


def test_values_that_are_not_finite_are_no_measurements_and_a_held_out_loss_is_an_alarm():
    entries = [
        {name: None if name != "step" else x for name, x in entry.items()}
        for entry in train_entries(np.zeros(20))
    ]
    assert report_of(entries) == ([], [])
    lines, alarms = report_of([{"step": 0, "eval_loss": None, "eval_logps/chosen": None}, *entries])
    assert lines == [] and [step for step, _ in alarms] == [0]
    assert alarms[0][1].startswith("eval_loss is not finite.")
    assert preference_summary({"eval_rewards/margins": None}, {"eval_rewards/margins": None}) == []


@pytest.mark.parametrize("step, name", [(0, "eval_"), (1, "")])
def test_the_first_loss_is_compared_with_its_theoretical_value(step, name):
    def say(found, theory):
        return report_of([{"step": step, f"{name}loss": found, f"{name}loss_at_reference": theory}])  # noqa: E731

    for found, theory in ((0.6931, 0.6931), (0.6985, 0.6931), (25.7, 25.0), (0.0, 0.0)):
        lines, alarms = say(found, theory)
        assert len(lines) == 1 and f"{found:.4f}, in theory {theory:.4f}" in lines[0] and alarms == []
    for found, theory in ((0.76, 0.6931), (0.62, 0.6931), (27.0, 25.0)):
        lines, alarms = say(found, theory)
        assert lines == [] and "should start as the same model but do not" in alarms[0][1]


def test_agreement_is_reported_once_and_later_losses_are_not_compared():
    first = [
        {"step": 0, "eval_loss": 0.7, "eval_loss_at_reference": 0.7},
        {"step": 1, "loss": 0.7, "loss_at_reference": 0.7},
    ]
    lines, alarms = report_of([*first, {"step": 2, "loss": 0.1, "loss_at_reference": 0.7}])
    assert len(lines) == 1 and alarms == []
    assert report_of([{"step": 5, "loss": 0.4, "loss_at_reference": 0.7}]) == (
        [],
        [],
    )  # a mean over five steps


def test_a_growing_margin_with_falling_held_out_accuracy_raises_one_alarm():
    acc, margin = [0.5, 0.8, 0.7, 0.7, 0.68, 0.66], [0.0, 0.5, 0.6, 0.7, 0.9, 1.2]
    entries = [
        {"step": i, "eval_rewards/accuracies": a, "eval_rewards/margins": m}
        for i, (a, m) in enumerate(zip(acc, margin))
    ]
    (reported,) = report_of(entries)[1]
    assert reported[0] == 3 and "0.80 at its best, 0.70 now" in reported[1]
    for changed in ([0.5, 0.8, 0.7, 0.8, 0.7, 0.8], [0.5, 0.8, 0.78, 0.77, 0.78, 0.8]):
        assert (
            report_of(
                [{**entry, "eval_rewards/accuracies": a} for entry, a in zip(entries, changed, strict=True)]
            )[1]
            == []
        )
    assert report_of([{**entry, "eval_rewards/margins": 0.4} for entry in entries])[1] == []


def test_a_model_no_better_than_a_rule_by_length_raises_an_alarm_at_the_end():
    entry = {"step": 9, "eval_rewards/accuracies": 0.6, "eval_length/accuracy_if_longer_wins": 0.4}
    (reported,) = report_of([entry], total=9)[1]
    assert (
        "always preferring the shorter response gives 0.60" in reported[1]
        and report_of([entry], total=20)[1] == []
    )
    assert report_of([{**entry, "eval_rewards/accuracies": 0.61}], total=9)[1] == []


def test_a_run_that_ends_with_ties_alone_raises_an_alarm():
    entry = {"step": 9, "eval_rewards/accuracies_pairs": 20.0, "eval_length/accuracy_if_longer_wins": 0.4}
    (reported,) = report_of([entry], total=9)[1]
    assert "all 20 held-out pairs are ties" in reported[1] and report_of([entry], total=20)[1] == []
    assert report_of([{**entry, "eval_rewards/accuracies": 0.7}], total=9)[1] == []


def test_the_summary_states_accuracy_margin_kl_length_and_label_noise():
    first = {"eval_rewards/accuracies": 0.4, "eval_rewards/margins": 0.0, "eval_logps/chosen": -80.0}
    last = {
        "eval_rewards/accuracies": 0.9, "eval_rewards/margins": 0.8, "eval_logps/chosen": -79.0,
        "eval_kl": 0.0123, "eval_rewards/accuracies_pairs": 20.0,
        "eval_length/accuracy_if_longer_wins": 0.55, "eval_length/margin_correlation": 0.25,
        "label_noise": 0.21, "label_noise_error": 0.033,
        "eval_rewards/accuracies_chosen_longer": 0.95, "eval_rewards/accuracies_chosen_shorter": 0.85,
    }  # fmt: skip
    reported = "\n".join(preference_summary(first, last))
    for part in (
        "all ties before, 0.90 [0.70, 0.97] of 20 pairs after; always preferring the longer response ",
        "gives 0.55",
        "0.000 before, 0.800 after", "-80.0 before, -79.0 after", "0.0123 nats per token",
        "correlation 0.25", "0.95 where the chosen response is longer",
        "0.85 where it is shorter", "about 21 % look flipped, +- 7 ", "robust",
    ):  # fmt: skip
        assert part in reported
    assert "alike" not in reported and preference_summary({}, {}) == []
    alone = {name: value for name, value in last.items() if name != "eval_kl"}
    assert preference_summary(first, alone)[0].startswith(
        "held-out accuracy: 0.40 before, 0.90 [0.70, 0.97] of 20 pairs after"
    )  # without a reference
    coin = {"eval_rewards/accuracies": 0.55, "eval_rewards/accuracies_pairs": 20.0}
    assert preference_summary({}, coin)[0].endswith("of 20 pairs (not distinguishable from 0.5, chance)")
    assert (
        "robust" not in preference_summary({}, {"label_noise": 0.02})[0]
        and "too little" in preference_summary({}, {"label_noise": 0.45})[0]
    )


def test_a_resumed_log_prints_only_new_alarms_and_lists_all(tmp_path, capsys):
    entries = train_entries(-1.0 * np.arange(80))

    def write(folder, start, stop):
        log = Log(folder, 80, start)
        log.listen(lambda memory, entry, last: preference_alarms(BETA, memory, entry, last))
        for entry in entries[start:stop]:
            log.step(entry["step"], {k: v for k, v in entry.items() if k != "step"}, {})
        log.close()
        return log.alarms, [line for line in capsys.readouterr().out.splitlines() if line.startswith("alarm")]

    alone, messages = write(tmp_path / "alone", 0, 80)
    assert (
        messages == alone and len(alone) == 3 and [step for step, _ in report_of(entries)[1]] == [15, 30, 60]
    )
    for cut in (10, 15, 37):
        folder = tmp_path / f"cut{cut}"
        _, early = write(folder, 0, cut + 1)  # killed a step after its checkpoint
        kept, late = write(folder, cut, 80)
        assert (
            kept == alone
            and late == alone[sum(int(re.search(r"step (\d+)", text)[1]) <= cut for text in alone) :]
        )
        assert early == alone[: len(early)]
        assert read_entries(folder / "metrics.jsonl") == read_entries(tmp_path / "alone" / "metrics.jsonl")


# Whole runs

DOWN = '''"""A loss that lowers the chosen response."""


def chosen_down(pair, beta=0.1):
    return beta * pair.chosen.ratio
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    write_pair_place(folder)
    (folder / "down.py").write_text(DOWN)
    return Place(folder)


@pytest.mark.slow
def test_falling_chosen_responses_are_reported_in_log_card_and_summary(place):
    argv = ["loss=down.py:chosen_down", "steps=16", "loop.eval_every=4"]
    assert place.run(*argv, "name=alone") == 0, place.err()
    reported = place.out()
    alarms = json.loads((place.runs("alone") / "summary.json").read_text())["alarms"]
    card = (place.runs("alone") / "README.md").read_text()
    assert alarms and all(text in reported and f"- {text}" in card for text in alarms)
    assert "the log-prob of chosen responses keeps falling" in alarms[0] and reported.index(
        alarms[0]
    ) < reported.index("step 16/16")
    assert (
        "in theory 0.0000: policy and reference start as the same model" in reported
        and "held-out accuracy: " in card
    )


def test_a_healthy_run_has_no_alarms(place):
    assert place.run("steps=8", "name=well") == 0, place.err()
    assert json.loads((place.runs("well") / "summary.json").read_text())["alarms"] == []
    assert "alarm" not in place.out() + (place.runs("well") / "README.md").read_text()
    assert "in theory 0.6931" in place.out() and "held-out margin of the rewards: 0.000 before" in place.out()


def test_the_accuracy_of_a_model_that_is_not_finite_is_shown_as_nan():
    accuracy = "eval_rewards/accuracies"
    (line,) = preference_summary({accuracy: 0.5}, {accuracy: math.nan, accuracy + "_pairs": 20.0})
    assert line == "held-out accuracy: 0.50 before, nan [nan, nan] of 20 pairs after"


def rollout_alarms_of(entries):
    """The alarms of each entry of a run that learns from rollouts."""
    memory, out = {}, []
    for i, entry in enumerate(entries):
        memory, lines, alarms = rollout_alarms(
            memory, {"step": i + 1, "reward": 0.5, **entry}, i + 1 == len(entries)
        )
        out.append(alarms)
        assert not lines
    return out


def test_failing_rewards_raise_an_alarm_at_once_and_when_their_fraction_has_doubled():
    faults = [0.0, 0.1, 0.1, 0.15, 0.2]
    messages = rollout_alarms_of(
        [{"reward_faults/raised": x, "reward_faults/not_a_number": 0.0} for x in faults]
    )
    assert [len(alarms) for alarms in messages] == [0, 1, 0, 0, 1] and messages[1][0].startswith(
        "10 % of the rewards raised"
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"grad_norm": 0.0, "frac_reward_zero_std": 1.0}, "had no training signal"),
        ({"reward_std": 0.0}, "had no training signal"),
        ({"frac_learned": 0.0}, "had no training signal"),
        ({"completions/clipped_ratio": 0.6}, "Raise data.max_new"),
    ],
)
def test_rollouts_without_anything_to_learn_raise_an_alarm_after_five_in_a_row(entry, message):
    fine = {"frac_reward_zero_std": 1.0, "reward_std": 0.1, "grad_norm": 2.0, "frac_learned": 1.0}
    fine["completions/clipped_ratio"] = 0.4
    messages = rollout_alarms_of([fine, *[{**fine, **entry}] * 10, fine, *[{**fine, **entry}] * 4])
    assert [i for i, alarms in enumerate(messages) if alarms] == [5, 10]
    assert all(message in messages[i][0] for i in (5, 10))


def test_a_short_run_whose_completions_are_cut_raises_an_alarm_at_its_end_and_a_longer_one_only_once():
    def alarms(ratios):
        entries = [{"step": i, "completions/clipped_ratio": x} for i, x in enumerate(ratios, 1)]
        memory, found = {}, []
        for entry in [*entries, {"step": len(ratios), "eval_reward": 0.5}]:
            memory, _, new = rollout_alarms(memory, entry, "eval_reward" in entry)
            found.append(len(new))
        return found

    assert alarms([0.3, 0.9]) == [0, 0, 1] and alarms([0.9, 0.3]) == [0, 0, 0]
    assert alarms([1.0] * 6) == [0, 0, 0, 0, 1, 0, 0]
    assert sum(alarms([0.1] * 20 + [0.9])) == 0 == sum(alarms([0.1] * 2 + [0.9] * 3))


def test_a_gradient_of_exactly_zero_for_many_steps_raises_an_alarm_for_every_objective():
    memory, found = {}, []
    for step, norm in enumerate([0.0] * 4 + [1e-30] + [0.0] * 10 + [1.0, None], 1):
        memory, _, new = Objective(None, None).report.alarms(memory, {"step": step, "grad_norm": norm}, False)
        found += [(step, alarm) for alarm in new]
    assert [step for step, _ in found] == [10, 15]
    assert "exactly 0 in the last 5 logged steps" in found[0][1] and "last 10" in found[1][1]


def test_a_held_out_loss_that_is_not_finite_raises_an_alarm():
    found = Objective(None, None).report.alarms({}, {"step": 4, "eval_loss": None, "eval_x": None}, False)
    assert len(found.alarms) == 1 and found.alarms[0].startswith("eval_loss is not finite. ")


def test_skipped_loss_spikes_raise_an_alarm_at_once_and_when_they_have_doubled():
    memory, found = {}, []
    for step, share in ((1, 0.0), (2, 1.0), (3, 0.0), (7, 0.25), (8, 1.0), (9, 0.0), (13, 0.25)):
        entry = {"step": step, "loss": 1.0, "grad_norm": 1.0, "loss_spikes": share}
        memory, _, new = Objective(None, None).report.alarms(memory, entry, False)
        found += [(step, alarm.split(" steps so far")[0]) for alarm in new]
    assert found == [(2, "1 of 2"), (7, "2 of 7"), (13, "4 of 13")]
