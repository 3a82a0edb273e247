"""Decision rows: their prompts, choices and probabilities, batches of them, and the errors of bad ones."""

import copy
import json
import re

import numpy as np
import pytest
from public_rows import TEXTS, public_rows
from tiny_tokenizers import CHATML, tiny

from jaxft.data.decision_rows import DecisionRows, choice_names
from jaxft.data.decisions import answer_tokens, parse
from jaxft.data.inspection import inspect, measure, row_problem
from jaxft.data.row_settings import RowSettings
from jaxft.data.rows.format_choice import parse_dataset
from jaxft.data.rows.invalid_rows import InvalidRow
from jaxft.data.rows.row_files import Row
from jaxft.serve.served_models import ServedModel, decision_prompt

QUESTION = {
    "question": "Which is it?",
    "choices": ["a", {"value": "b", "description": "the rank"}],
    "answer": "b",
}
THINKING = CHATML.replace(
    "<|im_start|>assistant\n' }}{% endif %}",
    "<|im_start|>assistant\n' }}{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}",
)


def write(folder, rows, name="r.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def source_of(folder, rows, tokenizer=None, **options):
    options = {"held_out": "none", "max_length": 256, "batch": 2, **options}
    data = DecisionRows(write(folder, rows), **options)
    return data.open(tokenizer or tiny("chatml"), cache=folder / "cache")


def questions(count):
    """Decisions of two to four choices, every third with probabilities."""
    found = []
    for i in range(count):
        names = [f"{name}{i}" for name in "wxyz"[: 2 + i % 3]]
        answer = names[i % len(names)] if i % 3 else {names[0]: 0.25, names[-1]: 0.75}
        found.append({"question": f"{i}?", "choices": names, "answer": answer, "weight": 1 + i % 2})
    return found


def texts_and_choices(source, batch, tokenizer):
    """(text read, {letter: probability}, weight) of each decision of a batch."""
    for (micro, row, m), weight in np.ndenumerate(batch.token_weights):
        if weight:
            at, segment = batch.read[micro, row, m], batch.segments[micro, row]
            ids = batch.ids[micro, row][(segment == segment[at]) & (np.arange(len(segment)) <= at)]
            used = batch.choices[micro, row, m] >= 0
            letters = [tokenizer.decode([batch.tokens[c]]) for c in batch.choices[micro, row, m][used]]
            p = dict(zip(letters, batch.probabilities[micro, row, m][used].tolist()))
            assert batch.targets[micro, row, m] == batch.ids[micro, row, at + 1]
            yield tokenizer.decode(ids), p, float(weight)


@pytest.mark.parametrize("options", [{}, {"packing": False}, {"micro": 2, "batch": 4}], ids=str)
def test_batches_have_every_decision_with_its_choices_and_weights_that_sum_to_one(tmp_path, options):
    tokenizer, rows = tiny("chatml"), questions(11)
    source = source_of(tmp_path, rows, tokenizer, **options)
    found = {}
    for step in range(int(source.info.steps_per_epoch)):
        batch = source.batch(step)[0]
        assert batch.choices.shape == source.shapes[0].choices.shape == batch.probabilities.shape
        assert batch.token_weights.sum() == pytest.approx(1)
        factor = None
        for text, p, weight in texts_and_choices(source, batch, tokenizer):
            number = int(text.split("user\n")[1].split("?")[0])
            found[number] = p
            factor = factor or weight / rows[number]["weight"]
            assert weight == pytest.approx(factor * rows[number]["weight"])
            assert text.endswith("<|im_start|>assistant\nchoice#")
    assert sorted(found) == list(range(11))
    for number, row in enumerate(rows):
        answer = row["answer"] if isinstance(row["answer"], dict) else {row["answer"]: 1.0}
        expected = {letter: answer.get(name, 0.0) for letter, name in zip("ABCD", row["choices"])}
        assert found[number] == pytest.approx(expected)


def test_held_out_decisions_have_the_same_weight(tmp_path):
    held = write(tmp_path, [{**row, "weight": i} for i, row in enumerate(questions(4))], "h.jsonl")
    weights = [x.token_weights for x in source_of(tmp_path, questions(4), held_out=held).held_out]
    assert sorted(np.concatenate(weights, axis=None).tolist())[-4:] == pytest.approx([0.25] * 4)
    assert sum(x.sum() for x in weights) == pytest.approx(1)


def test_a_prompt_lists_its_choices_and_is_the_one_that_the_server_reads(tmp_path):
    tokenizer = tiny("chatml")
    decision = parse(Row("r:1", QUESTION), "decision")
    source = source_of(tmp_path, [QUESTION, QUESTION])
    batch = source.batch(0)[0]
    (text, p, _), _ = texts_and_choices(source, batch, tokenizer)
    assert text == (
        "<|im_start|>user\nWhich is it?\n\nAnswer with one of these choices:\nchoice#A a\n"
        "choice#B b: the rank<|im_end|>\n<|im_start|>assistant\nchoice#"
    )
    assert p == {"A": 0.0, "B": 1.0}
    served, tokens = decision_prompt(ServedModel("m", tokenizer, (), len(tokenizer)), decision)
    assert tokenizer.decode(served) == text
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "Which is it?"}]
    other = parse(Row("r:1", {**QUESTION, "question": None, "messages": turns}), "decision")
    assert [m["content"] for m in other.messages][0] == "s" and other.messages[1] == decision.messages[0]
    beside = {**QUESTION, "question": None, "messages": turns[1:], "system": "s"}
    assert parse(Row("r:1", beside), "decision").messages == other.messages


