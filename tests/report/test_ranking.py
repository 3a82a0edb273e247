"""Which run is best: seeds are one setting, differences are on the same rows, and chance is called so."""

import json

import numpy as np
from scipy import stats

from jaxft.objectives.intervals import paired_fractions, paired_means, wilson
from jaxft.report import ranking, statistics
from jaxft.report.compare import first_and_last
from jaxft.report.ranking import RankedRun

ACCURACY, LOSS = "eval_rewards/accuracies", "eval_loss"


def run(label, after, rows=None, loss="dpo", seed=0, **args):
    objective = {"callable": f"m:{loss}", "args": args}
    data = {"train": "rows.jsonl", "seed": seed}
    settings = {"weights": "base", "objective": objective, "data": data, "seed": seed, "name": label}
    before = {ACCURACY + "_pairs": 20.0, LOSS: 0.69} if ACCURACY in after else {LOSS: 3.0}
    return RankedRun(label, before, after, settings, rows or {})


def with_wins(label, wins, **settings):
    after = {ACCURACY: float(np.mean(wins)), ACCURACY + "_pairs": float(len(wins)), LOSS: 0.6}
    rows = {f"p:{i}": {"rewards/accuracies": x, "loss": 0.6} for i, x in enumerate(wins)}
    return run(label, after, rows, **settings)


def test_one_pair_of_twenty_does_not_make_a_loss_better():
    """The audit's table: 0.550 against 0.500 on 20 pairs."""
    base, mine = [1.0, 0.0] * 10, [1.0, 0.0] * 9 + [1.0, 1.0]
    lines = ranking.ranking_lines([with_wins("mine", mine, loss="mine"), with_wins("dpo", base)])
    assert lines[0] == "best of 2: mine, by accuracy: 0.550 [0.342, 0.742] of 20 pairs"
    expected = paired_fractions(mine, base).interval.text()
    assert lines[1:] == [
        f"  dpo against it: -0.050 {expected}, sign test p = 1: not distinguishable with 20 pairs"
    ]
    (line,) = ranking.baseline_lines([with_wins("mine", mine, loss="mine"), with_wins("dpo", base)], "dpo")
    assert line.startswith("mine against dpo, accuracy: +0.050 [") and line.endswith("with 20 pairs")
    won = [1.0] * 20
    (_, line) = ranking.ranking_lines([with_wins("all", won, loss="all"), with_wins("dpo", base)])
    assert line.endswith("p = 0.002: different")


def test_losses_are_compared_if_they_are_of_one_function_only():
    one, two = run("a", {LOSS: 0.5}), run("b", {LOSS: 0.4})
    assert ranking.have_same_loss([one, two]) and ranking.best_labels([one, two]) == {"b"}
    other = run("b", {LOSS: 0.4}, loss="ipo")
    assert not ranking.have_same_loss([one, other]) and ranking.criterion([one, other]) is None
    assert not ranking.have_same_loss([one, run("b", {LOSS: 0.4}, beta=0.2)])
    assert "loss over step 0" in ranking.table_of([one, other]).titles
    assert "loss over step 0" not in ranking.table_of([one, two]).titles
    supervised = [run(label, {LOSS: 1.0}, loss="sft") for label in "ab"]
    supervised[1].settings["objective"].update(callable="jaxft.objectives.sft:sft", args={"z_loss": 0.1})
    supervised[0].settings["objective"].update(callable="jaxft.objectives.sft:sft")
    assert ranking.have_same_loss(supervised)  # both are evaluated by their cross-entropy


def test_a_score_ranks_before_the_loss_unless_it_is_the_same_in_all_runs():
    one, two = run("a", {"eval_scores/x": 0.0, LOSS: 0.5}), run("b", {"eval_scores/x": 0.0, LOSS: 0.4})
    assert ranking.criterion([one, two]).title == "held-out loss"
    better = run("b", {"eval_scores/x": 0.1, LOSS: 0.6})
    assert ranking.criterion([one, better]).title == "score x" and ranking.best_labels([one, better]) == {"b"}
    assert ranking.criterion([run("a", {}), run("b", {})]) is None

    def scored(label, right):
        rows = {f"prompt {i}": {"scores/x": float(i < right)} for i in range(20)}
        return run(label, {"eval_scores/x": right / 20, LOSS: 0.5}, rows)

    lines = ranking.ranking_lines([scored("a", 9), scored("b", 8)])
    assert lines[0] == f"best of 2: a, by score x: 0.450 {wilson(0.45, 20).text()} of 20 prompts"
    assert lines[1].endswith("sign test p = 1: not distinguishable with 20 prompts")


