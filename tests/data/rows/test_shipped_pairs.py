"""The preference pairs that ship in configs/data: well-formed, all different, and of lengths that give
nothing away.
"""

import itertools
import json
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "data"
TRAIN, HELD_OUT = FILES = ("pairs.jsonl", "pairs_held_out.jsonl")
QUESTIONS = ("finetuning.jsonl", "finetuning_held_out.jsonl")
KEYS = ["prompt", "chosen", "rejected", "topic", "kind"]
TOPICS = {
    "lora", "full fine-tuning", "data and templates", "preference methods",
    "quantisation", "memory and speed", "jaxft", "evaluation",
}  # fmt: skip
KINDS = {"correctness", "helpful", "concise", "complete", "honest"}
BY_LENGTH = {"concise", "complete"}  # whose very point is length; they balance each other within every topic


def _lines(name: str) -> list[str]:
    return (FOLDER / name).read_bytes().decode("utf-8", errors="strict").removesuffix("\n").split("\n")


def _rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in _lines(name)]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _groups(rows: list[dict[str, str]], key: str) -> dict[str, list[dict[str, str]]]:
    out = defaultdict(list)
    for row in rows:
        out[row[key]].append(row)
    return dict(out)


def _differences(rows: list[dict[str, str]], size) -> list[int]:
    """Length of the chosen answer minus that of the rejected one, ties left out."""
    found = [size(row["chosen"]) - size(row["rejected"]) for row in rows]
    return [d for d in found if d]


def _longer(rows: list[dict[str, str]], size=len) -> float:
    """In which share of the pairs that are no ties the chosen answer is the longer one."""
    differences = _differences(rows, size)
    return sum(d > 0 for d in differences) / len(differences)


def _shared(texts: list[str]) -> dict[tuple[int, int], float]:
    """For every two texts with common 5-grams, their share of the 5-grams of the text that has fewer."""
    grams = []
    for text in texts:
        words = _words(text)
        grams.append({tuple(words[i : i + 5]) for i in range(len(words) - 4)})
    holders = defaultdict(list)
    for number, found in enumerate(grams):
        for gram in found:
            holders[gram].append(number)
    counts = Counter(two for held in holders.values() for two in itertools.combinations(held, 2))
    return {(i, j): n / min(len(grams[i]), len(grams[j])) for (i, j), n in counts.items()}


@pytest.mark.parametrize("name", FILES)
def test_files_are_utf8_without_control_characters(name):
    for number, line in enumerate(_lines(name), 1):
        texts = [line, *json.loads(line).values()]
        bad = {c for text in texts for c in text if unicodedata.category(c).startswith("C") or c == "\ufffd"}
        assert not bad, f"{name}:{number}: {bad}"


@pytest.mark.parametrize("name", FILES)
def test_rows_have_one_shape(name):
    for number, row in enumerate(_rows(name), 1):
        where = f"{name}:{number}"
        assert list(row) == KEYS, f"{where}: {list(row)}"
        assert all(isinstance(v, str) and v and v == v.strip() for v in row.values()), where
        assert row["topic"] in TOPICS and row["kind"] in KINDS, f"{where}: {row['topic']}, {row['kind']}"
        assert 3 <= len(row["prompt"].split()) <= 40, f"{where}: {row['prompt']!r}"
        for answer in (row["chosen"], row["rejected"]):
            assert 15 <= len(answer.split()) <= 90, f"{where}: {len(answer.split())} words in {answer!r}"
            assert len(re.findall(r"[.!?](?= [A-Z`]|$)", answer)) <= 4, (
                f"{where}: more than four sentences in {answer!r}"
            )
        assert row["chosen"][-1] in ".!?)`", f"{where}: the chosen answer is unfinished"
        assert row["rejected"][-1] in ".!?)`" or row["kind"] == "complete", (
            f"{where}: the rejected answer is unfinished"
        )


