"""Preference rows of every format become one prompt and its answers, and each way to be wrong is one clear
line.
"""

import csv
import json

import pytest
from parsed_rows import pairs
from tiny_tokenizers import tiny

from jaxft.data.pairs import PairRows
from jaxft.data.rows.dataset_rows import read_rows
from jaxft.data.rows.example import Chat, Completion
from jaxft.data.rows.row_files import Row


def turn(role, content):
    return {"role": role, "content": content}


def user(text):
    return turn("user", text)


def answer(text):
    return turn("assistant", text)


def pair(fields, name="r:1", **options):
    (parsed,) = pairs([Row(name, fields)], PairRows("r", **options).token_settings)
    return parsed


Q, A, B = user("q"), answer("a"), answer("b")
LONG = (turn("system", "s"), user("p"), answer("o"), Q)
HUMAN = "\n\nHuman: p\n\nAssistant: o\n\nHuman: q\n\nAssistant:"
SAID = (user("p"), answer("o"), Q)
GPT = [{"from": "human", "value": "q"}]


@pytest.mark.parametrize(
    ("fields", "prompt", "plain"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, (Q,), True),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"}, (turn("system", "s"), Q), True),
        ({"prompt": [Q], "chosen": [A], "rejected": [B]}, (Q,), False),
        ({"prompt": [Q], "chosen": A, "rejected": "b"}, (Q,), False),
        ({"prompt": json.dumps([Q]), "chosen": json.dumps([A]), "rejected": json.dumps([B])}, (Q,), False),
        ({"prompt": list(LONG), "chosen": [A], "rejected": [B]}, LONG, False),
        ({"prompt": list(LONG), "chosen": [*LONG, A], "rejected": [*LONG, B]}, LONG, False),
        ({"prompt": list(LONG), "chosen": [*LONG, A], "rejected": [B]}, LONG, False),
        ({"prompt": "q", "chosen": [Q, A], "rejected": [Q, B], "score_chosen": 3.0}, (Q,), False),
        ({"prompt": "q", "chosen": [*LONG, A], "rejected": [*LONG, B]}, LONG, False),
        ({"prompt": "q", "chosen": [A], "rejected": [B]}, (Q,), True),
        ({"prompt": HUMAN, "chosen": " a", "rejected": " b"}, SAID, False),
        ({"chosen": [Q, A], "rejected": [Q, B]}, (Q,), False),
        ({"chosen": [*LONG, A], "rejected": [*LONG, B]}, LONG, False),
        ({"chosen": HUMAN + " a", "rejected": HUMAN + " b"}, SAID, False),
        ({"chosen": "Human: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b\n"}, (Q,), False),
        (
            {
                "conversations": GPT,
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
                "system": "s",
            },
            (turn("system", "s"), Q),
            False,
        ),
        ({"conversations": GPT, "chosen": [{"from": "gpt", "value": "a"}], "rejected": "b"}, (Q,), False),
        ({"instruction": "q", "chosen": "a", "rejected": "b", "input": ""}, (Q,), True),
        ({"instruction": "q", "chosen": "a", "rejected": "b", "input": "i"}, (user("q\n\ni"),), True),
    ],
)
def test_formats_are_recognised(fields, prompt, plain):
    expected = {
        kind: Chat("r:1", (*prompt, last), len(prompt), plain)
        for kind, last in (("chosen", A), ("rejected", B))
    }  # fmt: skip
    assert pair(fields).examples == expected


def test_responses_may_have_several_turns_after_the_common_ones():
    longer = [Q, A, user("r"), answer("c")]
    examples = pair({"chosen": longer, "rejected": [Q, B, user("r"), answer("d")]}).examples
    assert examples["chosen"] == Chat("r:1", tuple(longer), 1) and examples["rejected"].messages[1] == B


def test_plain_format_keeps_text_as_it_is():
    examples = pair({"prompt": "q ", "chosen": "a", "rejected": "b"}, format="plain").examples
    assert examples == {"chosen": Completion("r:1", "q ", "a"), "rejected": Completion("r:1", "q ", "b")}
    examples = pair({"prompt": "", "completion": "a", "label": True}, format="plain").examples
    assert examples == {"chosen": Completion("r:1", "", "a")}


