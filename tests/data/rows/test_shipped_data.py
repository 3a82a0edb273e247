"""The rows that ship in configs/data: well-formed, of bounded length, and no two of them alike."""

import itertools
import json
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "data"
QUESTIONS = ("finetuning.jsonl", "finetuning_held_out.jsonl")


def _lines(name: str) -> list[str]:
    return (FOLDER / name).read_bytes().decode("utf-8", errors="strict").removesuffix("\n").split("\n")


def _rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in _lines(name)]


def _labelled() -> list[tuple[str, dict[str, str]]]:
    return [(f"{name}:{i}", row) for name in QUESTIONS for i, row in enumerate(_rows(name), 1)]


def _five_grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def _alike(texts: list[str], limit: float = 0.5) -> list[tuple[int, int, float]]:
    """Pairs of texts that share more than `limit` of the 5-grams of the one with fewer."""
    grams = [_five_grams(text) for text in texts]
    holders = defaultdict(list)
    for i, found in enumerate(grams):
        for gram in found:
            holders[gram].append(i)
    shared = Counter(pair for held in holders.values() for pair in itertools.combinations(held, 2))
    shares = ((i, j, n / min(len(grams[i]), len(grams[j]))) for (i, j), n in shared.items())
    return [(i, j, share) for i, j, share in shares if share > limit]


@pytest.mark.parametrize("name", [*QUESTIONS, "general.jsonl"])
def test_files_are_utf8_without_control_characters(name):
    lines = _lines(name)
    texts = [value for line in lines for value in json.loads(line).values()]
    for number, text in enumerate(lines, 1):
        bad = [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs", "Cn") or c == "\ufffd"]
        assert not bad, f"{name}:{number}: control characters {bad}"
    for text in texts:
        bad = [c for c in text if unicodedata.category(c).startswith("C") and c != "\n"]
        assert not bad, f"{name}: control characters {bad} in {text[:60]!r}"


@pytest.mark.parametrize("name", QUESTIONS)
def test_question_rows_have_one_shape(name):
    for number, row in enumerate(_rows(name), 1):
        assert list(row) == ["instruction", "response"], f"{name}:{number}: {list(row)}"
        assert all(isinstance(v, str) and v == v.strip() for v in row.values()), f"{name}:{number}"
        assert 3 <= len(row["instruction"].split()) <= 60, f"{name}:{number}: {row['instruction']!r}"
        assert 25 <= len(row["response"].split()) <= 90, (
            f"{name}:{number}: {len(row['response'].split())} words"
        )
        assert row["response"][-1] in ".`!?)", f"{name}:{number}: unfinished sentence"


def test_general_rows_have_one_shape():
    rows = _rows("general.jsonl")
    assert 20 <= len(rows) <= 40
    for number, row in enumerate(rows, 1):
        assert list(row) == ["text"] and row["text"] == row["text"].strip(), f"general.jsonl:{number}"
        assert 60 <= len(row["text"].split()) <= 120, (
            f"general.jsonl:{number}: {len(row['text'].split())} words"
        )
        found = re.search(r"jaxft|fine-tun|neural|machine learning|language model", row["text"].lower())
        assert not found, f"general.jsonl:{number}: {found}"


def test_a_third_of_the_training_and_of_the_held_out_rows_is_about_each_subject():
    for name in QUESTIONS:
        about_jaxft = ["jaxft" in (row["instruction"] + row["response"]).lower() for row in _rows(name)]
        share = sum(about_jaxft) / len(about_jaxft)
        assert 1 / 3 <= share <= 2 / 3, f"{name}: {share:.0%} of the rows are about jaxft"


def test_no_question_or_answer_is_repeated():
    rows = [row for _, row in _labelled()]
    for key in ("instruction", "response"):
        repeated = [
            text for text, n in Counter(" ".join(r[key].lower().split()) for r in rows).items() if n > 1
        ]
        assert not repeated
    general = [r["text"] for r in _rows("general.jsonl")]
    assert len(set(general)) == len(general)


def test_no_two_rows_share_half_of_their_five_grams():
    names, rows = zip(*_labelled(), strict=True)
    texts = [row["instruction"] + " " + row["response"] for row in rows]
    assert [(names[i], names[j], round(share, 2)) for i, j, share in _alike(texts)] == []
    assert _alike([r["text"] for r in _rows("general.jsonl")]) == []


def test_the_five_gram_rule_sees_a_copied_row():
    copied = "a cat sat on the mat and looked at the moon"
    other = "nothing here is shared with the first of these lines"
    assert [(i, j) for i, j, _ in _alike([copied, other, copied + " all night"])] == [(0, 2)]


@pytest.mark.parametrize("name", ["calculator", "calculator_held_out"])
def test_a_shipped_step_is_labelled_right_until_the_first_wrong_result(name):
    rows = _rows(name.replace("calculator", "calculator_steps") + ".jsonl")
    for row, known in zip(rows, _rows(f"{name}.jsonl"), strict=True):
        assert row["prompt"] == known["prompt"]
        results = [[int(x) for x in re.findall(r"\d+", step)] for step in row["completions"]]
        right = [
            c == (a + b if "+" in step else a * b)
            for step, (a, b, c) in zip(row["completions"], results, strict=True)
        ]
        assert row["labels"] == [all(right[: n + 1]) for n in range(2)]
        assert results[1][0] == results[0][2] and (results[1][2] == int(known["answer"])) == row["labels"][1]
    labels = [label for row in rows for label in row["labels"]]
    assert 0.4 < sum(labels) / len(labels) < 0.6
