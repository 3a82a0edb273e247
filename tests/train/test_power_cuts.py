"""What a run announces is on disk: checkpoints when they get their name, results when the summary does."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import disk_log
import pytest
import rl_workdir
import system_calls
import tiny_run
from prepared import resume
from tiny_run import Place, write_place

from jaxft.distributed import disk
from jaxft.weights.hf import complete_folders

WORST = ["loop.best_metric=eval_loss", "loop.greater_is_better=true"]  # so that best/ is written, from step 1
ARGV = ["steps=3", "samples=0", "full=true", "loop.eval_every=1", *WORST]
WATCH = """
import disk_log
def report(line):
    with open("announced", "a") as file:
        file.write(line + "\\n")
log = disk_log.record((), report)
from jaxft.train import loop
run = loop.run
def run_and_look(*args, **more):
    code = run(*args, **more)
    report(f"owed: {' '.join(log.owed) or 'nothing'}")
    return code
loop.run = run_and_look
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The place of a finished run, "x", whose renames were watched."""
    folder = tmp_path_factory.mktemp("cuts")
    write_place(folder)
    place = Place(folder)
    assert place.run(*ARGV, "name=x", hook=WATCH) == 0, place.err()
    return place


def test_python_syncs_every_file_before_its_checkpoint_or_summary_has_its_name(finished):
    """Python's own os.fsync and renames only; the next test has the system calls of everybody."""
    lines = (finished.folder / "announced").read_text().splitlines()
    assert lines == [
        *(f"{step}: on disk" for step in (1, 2, 3)),
        "summary.json: on disk",
        "owed: nothing",
    ]


@pytest.mark.slow
def test_system_calls_sync_every_file_before_its_checkpoint_or_summary_has_its_name(tmp_path):
    """Writes, syncs and renames as the kernel gets them, those of Orbax's and TensorStore's threads too."""
    reason = system_calls.strace_failure()
    if reason:
        pytest.skip(reason)
    write_place(tmp_path)
    train = [sys.executable, str(tiny_run.ROOT / "scripts" / "train.py"), "--config", "config.py"]
    command = system_calls.traced([*train, *ARGV, "name=x"], str(tmp_path / "calls"))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tiny_run.ROOT)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    seen, run = [], tmp_path / "runs" / "x"

    def announced(calls, source, target):
        is_step = target.parent == run / "checkpoints" and target.name.isdigit()
        if not is_step and target != run / "summary.json":
            return
        owed = calls.owed_in(source if is_step else run)
        owed |= {path: calls.owed.get(path, []) for path in (run, run.parent)}
        if is_step:  # the log may have grown since
            log = calls.owed.get(run / "metrics.jsonl", [])
            owed[run / "metrics.jsonl"] = [
                x for x in log if int(re.findall(r"\d+", x)[0]) <= int(target.name)
            ]
        owed = {path: [x for x in owed[path] if not x.endswith((".part", ".tmp"))] for path in owed}
        live = run / "tensorboard"  # is not announced
        owed = {path: x for path, x in owed.items() if x and path != live and live not in path.parents}
        seen.append((target.name, owed))

    calls = system_calls.SystemCalls(tmp_path, announced)
    calls.follow((tmp_path / "calls").read_text(errors="replace").splitlines())
    assert seen == [(name, {}) for name in ("1", "2", "3", "summary.json")]
    assert calls.owed[run] == []


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_writes_damaged_results_again_and_reports_lost_entries(finished):
    run = finished.runs("x")
    before = {name: files_of(run / name) for name in ("model", "best/model")}
    assert all(before.values())
    summary = (run / "summary.json").read_bytes()
    (run / "model" / "model.safetensors").write_bytes(b"")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(
        "".join(line for line in lines if json.loads(line)["step"] not in (1, 2))
    )
    assert finished.run(*ARGV, "name=x") == 0, finished.err()
    out = finished.out()
    assert "model.safetensors: the file has changed since the run was finished" in out
    assert "warning: runs/x/metrics.jsonl has lost steps 1-2; the log goes on without them" in out
    assert "runs/x/model is renamed to model.bad: the results are written again from the checkpoint" in out
    changed = before["model"] | {Path("model.safetensors"): b""}  # perhaps by hand: nothing of it is lost
    assert files_of(run / "model.bad") == changed
    assert {name: files_of(run / name) for name in before} == before
    assert json.loads((run / "summary.json").read_bytes())["files"] == json.loads(summary)["files"]
    assert resume(finished.folder, *ARGV, "name=x") == (3, [])
    (run / "config.json").unlink()
    log = (run / "metrics.jsonl").rename(run / "moved")
    assert finished.run(*ARGV, "name=x") == 0, finished.err()
    out = finished.out()
    assert "config.json: no such file; written again" in out and (run / "config.json").is_file()
    assert "warning: runs/x/metrics.jsonl: no such file; the log of this run is lost" in out
    log.rename(run / "metrics.jsonl")


