"""Commands that get the address of a run in an object store: its files are fetched, then used as a folder."""

import json
import os
import shutil
from pathlib import Path

import pytest
from object_store import serve_objects
from run_folders import write_run, write_sweep
from scripts_in_process import call
from tiny_llama import tiny_torch, write_folder
from tiny_run import Place, write_place

from jaxft.report import document
from jaxft.runs import folder_copies, loaded_weights, object_store
from jaxft.runs.folder_copies import mirrored

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
}


@pytest.fixture
def store(monkeypatch, tmp_path):
    """An object store, a cache and a working directory of this test, and pages without plotly.js."""
    with serve_objects() as store:
        for name, value in {**CREDENTIALS, "JAXFT_CACHE": str(tmp_path / "cache")}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.address)
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", store.address)
        quick = {"max_retries": 2, "initial_delay": "1ms", "max_delay": "1ms"}
        monkeypatch.setattr(object_store, "RETRIES", quick)
        monkeypatch.setattr(document, "packed_plotly", lambda: "")
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield store


def send(folder, url):
    """Copy a run's folder into the store, as a start that has nothing else to do does."""
    with mirrored(folder, url, {}, lambda line: None) as copies:
        copies.accepted()


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_report_of_a_run_in_a_store(store, tmp_path, monkeypatch, capsys, scheme):
    folder, url = write_run(tmp_path / "away" / "sft", "sft", 5), f"{scheme}://bucket/runs/sft"
    (folder / "extra.json").write_text("{}")
    send(folder, url)
    store.objects["runs/sft/checkpoints/5/state"] = b"large"
    code, out, err = call(monkeypatch, capsys, "report", url)
    assert code == 0 and out.startswith("report.html: ") and err.count("\n") == 1, err
    assert "fetching" in err and f"files of {url} to {tmp_path / 'cache'}" in err
    assert "question 0?" in Path("report.html").read_text()
    (found,) = (tmp_path / "cache" / "runs").glob("*/sft")
    assert (found / "extra.json").is_file() and not (found / "checkpoints").exists()
    requests = len(store.requests)
    assert call(monkeypatch, capsys, "report", f"{url}/") == (0, out, "")
    assert [line.rpartition("/")[2] for line in store.requests[requests:]] == ["index.json"]
    (folder / "extra.json").unlink()
    (folder / "summary.json").write_text(json.dumps({"notes": ["a later note"], "steps": 5}))
    lists = [name for name in store.objects if name.endswith("index.json")]
    store.objects = {name: x for name, x in store.objects.items() if name not in lists}  # another run
    send(folder, url)
    (found / "own.txt").write_text("of a command")
    code, _, err = call(monkeypatch, capsys, "report", url, "--out", "b.html")
    assert code == 0 and "fetching 1 files" in err and "a later note" in Path("b.html").read_text()
    assert not (found / "extra.json").exists() and (found / "own.txt").exists()


def test_a_sweep_and_its_members_are_fetched_together(store, tmp_path, monkeypatch, capsys):
    url = "s3://bucket/sweep"
    send(write_sweep(tmp_path / "away" / "sweep", 2, steps=5), url)
    code, out, err = call(monkeypatch, capsys, "report", url)
    assert code == 0 and "lr=2e-4" in Path("report.html").read_text(), err
    member = folder_copies.local_folder(f"{url}/lr=1e-4")
    assert member.name == "lr=1e-4" and (member / "metrics.jsonl").is_file()
    assert folder_copies.is_fetched(member) and not folder_copies.is_fetched(tmp_path)
    assert capsys.readouterr().err == ""  # nothing was fetched again


def test_weights_of_a_run_in_a_store_are_pushed_and_served(store, tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "away" / "sft", "sft", 5)
    write_folder(folder / "model", tiny_torch())
    record = json.loads((folder / "config.json").read_text())
    record |= {"model": {"dtype": "float32"}, "data": {**record["data"], "date": "26 Jul 2024"}}
    (folder / "config.json").write_text(json.dumps(record))
    send(folder, "s3://bucket/runs/sft")
    for url in ("s3://bucket/runs/sft", "s3://bucket/runs/sft/model"):
        code, out, err = call(monkeypatch, capsys, "push", url, "org/name", "--dry-run")
        assert code == 0 and "model.safetensors" in out and "metrics.jsonl" not in out, err
    found = loaded_weights.named_models(["s3://bucket/runs/sft"], None, [], "")
    named = loaded_weights.named_models(["mine=s3://bucket/runs/sft"], None, [], "")
    assert (
        list(found) == ["sft"]
        and list(named) == ["mine"]
        and [x.ref for x in found.values()] == [x.ref for x in named.values()]
    )
    assert (Path(named["mine"].ref) / "model.safetensors").read_bytes() == (
        folder / "model" / "model.safetensors"
    ).read_bytes()


SAD = {
    "s3://bucket/nothing/here": "no run is there; name the folder of one that was trained with loop.store=",
    "s3://absent/x": "s3://absent/x: ",
    "s3://b": "run=s3://b is not a folder in an object store",
    "gs://bucket/../x": "run=gs://bucket/../x is not a folder in an object store",
}


@pytest.mark.parametrize("url", SAD)
@pytest.mark.parametrize("command", ["report", "push", "generate", "chat"])
def test_an_address_without_a_run_is_one_line(store, tmp_path, monkeypatch, capsys, url, command):
    argv = {
        "report": [url],
        "push": [url, "org/name"],
        "generate": ["--prompt", "a", "--run", url],
        "chat": ["--run", url],
    }
    code, out, err = call(monkeypatch, capsys, command, *argv[command])
    assert code in (1, 2) and not out and err.count("\n") == 1 and SAD[url] in err, err
    assert not list(tmp_path.rglob("fetched.json"))


def test_an_object_whose_name_leads_out_of_the_folder_is_refused(store, tmp_path, monkeypatch, capsys):
    index = {"owner": {}, "files": {"../../../evil": [1, "x"]}}
    store.objects["runs/a/index.json"] = json.dumps(index).encode()
    code, _, err = call(monkeypatch, capsys, "report", "s3://bucket/runs/a")
    assert code == 1 and "'../../../evil' is outside the run's folder" in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_trained_run_generates_and_is_pushed_and_reported_from_the_store(
    store, tmp_path, monkeypatch, capsys
):
    place = Place(tmp_path / "train")
    place.folder.mkdir()
    write_place(place.folder)
    environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": store.address}
    argv = ["name=far", "steps=2", "samples=1", "loop.store=s3://bucket/runs"]
    assert place.run(*argv, **environment) == 0, place.err()
    monkeypatch.chdir(place.folder)  # the base is there
    prompt = ["--prompt", "a b", "--max-new", "6", "--dtype", "float32", "--json"]
    code, near, err = call(monkeypatch, capsys, "generate", "--run", "runs/far", *prompt)
    assert code == 0, err
    shutil.rmtree(place.runs("far"))
    code, far, err = call(monkeypatch, capsys, "generate", "--run", "s3://bucket/runs/far", *prompt)
    assert code == 0 and far == near, err
    code, out, err = call(monkeypatch, capsys, "push", "s3://bucket/runs/far", "org/name", "--dry-run")
    assert code == 0 and "adapter_model.safetensors" in out, err
    code, out, err = call(monkeypatch, capsys, "report", "s3://bucket/runs/far")
    assert code == 0 and os.path.getsize("report.html") > 1000, err
