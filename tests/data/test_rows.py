"""Rows of every file type and format, and one clear line for each way in which they can be wrong."""

import csv
import json
import subprocess
import sys

import pytest

from jaxft.data import formats
from jaxft.data.example import Chat, Completion, Text
from jaxft.data.rows import REPOSITORY, Row, read_rows

ROWS = [
    {"prompt": "a", "completion": "b\nü"},
    {"prompt": 'c, "d"', "completion": "e"},
    {"prompt": "f", "completion": "g"},
]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    write(tmp_path / "r.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n")
    write(tmp_path / "r.json", json.dumps(ROWS, indent=1))
    pq.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "r.parquet")
    with (tmp_path / "r.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)
    for suffix in ("jsonl", "json", "parquet", "csv"):
        rows = read_rows(str(tmp_path / f"r.{suffix}"))
        assert [r.fields for r in rows] == ROWS
        assert rows[0].name == ("r.csv:2" if suffix == "csv" else f"r.{suffix}:1")
    assert [r.name for r in read_rows(str(tmp_path / "r.csv"))] == [
        "r.csv:2",
        "r.csv:4",
        "r.csv:5",
    ]  # a field spans two lines
    assert [r.fields for r in read_rows(str(tmp_path))] == ROWS * 4


def test_json_lines_under_the_name_json_and_a_byte_order_mark(tmp_path):
    text = b"\xef\xbb\xbf" + "\n".join(map(json.dumps, ROWS)).encode()
    for name in ("a.json", "a.jsonl"):
        assert [r.fields for r in read_rows(write(tmp_path / name, text))] == ROWS


def test_relative_paths_are_found_in_the_working_directory_then_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = sorted((REPOSITORY / "configs" / "data").glob("*.jsonl"))[0].name
    count = len(read_rows(f"configs/data/{shipped}"))
    assert count > 1
    (tmp_path / "configs" / "data").mkdir(parents=True)
    write(tmp_path / "configs" / "data" / shipped, '{"text": "mine"}')
    assert read_rows(f"configs/data/{shipped}") == [Row(f"{shipped}:1", {"text": "mine"})]


def test_jsonl_is_read_without_datasets_pyarrow_or_pandas(tmp_path):
    path = write(tmp_path / "r.jsonl", '{"text": "x"}')
    code = (
        f"import sys; from jaxft.data.rows import read_rows; read_rows({path!r}); "
        "print(sorted({'datasets', 'pyarrow', 'pandas', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("r.jsonl", '{"text": "a"}\n{"text": "b",}\n', r"r\.jsonl:2: malformed JSON, .* at column \d+, near"),
        ("r.jsonl", '{"text": "a"}\n{"text": ', r"r\.jsonl:2: malformed JSON"),
        ("r.jsonl", '{"text": "a"}\n' * 4 + '{"text": "a"\n{"text": "b"}\n', r"r\.jsonl:5: .* at column 13,"),
        ("r.jsonl", '{"text": ' + "[" * 100000 + "\n", r"r\.jsonl:1: malformed JSON, nested too deeply"),
        ("r.jsonl", '{"text": ' + "1" * 5000 + "}\n", r"r\.jsonl:1: malformed JSON, .*digits"),
        ("r.jsonl", '{"text": "a"}\n\n{"text": "b"}\n', r"r\.jsonl:2: the row is empty"),
        ("r.jsonl", '{"text": "a"}\n{}\n', r"r\.jsonl:2: the row is empty"),
        ("r.jsonl", '{"text": ""}\n', r"r\.jsonl:1: the row is empty"),
        ("r.jsonl", '{"text": "a"}\n["b"]\n', r"r\.jsonl:2: the row is a list; use an object"),
        ("r.jsonl", b'{"text": "a"}\n{"text": "\xff\xfe"}\n', r"r\.jsonl:2: not UTF-8"),
        ("r.jsonl", "", r"the dataset has no rows"),
        ("r.json", '[{"text": "a"},\n {"text": }]', r"r\.json:2: malformed JSON"),
        ("r.json", '{"text": "a"}\n{"text": }', r"r\.json:2: malformed JSON"),
        ("r.csv", "text,label\na,b\nc\n", r"r\.csv:3: 1 fields do not fit the 2 columns \(text, label\)"),
        ("r.csv", "text,text\na,b\n", r"r\.csv:1: the header"),
        ("r.csv", 'text\n"a\n', r"r\.csv:2: malformed CSV"),
        ("r.csv", b"text\na\n\xff\n", r"r\.csv:\d: not UTF-8"),
        ("r.parquet", "PAR1 not really", r"r\.parquet: not a readable Parquet file"),
        ("r.txt", "hello", r"r\.txt: unknown file type"),
    ],
)
def test_unreadable_files_are_one_line_with_file_and_line(tmp_path, name, text, error):
    with pytest.raises(ValueError, match=error) as raised:
        read_rows(write(tmp_path / name, text))
    assert "\n" not in str(raised.value)


def test_missing_files_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for ref in ("no/such/rows.jsonl", "rows.parquet", "rows"):
        with pytest.raises(FileNotFoundError, match=f"data '{ref}' not found in .*; use a file"):
            read_rows(ref)
    with pytest.raises(FileNotFoundError, match="the folder has no data files"):
        read_rows(str(tmp_path))


