"""Steps, hours and money of a planned run, and the table of what fits where."""

import json
import sys
from types import SimpleNamespace

import pytest
from scripts_in_process import load
from tiny_tokenizers import tiny

from jaxft.data.pairs import PairRows
from jaxft.data.prompts import Prompts
from jaxft.data.sft import Rows
from jaxft.plan import machines
from jaxft.plan import plan as plan_module
from jaxft.plan.plan_report import Cost, RunSteps, steps_of, unknown_lines

TEXT = "x" * 60  # with the column's other text 64 characters, or 16 tokens


def run(data, steps=None):
    """What steps_of reads of a Run."""
    return SimpleNamespace(data=data, loop=SimpleNamespace(steps=steps))


def unavailable():
    """A tokenizer that is on the hub."""
    raise OSError("no network")


@pytest.fixture
def rows(tmp_path):
    """100 rows of text, pairs and prompts."""
    file = tmp_path / "rows.jsonl"
    row = {"prompt": TEXT, "chosen": "good", "rejected": "", "completion": ""}
    file.write_text(json.dumps(row) + "\n" + (json.dumps(row) + "\n") * 99)
    return str(file)


def test_steps_of_the_loop_come_first(rows):
    assert steps_of(run(Rows(rows), steps=7), unavailable) == RunSteps(7, "loop.steps")


def test_pairs_and_prompts_are_counted_without_a_tokenizer(rows):
    # 100 rows, 20 held out: 80 x 3 epochs / 8
    pairs = steps_of(run(PairRows(rows, held_out=0.2, epochs=3.0, batch=8)), unavailable)
    assert pairs.count == 30 and "80 pairs" in pairs.source
    # 80 prompts / 16 of a rollout, each 2 passes of 4 steps
    prompts = Prompts(rows, held_out=0.2, epochs=1.0, batch=16, passes=2, minibatches=4)
    of_prompts = steps_of(run(prompts), unavailable)
    assert of_prompts.count == 5 * 8
    assert "sampled in addition" in Cost(of_prompts, 4.0, 8).lines()[1]
    assert len(Cost(pairs, 4.0, 8).lines()) == 1


def test_tokens_of_packed_rows_are_estimated_from_characters(rows):
    # 100 rows x 64 characters / 4 = 1600 tokens; a step has 2 x 100
    found = steps_of(run(Rows(rows, held_out=None, batch=2, max_length=100)), unavailable)
    assert found.count == 8 and "4 characters per token" in found.source
    assert steps_of(run(Rows(rows, held_out=None, batch=2, packing=False)), unavailable).count == 50


def test_steps_are_of_the_rows_that_a_run_reads(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"{number:07d} {TEXT}"}) for number in range(200)]
    file.write_text("\n".join([*lines[:100], "{", *lines[100:]]) + "\n")  # one of 201 rows is invalid
    options = {"held_out": None, "batch": 2, "packing": False}
    for tokenizer in (unavailable, lambda: tiny("none")):
        found = steps_of(run(Rows(str(file), **options)), tokenizer)
        assert found.count == 100 and found.source.startswith("1 epoch of 200 rows")
        found = steps_of(run(Rows(str(file), epochs=2.0, max_samples=20, **options)), tokenizer)
        assert found.count == 20 and found.source.startswith("2 epochs of 20 rows")
        with pytest.raises(ValueError, match="rows.jsonl:101: malformed JSON"):
            steps_of(run(Rows(str(file), invalid="error", **options)), tokenizer)
    file.write_text("\n".join([lines[0]] * 100 + lines[1:]) + "\n")
    drop = Rows(str(file), drop=("duplicates",), **options)
    assert steps_of(run(drop), lambda: tiny("none")).count == 100
    assert "including rows that data.drop=duplicates removes" in steps_of(run(drop), unavailable).source


def test_money_is_hours_times_devices_times_price():
    cost = Cost(RunSteps(1800, "3 epochs of 10 rows"), seconds=4.0, devices=8, price=2.5)
    assert cost.hours == 2.0 and cost.money == 40.0
    assert cost.lines()[1] == "cost: 40.00 (2 h 00 min x 8 devices x 2.5 an hour)"
    assert Cost(RunSteps(1, ""), 1.0, 1).money is None and len(Cost(RunSteps(1, ""), 1.0, 1).lines()) == 1


def test_a_plan_with_a_price_has_the_cost_of_its_train_step(rows):
    plan = load("plan")
    step = SimpleNamespace(estimate=SimpleNamespace(step=3.6), devices=2)
    planned = SimpleNamespace(data=Rows(rows), loop=SimpleNamespace(steps=500), weights="org/name")
    assert plan.run_cost(planned, step, 4.0).json() == {
        "steps": 500, "steps_from": "loop.steps", "hours": 0.5, "cost": 4.0
    }  # fmt: skip
    unknown = SimpleNamespace(estimate=None, devices=2, machine="l4:1", fits=False)
    assert plan.run_cost(planned, unknown, 4.0) is None
    assert unknown_lines(unknown) == ["time and cost: unknown, because the train step does not fit"]


@pytest.mark.parametrize("argv", [["--price", "-1"], ["--search", "--hours"]])
def test_options_of_cost_that_cannot_be_used_are_errors(monkeypatch, capsys, argv):
    monkeypatch.setattr(sys, "argv", ["plan", "sft", "--devices", "h100:1", *argv])
    with pytest.raises(SystemExit):
        load("plan").main()
    assert argv[0] in capsys.readouterr().err or "--hours" in argv


def test_a_price_needs_a_machine(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", "--price", "2"])
    with pytest.raises(SystemExit):
        load("plan").main()
    assert "required: --devices, such as h100:1" in capsys.readouterr().err


def test_plan_alone_prints_what_fits_without_jax_or_an_extra(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan"])
    assert load("plan").main() == 0
    out = capsys.readouterr().out
    assert "Llama-3.1-8B" in out and "RTX 4090 24 GB" in out and max(map(len, out.splitlines())) <= 120
    assert len(machines.stored_cells()) == 307


def test_a_machine_that_cannot_be_planned_is_an_error_before_anything_is_compiled(monkeypatch, capsys):
    def machine(name):
        if name == "h100:1":
            raise ValueError("compiling for h100 needs jax's CUDA plugin")
        return SimpleNamespace(name=name, devices=[0])

    monkeypatch.setattr(machines, "machine", machine)
    monkeypatch.setattr(plan_module, "plans", lambda *args: pytest.fail("compiled"))
    monkeypatch.setattr(sys, "argv", ["plan", "sft", "--devices", "v5e:1x1", "h100:1", "--price", "2"])
    with pytest.raises(ValueError, match="CUDA plugin"):
        load("plan").main()


def test_plan_of_a_recipe_needs_devices(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", "sft"])
    with pytest.raises(SystemExit):
        load("plan").main()
    assert "--devices, such as h100:1 or 24gb" in capsys.readouterr().err
