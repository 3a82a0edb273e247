"""The copy of a run's folder in an object store: what is sent and fetched, and what happens when it fails."""

import json
import shutil
import urllib.request

import pytest
from object_store import serve_objects
from tiny_run import SLOW_STEPS, Place, write_place

from jaxft.runs import store as stores
from jaxft.runs.mirror import mirrored

PLACE = {"s3": "s3://bucket/runs/a", "gs": "gs://bucket/runs/a"}
RECORD = {"weights": "base", "data": {"seed": 0}, "loop": {"steps": 4}}
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
}


@pytest.fixture
def store(monkeypatch):
    with serve_objects() as store:
        for name, value in CREDENTIALS.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.address)
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", store.address)
        quick = {"max_retries": 2, "initial_delay": "1ms", "max_delay": "1ms"}
        monkeypatch.setattr(stores, "RETRIES", quick)
        yield store


def write_step(folder, step, content="state"):
    """A checkpoint as it is on disk."""
    path = folder / "checkpoints" / str(step)
    (path / "state" / "d").mkdir(parents=True)
    (path / "state" / "d" / "part").write_text(f"{content} {step}")
    (path / "manifest.json").write_text(json.dumps({"step": step}))


def write_folder(folder, record=RECORD):
    """A run's folder without checkpoints."""
    (folder / "tensorboard").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "tensorboard" / "events").write_bytes(b"events")
    (folder / "lock").write_text("")
    return folder