@pytest.mark.parametrize("name", ("label", "kto_tag"))
@pytest.mark.parametrize("written", ("true", "False", " TRUE", "1", "0", "1.0", "0.0", 1.0, 0.0))
def test_a_label_of_a_table_is_read_however_it_is_written(written, name):
    is_chosen = str(written).strip().lower() in ("true", "1", "1.0")
    examples = pair({"prompt": "q", "completion": "a", name: written}).examples
    assert [*examples] == ["chosen" if is_chosen else "rejected"]


def test_labels_and_numbers_of_a_csv_file_are_read(tmp_path):
    text = "prompt,completion,kto_tag,label,weight\nq,a,,True,2\nq,b,0,,0.5\nq,c,True,,1e0\n"
    (tmp_path / "r.csv").write_text(text)
    settings = PairRows("r", weight_column="weight").token_settings
    parsed = pairs(read_rows(str(tmp_path / "r.csv")), settings)
    assert ["chosen" in p.examples for p in parsed] == [True, False, True]
    assert [p.weight for p in parsed] == [2.0, 0.5, 1.0]


@pytest.mark.parametrize("label", (True, False, 1, 0))
def test_an_unpaired_row_has_only_the_response_of_its_label(label):
    for fields, plain in (
        ({"prompt": "q", "completion": "a"}, True),
        ({"prompt": [Q], "completion": [A]}, False),
    ):
        examples = pair({**fields, "label": label}).examples
        there = "chosen" if label else "rejected"
        assert examples == {there: Chat("r:1", (Q, A), 1, plain)}
    whole = pair({"prompt": "q", "completion": [*LONG, A], "label": label}).examples
    assert whole[there] == Chat("r:1", (*LONG, A), len(LONG))


@pytest.mark.parametrize("name", ("label", "kto_tag"))
def test_a_labelled_conversation_is_an_unpaired_row(name):
    turns = [*LONG, A]
    for fields in (
        {"messages": turns},
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in turns]},
    ):
        examples = pair({**fields, name: False}).examples
        assert examples == {"rejected": Chat("r:1", tuple(turns), len(LONG))}
    examples = pair({"instruction": "q", "input": "", "output": "a", name: True}).examples
    assert examples == {"chosen": Chat("r:1", (Q, A), 1, True)}
    examples = pair({"prompt": "q", "completion": "a", name: True}).examples
    assert examples == {"chosen": Chat("r:1", (Q, A), 1, True)}
    with pytest.raises(ValueError, match="r:1: the response in column 'messages' is empty"):
        pair({"messages": [*LONG, A, Q], name: True})


def test_the_third_response_is_the_column_reference():
    fields = {"prompt": "q", "chosen": "a", "rejected": "b", "reference": "a"}
    assert list(pair(fields).examples) == ["chosen", "rejected"]
    assert pair(fields, third="gold").examples["gold"] == Chat("r:1", (Q, A), 1, True)
    fields = {"chosen": [*LONG, A], "rejected": [*LONG, B], "reference": [*LONG, answer("c")]}
    assert pair(fields, third="gold").examples["gold"] == Chat("r:1", (*LONG, answer("c")), len(LONG))


def test_columns_are_renamed_and_numbers_are_read():
    fields = {"question": "q", "good": "a", "bad": "b", "gap": 2, "margin": 0.5, "sure": 3}
    options = {
        "columns": ("prompt=question", "chosen=good", "rejected=bad", "weight=sure"),
        "extras": ("gap", "margin"),
    }
    parsed = pair(fields, weight_column="weight", **options)
    assert parsed.examples == pair({"prompt": "q", "chosen": "a", "rejected": "b"}).examples
    assert parsed.numbers == (2.0, 0.5) and parsed.weight == 3.0


def test_tools_reach_the_template():
    tools = [{"type": "function", "function": {"name": "sum"}}]
    parsed = pair({"prompt": [Q], "chosen": [A], "rejected": [B], "tools": json.dumps(tools)})
    assert parsed.examples["chosen"].tools == parsed.examples["rejected"].tools == tools


GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}
SAD = [
    ({**GOOD, "rejected": "a"}, {}, "chosen and rejected are identical"),
    ({**GOOD, "rejected": "a"}, {"format": "plain"}, "chosen and rejected are identical"),
    ({"chosen": [Q, A], "rejected": [Q, A]}, {}, "chosen and rejected are identical"),
    ({"chosen": HUMAN + " a", "rejected": HUMAN + " a"}, {}, "chosen and rejected are identical"),
    ({**GOOD, "chosen": " \n"}, {}, "column 'chosen' is empty; fill it or remove the row"),
    ({**GOOD, "rejected": [answer(" ")]}, {}, r"rejected\[0\], an assistant turn, is empty"),
    ({"chosen": HUMAN + " a", "rejected": HUMAN}, {}, "the response in column 'rejected' is empty"),
    ({**GOOD, "rejected": None}, {}, "column 'rejected' is null; use a string or a list"),
    ({**GOOD, "rejected": 3}, {}, "column 'rejected' is of type int; use a string or a list"),
    ({**GOOD, "prompt": " "}, {}, "column 'prompt' is empty"),
    ({**GOOD, "prompt": []}, {}, "column 'prompt' is an empty list"),
    (
        {"prompt": [Q], "chosen": [user("x"), A], "rejected": [Q, B]},
        {},
        r"column 'chosen' begins with a user turn like a full conversation, but its message 0 differs",
    ),
    (
        {"prompt": list(LONG), "chosen": [*LONG[:3], user("x"), A], "rejected": [B]},
        {},
        r"column 'chosen' begins .* 3 differs",
    ),
    (
        {"prompt": list(LONG), "chosen": list(LONG[:2]), "rejected": [B]},
        {},
        f"column 'chosen' begins .* but it ends after 2 of the prompt's {len(LONG)} messages",
    ),
    (
        {"prompt": "x", "chosen": [Q, A], "rejected": [Q, B]},
        {},
        "common beginning of the conversations in chosen and rejected does not end with the prompt",
    ),
    ({"prompt": "q", "chosen": [user("x"), A], "rejected": [Q, B]}, {}, "does not end with the prompt"),
    (
        {"prompt": [Q, A], "chosen": [B], "rejected": [answer("c")]},
        {},
        "the prompt ends with an assistant turn",
    ),
    (
        {"prompt": [Q], "chosen": [A, user("x")], "rejected": [B]},
        {},
        "response in column 'chosen' ends with a user turn",
    ),
    ({"chosen": [A], "rejected": [B]}, {}, "chosen and rejected have no common first message"),
    ({"chosen": [Q, A], "rejected": [user("x"), B]}, {}, "chosen and rejected have no common first message"),
    (
        {"chosen": [*SAID, A], "rejected": [*SAID[:2], user("x"), B]},
        {},
        "differ in message 2, which is not an assistant turn",
    ),
    ({"chosen": [Q, A], "rejected": [Q, A, Q, B]}, {}, "differ in message 2, which is not an assistant turn"),
    ({"chosen": [Q, A], "rejected": "b"}, {}, "only one of 'chosen' and 'rejected' is a string"),
    ({"chosen": "a", "rejected": "b"}, {}, "column 'chosen' is a string that does not begin with 'Human:'"),
    (
        {"chosen": "x" + HUMAN + " a", "rejected": HUMAN + " b"},
        {},
        "column 'chosen' is a string that does not begin with 'Human:'",
    ),
    (
        {"chosen": HUMAN + " a", "rejected": HUMAN.replace(" o", " x") + " b"},
        {},
        r"the dialogues differ in turn 2, before their last turn",
    ),
    (
        {"chosen": HUMAN + " a", "rejected": "\n\nHuman: p\n\nAssistant: b"},
        {},
        r"differ in turn 2, before their last turn",
    ),
    ({"chosen": "Human: a", "rejected": "Human: b"}, {}, "a dialogue needs a prompt and a response"),
    (
        {"chosen": HUMAN + " a\n\nHuman: x", "rejected": HUMAN + " a\n\nHuman: y"},
        {},
        "column 'chosen' begins with a user turn",
    ),
    ({"prompt": "q", "chosen": "a"}, {}, "the columns prompt, chosen fit no format; accepted are preference"),
    (
        {"prompt": "q", "chosen": "a"},
        {"format": "preference"},
        r"no column rejected, which format preference requires",
    ),
    ({"prompt": "q", "completion": "a", "label": "yes"}, {}, "label is 'yes'; use true or false"),
    ({"prompt": "q", "completion": "a", "label": 2}, {}, "label is 2; use true or false"),
    ({"prompt": "q", "completion": "a", "label": None}, {}, "label is None; use true or false"),
    ({"prompt": "q", "completion": "a", "label": 0.5}, {}, r"label is 0\.5; use true or false"),
    ({"prompt": "q", "completion": "a", "label": ""}, {}, "label is ''; use true or false"),
    ({"prompt": "q", "completion": "a", "label": [True]}, {}, r"label is \[True\]; use true or false"),
    ({**GOOD, "conversations": GPT}, {}, "fit the formats preference and ranking; set data.format"),
    (GOOD, {"third": "gold"}, "no column 'reference', from which data.third=gold"),
    (
        GOOD,
        {"extras": ("margin",)},
        r"no number in column 'margin', .* add it, or name one that the row has: prompt, chosen, rejected",
    ),
    ({**GOOD, "margin": "one"}, {"extras": ("margin",)}, "column 'margin' .* is 'one'; use a finite number"),
    ({**GOOD, "margin": True}, {"extras": ("margin",)}, "column 'margin' .* is True; use a finite number"),
    (
        {**GOOD, "margin": float("nan")},
        {"extras": ("margin",)},
        "column 'margin' .* is nan; use a finite number",
    ),
    ({**GOOD, "w": -1}, {"weight_column": "w"}, "the weight in column 'w' is -1; use 0 or more"),
    (GOOD, {"weight_column": "w"}, r"no number in column 'w', which data.weight_column names"),
    (GOOD, {"format": "dpo"}, "data.format='dpo'; use auto, plain or one of preference"),
    (
        {"chosen": [Q, A], "rejected": [Q, B]},
        {"format": "plain"},
        "data.format=plain is for preference and rated and unpaired rows",
    ),
    (
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
        {"format": "plain"},
        "column 'prompt' must be a string, got list",
    ),
    (GOOD, {"columns": ("prompt=question",)}, "no column 'question'"),
    (GOOD, {"columns": ("ask=promt",)}, "maps to unknown column 'ask'; use one of"),
    (
        GOOD,
        {"columns": ("Q=prompt",)},
        "unknown column 'Q'; use one of .*, or write prompt=Q if 'Q' is the column of the rows",
    ),
]


