"""Names of columns as public files have them: other cases, spaces, misspellings, and other words."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from parsed_rows import examples, outcomes, pair_settings, pairs
from tiny_tokenizers import tiny

from jaxft.data.pairs import PairRows
from jaxft.data.prompts import Prompts, split_prompts
from jaxft.data.rows.format_choice import choose_format, count_columns, prompt_of
from jaxft.data.rows.formats import SFT, formats_of
from jaxft.data.rows.row_files import Row
from jaxft.data.sft import Rows


def contents(fields, columns=()):
    (example,) = examples([Row("r:1", fields)], columns=columns)
    return [message["content"] for message in example.messages]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"Prompt": "q", " COMPLETION ": "a"}, ["q", "a"]),
        ({"Instruction": "q", "Input": "", "Output": "a", "System": "s"}, ["s", "q", "a"]),
        ({"question": "q", "answer": "a"}, ["q", "a"]),
        ({"Question ": "q", "Answer": "a", "id": 3}, ["q", "a"]),
        ({"system_prompt": "s", "question": "q", "response": "a"}, ["s", "q", "a"]),  # OpenOrca
        ({"instruction": "q", "context": "x", "response": "a", "category": "c"}, ["q\n\nx", "a"]),  # dolly
        ({"prompt": "q", "completion": "a", "system_prompt": "s"}, ["s", "q", "a"]),
        ({"problem": "q", "level": "5", "solution": "a"}, ["q", "a"]),  # MATH
        ({"prompt": "q", "response": "a"}, ["q", "a"]),
        ({"input": "q", "output": "a"}, ["q", "a"]),
        ({"instruction": "q", "input": "x", "answer": "a"}, ["q\n\nx", "a"]),
        ({"prompt": "q", "completion": "a", "answer": "x"}, ["q", "a"]),  # its own names first
    ],
)
def test_other_spellings_and_words_for_columns_are_read(fields, expected):
    assert contents(fields) == expected
    *turns, _ = expected
    assert [message["content"] for message in prompt_of(Row("r:1", fields)).messages] == turns


def test_columns_that_are_renamed_are_not_read_by_their_own_names():
    fields = {"Prompt": "x", "question": "q", "Reply ": "a"}
    assert contents(fields, ("prompt=question", "completion=reply")) == ["q", "a"]
    assert contents({"Prompt": "q", "answer": "a"}, ("prompt=Prompt",)) == ["q", "a"]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (
            {"instuction": "q", "reponse": "a"},
            r"did you mean instruction for 'instuction' and response for 'reponse'\? accepted are .*; rename "
            r"columns, for example with data.columns=instruction=instuction,response=reponse$",
        ),
        ({"title": "q", "body": "a"}, "with data.columns=prompt=title,completion=body$"),
        (
            {"id": 1, "My Question": "q", "body": "a"},
            "with 'data.columns=prompt=My Question,completion=body'$",
        ),
        (
            {"question": "q", "answer": "a", "response": "b"},
            "with data.columns=prompt=question,completion=answer$",
        ),
        ({"Prompt": "q", "prompt ": "x", "completion": "a"}, "did you mean prompt for 'Prompt'"),
        (
            {"prompt": "q", "Chosen": "a", "rejected": "b"},
            "prompt, Chosen, rejected belong to preference pairs; train on pairs with the recipe dpo$",
        ),
    ],
)
def test_unknown_columns_are_an_error_with_the_setting_that_reads_them(fields, error):
    with pytest.raises(ValueError, match=error) as raised:
        examples([Row("r:1", fields)])
    assert "\n" not in str(raised.value)


def test_a_note_says_why_many_more_rows_are_held_out_than_asked_for(tmp_path):
    rows = [{"prompt": f"question {n % 2}", "answer": str(n)} for n in range(40)]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held = split_prompts(Prompts(str(path), held_out=0.05), tiny("none"))
    assert len(held) == 20 and any(
        "20 of 40 rows are held out, and data.held_out=0.05" in x for x in train.split.warnings
    )
    train, held = split_prompts(Prompts(str(path), held_out=0.5), tiny("none"))
    assert not train.split.warnings


@pytest.mark.parametrize("names", ["id conversations", "messages", "prompt completion", "instruction output"])
def test_rows_of_sft_are_no_pairs_with_other_names(names):
    row = Row("r:1", dict.fromkeys(names.split(), "a"))
    with pytest.raises(ValueError, match="belong to SFT; train on them with the recipe sft") as error:
        pairs([row])
    assert "data.columns" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        ("qid question response_j response_k", "prompt=question,chosen=response_j,rejected=response_k"),
        ("id prompt response_j response_k", "chosen=response_j,rejected=response_k"),
        ("prompt good bad", "chosen=good,rejected=bad"),
        ("instuction chosen rejcted", "instruction=instuction,rejected=rejcted"),
        ("question answer thumbs", "prompt=question,completion=answer,label=thumbs"),
        ("prompt completion lable", "label=lable"),
        ("a b c", "prompt=a,chosen=b,rejected=c"),
    ],
)
def test_the_proposed_columns_of_pairs_read_the_rows(names, columns):
    row = Row("r:1", {name: "1" if name in ("thumbs", "lable") else f"{name} text" for name in names.split()})
    with pytest.raises(ValueError, match="fit no format") as error:
        pairs([row])
    proposed = str(error.value).rpartition("data.columns=")[2]
    renamed = dict(item.split("=") for item in columns.split(","))
    assert dict(item.split("=") for item in proposed.split(",")).items() <= renamed.items()
    (pair,) = pairs([row], pair_settings(columns=tuple(proposed.split(","))))
    (meant,) = pairs([row], pair_settings(columns=tuple(columns.split(","))))
    assert pair.examples == meant.examples


def test_sft_of_pairs_proposes_the_first_response():
    row = Row("r:1", {"qid": 1, "question": "q", "response_j": "a", "response_k": "b"})
    with pytest.raises(ValueError, match="data.columns=prompt=question,completion=response_j$"):
        examples([row])


def test_the_other_names_are_those_that_most_rows_have():
    rows = [Row(f"r:{i}", {"question": "q", "answer" if i else "solution": "a"}) for i in range(3)]
    found = list(outcomes(rows))
    assert [hasattr(example, "messages") for example in found] == [False, True, True]
    assert found[0].problem.startswith("no column completion, which format prompt-completion requires")


def test_errors_call_columns_as_the_file_does():
    rows = [Row("r:1", {"Question": "q", "Answer ": ""}), Row("r:2", {"Question": "q", "Answer ": "a"})]
    for columns in ((), ("prompt=Question", "completion=Answer")):
        (error, _) = outcomes(rows, columns=columns)
        assert (error.reason, error.problem[:26]) == ("empty column 'Answer'", "column 'Answer' is empty; ")
    pair = Row("r:1", {"q": "q", "better": " ", "rejected": "b"})
    settings = pair_settings(columns=("prompt=q", "chosen=better"))
    with pytest.raises(ValueError, match="r:1: .*column 'better' is empty"):
        pairs([pair], settings)


def test_pairs_and_prompts_are_read_by_other_names_too():
    row = Row("r:1", {"system": "s", "question": "q", "chosen": "a", "rejected": "b"})  # orca_dpo_pairs
    (pair,) = pairs([row])
    assert [[m["content"] for m in chat.messages] for chat in pair.examples.values()] == [
        ["s", "q", "a"], ["s", "q", "b"],
    ]  # fmt: skip
    assert [m["content"] for m in prompt_of(row).messages] == ["s", "q"]
    dialogue = {k: f"\n\nHuman: p\n\nAssistant: {k}" for k in ("chosen", "rejected")}
    for fields in (dialogue, {"question": "other", **dialogue}):
        assert prompt_of(Row("r:1", fields)).messages[0]["content"] == "p"
        (pair,) = pairs([Row("r:1", fields)])
        assert pair.examples["chosen"].messages[0]["content"] == "p"
    (one,) = pairs([Row("r:1", {"prompt": "q", "response": "a", "label": 1})])
    assert one.examples["chosen"].messages[-1]["content"] == "a" and "rejected" not in one.examples


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (
            "text question Answer",
            "the column text is read, not question and Answer; to read these, set "
            "data.columns=prompt=question,completion=Answer",
        ),
        ("text question", None),
        ("text url", None),
    ],
)
def test_a_text_that_hides_a_question_and_its_answer_has_a_note_that_reads_them(names, note):
    row = Row("r:1", {name: f"{name} text" for name in names.split()})
    formats = formats_of(SFT)
    chosen = choose_format(count_columns([row], (), formats), "auto", (), formats)
    assert chosen.name == "text" and chosen.note() == ([note] if note else [])
    if note:
        columns = tuple(note.split("data.columns=")[1].split(","))
        assert contents(row.fields, columns) == ["question text", "Answer text"]


def test_runs_note_the_names_that_they_read_also_from_the_cache_and_from_parquet(tmp_path):
    rows = [{"Question": f"q {i}", "Answer": "a", "unused": "u"} for i in range(4)]
    table, lines = tmp_path / "r.parquet", tmp_path / "r.jsonl"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    lines.write_text("\n".join(map(json.dumps, rows)))
    note = "columns are read by other names: Question as prompt, Answer as completion (data.columns=prompt="
    for path in (table, lines, lines):
        source = Rows(str(path), held_out="none", batch=1).open(tiny("chatml"), cache=tmp_path)
        assert source.info.warnings[0].startswith(f"note: {path.name}: {note}")
        assert "q 0" in source.info.preview
    train, _ = split_prompts(Prompts(str(lines), held_out="none", batch=1), tiny("chatml"), tmp_path)
    read = "columns are read by other names: Question as prompt (data.columns=prompt=Question)"
    assert train.split.warnings == (f"note: r.jsonl: {read}",)
    assert train.fields[0]["Answer"] == "a" and train.fields[0]["unused"] == "u"
    pairs = [{"Prompt": f"q {i}", "Chosen": "a", "Rejected": "b"} for i in range(4)]
    lines.write_text("\n".join(map(json.dumps, pairs)))
    source = PairRows(str(lines), held_out="none", batch=1).open(tiny("chatml"), cache=tmp_path)
    assert "q 0" in source.info.preview


@pytest.mark.parametrize(
    ("fields", "read"),
    [
        ({"question": "q", "system_prompt": "s"}, "question as prompt, system_prompt as system"),
        ({"prompt": "q", "system_prompt": "s"}, "system_prompt as system"),
        ({"instruction": "q", "context": "c"}, "context as input"),
    ],
)
def test_prompts_note_the_same_names_as_sft(tmp_path, fields, read):
    path = tmp_path / "r.jsonl"
    response = "response" if "instruction" in fields else "completion"
    path.write_text("\n".join(json.dumps({**fields, "n": i, response: "a"}) for i in range(4)))
    source = Rows(str(path), held_out="none", batch=1).open(tiny("chatml"), cache=tmp_path)
    train, _ = split_prompts(Prompts(str(path), held_out="none", batch=1), tiny("chatml"), tmp_path)
    assert all(f"other names: {read} (" in note for note in (source.info.warnings[0], *train.split.warnings))
    assert len(train.split.warnings) == 1