def test_topics_are_as_frequent_and_have_pairs_of_every_kind():
    train, held_out = _rows(TRAIN), _rows(HELD_OUT)
    for name, rows, most in ((TRAIN, train, 4), (HELD_OUT, held_out, 1)):
        sizes = {topic: len(group) for topic, group in _groups(rows, "topic").items()}
        assert sizes.keys() == TOPICS and max(sizes.values()) - min(sizes.values()) <= most, (
            f"{name}: {sizes}"
        )
    for topic, group in _groups(train, "topic").items():
        assert {row["kind"] for row in group} == KINDS, topic
    assert {row["kind"] for row in held_out} == KINDS


@pytest.mark.parametrize("size", [len, lambda text: len(text.split())], ids=["characters", "words"])
@pytest.mark.parametrize("name", FILES)
def test_length_does_not_predict_the_chosen_response_in_any_topic(name, size):
    for topic, rows in _groups(_rows(name), "topic").items():
        ties = len(rows) - len(_differences(rows, size))
        assert ties <= len(rows) / 20, f"{name}, {topic}: {ties} ties in {len(rows)} pairs"
        assert 0.45 <= _longer(rows, size) <= 0.55, (
            f"{name}, {topic}: chosen longer in {_longer(rows, size):.1%}"
        )


def test_length_does_not_predict_the_chosen_response_in_kinds_that_are_not_about_length():
    for kind, rows in _groups(_rows(TRAIN), "kind").items():
        if kind not in BY_LENGTH:
            assert 0.45 <= _longer(rows) <= 0.55, f"{kind}: chosen longer in {_longer(rows):.1%}"
    for topic, rows in _groups(_rows(TRAIN), "topic").items():
        count = Counter(row["kind"] for row in rows)
        assert count["concise"] == count["complete"], f"{topic}: {dict(count)}"


def test_the_balance_sees_a_longer_side():
    pairs = [
        {"chosen": "a b c", "rejected": "a b"},
        {"chosen": "a", "rejected": "b"},
        {"chosen": "a b c d", "rejected": "a"},
    ]
    assert _longer(pairs) == 1.0 and _differences(pairs, len) == [2, 6]


@pytest.mark.parametrize("name", FILES)
def test_correctness_pairs_are_near_in_length_and_in_words(name):
    for row in _rows(name):
        if row["kind"] == "correctness":
            sizes = sorted(len(row[key]) for key in ("chosen", "rejected"))
            assert sizes[0] >= 0.8 * sizes[1], f"{row['prompt']}: {sizes} characters"
            chosen, rejected = set(_words(row["chosen"])), set(_words(row["rejected"]))
            common = len(chosen & rejected) / min(len(chosen), len(rejected))
            assert common >= 0.6, f"{row['prompt']}: {common:.0%} of the words in common"


def test_no_prompt_or_answer_is_repeated():
    rows = [row for name in FILES for row in _rows(name)]
    prompts = [row["prompt"] for row in rows] + [
        row["instruction"] for name in QUESTIONS for row in _rows(name)
    ]
    answers = [row[key] for row in rows for key in ("chosen", "rejected")]
    for texts in (prompts, answers):
        assert [text for text, n in Counter(" ".join(_words(text)) for text in texts).items() if n > 1] == []


def test_no_two_rows_share_half_of_their_five_grams():
    rows = [(f"{name}:{i}", row) for name in FILES for i, row in enumerate(_rows(name), 1)]
    names, texts = zip(
        *((name, f"{r['prompt']} {r['chosen']} {r['rejected']}") for name, r in rows), strict=True
    )
    assert [(names[i], names[j], share) for (i, j), share in _shared(texts).items() if share > 0.5] == []


def test_pairs_are_no_copies_of_the_instruction_rows():
    pairs = [f"{row['prompt']} {row['chosen']}" for name in FILES for row in _rows(name)]
    texts = pairs + [f"{row['instruction']} {row['response']}" for name in QUESTIONS for row in _rows(name)]
    copied = {
        two: share for two, share in _shared(texts).items() if two[0] < len(pairs) <= two[1] and share > 0.5
    }
    assert copied == {}


def test_the_five_gram_rule_sees_a_copied_row():
    texts = [
        "a cat sat on the mat and looked up",
        "nothing in here is shared with the other one",
        "a cat sat on the mat",
    ]
    assert _shared(texts) == {(0, 2): 1.0}