def test_a_hub_dataset_is_loaded_by_name_config_and_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return iter([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows("org/set/main:test") == [Row("set:test:1", {"text": "a"})]
    assert read_rows("org/set") == [Row("set:train:1", {"text": "a"})]
    assert calls == [(("org/set", "main"), {"split": "test"}), (("org/set",), {"split": "train"})]

    def refuse(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        ValueError, match=r"'org/set' is not a local file and cannot be loaded from the hub \(no route\)"
    ):
        read_rows("org/set")


def turn(role, content):
    return {"role": role, "content": content}


TURNS = (turn("user", "q"), turn("assistant", "a"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": "a", "id": 3}, Text("r:1", "a")),
        ({"prompt": "q", "completion": "a"}, Completion("r:1", "q", "a")),
        ({"messages": list(TURNS), "prompt": "q"}, Chat("r:1", TURNS, 1)),
        ({"messages": json.dumps(TURNS)}, Chat("r:1", TURNS, 1)),
        (
            {"messages": list(TURNS), "system": "s"},
            Chat("r:1", ({"role": "system", "content": "s"}, *TURNS), 2),
        ),
        ({"prompt": [TURNS[0]], "completion": [TURNS[1]]}, Chat("r:1", TURNS, 1)),
        ({"instruction": "q", "response": "a"}, Chat("r:1", TURNS, 1, plain=True)),
        ({"instruction": "q", "output": "a", "input": ""}, Chat("r:1", TURNS, 1, plain=True)),
        (
            {"instruction": "q", "output": "a", "input": "i"},
            Chat("r:1", (turn("user", "q\n\ni"), TURNS[1]), 1, plain=True),
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            Chat("r:1", TURNS, 1),
        ),
        (
            {
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
                "system": "s",
            },
            Chat("r:1", (turn("system", "s"), *TURNS), 2),
        ),
        ({"messages": [turn("user", [{"type": "text", "text": "q"}]), TURNS[1]]}, Chat("r:1", TURNS, 1)),
    ],
)
def test_formats_are_recognised(fields, expected):
    assert formats.normalise_rows([Row("r:1", fields)]) == [expected]


def test_columns_rename_and_say_which_format_is_meant():
    row = Row("r:1", {"question": "q", "answer": "a", "text": "other"})
    assert formats.normalise_rows([row], columns=("prompt=question", "completion=answer")) == [
        Completion("r:1", "q", "a")
    ]
    assert formats.normalise_rows([row], columns=("instruction=question", "response=answer")) == [
        Chat("r:1", TURNS, 1, plain=True)
    ]
    assert formats.normalise_rows([row], columns=("text=answer",)) == [Text("r:1", "a")]
    both = Row("r:1", {"instruction": "q", "response": "a", "output": "b"})
    assert formats.normalise_rows([both], columns=("response=response",)) != formats.normalise_rows(
        [both], columns=("response=output",)
    )


@pytest.mark.parametrize(
    ("fields", "options", "error"),
    [
        (
            {"question": "q", "answer": "a"},
            {},
            r"r:1: the columns question, answer fit no format; accepted are text \(text\); messages",
        ),
        ({"prompt": "q"}, {}, "r:1: the columns prompt fit no format; accepted are"),
        (
            {"text": "t", "prompt": "q", "completion": "a"},
            {},
            "fit the formats text and prompt-completion; set data.format",
        ),
        (
            {"text": "t"},
            {"format": "instruction"},
            r"r:1: no column instruction, which format instruction requires; the row has text",
        ),
        ({"text": "t"}, {"format": "alpaca"}, "data.format='alpaca'; use auto or one of text, messages"),
        (
            {"text": "t"},
            {"columns": ("prompt=question",)},
            r"r:1: no column 'question', which data.columns=prompt=question names",
        ),
        ({"text": "t"}, {"columns": ("promt=text",)}, "unknown column 'promt'; use one of prompt"),
        ({"text": "t"}, {"columns": ("text",)}, "'text' is not of the form ours=theirs"),
        ({"text": "t"}, {"columns": ("text=a", "text=b")}, "'text' is mapped twice"),
        ({"text": 3}, {}, "r:1: column 'text' has type int; use a string"),
        ({"text": " \n"}, {}, "r:1: column 'text' is empty"),
        ({"prompt": "q", "completion": ""}, {}, "r:1: column 'completion' is empty"),
        (
            {"instruction": "q", "response": "a", "output": "b"},
            {},
            "r:1: the row has both 'response' and 'output'",
        ),
        ({"prompt": "q", "completion": [TURNS[1]]}, {}, "is a string and one a list"),
        ({"messages": []}, {}, "r:1: column 'messages' is an empty list"),
        ({"messages": "[{]"}, {}, "r:1: column 'messages' is str; use a list of"),
        (
            {"messages": [{"content": "x"}]},
            {},
            r"r:1: messages\[0\] has content; it needs 'role' and 'content'",
        ),
        (
            {"messages": [TURNS[0], turn("assistant", "")]},
            {},
            r"r:1: messages\[1\], an assistant turn, is empty",
        ),
        ({"messages": [turn("user", 3)]}, {}, r"r:1: messages\[0\] has content of type int"),
        (
            {"conversations": [turn("user", "x")]},
            {},
            r"conversations\[0\] has role, content; it needs 'from' and 'value'",
        ),
    ],
)
def test_columns_that_do_not_fit_are_one_line(fields, options, error):
    with pytest.raises(ValueError, match=error) as raised:
        formats.normalise_rows([Row("r:1", fields)], **options)
    assert "\n" not in str(raised.value)


def test_a_later_row_that_lacks_a_column_is_named():
    rows = [Row("r:1", {"prompt": "q", "completion": "a"}), Row("r:2", {"prompt": "q", "chosen": "a"})]
    with pytest.raises(ValueError, match="r:2: no column completion.*the row has prompt, chosen"):
        formats.normalise_rows(rows)
