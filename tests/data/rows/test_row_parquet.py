"""Small Parquet files that unpack to far more than they are: refused, unless they repeat texts."""

import re
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hub_server import serve_dataset
from parsed_rows import readable_rows

from jaxft.data.rows import dataset_rows, row_parquet
from jaxft.data.rows.dataset_rows import read_rows
from jaxft.data.rows.invalid_rows import InvalidRows
from jaxft.data.rows.row_files import NOT_READ

MIB = 1 << 20
LONG = "a " * (5 * MIB)


def same(value, count):
    """A column whose rows are one value of a dictionary."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), [value])


def nested(count):
    """A row with one list of that many messages, all with the same text."""
    fields = [pyarrow.array(["user"] * count), same("a " * 4000, count)]
    messages = pyarrow.StructArray.from_arrays(fields, ["role", "content"])
    return pyarrow.ListArray.from_arrays([0, count], messages)


def write(path, columns, **settings):
    """Write a file with one row group. Return its path."""
    if not settings.get("use_dictionary", True):
        columns = {name: getattr(c, "dictionary_decode", lambda c=c: c)() for name, c in columns.items()}
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(
        table, path, compression="zstd", row_group_size=max(1, len(table)), **settings
    )
    assert path.stat().st_size < MIB / 2
    return str(path)


PLAIN = {"use_dictionary": False}
DELTA = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
TOTAL, ONCE, ROW = (
    r"takes more than \d+ MiB and more than 500",
    "MiB in memory at once",
    "the row takes more than 16 MiB",
)
BOMBS = {  # for limits of a quarter
    "dictionary": (lambda: {"text": same(LONG, 8000)}, {}, TOTAL),
    "delta": (lambda: {"text": same("a" * MIB, 280)}, DELTA, TOTAL),
    "fixed_length": (lambda: {"text": pyarrow.array([b"a" * MIB] * 280, pyarrow.binary(MIB))}, {}, TOTAL),
    "plain": (lambda: {"text": same("a" * MIB, 100)}, PLAIN, ONCE),
    "cell": (lambda: {"text": ["a " * (10 * MIB), "b"]}, {}, ROW),
    "in_lists": (lambda: {"messages": nested(50_000)}, {}, ROW),
    "numbers": (lambda: {"text": ["a"], "list": constant_list(2_000_000)}, {}, ROW),
    "many_numbers": (lambda: {"text": ["a"], "list": constant_list(10_000_000)}, {}, ONCE),
}
READ = """
import resource, sys
from jaxft.data.rows import row_files, row_parquet
from jaxft.data.rows.dataset_rows import read_rows
for name in ("LINE_BYTES", "ONCE_BYTES", "EXPANDED_BYTES", "TOTAL_BYTES"):
    setattr(row_parquet, name, getattr(row_parquet, name) // 4)
row_files.LINE_BYTES //= 4
import pyarrow.parquet
sizes = dict(line.split(":") for line in open("/proc/self/status"))
limit = (int(sizes["VmSize"].split()[0]) << 10) + (1 << 28)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for ref in sys.argv[1:]:
    try:
        read_rows(ref)
    except ValueError as error:
        print(error)
"""


def constant_list(count):
    """A row with a list of zeros, 1 byte each."""
    return pyarrow.ListArray.from_arrays([0, count], pyarrow.array(np.zeros(count, np.int8)))


def test_a_small_file_that_unpacks_to_too_much_is_refused_within_256_mib(tmp_path):
    """With one line for each file; the limits of jaxft allow 1 GiB."""
    paths = [write(tmp_path / f"{kind}.parquet", make(), **how) for kind, (make, how, _) in BOMBS.items()]
    command = [sys.executable, "-c", READ, *paths]
    lines = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True
    ).stdout.splitlines()
    assert len(lines) == len(BOMBS)
    for path, line, (_, _, reason) in zip(paths, lines, BOMBS.values(), strict=True):
        assert line.startswith(path) and re.search(reason, line), line


def test_a_small_file_behind_a_url_is_refused_as_on_disk(tmp_path):
    write(tmp_path / "bomb.parquet", {"text": same(LONG, 8000)})
    refused = pytest.raises(ValueError, match=rf"bomb\.parquet: row group 0 {TOTAL}")
    with serve_dataset(tmp_path, "org/set") as (endpoint, _), refused:
        read_rows(f"{endpoint}/content/bomb.parquet")


@pytest.mark.parametrize("how", [{}, PLAIN, DELTA], ids=["dictionary", "plain", "delta"])
def test_a_file_that_repeats_a_long_text_loads_in_batches(how, tmp_path):
    """200 MB in a file of less than 0.5 MiB: no chunk, and nothing in Arrow's memory, is as large."""
    count, tools = 10_000, "long description " * 1200
    path = write(tmp_path / "r.parquet", {"text": same(tools, count), "n": range(count)}, **how)
    pool = pyarrow.default_memory_pool()
    listing, before, total = dataset_rows.list_chunks(path), pool.bytes_allocated(), 0
    for chunk in listing.chunks():
        read = list(chunk.rows())
        assert all(row.fields == {"text": tools, "n": total + i} for i, row in enumerate(read))
        assert how or len({id(row.fields["text"]) for row in read}) <= 4  # they share its memory
        assert len(read) * len(tools) <= 64 * MIB and pool.bytes_allocated() - before < 64 * MIB
        total += len(read)
    assert total == count and listing.size > count * len(tools)


def test_many_equal_short_rows_load(tmp_path):
    count = 100_000
    columns = {"prompt": same("hello", count), "completion": same("world", count)}
    chunks = [*dataset_rows.list_chunks(write(tmp_path / "r.parquet", columns)).chunks()]
    assert sum(chunk.size for chunk in chunks) == count
    assert [row.fields for row in chunks[-1].rows()][-1] == {"prompt": "hello", "completion": "world"}


def test_maps_are_read_and_measured(tmp_path, monkeypatch):
    """In a file whose batches are halved, so that maps are sliced."""
    maps = [[(f"{i}", "x" * 500)] * (i % 4) for i in range(200)]
    column = pyarrow.array(maps, pyarrow.map_(pyarrow.string(), pyarrow.string()))
    path = write(tmp_path / "r.parquet", {"n": range(200), "meta": column})
    assert row_parquet.batch_bytes(pyarrow.record_batch([column], ["meta"]).slice(3, 1)) < 2500
    monkeypatch.setattr("jaxft.data.rows.row_files.LINE_BYTES", 20_000)
    assert [row.fields for row in read_rows(path)] == [{"n": i, "meta": m} for i, m in enumerate(maps)]


def test_a_column_of_an_unsupported_type_is_no_damaged_file(tmp_path, monkeypatch):
    def fails(*args):
        raise pyarrow.ArrowNotImplementedError("no kernel")

    path = write(tmp_path / "r.parquet", {"n": range(3)})
    monkeypatch.setattr(row_parquet, "_columns", fails)
    with pytest.raises(ValueError, match=r"not supported \(no kernel\); write it without"):
        read_rows(path)


def test_a_row_above_the_limit_is_invalid_and_the_others_are_read(tmp_path, monkeypatch):
    """In a column of a dictionary, as plain text, and as a list of many numbers."""
    monkeypatch.setattr("jaxft.data.rows.row_files.LINE_BYTES", MIB)
    monkeypatch.setattr("jaxft.data.rows.row_parquet.LINE_BYTES", MIB)
    noise = "".join(chr(65 + i * i % 57) for i in range(2 * MIB))
    columns = {"text": ["a", noise, "b", "c"], "n": [[1], [2], list(range(30_000)), [3]]}
    for dictionary in (True, False):
        path = tmp_path / f"{dictionary}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path, use_dictionary=dictionary)
        invalid = InvalidRows(1.0)
        found = readable_rows(path, invalid)
        assert [(row.name[-1], row.fields) for row in found] == [
            ("1", {"text": "a", "n": [1]}),
            ("4", {"text": "c", "n": [3]}),
        ]
        (count,) = invalid.counts()
        assert count.reason == "too large" and count.rows == 2 and f"{path}:2" in count.first


def test_columns_that_are_not_used_are_not_read(tmp_path):
    columns = {"text": ["a", "b"], "x.y": [1, 2], "list": [[0] * 1000] * 2}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "r.parquet")
    for used, known in ((("text",), {"text"}), (("x.y", "z"), {"x.y"}), (("z",), set())):
        (chunk,) = dataset_rows.list_chunks(str(tmp_path / "r.parquet"), used).chunks()
        expected = [
            {name: (values[i] if name in known else NOT_READ) for name, values in columns.items()}
            for i in range(2)
        ]
        assert [row.fields for row in chunk.rows()] == expected


def test_rows_are_the_same_with_and_without_dictionaries_in_memory(tmp_path, monkeypatch):
    """Long repeated values in lists and structs, with nulls, in batches smaller than a row group."""
    items = [
        {"n": i, "text": None if i % 7 == 3 else f"{i % 3} " * 500,
         "messages": [{"role": "user", "content": "x" * 900}, {"role": None, "content": f"{i}"}] * (i % 3)}
        for i in range(400)
    ]  # fmt: skip
    path = tmp_path / "r.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), path, row_group_size=150)
    plain = read_rows(str(path))
    assert [row.name for row in plain] == [f"r.parquet:{i + 1}" for i in range(400)]
    assert [row.fields["text"] for row in plain] == [item["text"] for item in items]
    encoded = []
    is_long = row_parquet._is_long
    monkeypatch.setattr(row_parquet, "LINE_BYTES", 40_000)
    monkeypatch.setattr(row_parquet, "_is_long", lambda *args: encoded.append(is_long(*args)) or encoded[-1])
    assert read_rows(str(path)) == plain and any(encoded)
