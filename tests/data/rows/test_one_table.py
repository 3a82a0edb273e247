"""One table of formats decides how a row is read: in training, in evaluation, as a prompt, and in errors."""

import json

import pytest
from parsed_rows import examples, pairs
from test_published_formats import RANKINGS, TWO
from tiny_tokenizers import tiny

from jaxft.data.decision_rows import DecisionRows
from jaxft.data.rows.conversation import PLAIN
from jaxft.data.rows.format_choice import parse_dataset, prompt_of, task_of
from jaxft.data.rows.formats import DECISIONS, PAIRS, SFT
from jaxft.data.rows.invalid_rows import InvalidRow, valid
from jaxft.data.rows.row_files import Row
from jaxft.data.sft import Rows

USER = [{"role": "user", "content": "q"}]
MMLU = {"question": "q", "choices": ["x", "y"], "answer": 1, "subject": "s"}
TASKS = (DECISIONS, PAIRS, SFT)


def row(fields):
    return Row("r:1", fields)


def contents(fields):
    return [message["content"] for message in prompt_of(row(fields)).messages]


# ---- evaluation


@pytest.mark.parametrize("fields", [*RANKINGS.values(), *({**x[0], **x[1]} for x in TWO.values())])
def test_preferences_of_every_format_are_evaluated_as_preferences(fields):
    assert task_of(row(fields), (), TASKS) == PAIRS


@pytest.mark.parametrize(
    ("fields", "columns", "task"),
    [
        (MMLU, (), DECISIONS),
        ({"text": "t", "label": "good"}, (), DECISIONS),
        ({"prompt": "q", "completion": "a", "label": "True"}, (), PAIRS),
        ({"prompt": "q", "completion": "a", "label": "physics"}, (), SFT),
        ({"messages": [*USER, {"role": "assistant", "content": "a"}], "label": 1}, (), PAIRS),
        ({"prompt": "q", "better": "a", "worse": "b"}, ("chosen=better", "rejected=worse"), PAIRS),
        ({"prompt": "q", "completion": "a", "answers": ["a", "b"]}, (), SFT),
        ({"prompt": "q", "response": "a", "helpfulness": 4, "correctness": 4}, (), SFT),
        ({"question": "q", "answer": "a"}, (), SFT),
        ({"a": 1}, (), SFT),
    ],
)
def test_the_task_of_a_row_follows_from_its_columns_and_from_labels_and_ratings(fields, columns, task):
    assert task_of(row(fields), columns, TASKS) == task


# ---- prompts


@pytest.mark.parametrize("fields", [*RANKINGS.values(), *({**x[0], **x[1]} for x in TWO.values())])
def test_preferences_of_every_format_are_prompts_too(fields):
    assert contents(fields) == ["q"]


def test_a_prompt_needs_no_preference_and_keeps_tools_and_a_transcript_ends_before_its_response():
    tied = {"context": USER, "response1": "x", "response2": "y", "overall_preference": 0}
    assert contents(tied) == ["q"]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    openai = {**TWO["openai"][0], "input": {"messages": USER, "tools": tools}}
    assert prompt_of(row(openai)).tools == tools
    glaive = {"system": "SYSTEM: Be kind.", "chat": "USER: q\n\n\nASSISTANT: a <|endoftext|>"}
    assert contents(glaive) == ["Be kind.", "q"]


@pytest.mark.parametrize(
    "fields",
    [
        MMLU,
        {key: x for key, x in MMLU.items() if key != "answer"},
        {"question": "q", "options": ["x", "y"], "answer": "B"},
        {"messages": USER, "choices": ["x", "y"], "answer": "y"},
        {"goal": "q", "sol1": "x", "sol2": "y", "label": 1},
        {"question": "q", "choices": {"label": ["1", "2"], "text": ["x", "y"]}, "answerKey": "2"},
    ],
)
def test_a_question_with_choices_is_a_prompt_with_its_choices(fields):
    (text,) = contents(fields)
    assert text == "q\n\nAnswer with one of these choices:\nchoice#A x\nchoice#B y"


def test_a_decision_has_the_same_messages_in_training_and_as_a_prompt():
    fields = {**MMLU, "system": "s"}
    (found,) = map(valid, parse_dataset([row(fields)], DECISIONS, DecisionRows("r").token_settings))
    decision = found.examples["response"]
    assert [*prompt_of(row(fields)).messages] == [*decision.messages]


def test_a_row_with_a_prompt_of_its_own_is_that_prompt():
    assert contents({**MMLU, "prompt": "p"}) == ["p"]
    assert prompt_of(row({**MMLU, "prompt": "p"}), PLAIN).prompt == "p"


