"""Rows of public datasets as they are: each trains two steps with its recipe, or one line says why not."""

import json

import numpy as np
import pytest
from prepared import working_directory
from public_rows import PUBLIC, public_rows
from scripts_in_process import call
from tiny_llama import tiny_torch, write_folder

import jaxft

QWEN = {"chat_template": "qwen"}  # a template that shows tools
RANKING = {"data.responses": 4, "loss": "plackett_luce"}
RECIPES = {  # the recipe of a dataset, and what it needs besides
    **dict.fromkeys(("lf_glaive_demo", "glaive_v2", "openai_tools"), ("sft", QWEN)),
    **dict.fromkeys(
        ("hh_rlhf", "ultrafeedback_binarized", "helpsteer3", "orca_dpo", "pku_saferlhf", "shp", "lf_dpo_demo",
         "openai_dpo", "nemo_rankings"),
        ("dpo", {}),
    ),
    "nectar": ("dpo", RANKING),
    "ultrafeedback": ("reward", {"data.responses": 4, "margin": "score"}),
    "lf_kto_demo": ("kto", {}),
    "math_shepherd": ("process_reward", {}),
    **dict.fromkeys(
        ("imdb", "sst2", "mnli", "boolq", "arc", "mmlu", "mmlu_pro", "hellaswag", "winogrande", "race"),
        ("decision", {}),
    ),
    "openai_rft": ("grpo", {"data.columns": ("answer=reference_answer",), "max_new": 4, "group": 2}),
}  # fmt: skip
REFUSED = {
    ("helpsteer", "dpo"): "the row rates a single response; for preferences join the rows of each prompt",
    ("openai_rft", "sft"): "the loss mask is empty because there is no assistant turn",
    ("glaive_v2", "sft"): "the chat template .* it does not show the name of tool call 1",
    ("math_shepherd", "dpo"): "the row has the steps of one response, with labels; train a process",
    ("nectar", "sft"): "belong to preference pairs; train on pairs with the recipe dpo",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("public")
    write_folder(folder / "base", tiny_torch(max_position_embeddings=2048))
    return folder


def train(place, name, recipe, options):
    settings = {"model": "base", "general": None, "batch": 2, "loop.steps": 2, "held_out": "none"}
    dotted = {key: value for key, value in {**settings, **options}.items() if "." in key}
    knobs = {key: value for key, value in {**settings, **options}.items() if "." not in key}
    with working_directory(place):
        knobs = {"name": f"{name}-{recipe}", **knobs}
        return jaxft.train(recipe, public_rows(name), [], dotted, **knobs).metrics


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC)
def test_public_rows_train_two_steps_as_they_are(place, name):
    recipe, options = RECIPES.get(name, ("sft", {}))
    metrics = train(place, name, recipe, options)
    assert metrics["step"][-1] == 2 and np.isfinite(metrics["loss"][metrics["step"] == 2]).all()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe"), REFUSED)
def test_public_rows_of_another_kind_are_refused_in_one_line(place, name, recipe):
    with pytest.raises(jaxft.Error, match=REFUSED[name, recipe]) as caught:
        train(place, name, recipe, {})
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_score_prints_the_probability_of_each_step_of_a_process_reward_run(place, monkeypatch, capsys):
    train(place, "math_shepherd", "process_reward", {"name": "steps"})
    rows = public_rows("math_shepherd")
    (place / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with working_directory(place):
        options = ("--run", "runs/steps", "--file", "steps.jsonl", "--json")
        code, out, err = call(monkeypatch, capsys, "score", *options)
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["labels"] for row in found] == [row["labels"] for row in rows]
    assert [row["row"] for row in found] == [f"steps.jsonl:{number}" for number in range(1, 7)]
    assert all(0 < x < 1 for row in found for x in row["right"]) and "of 12 steps are judged" in err
