"""Rows of every file type and format, and one clear line for each way in which they can be wrong."""

import csv
import json
import subprocess
import sys

import pytest
from parsed_rows import examples, readable_rows
from tiny_tokenizers import tiny

from jaxft.data.rows.dataset_rows import read_rows
from jaxft.data.rows.example import Chat, Completion, Text
from jaxft.data.rows.invalid_rows import InvalidRow, InvalidRows
from jaxft.data.rows.row_files import Row
from jaxft.data.rows.shipped import ROOT
from jaxft.data.sft import Rows

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
    shipped = sorted((ROOT / "configs" / "data").glob("*.jsonl"))[0].name
    count = len(read_rows(f"configs/data/{shipped}"))
    assert count > 1
    (tmp_path / "configs" / "data").mkdir(parents=True)
    write(tmp_path / "configs" / "data" / shipped, '{"text": "mine"}')
    assert read_rows(f"configs/data/{shipped}") == [Row(f"{shipped}:1", {"text": "mine"})]


def test_jsonl_is_read_without_datasets_pyarrow_or_pandas(tmp_path):
    path = write(tmp_path / "r.jsonl", '{"text": "x"}')
    code = (
        f"import sys; from jaxft.data.rows.dataset_rows import read_rows; read_rows({path!r}); "
        "print(sorted({'datasets', 'pyarrow', 'pandas', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("r.jsonl", '{"text": "a"}\n{"text": "b",}\n', r"r\.jsonl:2: malformed JSON, .* at column \d+, near"),
        ("r.jsonl", '{"text": "a"}\n{"text": ', r"r\.jsonl:2: malformed JSON"),
        ("r.jsonl", '{"text": "a", "x": {"b": 1, "b": 1}}', r"r\.jsonl:1: an object has the key 'b' twice"),
        ("r.json", '{"text": "a",\n "text": "b"}', r"r\.json:1: an object has the key 'text' twice"),
        ("r.jsonl", '{"text": "a"}\n' * 4 + '{"text": "a"\n{"text": "b"}\n', r"r\.jsonl:5: .* at column 13,"),
        ("r.jsonl", '{"text": ' + "[" * 100000 + "\n", r"r\.jsonl:1: malformed JSON, nested too deeply"),
        ("r.jsonl", '{"text": ' + "1" * 5000 + "}\n", r"r\.jsonl:1: malformed JSON, .*digits"),
        ("r.jsonl", '{"text": "a"}\n\n{"text": "b"}\n', r"r\.jsonl:2: the row is empty"),
        ("r.jsonl", '{"text": "a"}\n{}\n', r"r\.jsonl:2: the row is empty"),
        ("r.jsonl", '{"text": ""}\n', r"r\.jsonl:1: the row is empty"),
        ("r.jsonl", '{"text": "a"}\n["b"]\n', r"r\.jsonl:2: the row is a list; use an object"),
        ("r.jsonl", b'{"text": "a"}\n{"text": "\xff\xfe"}\n', r"r\.jsonl:2: not UTF-8"),
        ("r.jsonl", '{"text": "a"}\n'.encode("utf-16") + b"\x00", r"r\.jsonl: not utf-16-le text"),
        ("r.jsonl", '{"text": "' + "ä" * 99 + '" x}', r"r\.jsonl:1: .* near '.*ä\" x}'"),
        ("r.jsonl", "", r"the dataset has no rows"),
        ("r.json", '[{"text": "a"},\n {"text": }]', r"r\.json:2: malformed JSON"),
        ("r.jsonl", '{\n  "text": "a"\n}\n', r"r\.jsonl:1: malformed JSON, .* name the file \.json"),
        ("r.json", '{"text": "a"}\n{"text": }', r"r\.json:2: malformed JSON"),
        ("r.json", '{"v": 1, "data": [{"text": "a"}]}', r"r\.json:1: the rows are in the list 'data' of one"),
        ("r.csv", "text,label\na,b\nc\n", r"r\.csv:3: 1 fields do not fit the 2 columns \(text, label\)"),
        ("r.csv", "text,text\na,b\n", r"r\.csv:1: the header"),
        ("r.csv", 'text\n"a\n', r"r\.csv:2: malformed CSV"),
        ("r.csv", b"text\na\n\xff\n", r"r\.csv:\d: not UTF-8"),
        ("r.parquet", "PAR1 not really", r"r\.parquet: not a readable Parquet file"),
        ("r.txt", "\n \n", r"r\.txt: the dataset has no rows"),
        ("r.pdf", "hello", r"r\.pdf: unknown file type"),
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
        ({"prompt": "q", "completion": "a"}, Chat("r:1", TURNS, 1, plain=True)),
        (
            {"prompt": "q", "completion": "a", "system": "s"},
            Chat("r:1", ({"role": "system", "content": "s"}, *TURNS), 2, plain=True),
        ),
        ({"prompt": "q", "completion": [TURNS[1]]}, Chat("r:1", TURNS, 1, plain=True)),
        ({"prompt": [TURNS[0]], "completion": "a"}, Chat("r:1", TURNS, 1)),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "completion": " a"}, Chat("r:1", TURNS, 1)),
        ({"messages": list(TURNS), "prompt": None, "completion": None}, Chat("r:1", TURNS, 1)),
        ({"instruction": "q", "response": "a", "output": None}, Chat("r:1", TURNS, 1, plain=True)),
        ({"messages": [*TURNS, TURNS[0]]}, Chat("r:1", (*TURNS, TURNS[0]), 3)),
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
    assert examples([Row("r:1", fields)]) == [expected]


