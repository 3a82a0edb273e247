"""Rows in chunks: the same batches for any chunks and any number of processes, and no half-written cache."""

import json
import os
import tracemalloc
from functools import partial

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import worker_probe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_invalid_rows import all_dirt, clean_rows, with_dirt
from tiny_tokenizers import tiny

from jaxft.data import progress
from jaxft.data.packing import reader
from jaxft.data.packing.pack import number_groups
from jaxft.data.packing.row_cache import Flat, RowNames
from jaxft.data.pairs import PairRows
from jaxft.data.rows import dataset_rows, row_files
from jaxft.data.rows.row_files import loaded
from jaxft.data.sft import Rows

KINDS = {"sft": (Rows, {}), "pairs": (PairRows, {}), "unpaired": (PairRows, {"unpaired": True})}


def in_chunks(monkeypatch, size, rows_of_a_chunk=7):
    for module in (row_files, reader):
        monkeypatch.setattr(module, "ROW_CHUNK_BYTES", size)
    monkeypatch.setattr(row_files, "CHUNK_ROWS", rows_of_a_chunk)


def dirty_file(folder, kind):
    dirt = all_dirt(kind)
    lines = with_dirt(list(clean_rows(kind, 90)), dirt, range(0, 90, 9))
    (folder / "r.jsonl").write_bytes(b"\n".join(lines) + b"\n\n \n")
    return folder / "r.jsonl"


def opened(kind, path, cache, **options):
    make, own = KINDS[kind]
    options = {"max_length": 128, "batch": 4, "invalid": "drop", "invalid_limit": 0.5, **own, **options}
    return make(str(path), **options).open(tiny("chatml"), cache=cache)


def everything(source):
    """All that a run reads from a source."""
    steps = [source.batch(step)[0] for step in range(source.info.steps)]
    names = [source.row_names(step) for step in range(source.info.steps)]
    stats = {**vars(source.info.stats), "cache": None}
    return jax.tree.leaves((steps, source.held_out)), names, stats, source.info


def assert_same(a, b):
    (arrays, *rest), (others, *expected) = everything(a), everything(b)
    assert all(np.array_equal(x, y) for x, y in zip(arrays, others, strict=True))
    assert rest[:2] == expected[:2]
    for name in ("fingerprint", "preview", "warnings", "learned_ends", "steps"):
        assert getattr(rest[2], name) == getattr(expected[2], name)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_any_size_give_the_same_batches(kind, tmp_path, monkeypatch):
    path = dirty_file(tmp_path, kind)
    whole = opened(kind, path, tmp_path / "whole")
    in_chunks(monkeypatch, 500)
    assert len(list(dataset_rows.list_chunks(str(path)).chunks())) > 10
    assert_same(opened(kind, path, tmp_path / "chunks", workers=1), whole)
    assert_same(opened(kind, path, tmp_path / "chunks", workers=1), whole)  # from the cache


def test_several_processes_write_the_same_file_without_jax(tmp_path, monkeypatch):
    path = dirty_file(tmp_path, "sft")
    in_chunks(monkeypatch, 1500)
    opened("sft", path, tmp_path / "one", workers=1)
    opened("sft", path, tmp_path / "two", workers=2)
    (one,), (two,) = ((tmp_path / name / "rows").iterdir() for name in ("one", "two"))
    assert one.name == two.name and one.read_bytes() == two.read_bytes()
    chunks = [loaded((), str(i)) for i in range(9)]
    with (
        pytest.raises(ValueError, match="of 2 processes that tokenise .* set a smaller data.workers"),
        reader.start_workers(2, Rows("r").reader(tiny("chatml"))) as run,
    ):
        assert list(run(worker_probe.modules, chunks)) == [(str(i), []) for i in range(9)]
        list(run(worker_probe.die, chunks))


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.sampled_from(['{"a": 1}', '{"a": "é"}', "", "  ", "[]", '{"a":', "{}"]), max_size=12),
    size=st.integers(1, 40),
    bom=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_lines_are_read_alike_in_chunks_of_any_size(tmp_path_factory, lines, size, bom, end):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * bom + end.join(lines).encode())
    last = max((i for i, line in enumerate(lines) if line.strip()), default=-1)  # blank ones may follow
    with pytest.MonkeyPatch.context() as patch:
        in_chunks(patch, size)
        listing = dataset_rows.list_chunks(str(path))
        outcomes = [row for chunk in listing.chunks() for row in chunk.rows()]
    assert listing.rows == len(outcomes)
    assert [int(row.name.rpartition(":")[2]) for row in outcomes] == list(range(1, last + 2))
    for row, line in zip(outcomes, lines, strict=False):
        expected = line in ('{"a": 1}', '{"a": "é"}')
        assert isinstance(row, row_files.Row) is expected and (not expected or row.fields == json.loads(line))


