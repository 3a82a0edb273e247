"""Invalid rows end the run, or are left out, counted by reason and reported, and change no batch."""

import json
import re

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parsed_rows import readable_rows
from tiny_tokenizers import tiny

from jaxft.data.packing import reader
from jaxft.data.packing.pack import permutation
from jaxft.data.pairs import PairRows
from jaxft.data.prompts import Prompts, read_prompts, split_prompts
from jaxft.data.rows.invalid_rows import InvalidRow, InvalidRows, invalid_lines, shortened
from jaxft.data.rows.shipped import ROOT
from jaxft.data.sft import Rows

SFT = [{"instruction": "a", "response": "b"}, {"instruction": "a", "response": ""}]
PAIR = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "b"}]
UNPAIRED = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "b", "label": 7}]
PROMPT = [{"prompt": "a"}, {"prompt": " ", "answer": "b"}]


def stats_of(data, rows, tmp_path, **options):
    """The counts of a dataset of three valid rows with an invalid one in second place."""
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(map(json.dumps, [rows[0], rows[1], rows[0], rows[0]])))
    options = {"held_out": "none", "batch": 1} | options
    if data is Prompts:
        return read_prompts(
            str(path), Prompts(str(path), **options).reader(tiny("chatml"), tmp_path)
        ).split.rows
    return data(str(path), **options).open(tiny("chatml"), cache=tmp_path).info.stats


@pytest.mark.parametrize(
    ("data", "rows", "reason", "options"),
    [
        (Rows, SFT, "empty column 'response'", {}),
        (PairRows, PAIR, "identical responses", {}),
        (PairRows, UNPAIRED, "label that is neither true nor false", {"unpaired": True}),
        (Prompts, PROMPT, "empty column 'prompt'", {}),
    ],
)
def test_an_invalid_row_is_an_error_that_names_the_setting_or_is_left_out(
    data, rows, reason, options, tmp_path
):
    with pytest.raises(ValueError, match=r"r.jsonl:2: .*; data.invalid=drop leaves invalid rows out$"):
        stats_of(data, rows, tmp_path, **options)
    error = "1 of 4 rows are invalid, data.invalid_limit=0.05 allows 0"
    with pytest.raises(ValueError, match=f"{re.escape(error)}.*: 1 x {reason} .first r.jsonl:2: "):
        stats_of(data, rows, tmp_path, **options, invalid="drop")
    for _ in range(2):  # the second time from the cache
        stats = stats_of(data, rows, tmp_path, **options, invalid="drop", invalid_limit=0.25)
        assert stats.dropped == 0
        if data is Prompts:
            (count,) = stats.invalid
            assert count[:2] == (reason, 1) and count.first.startswith("r.jsonl:2: ")
        else:
            assert stats.examples == 3 and [row[:2] for row in stats.invalid] == [(reason, 1)]
    with pytest.raises(ValueError, match=r"r.jsonl:2: .*data.invalid=drop"):  # the cache hides nothing
        stats_of(data, rows, tmp_path, **options)


def test_data_without_a_valid_row_is_not_told_to_leave_the_invalid_rows_out(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "why?", "response": ""}) for _ in range(3)))
    with pytest.raises(ValueError, match=r"r.jsonl:1: .*; all 3 rows are invalid: correct ") as e:
        Rows(str(path), held_out="none", batch=1).open(tiny("chatml"), cache=tmp_path)
    assert "data.invalid" not in str(e.value)


# ---- 2,000 rows with ten kinds of dirt

LONG = "word " * 200
BROKEN = {  # lines that are no rows, and why not
    b'{"prompt": "why?", ': "malformed JSON",
    b"": "empty row",
    b"[1, 2]": "not an object",
    b'{"text": "\xff"}': "not UTF-8",
}


def turns(*texts):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": x} for i, x in enumerate(texts)]}


def clean_rows(kind, count):
    """Rows of unequal lengths, each with its number in it."""
    for i in range(count):
        question, answer = f"why {i}?" + " so" * (i % 7), "because" * (1 + i % 5)
        yield {
            "sft": turns(question, answer),
            "pairs": {"prompt": question, "chosen": answer, "rejected": f"no {i}"},
            "unpaired": {"prompt": question, "completion": answer, "label": i % 3 > 0},
            "prompts": {"prompt": question, "answer": answer},
        }[kind]