def test_a_reranker_s_prompt_is_the_published_one_of_qwen3():
    # https://huggingface.co/Qwen/Qwen3-Reranker-0.6B: prefix, format_instruction and suffix of its model card
    prefix = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
        'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    tokenizer = copy.deepcopy(tiny("chatml"))
    tokenizer.chat_template = THINKING
    tokenizer.add_tokens(["yes", "no"])
    row = {"query": "what is a rank?", "document": "the rank of a matrix", "label": 1}
    decision = parse(Row("r:1", row), "reranker")
    served, tokens = decision_prompt(ServedModel("m", tokenizer, (), len(tokenizer)), decision)
    body = "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
    body += "<Query>: what is a rank?\n<Document>: the rank of a matrix"
    assert tokenizer.decode(served) == prefix + body + suffix
    assert decision.probabilities == (0.0, 1.0) and decision.answers == ("no", "yes")
    assert [*tokens] == [tokenizer.convert_tokens_to_ids(x) for x in ("no", "yes")]
    soft = parse(Row("r:1", {**row, "label": 0.25, "instruction": "Find it"}), "reranker")
    assert soft.probabilities == (0.75, 0.25) and "<Instruct>: Find it\n" in soft.messages[1]["content"]


def labelled(*labels):
    return [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]


def test_labels_are_those_of_the_training_rows_in_order_or_the_given_ones(tmp_path):
    rows = labelled("pos", "neg", "pos", "other")
    source = source_of(tmp_path, rows)
    assert source.info.recorded == {"formats": ["label"], "labels": ["neg", "other", "pos"]}
    assert choice_names(source.split.rows, 0) == ["neg", "other", "pos"]
    data = DecisionRows(str(tmp_path / "r.jsonl"), held_out="none")
    assert len(measure(data, tiny("chatml"), tmp_path / "cache")) == len(
        [*inspect(data, tiny("chatml")).train()]
    )
    numbers = [{"text": "t", "label": 1}, {"text": "u", "label": 0}]
    named = source_of(tmp_path, numbers, labels=("bad", "good"), question="Is it good?")
    found = dict((text, p) for text, p, _ in texts_and_choices(named, named.batch(0)[0], tiny("chatml")))
    (text,) = (text for text in found if "user\nt\n" in text)
    assert "\n\nIs it good?\n" in text and "choice#B good" in text and found[text] == {"A": 0.0, "B": 1.0}