@pytest.mark.parametrize(("fields", "options", "error"), SAD)
def test_a_bad_row_is_one_line_that_names_it(fields, options, error):
    with pytest.raises(ValueError, match=error) as raised:
        pair(fields, "rows.jsonl:7", **options)
    text = str(raised.value)
    assert "\n" not in text and ("rows.jsonl:7" in text or text.startswith("data."))


def test_a_bad_row_is_found_behind_good_ones():
    rows = [Row("r:1", GOOD), Row("r:2", {**GOOD, "rejected": "a"})]
    with pytest.raises(ValueError, match="^r:2: chosen and rejected are identical"):
        pairs(rows, PairRows("r").token_settings)


def test_every_kind_of_file_gives_the_same_pairs(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [GOOD, {"prompt": "r\n", "chosen": "c, d", "rejected": 'e "f"'}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    with (tmp_path / "r.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(GOOD))
        writer.writeheader()
        writer.writerows(rows)
    parsed = [
        [p.examples["chosen"].messages for p in pairs(read_rows(str(f)), PairRows("r").token_settings)]
        for f in tmp_path.iterdir()
    ]
    assert len(parsed) == 3 and parsed[0] == parsed[1] == parsed[2]


def test_conversations_need_a_template_and_strings_do_not(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(GOOD))
    source = PairRows(str(path), held_out="none", batch=1).open(tiny("none"), cache=tmp_path)
    assert (
        source.info.preview
        == "prompt: <s>### Instruction:\nq\n\n### Response:\n\nchosen: a</s>\nrejected: b</s>"
    )
    path.write_text(json.dumps({"chosen": [Q, A], "rejected": [Q, B]}))
    with pytest.raises(ValueError, match="r.jsonl:1: a conversation needs a chat template"):
        PairRows(str(path), held_out="none", batch=1).open(tiny("none"), cache=tmp_path)