def test_columns_rename_and_say_which_format_is_meant():
    row = Row("r:1", {"question": "q", "answer": "a", "text": "other"})
    assert examples([row], columns=("prompt=question", "completion=answer")) == [
        Chat("r:1", TURNS, 1, plain=True)
    ]
    names = ("prompt=question", "completion=answer")
    assert examples([row], "plain", names) == [Completion("r:1", "q", "a")]
    assert examples([row], columns=("instruction=question", "response=answer")) == [
        Chat("r:1", TURNS, 1, plain=True)
    ]
    assert examples([row], columns=("text=answer",)) == [Text("r:1", "a")]
    both = Row("r:1", {"instruction": "q", "response": "a", "output": "b"})
    assert examples([both], columns=("response=response",)) != examples([both], columns=("response=output",))


def test_a_text_beside_the_columns_of_another_format_is_not_read(tmp_path):
    alpaca = {"instruction": "add", "input": "1 and 2", "output": "3", "text": "### Instruction: add ..."}
    assert examples([Row("r:1", alpaca)])[0].messages[-1]["content"] == "3"
    assert examples([Row("r:1", alpaca)], format="text")[0] == Text("r:1", alpaca["text"])
    pair = {"text": "t", "prompt": "q", "completion": "a"}
    assert examples([Row("r:1", pair)])[0].messages[-1]["content"] == "a"
    (tmp_path / "r.jsonl").write_text((json.dumps(alpaca) + "\n") * 3)
    source = Rows(str(tmp_path / "r.jsonl")).open(tiny("llama3"), cache=tmp_path)
    note = "the columns of format instruction are read, not text; data.format=text reads it"
    assert any(note in line for line in source.info.warnings)


@pytest.mark.parametrize(
    ("fields", "options", "error"),
    [
        (
            {"title": "q", "body": "a"},
            {},
            r"r:1: the columns title, body fit no format; accepted are text \(text\); messages",
        ),
        ({"prompt": "q"}, {}, "r:1: the columns prompt fit no format; accepted are"),
        (
            {"text": "t"},
            {"format": "instruction"},
            r"r:1: no column instruction, which format instruction requires; the row has text",
        ),
        (
            {"text": "t"},
            {"format": "alpaca"},
            "data.format='alpaca'; use auto, plain or one of text, messages",
        ),
        (
            {"text": "t"},
            {"columns": ("prompt=question",)},
            r"r:1: no column 'question', which data.columns=prompt=question names",
        ),
        ({"text": "t"}, {"columns": ("promt=text",)}, "unknown column 'promt'; use one of prompt"),
        ({"text": "t"}, {"columns": ("text",)}, "must be of the form NAME=COLUMN, .*, got 'text'"),
        ({"text": "t"}, {"columns": ("text=a", "text=b")}, "'text' is mapped twice"),
        ({"text": 3}, {}, "r:1: column 'text' must be a string, got int"),
        ({"text": " \n"}, {}, "r:1: column 'text' is empty"),
        ({"prompt": "q", "completion": ""}, {}, "r:1: column 'completion' is empty"),
        (
            {"instruction": "q", "response": "a", "output": "b"},
            {},
            "r:1: the row has both 'response' and 'output'",
        ),
        (
            {"prompt": "q", "completion": [TURNS[0]]},
            {},
            "the conversations in completion does not end with the prompt",
        ),
        ({"messages": list(TURNS)}, {"format": "plain"}, "data.format=plain is for text and prompt-compl"),
        (
            {"prompt": [TURNS[0]], "completion": "a"},
            {"format": "plain"},
            "column 'prompt' must be a string, got list",
        ),
        ({"messages": []}, {}, "r:1: column 'messages' is an empty list"),
        ({"messages": "[{]"}, {}, "r:1: column 'messages' is of type str; use a list of"),
        (
            {"messages": [{"content": "x"}]},
            {},
            r"r:1: messages\[0\] has the keys content; a message needs 'role', a string, and 'content'",
        ),
        (
            {"messages": [TURNS[0], turn("assistant", "")]},
            {},
            r"r:1: messages\[1\], an assistant turn, is empty",
        ),
        ({"messages": [turn("user", 3)]}, {}, r"r:1: messages\[0\] has content of type int"),
        (
            {"conversations": [{"speaker": "user", "text": "x"}]},
            {},
            r"conversations\[0\] has the keys speaker, text; a message needs 'from', a string, and 'value'",
        ),
    ],
)
def test_columns_that_do_not_fit_are_one_line(fields, options, error):
    with pytest.raises(ValueError, match=error) as raised:
        examples([Row("r:1", fields)], **options)
    assert "\n" not in str(raised.value)