@pytest.mark.parametrize(
    "choices, answer, expected",
    [
        (["4", "5"], "5", (0, 1)),
        (["4", "5", "6"], 1, (0, 1, 0)),  # MMLU's index
        (["1", "2", "infinitely many"], 1, (0, 1, 0)),  # also where another choice has this text
        (["1", "2", "3"], "1", (1, 0, 0)),
        ([1, 2, 4], 2, (0, 1, 0)),  # of numbers, a value
        (["x", "y", "z"], "2", (0, 0, 1)),  # CSV files have strings alone
        (["x", "y", "z"], 1.0, (0, 1, 0)),
        ([True, False], True, (1, 0)),
        (["a", "b"], [0.2, 0.8], (0.2, 0.8)),
        (["a", "b", "c"], {"a": 0.33, "b": 0.33, "c": 0.33}, (1 / 3,) * 3),
        ({"label": ["A", "B"], "text": ["x", "y"]}, "B", (0, 1)),  # ARC's
        (["x", "y", "z"], "C", (0, 0, 1)),  # RACE's
        (["A", "C", "B"], "C", (0, 1, 0)),
    ],
    ids=str,
)
def test_an_answer_is_a_value_an_index_or_probabilities(choices, answer, expected):
    found = parse(Row("r:1", {"question": "q", "choices": choices, "answer": answer}), "decision")
    assert found.probabilities == pytest.approx(expected)


def answers_of(rows, **settings):
    """The choice of each row, or its error."""
    parsed = parse_dataset(
        [Row(f"r.jsonl:{i}", row) for i, row in enumerate(rows)], "decisions", RowSettings(**settings)
    )
    return [
        str(x) if isinstance(x, InvalidRow) else dict(zip(x.probabilities, names_of(x)))[1]
        for x in (row if isinstance(row, InvalidRow) else row.examples["response"] for row in parsed)
    ]


def names_of(decision):
    return [choice.name for choice in decision.choices]


def asked(choices, *answers, **more):
    return [{"question": "q", "choices": choices, "answer": answer, **more} for answer in answers]


@pytest.mark.parametrize(
    "rows, expected",
    [
        # by value, although 4 is no index and the others would be
        (asked(["3", "4", "5"], 4, 3) + asked(["1", "2", "3"], 2, 3), ["4", "3", "2", "3"]),
        # by index, from 0, also where the text of the index is a choice (MMLU)
        (asked(["x", "y", "z"], 0, 2) + asked(["0", "4", "2", "1"], 1), ["x", "z", "4"]),
        (asked(["x", "y"], "0", "1") + asked(["4", "5"], "1"), ["x", "y", "5"]),  # CSV files have strings
        # by letter, also among numbers and letters (RACE, MMLU-Pro)
        (asked(["4", "5", "6"], "B", "C") + asked(["C", "B"], "A"), ["5", "6", "C"]),
        (asked(["C", "B"], "B", "C"), ["B", "C"]),
    ],
    ids=["value", "index", "text-index", "letter", "letters-as-values"],
)
def test_all_answers_of_a_file_are_read_in_the_same_way(rows, expected):
    assert answers_of(rows) == expected


@pytest.mark.parametrize(
    "rows, message",
    [
        (asked(["x", "y", "z"], 0, 1) + asked(["3", "4", "5"], 4), "r.jsonl:2: answer '4' is none of the 3"),
        (
            asked(["x", "y"], "A", "B", 1),
            "r.jsonl:2: answer '1' is none of the 2 choices; use A to B, as most",
        ),
        (asked(["b", "a"], "B"), "answer 'B' is none of the 2 choices; near: "),
        (asked(["x", "y"], "x", "y", 0), "r.jsonl:2: answer '0' is none of the 2 choices"),
    ],
    ids=["index", "letter", "case", "value"],
)
def test_an_answer_unlike_the_others_of_its_file_is_an_error_that_names_the_row(rows, message):
    assert re.search(message, answers_of(rows)[-1])


def test_workers_read_answers_as_the_whole_file_does(tmp_path):
    rows = asked(["1", "2", "3"], 0, 2, 1)  # the third alone could be a value
    source = source_of(tmp_path, rows, workers=2, format="decision")
    assert [source.split.rows.extras["probabilities"][i].tolist() for i in range(3)] == [
        [1, 0, 0], [0, 0, 1], [0, 1, 0]
    ]  # fmt: skip