def test_results_that_are_gone_with_their_checkpoints_are_one_error(finished, tmp_path):
    run, names = finished.runs("x"), ("model", "checkpoints")
    for name in names:
        shutil.move(run / name, tmp_path / name)
    remedy = (
        r"^runs/x/model/\S+: no such file, .* no checkpoint .* delete runs/x/summary.json to train again$"
    )
    with pytest.raises(FileNotFoundError, match=remedy):
        resume(finished.folder, *ARGV, "name=x")
    for name in names:
        shutil.move(tmp_path / name, run / name)


def test_a_new_folder_and_a_file_are_on_disk_before_they_have_their_name(tmp_path, monkeypatch):
    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, getattr(os, name))  # undone at the end
    out, file, lines = tmp_path / "a" / "b" / "out", tmp_path / "model.gguf", []
    log = disk_log.record((str(out), str(file)), lines.append)
    with complete_folders.new_folder(out) as part:
        (part / "inner").mkdir(parents=True)
        (part / "inner" / "weights").write_bytes(b"1")
        (part / "config").write_text("2")
    file.with_suffix(".part").write_bytes(b"3")
    disk.publish(file.with_suffix(".part"), file)
    assert lines == ["out: on disk", "model.gguf: on disk"] and not log.owed
    assert log.lost(out) == [] and log.lost(tmp_path / "a") == []
    (out / "config").write_text("changed")
    assert log.lost(out) == [out / "config"]  # the log can tell


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    disk.write_durably(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device.*config.json'$"):
        disk.write_durably(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# Power cuts on a copy of a block device. What has not reached the device when it is copied is lost.

PAUSE = """
import os, time
from pathlib import Path
from jaxft.runs import checkpoint, folder
witness = Path(os.environ["WITNESS"])
def cut(name):
    (witness / name).write_text("")
    while not (witness / f"{name}.cut").exists():
        time.sleep(0.01)
publish, write = checkpoint.Checkpoints._publish, folder.write_durable_json
def publish_and_cut(self, step):
    publish(self, step)
    cut(str(step))
def write_and_cut(path, value):
    write(path, value)
    if path.name == "summary.json":
        cut("finished")
checkpoint.Checkpoints._publish, folder.write_durable_json = publish_and_cut, write_and_cut
"""
RUNS = {  # name: (folder, arguments, the last step)
    "lora": ("sft", ["steps=4", "samples=0", "loop.keep_last=1", "loop.eval_every=2"], (1, 2, 3, 4)),
    "full": ("sft", ["steps=4", "samples=0", "full=true", "loop.keep_last=2"], (1, 2, 3, 4)),
    "grpo": ("rollouts", ["steps=4", "passes=2", "save=2", "rewards=config.py:ascii"], (2, 4)),
}
EXPORTS = {
    "merged": ["export.py", "--run", "runs/lora", "--out", "merged"],
    "file.gguf": ["export.py", "--run", "runs/lora", "--out", "file.gguf", "--gguf", "F16", "--adapter-only"],
    "packed": ["export.py", "--run", "runs/lora", "--out", "packed", "--pack", "int8"],
    "low": ["extract.py", "base", "runs/full/model", "--rank", "2", "--out", "low"],
}


def command(*argv):
    return subprocess.run([str(a) for a in argv], check=True, capture_output=True, text=True)


class Device:
    """An ext4 file system on a loop device, and copies of it."""

    def __init__(self, folder):
        self.folder, self.image, self.mounted = folder, folder / "disk.img", []
        try:
            command("truncate", "-s", "256M", self.image)
            command("mkfs.ext4", "-q", "-F", self.image)
            self.root = self.mount(self.image, "disk")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no ext4 image can be mounted here: {error}")

    def mount(self, image, name):
        (self.folder / name).mkdir()
        command("mount", "-o", "loop", image, self.folder / name)
        self.mounted.append(self.folder / name)
        return self.folder / name

    def unmount(self, folder):
        command("umount", "-l", folder)
        self.mounted.remove(folder)

    def writes(self):
        """The number of writes to the device so far."""
        device = command("findmnt", "-n", "-o", "SOURCE", self.root).stdout.strip()
        return Path(f"/sys/block/{Path(device).name}/stat").read_text().split()[4]

    def cut(self, name):
        """Copy the device as it is at one moment."""
        while True:
            before = self.writes()
            command("cp", "--sparse=always", self.image, self.folder / f"{name}.img")
            if self.writes() == before:
                return


@pytest.fixture
def device(tmp_path):
    own = Device(tmp_path)
    yield own
    for folder in list(own.mounted):
        with contextlib.suppress(subprocess.CalledProcessError):
            own.unmount(folder)


def script(place, *argv):
    """Run another script of jaxft in a place."""
    for name in ("stdout", "stderr"):
        (place.folder / f"{place.streams}.{name}").write_bytes(b"")
    arguments = (place.folder, place.streams, list(argv), {"HOOK": ""}, 1)
    process = tiny_run.SERVER.Process(target=tiny_run.child, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0, place.err()


def cut_run(device, witness, name):
    """Train a run; cut the power after everything that it announces, and 6 s after its end: by then names are
    on the device, and the content of files that nobody synced is not. Return the names of the cuts.
    """
    folder, argv, steps = RUNS[name]
    place, seen = Place(device.root / folder), witness / name
    seen.mkdir()
    process = place.start(*argv, f"name={name}", hook=PAUSE, WITNESS=str(seen))
    cuts = []
    for event in (*map(str, steps), "finished"):
        place.wait_for(process, (seen / event).exists, 300)
        assert process.is_alive(), place.err()
        device.cut(f"{name}-{event}")
        (seen / f"{event}.cut").write_text("")
        cuts.append((name, event))
    process.join()
    assert process.exitcode == 0, place.err()
    time.sleep(6)
    device.cut(f"{name}-later")
    return [*cuts, (name, "later")]


@pytest.mark.slow
def test_twenty_power_cuts_lose_nothing_that_was_announced(device, tmp_path_factory):
    witness, lost = tmp_path_factory.mktemp("witness"), []
    for name, write in (("sft", write_place), ("rollouts", rl_workdir.write_workdir)):
        (device.root / name).mkdir()
        write(device.root / name)
    command("sync")
    cuts = [cut for name in RUNS for cut in cut_run(device, witness, name)]
    place = Place(device.root / "sft")
    for name, argv in EXPORTS.items():
        script(place, *argv)
        device.cut(f"export-{name}")
        cuts.append(("export", name))
    assert len(cuts) == 20
    for name, event in cuts:
        copy = device.mount(device.folder / f"{name}-{event}.img", f"{name}-{event}")
        if name == "export":
            out, other = (folder / "sft" / event for folder in (copy, device.root))
            same = (
                files_of(out) == files_of(other) if other.is_dir() else out.read_bytes() == other.read_bytes()
            )
            said = [] if out.exists() and same else ["it is not what was written"]
        else:
            said = after_cut(
                Place(copy / RUNS[name][0], "after"), Place(device.root / RUNS[name][0]), name, event
            )
        device.unmount(copy)
        (device.folder / f"{name}-{event}.img").unlink()
        print(name, event, said or "nothing lost", flush=True)
        lost += [(name, event, line) for line in said]
    assert not lost


def after_cut(place, whole, name, event):
    """Lines about what a run has lost that was announced before a cut; the same command is run again."""
    _, argv, steps = RUNS[name]
    code, out = place.run(*argv, f"name={name}"), place.out()
    said = [line for line in out.splitlines() if "corrupt" in line or "has lost" in line or "again" in line]
    expected = (
        f"resuming after step {event}" if event.isdigit() else f"this run is finished ({steps[-1]} steps)"
    )
    said = [line for line in said if "to start again, choose" not in line]
    if code or expected not in out:
        said.append(f"exit code {code}, expected {expected!r}: {out[-500:]} {place.err()[-500:]}")
    elif place.results(name, steps[-1]) != whole.results(name, steps[-1]):
        said.append("the results are others")
    return said