def test_rewards_have_intervals_over_the_prompts_in_the_table_and_in_differences():
    """Of rewards that are no fractions Student's, of 0 and 1 Wilson's."""

    def rewarded(label, rewards):
        rows = {f"p:{i}": {"reward": x} for i, x in enumerate(rewards)}
        return run(label, {"eval_reward": float(np.mean(rewards))}, rows)

    one, two = rewarded("a", [0.25, 1.5, 2.0, 0.75]), rewarded("b", [0.0, 1.0, 1.5, 0.75])
    half = stats.t.ppf(0.975, 3) * np.std([0.25, 1.5, 2.0, 0.75], ddof=1) / 2
    interval = f"[{1.125 - half:.2f}, {1.125 + half:.2f}]"
    table = ranking.table_of([one, two])
    assert table.cells()[0][table.titles.index("held-out reward")] == f"1.125 {interval}"
    best, other = ranking.ranking_lines([one, two])
    assert best.startswith("best of 2: a, by held-out reward: 1.125 [") and best.endswith("] of 4 prompts")
    assert other.startswith("  b against it: -0.312 [") and other.endswith("with 4 prompts")
    (cells,) = ranking.table_of([rewarded("c", [1.0] * 9 + [0.0] * 3)]).cells()
    assert cells == [f"0.750 {wilson(0.75, 12).text(2)}"]


def test_the_difference_of_losses_is_that_of_the_same_rows_with_their_weights():
    rng = np.random.default_rng(0)
    first, gain, weight = rng.normal(2, 1, 30), rng.normal(0.1, 0.1, 30), rng.integers(1, 9, 30) / 9

    def rows(losses):
        return {
            f"r:{i}": {"loss": x, "weight": w} for i, (x, w) in enumerate(zip(losses, weight, strict=True))
        }

    one = run("worse", {LOSS: np.average(first, weights=weight)}, rows(first))
    two = run("better", {LOSS: np.average(first - gain, weights=weight)}, rows(first - gain))
    lines = ranking.ranking_lines([one, two])
    expected = paired_means(first - gain, first, weight)
    assert lines[0].startswith("best of 2: better, by held-out loss: ") and lines[0].endswith("of 30 rows")
    assert lines[1] == f"  worse against it: {expected.text('rows')}" and expected.distinguishable
    apart = run("other rows", {LOSS: 3.0}, {f"q:{i}": {"loss": 3.0} for i in range(30)})
    assert ranking.ranking_lines([two, apart]) == [
        "no best run by held-out loss: the runs have different held-out rows"
    ]
    assert ranking.best_labels([two, apart]) == set()


def test_runs_that_hold_out_different_files_have_no_best_one():
    one, two = run("a", {LOSS: 0.5}), run("b", {LOSS: 0.4})
    one.settings["data"].update(held_out="a_held_out.jsonl")
    two.settings["data"].update(held_out="b_held_out.jsonl")
    assert ranking.ranking_lines([one, two])[0].startswith("no best run by held-out loss")
    assert ranking.best_labels([one, two]) == set()
    two.settings["data"].update(held_out="a_held_out.jsonl", train="others.jsonl")
    assert ranking.best_labels([one, two]) == {"b"}
    one.settings["data"].update(held_out=0.1, train="x.jsonl:0.7,y.jsonl:0.3")
    two.settings["data"].update(held_out=0.1, train="./y.jsonl,x.jsonl")
    assert ranking.best_labels([one, two]) == {"b"}  # fractions of the same files


def test_a_run_without_an_evaluation_after_training_is_not_finished_and_not_ranked():
    entries = [{"step": 0, LOSS: 3.0}, {"step": 1, "loss": 2.9}, {"step": 2, "loss": 2.8}]
    before, after = first_and_last(entries)
    assert before == {LOSS: 3.0} and after == {"loss": 2.8}
    stopped = run("stopped", after)
    results = [run("a", {LOSS: 0.5}), stopped, run("b", {LOSS: 0.4})]
    lines = ranking.ranking_lines(results)
    assert lines[0].startswith("best of 2: b") and ranking.best_labels(results) == {"b"}
    assert lines[-1] == "stopped: not finished: no evaluation after training"
    assert ranking.ranking_lines([stopped]) == ["stopped: not finished: no evaluation after training"]
    (cells,) = ranking.table_of([stopped]).cells()
    assert "3.000 → -" in cells or cells == ["2.800"]