def test_options_of_numbers_have_letters_as_answers_in_race_and_mmlu_pro():
    race = {"article": "a", "question": "q", "options": ["3", "4"], "answer": "A"}
    pro = {"question": "q", "options": ["3", "4", "5"], "answer": "C"}
    exam = {"question": "q", **dict(zip(("opa", "opb", "opc", "opd"), "1234")), "cop": 2}
    assert answers_of([race]) == ["3"] and answers_of([pro]) == ["5"] and answers_of([exam]) == ["3"]


def test_a_context_is_part_of_the_question():
    (row,) = asked(["red", "blue"], "red", context="The dog is red.")
    assert parse(Row("r:1", row), "decision").messages[-1]["content"].startswith("The dog is red.\n\nq\n\n")
    turns = [{"role": "user", "content": "q"}]
    chat = {**row, "question": None, "messages": turns}
    assert parse(Row("r:1", chat), "decision").messages == parse(Row("r:1", row), "decision").messages
    social = {"context": "c", "question": "q", "answerA": "x", "answerB": "y", "answerC": "z", "label": "1"}
    (parsed,) = parse_dataset([Row("r:1", social)], "decisions")
    assert parsed.examples["response"].messages[-1]["content"].startswith("c\n\nq\n\nAnswer")
    without = parse(Row("r:1", {**row, "context": ""}), "decision").messages
    assert without[-1]["content"].startswith("q\n\nAnswer")
    with pytest.raises(InvalidRow, match="column 'context'"):
        parse(Row("r:1", {**row, "context": {"contexts": ["c"]}}), "decision")


def test_minus_one_is_no_label_and_spellings_of_a_label_are_one(tmp_path):
    few = {"invalid": "drop", "invalid_limit": 0.5}
    source = source_of(tmp_path, labelled(0, 2, -1, 1, 1), **few)  # SNLI's
    assert source.split.rows.labels == ("0", "1", "2") and len(source.split.rows) == 4
    assert [x.reason for x in source.info.stats.invalid] == ["no label"]
    assert any(x.endswith("data.labels=NAME,NAME,... gives 0, 1, ... names") for x in source.info.warnings)
    three = source_of(tmp_path, labelled(-1, 0, 1))
    assert three.split.rows.labels == ("-1", "0", "1") and "label -1 is a choice" in three.info.warnings[0]
    assert source_of(tmp_path, labelled("pos", "pos ", "neg")).split.rows.labels == ("neg", "pos")
    rows = source_of(tmp_path, labelled(0, "0.0", 1.0, {"0": 0.25, "1.0": 0.75})).split.rows
    assert rows.labels == ("0", "1")
    assert [rows.extras["probabilities"][i].tolist() for i in range(4)] == [
        [1, 0],
        [1, 0],
        [0, 1],
        [0.25, 0.75],
    ]
    assert label_of("0.0", ("bad", "good")) == (1, 0)  # pandas' CSV
    for label, message in ((-1, "label -1 means that the row has no label"), ("B", "'B' is none of the 2")):
        with pytest.raises(InvalidRow, match=message):
            label_of(label, ("bad", "good"))


def test_errors_of_labels_name_the_source(tmp_path):
    one, two = write(tmp_path, labelled("bad", "bad")), write(tmp_path, labelled("bad", "good"), "o.jsonl")
    with pytest.raises(ValueError, match=r"r.jsonl: all rows have the same label, 'bad'"):
        DecisionRows(f"{two},{one}", held_out="none").open(tiny("chatml"), cache=tmp_path / "c")
    with pytest.raises(ValueError, match="no row names a label; list the labels in data.labels"):
        source_of(tmp_path, labelled([0.2, 0.8], [0.6, 0.4]))


def test_labels_of_rows_with_choices_of_their_own_are_refused_in_training(tmp_path):
    with pytest.raises(ValueError, match="data.labels=x,y are .* remove data.labels"):
        source_of(tmp_path, [QUESTION] * 2, labels=("x", "y"))
    scored = source_of(tmp_path, [QUESTION] * 2, labels=("x", "y"), unlabelled=True)
    assert scored.info.recorded["labels"] == [] and choice_names(scored.split.rows, 0) == ["a", "b"]