# ---- contexts


@pytest.mark.parametrize("response", ["answer", "response", "completion", "output"])
def test_the_context_of_a_question_is_in_its_prompt(response):
    fields = {"id": 1, "question": "q", "context": "c", response: "a"}
    (example,) = examples([row(fields)])
    assert [m["content"] for m in example.messages] == ["q\n\nc", "a"]
    assert contents(fields) == ["q\n\nc"]
    (pair,) = pairs([row({"question": "q", "context": "c", "chosen": "a", "rejected": "b"})])
    assert [m["content"] for m in pair.examples["rejected"].messages] == ["q\n\nc", "b"]


def test_a_context_that_is_no_text_is_an_error_that_says_how_to_read_the_rest():
    fields = {"question": "q", "context": {"title": ["t"]}, "answer": "a"}
    with pytest.raises(ValueError, match="column 'context' must be a string.*data.columns=prompt=question,"):
        examples([row(fields)])


def test_columns_with_text_that_no_format_reads_are_named_at_the_start(tmp_path):
    path = tmp_path / "r.jsonl"
    rows = [{"prompt": f"q {i}", "completion": "a", "context": "a b", "id": "x"} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    lines = Rows(str(path), held_out="none", batch=1).open(tiny("chatml"), cache=tmp_path).info.warnings
    assert "note: r.jsonl: columns that are not read: context" in lines
    named = Rows(str(path), held_out="none", batch=1, columns=("prompt=context",))
    lines = named.open(tiny("chatml"), cache=tmp_path).info.warnings
    assert not any("not read: context" in line for line in lines)


# ---- images


@pytest.mark.parametrize(
    "media", [{"images": ["1.jpg"]}, {"videos": "1.mp4"}, {"image": {"bytes": None, "path": "1.jpg"}}]
)
def test_rows_with_images_are_invalid_and_without_any_they_are_text(media):
    fields = {"messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}]}
    for read in (lambda x: examples([x]), prompt_of):
        with pytest.raises(InvalidRow, match="jaxft reads only text; remove the row"):
            read(row({**fields, **media}))
        read(row({**fields, **dict.fromkeys(media, [])}))
    examples([row({**fields, "image": "https://example.org/1.jpg"})])


# ---- errors


QA = {
    "reclor": {"context": "c", "question": "q", "answers": ["x", "y"], "label": 1, "id_string": "i"},
    "quail": {"context": "c", "question": "q", "answers": ["x", "y"], "correct_answer_id": 1, "id": "i"},
    "race-like": {"passage": "c", "question": "q", "options": ["x", "y"], "answer": "B"},
    "superglue": {"passage": "c", "question": "q", "label": 1, "idx": 3},
}


@pytest.mark.parametrize("name", QA)
def test_published_questions_about_a_text_are_decisions(name):
    (found,) = map(valid, parse_dataset([row(QA[name])], DECISIONS, DecisionRows("r").token_settings))
    decision = found.examples["response"]
    assert decision.probabilities == (0, 1) and decision.messages[-1]["content"].startswith("c\n\nq\n\n")


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "1", "title": "T", "context": "C", "question": "q", "answers": {"text": ["a"]}},
        {"question": "q", "answers": ["alias 1", "alias 2"]},
        {"prompt": "p", "answers": ["a", "b"], "n": 1},
    ],
)
def test_questions_with_answers_are_not_sent_to_preferences(fields):
    with pytest.raises(ValueError, match="fit no format") as error:
        examples([row(fields)])
    assert "dpo" not in str(error.value)
    with pytest.raises(ValueError, match="does not rate|is an object; use a list|'question' and 'context'"):
        pairs([row(fields)])
    for rated in ({"prompt": "p", "answers": [{"answer": "x", "rank": 1}, {"answer": "y", "rank": 2}]},):
        with pytest.raises(ValueError, match="belong to preference pairs"):
            examples([row(rated)])


@pytest.mark.parametrize(
    ("names", "task", "never"),
    [
        ("labeler question label", "steps", ("labels=labeler", "completions=label")),
        ("input label task", "steps", ("completions=task", "labels=label")),
        ("premise label idx", DECISIONS, ("answer=premise", "text=label", "document=")),
        ("question body label", DECISIONS, ("query=question", "document=body", "=label")),
    ],
)
def test_no_rename_is_proposed_that_reads_a_label_as_a_text_or_a_text_as_another(names, task, never):
    with pytest.raises(ValueError, match="fit no format") as error:
        parse_dataset([row(dict.fromkeys(names.split(), "x"))], task)
    proposed = str(error.value).rpartition("data.columns=")[2]
    assert not any(item in proposed for item in never)
