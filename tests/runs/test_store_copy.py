"""The copy of a run's folder in an object store: what is sent and fetched, and what happens when it fails."""

import contextlib
import json
import re
import shutil
import threading
import time
import urllib.request
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from object_store import serve_objects
from prepared import working_directory
from tiny_run import SLOW_STEPS, Place, write_place

from jaxft.distributed.exit import RestartError
from jaxft.runs import folder_copies, manifest, object_store, terminal
from jaxft.runs.folder_copies import mirrored
from jaxft.runs.settings.config import resolve_config
from jaxft.train import loop
from jaxft.train.settings import Run
from jaxft.train.sweep import Sweep

PLACE = {"s3": "s3://bucket/runs/a", "gs": "gs://bucket/runs/a"}
RECORD = {"weights": "base", "data": {"seed": 0}, "loop": {"steps": 4}}
OTHER = {**RECORD, "data": {"seed": 1}}
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
        monkeypatch.setattr(object_store, "RETRIES", quick)
        yield store


def write_step(folder, step, content="state"):
    """A checkpoint as it is on disk."""
    path = folder / "checkpoints" / str(step)
    (path / "state" / "d").mkdir(parents=True)
    (path / "state" / "d" / "part").write_text(f"{content} {step}")
    files = manifest.file_hashes(path, ["state/d/part"])
    body = {"layout": manifest.LAYOUT, "step": step, "files": files}
    (path / "manifest.json").write_text(manifest.format_manifest(body))


def write_folder(folder, record=RECORD):
    """A run's folder without checkpoints."""
    (folder / "tensorboard").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "tensorboard" / "events").write_bytes(b"events")
    (folder / "lock").write_text("")
    return folder


class InTurn:
    """An executor whose work is done when `submit` returns."""

    def __init__(self, *_, **__):
        pass

    def submit(self, work, *args):
        done = Future()
        done.set_result(work(*args))
        return done


@contextlib.contextmanager
def started(folder, url=PLACE["s3"], report=print, record=RECORD):
    """A start that is accepted; as `mirrored`, with only the function that copies a checkpoint, at once."""
    with (
        mock.patch.object(folder_copies, "ThreadPoolExecutor", InTurn),
        mirrored(folder, url, {"config.json": record}, report) as copies,
    ):
        copies.accepted()
        yield copies.published


