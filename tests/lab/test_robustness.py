"""Losses in worlds with a planted fault: costs and over-optimisation are found where they were planted."""

import csv
import json
import math

import numpy as np
import pytest
from scripts_in_process import call

from jaxft.lab.robustness import (
    FaultLevel,
    WorldRun,
    baseline_table,
    cost_table,
    course,
    mean_curves,
    optimisation_panels,
    optimisation_table,
    parse_fault,
    read_world_run,
    robustness_panels,
    write_robustness,
)
from jaxft.lab.worlds import World

SCORES = "eval_scores/true_reward", "eval_scores/proxy_reward"


def world_run(prompts, true=(0.0, 1.0), proxy=(0.0, 1.0), kl=(0.0, 0.1)):
    """A run whose prompts have these true rewards at the end, and whose evaluations have these means."""
    named = {f"prompt {n}": float(x) for n, x in enumerate(prompts)}
    return WorldRun(np.array(kl), np.array(true), np.array(proxy), named)


def levels_of(cost, prompts=30, seeds=2, noise=0.3):
    """Two losses in three worlds. dpo loses `cost` per level, ipo nothing; prompts and seeds have their own
    levels, and every value has some noise.
    """
    rng = np.random.default_rng(0)
    of_prompts, of_seeds = rng.normal(3, 1, prompts), rng.normal(0, 0.1, seeds)
    levels = []
    for n, fraction in enumerate((0.0, 0.2, 0.4)):
        runs = {}
        for label, lost in (("dpo", cost * n), ("ipo", 0.0)):
            drawn = [of_prompts + s - lost + rng.normal(0, noise, prompts) for s in of_seeds]
            runs[label] = [world_run(x, true=(1.0, x.mean()), proxy=(1.0, x.mean())) for x in drawn]
        levels.append(FaultLevel(f"noise={fraction:g}", fraction, World(noise=fraction), runs))
    return levels


def by_first_two(table):
    return {row[:2]: row for row in table.rows}


def test_planted_costs_are_found_and_none_where_none_was_planted():
    levels = levels_of(cost=1.0)
    rows = by_first_two(cost_table(levels))
    assert set(rows) == {(loss, f"noise={x}") for loss in ("dpo", "ipo") for x in ("0", "0.2", "0.4")}
    for world, n in (("noise=0.2", 1), ("noise=0.4", 2)):
        assert float(rows["dpo", world][3].split()[0]) == pytest.approx(-n, abs=0.2)
        assert rows["dpo", world][-1] == "different"
        assert rows["ipo", world][-1] == "not distinguishable"
    assert rows["dpo", "noise=0"][3:] == ("", "", "")
    mean = np.mean([[*run.prompts.values()] for run in levels[2].runs["dpo"]])
    assert float(rows["dpo", "noise=0.4"][2]) == pytest.approx(mean, abs=1e-3)
    duels = by_first_two(baseline_table(levels))
    assert duels["ipo - dpo", "noise=0.4"][-1] == "different"
    assert duels["ipo - dpo", "noise=0"][-1] == "not distinguishable"


def test_only_prompts_that_every_run_has_scored_are_compared():
    whole = world_run([1.0, 2.0, 3.0, 4.0])
    part = WorldRun(whole.kl, whole.true, whole.proxy, {f"prompt {n}": 5.0 for n in range(3)})
    levels = [
        FaultLevel(f"noise={x:g}", x, World(), {"dpo": [run]}) for x, run in ((0.0, whole), (0.1, part))
    ]
    assert by_first_two(cost_table(levels))["dpo", "noise=0.1"][3].startswith("+3.000")


@pytest.mark.parametrize(
    "true, proxy, result",
    [
        ([1.0, 3.0, 1.0], [1.0, 3.0, 5.0], "over-optimised"),
        ([3.0, 2.0, 1.0], [3.0, 4.0, 5.0], "over-optimised"),
        ([1.0, 3.0, 1.0], [1.0, 3.0, 2.0], "falls"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "rises"),
        ([1.0, 1.1, 1.05], [1.0, 3.0, 5.0], "does not change"),
        ([1.0, math.nan, 3.0], [1.0, math.nan, 3.0], "rises"),
        ([1.0, 3.0, 1.0], [1.0, 3.0, 3.01], "falls"),
        ([3.0, 2.0, math.nan], [3.0, 4.0, math.nan], "diverged"),
    ],
)
def test_the_course_of_the_true_reward_is_named(true, proxy, result):
    prompts = np.random.default_rng(1).normal(
        np.nan_to_num(true[-1]), 0.5, 25
    )  # a standard error of about 0.1
    assert course([world_run(prompts, true, proxy, kl=[0.0, 0.1, 0.2])]) == result