@pytest.mark.parametrize(
    "rows, labels",
    [
        (
            [
                {"question": "q", "choices": ["a", "b"]},
                {"question": "r", "choices": ["a", "b"], "answer": None},
            ],
            (),
        ),
        ([{"text": "t"}, {"text": "u", "label": None}], ("a", "b")),
        ([{"query": "q", "document": "d"}, {"query": "q", "document": "e", "label": ""}], ()),
        ([{"goal": "g", "sol1": "a", "sol2": "b"}, {"goal": "h", "sol1": "a", "sol2": "b", "label": ""}], ()),
    ],
    ids=["decision", "label", "reranker", "piqa"],
)
def test_rows_without_an_answer_are_scored_and_not_learned(rows, labels):
    scoring = RowSettings(labels=labels, unlabelled=True)
    rows = [Row(f"r:{i}", row) for i, row in enumerate(rows)]
    for row in parse_dataset(rows, "decisions", scoring):
        assert row.examples["response"].probabilities == ()
    with pytest.raises(ValueError):
        raise parse_dataset(rows, "decisions", RowSettings(labels=labels))[1]


ASKED, GOOD, BAD_ONE = TEXTS[1]


@pytest.mark.parametrize(
    "name, begins, choices, answer",
    [
        ("sst2", f"{GOOD}\n\nWhich label", ("bad", "good"), "good"),
        ("mnli", f"premise: {GOOD}\nhypothesis: {BAD_ONE}\n\nWhich label", ("yes", "maybe", "no"), "maybe"),
        ("boolq", f"{GOOD}\n\n{ASKED}\n\nAnswer", ("false", "true"), "true"),
        ("arc", f"{ASKED}\n\nAnswer", (BAD_ONE, GOOD, "None"), GOOD),
        ("mmlu", f"{ASKED}\n\nAnswer", (GOOD, BAD_ONE, "None of these", "Cannot say"), GOOD),
        ("mmlu_pro", f"{ASKED}\n\nAnswer", (GOOD, BAD_ONE, "None", "All"), GOOD),
        ("hellaswag", f"{ASKED}\n\nAnswer", (BAD_ONE, "No.", GOOD, "Yes."), GOOD),
        ("winogrande", f"{ASKED} _\n\nAnswer", (GOOD, BAD_ONE), GOOD),
        ("race", f"{GOOD}\n\n{ASKED}\n\nAnswer", (BAD_ONE, GOOD), GOOD),
    ],
)
def test_public_rows_are_read_as_they_are(name, begins, choices, answer):
    rows = [Row(f"r:{i}", fields) for i, fields in enumerate(public_rows(name))]
    found = parse_dataset(rows, "decisions", RowSettings(labels=choices))[1].examples["response"]
    assert found.messages[-1]["content"].startswith(begins)
    assert tuple(choice.name for choice in found.choices) == choices
    assert choices[found.probabilities.index(1)] == answer


def label_of(label, labels):
    return parse(Row("r:1", {"text": "t", "label": label}), "label", RowSettings(labels=labels)).probabilities


def test_a_label_is_a_name_and_an_index_only_where_names_are_no_numbers(tmp_path):
    assert label_of(1, ("bad", "good")) == label_of("1", ("bad", "good")) == label_of("good", ("bad", "good"))
    stars = ("1", "2", "3", "4", "5")
    assert label_of(1, stars) == label_of("1", stars) == (1, 0, 0, 0, 0)
    with pytest.raises(InvalidRow, match="label '0' is none of the 5 choices"):
        label_of(0, stars)
    soft = labelled({"x": 0.3, "y": 0.7}, "z", " ")
    rows = source_of(tmp_path, soft, invalid="drop", invalid_limit=0.5).split.rows
    assert rows.labels == ("x", "y", "z") and rows.extras["probabilities"][0] == pytest.approx([0.3, 0.7, 0])
    assert source_of(tmp_path, labelled(10, 9, 1)).split.rows.labels == ("1", "9", "10")
    (note,) = source_of(tmp_path, labelled(0, 1)).info.warnings
    assert note.endswith("data.labels=NAME,NAME,... gives 0, 1, ... names")