def test_a_later_row_that_lacks_a_column_is_named():
    rows = [Row("r:1", {"prompt": "q", "completion": "a"}), Row("r:2", {"prompt": "q", "chosen": "a"})]
    with pytest.raises(ValueError, match="r:2: no column completion.*the row has prompt, chosen"):
        examples(rows)


# ---- tools and their arguments


def call(arguments, **other):
    return {"type": "function", "function": {"name": "add", "arguments": arguments}, **other}


def calling(calls):
    return {"messages": [TURNS[0], {"role": "assistant", "content": "", "tool_calls": calls}]}


def calls_of(fields):
    (example,) = examples([Row("r:1", fields)])
    return example.messages[1]["tool_calls"]


def test_nulls_that_a_table_adds_are_removed_at_every_level(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    schemas = [
        {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}},
        {"name": "say", "parameters": {"properties": {"text": {"type": "string", "enum": ["x"]}}}},
    ]
    rows = [
        {**calling([call({"a": 1}), call({"text": "x"}, id="7")]), "tools": schemas, "answer": None},
        {"messages": list(TURNS), "tools": schemas[1:], "answer": "a"},
    ]
    pq.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stored, exact = (read_rows(str(tmp_path / f"r.{suffix}")) for suffix in ("parquet", "jsonl"))
    assert [row.fields for row in stored] == rows == [row.fields for row in exact]  # columns keep their nulls
    explicit = calling([call({"a": None})])
    (tmp_path / "n.jsonl").write_text(json.dumps(explicit))
    assert read_rows(str(tmp_path / "n.jsonl"))[0].fields == explicit  # a null of the row itself stays


def test_nulls_of_a_hub_dataset_are_removed_too(monkeypatch):
    datasets = pytest.importorskip("datasets")
    item = {"messages": [{**TURNS[0], "tool_calls": None}, {**TURNS[1], "tool_calls": None}], "answer": None}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: iter([item]))
    assert read_rows("org/set")[0].fields == {"messages": list(TURNS), "answer": None}


@pytest.mark.parametrize("arguments", ({"a": 1}, '{"a": 1}'))
def test_arguments_may_be_a_json_string(arguments):
    expected = [call({"a": 1})]
    assert calls_of(calling([call(arguments)])) == expected
    assert calls_of(calling(json.dumps([call(arguments)]))) == expected
    flat = {"name": "add", "arguments": arguments}
    assert calls_of(calling([flat])) == [{"name": "add", "arguments": {"a": 1}}]
    older = {"role": "assistant", "content": None, "function_call": flat}
    assert calls_of({"messages": [TURNS[0], older]}) == expected
    assert calls_of(calling([call("")])) == [call({})]


def test_turns_of_llama_factory_are_tool_calls_and_their_results():
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "function_call", "value": '[{"name": "add", "arguments": "{}"}, {"name": "add"}]'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "a"},
    ]
    (example,) = examples([Row("r:1", {"conversations": turns})])
    assert [m["role"] for m in example.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    assert example.messages[1]["tool_calls"] == [call({"a": 1})]
    assert [c["function"] for c in example.messages[3]["tool_calls"]] == [
        {"name": "add", "arguments": {}},
        {"name": "add"},
    ]
    assert not example.messages[1]["content"] and example.messages[2]["content"] == "2"


SCHEMAS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        (SCHEMAS, SCHEMAS),
        (json.dumps(SCHEMAS), SCHEMAS),
        ([json.dumps(SCHEMAS[0])], SCHEMAS),
        ("[]", None),
        ("", None),
        ([], None),
        (None, None),
    ],
)
def test_tools_may_be_a_json_string(tools, expected):
    (example,) = examples([Row("r:1", {"messages": list(TURNS), "tools": tools})])
    assert example.tools == expected


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (
            calling([call('{"a": ')]),
            r"r:1: messages\[1\] calls a tool with arguments '.*', which is not a JSON object",
        ),
        (calling([call("[1]")]), r"r:1: messages\[1\] calls a tool with arguments"),
        (calling("add"), r"r:1: messages\[1\] has tool_calls that are not a list of objects"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": "add(1)"},
                ]
            },
            r"r:1: conversations\[1\] is a function_call whose text is not the JSON of a call",
        ),
        (
            {"messages": list(TURNS), "tools": "add"},
            "r:1: column 'tools' must be a list of JSON schemas or its JSON string, got 'add'",
        ),
        (
            {"messages": list(TURNS), "tools": {"name": "add"}},
            "r:1: column 'tools' must be a list of JSON schemas .*, got {'name",
        ),
        ({"messages": list(TURNS), "tools": [1]}, r"r:1: column 'tools' must be a list .*, got \[1\]"),
        (
            {"messages": list(TURNS), "tools": "[" * 100000},
            r"r:1: column 'tools' must be a list .*, got '\[\[",
        ),
    ],
)
def test_tools_that_cannot_be_read_are_one_line(fields, error):
    with pytest.raises(ValueError, match=error) as raised:
        examples([Row("r:1", fields)])
    assert "\n" not in str(raised.value)


