"""data.max_samples and data.drop: which rows are left out, and that they are counted."""

import json

import numpy as np
import pytest
from tiny_tokenizers import tiny

from jaxft.data.pairs import PairRows
from jaxft.data.prompts import Prompts, split_prompts
from jaxft.data.rows.dataset_rows import list_chunks
from jaxft.data.rows.example import is_placeholder
from jaxft.data.sft import Rows

HOW = {"batch": 1, "workers": 1}


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def sft(*texts):
    return [{"prompt": prompt, "completion": response} for prompt, response in texts]


def names(source, members):
    return [source.split.rows.names[i].partition(":")[2] for i in members]


def test_duplicates_and_placeholders_are_left_out_and_counted(tmp_path):
    rows = sft(("a", "1"), ("b", "N/A"), ("a", "1"), ("a", "2"), ("c", " nan\n"), ("d", "none of these"))
    path = write(tmp_path / "r.jsonl", rows)
    kept = {(): "123456", ("duplicates",): "12456", ("placeholders",): "1346",
            ("duplicates", "placeholders"): "146"}  # fmt: skip
    for drop, expected in kept.items():
        source = Rows(path, held_out="none", drop=drop, **HOW).open(tiny("chatml"), cache=tmp_path)
        assert "".join(names(source, source.split.train)) == expected
        seen = {name for step in range(len(expected)) for name in source.row_names(step)[0].split(", ")}
        assert {name.partition(":")[2] for name in seen if name} == set(expected)
    assert "left out by data.drop: 1 duplicates and 2 placeholders as responses" in source.info.stats.summary
    with pytest.raises(ValueError, match="data.drop=twins; use one of duplicates, placeholders as value 1"):
        Rows(path, drop=("twins",))


@pytest.mark.parametrize("text", ["N/A", "nan", " None ", "#N/A", "<NA>", "-", "...", "TODO"])
def test_what_spreadsheets_write_for_nothing_is_a_placeholder(text):
    assert is_placeholder(text) and not is_placeholder(f"{text} is missing")


def test_training_rows_that_a_held_out_file_has_are_left_out_and_the_file_is_whole(tmp_path):
    train = write(tmp_path / "train.jsonl", sft(("a", "1"), ("b", "2"), ("c", "3")))
    held = write(tmp_path / "held.jsonl", sft(("b", "2"), ("b", "2"), ("x", "y")))
    rows = Rows(train, held_out=held, drop=("duplicates",), **HOW)
    source = rows.open(tiny("chatml"), cache=tmp_path)
    assert names(source, source.split.train) == ["1", "3"]
    assert names(source, source.split.held) == ["1", "2", "3"]
    prompts = Prompts(train, held_out=held, drop=("duplicates",), **HOW)
    chosen, others = split_prompts(prompts, tiny("chatml"), tmp_path)
    assert list(chosen.names) == ["train.jsonl:1", "train.jsonl:3"] and len(others) == 3
    assert "1 duplicates" in chosen.split.left_out


def test_placeholders_in_a_held_out_file_are_left_out_of_rows_and_prompts_alike(tmp_path):
    train = write(tmp_path / "train.jsonl", sft(("a", "1"), ("b", "2"), ("N/A", "N/A")))
    held = write(tmp_path / "held.jsonl", sft(("x", "1"), ("N/A", "N/A"), ("y", "2")))
    how = {"held_out": held, "drop": ("placeholders",), **HOW}
    source = Rows(train, **how).open(tiny("chatml"), cache=tmp_path)
    assert names(source, source.split.held) == ["1", "3"]
    chosen, others = split_prompts(Prompts(train, **how), tiny("chatml"), tmp_path)
    assert list(chosen.names) == ["train.jsonl:1", "train.jsonl:2"]
    assert list(others.names) == ["held.jsonl:1", "held.jsonl:3"]
    assert "2 placeholders" in chosen.split.left_out and "2 placeholders" in source.info.stats.summary


def test_a_duplicate_in_another_source_is_left_out_of_a_mixture_too(tmp_path):
    a = write(tmp_path / "a.jsonl", sft(*((str(i), "x") for i in range(8))))
    b = write(tmp_path / "b.jsonl", sft(*((str(i), "x") for i in range(4, 12))))
    rows = Rows(f"{a}:0.5,{b}:0.5", held_out="none", drop=("duplicates",), **HOW)
    mixture = rows.open(tiny("chatml"), cache=tmp_path).split.mixture
    assert [len(part) for part in mixture.rows] == [8, 4] and mixture.counts == (6, 6)


def test_pairs_are_duplicates_if_prompt_and_responses_are_the_same(tmp_path):
    pairs = [("a", "1", "2"), ("a", "2", "1"), ("a", "1", "2"), ("b", "n/a", "2"), ("b", "2", "n/a")]
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs]
    path = write(tmp_path / "r.jsonl", rows)
    drop = ("duplicates", "placeholders")
    source = PairRows(path, held_out="none", drop=drop, **HOW).open(tiny("chatml"), cache=tmp_path)
    assert names(source, source.split.train) == ["1", "2", "5"]
    assert "1 duplicates and 1 placeholders" in source.info.stats.summary


def test_a_document_is_a_duplicate_as_a_whole_with_all_of_its_pieces(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"text": x * 60} for x in ("ab", "cd", "ab")])
    how = {"too_long": "split", "max_length": 32, "held_out": "none", "drop": ("duplicates",)}
    source = Rows(path, **how, **HOW).open(tiny("llama3"), cache=tmp_path)
    assert sorted({*names(source, source.split.train)}) == ["1", "2"]
    assert len(source.split.train) == 2 * np.sum(source.split.rows.documents == 0)


# ---- the first rows


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "json", "parquet"])
def test_max_samples_reads_the_first_rows_of_each_dataset_in_chunks_of_any_size(
    tmp_path, monkeypatch, suffix
):
    import pyarrow
    import pyarrow.parquet

    from jaxft.data.rows import row_files

    monkeypatch.setattr(row_files, "ROW_CHUNK_BYTES", 100)
    items, path = [{"text": f"text {i}"} for i in range(30)], tmp_path / f"r.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), path, row_group_size=4)
    elif suffix == "json":
        path.write_text(json.dumps(items))
    else:
        lines = map(json.dumps, items) if suffix == "jsonl" else ["text", *(x["text"] for x in items)]
        path.write_text("\n".join(lines))
    listing = list_chunks(str(path))
    for count in (1, 4, 7, 29, 30, 99):
        first = [row for chunk in listing.first(count).chunks() for row in chunk.rows()]
        assert [row.fields for row in first] == items[:count]
    in_memory = [chunk.read.func is iter for chunk in listing.chunks()]
    assert any(in_memory) == (suffix in ("csv", "json"))
    with pytest.raises(ValueError, match="data.max_samples=0; expected at least 1"):
        Rows(str(path), max_samples=0)


def test_max_samples_is_a_part_of_the_cache_key_and_of_a_source(tmp_path):
    a = write(tmp_path / "a.jsonl", sft(*((str(i), "x") for i in range(9))))
    b = write(tmp_path / "b.jsonl", sft(*((str(i), "y") for i in range(9))))

    def count(data, **options):
        rows = Rows(data, held_out="none", **HOW, **options)
        return rows.open(tiny("chatml"), cache=tmp_path).info.stats.examples

    assert [count(a), count(a, max_samples=5), count(a, max_samples=20), count(a)] == [9, 5, 9, 9]
    assert count(f"{a}:max_samples=3,{b}") == 12 and count(f"{a}:max_samples=3,{b}", max_samples=5) == 8
