"""The recipe decision on a tiny model: it learns, its numbers agree in log, evaluation, card and report."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from prepared import finished_run
from scripts_in_process import SCRIPTS, call
from tiny_llama import tiny_torch, write_folder
from tiny_run import write_rows

from jaxft.report.run_files import read_run
from jaxft.report.sections import bins_of, reliability_section
from jaxft.runs.loaded_weights import named_weights
from jaxft.weights.hf.hub_upload import is_uploaded

RECIPE = str(SCRIPTS.parent / "configs" / "decision.py")
LABELS = ("few", "many")


def rows(count, first=0):
    return [{"text": f"{i} " + "xo"[i % 2] * 24, "label": LABELS[i % 2]} for i in range(first, first + count)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decision")
    write_folder(folder / "base", tiny_torch())
    write_rows(folder / "rows.jsonl", rows(64))
    write_rows(folder / "held.jsonl", rows(20, 100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXFT_CACHE", str(folder / "cache"))
        run = finished_run(
            folder, RECIPE, "model=base", "data=rows.jsonl", "held_out=held.jsonl", "max_length=256",
            "batch=4", "general=none", "dtype=float32", "epochs=2", "lr=0.004", "loop.eval_every=none",
            "rank=4",
        )  # fmt: skip
    return run


@pytest.fixture
def evaluate(finished, monkeypatch, capsys):
    """Run the command in the folder of the run; return its metrics and the lines of --out."""
    monkeypatch.setenv("JAXFT_CACHE", str(finished.parents[1] / "cache"))
    monkeypatch.chdir(finished.parents[1])

    def run(*argv):
        code, out, err = call(
            monkeypatch, capsys, "evaluate", *argv, "--json", "--out", "p.jsonl", "--dtype", "float32"
        )
        assert code == 0, err
        return json.loads(out), [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]

    return run


def test_a_run_learns_and_its_evaluation_and_report_have_its_calibration(finished, evaluate):
    after = json.loads((finished / "summary.json").read_text())["after"]["metrics"]
    assert after["eval_accuracy"] > 0.8 and after["eval_loss"] == pytest.approx(after["eval_log_loss"])
    card = (finished / "README.md").read_text()
    for text in ("| eval_accuracy | 0.5", "| eval_ece | 0.", "# POST /v1/decisions", "jaxft evaluate --run"):
        assert text in card
    found, written = evaluate("--run", finished)
    for name in ("accuracy", "log_loss", "brier", "ece", "entropy"):
        assert found[name] == pytest.approx(after[f"eval_{name}"], abs=1e-4)
    assert found["examples"] == 20 and "accuracy" in found["intervals"]
    assert [row["row"] for row in written] == [f"held.jsonl:{i}" for i in range(1, 21)]
    assert written[0]["probabilities"].keys() == {*LABELS}
    assert written[0]["answer"] == {"few": 1.0, "many": 0.0}
    logs = [-np.log(row["probabilities"][max(row["answer"], key=row["answer"].get)]) for row in written]
    assert np.mean(logs) == pytest.approx(found["log_loss"], abs=1e-4)
    own = read_run("decision", finished)
    bins = [b for b in bins_of(own.rows) if b]
    assert sum(b.decisions for b in bins) == 20
    assert bins_of({"r": {"confidence": 0.6, "correct": 1.0}})[8] == (1, pytest.approx(0.6), 1)
    page = reliability_section([own])
    assert page.count("<rect") == len(bins) and f"{after['eval_ece']:.3f} after training" in page


def test_the_labels_of_a_run_are_in_its_record_card_and_weights_and_decide_other_rows(finished, evaluate):
    folder = finished.parents[1]
    assert json.loads((finished / "config.json").read_text())["labels"] == [*LABELS]
    decision = json.loads((finished / "adapter" / "decision.json").read_text())
    assert decision == {"labels": [*LABELS], "question": None} and is_uploaded("decision.json")
    for card in (finished / "README.md", finished / "adapter" / "README.md"):
        assert "Its labels, in the order of their letters: A few, B many." in card.read_text()
    write_rows(folder / "one.jsonl", [row for row in rows(8) if row["label"] == "many"])
    (folder / "rows.jsonl").rename(folder / "moved.jsonl")  # the training rows are not read again
    shutil.copytree(finished / "adapter", folder / "alone")
    try:
        results = [
            evaluate(*weights, "--file", "one.jsonl")
            for weights in (("--run", finished), ("--model", "base", "--adapter", "alone"))
        ]
        assert named_weights(None, str(folder / "base"), None).decision.labels == ()
    finally:
        (folder / "moved.jsonl").rename(folder / "rows.jsonl")
    assert results[0] == results[1] and results[0][0]["accuracy"] > 0.8
    assert results[0][1][0]["probabilities"].keys() == {*LABELS}


def test_rows_of_files_with_the_same_name_have_a_result_each(finished, evaluate):
    folder = finished.parents[1]
    for name, row in (("a", {"choices": ["x", "y"]}), ("b", {"choices": ["u", "v", "w"]})):
        (folder / name).mkdir()
        write_rows(folder / name / "t.jsonl", [{"question": "q?", "answer": 0, **row}] * 2)
    found, written = evaluate("--run", finished, "--file", "a/t.jsonl,b/t.jsonl")
    assert [[*row["probabilities"]] for row in written] == [["x", "y"]] * 2 + [["u", "v", "w"]] * 2
    assert found["examples"] == 4
    assert [sum(row["probabilities"].values()) for row in written] == pytest.approx([1] * 4)


def test_rows_without_an_answer_get_probabilities_and_are_in_no_metric(finished, evaluate):
    folder = finished.parents[1]
    texts = rows(4, 200)
    write_rows(folder / "new.jsonl", [{"text": row["text"]} for row in texts])
    write_rows(folder / "some.jsonl", [*texts[:3], {**texts[3], "label": None}])
    found, written = evaluate("--run", finished, "--file", "new.jsonl")
    assert found == {"examples": 4} and all("answer" not in row for row in written)
    assert all(row["probabilities"].keys() == {*LABELS} for row in written)
    found, others = evaluate("--run", finished, "--file", "some.jsonl")
    assert [row["probabilities"] for row in others] == [
        {name: pytest.approx(p, abs=1e-5) for name, p in row["probabilities"].items()} for row in written
    ]
    (folder / "three.jsonl").write_text("".join((folder / "some.jsonl").read_text().splitlines(True)[:3]))
    of_three, _ = evaluate("--run", finished, "--file", "three.jsonl")
    del found["intervals"], of_three["intervals"]
    assert found.pop("examples") == 4 and of_three.pop("examples") == 3
    assert found == {name: pytest.approx(x, abs=1e-5) for name, x in of_three.items()}
    write_rows(folder / "own.jsonl", [{"question": "q?", "choices": ["x", "y"]}])
    assert evaluate("--run", finished, "--file", "own.jsonl")[1][0]["probabilities"].keys() == {"x", "y"}
    write_rows(folder / "soft.jsonl", [{"question": "q?", "choices": ["x", "y"], "answer": [0.7, 0.3]}])
    assert evaluate("--run", finished, "--file", "soft.jsonl")[1][0]["answer"] == {"x": 0.7, "y": 0.3}


def test_a_run_without_held_out_rows_is_a_decision_run_too(finished):
    run = finished_run(
        finished.parents[1], RECIPE, "model=base", "data=rows.jsonl", "held_out=none", "max_length=256",
        "batch=4", "general=none", "loop.steps=1", "dtype=float32", "name=alone", "rank=4",
    )  # fmt: skip
    card = (run / "README.md").read_text()
    assert "jaxft evaluate --run" in card and "# POST /v1/decisions" in card and "generate" not in card


def test_rows_with_a_text_and_a_label_are_the_texts_of_an_sft_run(finished, evaluate, monkeypatch, capsys):
    run = finished_run(
        finished.parents[1], str(SCRIPTS.parent / "configs" / "sft.py"), "model=base", "data=rows.jsonl",
        "held_out=none", "max_length=256", "batch=4", "general=none", "samples=0", "loop.steps=1",
        "dtype=float32",
    )  # fmt: skip
    code, out, err = call(monkeypatch, capsys, "evaluate", "--run", run, "--file", "held.jsonl", "--json")
    assert code == 0 and json.loads(out)["perplexity"] > 1, err
