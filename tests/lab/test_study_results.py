"""The conclusions of simulated studies whose curves are planted, and their page and tables."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from jaxft.lab.studies.appendix import PaperTable, curve_panels, study_page, tables_of
from jaxft.lab.studies.halving import HeldOutPairs, PairsEvaluation
from jaxft.lab.studies.study_results import (
    FinalCurve,
    LossOutcome,
    Sensitivity,
    StudyResult,
    duels_of,
    final_curves,
    length_weights,
    margin_per_token,
)
from jaxft.objectives.pair import ACCURACY
from jaxft.report.statistics import equivalence, paired_difference

PROMPTS, SEEDS, STEPS = 80, 3, (0, 5, 10, 15, 20)
PAIRS = HeldOutPairs(
    tuple(f"rows:{i}" for i in range(2 * PROMPTS)),
    tuple(range(2 * PROMPTS)),
    (True, False) * PROMPTS,
    tuple(i // 2 % 4 - 1 for i in range(2 * PROMPTS)),  # of compared prompts: -1, 0, 1, 2
)


def loss(label, gain, furthest, key):
    """A loss whose accuracy is 1/2 + gain(KL) and whose KL grows evenly to `furthest`. Prompts are of unequal
    difficulty, which is the same for every loss.
    """
    rng, difficulty = np.random.default_rng(key), np.random.default_rng(0).normal(0, 0.05, PROMPTS)
    kl = np.linspace(0, furthest, len(STEPS))

    def curve():
        noise = rng.normal(0, 0.02, (len(STEPS), PROMPTS))
        values = 0.5 + gain(kl)[:, None] * (1 + difficulty) + noise
        metrics = tuple({"eval_kl": x, "eval_logps/chosen": -x, "eval_rewards/margins": 2 * x} for x in kl)
        return FinalCurve(STEPS, kl, values, 0.1 * kl, metrics)

    trials = ((f"lr={key}e-05, beta=0.1", 20, 0.7), ("lr=1, beta=0.1", 5, None))
    return LossOutcome(
        label, trials[0][0], trials, Sensitivity(5, 0.7, 0.6, 0.4), tuple(curve() for _ in range(SEEDS))
    )


def steep(kl):
    return 0.3 * np.minimum(1, kl)


def flat(kl):
    return 0.1 * kl


def verdicts(*losses, margin=None):
    return {(d.one, d.other): d.verdict for d in duels_of(losses, margin)}


def test_a_loss_that_only_moved_further_does_not_win_at_the_same_kl():
    near, far = loss("near", flat, 0.5, 1), loss("far", flat, 2.0, 2)
    assert verdicts(near, far) == {
        ("near", "far"): "far is better at the end; at the same KL they are not distinguishable"
    }


def test_a_loss_that_is_better_along_the_curve_wins_and_one_that_crosses_does_not():
    good, weak, late = (
        loss("good", steep, 1.0, 1),
        loss("weak", flat, 1.0, 2),
        loss("late", lambda x: 0.5 * x**3, 1.0, 3),
    )
    found = verdicts(good, weak, late)
    assert found["good", "weak"] == "good is better at the end and at every KL that both reach"
    assert found["good", "late"] == "late is better at the end, but worse at some KL that both reach"


def test_losses_with_the_same_curve_are_equivalent_within_a_margin():
    one, other = loss("one", steep, 1.0, 1), loss("other", steep, 1.0, 2)
    assert verdicts(one, other, margin=0.02)["one", "other"] == "equivalent within 0.02"
    assert verdicts(one, other)["one", "other"].startswith("not distinguishable; ")


def diverged(loss, seeds):
    """The loss whose runs with these seeds have no finite value at the end."""
    bad = [
        replace(c, values=np.vstack([c.values[:-1], c.values[-1:] * np.nan]), kl=np.append(c.kl[:-1], np.nan))
        for c in loss.curves
    ]
    curves = (bad[n] if n in seeds else curve for n, curve in enumerate(loss.curves))
    return replace(loss, curves=tuple(curves))


def test_a_loss_that_diverges_is_a_result_and_the_others_are_compared(study):
    """Before, one such run left no prompt with a value, and the study without a page."""
    good, weak = loss("good", steep, 1.0, 1), loss("weak", flat, 1.0, 2)
    once, always = (
        diverged(replace(weak, label="once"), {1}),
        diverged(replace(weak, label="always"), {0, 1, 2}),
    )
    losses = (good, once, always)
    (duel,) = duels_of(losses, None, length_weights(PAIRS))
    assert (duel.one, duel.other, duel.difference.seeds) == ("good", "once", 2)
    assert (
        duel.verdict == "good is better at the end and at every KL that both reach; once diverged with 1 seed"
    )
    study = replace(study, losses=losses, duels=(duel,))
    assert [x.label for x in study.order] == ["good", "once", "always"]
    assert "always diverged with seed 0, 1, 2: no held-out value is finite" in study.lines()
    rows = {row[0]: row for row in tables_of(study)[0].rows}
    assert rows["always"][1:3] == ("diverged", "diverged, diverged, diverged")
    assert "diverged" in rows["once"][2] and "[" in rows["once"][1]
    assert "always diverged with seed 0, 1, 2" in study_page(study, tables_of(study))


def test_equivalence_is_adjusted_for_the_number_of_duels():
    one, other = loss("one", steep, 1.0, 1), loss("other", steep, 1.0, 2)
    margin = next(m for m in np.linspace(0.001, 0.02, 200) if equivalence_p(one, other, m) < 0.04)
    assert verdicts(one, other, margin=margin)["one", "other"].startswith("equivalent")
    far = loss("far", flat, 1.0, 3)
    assert verdicts(one, other, far, margin=margin)["one", "other"].startswith("not distinguishable")


def equivalence_p(one, other, margin):
    return equivalence(paired_difference(one.final, other.final), margin)


def test_a_trial_that_diverged_is_the_worst_of_its_loss(study):
    losses = [replace(x, sensitivity=Sensitivity(5, 0.7, 0.6, -np.inf)) for x in study.losses]
    table = next(t for t in tables_of(replace(study, losses=tuple(losses))) if t.name == "sensitivity")
    assert table.rows[0][1:4] == ("0.7000", "0.6000", "not finite")


def test_values_at_a_kl_are_interpolated_in_the_order_of_the_kl():
    values = np.array([[0.5, 0.5], [0.9, 0.7], [0.7, 0.6]])
    curve = FinalCurve(
        (0, 1, 2), np.array([0.0, 0.4, 0.2]), values, np.zeros(3), ({},) * 3
    )  # the KL falls at the end
    assert curve.at_kl(0.1) == pytest.approx([0.6, 0.55])
    assert curve.at_kl(0.3) == pytest.approx([0.8, 0.65])


def test_a_gain_from_length_alone_is_gone_where_longer_and_shorter_chosen_responses_count_the_same():
    """Three of four prompts with unequal lengths have a longer chosen response, which `long` likes: it wins
    those and loses the others, as far as it has moved.
    """
    longer = np.array([1, 1, 1, -1] * (PROMPTS // 4))
    pairs = HeldOutPairs(PAIRS.names[1::2], PAIRS.prompts[:PROMPTS], (False,) * PROMPTS, tuple(longer))
    none = loss("none", lambda kl: 0 * kl, 1.0, 1)
    likes = loss("long", lambda kl: 0 * kl, 1.0, 2)
    moved = [replace(c, values=c.values + 0.4 * c.kl[:, None] * longer) for c in likes.curves]
    likes = replace(likes, curves=tuple(moved))
    (duel,) = duels_of((none, likes), None, length_weights(pairs))
    assert [point.winner for point in duel.matched] == [1] * 4
    assert [point.length_winner for point in duel.matched] == [0] * 4
    assert duel.matched[-1].difference.mean == pytest.approx(0.4 * (3 - 1) / 4, abs=0.02)
    assert duel.matched[-1].same_length.mean == pytest.approx(0, abs=0.02)
    assert duel.verdict.endswith("but not where longer and shorter chosen responses count the same")
    one_sided = replace(pairs, longer=tuple(np.maximum(longer, 0)))
    assert length_weights(one_sided) is None


def test_the_liking_for_length_is_the_slope_of_margins():
    pairs = HeldOutPairs(("a", "b", "c", "d"), (0, 1, 2, 3), (False, False, False, True), (2, -1, 5, 7))
    assert margin_per_token([3 + 0.5 * 2, 3 - 0.5, 3 + 0.5 * 5, 100.0], pairs) == pytest.approx(0.5)
    assert np.isnan(margin_per_token([1.0, 2.0, 3.0, 4.0], replace(pairs, longer=(2, 2, 2, 2))))


def test_curves_have_the_steps_that_the_runs_of_all_seeds_have():
    """The first seed was evaluated at the ends of the stages too, here after steps 3 and 9."""
    pairs = HeldOutPairs(("a", "b"), (0, 1), (False, False), (1, -1))

    def at(step):
        rows = {ACCURACY: [0.5, step / 100], "rewards/margins": [0.0, 1.0]}
        return PairsEvaluation(step, {"eval_kl": step / 10}, rows)

    first, other = final_curves([[at(step) for step in (3, 6, 9, 12)], [at(6), at(12)]], ACCURACY, pairs)
    assert first.steps == other.steps == (0, 6, 12)
    assert first.kl == pytest.approx([0, 0.6, 1.2])
    assert first.values[1:, 1] == pytest.approx([0.06, 0.12])


@pytest.fixture
def study(tmp_path):
    losses = (loss("dpo", steep, 1.0, 1), loss("ipo_50%", flat, 1.0, 2))
    declared = {
        "digest": "d" * 64,
        "file_sha256": "f" * 64,
        "study": {
            "seeds": [0, 1, 2],
            "trials": 2,
            "margin": 0.02,
            "metric": ACCURACY,
            "lr": {"type": "LogRange", "low": 1e-5, "high": 1e-4},
            "losses": {x.label: {"fn": {"callable": "x"}, "knobs": {"beta": [0.1, 0.5]}} for x in losses},
            "recipe": {
                "weights": "tiny-model",
                "data": {"train": "pairs.jsonl", "batch": 8},
                "loop": {"steps": 20},
            },
        },
        "facts": {"rows": {"0": "r" * 32}},
        "versions": {"python": "3.11"},
    }
    wave = {"wave": "x", "steps": [0, 5], "seed": 0}
    return StudyResult(
        tmp_path,
        declared,
        ACCURACY,
        losses,
        duels_of(losses, 0.02, length_weights(PAIRS)),
        PAIRS,
        (wave,),
        "e" * 64,
    )


def test_the_page_has_declaration_comparisons_every_trial_and_hashes(study):
    page = study_page(study, tables_of(study))
    for text in (
        "d" * 64,
        "f" * 64,
        "e" * 64,
        "r" * 32,
        "not finite",
        "lr=1, beta=0.1",
        "1 to step 5 with seed 0",
        "2 losses train an adapter on tiny-model with the pairs of pairs.jsonl: 20 steps of 8 pairs",
        "1e-05 to 0.0001, evenly by the logarithm",
        "0.1, 0.5",
    ):
        assert text in page
    assert "dpo is better at the end and at every KL that both reach" in page and page.count("<section") == 6
    assert "http" not in page.partition("<body>")[2]
    same_kl = next(table for table in tables_of(study) if table.name == "same_kl")
    better = sum("is better" in " ".join(row) for row in same_kl.rows)
    assert f"a loss is better in {better} of {len(same_kl.rows)} comparisons" in page and better


def test_the_axis_of_kl_is_logarithmic_where_one_loss_moves_much_further(study):
    def scaled(kl):
        one, other = study.losses
        curves = tuple(replace(curve, kl=curve.kl * kl) for curve in other.curves)
        panels = curve_panels(replace(study, losses=(one, replace(other, curves=curves))))
        return [panel.log_x for panel in panels if panel.x == "KL per token to the reference"]

    assert scaled(1.0) == [False, False] and scaled(100.0) == [True, True]


def test_tables_are_the_same_in_csv_and_latex(study):
    for table in tables_of(study):
        rows = list(csv.reader(table.csv().splitlines()))
        assert tuple(rows[0]) == table.head and [tuple(row) for row in rows[1:]] == list(table.rows)
        assert table.latex().count(r"\\") == len(rows) and all(len(row) == len(table.head) for row in rows)
    (losses, *_) = tables_of(study)
    assert losses.rows[0][:1] + losses.rows[0][3:6] == ("dpo", "2", "1", "-1")  # margin, KL, chosen log-prob
    assert r"ipo\_50\%" in PaperTable("x", "", ("",), (("ipo_50%",),)).latex()
    assert r"a\textasciicircum{}2\$" in PaperTable("x", "", ("",), (("a^2$",),)).latex()


def test_a_study_of_one_seed_without_a_winner_says_so(study):
    losses = tuple(
        LossOutcome(x.label, x.winner, x.trials, x.sensitivity, x.curves[:1])
        for x in (loss("a", steep, 1.0, 1), loss("b", steep, 1.0, 2))
    )
    lines = StudyResult(
        study.folder, study.declaration, ACCURACY, losses, duels_of(losses, None), PAIRS, study.log, ""
    ).lines()
    assert "with one seed, these results are about that seed alone" in lines
    assert lines[-1] == f"no loss is better than another with {PROMPTS} prompts and 1 seeds"
