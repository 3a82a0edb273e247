"""Whole runs of reward models: gone on with is uninterrupted, LoRA, packed and in full, what comes out of them, mistakes."""

import json
import shutil

import numpy as np
import pytest
import reward_place
from dpo_place import pairs
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


@pytest.mark.parametrize(
    "argv", [["micro=2"], ["quant=nf4"], ["full=true", "lr=0.001"]], ids=["lora", "qlora", "full"]
)
def test_nothing_is_compiled_once_the_loop_has_begun(place, argv):
    out = run(place, *argv, "steps=2", f"name=compiles-{argv[0].partition('=')[0]}", hook=COUNT_COMPILES)
    assert "compiled before the loop: True" in out and "compiled since: []" in out


def test_a_run_learns_says_what_it_learned_and_its_card_fits(place):
    out = run(place, "name=learns", "steps=12", "loop.eval_every=6")
    last = json.loads((place.runs("learns") / "summary.json").read_text())["after"]["metrics"]
    wanted = {
        f"eval_{name}" for name in ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward")
    }
    assert wanted <= last.keys() and last["eval_accuracy"] == 1 and last["eval_margin"] > 0.5
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


def test_scores_and_a_merged_model_of_a_run(place):
    run(place, "name=scored", "steps=6")
    shutil.rmtree(place.folder / "merged", ignore_errors=True)
    found = {}
    argv = ["--file", "pairs.jsonl", "--json", "--dtype", "float32"]
    for way, model in {
        "run": ["--run", "runs/scored"],
        "parts": ["--model", "base", "--adapter", "runs/scored/adapter"],
    }.items():
        script(place, "score.py", *model, *argv)
        found[way] = [json.loads(line) for line in place.out().splitlines() if line.startswith("{")]
    assert "the chosen completion has the higher reward in" in place.err()
    script(place, "export.py", "--run", "runs/scored", "--out", "merged", "--dtype", "float32")
    script(place, "score.py", "--model", "merged", *argv)
    found["merged"] = [json.loads(line) for line in place.out().splitlines() if line.startswith("{")]
    assert len(found["run"]) == 24 and found["run"] == found["parts"]
    for one, other in zip(found["run"], found["merged"], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)
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


def broken(place, name, **change):
    write_rows(place.folder / name, [*pairs()[:5], {**pairs()[5], **change}])
    return f"data={name}"


@pytest.mark.parametrize(
    "change, argv, words",
    [
        ({"rejected": ""}, [], "broken.jsonl:6: column 'rejected' is empty; fill it or remove the row"),
        ({"chosen": "   "}, [], "is empty"),
        (
            {},
            ["margin=ahead"],
            "no number in column 'ahead', which data.extras names; the row has prompt, chosen, rejected",
        ),
        ({"ahead": "much"}, ["margin=ahead"], "no number in column 'ahead'"),
        (
            {},
            ["samples=2"],
            "this run's model has a scalar head and generates no text: set samples=0 and general=none, got samples=2",
        ),
        ({}, ["center=-0.5"], "center=-0.5: expected a finite number of at least 0"),
    ],
)
def test_a_mistake_is_one_clear_line(place, change, argv, words):
    run(place, broken(place, "broken.jsonl", **change), *argv, "name=wrong", code=1)
    assert place.err().startswith("error: ") and words in place.err() and place.err().count("\n") == 1, (
        place.err()
    )


def test_a_margin_that_is_no_number_is_one_clear_line(place):
    run(place, "margin=grade", "name=wrong", code=1)
    assert (
        "column 'grade' (data.extras) is 'good'; use a finite number" in place.err()
        and place.err().count("\n") == 1
    )


def test_reward_models_of_a_sweep_are_those_of_runs_alone(place):
    process = place.start("--over", "lr=0.01,0.003", "--name", "swept", script="sweep.py")
    process.join()
    assert process.exitcode == 0, place.err()
    run(place, "lr=0.003", "name=alone")
    one, other = (
        load_file(place.runs(name) / "adapter" / "adapter_model.safetensors")
        for name in ("swept/lr=0.003", "alone")
    )
    assert one.keys() == other.keys()
    for name, x in one.items():
        np.testing.assert_allclose(x, other[name], rtol=1e-4, atol=1e-5, err_msg=name)