def tree_of(folder):
    """The files of a folder but for the lock, by path."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("scheme", PLACE)
def test_another_machine_gets_the_folder_as_it_was(store, tmp_path, scheme):
    here, lines = write_folder(tmp_path / "here"), []
    (here / "config.json.part").write_text("{")
    with mirrored(here, PLACE[scheme], lines.append) as copy:
        for step in (1, 2, 3):
            write_step(here, step)
            (here / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
            if step == 3:
                shutil.rmtree(here / "checkpoints" / "1")
            copy(step)
        assert not [name for name in store.objects if "/checkpoints/1/" in name or ".part" in name]
        (here / "adapter").mkdir()
        (here / "adapter" / "weights").write_bytes(bytes(1000))
        (here / "summary.json").write_text('{"steps": 3}')
    (here / "config.json.part").unlink()
    assert lines == [f"all files of this run are in {PLACE[scheme]} too"]
    requests = len(store.requests)
    with mirrored(tmp_path / "there", PLACE[scheme], lines.append):
        assert tree_of(tmp_path / "there") == tree_of(here)
    assert "fetching step 3" in lines[1]
    sent = [line for line in store.requests[requests:] if line.startswith(("PUT", "POST"))]
    assert {line.rpartition("/")[2] for line in sent} == {"index.json"}  # the rest is there already


def test_a_folder_that_is_ahead_of_the_store_stays(store, tmp_path):
    here = write_folder(tmp_path / "here")
    write_step(here, 1)
    with mirrored(here, PLACE["s3"], print) as copy:
        copy(1)
    write_step(here, 2)
    (here / "metrics.jsonl").write_text("mine\n")
    with mirrored(here, PLACE["s3"], print):
        assert (here / "metrics.jsonl").read_text() == "mine\n"
    (write_folder(tmp_path / "late") / "metrics.jsonl").write_text("old\n")
    write_step(tmp_path / "late", 0)
    with mirrored(tmp_path / "late", PLACE["s3"], print):
        assert (tmp_path / "late" / "metrics.jsonl").read_text() == "mine\n"
    assert [line for line in store.requests if "checkpoints/2" in line]


def test_a_store_that_fails_is_a_warning_and_then_gets_everything(store, tmp_path):
    here, lines = write_folder(tmp_path / "here"), []
    with mirrored(here, PLACE["s3"], lines.append) as copy:
        write_step(here, 1)
        store.faults["PUT .*part"] = 503
        copy(1)
        assert len(lines) == 1 and lines[0].startswith(
            "warning: the checkpoint of step 1 was not copied (s3:"
        )
        assert not [name for name in store.objects if name.endswith("manifest.json")]
        assert "\n" not in lines[0] and str(here) in lines[0]
        store.faults.clear()
        write_step(here, 2)
        copy(2)
    steps = [name.split("/")[3] for name in store.objects if name.endswith("manifest.json")]
    assert sorted(steps) == ["1", "2"] and len(lines) == 2


def test_a_store_that_fails_at_the_end_is_one_line_and_the_same_command_repairs_it(store, tmp_path):
    here = write_folder(tmp_path / "here")
    write_step(here, 1)
    with pytest.raises(OSError, match=r"was not copied: s3://bucket/runs/a: .*all of it is in"):  # noqa: SIM117
        with mirrored(here, PLACE["s3"], print) as copy:
            store.faults["PUT .*part"] = 403
            copy(1)
    store.faults.clear()
    with mirrored(here, PLACE["s3"], print):
        pass
    assert any(name.endswith("checkpoints/1/manifest.json") for name in store.objects)


def test_a_store_that_cannot_be_opened_ends_the_start(store, tmp_path, monkeypatch):
    for url in ("s3://absent/x", "gs://absent/x"):
        with pytest.raises(OSError, match=f"^{url}: [^\n]+$"), mirrored(tmp_path / "x", url, print):
            pass
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="^s3://bucket/runs/a: [^\n]+$"), mirrored(tmp_path, PLACE["s3"], print):
        pass


def test_a_second_start_takes_over_and_the_first_one_sends_no_more(store, tmp_path):
    first, lines = write_folder(tmp_path / "first"), []
    with pytest.raises(OSError, match="is written by another start of this run, process"):  # noqa: SIM117
        with mirrored(first, PLACE["s3"], lines.append) as copy:
            write_step(first, 1)
            copy(1)
            with mirrored(tmp_path / "second", PLACE["s3"], print) as other:
                write_step(tmp_path / "second", 2, "second")
                other(2)
            write_step(first, 2, "first")
            copy(2)
    assert "another start" in lines[-1]
    (name,) = [name for name in store.objects if "checkpoints/2/state" in name]
    assert store.objects[name] == b"second 2"


def test_a_store_with_another_run_of_the_name_is_refused(store, tmp_path):
    here = write_folder(tmp_path / "here")
    write_step(here, 3)
    with mirrored(here, PLACE["s3"], print) as copy:
        copy(3)
    other = write_folder(tmp_path / "other", {**RECORD, "data": {"seed": 1}})
    before = tree_of(other)
    with (
        pytest.raises(ValueError, match="have different runs; choose another name"),
        mirrored(other, PLACE["s3"], print),
    ):
        pass
    assert tree_of(other) == before


def test_names_that_lead_out_of_the_folder_are_not_fetched(store, tmp_path):
    here = write_folder(tmp_path / "here")
    write_step(here, 1)
    with mirrored(here, PLACE["s3"], print) as copy:
        copy(1)
    index = json.loads(store.objects["runs/a/index.json"])
    index["files"]["../outside"] = [1, "x"]
    store.objects["runs/a/index.json"] = json.dumps(index).encode()
    store.objects["runs/outside"] = b"x"
    with (
        pytest.raises(ValueError, match="no file of a run"),
        mirrored(tmp_path / "x" / "y", PLACE["s3"], print),
    ):
        pass
    assert not (tmp_path / "x" / "outside").exists()


@pytest.mark.slow
def test_moto_takes_and_lists_the_same(tmp_path, monkeypatch):
    """Another implementation of S3's interface: `pip install moto[server]`."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    try:
        address = "http://127.0.0.1:{1}".format(*server.get_host_and_port())
        urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT")).close()
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": address}.items():
            monkeypatch.setenv(name, value)
        here = write_folder(tmp_path / "here")
        with mirrored(here, PLACE["s3"], print) as copy:
            for step in (1, 2):
                write_step(here, step)
                copy(step)
            shutil.rmtree(here / "checkpoints" / "1")
            copy(2)
        with mirrored(tmp_path / "there", PLACE["s3"], print):
            assert tree_of(tmp_path / "there") == tree_of(here)
    finally:
        server.stop()


@pytest.mark.slow
def test_a_run_that_is_killed_resumes_from_the_store_on_another_machine_bit_for_bit(store, tmp_path):
    place = Place(tmp_path)
    write_place(tmp_path)
    knobs = ["loop.eval_every=2", "steps=5"]
    assert place.run("name=near", *knobs) == 0, place.err()
    environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": store.address}
    argv = ["name=far", *knobs, "loop.store=s3://bucket/runs"]
    process = place.start(*argv, hook=SLOW_STEPS, **environment)
    place.wait_for(process, lambda: "runs/far/checkpoints/3/manifest.json" in store.objects)
    process.kill()
    process.join()
    shutil.rmtree(place.runs("far"))  # the machine is gone
    assert place.run(*argv, **environment) == 0, place.err()
    assert "fetching step" in place.out() and "resuming after step" in place.out()
    assert place.results("far", 5) == place.results("near", 5)
    shutil.rmtree(place.runs("far"))
    assert place.run(*argv, **environment) == 0, place.err()
    assert "this run is finished" in place.out()
    assert place.results("far", 5) == place.results("near", 5)