def test_labels_are_counted_in_all_readable_rows_whatever_the_format_is_chosen_by(tmp_path):
    path = write(tmp_path, [{"text": "no label"}, *labelled("b", "a", "b")])
    (tmp_path / "r.jsonl").write_text((tmp_path / "r.jsonl").read_text() + "{not JSON\n")
    for options in ({"format": "auto"}, {"format": "label"}, {"workers": 2}, {"columns": ("label=label",)}):
        data = DecisionRows(path, held_out="none", invalid="drop", invalid_limit=0.5, **options)
        rows = data.open(tiny("chatml"), cache=tmp_path / "c").split.rows
        assert rows.labels == ("a", "b") and len(rows) == 3 and len(rows.invalid) == 2
    one = (tmp_path / "r.jsonl").read_text().splitlines()[1]
    assert "valid, has" in row_problem(data.settled([rows]), tiny("chatml"), "r.jsonl:2"), one


def test_a_held_out_file_and_all_sources_have_the_labels_of_the_training_rows(tmp_path):
    train, held = write(tmp_path, labelled("a", "b", "c")), write(tmp_path, labelled("c"), "h.jsonl")
    split = DecisionRows(train, held_out=held).open(tiny("chatml"), cache=tmp_path / "c").split
    assert choice_names(split.rows, 3) == ["a", "b", "c"]
    other = write(tmp_path, labelled("x", "y"), "o.jsonl")
    with pytest.raises(ValueError, match="different labels, a,b,c and x,y; set data.labels to"):
        DecisionRows(f"{train},{other}", held_out="none").open(tiny("chatml"), cache=tmp_path / "c")
    with pytest.raises(ValueError, match="h.jsonl:1: label 'z' is none of the 3 choices"):
        write(tmp_path, labelled("z"), "h.jsonl")
        DecisionRows(train, held_out=held).open(tiny("chatml"), cache=tmp_path / "c")
    for labels, message in ((("a",), "the same label, 'a'"), (range(30), "at least 30 different labels")):
        with pytest.raises(ValueError, match=f"{message}.*data.labels"):
            source_of(tmp_path, labelled(*labels))


@pytest.mark.parametrize(
    ("label", "yes"), [("1.0", 1), ("0.7", 0.7), (0.25, 0.25), (True, 1), ("no", 0), (0, 0)], ids=str
)
def test_a_reranker_s_label_is_yes_or_no_or_the_probability_of_yes(label, yes):
    row = Row("r:1", {"query": "q", "document": "d", "label": label})
    assert parse(row, "reranker").probabilities == pytest.approx((1 - yes, yes))


def test_rows_with_the_same_question_are_on_one_side_and_duplicates_agree_in_probabilities(tmp_path):
    answers = [{"a": p, "b": 1 - p} for p in (0.5, 0.6, 0.7, 0.8)]
    rows = [{**QUESTION, "question": f"{i}?", "answer": a} for i in range(10) for a in (*answers, answers[0])]
    source = source_of(tmp_path, rows, held_out=0.2, drop=("duplicates",))
    split = source.split
    train, held = (
        {split.rows.sequence(i)[:-1].tobytes() for i in side} for side in (split.train, split.held)
    )
    assert held and not train & held and len(split.train) + len(split.held) == 40


@pytest.mark.parametrize("columns", [("sentence", "kind"), ("question", "answerKey")])
def test_rows_of_no_format_are_one_line(tmp_path, columns):
    with pytest.raises(InvalidRow, match=r"r.jsonl:1: the columns .* fit no format"):
        source_of(tmp_path, [dict.fromkeys(columns, "x")] * 3)


BAD = [
    ({"answer": "c"}, "answer 'c' is none of the 2 choices"),
    ({"answer": 2}, "answer '2' is none of the 2 choices"),
    ({"answer": None}, "is none of the 2 choices"),
    ({"answer": {"a": 0.5, "b": 0.4}}, "sum to 0.9; they must sum to 1, within 0.01"),
    ({"answer": {"a": 1.5, "b": -0.5}}, "probability of 'a' is 1.5"),
    ({"answer": {"a": "x", "b": 1}}, "probability of 'a' is x"),
    ({"answer": [10**400, 1]}, "probability of 'a' is 1000"),
    ({"choices": ["4", "5"], "answer": "1"}, "answer '1' is none of the 2 choices"),
    ({"choices": [4, 5], "answer": 1}, "answer '1' is none of the 2 choices"),
    ({"answer": {"c": 1}}, "answer 'c' is none of the 2 choices"),
    ({"choices": ["a"], "answer": "a"}, "2 to 26 choices, one letter each, got 1"),
    ({"choices": [str(i) for i in range(27)], "answer": "3"}, "2 to 26 choices, one letter each, got 27"),
    ({"choices": ["b", "b"]}, "two choices have the value 'b'"),
    ({"choices": "b"}, "choices must be a list"),
    ({"choices": [{"description": "x"}, "b"]}, "choices[0] has no value"),
    ({"question": ""}, "column 'question' is empty"),
    ({"messages": [{"role": "user", "content": "x"}]}, "keep one of them"),
]


