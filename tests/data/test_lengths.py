"""Lengths of rows before any limit: what each limit keeps is what a source opened with it has."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_tokenizers import tiny

from jaxft.data import inspection
from jaxft.data.inspection import limit_alarms, limit_costs, measure, percentile
from jaxft.data.pairs import PairRows
from jaxft.data.prompts import Prompts, split_prompts
from jaxft.data.rows.dataset_rows import list_chunks, sampled
from jaxft.data.rows.row_files import ROW_CHUNK_BYTES
from jaxft.data.sft import Rows
from jaxft.data.source import SourceStats

LENGTHS = [(3 + 7 * i % 40, 2 + 5 * i % 60) for i in range(60)]  # characters, and so about as many tokens


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "r.jsonl", [{"prompt": "a" * p, "completion": "b" * c} for p, c in LENGTHS])


@pytest.fixture
def pairs(tmp_path):
    made = [{"prompt": "a" * p, "chosen": "b" * c, "rejected": "d" * (c % 9 + 1)} for p, c in LENGTHS]
    return write(tmp_path / "pairs.jsonl", made)


def test_lengths_are_those_without_a_limit(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"prompt": "a" * 50, "completion": "b" * 30}, {"text": "c" * 9}][:1])
    found = measure(Rows(path, format="plain", max_length=8, held_out="none"), tiny("none"), tmp_path)
    # a byte is a token; <s> begins the prompt and </s> ends the response
    assert (found.prompts.tolist(), found.responses.tolist(), found.targets.tolist()) == ([51], [[31]], [31])
    assert found.longest.tolist() == [82] and found.covered(81) == 0 and found.covered(82) == 1


def test_a_response_that_a_row_does_not_have_has_no_length(tmp_path):
    made = [{"prompt": "a", "completion": "b" * n, "label": n > 3} for n in (2, 4, 6)]
    data = PairRows(write(tmp_path / "kto.jsonl", made), format="plain", max_length=64, held_out="none")
    parts = measure(data, tiny("none"), tmp_path).parts
    assert (sorted(parts["chosen"]), parts["rejected"].tolist()) == ([5, 7], [3])


def test_no_limit_that_is_proposed_exceeds_the_models_context(rows, tmp_path):
    data = Rows(rows, format="plain", max_length=12, held_out="none", too_long="truncate")
    found = measure(data, tiny("none"), tmp_path)
    assert max(cost.limit for cost in limit_costs(data, found)) > 40
    assert max(cost.limit for cost in limit_costs(data, found, 40)) == 40
    stats = data.open(tiny("none"), cache=tmp_path).info.stats
    (text,) = limit_alarms(data, stats, tiny("none"), 40)
    assert "max_length=40 covers" in text and "99 %" not in text


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
@pytest.mark.parametrize("limit", [12, 40, 64])
def test_what_a_limit_keeps_is_what_a_source_with_it_has(rows, pairs, tmp_path, limit, too_long):
    for make, path in ((Rows, rows), (PairRows, pairs)):
        options = {"format": "plain", "held_out": "none", "too_long": too_long, "max_length": limit}
        data = make(path, batch=60, **options)
        stats = data.open(tiny("none"), cache=tmp_path).info.stats
        (cost,) = [x for x in limit_costs(data, measure(data, tiny("none"), tmp_path)) if x.limit == limit]
        assert (cost.dropped, cost.truncated, cost.tokens) == (stats.dropped, stats.truncated, stats.tokens)
        assert stats.dropped + stats.truncated and cost.whole + cost.truncated == stats.examples


def test_a_limit_of_prompts_leaves_out_what_a_source_leaves_out(rows, tmp_path):
    data = Prompts(rows, format="plain", held_out="none", max_prompt=20, group=2, max_new=8)
    train, _ = split_prompts(data, tiny("none"), tmp_path)
    found = measure(data, tiny("none"), tmp_path)
    (cost,) = [x for x in limit_costs(data, found) if x.limit == 20]
    assert (
        cost.dropped == train.split.rows.dropped > 0
        and cost.tokens == train.lengths.sum() + len(train) * 2 * 8
    )
    assert len(found.answers) == len(LENGTHS) and found.answers.max() == max(c for _, c in LENGTHS)


def test_invalid_rows_have_no_length(tmp_path):
    path = write(
        tmp_path / "r.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}]
    )
    found = measure(Rows(path, format="plain"), tiny("none"), tmp_path)
    assert len(found) == 1


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_an_alarm_names_a_limit_that_has_none(rows, tmp_path, too_long, monkeypatch):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))

    def alarms(limit):
        data = Rows(rows, format="plain", held_out="none", too_long=too_long, max_length=limit)
        return limit_alarms(data, data.open(tiny("none")).info.stats, tiny("none"))

    (text,) = alarms(40)
    assert "more tokens than max_length=40. max_length=128 covers 99 %" in text
    assert ("data.too_long=drop" in text) == (too_long == "truncate") and "left out" in text
    assert alarms(128) == []


def test_an_alarm_about_dropped_prompts_has_their_fraction(rows):
    data = Prompts(rows, format="plain", held_out="none", max_prompt=20)
    few = SourceStats(examples=80, held_out=10, dropped=10, invalid=(), largest_id=1, summary="", learned="")
    assert limit_alarms(data, few, tiny("none")) == []
    many = SourceStats(examples=7, held_out=0, dropped=93, invalid=(), largest_id=1, summary="", learned="")
    (text,) = limit_alarms(data, many, tiny("none"))
    assert text.startswith("93 % of the prompts are left out") and "max_prompt=64 covers 99 %" in text


def test_a_percentile_is_a_count_that_occurs():
    assert [percentile([1, 2, 10], p) for p in (0, 33, 34, 67, 100)] == [1, 1, 2, 10, 10]


def write_as(kind, path, count):
    """Write rows 0, 1, ... with short texts of one length."""
    texts = [f"{i:07d}" for i in range(count)]
    if kind == "jsonl":
        return write(path / "r.jsonl", ({"text": text} for text in texts))
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path / "r.parquet", row_group_size=count // 3)
    elif kind == "csv":
        (path / "r.csv").write_text("text\n" + "".join(f"x{text}\n" for text in texts))
    else:
        (path / "r.json").write_text(json.dumps([{"text": text} for text in texts]))
    return str(path / f"r.{kind}")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "json"])
def test_a_sample_has_so_many_rows_at_even_distances(tmp_path, kind):
    path = write_as(kind, tmp_path, 1000)
    listing, total = sampled(path, list_chunks(path), 90)
    rows = [row for chunk in listing.chunks() for row in chunk.rows()]
    numbers = np.array([int(row.fields["text"].lstrip("x")) for row in rows])
    assert len(numbers) == listing.rows == 90 and total == 1000
    assert (np.diff(numbers) > 0).all() and np.diff(numbers).max() <= 16 and numbers[-1] - numbers[0] > 970
    whole, total = sampled(path, list_chunks(path), 1000)
    assert sum(1 for chunk in whole.chunks() for _ in chunk.rows()) == total == 1000


def test_a_sample_of_a_large_file_reads_a_part_of_it(tmp_path):
    count = 40 * ROW_CHUNK_BYTES // 50_000
    path = write(tmp_path / "r.jsonl", ({"text": f"{i:050000d}"} for i in range(count)))
    whole = list_chunks(path)
    listing, total = sampled(path, whole, 10)
    names = [row.name for chunk in listing.chunks() for row in chunk.rows()]
    assert (len(names), total) == (10, count) and len([*listing.chunks()]) == 32 < len([*whole.chunks()])
    assert int(names[-1].split(":")[-1]) > 0.8 * count and listing.size < whole.size // 50


def test_lengths_of_a_large_dataset_are_those_of_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "MEASURED", 50)
    path = write_as("jsonl", tmp_path, 1000)
    for _ in ("measured", "from the cache"):
        found = measure(Rows(path, format="text", held_out="none"), tiny("none"), tmp_path)
        assert len(found) == 50 and found.is_sample and found.scale == 20
        assert found.described == "a sample of 50 of 1,000"
    monkeypatch.setattr(inspection, "MEASURED", 1000)
    found = measure(Rows(path, format="text", held_out="none"), tiny("none"), tmp_path)
    assert len(found) == 1000 and not found.is_sample and found.described == "1,000"
