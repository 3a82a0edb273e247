"""`jaxft verify`: a run is verified, a step is computed again, and what has changed is named."""

import json

import pytest
from prepared import finished_run, working_directory
from scripts_in_process import call
from tiny_run import write_place

from jaxft.lab.studies.verify import record_problems
from jaxft.runs.metrics_log import Jsonl, add_files, check_chain, digests_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("verify")
    write_place(place)
    with working_directory(place):
        return finished_run(place, "config.py", "steps=4", "samples=0", "loop.save_every=2")


def run(folder, monkeypatch, capsys, *argv):
    with working_directory(folder.parents[1]):
        return call(monkeypatch, capsys, "verify", folder, *argv)


@pytest.mark.slow
def test_a_run_is_verified_and_its_steps_are_computed_again_to_the_bit(folder, monkeypatch, capsys):
    code, out, _ = run(folder, monkeypatch, capsys)
    assert code == 0 and f"last digest {check_chain(folder / 'metrics.jsonl')}" in out
    names = {json.loads(line).get("file") for line in digests_path(folder / "metrics.jsonl").open()}
    assert names >= {"config.json", "env.json", "summary.json", "held_out.jsonl"}
    for step, origin in ((2, "the start"), (4, "the checkpoint of step 2")):
        code, out, err = run(folder, monkeypatch, capsys, "--step", step)
        assert code == 0, err
        assert f"step {step}, computed again from {origin}: its " in out
        assert "equal the log's, to the bit" in out and "state equals the checkpoint's" in out
    code, _, err = run(folder, monkeypatch, capsys, "--step", 9)
    assert code == 1 and "has no training metrics of step 9; choose a logged step" in err


@pytest.mark.slow
def test_changes_of_a_run_are_named(folder, monkeypatch, capsys):
    for name, old, new in (
        ("metrics.jsonl", b'"step": 3', b'"step": 5'),
        ("summary.json", b'"steps": 4', b'"steps": 5'),
        ("config.json", b'"seed": 0', b'"seed": 1'),
    ):
        path = folder / name
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new, 1))
        code, out, _ = run(folder, monkeypatch, capsys)
        assert code == 1 and out.startswith("changed: ") and name in out
        path.write_bytes(content)
    weights = next((folder / "adapter").glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, out, _ = run(folder, monkeypatch, capsys)
    assert code == 1 and f"{weights.name}: the file has changed since the run was finished" in out
    weights.write_bytes(content)


def test_last_lines_that_are_removed_with_all_their_digests_are_found(tmp_path):
    """Every way of cutting a finished record short: the digests, or the log and its digests."""
    log, steps = tmp_path / "metrics.jsonl", 8
    writer = Jsonl(log)
    for step in range(1, steps + 1):
        writer.log(step, {"loss": 1 / step}, {})
    writer.close("finished")
    for name, content in (("config.json", {"seed": 0}), ("summary.json", {"steps": steps})):
        (tmp_path / name).write_text(json.dumps(content))
    add_files(log, [tmp_path / "config.json", tmp_path / "summary.json"])
    assert not [*record_problems(tmp_path)]
    lines, digests = (p.read_bytes().splitlines(keepends=True) for p in (log, digests_path(log)))
    for kept in range(len(digests)):
        digests_path(log).write_bytes(b"".join(digests[:kept]))
        for whole in (lines, lines[:kept]):
            log.write_bytes(b"".join(whole))
            (problem, *_) = record_problems(tmp_path)
            assert "\n" not in problem and tmp_path.name in problem
    digests_path(log).write_bytes(b"".join(digests[:steps]))
    log.write_bytes(b"".join([*lines, b'{"step": 9, "loss": 0.1}\n']))
    Jsonl(log, start_step=9).close("stopped")
    assert not [*record_problems(tmp_path)]  # a run that was continued and is not finished again


def test_a_folder_without_a_record_is_refused(tmp_path, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "verify", tmp_path)
    assert code == 1 and "no such file; name the folder of a run or a study" in err and err.count("\n") == 1


@pytest.mark.slow
def test_the_members_of_a_sweep_are_verified(tmp_path, monkeypatch, capsys):
    write_place(tmp_path)
    argv = ["--config", "config.py", "--over", "lr=0.01,0.001", "steps=2", "samples=0", "--name", "two"]
    with working_directory(tmp_path):
        assert call(monkeypatch, capsys, "sweep", *argv)[0] == 0
        assert call(monkeypatch, capsys, "verify", "runs/two")[0] == 0
        for name in ("summary.json", "lr=0.001/summary.json"):
            path = tmp_path / "runs/two" / name
            path.write_bytes(path.read_bytes().replace(b'"steps": 2', b'"steps": 3', 1))
            code, out, _ = call(monkeypatch, capsys, "verify", "runs/two")
            assert code == 1 and f"{name}: the file was changed after it was written" in out