@pytest.mark.parametrize("change, message", BAD, ids=lambda x: str(x)[:40])
def test_a_bad_row_is_one_line(change, message):
    with pytest.raises(InvalidRow) as error:
        parse(Row("r.jsonl:3", {**QUESTION, **change}), "decision")
    assert str(error.value).startswith("r.jsonl:3: ") and message in str(error.value)


def test_bad_rows_end_the_run_with_file_and_row_or_are_counted(tmp_path):
    rows = [QUESTION] * 5 + [{**QUESTION, **change} for change, _ in BAD[:5]]
    with pytest.raises(
        InvalidRow, match=r"r.jsonl:6: answer 'c' is none of the 2 choices; near: .*invalid=drop"
    ):
        source_of(tmp_path, rows, invalid="error")
    with pytest.raises(InvalidRow, match="r.jsonl:1: column 'weight' is -1"):
        source_of(tmp_path, [{**QUESTION, "weight": -1}], invalid="error")
    found = source_of(tmp_path, rows, invalid="drop", invalid_limit=0.5)
    assert {count.reason: count.rows for count in found.info.stats.invalid} == {
        "answer that is none of the choices": 3,
        "probabilities that do not sum to 1": 1,
        "probability that is no number from 0 to 1": 1,
    }
    assert found.info.stats.examples == 5


def test_letters_that_the_tokenizer_merges_are_refused():
    tokenizer = copy.deepcopy(tiny("chatml"))
    tokenizer.add_tokens(["#A"])
    with pytest.raises(ValueError, match="the answer 'A' after 'choice#' as one .* another tokenizer$"):
        answer_tokens(tokenizer, "choice#", ("A", "B"))
    tokenizer = copy.deepcopy(tiny("chatml"))
    tokenizer.add_tokens(["#D"])
    with pytest.raises(ValueError, match="'D' .* another tokenizer, or at most 3 choices$"):
        answer_tokens(tokenizer, "choice#", ("A", "B", "C", "D", "E"))
    with pytest.raises(ValueError, match="the answer 'no' alone as one token"):
        answer_tokens(tiny("chatml"), "", ("no", "yes"))


def test_settings_that_decisions_do_not_have_are_refused_and_inspect_reads_them(tmp_path):
    for options in ({"loss_on": "all"}, {"too_long": "truncate"}, {"packing": "wrapped"}, {"labels": ("a",)}):
        with pytest.raises(ValueError, match=f"data.{next(iter(options))}="):
            DecisionRows("r.jsonl", **options)
    long = {**QUESTION, "question": "word " * 100}
    data = DecisionRows(write(tmp_path, [QUESTION, QUESTION, long]), held_out=0.3, max_length=128)
    found = inspect(data, tiny("chatml"))
    assert found.statistics["dropped"] == 1 and found.statistics["held_out"] == 1
    (example,) = found.train()
    soft = DecisionRows(write(tmp_path, questions(2), "s.jsonl"), held_out="none")
    facts = [x.facts for x in inspect(soft, tiny("chatml")).of_step(0)]
    assert [text.partition("probabilities ")[2] for text in sorted(facts, key=len)] == ["", "0.25, 0.75"]
    assert np.flatnonzero(example.parts[0].weights).tolist() == [len(example.parts[0].ids) - 1]
    assert len(measure(data, tiny("chatml"), tmp_path / "cache")) == 3
    with pytest.raises(ValueError, match="128; raise data.max_length or set data.too_long=drop"):
        DecisionRows(data.train, max_length=128, too_long="error").open(tiny("chatml"), cache=tmp_path)
