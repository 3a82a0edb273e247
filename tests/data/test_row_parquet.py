"""Small Parquet files that unpack to far more than they are: refused before it takes memory."""

import time

import pyarrow
import pyarrow.parquet
import pytest
from hub_server import serve_dataset

from jaxft.data import row_parquet, rows
from jaxft.data.invalid import InvalidRows
from jaxft.data.row_files import NOT_READ
from jaxft.data.rows import read_rows

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


BOMBS = {
    "dictionary": lambda: {"text": same(LONG, 8000)},
    "in_lists": lambda: {"messages": nested(200_000)},
    "cell": lambda: {"text": ["a " * (40 * MIB), "b"]},
    "nulls": lambda: {"text": pyarrow.nulls(10_000_000, pyarrow.string())},
    "numbers": lambda: {"text": ["a"], "list": [[0] * 6_000_000]},
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_that_unpacks_to_too_much_is_refused_without_the_memory(kind, tmp_path, request):
    columns = BOMBS[kind]()
    count = len(next(iter(columns.values())))
    path = tmp_path / "bomb.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd", row_group_size=count)
    del columns
    assert path.stat().st_size < MIB / 4
    pool = pyarrow.proxy_memory_pool(before := pyarrow.default_memory_pool())
    pyarrow.set_memory_pool(pool)
    request.addfinalizer(lambda: pyarrow.set_memory_pool(before))
    begin = time.monotonic()
    with serve_dataset(tmp_path, "org/set") as (endpoint, _):
        for ref in (str(path), f"{endpoint}/content/bomb.parquet"):
            with pytest.raises(ValueError, match=r"bomb\.parquet: row group 0 takes more than \d+ MiB"):
                read_rows(ref)
    assert pool.max_memory() <= 100 * MIB and time.monotonic() - begin < 60


def test_a_row_above_the_limit_is_invalid_and_the_others_are_read(tmp_path, monkeypatch):
    """In a column of a dictionary, as plain text, and as a list of many numbers."""
    monkeypatch.setattr("jaxft.data.row_files.LINE_BYTES", MIB)
    monkeypatch.setattr("jaxft.data.row_parquet.LINE_BYTES", MIB)
    noise = "".join(chr(65 + i * i % 57) for i in range(2 * MIB))
    columns = {"text": ["a", noise, "b", "c"], "n": [[1], [2], list(range(30_000)), [3]]}
    for dictionary in (True, False):
        path = tmp_path / f"{dictionary}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path, use_dictionary=dictionary)
        invalid = InvalidRows(1.0)
        found = read_rows(str(path), invalid)
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
        (chunk,) = rows.list_chunks(str(tmp_path / "r.parquet"), used).chunks()
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
    monkeypatch.setattr(row_parquet, "RATIO", 10**6)
    monkeypatch.setattr(row_parquet, "_is_long", lambda *args: encoded.append(is_long(*args)) or encoded[-1])
    assert read_rows(str(path)) == plain and any(encoded)