DIRT = {  # invalid rows of each kind of data, and why they are
    "sft": [
        (turns("why?", " "), "empty assistant turn"),
        (turns("why?", 7), "content of a wrong type"),
        (turns("why?", "\ud800"), "unpaired surrogate"),
        (turns("why?"), "no assistant turn"),
        (turns("", "so"), "empty prompt"),
        ({"messages": [{"content": "why?"}]}, "message without role or content"),
    ],
    "pairs": [
        ({"prompt": "why?", "chosen": "so", "rejected": "so"}, "identical responses"),
        ({"prompt": "why?", "chosen": "so", "rejected": " "}, "empty column 'rejected'"),
        ({"prompt": "why?", "chosen": "so"}, "missing column 'rejected'"),
        ({"prompt": "why?", "chosen": "so", "rejected": "\ud800"}, "unpaired surrogate"),
        ({"prompt": [7], "chosen": "so", "rejected": "no"}, "message without role or content"),
        ({"prompt": "why?", "chosen": [], "rejected": "no"}, "column without messages"),
    ],
    "unpaired": [
        ({"prompt": "why?", "completion": "so", "label": 7}, "label that is neither true nor false"),
        ({"prompt": "why?", "completion": " ", "label": True}, "empty column 'completion'"),
        ({"prompt": "why?", "completion": "so"}, "missing column 'label' or 'kto_tag'"),
        ({"prompt": "why?", "completion": "\ud800", "label": True}, "unpaired surrogate"),
        ({"prompt": [7], "completion": "so", "label": True}, "message without role or content"),
        ({"prompt": "why?", "completion": [], "label": True}, "column without messages"),
    ],
    "prompts": [
        ({"prompt": " ", "answer": "so"}, "empty column 'prompt'"),
        ({"title": "why?"}, "no prompt"),
        ({"prompt": "\ud800"}, "unpaired surrogate"),
        (turns("why?", 7), "content of a wrong type"),
        ({"messages": []}, "empty row"),
        ({"messages": [{"content": "why?"}]}, "message without role or content"),
    ],
}


def with_dirt(clean, dirt, places):
    """The lines of a file: clean rows, with invalid ones at these places."""
    lines = [json.dumps(row).encode() for row in clean]
    for place, (line, _) in sorted(zip(places, dirt, strict=True), key=lambda pair: pair[0]):
        lines.insert(place, line)
    return lines


def all_dirt(kind):
    """(line, reason) of each of the ten kinds of dirt."""
    return [*BROKEN.items(), *((json.dumps(row).encode(), reason) for row, reason in DIRT[kind])]


def opened(kind, path, cache, **options):
    """A source of the file's rows, or what a rollout source has in its place, with its invalid rows."""
    options = {"batch": 16, "held_out": 0.1} | options
    if kind == "prompts":
        return split_prompts(Prompts(str(path), **options), tiny("chatml"), cache)
    make = Rows if kind == "sft" else PairRows
    options |= {"unpaired": True} if kind == "unpaired" else {}
    return make(str(path), max_length=128, **options).open(tiny("chatml"), cache=cache)


def batches_of(kind, source):
    """All that training and evaluation read from a source, as a list of arrays."""
    if kind == "prompts":
        return [np.array(ids) for side in source for ids in side.token_ids] + [
            json.dumps([list(side.fields) for side in source])
        ]
    steps = [source.batch(step)[0] for step in range(source.info.steps)]
    return jax.tree.leaves((steps, source.held_out)) + [source.info.fingerprint]


def counts_of(kind, source):
    if kind == "prompts":
        return {x.reason: x.rows for x in source[0].split.rows.invalid}
    return {x.reason: x.rows for x in source.info.stats.invalid}


def assert_equal(a, b):
    assert len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", list(DIRT))