def csv_rows(path, data, limit=0.5):
    """(texts of the rows by name, errors) of a CSV file, invalid rows left out."""
    path.write_bytes(data)
    invalid = InvalidRows(limit)
    rows = readable_rows(path, invalid)
    texts = {row.name.partition(":")[2]: list(row.fields.values()) for row in rows}
    return texts, [count.first for count in invalid.counts()]


GOOD_CSV = b'q,a\nhi,yo\n"two\nlines","a ""b"", c"\nno,yes\n'


@pytest.mark.parametrize(
    "bad, problem",
    [
        (b'x,"y" z\n', "malformed CSV, ',' expected after '\"'; fix the quoting"),
        (b'"x,y\n', "malformed CSV, "),  # opens a field that swallows the rows after it
        (b'x,"y\n', "malformed CSV, "),
        (b"x,\xff\n", "not UTF-8 text (invalid start byte at byte 2 of the row)"),
        (b'"x\n\xe4",y\n', "not UTF-8 text (invalid continuation byte at byte 3 of the row)"),
        (b"x\n", "1 fields do not fit the 2 columns"),
        (b"\n", "the row is empty"),
    ],
    ids=str,
)
def test_a_broken_row_of_a_csv_file_is_one_invalid_row(tmp_path, bad, problem):
    """The rows before and after it are the same as without it, and it is named by its first line."""
    clean, none = csv_rows(tmp_path / "r.csv", GOOD_CSV + b"last,row\n" * 4)
    assert list(clean) == ["2", "3", "5", "6", "7", "8", "9"] and clean["3"] == ["two\nlines", 'a "b", c']
    assert not none
    found, errors = csv_rows(tmp_path / "r.csv", GOOD_CSV + bad + b"last,row\n" * 4)
    assert list(found.values()) == list(clean.values())
    assert len(errors) == 1 and errors[0].startswith(f"{tmp_path / 'r.csv'}:6: {problem}")
    lines = bad.count(b"\n")
    assert list(found)[-4:] == [str(6 + lines + i) for i in range(4)]
    with pytest.raises(InvalidRow, match=r"r\.csv:6: "):
        read_rows(str(tmp_path / "r.csv"))


def test_a_quote_that_is_never_closed_is_said_so_and_costs_one_row(tmp_path):
    found, errors = csv_rows(tmp_path / "r.csv", b'q,a\nhi,yo\n"open,a\n' + b"x,y\n" * 10)
    assert len(found) == 11 and list(found)[-1] == "13"
    assert "r.csv:3: malformed CSV, a quote is never closed; fix the quoting or remove" in errors[0]


def test_a_wrong_quote_in_a_file_of_one_column_ends_it(tmp_path):
    """There any line passes for a row, also the rest of a broken one."""
    with pytest.raises(ValueError, match=r"r\.csv:3: malformed CSV, .* the next row cannot be found"):
        csv_rows(tmp_path / "r.csv", b'text\na\n"b "c"\nrest of b"\nd\n')


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("delimiter", [";", ",", "\t", "^"])
def test_a_first_line_for_excel_names_the_delimiter_and_is_no_header(tmp_path, delimiter, encoding):
    lines = [
        f"sep={delimiter}",
        f"prompt{delimiter}completion",
        f"caf\u00e9{delimiter}yes",
        f"b{delimiter}no",
    ]
    (tmp_path / "r.csv").write_bytes("\r\n".join([*lines, ""]).encode(encoding))
    rows = list(read_rows(str(tmp_path / "r.csv")))
    assert [row.fields for row in rows] == [
        {"prompt": "caf\u00e9", "completion": "yes"}, {"prompt": "b", "completion": "no"}
    ]  # fmt: skip
    assert rows[0].name == "r.csv:3"
