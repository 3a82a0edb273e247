"""A dry run prints a page for people, or with --json one object alone."""

import json

import pytest
from scripts_in_process import call

from jaxft.plan import plan_report
from jaxft.plan.plan import Plan

RECIPE = """
from dataclasses import replace
from tiny_plan import tiny
from jaxft.objectives.losses.preference_losses import dpo
from jaxft.optim.optimizer import Optim
from jaxft.train.recipes import PairLossFunction

def config(lr: float = 1e-3, name: str = "mine", loss: PairLossFunction = dpo):
    return replace(tiny(), name=name, optim=Optim(lr))
"""
MADE_UP = Plan(
    machine="made up", devices=8, program="train step", parts={"weights": 2**30}, total=3 * 2**29,
    limit=2**31, missing=None, host=0, flops=None, collectives={}, memory_traffic=0.0, unknown_loops=0,
    estimate=None, compile_seconds=0.0, from_cache=False, largest_arrays={},
)  # fmt: skip


@pytest.fixture
def printed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(plan_report, "plan", lambda run, machine, pairs: MADE_UP)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(RECIPE)

    def run(*argv):
        code, out, err = call(monkeypatch, capsys, "train", "mine.py", "--dry-run", *argv)
        assert code == 0, err
        return out

    return run


def test_the_page_has_counts_bytes_changes_and_marks_first(printed):
    out = printed("lr=2e-3", "loop.steps=4")
    first, planned, command, *_ = out.splitlines()
    assert first.startswith("mine: ") and "parameters are trained" in first
    assert planned == "planned: 1.50 GiB per device on made up"
    assert command == "command: mine.py lr=2e-3 loop.steps=4"
    assert "Changed from the recipe's defaults\n  optim.lr: 0.001 -> 0.002\n  loop.steps: none -> 4\n" in out
    assert "\noptim\n  *lr=0.002  optimizer=adamw  schedule=cosine  warmup=0.05" in out
    assert "\nloop\n  *steps=4  log_every=1" in out and "quant=none" in out and "quant\n" not in out
    settings = out.partition("Settings (")[2].partition("\n\n")[0]
    assert all(len(line) <= 110 for line in settings.splitlines())
    assert "Changed" not in printed()


def test_changes_list_knobs_that_are_no_field_and_a_section_that_is_left_out_once(printed):
    out = printed("loss=ipo", "lr=2e-3", "adapter=none")
    assert "  loss: dpo -> ipo\n" in out and "  lr: " not in out
    changed = out.partition("Changed from")[2].partition("\n\n")[0]
    assert "adapter: unset -> none" in changed and "adapter." not in changed


def test_json_is_one_object_with_settings_parameters_and_plan(printed):
    found = json.loads(printed("--json", "lr=2e-3"))
    assert found["optim"]["lr"] == found["command"]["knobs"]["lr"] == 2e-3
    assert found["plan"]["total"] == MADE_UP.total and found["plan"]["fits"]
    rows = {row["path"]: row for row in found["parameters"]}
    assert rows["base/embed"]["shape"] == [512, 64] and not rows["base/embed"]["trained"]
    assert rows["adapter/layers/attn/q/a"]["trained"]


def test_json_without_a_dry_run_is_an_error(monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "train", "sft", "--json")
    assert code == 2 and not out and "--dry-run" in err