def tree_of(folder):
    """The files of a folder but for the lock, by path."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("scheme", PLACE)
def test_another_machine_gets_the_folder_as_it_was(store, tmp_path, scheme):
    here, lines = write_folder(tmp_path / "here"), []
    (here / "config.json.part").write_text("{")
    with started(here, PLACE[scheme], lines.append) as copy:
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
    with mirrored(tmp_path / "there", PLACE[scheme], {"config.json": RECORD}, lines.append):  # it is finished
        assert tree_of(tmp_path / "there") == tree_of(here)
    assert "fetching step 3" in lines[1]
    sent = [line for line in store.requests[requests:] if line.startswith(("PUT", "POST"))]
    assert {line.rpartition("/")[2] for line in sent} == {"index.json"}  # the rest is there already


def test_a_result_that_was_set_aside_is_not_copied(store, tmp_path):
    here = write_folder(tmp_path / "here")
    for name in ("member/adapter.bad", "model.bad2", "x.badge"):
        (here / name).mkdir(parents=True)
        (here / name / "file").write_text(name)
    with started(here):
        pass
    sent = {name for name in tree_of(here) if "bad" not in name or "badge" in name}
    with started(write_folder(tmp_path / "there")):
        names = object_store.open_store(PLACE["s3"]).names("")
    assert {name for name in names if name != "index.json"} == sent


def test_a_folder_that_is_ahead_of_the_store_stays(store, tmp_path):
    here = write_folder(tmp_path / "here")
    write_step(here, 1)
    with started(here) as copy:
        copy(1)
    write_step(here, 2)
    (here / "metrics.jsonl").write_text("mine\n")
    with started(here):
        assert (here / "metrics.jsonl").read_text() == "mine\n"
    (write_folder(tmp_path / "late") / "metrics.jsonl").write_text("old\n")
    write_step(tmp_path / "late", 0)
    with started(tmp_path / "late"):
        assert (tmp_path / "late" / "metrics.jsonl").read_text() == "mine\n"
    assert [line for line in store.requests if "checkpoints/2" in line]


def test_a_store_that_fails_is_a_warning_and_then_gets_everything(store, tmp_path):
    here, lines = write_folder(tmp_path / "here"), []
    with started(here, PLACE["s3"], lines.append) as copy:
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
        with started(here) as copy:
            store.faults["PUT .*part"] = 403
            copy(1)
    store.faults.clear()
    with started(here):
        pass
    assert any(name.endswith("checkpoints/1/manifest.json") for name in store.objects)


def test_a_store_that_cannot_be_opened_ends_the_start(store, tmp_path, monkeypatch):
    for url in ("s3://absent/x", "gs://absent/x"):
        with pytest.raises(OSError, match=f"^{url}: [^\n]+$"), started(tmp_path / "x", url, print):
            pass
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="^s3://bucket/runs/a: [^\n]+$"), started(tmp_path):
        pass


def test_after_a_second_start_the_first_one_sends_no_more(store, tmp_path):
    first, lines = write_folder(tmp_path / "first"), []
    with pytest.raises(OSError, match="is written by another process of this run, pid"):  # noqa: SIM117
        with started(first, PLACE["s3"], lines.append) as copy:
            write_step(first, 1)
            copy(1)
            with started(tmp_path / "second") as other:
                write_step(tmp_path / "second", 2, "second")
                other(2)
            write_step(first, 2, "first")
            copy(2)
    assert "another process of this run" in lines[-1]
    (name,) = [name for name in store.objects if "checkpoints/2/state" in name]
    assert store.objects[name] == b"second 2"


def test_a_folder_with_another_run_is_not_overwritten(store, tmp_path):
    here = write_folder(tmp_path / "here")
    write_step(here, 3)
    with started(here) as copy:
        copy(3)
    other = write_folder(tmp_path / "other", OTHER)
    before = tree_of(other)
    with pytest.raises(ValueError, match=r"different runs: .*, data.seed: 0 -> 1\. Move the"), started(other):
        pass
    assert tree_of(other) == before


@pytest.mark.parametrize("step", [None, 1, 9], ids=["no folder", "behind", "ahead"])
@pytest.mark.parametrize("finished", [False, True])
def test_a_start_with_other_settings_than_those_in_the_store_is_refused(store, tmp_path, step, finished):
    here, there = write_folder(tmp_path / "here"), tmp_path / "there"
    write_step(here, 3)
    if finished:
        (here / "summary.json").write_text('{"steps": 3}')
    with started(here) as copy:
        copy(3)
    if step is not None:
        write_step(write_folder(there, OTHER), step)
    before, sent = tree_of(there), dict(store.objects)
    refusal = (
        r"^s3://bucket/runs/a/config.json: cannot resume, .*: data.seed: 0 -> 1\. .* or loop.store=\.\.\.$"
    )
    with pytest.raises(ValueError, match=refusal), started(there, record=OTHER):
        pass
    assert tree_of(there) == before and store.objects == sent


def test_a_start_that_is_refused_does_not_stop_the_copies_of_the_run(store, tmp_path):
    first, lines = write_folder(tmp_path / "first"), []
    with started(first, report=lines.append) as copy:
        write_step(first, 1)
        copy(1)
        sent = dict(store.objects)
        with pytest.raises(ValueError, match="cannot resume"), started(tmp_path / "second", record=OTHER):
            pass
        with (
            pytest.raises(ValueError, match="by another check"),
            mirrored(tmp_path / "third", PLACE["s3"], {"config.json": RECORD}),
        ):
            raise ValueError("refused by another check")
        assert store.objects == sent and not tree_of(tmp_path / "second")
        write_step(first, 2)
        copy(2)
    assert lines == [f"all files of this run are in {PLACE['s3']} too"]
    assert "runs/a/checkpoints/2/manifest.json" in store.objects


def test_settings_may_change_as_those_of_a_folder_may(store, tmp_path):
    here = write_folder(tmp_path / "here", OTHER)
    with pytest.raises(OSError, match="out of memory"), started(here, record=OTHER):
        raise OSError("out of memory")
    assert json.loads(store.objects["runs/a/config.json"]) == OTHER
    write_folder(here := tmp_path / "again")
    with started(here) as copy:  # without a checkpoint there is nothing to resume
        write_step(here, 1)
        copy(1)
    longer = {**RECORD, "loop": {"steps": 8}}
    with started(tmp_path / "there", record=longer):
        assert tree_of(tmp_path / "there") == tree_of(here)
    store.objects["runs/a/config.json"] = b"{"
    with pytest.raises(ValueError, match=r"^s3://bucket/runs/a/config.json: not JSON; choose"), started(here):
        pass


def test_a_start_changes_the_store_when_its_settings_are_accepted(store, tmp_path, monkeypatch):
    write_place(tmp_path)
    knobs, fault = ["samples=0", "loop.store=s3://bucket/runs"], ValueError("it ends here")

    def fail(*_):
        raise fault

    def begin(settings, until):
        """Start a run up to a function of `loop.run`; return which objects it has changed."""
        before = dict(store.objects)
        with monkeypatch.context() as patch, pytest.raises(ValueError) as caught:
            patch.setattr(loop, until, fail)
            loop.run(settings, root=Path("runs"))
        changed = {name for name, content in store.objects.items() if before.get(name) != content}
        return changed if caught.value is fault else str(caught.value)

    with working_directory(tmp_path):
        run = resolve_config("config.py", ["name=a", *knobs], expected=Run).value
        other = replace(run, optim=replace(run.optim, lr=2.0))
        assert begin(run, "open_logs") == set()
        assert {"runs/a/index.json", "runs/a/config.json"} <= begin(run, "precompute")
        store.objects["runs/a/checkpoints/1/manifest.json"] = b"{}"
        shutil.rmtree("runs/a")
        assert "runs/a/config.json: cannot resume" in (line := begin(other, "open_logs"))
        assert "optim.lr: 0.01 -> 2.0" in line

        sweep = Sweep("b", {"x": run, "y": other})
        assert {"runs/b/config.json", "runs/b/y/config.json"} <= begin(sweep, "precompute")
        store.objects["runs/b/checkpoints/1/manifest.json"] = b"{}"
        shutil.rmtree("runs/b")
        assert "runs/b/y/config.json: cannot resume" in begin(Sweep("b", {"x": run, "y": run}), "open_logs")
        assert "members: ['x', 'y'] -> ['x', 'z']" in begin(Sweep("b", {"x": run, "z": other}), "open_logs")
        assert "members: ['x', 'y'] -> None" in begin(replace(run, name="b"), "open_logs")
        assert begin(Sweep("b", sweep.runs, at_once=2), "resume_point") == set()


def test_names_that_lead_out_of_the_folder_are_not_fetched(store, tmp_path):
    here = write_folder(tmp_path / "here")
    write_step(here, 1)
    with started(here) as copy:
        copy(1)
    index = json.loads(store.objects["runs/a/index.json"])
    index["files"]["../outside"] = [1, "x"]
    store.objects["runs/a/index.json"] = json.dumps(index).encode()
    store.objects["runs/outside"] = b"x"
    with (
        pytest.raises(ValueError, match="outside the run"),
        started(tmp_path / "x" / "y"),
    ):
        pass
    assert not (tmp_path / "x" / "outside").exists()


def test_a_checkpoint_in_the_store_has_its_logs(store, tmp_path):
    here, lines = write_folder(tmp_path / "here"), []
    with started(here, report=lines.append) as copy:
        write_step(here, 1)
        copy(1)
        puts = [line for line in store.requests if line.startswith("PUT")]
        assert puts[-1] == "PUT runs/a/checkpoints/1/manifest.json" and "metrics.jsonl" in "".join(puts[:-1])
        store.faults["PUT .*metrics.jsonl"] = 403
        (here / "metrics.jsonl").write_text('{"step": 2}\n')
        write_step(here, 2)
        copy(2)
        assert "was not copied" in lines[0] and "runs/a/checkpoints/2/manifest.json" not in store.objects
        store.faults.clear()


def test_later_checkpoints_in_the_store_stay_when_those_on_disk_are_damaged(store, tmp_path):
    here, lines = write_folder(tmp_path / "here"), []
    with started(here) as copy:
        for step in (2, 4, 6):
            write_step(here, step)
            copy(step)
    for step in (2, 4, 6):
        (here / "checkpoints" / str(step)).rename(here / "checkpoints" / f"{step}.bad")
    shutil.copytree(here / "checkpoints" / "6.bad", here / "checkpoints" / "6")

    def stored():
        return [int(name.split("/")[3]) for name in store.objects if name.endswith("manifest.json")]

    sent = {name: content for name, content in store.objects.items() if not name.endswith("index.json")}
    with started(here, report=lines.append) as copy:
        shutil.rmtree(here / "checkpoints" / "6")  # found to be damaged after the start
        (here / "metrics.jsonl").write_text("again\n")
        write_step(here, 2)
        copy(2)
    assert sent.items() <= store.objects.items()  # with the logs of step 6
    assert len(lines) == 2 and "has step 6: nothing is copied before" in lines[0]
    with started(tmp_path / "there"):
        assert (tmp_path / "there" / "checkpoints" / "6").is_dir()
    shutil.copytree(here / "checkpoints" / "6.bad", here / "checkpoints" / "6")
    with started(here) as copy:
        shutil.rmtree(here / "checkpoints" / "6")
        write_step(here, 7)
        copy(7)
        assert sorted(stored()) == [2, 7]


def test_a_store_that_fails_at_the_end_of_a_stopped_run_is_a_warning(store, tmp_path):
    here, lines = write_folder(tmp_path / "here"), []

    def end(stopped):
        with mirrored(here, PLACE["s3"], {"config.json": RECORD}, lines.append) as copies:
            copies.accepted()
            store.faults["PUT .*"] = 503
            if stopped:
                copies.stopped()

    end(stopped=True)  # its exit code stays 128 + signal
    assert lines[-1].startswith("warning: the end of this run was not copied: s3://bucket/runs/a: ")
    store.faults.clear()
    with pytest.raises(RestartError, match="the same command copies it") as caught:
        end(stopped=False)
    assert terminal.print_error(caught.value) == 75 and terminal.print_error(OSError("x")) == 1
    store.faults.clear()
    with pytest.raises(OSError, match="another process of this run") as lost, started(here):
        store.objects["runs/a/index.json"] = b'{"owner": {"id": "other"}}'
    assert not isinstance(lost.value, RestartError)


def test_a_start_during_a_copy_remains_the_one_that_sends(store, tmp_path, monkeypatch):
    first, work = write_folder(tmp_path / "first"), object_store.Store.write_files
    lines, pending, owners = [], [], []

    def owner():
        return json.loads(store.objects["runs/a/index.json"])["owner"]

    def interrupted(self, *arguments):
        if pending:
            pending.clear()
            with started(tmp_path / "second"):
                owners.append(owner())
        return work(self, *arguments)

    monkeypatch.setattr(object_store.Store, "write_files", interrupted)
    with (
        pytest.raises(OSError, match="is written by another process"),
        started(first, report=lines.append) as copy,
    ):
        write_step(first, 1)
        pending.append(True)
        copy(1)
    assert [owner()] == owners
    assert "is written by another process" in lines[-1]
    assert "runs/a/checkpoints/1/manifest.json" not in store.objects


def test_no_error_of_a_copy_reaches_the_run(store, tmp_path, monkeypatch):
    here, lines, index = write_folder(tmp_path / "here"), [], "runs/a/index.json"
    with pytest.raises(KeyError, match="its own"), started(here, report=lines.append) as copy:
        intact = store.objects[index]
        for content in (b'{"owner": {"id": "other"}}', b"{"):
            store.objects[index] = content
            write_step(here, len(lines))
            copy(len(lines))
        store.objects[index] = intact
        with monkeypatch.context() as patch:
            patch.setattr(object_store.Store, "write_files", lambda *_: bytes(1 << 62))
            write_step(here, 2)
            copy(2)
        store.objects[index] = b"{"
        raise KeyError("its own")
    assert "pid ? on ?" in lines[0] and "not JSON" in lines[1] and "MemoryError" in lines[2]
    assert lines[3].startswith("warning: the end of this run was not copied") and len(lines) == 4


def test_what_is_fetched_is_compared_with_its_hashes(store, tmp_path):
    here, lines = write_folder(tmp_path / "here"), []
    with started(here) as copy:
        for step in (1, 2):
            write_step(here, step)
            copy(step)
    store.objects["runs/a/checkpoints/1/"] = store.objects["runs/a/checkpoints/1/state/"] = b""
    store.objects["runs/a/checkpoints/2/state/d/part"] += b"x"
    store.objects["runs/a/metrics.jsonl"] = b"later\n"
    with started(tmp_path / "there", report=lines.append):
        found = tree_of(tmp_path / "there")
    assert "checkpoints/1/manifest.json" in found and "checkpoints/2/manifest.json" not in found
    assert found["metrics.jsonl"] == b"later\n" and not list((tmp_path / "there").rglob("*.tmp"))
    assert "runs/a/metrics.jsonl does not match index.json: it is damaged, or its copy was" in lines[1]
    assert "step 2 in s3://bucket/runs/a is damaged: state/d/part has 8 bytes, expected 7" in lines[2]
    del store.objects["runs/a/config.json"]
    with pytest.raises(OSError, match="a/config.json: it is listed, but"), started(tmp_path / "third"):
        pass


def test_weights_that_do_not_match_the_index_are_not_used(store, tmp_path):
    here, lines, there = write_folder(tmp_path / "here"), [], tmp_path / "there"
    (here / "adapter").mkdir()
    (here / "adapter" / "weights").write_bytes(b"weights")
    with started(here) as copy:
        write_step(here, 1)
        copy(1)
    weights = "runs/a/adapter/weights"
    store.objects[weights] = b"weightz"
    refusal = rf"^s3://bucket/{weights} does not match index\.json: .* start the run's command again"
    with pytest.raises(ValueError, match=refusal):
        folder_copies.Mirror(
            tmp_path / "cache", object_store.open_store(PLACE["s3"]), lines.append
        ).fetch_results()
    assert not (tmp_path / "cache" / "adapter").exists()
    with started(there, report=lines.append):
        assert not (there / "adapter").exists() and (there / "checkpoints" / "1").is_dir()
        (there / "adapter").mkdir()
        (there / "adapter" / "weights").write_bytes(b"weights")  # the last checkpoint has them
    assert f"{weights} does not match index.json" in lines[-2] and "written again" in lines[-2]
    assert store.objects[weights] == b"weights"


def test_the_newest_intact_checkpoint_of_a_store_takes_the_place_of_a_damaged_one(store, tmp_path):
    here, lines = write_folder(tmp_path / "here"), []
    with started(here) as copy:
        for step in (1, 2, 3):
            write_step(here, step)
            copy(step)
    store.objects["runs/a/checkpoints/3/state/d/part"] += b"x"
    with mirrored(here, PLACE["s3"], {"config.json": RECORD}, lines.append) as copies:
        assert copies.fetch(3) is None  # the disk has it
        (here / "checkpoints" / "3").rename(here / "checkpoints" / "3.bad")
        assert copies.fetch(3) is None and "step 3 in s3://bucket/runs/a is damaged" in lines[-1]
        (here / "checkpoints" / "2" / "manifest.json").unlink()
        assert copies.fetch(3) == 2 and (here / "checkpoints" / "2.bad").is_dir()
        assert copies.fetch(1) is None and copies.fetch(-1) is None
    assert (here / "checkpoints" / "2" / "state" / "d" / "part").read_text() == "state 2"


def test_a_store_that_is_down_delays_no_step_and_is_reported_with_the_time(store, tmp_path, monkeypatch):
    here, lines, opened = write_folder(tmp_path / "here"), [], threading.Event()
    names = object_store.Store.names

    def waiting(self, *args):
        if threading.current_thread() is not threading.main_thread():
            assert opened.wait(60)
            raise object_store.StoreError(f"{self.url}: it is down")
        return names(self, *args)

    monkeypatch.setattr(object_store.Store, "names", waiting)
    with mirrored(here, PLACE["s3"], {"config.json": RECORD}, lines.append) as copies:
        copies.accepted()
        for step in (1, 2, 3):
            write_step(here, step)
            copies.published(step)  # returns, though the store does not
        while not copies.sending():
            time.sleep(0.01)
        assert 1 in copies.sending() and lines == []  # which stays on disk
        opened.set()
        while len(lines) < 2:
            time.sleep(0.01)
        copies.published(4)
        while len(lines) < 3:
            time.sleep(0.01)
    steps = [
        re.match(r"warning: the checkpoint of step (\d) was not copied \(s3:", line)[1] for line in lines[:3]
    ]
    assert steps == ["1", "3", "4"]  # 3 has overtaken 2
    assert re.search(r"the store has failed since step 1 at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d$", lines[1])
    assert lines[3:] == [f"all files of this run are in {PLACE['s3']} too"]
    assert "runs/a/checkpoints/3/manifest.json" in store.objects


def test_a_name_that_the_store_does_not_take_is_refused_before_anything_else(tmp_path):
    write_place(tmp_path)
    for name in ("my run", "sft+dpo"):
        with working_directory(tmp_path):
            run = resolve_config("config.py", [f"name={name}", "loop.store=s3://bucket/runs"], expected=Run)
            with pytest.raises(ValueError, match=f"^name={re.escape(name)} .*loop.store=s3://bucket/runs"):
                loop.run(run.value, root=Path("runs"))
        assert not (tmp_path / "runs" / name).exists()


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
        with started(here) as copy:
            for step in (1, 2):
                write_step(here, step)
                copy(step)
            shutil.rmtree(here / "checkpoints" / "1")
            copy(2)
        with started(tmp_path / "there"):
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


@pytest.mark.slow
def test_a_run_that_is_stopped_exits_with_its_signal_though_the_store_fails(store, tmp_path):
    place = Place(tmp_path)
    write_place(tmp_path)
    environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": store.address}
    argv = ["name=far", "steps=9", "loop.store=s3://bucket/runs"]
    process = place.start(*argv, hook=SLOW_STEPS, **environment)
    place.wait_for(process, place.loops)
    store.faults["PUT .*"] = 403
    process.terminate()
    process.join()
    assert process.exitcode == 143, place.err()
    assert "warning: the end of this run was not copied" in place.out()