def test_runs_of_different_lengths_are_one_line():
    runs = [world_run([1.0, 2.0]), world_run([1.0, 2.0], (0.0, 1.0, 2.0), (0.0, 1.0, 2.0), (0.0, 0.1, 0.2))]
    with pytest.raises(ValueError, match="runs of one loss have 2 and 3 evaluations with different seeds"):
        course(runs)


def test_noise_alone_has_no_course():
    """Evaluations are means over 40 prompts of values without any change; at most 5 % are called one."""
    rng, called = np.random.default_rng(5), 0
    for _ in range(400):
        values = rng.normal(0, 1, (6, 40))
        run = world_run(values[-1], values.mean(1), values.mean(1), kl=np.linspace(0, 1, 6))
        called += course([run]) in ("falls", "over-optimised")
    assert called <= 0.05 * 400 + 2 * math.sqrt(400 * 0.05 * 0.95)


def test_one_seed_that_collapses_is_no_course_of_the_loss():
    prompts = np.random.default_rng(3).normal(3.0, 0.3, 30)
    runs = [world_run(prompts + x - 3, (3.0, x), (3.0, 9.0), kl=(0.0, 1.0)) for x in (3.0, 3.0, -3.0)]
    assert course(runs) == "does not change"


def test_a_diverged_run_is_named_and_leaves_the_other_comparisons_as_they_are():
    levels = levels_of(cost=1.0)
    plain = by_first_two(cost_table(levels[:2]))
    lost = WorldRun(np.array([0.0, math.nan]), np.array([1.0, math.nan]), np.array([1.0, math.nan]), {})
    empty = WorldRun(np.array([0.0, math.nan]), np.array([1.0, 0.7]), np.array([1.0, 0.7]), {"prompt 0": 0.7})
    assert lost.diverged and empty.diverged and not levels[0].runs["dpo"][0].diverged
    kl, _, _ = mean_curves([world_run([1.0], (0.0, 1.0, 2.0), (0.0, 1.0, 2.0), (0.0, 0.1, 0.2)), empty])
    assert kl[0] == 0 and np.isnan(kl[1:]).all() and len(kl) == 3
    levels[2].runs["dpo"][1] = empty
    rows = by_first_two(cost_table(levels))
    assert rows["dpo", "noise=0.4"][3:] == ("", "", "a run diverged")
    assert rows["dpo", "noise=0.2"][3] == plain["dpo", "noise=0.2"][3]
    assert by_first_two(baseline_table(levels))["ipo - dpo", "noise=0.4"][-1] == "a run diverged"
    assert "diverged" in [row[-1] for row in optimisation_table(levels).rows]


@pytest.mark.parametrize(
    "names, first", [(("length_bias=-2", "length_bias=0", "length_bias=2"), 1), (("pairs=20", "pairs=90"), 1)]
)
def test_costs_are_relative_to_the_smallest_fault(names, first):
    levels = [
        FaultLevel(name, float(name.partition("=")[2]), World(), {"dpo": [world_run([1.0 * n, 2.0, 4.0])]})
        for n, name in enumerate(names)
    ]
    empty = [row[1] for row in cost_table(levels).rows if row[3:] == ("", "", "")]
    assert empty == [names[first]]


def test_a_single_prompt_shows_no_change():
    assert course([world_run([1.0], (9.0, 1.0), (0.0, 9.0))]) == "does not change"


def test_over_optimisation_is_in_the_table_and_the_pictures():
    prompts = np.random.default_rng(2).normal(1.0, 0.5, 25)
    runs = [world_run(prompts, (1.0, 3.0, 1.0), (1.0, 4.0, 6.0), kl=[0.0, 0.05, 0.9]) for _ in range(2)]
    level = FaultLevel("length_bias=8", 8.0, World(length_bias=8.0), {"dpo": runs})
    ((loss, world, before, highest, at, end, *proxy, last, verdict),) = optimisation_table([level]).rows
    assert (loss, world, verdict) == ("dpo", "length_bias=8", "over-optimised")
    assert [float(x) for x in (before, highest, at, end, *proxy, last)] == [1, 3, 0.05, 1, 1, 6, 0.9]
    (panel,) = optimisation_panels([level])
    assert panel.curves["dpo"] == ([0.0, 0.05, 0.9], [1.0, 3.0, 1.0])
    assert panel.dashed["dpo"] == ([0.0, 0.05, 0.9], [1.0, 4.0, 6.0])
    assert robustness_panels([level]) == []