def test_runs_that_differ_in_seeds_alone_are_one_setting_with_mean_and_spread():
    values = {"loss=a": [0.5, 0.6, 0.7], "loss=b": [0.9, 0.8, 0.85]}
    results = [
        run(f"{label},seed={seed}", {LOSS: x}, seed=seed, beta=number)
        for number, (label, own) in enumerate(values.items())
        for seed, x in enumerate(own)
    ]
    for result in results:  # one loss function
        result.settings["objective"]["args"] = {}
        result.settings["optim"] = {"lr": 1e-3 if result.label.startswith("loss=a") else 1e-4}
        result.settings["tracking"] = {"tags": [result.label]}  # how runs are filed changes nothing
    groups = ranking.repetitions(results)
    assert {label: len(own) for label, own in groups.items()} == {"loss=a": 3, "loss=b": 3}
    assert "0.600 ± 0.100" in ranking.repetition_table(
        results
    ) and "0.850 ± 0.050" in ranking.repetition_table(results)
    lines = ranking.ranking_lines(results)
    interval = stats.ttest_1samp(values["loss=a"], 0).confidence_interval()
    assert lines[0].startswith(
        f"best of 2: loss=a, by held-out loss: 0.600 [{interval.low:.3f}, {interval.high:.3f}]"
    )
    assert lines[0].endswith("standard deviation 0.100 over 3 seeds")
    interval = paired_means(values["loss=a"], values["loss=b"]).interval
    assert lines[1] == f"  loss=b against it: +0.250 {interval.text()} over 3 seeds: not distinguishable"
    assert ranking.best_labels(results) == {f"loss=a,seed={seed}" for seed in range(3)}
    assert ranking.ranking_lines(results[:3])[0].startswith("held-out loss over 3 seeds (loss=a): 0.600 [")
    assert ranking.repetition_table(results[::3]) == "" and ranking.ranking_lines(results[:1]) == []


def test_settings_of_two_sweeps_with_the_same_labels_but_for_seeds_are_two_settings():
    results = [
        run(f"lr=1,seed={seed}", {LOSS: 0.5 + seed / 100}, seed=seed, loss="dpo" if seed < 2 else "ipo")
        for seed in range(4)
    ]
    groups = ranking.repetitions(results)
    assert [len(group) for group in groups.values()] == [2, 2]
    assert [*groups] == ["lr=1", "lr=1,seed=2, lr=1,seed=3"]


def test_settings_with_several_seeds_are_compared_over_seeds_and_rows():
    """Every seed gains the same pair of 20: no luck in training, but of the choice of the pairs."""
    base, better = [1.0, 0.0] * 10, [1.0, 0.0] * 9 + [1.0, 1.0]
    noise = [[1.0] * 20, [0.0] * 20]

    def settings_of(label, wins, **more):
        return [
            with_wins(f"{label},seed={seed}", own, loss=label, seed=seed, **more)
            for seed, own in enumerate(wins)
        ]

    one, all_won = settings_of("dpo", [base, base]), settings_of("all", [[1.0] * 20] * 2)
    (_, line) = ranking.ranking_lines([*one, *settings_of("mine", [better, better])])
    difference = np.subtract([base] * 2, [better] * 2)
    interval = statistics.paired_difference(np.zeros((2, 20)), difference).interval.text()
    assert f"-0.050 {interval} over 2 seeds and the same 20 pairs: not distinguishable; about " in line
    (_, line) = ranking.ranking_lines([*one, *all_won])
    assert line.startswith("  dpo against it: -0.500") and line.endswith(": different")
    (_, line) = ranking.ranking_lines([*settings_of("noise", noise), *all_won])
    assert "not distinguishable" in line  # of two seeds one is as good


def test_accuracies_are_compared_at_the_kl_that_all_runs_reach():
    def curve(*points):
        return [
            {"step": i, "eval_kl": kl, ACCURACY + "_pairs": 20.0, **({} if kl == 0 else {ACCURACY: accuracy})}
            for i, (kl, accuracy) in enumerate(points)
        ]

    far, near = curve((0.0, 0), (0.01, 0.7), (0.02, 0.9)), curve((0.0, 0), (0.004, 0.6))
    line = ranking.equal_kl_line({"far": far, "near": near})
    assert line == "accuracy at the same KL per token, 0.004, interpolated: far 0.580, near 0.600"
    assert (
        ranking.equal_kl_line({"far": far}) == ranking.equal_kl_line({"far": far, "no": [{"step": 0}]}) == ""
    )


def test_seeds_that_only_one_setting_has_give_no_interval():
    results = [
        run("a,seed=0", {LOSS: 0.5}),
        run("a,seed=1", {LOSS: 0.6}, seed=1),
        run("b,seed=2", {LOSS: 0.7}, seed=2),
    ]
    results[2].settings["optim"] = {"lr": 1.0}
    assert "run both with the same seeds" in ranking.ranking_lines(results)[1]


def test_the_values_of_held_out_rows_are_read_and_damaged_lines_left_out(tmp_path):
    (tmp_path / "held_out.jsonl").write_text(
        json.dumps({"row": "a:1", "loss": 0.5}) + '\n{"row": 3\n[]\n{"x": 1}\n'
    )
    assert (
        ranking.read_held_out(tmp_path) == {"a:1": {"loss": 0.5}}
        and ranking.read_held_out(tmp_path / "none") == {}
    )


def test_many_runs_name_the_nearest_only():
    results = [run(f"lr={i}", {LOSS: 1.0 + i}) for i in range(20)]
    for i, result in enumerate(results):
        result.settings["optim"] = {"lr": i}
    lines = ranking.ranking_lines(results)
    assert lines[1].startswith("  lr=1 against it: +1.000") and "11 more are further behind" in lines[9]
    assert lines[-1].startswith("the best of several is partly best by chance")
