"""A finished run records the SHA-256 of its results, and a result that has changed since is refused."""

import hashlib
import json
import os
import shutil

import pytest

from jaxft.rl.reward_models import ModelReward
from jaxft.runs import run_record
from jaxft.runs.loaded_weights import named_weights
from jaxft.runs.run_record import earlier_end_notes

RECORD = {"weights": "base", "model": {"dtype": "float32"}, "data": {"date": "26 Jul 2024"}}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a finished run with an adapter, and a better one in best/."""
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "runs" / "sft"
    for name in ("adapter", "best/adapter"):
        (run / name).mkdir(parents=True)
        for file in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"):
            (run / name / file).write_bytes(f"{name} {file}".encode() * 100)
    (run / "config.json").write_text(json.dumps(RECORD))
    run_record.write_durable_json(run / "summary.json", {"steps": 4, "files": run_record.result_hashes(run)})
    return run


def test_every_file_but_the_model_card_is_recorded(run):
    files = json.loads((run / "summary.json").read_text())["files"]
    written = [p for f in ("adapter", "best") for p in (run / f).rglob("*") if p.is_file()]
    assert files == {
        p.relative_to(run).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in written
        if p.name != "README.md"
    }
    for folder in (run, run / "adapter", run / "best" / "adapter"):
        run_record.check_results(folder)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "tokenizer.json", "adapter_config.json"])
def test_a_flipped_bit_in_a_result_is_refused_with_the_file(run, file):
    path = run / "adapter" / file
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    for folder in (run, run / "adapter"):
        with pytest.raises(ValueError, match=f"{file}: the file has changed since the run was finished"):
            run_record.check_results(folder)
    with pytest.raises(ValueError, match=f"{file}: the file has changed since"):
        run_record.trained_weights(run)
    run_record.check_results(run / "best" / "adapter")


def test_a_missing_result_is_refused_and_a_card_may_be_edited(run):
    (run / "adapter" / "README.md").write_text("my own words")
    run_record.check_results(run)
    (run / "adapter" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json: no such file"):
        run_record.check_results(run / "adapter")


def test_weights_of_an_earlier_end_are_reported_when_the_run_has_gone_on(run):
    path, names = run / "metrics.jsonl", dict(run=run, model=None, adapter=None)
    (run / "adapter" / "adapter_config.json").write_text("{}")
    run_record.write_durable_json(run / "summary.json", {"steps": 4})
    path.write_text('{"step": 4, "loss": 1.0}\n{"step": 4, "eval_loss": 1.0}\n')
    assert named_weights(**names).notes == []
    path.write_text(path.read_text() + '{"step": 6, "loss": 1.0}\n')
    line = f"{run}: this run was continued after step 4, has reached step 6, and its weights are from step 4"
    notes = [f"warning: {line}; finish the run to update them"]
    assert named_weights(**names).notes == notes
    assert named_weights(None, None, run / "adapter").notes == notes
    assert named_weights(None, str(run), run / "adapter").notes[0] == notes[0]
    for ref in (run, run / "adapter", run / "best" / "adapter"):  # of start= and reward=
        assert earlier_end_notes(str(ref)) == notes
    assert earlier_end_notes("org/name") == earlier_end_notes(run.parent) == []
    assert ModelReward(str(run / "adapter")).start_lines() == notes


def test_weights_that_are_gone_from_a_finished_run_name_the_remedy_that_works(run):
    for name in ("adapter", "best"):
        shutil.rmtree(run / name)
    with pytest.raises(
        FileNotFoundError, match="neither adapter/ nor model/; the command that started the run"
    ):
        run_record.trained_weights(run)
    (run / "summary.json").unlink()
    with pytest.raises(FileNotFoundError, match="neither adapter/ nor model/; finish the run"):
        run_record.trained_weights(run)


@pytest.mark.parametrize("name", ["metrics.jsonl", "lock", "adapter", "extra"])
def test_a_pipe_or_a_file_in_the_place_of_a_folder_is_refused_at_the_start(tmp_path, name):
    (tmp_path / "profile").mkdir()
    with run_record.lock(tmp_path):
        (tmp_path / "model").mkdir()
    (tmp_path / "lock").unlink()
    if name == "adapter":
        (tmp_path / name).write_text("a file")
    else:
        os.mkfifo(tmp_path / name)
    with (
        pytest.raises(
            ValueError, match=rf"/{name}: a (file|pipe, socket or device) is in the way; .* Move it, or"
        ),
        run_record.lock(tmp_path),
    ):
        pass


def test_folders_without_recorded_hashes_pass(run, tmp_path):
    (run / "summary.json").write_text('{"steps": 4}')
    (run / "adapter" / "tokenizer.json").write_text("changed")
    run_record.check_results(run / "adapter")
    run_record.check_results(tmp_path / "not a run" / "adapter")
    (tmp_path / "summary.json").write_text("[]")  # of somebody else, two folders above
    run_record.check_results(tmp_path / "jaxft-push-1" / "sft")


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"steps": "4"}', '{"steps": -1}', '{"steps": true}', "4", '{"after": 1}', "\xff"]
)
def test_a_summary_of_another_shape_is_named(run, text):
    (run / "summary.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"summary\.json"):
        run_record.finished_steps(run)


@pytest.mark.parametrize(
    "record",
    [[], {}, {**RECORD, "weights": 3}, {**RECORD, "model": []}, {**RECORD, "model": {"dtype": "int3"}},
     {**RECORD, "data": {}}, {**RECORD, "quant": "nf4"}, {**RECORD, "weights_path": 3}],
)  # fmt: skip
def test_a_config_that_is_no_run_s_is_named(run, record):
    (run / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"config\.json"):
        run_record.trained_weights(run)