def test_parquet_and_csv_are_read_in_windows(tmp_path, monkeypatch):
    items = [{"text": f"text {i}", "n": i} for i in range(50)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), tmp_path / "r.parquet", row_group_size=18)
    (tmp_path / "r.csv").write_text("text,n\n" + "".join(f"text {i},{i}\n" for i in range(50)))
    in_chunks(monkeypatch, 10**6)
    sizes = {"parquet": [7, 7, 4, 7, 7, 4, 7, 7], "csv": [7] * 7 + [1]}
    for suffix, first in (("parquet", 1), ("csv", 2)):
        chunks = [
            list(chunk.rows()) for chunk in dataset_rows.list_chunks(str(tmp_path / f"r.{suffix}")).chunks()
        ]
        assert [len(chunk) for chunk in chunks] == sizes[suffix]
        found = [row for chunk in chunks for row in chunk]
        assert [row.name for row in found] == [f"r.{suffix}:{i + first}" for i in range(50)]
        assert [(row.fields["text"], int(row.fields["n"])) for row in found] == [
            (item["text"], item["n"]) for item in items
        ]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_rows_are_in_memory_a_chunk_at_a_time(tmp_path, monkeypatch, suffix):
    """200 rows of 20 kB are 4 MB as Python objects, of which a chunk has 7 rows."""
    path = tmp_path / f"r.{suffix}"
    items = [{"text": f"text {i}", "other": str(i) * (20_000 // len(str(i)))} for i in range(200)]
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, items)))
    elif suffix == "csv":
        path.write_text("\n".join(["text,other", *(",".join(item.values()) for item in items)]))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), path, row_group_size=50)
    in_chunks(monkeypatch, 140_000)
    opened("sft", path, tmp_path / "first", workers=1)  # imports, caches
    tracemalloc.start()
    try:
        opened("sft", path, tmp_path / "second", workers=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3e6, peak


def test_the_format_is_that_of_most_rows_of_all_chunks(tmp_path, monkeypatch):
    texts = [{"text": "a"}] * 5
    prompts = [{"prompt": "q", "completion": f"a{i}"} for i in range(20)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, texts + prompts)))
    in_chunks(monkeypatch, 60)
    stats = opened("sft", tmp_path / "r.jsonl", tmp_path, workers=1).info.stats
    assert [count[:2] for count in stats.invalid] == [("missing column 'prompt'", 5)]
    assert stats.examples + stats.held_out == 20


def test_a_tokenisation_that_ends_early_leaves_no_file_to_read(tmp_path, monkeypatch):
    path = dirty_file(tmp_path, "sft")
    in_chunks(monkeypatch, 1500)
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            assert len(list((tmp_path / "cache" / "rows").glob("*.tmp"))) == 1  # what a killed process leaves
            raise KeyboardInterrupt
        return tokenise_chunk(*args, **kwargs)

    tokenise_chunk = reader.tokenise_chunk
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reader, "tokenise_chunk", interrupted)
        opened("sft", path, tmp_path / "cache", workers=1)
    assert not list((tmp_path / "cache" / "rows").iterdir())
    (tmp_path / "cache" / "rows" / "x.tmp").write_bytes(b"ARROW1")
    assert opened("sft", path, tmp_path / "cache", workers=1).info.stats.cache == "built"


