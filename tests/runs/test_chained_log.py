"""Logs with digests: every change of a record is found, and a killed process leaves one that goes on."""

import json
import random

import pytest

from jaxft.runs.metrics_log import Jsonl, add_files, append_entry, check_chain, digests_path, read_unfinished


@pytest.fixture
def record(tmp_path):
    """metrics.jsonl with 8 lines, its digests, and two other files."""
    path = tmp_path / "metrics.jsonl"
    log = Jsonl(path)
    for step in range(8):
        log.log(step, {"loss": 1 / (step + 1)}, {"seconds": step / 3})
    log.close("finished")
    (tmp_path / "config.json").write_text(json.dumps({"seed": 0, "optim": {"lr": 1e-4}}))
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 8, "files": {"adapter/x": "00"}}))
    add_files(path, [tmp_path / "config.json", tmp_path / "summary.json", tmp_path / "absent.json"])
    return path


def test_100_of_100_changes_of_a_record_are_found(record):
    check_chain(record)
    files, rng = sorted(record.parent.iterdir()), random.Random(0)
    assert len(files) == 4
    for _ in range(100):
        path = rng.choice(files)
        content = path.read_bytes()
        at = rng.randrange(len(content))
        path.write_bytes(
            content[:at] + bytes([(content[at] + rng.randrange(1, 256)) % 256]) + content[at + 1 :]
        )
        with pytest.raises(ValueError, match=path.parent.name):
            check_chain(record)
        path.write_bytes(content)
    check_chain(record)


def test_lines_that_are_removed_added_or_moved_are_found(record):
    lines, digests = record.read_bytes().splitlines(keepends=True), digests_path(record).read_bytes()
    for wrong in (
        lines[:-1],
        lines[1:],
        [*lines, lines[-1]],
        [*lines[:2], lines[3], lines[2], *lines[4:]],
        [],
    ):
        record.write_bytes(b"".join(wrong))
        with pytest.raises(ValueError, match="metrics.jsonl"):
            check_chain(record)
    record.write_bytes(b"".join(lines))
    for count in range(1, 10):  # digests without their last lines
        digests_path(record).write_bytes(b"".join(digests.splitlines(keepends=True)[:count]))
        if count >= 8:  # of files alone: the log itself is whole
            check_chain(record)
            continue
        with pytest.raises(ValueError, match="expected"):
            check_chain(record)
    digests_path(record).unlink()
    with pytest.raises(FileNotFoundError, match="no such file; restore it"):
        check_chain(record)


def test_a_resumed_log_has_the_digests_of_one_that_was_never_stopped(record, tmp_path):
    whole = (tmp_path / "metrics_digests.jsonl").read_bytes().splitlines()[:8]
    record.write_bytes(record.read_bytes() + b'{"step": 8, "lo')
    log = Jsonl(record, start_step=4)
    for step in range(5, 8):
        log.log(step, {"loss": 1 / (step + 1)}, {"seconds": step / 3})
    log.close("finished")
    check_chain(record)
    assert (tmp_path / "metrics_digests.jsonl").read_bytes().splitlines() == whole


def test_resuming_does_not_hide_a_change(record):
    record.write_bytes(record.read_bytes().replace(b"0.5", b"0.4", 1))
    Jsonl(record, start_step=7).close("finished")
    with pytest.raises(ValueError, match="metrics.jsonl:2: the line was changed"):
        check_chain(record)


def test_a_line_that_a_killed_process_left_without_digest_is_removed(tmp_path):
    path = tmp_path / "study.jsonl"
    append_entry(path, {"wave": 0})
    for rest in (b'{"wave": 1, "sc', b'{"wave": 1}\n'):
        path.write_bytes(path.read_bytes() + rest)
        assert read_unfinished(path) == [{"wave": 0}]
    append_entry(path, {"wave": 1})
    assert read_unfinished(path) == [{"wave": 0}, {"wave": 1}]
    check_chain(path)
    path.write_bytes(path.read_bytes().replace(b"0", b"2"))
    with pytest.raises(ValueError, match="study.jsonl:1: the line was changed"):
        read_unfinished(path)