def test_curves_over_the_fault_are_means_over_seeds():
    levels = levels_of(cost=1.0, seeds=3)
    true, proxy = robustness_panels(levels)
    for label, (x, y) in true.curves.items():
        assert x == [0.0, 0.2, 0.4]
        ends = [[run.true[-1] for run in level.runs[label]] for level in levels]
        assert y == pytest.approx(np.mean(ends, 1))
        assert len(true.faint[label][0]) == len(true.faint[label][1]) == 3 * (len(levels) + 1)
    assert true.level == 1.0 and proxy.level is None


def test_the_page_and_its_tables_are_written(tmp_path):
    levels = levels_of(cost=1.0)
    paths = write_robustness(levels, {"config": "configs/dpo.py"}, tmp_path / "out")
    assert {path.name for path in paths} == {
        "index.html", "costs.csv", "costs.tex", "losses.csv", "losses.tex", "optimisation.csv",
        "optimisation.tex",
    }  # fmt: skip
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "configs/dpo.py" in page
    assert "in 3 worlds that differ in noise" in page and "not distinguishable" in page
    with (tmp_path / "out" / "costs.csv").open() as file:
        assert list(csv.reader(file))[1][:2] == ["dpo", "noise=0"]


def test_one_world_has_no_costs_and_no_empty_columns(tmp_path):
    level = FaultLevel("", math.nan, World(), {"dpo": [world_run([1.0, 2.0, 3.0])]})
    (page, *_) = write_robustness([level], {}, tmp_path)
    assert "worlds that differ" not in page.read_text() and page.read_text().count("data:image") == 1
    assert cost_table([level]).head == ("", "true reward")
    assert not (tmp_path / "losses.csv").exists()


def write_run(folder, entries, rows):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_is_read_from_its_log(tmp_path):
    entries = [
        {"step": 0, "eval_kl": 0.0, SCORES[0]: 1.0, SCORES[1]: 1.0},
        {"step": 1, "loss": 0.6},
        {"step": 2, "eval_kl": None, SCORES[0]: 2.5, SCORES[1]: 4.0},
    ]
    rows = [{"row": "prompt a", "scores/true_reward": 2.5}, {"row": "rows.jsonl:1", "loss": 0.1}]
    write_run(tmp_path / "run", entries, rows)
    run = read_world_run(tmp_path / "run")
    assert run.true.tolist() == [1.0, 2.5] and run.proxy.tolist() == [1.0, 4.0]
    assert run.kl[0] == 0 and math.isnan(run.kl[1]) and run.prompts == {"prompt a": 2.5}


def test_a_run_without_scores_is_one_line(tmp_path):
    write_run(tmp_path / "run", [{"step": 0, "eval_loss": 0.7}], [])
    with pytest.raises(ValueError, match="has no eval_scores/true_reward; train it with") as error:
        read_world_run(tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed=1,2", "'seed' cannot vary; use one of pairs, temperature, noise"),
        ("noise=0.1", "expected two or more different numbers"),
        ("noise=0.1,0.1", "expected two or more different numbers"),
        ("noise=a,b", "expected two or more different numbers"),
        ("noise=0,nan", "expected two or more different numbers"),
        ("noise", "expected two or more different numbers"),
    ],
)
def test_a_fault_that_cannot_vary_is_one_line(text, message):
    with pytest.raises(ValueError, match=message):
        parse_fault(text)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--vary", "noise=0,0.2"], "--vary noise=0,0.2 varies a setting of a world; add --world"),
        (["--world", "held_out=1"], "rewards are compared on at least 2 held-out prompts"),
        (["--world", "noise=0.1", "--vary", "noise=0,0.2"], "noise is given twice"),
        (["--world", "--vary", "noise=0,0.7"], "noise=0.7; expected from 0 to 0.5"),
        (["--world", "--vary", "pairs=20,30.5"], "pairs=30.5: expected int"),
        (["--world", "gap=9.5", "--vary", "pairs=20,30"], "world.gap=9.5: in 10000 sampled pairs"),
        (["--world", "--vary", "pairs=20,1000000000"], "pairs=1000000000"),
        (["--world", "pairs=20", "--vary", "noise=0,0.001"], "two worlds have the same rows"),
    ],
)
def test_worlds_that_cannot_be_made_are_one_line_before_any_training(monkeypatch, capsys, args, message):
    code, _, error = call(monkeypatch, capsys, "loss_bench", "--loss", "dpo", "--against", "ipo", *args)
    assert code == 1 and message in error and error.count("\n") == 1
