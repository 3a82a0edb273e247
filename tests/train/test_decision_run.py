"""The recipe decision on a tiny model: it learns, its numbers agree in log, evaluation, card and report."""

import json
from pathlib import Path

import numpy as np
import pytest
from prepared import finished_run
from scripts_in_process import SCRIPTS, call
from tiny_llama import tiny_torch, write_folder
from tiny_run import write_rows

from jaxft.report.reliability import bins_of, reliability_section
from jaxft.report.run_files import read_run

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


def test_a_run_learns_and_its_evaluation_and_report_have_its_calibration(finished, monkeypatch, capsys):
    after = json.loads((finished / "summary.json").read_text())["after"]["metrics"]
    assert after["eval_accuracy"] > 0.8 and after["eval_loss"] == pytest.approx(after["eval_log_loss"])
    card = (finished / "README.md").read_text()
    for text in ("| eval_accuracy | 0.5", "| eval_ece | 0.", "# POST /v1/decisions", "jaxft evaluate --run"):
        assert text in card
    monkeypatch.setenv("JAXFT_CACHE", str(finished.parents[1] / "cache"))
    monkeypatch.chdir(finished.parents[1])
    argv = ("--run", finished, "--json", "--out", "p.jsonl", "--dtype", "float32")
    code, out, err = call(monkeypatch, capsys, "evaluate", *argv)
    assert code == 0, err
    found = json.loads(out)
    for name in ("accuracy", "log_loss", "brier", "ece", "entropy"):
        assert found[name] == pytest.approx(after[f"eval_{name}"], abs=1e-4)
    assert found["examples"] == 20 and "accuracy" in found["intervals"]
    written = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    assert [row["row"] for row in written] == [f"held.jsonl:{i}" for i in range(1, 21)]
    assert written[0]["probabilities"].keys() == {*LABELS}
    assert written[0]["answer"] == {"few": 1.0, "many": 0.0}
    logs = [-np.log(row["probabilities"][max(row["answer"], key=row["answer"].get)]) for row in written]
    assert np.mean(logs) == pytest.approx(found["log_loss"], abs=1e-4)
    own = read_run("decision", finished)
    bins = [b for b in bins_of(own.rows) if b]
    assert sum(b.decisions for b in bins) == 20
    gap = sum(b.decisions * abs(b.accuracy - b.confidence) for b in bins) / 20
    assert gap == pytest.approx(after["eval_ece"], abs=1e-6)
    page = reliability_section([own])
    assert page.count("<rect") == len(bins) and f"{after['eval_ece']:.3f} after training" in page


def test_other_rows_are_decided_with_the_labels_of_the_run(finished, monkeypatch, capsys):
    monkeypatch.setenv("JAXFT_CACHE", str(finished.parents[1] / "cache"))
    monkeypatch.chdir(finished.parents[1])
    write_rows(finished.parents[1] / "one.jsonl", [row for row in rows(8) if row["label"] == "many"])
    argv = ("--run", finished, "--file", "one.jsonl", "--json", "--out", "p.jsonl")
    code, out, err = call(monkeypatch, capsys, "evaluate", *argv)
    assert code == 0, err
    assert json.loads(out)["accuracy"] > 0.8
    assert json.loads(Path("p.jsonl").read_text().splitlines()[0])["probabilities"].keys() == {*LABELS}