def test_drop_counts_ten_kinds_of_dirt_and_leaves_the_batches_of_the_clean_rows(kind, tmp_path):
    kinds = all_dirt(kind)
    assert len(kinds) == 10
    dirt = [x for number, x in enumerate(kinds, 1) for _ in range(number)]  # 1 of the first, 10 of the last
    dirt = [dirt[i] for i in permutation(len(dirt), 0)]
    clean = list(clean_rows(kind, 400 - len(dirt)))
    places = permutation(390, 1)[: len(dirt)]
    lines = with_dirt(clean, dirt, places)
    assert len(lines) == 400
    (tmp_path / "dirty.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "clean.jsonl").write_text("\n".join(map(json.dumps, clean)))
    dirty = opened(kind, tmp_path / "dirty.jsonl", tmp_path, invalid="drop", invalid_limit=0.2)
    expected = {}
    for number, (_, reason) in enumerate(kinds, 1):
        expected[reason] = expected.get(reason, 0) + number
    assert counts_of(kind, dirty) == expected
    alone = opened(kind, tmp_path / "clean.jsonl", tmp_path)
    assert_equal(batches_of(kind, dirty), batches_of(kind, alone))


@pytest.mark.parametrize("kind", list(DIRT))
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(choice=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=8))
def test_no_dirt_at_any_place_changes_a_batch(kind, choice, tmp_path):
    """The first row too may be invalid: it does not decide the format."""
    clean = list(clean_rows(kind, 24))
    dirt = [all_dirt(kind)[number] for number, _ in choice]
    lines = with_dirt(clean, dirt, [place for _, place in choice])
    (tmp_path / "dirty.jsonl").write_bytes(b"\n".join([*lines, json.dumps(clean[0]).encode()]))
    (tmp_path / "clean.jsonl").write_text("\n".join(map(json.dumps, [*clean, clean[0]])))
    dirty = opened(kind, tmp_path / "dirty.jsonl", tmp_path, invalid="drop", invalid_limit=0.5)
    assert sum(counts_of(kind, dirty).values()) == len(dirt)
    assert_equal(batches_of(kind, dirty), batches_of(kind, opened(kind, tmp_path / "clean.jsonl", tmp_path)))


