"""Runs of reward models with LoRA, QLoRA and full fine-tuning: metrics, card, export, sweep, errors."""

import json
import re
import shutil

import numpy as np
import pytest
import reward_place
from dpo_place import pairs
from prepared import prepare
from safetensors.numpy import load_file
from tiny_run import COUNT_COMPILES, ROOT, Place, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    reward_place.write_place(folder)
    return Place(folder)


def run(place, *argv, code=0, **options):
    assert place.run(*argv, JAXFT_CACHE=str(place.folder / "cache"), **options) == code, place.err()
    return place.out()


@pytest.mark.slow
@pytest.mark.parametrize("argv", [["quant=nf4"], ["full=true", "lr=0.001"]], ids=["qlora", "full"])
def test_nothing_compiles_after_the_loop_begins(place, argv):
    out = run(place, *argv, "steps=2", f"name=compiles-{argv[0].partition('=')[0]}", hook=COUNT_COMPILES)
    assert "compiled before the loop: True" in out and "compiled since: []" in out


def test_a_reward_model_learns_reports_its_accuracy_and_writes_a_card_that_loads_it(place):
    out = run(place, "name=learns", "micro=2", "steps=12", "loop.eval_every=6", hook=COUNT_COMPILES)
    assert "compiled before the loop: True" in out and "compiled since: []" in out
    last = json.loads((place.runs("learns") / "summary.json").read_text())["after"]["metrics"]
    expected = {
        f"eval_{name}" for name in ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward")
    }
    assert expected <= last.keys() and last["eval_accuracy"] == 1 and last["eval_margin"] > 0.5
    assert (
        "held-out accuracy: " in out
        and "always preferring the" in out
        and "scripts/score.py" in out
        and "--prompt" not in out
    )
    card = (place.runs("learns") / "README.md").read_text()
    assert (
        "A reward model: a LoRA adapter (rank 4, alpha 32) with a scalar head, fine-tuned from `base`" in card
    )
    loads = "AutoPeftModelForSequenceClassification.from_pretrained(FOLDER, num_labels=1, pad_token_id="
    assert loads in card and "generate.py" not in card
    tensors = load_file(place.runs("learns") / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.score.weight"].shape == (1, 64)
    run(place, "name=after", "start=runs/learns", "steps=1", "lr=0.0")
    again = load_file(place.runs("after") / "adapter" / "adapter_model.safetensors")
    assert all(np.array_equal(again[name], x) for name, x in tensors.items())


@pytest.mark.slow
def test_a_run_its_adapter_and_its_merged_model_have_the_same_scores(place):
    run(place, "name=scored", "steps=6")
    shutil.rmtree(place.folder / "merged", ignore_errors=True)
    found = {}
    valid = (place.folder / "pairs.jsonl").read_text().splitlines()
    (place.folder / "dirty.jsonl").write_text("\n".join([*valid[:3], '{"prompt": "a"}', *valid[3:]]))
    argv = ["--file", "dirty.jsonl", "--invalid", "drop", "--json", "--dtype", "float32"]
    for way, model in {
        "run": ["--run", "runs/scored"],
        "parts": ["--model", "base", "--adapter", "runs/scored/adapter"],
    }.items():
        script(place, "score.py", *model, *argv)
        found[way] = [json.loads(line) for line in place.out().splitlines() if line.startswith("{")]
    assert "the chosen completion has the higher reward in" in place.err()
    assert "1 invalid rows left out (data.invalid):" in place.err()
    assert [row["row"] for row in found["run"]][2:4] == ["dirty.jsonl:3", "dirty.jsonl:5"]
    single = [
        {"prompt": pair["prompt"], "completion": pair[kind], "label": kind == "chosen"}
        for pair, kind in zip(map(json.loads, valid[:4]), ("chosen", "rejected") * 2, strict=True)
    ]
    write_rows(place.folder / "single.jsonl", single)
    script(
        place, "score.py", "--run", "runs/scored", "--file", "single.jsonl", "--json", "--dtype", "float32"
    )
    alone = [json.loads(line) for line in place.out().splitlines() if line.startswith("{")]
    assert "pairs" not in place.err()
    for one, pair, kind in zip(alone, found["run"], ("chosen", "rejected") * 2, strict=False):
        other = "rejected" if kind == "chosen" else "chosen"
        assert one[other] is None and one[kind] == pytest.approx(pair[kind], rel=1e-4, abs=1e-4)
    script(place, "export.py", "--run", "runs/scored", "--out", "merged", "--dtype", "float32")
    script(place, "score.py", "--model", "merged", *argv)
    found["merged"] = [json.loads(line) for line in place.out().splitlines() if line.startswith("{")]
    assert len(found["run"]) == 24 and found["run"] == found["parts"]
    for one, other in zip(found["run"], found["merged"], strict=True):
        assert one.pop("row") == other.pop("row") and one == pytest.approx(other, rel=1e-4, abs=1e-4)
    script(place, "export.py", "--run", "runs/scored", "--out", "packed", "--pack", "nf4")
    packed = json.loads((place.folder / "packed" / "config.json").read_text())
    assert packed["architectures"] == ["LlamaForSequenceClassification"] and packed["quantization_config"]
    script(place, "generate.py", "--run", "runs/scored", "--prompt", "one?", code=1)
    assert "a reward model's adapter, which generates no text" in place.err() and place.err().count("\n") == 1


def script(place, name, *argv, code=0):
    """Run a script that takes no config."""
    process = place.start(hook=f"import sys\nsys.argv = {[str(ROOT / 'scripts' / name), *argv]!r}\n")
    process.join()
    assert process.exitcode == code, place.err()


def changed_row(place, name, **change):
    """Write six pairs, the last one changed; return the override that trains on them."""
    write_rows(place.folder / name, [*pairs()[:5], {**pairs()[5], **change}])
    return f"data={name}"


@pytest.mark.parametrize(
    "change, argv, message",
    [
        ({"rejected": ""}, [], "broken.jsonl:6: column 'rejected' is empty; fill it or remove the row"),
        ({"chosen": "   "}, [], "is empty"),
        (
            {},
            ["margin=ahead"],
            "which data.extras names; add it, or name one that the row has: prompt, chosen, rejected",
        ),
        ({"ahead": "much"}, ["margin=ahead"], "no number in column 'ahead'"),
        (
            {},
            ["samples=2"],
            "this run's model has a scalar head and generates no text: set samples=0, general=none and "
            "scoring.by= to nothing, got samples=2, general=None, 0 in scoring.by",
        ),
        ({}, ["center=-0.5"], "center=-0.5: expected a finite number of at least 0"),
    ],
)
def test_invalid_rows_and_settings_are_named(place, change, argv, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(place.folder, changed_row(place, "broken.jsonl", **change), *argv)


def test_a_margin_that_is_not_a_number_is_named(place):
    with pytest.raises(ValueError, match=r"column 'grade' \(data.extras\) is 'good'; use a finite number"):
        prepare(place.folder, "margin=grade")


@pytest.mark.slow
def test_reward_models_of_a_sweep_equal_those_of_separate_runs(place):
    """With SGD: where a gradient is nearly 0, Adam turns its rounding into a whole step."""
    sgd = "optim.optimizer=optax:sgd"
    process = place.start("--over", "lr=1.0,0.3", "--name", "swept", sgd, script="sweep.py")
    process.join()
    assert process.exitcode == 0, place.err()
    run(place, "lr=0.3", "name=alone", sgd)
    one, other = (
        load_file(place.runs(name) / "adapter" / "adapter_model.safetensors")
        for name in ("swept/lr=0.3", "alone")
    )
    assert max(abs(x).max() for name, x in one.items() if "lora_B" in name) > 0.01  # they begin at 0
    assert one.keys() == other.keys()
    for name, x in one.items():
        np.testing.assert_allclose(x, other[name], rtol=1e-4, atol=1e-5, err_msg=name)