def test_invalid_rows_in_the_cache_are_named_after_the_files_of_the_run(tmp_path):
    """The cache is found again after the rows were moved."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        source = opened("sft", dirty_file(tmp_path / name, "sft"), tmp_path / "cache")
        first = {count.reason: count.first for count in source.info.stats.invalid}["not an object"]
        assert first.startswith(f"{tmp_path / name / 'r.jsonl'}:") and "\n" not in first
    assert source.info.stats.cache == "found"


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(st.integers(-9, 9), max_size=5), min_size=1, max_size=5), st.data())
def test_parts_are_indexed_as_one_array(parts, data):
    whole = np.array([x for part in parts for x in part], np.int64)
    flat = Flat([np.array(part, np.int64) for part in parts])
    assert len(flat) == len(whole) and np.array_equal(np.asarray(flat), whole)
    start, stop = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, len(whole) + 3))
    assert np.array_equal(flat[start:stop], whole[start:stop])
    if len(whole):
        index = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=9)), np.int64)
        assert (
            np.array_equal(flat[index], whole[index])
            and flat[index[:1]].tolist() == whole[index[:1]].tolist()
        )
    assert np.array_equal(np.asarray(flat.concatenate(flat)), np.concatenate([whole, whole]))


def test_pages_of_the_file_are_released_after_each_copy():
    calls = []
    flat = Flat([np.arange(3), np.arange(4)], [partial(calls.append, 1)])
    assert flat[np.array([2, 3, 6])].tolist() == [2, 0, 3] and len(calls) == 1
    assert len(np.asarray(flat)) == 7 and len(calls) == 2
    assert len(flat.concatenate(flat).releases) == 1  # of one file


def test_names_of_rows_are_made_when_they_are_read():
    a = RowNames(["a.jsonl"], Flat([np.zeros(2, int)]), Flat([np.array([1, 3])]))
    b = RowNames(["b", "c:train"], Flat([np.array([1, 0])]), Flat([np.array([5, 6])]))
    both = a.concatenate(b)
    assert list(both) == ["a.jsonl:1", "a.jsonl:3", "c:train:5", "b:6"] and both[-1] == "b:6"
    assert both[1:3] == ["a.jsonl:3", "c:train:5"] and len(both) == 4
    with pytest.raises(IndexError):
        both[4]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=12))
def test_groups_are_numbered_in_order_of_their_first(pairs):
    order = list(dict.fromkeys(pairs))
    assert number_groups(np.array(pairs, np.uint64)).tolist() == [order.index(pair) for pair in pairs]


@pytest.mark.parametrize("terminal", (False, True))
def test_progress_has_rows_done_rate_and_eta_in_few_lines(capsys, monkeypatch, terminal):
    """600 rows in 15 s are 40 per second, so the other 400 take 10 s; nothing is printed in the first 3 s."""
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: terminal)
    clock = iter([0, 1, 4, 4.2, 15, 20])
    with progress.RowProgress("tokenising \x1ba.jsonl", 1000, True, partial(next, clock)) as rows_done:
        for count in (100, 100, 100, 300, 400):
            rows_done.add(count)
    with progress.RowProgress("reading b.csv", None, True, partial(next, iter([0, 4]))) as rows_done:
        rows_done.add(6000)
    with progress.RowProgress("reading c.csv", 9, True, partial(next, iter([0, 4]))) as rows_done:
        rows_done.add(9)  # all of them: no line is needed
    begin, end = ("\r", "\x1b[K") if terminal else ("", "\n")
    first, *others = [
        "tokenising ?a.jsonl: 200 of 1,000 rows, 50 rows/s, eta 0:16",
        "tokenising ?a.jsonl: 600 of 1,000 rows, 40 rows/s, eta 0:10",
        "tokenising ?a.jsonl: 1,000 rows in 0:20, 50 rows/s",
        "reading b.csv: 6,000 rows, 1,500 rows/s",
    ]
    lines = [f"{begin}{line}{end}" for line in (first, *others)]
    last = "\n" * terminal
    assert capsys.readouterr().err == "".join([*lines[:3], last, lines[3], last])


@pytest.mark.parametrize("settings", ({}, {"format": "messages"}))
def test_a_run_reports_the_progress_of_reading_and_tokenising(tmp_path, monkeypatch, capsys, settings):
    path = dirty_file(tmp_path, "sft")
    in_chunks(monkeypatch, 2500)
    monkeypatch.setattr(progress, "FIRST", -1)
    monkeypatch.setattr(progress, "EVERY", 0)
    opened("sft", path, tmp_path / "new", workers=1, **settings)
    lines = capsys.readouterr().err.splitlines()
    count = len(path.read_bytes().rstrip().splitlines())
    chunks = len(list(dataset_rows.list_chunks(str(path)).chunks()))
    phases = [line.partition(":")[0] for line in lines]
    assert phases == ["reading r.jsonl"] * chunks * (not settings) + ["tokenising r.jsonl"] * chunks
    done = [line for line in lines if f": {count} rows in 0:" in line]
    assert chunks > 3 and all(f" of {count} rows, " in line for line in lines if line not in done)
    assert [line.partition(":")[0] for line in done] == list(dict.fromkeys(phases)) and lines[-1] in done
    opened("sft", path, tmp_path / "new", workers=1, **settings)  # from the cache
    assert capsys.readouterr().err == ""


def test_the_number_of_processes_follows_from_the_size(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    assert reader.worker_count(None, 2**20) == 1 and reader.worker_count(None, 2**25) == 6
    assert reader.worker_count(3, 1) == 3
    with pytest.raises(ValueError, match="^data.workers=0; expected at least 1"):
        Rows("r", workers=0)