def test_a_dialogue_dataset_with_empty_responses_and_early_differences_can_be_used(tmp_path):
    """As a public harmlessness set has them."""

    def row(response, last="no", first="why?"):
        start = f"\n\nHuman: {first}\n\nAssistant: so\n\nHuman: really?\n\nAssistant:"
        return {"chosen": f"{start.replace(first, 'why?')} {response}", "rejected": f"{start} {last}"}

    clean = [row(f"yes {i}") for i in range(60)]
    rows = [*clean[:20], row("yes", ""), *clean[20:40], row("yes", "no", "how?"), *clean[40:], row("", "no")]
    (tmp_path / "dirty.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "clean.jsonl").write_text("\n".join(map(json.dumps, clean)))
    dirty = opened("pairs", tmp_path / "dirty.jsonl", tmp_path, invalid="drop")
    assert [x[:2] for x in dirty.info.stats.invalid] == [
        ("empty response", 2),
        ("dialogues that differ before the last turn", 1),
    ]
    clean_source = opened("pairs", tmp_path / "clean.jsonl", tmp_path)
    assert_equal(batches_of("pairs", dirty), batches_of("pairs", clean_source))


@pytest.mark.parametrize("count", [29, 30])
def test_the_limit_is_a_fraction_of_all_rows_of_a_dataset(count, tmp_path):
    texts = [7] * count + [f"text {i}" for i in range(100 - count)]
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = Rows(str(tmp_path / "r.jsonl"), held_out="none", invalid="drop", invalid_limit=0.29)
    if count == 29:
        assert data.open(tiny("chatml"), cache=tmp_path).info.stats.examples == 71
    else:
        with pytest.raises(
            ValueError, match=r"30 of 100 rows are invalid, data.invalid_limit=0.29 allows 29"
        ):
            data.open(tiny("chatml"), cache=tmp_path)


@pytest.mark.parametrize(
    ("total", "end"),
    [(3, "correct data.format or data.columns, or raise data.invalid_limit"),
     (2, "none is left: 2 x b (first r:1: no b). Fix them, or correct data.format or data.columns")],
)  # fmt: skip
def test_another_limit_is_advised_only_if_valid_rows_are_left(total, end):
    rows = InvalidRows(0.1)
    for number in (1, 2):
        rows.add(InvalidRow(f"r:{number}", "b", "no b"))
    with pytest.raises(ValueError, match=f"{re.escape(end)}$"):
        rows.check("r", total)


# ---- what is printed


def test_few_invalid_rows_are_left_out_by_default_and_more_are_the_error_of_the_first(tmp_path):
    good = [json.dumps({"prompt": f"{i}", "completion": "b"}) for i in range(300)]
    bad = ['{"prompt": "a", "completion": " "}', "[]", '{"prompt": "a"}', "{"]

    def rows(count):
        lines = [*good[:100], *bad[:count], *good[100:]]
        (tmp_path / f"{count}.jsonl").write_text("\n".join(lines))
        data = Rows(str(tmp_path / f"{count}.jsonl"), held_out="none", workers=1)
        return data.open(tiny("chatml"), cache=tmp_path).info.stats

    stats = rows(3)  # 1 % of 303
    assert stats.examples == 300 and sum(count.rows for count in stats.invalid) == 3
    for _ in range(2):  # the second from the cache
        with pytest.raises(
            InvalidRow, match=r"4.jsonl:102: the row is a list.*; data.invalid=drop leaves inv"
        ):
            rows(4)


def test_a_mistake_of_settings_ends_a_long_run_early(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxft.data.rows.row_files.ROW_CHUNK_BYTES", 5_000)
    seen, tokenise = [], reader.tokenise_chunk
    monkeypatch.setattr(reader, "tokenise_chunk", lambda *a, **k: seen.append(1) or tokenise(*a, **k))
    lines = [json.dumps({"prompt": " ", "completion": "b" * 90}) for _ in range(2000)]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    with pytest.raises(InvalidRow, match="r.jsonl:1: column 'prompt' is empty"):
        Rows(str(tmp_path / "r.jsonl"), held_out="none", workers=1).open(tiny("chatml"), cache=tmp_path)
    assert len(seen) == 1


def test_the_first_of_each_reason_is_named_the_most_frequent_first():
    invalid = InvalidRows(1.0)
    for i, reason in enumerate(("b", "a", "a"), 1):
        invalid.add(InvalidRow(f"r:{i}", reason, "x"))
    assert invalid_lines(invalid.counts()) == [
        "3 invalid rows left out (data.invalid):\n      2  a: r:2: x\n      1  b: r:1: x"
    ]
    assert invalid_lines(()) == []


def test_cells_and_elements_of_tables_are_rows_too(tmp_path):
    (tmp_path / "r.csv").write_text("text\na\nb,c\n\nd\n")
    (tmp_path / "r.json").write_text(json.dumps([{"text": "a"}, 7, {}]))
    for name, reasons in (
        ("r.csv", ["wrong number of fields", "empty row"]),
        ("r.json", ["not an object", "empty row"]),
    ):
        invalid = InvalidRows(1.0)
        rows = readable_rows(tmp_path / name, invalid)
        assert [row.fields["text"] for row in rows] == (["a", "d"] if name == "r.csv" else ["a"])
        assert [count.reason for count in invalid.counts()] == reasons


@pytest.mark.parametrize(
    "options", [{"invalid": "skip"}, {"invalid_limit": 1.5}, {"invalid_limit": float("nan")}]
)
def test_settings_out_of_range_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"^data.{name}={value!r}; (use|expected) "):
        Rows("r.jsonl", **options)


def test_every_error_about_a_row_is_an_invalid_row():
    """Others end a run with data.invalid=drop: only settings that fit none of the rows may: too_long=error,
    packing=wrapped, a tokenizer without a chat template.
    """
    folder = ROOT / "jaxft" / "data"
    raised = [
        (file.name, text)
        for file in folder.rglob("*.py")
        for text in re.findall(
            r'raise ValueError\(\s*f"\{[\w.]*\bname\}.*?\n +\)\n', file.read_text(), re.DOTALL
        )
    ]
    assert len(raised) >= 3  # the pattern finds some
    others = [
        x
        for x in raised
        if not re.search(r"too_long|packing=wrapped|{remedy} or|the tokenizer has none", x[1])
    ]
    assert not others


def test_the_remedy_of_the_rows_comes_first_and_is_not_cut_in_a_word():
    remedy = "set chat_template=qwen, or use another tokenizer"
    found = InvalidRows(0.5)
    found.add(InvalidRow("r:1", "hidden call", f"the template misrenders a turn: {'x' * 300}; {remedy}"))
    with pytest.raises(ValueError) as error:
        found.check("r", 1)
    assert str(error.value).endswith(f"{remedy}). Fix them, or correct data.format or data.columns")
    words = " ".join(f"word{number}" for number in range(80))
    short = shortened(words, 300)
    assert short.endswith(" ...") and len(short) < 310 and words.startswith(f"{short[:-4]} ")
    assert shortened(f"the cause; fix it. {words}", 300) == "the cause; fix it ..."
