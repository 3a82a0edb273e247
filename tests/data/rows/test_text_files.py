"""Files that don't name their encoding or delimiter, text and Markdown, and folders of save_to_disk."""

import json

import datasets
import pytest
from tiny_tokenizers import tiny

from jaxft.data.rows.dataset_rows import evaluation_split, list_chunks, read_rows
from jaxft.data.rows.text_files import SAMPLE_BY, sniff_encoding
from jaxft.data.sft import Rows
from jaxft.train.recipes import RowKnobs

RECORDS = [["prompt", "completion"], ["Où, ça?", "là; “ici”"], ["wie groß", "2 | 3"], ["q\n2", 'say "a"']]


def written(path, delimiter, encoding):
    """Write the records as spreadsheets do, which quote what needs it."""
    lines = []
    for record in RECORDS:
        quoted = ['"' + x.replace('"', '""') + '"' if set(x) & {delimiter, '"', "\n"} else x for x in record]
        lines.append(delimiter.join(quoted) + "\r\n")
    path.write_bytes("".join(lines).encode(encoding))
    return str(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1252"])
@pytest.mark.parametrize(
    ("name", "delimiter"), [("r.csv", ","), ("r.csv", ";"), ("r.csv", "|"), ("r.tsv", "\t")]
)
def test_every_delimiter_and_encoding_of_spreadsheets_gives_the_same_rows(
    tmp_path, name, delimiter, encoding
):
    ref = written(tmp_path / name, delimiter, encoding)
    assert [list(row.fields.values()) for row in read_rows(ref)] == RECORDS[1:]
    notes = list_chunks(ref).notes
    assert any("r.csv are separated by" in note for note in notes) == (delimiter in ";|")
    assert any("not UTF-8" in note for note in notes) == (not encoding.startswith("utf-8"))


def test_a_tsv_file_may_have_commas_and_a_csv_file_tabs(tmp_path):
    for name, delimiter, note in (("r.tsv", ",", "commas"), ("r.csv", "\t", "tabs")):
        ref = written(tmp_path / name, delimiter, "utf-8")
        assert len(read_rows(ref)) == 3
        assert list_chunks(ref).notes == (f"the columns of {name} are separated by {note}",)


def test_a_comma_in_a_header_of_other_delimiters_is_part_of_a_name(tmp_path):
    (tmp_path / "r.csv").write_text("prompt, short;completion\na;b\nc;d, e\n")
    assert read_rows(str(tmp_path / "r.csv"))[1].fields == {"prompt, short": "c", "completion": "d, e"}


@pytest.mark.parametrize(
    "damage",
    [b"\xff", b" \xe9 ", "é".encode() + b" caf\xe9", b"caf\xe9\x81", bytes(range(0xC0, 0xF0)) + b"a"],
    ids=["no letter", "a letter alone", "beside UTF-8", "an unused code", "another alphabet"],
)
def test_damaged_utf_8_is_not_taken_for_cp1252(tmp_path, damage):
    path = tmp_path / "r.csv"
    path.write_bytes(b"prompt,completion\na,b\nc," + damage + b"\n")
    with pytest.raises(ValueError, match=r"r\.csv:3: not UTF-8"):
        read_rows(str(path))


def test_cp1252_is_found_far_into_a_file(tmp_path):
    rows = ["prompt,completion", *["plain,text"] * 600_000, "wie groß,fünf"]
    (tmp_path / "r.csv").write_bytes("\n".join(rows).encode("cp1252"))
    assert sniff_encoding(tmp_path / "r.csv") == "cp1252"


def test_words_of_one_letter_are_text_of_cp1252_too(tmp_path):
    for line in ("Il va à l'école, là où c'était", "È più tardi, ma è così", "Já é tarde; é à noite, você"):
        (tmp_path / "r.csv").write_bytes(f"prompt,completion\na;b,{line.replace(',', '')}\n".encode("cp1252"))
        assert sniff_encoding(tmp_path / "r.csv") == "cp1252", line


def test_json_lines_in_utf_16_are_read_with_a_note(tmp_path):
    rows = [{"text": f"ö {i}"} for i in range(3)]
    (tmp_path / "r.jsonl").write_text("\r\n".join(json.dumps(row) for row in rows), encoding="utf-16")
    assert [row.fields for row in read_rows(str(tmp_path / "r.jsonl"))] == rows
    assert "r.jsonl is not UTF-8 and is read as UTF-16" in list_chunks(str(tmp_path / "r.jsonl")).notes[0]


# ---- text


def texts(ref, sample_by="document"):
    rows = [row for chunk in list_chunks(str(ref), None, sample_by).chunks() for row in chunk.rows()]
    return {row.name: row.fields["text"] for row in rows}


def test_a_folder_of_text_files_is_one_document_per_file_or_separator(tmp_path):
    (tmp_path / "guide" / ".git").mkdir(parents=True)
    (tmp_path / "b.MD").write_text("# B\n\n  two\n\n")
    (tmp_path / "guide" / "b.md").write_bytes("\ufeffcafé\r\n".encode())
    (tmp_path / "guide" / "many.txt").write_text("\n\none\n<|endoftext|>\n\n<|endoftext|>\ntwo\n\nmore\n")
    (tmp_path / "guide" / "empty.txt").write_text(" \n")
    (tmp_path / "guide" / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "guide" / "picture.png").write_bytes(b"\x89PNG")
    whole = {"b.MD:1": "# B\n\n  two", "guide/b.md:1": "café"}
    assert texts(tmp_path) == {**whole, "guide/many.txt:3": "one", "guide/many.txt:7": "two\n\nmore"}
    path = tmp_path / "guide" / "many.txt"
    assert texts(path, "paragraph") == {"many.txt:3": "one", "many.txt:7": "two", "many.txt:9": "more"}
    assert list(texts(tmp_path / "b.MD", "line").values()) == ["# B", "  two"]


def test_files_of_rows_win_over_text_files_of_their_folder_with_a_note(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"text": "row"}')
    (tmp_path / "README.md").write_text("about")
    assert texts(tmp_path) == {"r.jsonl:1": "row"} and not list_chunks(str(tmp_path)).notes
    (tmp_path / "chapter.txt").write_text("text")
    (note,) = list_chunks(str(tmp_path)).notes
    assert "1 text files, such as chapter.txt, are not read: it has files of rows, such as r.jsonl" in note


def test_a_folder_with_files_for_evaluation_is_read_whole_with_a_note(tmp_path):
    for name in ("train-00000", "test-00000", "contest"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "row"}')
    (note,) = list_chunks(str(tmp_path)).notes
    assert "test-00000.jsonl is read for training as train-00000.jsonl is" in note
    assert f"held_out={tmp_path / 'test-00000.jsonl'}" in note
    (tmp_path / "train-00000.jsonl").rename(tmp_path / "rows.jsonl")
    assert len(read_rows(str(tmp_path))) == 3 and not list_chunks(str(tmp_path)).notes


def test_what_a_row_of_text_is_changes_the_tokens_in_the_cache(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\nfour")
    counts = []
    for sample_by in SAMPLE_BY:
        rows = Rows(str(tmp_path / "a.txt"), held_out="none", batch=1, sample_by=sample_by)
        counts.append(rows.open(tiny("llama3"), cache=tmp_path / "cache").info.stats.examples)
    assert counts == [1, 2, 4]
    with pytest.raises(ValueError, match="data.sample_by='word'; use one of document, paragraph, line"):
        Rows("a.txt", sample_by="word")


def test_the_end_of_a_single_document_is_held_out(tmp_path):
    (tmp_path / "book.md").write_text("".join(f"{i:03d} " for i in range(400)))
    how = {"packing": "wrapped", "too_long": "split", "max_length": 32, "batch": 1, "held_out": 0.1}
    source = Rows(str(tmp_path / "book.md"), **how).open(tiny("llama3"), cache=tmp_path / "cache")
    train, held = source.split.train.tolist(), source.split.held.tolist()
    assert train + held == list(range(len(source.split.rows))) and len(held) == round(len(train) / 9)
    held_text = "".join(tiny("llama3").decode(batch.ids[0, 0]) for batch in source.held_out)
    assert "398" in held_text and "000" not in held_text


# ---- folders of the package datasets


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    splits = {"train": 20, "validation": 3, "extra": 2}
    tables = {
        name: datasets.Dataset.from_list([{"text": f"{name} {i}", "n": None} for i in range(count)])
        for name, count in splits.items()
    }
    datasets.DatasetDict(tables).save_to_disk(str(folder / "all"))
    tables["extra"].save_to_disk(str(folder / "one"))
    datasets.DatasetDict({"a": tables["extra"], "b": tables["extra"]}).save_to_disk(str(folder / "none"))
    return folder


def test_folders_of_save_to_disk_are_read_by_split(saved):
    def first(ref):
        rows = read_rows(str(saved / ref))
        return rows[0].name, rows[0].fields["text"], len(rows)

    assert first("all") == ("all/train:1", "train 0", 20)
    assert first("all:extra") == ("all/extra:1", "extra 0", 2)
    assert first("one") == ("one:1", "extra 0", 2)
    with pytest.raises(ValueError, match="the folder has no split 'test'; use train or validation or extra"):
        read_rows(str(saved / "all:test"))
    with pytest.raises(ValueError, match="has the splits a, b, and no train; choose one with data="):
        read_rows(str(saved / "none"))
    (saved / "one" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="one: not a readable folder of save_to_disk .*; save the dataset"):
        read_rows(str(saved / "one"))


def test_the_validation_split_of_a_folder_is_held_out_by_default(saved):
    folder = str(saved / "all")
    assert RowKnobs(folder).settings()["held_out"] == f"{folder}:validation" == evaluation_split(folder)
    for other in (str(saved / "none"), str(saved / "missing"), ",".join(f"{i}.jsonl" for i in range(99))):
        assert RowKnobs(other).settings()["held_out"] == 0.05
    source = Rows(folder, held_out=f"{folder}:validation", batch=1).open(tiny("llama3"), cache=saved)
    assert (source.info.stats.examples, source.info.stats.held_out) == (20, 3)


def test_a_document_is_limited_as_a_line_of_json_is(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxft.data.rows.text_files.LINE_BYTES", 100)
    path = tmp_path / "long.txt"
    path.write_text("short line\n\n" * 30)
    with pytest.raises(ValueError, match=r"long.txt:1: the text has more than .*data.sample_by=paragraph or"):
        texts(path)
    assert len(texts(path, "paragraph")) == len(texts(path, "line")) == 30
    path.write_text("x" * 1000)
    with pytest.raises(ValueError, match=r"long.txt:1: the text has more than"):
        texts(path, "line")


def test_text_that_is_not_of_its_encoding_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("é ok".encode() + b"\n<|endoftext|>\n\xe9\xff damaged")
    with pytest.raises(ValueError, match=r"a\.txt:3: the text that begins here has bytes that are not UTF-8"):
        read_rows(str(tmp_path / "a.txt"))
    (tmp_path / "b.txt").write_bytes("a\nb".encode("utf-16") + b"\x00")
    with pytest.raises(ValueError, match=r"b\.txt: not utf-16-le text .*; convert the file to UTF-8"):
        read_rows(str(tmp_path / "b.txt"))
