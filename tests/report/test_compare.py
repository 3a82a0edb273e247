"""Runs side by side: the table's numbers, which columns and curves it has, and that a picture is one."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
from run_folders import write_run

from jaxft.report.charts import Panel, comparison_panels, draw
from jaxft.report.compare import Table, write

NAMES = ("eval_loss", "eval_rewards/accuracies", "eval_logps/chosen", "eval_logps/rejected", "eval_kl")
BEFORE = dict(zip(NAMES, (0.69, 0.4, -50.0, -48.0, 0.0), strict=True))
AFTER = dict(zip(NAMES, (0.5, 0.9, -47.0, -60.0, 0.2), strict=True))
SUPERVISED = {"eval_loss": 3.0, "eval_mean_token_accuracy": 0.5, "general_loss": 3.5}


def test_log_probs_are_reported_as_gains_since_step_0():
    table = Table.of(("a", "b"), (BEFORE, BEFORE), (AFTER, BEFORE))
    assert table.titles == ("held-out loss", "accuracy", "margin, nats", "chosen, nats", "KL per token")
    assert table.as_json()["a"] == {
        "held-out loss": 0.5, "accuracy": 0.9, "margin, nats": 15.0, "chosen, nats": 3.0, "KL per token": 0.2,
        "held-out loss before": 0.69, "accuracy before": 0.4,
    }  # fmt: skip
    assert table.as_json()["b"]["margin, nats"] == 0.0


def test_scores_of_held_out_completions_have_a_column_and_a_panel():
    before, after = {"eval_scores/mine": 0.0, "eval_loss": 2.0}, {"eval_scores/mine": 0.9, "eval_loss": 1.0}
    assert Table.of(("a",), (before,), (after,)).as_json()["a"] == {
        "score": 0.9, "held-out loss": 1.0, "score before": 0.0, "held-out loss before": 2.0,
    }  # fmt: skip
    entries = [{"step": 0, **before}, {"step": 1, "loss": 1.5}, {"step": 4, **after}]
    first = comparison_panels({"a": entries, "b": [{"step": 0, "eval_loss": 2.0}]})[0]
    assert first.title == "Score of held-out completions: mine, held out"
    assert first.curves == {"a": ([0, 4], [0.0, 0.9])}


def test_a_column_is_there_if_one_run_has_its_number_and_the_others_show_a_dash():
    table = Table.of(("a", "sft"), (BEFORE, SUPERVISED), (AFTER, SUPERVISED))
    assert "general loss" in table.titles and "token accuracy" not in table.titles
    (line,) = [line for line in table.text().splitlines() if line.startswith(" sft")]
    assert line.split() == [*["sft", "3.000", "→", "3.000", "-", "-", "-", "-", "3.500", "→", "3.500"]]
    assert "| sft | 3.000 → 3.000 | - | - | - | - | 3.500 → 3.500 |" in table.markdown()
    assert Table.of(("a",), (SUPERVISED,), (SUPERVISED,)).titles == (
        "held-out loss",
        "token accuracy",
        "general loss",
    )
    assert Table.of(("a", "b"), ({}, {}), ({}, {})).rows == ((), ())


def test_an_accuracy_has_its_value_before_its_interval_and_its_number_of_pairs():
    pairs = {"eval_rewards/accuracies_pairs": 20.0}
    ties, after = {"eval_loss": 0.69, **pairs}, {**AFTER, "eval_rewards/accuracies": 0.55, **pairs}
    table = Table.of(("a", "b"), (ties, {**BEFORE, **pairs}), (after, after))
    cells = [dict(zip(table.titles, row, strict=True)) for row in table.cells()]
    assert [row["accuracy"] for row in cells] == ["ties → 0.550 [0.34, 0.74]", "0.400 → 0.550 [0.34, 0.74]"]
    diverged = Table.of(("x",), (after,), ({**after, "eval_rewards/accuracies": math.nan},))
    assert "0.550 → nan [nan, nan]" in diverged.markdown() and "nan" in diverged.text()
    assert cells[0]["pairs"] == "20" and cells[0]["held-out loss"] == "0.690 → 0.500"
    assert table.as_json()["a"]["accuracy before"] is None and "95 % interval" in table.text()


def lines(*steps):
    return [{"step": step, "loss": 1 / step} for step in steps]


def test_curves_prefer_held_out_rows_and_skip_non_finite_values():
    held = [
        {"step": 0, **BEFORE},
        {"step": 1, "loss": 0.6},
        {"step": 2, **AFTER},
        {"step": 2, "eval_loss": None},
    ]
    found = {panel.title: panel for panel in comparison_panels({"a": held})}
    loss = found["Loss, held out"]
    assert loss.curves["a"] == ([0, 2], [0.69, 0.5]) and loss.dashed["a"] == ([1], [0.6])
    other = [{"step": 0, "eval_loss": 20.0}, {"step": 2, "loss": 30.0, "eval_loss": 10.0}]
    ratio = comparison_panels({"a": held, "b": other})[0]
    assert ratio.title == "Loss over its value at the start, held out"
    assert ratio.curves["b"] == ([0, 2], [1.0, 0.5]) and ratio.dashed["b"] == ([2], [1.5])
    chosen = found["Log-probability of the responses, chosen, held out"]
    assert chosen.curves["a"] == ([0, 2], [-50.0, -47.0]) and not chosen.dashed
    assert [panel.title for panel in comparison_panels({"a": lines(1, 2)})] == ["Loss"]


def test_a_folder_gets_a_table_and_a_picture(tmp_path):
    table = Table.of(("a", "b"), (BEFORE, BEFORE), (AFTER, AFTER))
    write(tmp_path, "sweep", table, {"a": [{"step": 0, **BEFORE}, {"step": 3, **AFTER}], "b": lines(1, 2, 3)})
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "README.md").read_text()
    assert table.markdown() in text and "[a](<a/README.md>)" in text


def test_a_picture_without_curves_is_an_error():
    with pytest.raises(ValueError, match="no curve to draw"):
        draw("x.png", [Panel("a", "x", "y", {"a": ([], [])})], "none")


ENTRIES = [
    {"step": 0, "eval_reward": 0.1, "eval_objective/kl": 0.0, "eval_completions/mean_length": 7.0},
    {
        "step": 1,
        "reward": 0.2,
        "objective/kl": 0.0,
        "completions/mean_length": 6.0,
        "entropy": 2.0,
        "perf": {},
    },
    {
        "step": 2,
        "reward": 0.4,
        "objective/kl": 0.5,
        "completions/mean_length": 3.0,
        "entropy": 1.0,
        "perf": {},
    },
    {"step": 2, "eval_reward": 0.6, "eval_objective/kl": 0.9, "eval_completions/mean_length": 2.0},
]


def test_rollouts_have_curves_of_reward_kl_length_and_entropy():
    found = {panel.title: panel for panel in comparison_panels({"a": ENTRIES})}
    reward, entropy = found["Reward, held out"], found["Entropy of the next token"]
    assert list(found) == [
        "Reward, held out", "KL to the reference, held out", "Length of completions, held out",
        "Entropy of the next token",
    ]  # fmt: skip
    assert reward.curves["a"] == ([0, 2], [0.1, 0.6]) and reward.dashed["a"] == ([1, 2], [0.2, 0.4])
    assert entropy.curves["a"] == ([1, 2], [2.0, 1.0]) and not entropy.dashed


@pytest.fixture
def compared(tmp_path, monkeypatch, capsys):
    """(exit code, stdout, stderr) of scripts/compare.py in a folder with the runs a and b."""
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in ENTRIES)
        )
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        from jaxft.runs import terminal

        script = Path(__file__).parents[2] / "scripts" / "compare.py"
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        monkeypatch.setattr(sys, "path", [*sys.path])
        code = terminal.one_line_errors(runpy.run_path(str(script), run_name="compare")["main"])
        return code, *capsys.readouterr()

    return run


def test_runs_are_compared_by_a_command(compared):
    code, out, _ = compared("runs/a", "runs/b", "--out", "both", "--title", "two")
    assert (
        code == 0
        and out.splitlines()[0].split("  ")[-1].strip()
        and "held-out reward" in out
        and "0.600" in out
    )
    reported = json.loads(Path("both.json").read_text())
    assert (
        reported["runs"]["a"]["reward gained"] == pytest.approx(0.5)
        and reported["runs"]["b"]["KL per completion"] == 0.9
    )
    assert reported["curves"]["a"] == [{k: v for k, v in line.items() if k != "perf"} for line in ENTRIES]
    assert Path("both.png").read_bytes()[:4] == b"\x89PNG"


def test_a_sweep_is_its_members_and_other_files_are_skipped(compared):
    members = Path("runs/seeds")
    for name in ("seed=0", "seed=1"):
        write_run(members / name, "dpo")
    (members / "config.json").write_text(json.dumps({"members": ["seed=0", "seed=1"]}))
    (members / "README.md").write_text("# seeds")
    (members / "checkpoints").mkdir()
    (members / "metrics.jsonl").write_text('{"step": 1, "loss 1": 2.0}\n')  # of the sweep itself
    code, out, err = compared("runs/seeds")
    assert code == 0 and "seed=0" in out and "seed=1" in out and "held-out loss" in out and not err
    code, by_pattern, err = compared(*map(str, sorted(members.iterdir())))
    assert code == 0 and by_pattern == out
    assert err.startswith("skipped, not runs: runs/seeds/README.md, runs/seeds/checkpoints")
    assert compared("runs/a", "runs/seeds")[1].count("seed=") >= 2


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (("runs/none",), "runs/none: has no metrics.jsonl"),
        (("runs/a", "runs/none"), "runs/none: has no metrics.jsonl"),
        (("runs/a", "runs/a"), "both are called a"),
    ],
)
def test_a_folder_without_metrics_is_a_one_line_error(compared, arguments, reported):
    code, _, err = compared(*arguments)
    assert code == 1 and reported in err and err.count("\n") == 1


def test_a_reward_gain_is_reported_in_standard_deviations_at_step_0():
    names = ("eval_reward", "eval_reward_std", "eval_rewards/judge/mean", "eval_rewards/judge/std")
    before, after = (dict(zip(names, x, strict=True)) for x in ((-1.0, 0.5, -0.2, 0.4), (0.5, 0.3, 0.5, 0.3)))
    table = Table.of(["a"], [before], [after])
    found = dict(zip(table.titles, table.rows[0], strict=True))
    assert found["in deviations"] == pytest.approx(3) and found["scores alone"] == pytest.approx(0.7 / 0.4)
    alike = [{**side, "eval_rewards/judge/mean": side["eval_reward"]} for side in (before, after)]
    assert (
        "scores alone" not in Table.of(["a"], [alike[0]], [alike[1]]).titles
    )  # nothing was taken from the scores
    assert "in deviations" not in Table.of(["a"], [{**before, "eval_reward_std": 0.0}], [after]).titles
