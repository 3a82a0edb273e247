"""The messages and JSON that ship in configs/data: well-formed, and held-out rows share neither values nor
wording with training rows.
"""

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "data"
ROWS, HELD_OUT_ROWS = "extraction.jsonl", "extraction_held_out.jsonl"
PAIRS, HELD_OUT_PAIRS = "extraction_pairs.jsonl", "extraction_pairs_held_out.jsonl"
TRAINING, HELD_OUT = (ROWS, PAIRS), (HELD_OUT_ROWS, HELD_OUT_PAIRS)
FIELDS = {
    "order": ["type", "item", "quantity", "address"],
    "booking": ["type", "name", "guests", "date", "time"],
    "ticket": ["type", "product", "order", "urgent"],
}
NUMBERS = {"quantity", "guests"}


def _rows(name):
    """The rows of a file as (message, fields of its JSON, row)."""
    rows = [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]
    return [
        (
            row["instruction" if "instruction" in row else "prompt"],
            json.loads(row["response" if "response" in row else "chosen"]),
            row,
        )
        for row in rows
    ]


def _all(names):
    return [row for name in names for row in _rows(name)]


def _values(fields):
    """The values that a message spells out, by their field."""
    return {
        name: str(value)
        for name, value in fields.items()
        if name not in ("type", "urgent") and value is not None
    }


def _places(value, text):
    """Where a value is written in a text as whole words."""
    return list(re.finditer(rf"(?<!\w){re.escape(value)}(?!\w)", text))


def _wording(message, fields):
    """The words of a message, with the names of its fields in place of their values."""
    for name, value in sorted(_values(fields).items(), key=lambda item: -len(item[1])):
        message = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", f" <{name}> ", message)
    return re.findall(r"<\w+>|[\w']+", message.lower())


def _runs_of_words(rows, length=4):
    words = [_wording(message, fields) for message, fields, _ in rows]
    return {tuple(found[i : i + length]) for found in words for i in range(len(found) - length + 1)}


@pytest.mark.parametrize("name", [*TRAINING, *HELD_OUT])
def test_rows_are_messages_and_the_json_that_they_say(name):
    for number, (message, fields, row) in enumerate(_rows(name), 1):
        where = f"{name}:{number}"
        expected = (
            ["prompt", "chosen", "rejected", "kind"] if "pairs" in name else ["instruction", "response"]
        )
        assert list(row) == expected, where
        assert message == message.strip() and 4 <= len(message.split()) <= 60, where
        bad = [c for text in row.values() for c in text if unicodedata.category(c)[0] == "C" and c != "\n"]
        assert not bad, where
        text = row["chosen" if "pairs" in name else "response"]
        assert text == json.dumps(fields), f"{where}: not on one line, or with other white space"
        assert list(fields) == FIELDS[fields["type"]], where
        for field, value in fields.items():
            kind = int if field in NUMBERS else bool if field == "urgent" else str
            assert type(value) is kind or value is None, f"{where}: {field}={value!r}"
        words = Counter(_wording(message, fields))
        assert all(words[f"<{field}>"] == 1 for field in _values(fields)), f"{where}: {words}"


@pytest.mark.parametrize("name", [*TRAINING, *HELD_OUT])
def test_every_kind_of_message_is_as_frequent(name):
    counts = Counter(fields["type"] for _, fields, _ in _rows(name))
    assert counts.keys() == FIELDS.keys() and max(counts.values()) - min(counts.values()) <= 1


def test_no_message_is_repeated():
    messages = Counter(" ".join(message.lower().split()) for message, _, _ in _all((*TRAINING, *HELD_OUT)))
    assert max(messages.values()) == 1


def test_no_value_of_a_held_out_row_occurs_in_a_training_row():
    training = _all(TRAINING)
    text = "\n".join(f"{message}\n{row.get('rejected', '')}" for message, _, row in training).lower()
    found = set()
    for _, fields, _ in _all(HELD_OUT):
        for name, value in _values(fields).items():
            words = value.split()
            parts = {"name": words[1:], "item": words, "product": words, "address": words[:2]}.get(name, ())
            parts = [value, *parts]
            found |= {part for part in parts if _places(part.lower(), text)}
    assert found == set()


def test_no_four_words_in_a_row_of_a_held_out_message_occur_in_a_training_message():
    assert _runs_of_words(_all(TRAINING)) & _runs_of_words(_all(HELD_OUT)) == set()


def test_wording_has_no_values():
    fields = {"type": "order", "item": "red mugs", "quantity": 3, "address": "12 Elm Road", "city": None}
    message = "Hi, 3 red mugs to 12 Elm Road! 33 thanks"
    assert _wording(message, fields) == ["hi", "<quantity>", "<item>", "to", "<address>", "33", "thanks"]
    assert ("<quantity>", "<item>", "to", "<address>") in _runs_of_words([(message, fields, {})])


@pytest.mark.parametrize("name", [PAIRS, HELD_OUT_PAIRS])
def test_a_pair_prefers_the_right_json_and_most_messages_lack_a_part(name):
    kinds = Counter()
    for number, (_, fields, row) in enumerate(_rows(name), 1):
        where, kind = f"{name}:{number}", row["kind"]
        kinds[kind] += 1
        assert kind == ("missing" if None in fields.values() else "complete"), where
        try:
            wrong = json.loads(row["rejected"]) != fields
        except ValueError:
            wrong = True
        assert wrong and row["rejected"].startswith("{"), where
    assert kinds["missing"] / kinds.total() == pytest.approx(0.5 if name == PAIRS else 0.6)


def test_few_rows_teach_null():
    lacking = [None in fields.values() for _, fields, _ in _rows(ROWS)]
    assert 0 < sum(lacking) / len(lacking) < 0.05
    assert not any(None in fields.values() for _, fields, _ in _rows(HELD_OUT_ROWS))
