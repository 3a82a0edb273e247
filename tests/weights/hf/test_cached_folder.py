"""Folders of the cache and temporary files: complete, on disk, verified, and removed after a kill."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import tiny_torch, write_folder

from jaxft.data.packing import row_cache
from jaxft.distributed import disk
from jaxft.distributed.disk import temporary_folder
from jaxft.nn.quant import Quant, quantize
from jaxft.runs import run_record
from jaxft.train.recipes import ModelKnobs
from jaxft.weights.edit import calibrated_base, extended_model
from jaxft.weights.edit.extended_model import Extension, extended_ref
from jaxft.weights.hf import complete_folders
from jaxft.weights.hf.complete_folders import (
    HASHES,
    cached_folder,
    content_sha256,
    file_sha256,
    folder_damage,
    new_folder,
)

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def flip(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def write(out, content=b"content"):
    with cached_folder(out) as part:
        part.mkdir()
        (part / "a.bin").write_bytes(content)
        (part / "inner").mkdir()
        (part / "inner" / "b.json").write_text("{}")


def test_a_folder_of_the_cache_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events, out = [], tmp_path / "cache" / "kind" / "made"
    fsync, replace = os.fsync, Path.replace

    def synced(fd):
        events.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def named(path, target):
        events.append(("name", target.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", named)
    write(out)
    at = events.index(("name", "made"))
    assert {Path(event).name for event in events[:at] if isinstance(event, str)} >= {
        "a.bin",
        "b.json",
        HASHES,
        "made",
    }
    assert events[at + 1 :] == [str(out.parent)]


@pytest.mark.parametrize("name", ["a.bin", "inner/b.json", HASHES])
@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(b""), Path.unlink])
def test_a_damaged_folder_is_noticed_and_replaced_and_a_good_one_stays(tmp_path, name, damage):
    out = tmp_path / "cache" / "kind" / "made"
    write(out, b"first")
    assert folder_damage(out) is None
    write(out, b"later")  # another process was faster
    assert (out / "a.bin").read_bytes() == b"first"
    damage(out / name)
    assert str(out if name == HASHES else out / name) in folder_damage(out)
    write(out, b"again")
    assert folder_damage(out) is None and (out / "a.bin").read_bytes() == b"again"
    assert [path.name for path in out.parent.iterdir()] == ["made"]


def test_an_error_of_the_cache_names_it_and_one_of_the_content_is_itself(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match="cannot be written.*set JAXFT_CACHE"):
        write(tmp_path / "cache" / "kind" / "made")
    with pytest.raises(FileNotFoundError, match="base/config.json"), cached_folder(tmp_path / "other"):
        raise FileNotFoundError("base/config.json")


# ---- what uses it


def write_codes(number=0):
    weights = np.random.default_rng(number).normal(size=(64, 64)).astype(np.float32)
    q = jax.tree.map(np.asarray, quantize(jnp.asarray(weights), "nf4", 32))
    layer = calibrated_base.CalibratedLayer({"model.layers.0.mlp.up_proj.weight": q}, {})
    return list(calibrated_base.write_codes("some", Quant("nf4", block=32), lambda: iter([layer])))


def test_calibrated_codes_are_verified_when_they_are_opened_and_written_again(cache):
    assert write_codes() == [1] and write_codes(1) == []
    file = cache / "calibrated" / "some" / "layer-00000.safetensors"
    before, sha256 = file.read_bytes(), calibrated_base.codes_sha256("some")
    assert len(calibrated_base.open_codes("some").quantised) == 1
    for damage in (flip, lambda path: path.write_bytes(b"")):
        damage(file)
        with pytest.raises(ValueError, match="cannot be used: .*layer-00000.*Start the run's command again"):
            calibrated_base.open_codes("some")
        assert str(file) in calibrated_base.codes_damage("some")
        assert write_codes() == [1]
        assert file.read_bytes() == before and calibrated_base.codes_sha256("some") == sha256
        assert len(calibrated_base.open_codes("some").quantised) == 1


def test_a_finished_run_is_not_used_with_other_codes_than_its_own(cache, tmp_path):
    write_codes()
    run = tmp_path / "run"
    run.mkdir()
    record = {"codes": "some", "sha256": calibrated_base.codes_sha256("some")}
    (run / run_record.CALIBRATED_JSON).write_text(json.dumps(record))
    settings = {"weights": "base", "weights_path": None}
    assert run_record._base_weights(run, settings) == "base"
    flip(cache / "calibrated" / "some" / "layer-00000.safetensors")
    with pytest.raises(ValueError, match="calibrated base in the cache.* has changed since this run"):
        run_record._base_weights(run, settings)


def test_codes_without_the_hashes_of_their_files_are_refused_and_computed_again(cache):
    write_codes()
    out = cache / "calibrated" / "some"
    hashes = (out / HASHES).read_bytes()
    (out / HASHES).unlink()
    with pytest.raises(ValueError, match="files.json is missing"):
        calibrated_base.open_codes("some")
    assert write_codes() == [1] and (out / HASHES).read_bytes() == hashes
    assert len(calibrated_base.open_codes("some").quantised) == 1


def test_a_bit_that_the_disk_has_flipped_is_noticed_on_use_although_no_time_has_changed(cache, tmp_path):
    """A bad sector changes no times: the cached hash, which is of these, is still used."""
    write_codes()
    file, run = cache / "calibrated" / "some" / "layer-00000.safetensors", tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    result = run / "adapter" / "adapter_model.safetensors"
    result.write_bytes(b"weights" * 100)
    run_record.write_durable_json(run / "summary.json", {"steps": 4, "files": run_record.result_hashes(run)})
    for path in (file, result):
        os.utime(path, (time.time() - 60,) * 2)
        before = file_sha256(path)
        flip(path)
        entry = [complete_folders._version(path), before]
        key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
        (cache / "hashes" / f"{key}.json").parent.mkdir(exist_ok=True)
        (cache / "hashes" / f"{key}.json").write_text(json.dumps(entry))
        assert file_sha256(path) == before != content_sha256(path)
    assert str(file) in calibrated_base.codes_damage("some")
    with pytest.raises(ValueError, match="adapter_model.safetensors: the file has changed"):
        run_record.check_results(run / "adapter")


def test_a_model_with_new_tokens_is_verified_at_each_start_and_written_again(tmp_path, capsys, monkeypatch):
    base = str(write_folder(tmp_path / "base", tiny_torch()))
    knobs = ModelKnobs(base, add_tokens=("<tool>",))
    out = Path(knobs.weights)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    fingerprint = run_record.weights_fingerprint(str(out))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(extended_model, "extend_model", None)  # not called
        assert knobs.weights == str(out) and not capsys.readouterr().err
    flip(out / "model.safetensors")
    settings = {"weights": str(out), "weights_fingerprint": fingerprint}
    with pytest.raises(ValueError, match="start the run's command again, which writes them"):
        run_record._base_weights(tmp_path, settings)
    assert knobs.weights == str(out)
    said = f"{out / 'model.safetensors'} has changed since it was written; it is written again"
    assert said in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    flip(out / "tokenizer.json")
    with pytest.raises(ValueError, match="tokenizer.json has changed .*Start the run's command again"):
        run_record._base_weights(tmp_path, settings)
    linked = Path(extended_ref(base, Extension(template="chatml"))[0])
    assert folder_damage(linked) is None
    assert set(json.loads((linked / HASHES).read_text())) == {
        path.name for path in linked.iterdir() if not path.is_symlink() and path.name != HASHES
    }


# ---- temporary files


HOLD = """
import sys, time
from pathlib import Path
from jaxft.distributed.disk import temporary_folder
from jaxft.weights.hf import complete_folders
from jaxft.weights.hf.complete_folders import new_folder
path = Path(sys.argv[1])
with (temporary_folder(path, "jaxft-push-") as folder, new_folder(path / "out") as part,
      temporary_folder(path, ".new-") as other):
    for one in (folder / "merged", part, other / "made"):
        one.mkdir()
        (one / "file").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_the_next_command_removes_what_a_killed_one_left_and_nothing_of_a_living_one(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"

    def left():
        prefixes = ("jaxft-push-", ".out-jaxft-", ".new-")
        return [sum(path.name.startswith(prefix) for path in tmp_path.iterdir()) for prefix in prefixes]

    def use():
        with (
            temporary_folder(tmp_path, "jaxft-push-"),
            new_folder(tmp_path / "out") as part,
            cached_folder(tmp_path / "made") as other,
        ):
            part.mkdir()
            other.mkdir()
        (tmp_path / "out").rmdir()

    assert left() == [1, 1, 1]
    use()
    assert left() == [1, 1, 1]
    process.kill()
    process.communicate()
    assert left() == [1, 1, 1]
    use()
    assert left() == [0, 0, 0]


def test_leftovers_are_removed_by_their_owner_alone_and_without_locks_after_a_day(tmp_path, monkeypatch):
    def present():
        disk.remove_leftovers(tmp_path.glob("*.tmp"))
        return sorted(path.name.partition(".")[0] for path in tmp_path.glob("*.tmp"))

    def file(name):
        return tmp_path / f"{name}.{disk.here()}-1.tmp"

    (tmp_path / "linked").write_text("content")
    file("link").symlink_to(tmp_path / "linked")
    file("new").touch()  # is about to be locked
    file("a").write_text("half")
    (tmp_path / "a.other-1.tmp").write_text("half")  # of another machine
    with disk.owned(file("a")):
        assert present() == ["a", "a", "link", "new"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: os.geteuid() + 1)
        assert len(present()) == 4
    with monkeypatch.context() as patch:

        def without_locks(*args):
            raise OSError("no locks")

        patch.setattr(disk.fcntl, "flock", without_locks)
        assert len(present()) == 4
        os.utime(file("a"), (time.time() - 25 * 3600,) * 2)
        assert present() == ["a", "link", "new"]
    os.utime(file("new"), (time.time() - 60,) * 2)
    assert present() == ["a", "link"]
    os.utime(tmp_path / "a.other-1.tmp", (time.time() - 25 * 3600,) * 2)
    assert present() == ["link"] and (tmp_path / "linked").read_text() == "content"


def test_an_unfinished_file_of_rows_is_owned_while_it_is_written(tmp_path):
    """Another process may tokenise rows into the same folder."""
    path, columns = tmp_path / "rows" / "a.rows", {"n": row_cache.ColumnType(np.int32)}

    def make(add):
        disk.remove_leftovers(path.parent.glob("*.tmp"))
        assert len(list(path.parent.glob("*.tmp"))) == 1
        add({"n": np.arange(3)})
        return {}

    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / f"killed.{disk.here()}-1.tmp").write_bytes(b"ARROW1")
    _, state = row_cache.load_or_make(path, columns, make)
    assert state == "built" and [p.name for p in path.parent.iterdir()] == ["a.rows"]
