"""Decisions: a question with choices of which one is right, as rows and as prompts.

Accepted rows (`format="auto"` uses the one whose columns are present):

    decision   {"question" (a string) or "messages", "choices", "answer"}
    label      {"text", "label"}: a classifier; its labels are data.labels, or those of the rows
    reranker   {"query", "document", "label"}: whether the document is relevant, yes or no

choices: strings, or {"value", "description"} objects (value: a string, a number or a boolean). answer: a
value, or its probability by value, {"value": p}, or a list of probabilities in the order of the choices. An
integer is the index of a choice, from 0, unless the choices' values are numbers. label: a name, or an index
where the names are not all numbers; of a reranker true or false, yes or no, 1 or 0, or the probability of
yes. All of them may have "weight" and "chat_template_kwargs".

A prompt lists its choices as "choice#A ...", and the response is "choice#" with one letter, which is one
token, so that the probabilities of the choices are read at one position. The response to a reranker's prompt
is yes or no, as Qwen3-Reranker was trained (arXiv:2506.05176, section 2).
"""

import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.data.rows.columns import messages_of, template_arguments_of, text_of, with_system
from jaxft.data.rows.dataset_rows import Row
from jaxft.data.rows.example import ANSWER_PREFIX, Decision, DecisionChoice, Message
from jaxft.data.rows.invalid import InvalidRow, similar_names

DECISION, LABEL, RERANKER = "decision", "label", "reranker"
LETTERS = string.ascii_uppercase
TOLERANCE = 0.01  # by which probabilities may differ from a sum of 1
LABEL_QUESTION = "Which label fits this text?"
RELEVANCE = "Given a web search query, retrieve relevant passages that answer the query"  # Qwen3-Reranker's
JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note "
    'that the answer can only be "yes" or "no".'
)
NO_YES = ("no", "yes")
YES = {"true": 1.0, "yes": 1.0, "1": 1.0, "false": 0.0, "no": 0.0, "0": 0.0}


def decide(
    name: str, messages: Sequence[Message], choices: Sequence[DecisionChoice], **more: Any
) -> Decision:
    """Return the decision between choices, which the last of the messages, a user's, is made to list.

    more: further fields of Decision. Raises InvalidRow for fewer than two choices, more than LETTERS, and two
    of the same value.
    """
    names = [choice.name for choice in choices]
    if not 2 <= len(names) <= len(LETTERS):
        raise InvalidRow(
            name,
            f"{'fewer than two' if len(names) < 2 else 'too many'} choices",
            f"a decision has 2 to {len(LETTERS)} choices, one letter each, got {len(names)}",
        )
    twice = next((one for one in names if names.count(one) > 1), None)
    if twice is not None:
        raise InvalidRow(name, "choices of the same value", f"two choices have the value {twice[:60]!r}")
    if messages[-1]["role"] != "user":
        raise InvalidRow(
            name,
            "no question",
            f"the last message is from the {messages[-1]['role']}; a decision ends with a user's question",
        )
    answers = tuple(LETTERS[: len(names)])
    lines = [
        f"{ANSWER_PREFIX}{letter} {choice.name}{': ' * bool(choice.description)}{choice.description}"
        for letter, choice in zip(answers, choices, strict=True)
    ]
    question = f"{messages[-1]['content']}\n\nAnswer with one of these choices:\n" + "\n".join(lines)
    asked = (*messages[:-1], {**messages[-1], "content": question})
    return Decision(name, asked, tuple(choices), answers, **more)


def user_messages(text: str, system: str | None = None) -> list[Message]:
    """Return a user's message, after a system message if there is one."""
    before = [] if not system else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": text}]


# ---- rows


def parse(row: Row, format: str, labels: Sequence[str] = (), question: str | None = None) -> Decision:
    """Return the decision of a row, whose columns have jaxft's names.

    labels: of rows with a label. question: data.question, in place of LABEL_QUESTION, or of RELEVANCE for a
    reranker. Raises InvalidRow.
    """
    more: dict[str, Any] = {"arguments": template_arguments_of(row)}
    if format == RERANKER:
        instruction = row.fields.get("instruction") or question or RELEVANCE
        query, document = text_of(row, "query"), text_of(row, "document")
        text = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
        yes, choices = _relevance(row), tuple(map(DecisionChoice, NO_YES))
        return Decision(
            row.name, tuple(user_messages(text, JUDGE)), choices, NO_YES, "", (1 - yes, yes), **more
        )
    if format == LABEL:
        choices = tuple(map(DecisionChoice, labels))
        text = f"{text_of(row, 'text')}\n\n{question or LABEL_QUESTION}"
        messages = with_system(row, user_messages(text))
        return decide(row.name, messages, choices, probabilities=_answer(row, "label", choices), **more)
    choices = row_choices(row.name, row.fields["choices"])
    if row.fields.get("messages") is not None:
        if row.fields.get("question") is not None:
            raise row.invalid(
                "question and messages", "the row has 'question' and 'messages'; keep one of them"
            )
        messages = with_system(row, messages_of(row, "messages"))
    else:
        messages = with_system(row, user_messages(text_of(row, "question")))
    return decide(row.name, messages, choices, probabilities=_answer(row, "answer", choices), **more)


def row_choices(name: str, value: Any) -> tuple[DecisionChoice, ...]:
    """Return the choices of a row, or of a request: strings or {"value", "description"} objects, or ARC's
    {"label": [...], "text": [...]}.
    """
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        labels = value.get("label")
        if not isinstance(labels, list) or len(labels) != len(value["text"]):
            raise InvalidRow(name, "choices of a wrong type", "choices: label and text differ in length")
        value = [{"value": a, "description": b} for a, b in zip(labels, value["text"], strict=True)]
    if not isinstance(value, list | tuple):
        raise InvalidRow(
            name,
            "choices of a wrong type",
            f"choices must be a list of strings or of {{value, description}}, got {type(value).__name__}",
        )
    return tuple(_choice(name, number, item) for number, item in enumerate(value))


def _choice(name: str, number: int, item: Any) -> DecisionChoice:
    value, text = (item.get("value"), item.get("description")) if isinstance(item, Mapping) else (item, None)
    if not isinstance(value, str | int | float) or not str(value).strip():
        raise InvalidRow(
            name,
            "choice without a value",
            f"choices[{number}] has no value; use a string, or an object with a value and a description",
        )
    if not isinstance(text, str | None):
        raise InvalidRow(
            name, "description that is no text", f"choices[{number}]: the description must be a string"
        )
    return DecisionChoice(value, (text or "").strip())


def _answer(row: Row, column: str, choices: Sequence[DecisionChoice]) -> tuple[float, ...]:
    """Return the probability of each choice from a row's answer or label. Raises InvalidRow."""
    value, names = row.fields[column], [choice.name for choice in choices]
    if isinstance(value, list | tuple) and len(value) == len(names):
        return _probabilities(row.name, column, dict(zip(names, value, strict=True)), names)
    if isinstance(value, Mapping):
        given = {str(key): p for key, p in value.items() if p is not None}  # null in a table is none
        wrong = next((key for key in given if key not in names), None)
        if wrong is not None:
            raise _no_choice(row.name, column, wrong, names)
        return _probabilities(row.name, column, given, names)
    number = _index(value, choices, column)
    if number is None:
        name = DecisionChoice(value).name if isinstance(value, str | int | float) else ""
        if name not in names:
            raise _no_choice(row.name, column, value, names)
        number = names.index(name)
    return tuple(float(i == number) for i in range(len(names)))


def _index(value: Any, choices: Sequence[DecisionChoice], column: str) -> int | None:
    """Return the number of the choice that an answer is the index of, None for an answer by value."""
    names = [choice.name for choice in choices]
    by_value = any(not isinstance(choice.value, str) for choice in choices)
    if column == "label" or isinstance(value, str):  # labels are read as text, also those that are numbers
        by_value |= all(name.strip().lstrip("-").isdecimal() for name in names)
    if by_value or isinstance(value, bool) or value in names:
        return None
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        return None
    whole = isinstance(number, int) or (isinstance(number, float) and number.is_integer())  # pandas' 1.0
    return int(number) if whole and 0 <= number < len(names) else None


def _no_choice(row: str, column: str, value: Any, names: Sequence[str]) -> InvalidRow:
    near = similar_names(str(value), list(names))
    return InvalidRow(
        row,
        f"{column} that is none of the choices",
        f"{column} {str(value)[:60]!r} is none of the {len(names)} choices; near: {', '.join(near)[:200]}",
    )


def _probabilities(
    row: str, column: str, given: Mapping[str, Any], names: Sequence[str]
) -> tuple[float, ...]:
    """Return probabilities in the order of the names, divided by their sum."""
    for name, p in given.items():
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1 + TOLERANCE:
            raise InvalidRow(
                row,
                "probability that is no number from 0 to 1",
                f"{column}: the probability of {name[:60]!r} is {str(p)[:40]}; use a number from 0 to 1",
            )
    total = math.fsum(given.values())
    if abs(total - 1) > TOLERANCE + 1e-9:  # 0.99 is not below 0.99
        raise InvalidRow(
            row,
            "probabilities that do not sum to 1",
            f"{column}: the probabilities sum to {total:.4g}; they must sum to 1, within {TOLERANCE}",
        )
    return tuple(given.get(name, 0.0) / total for name in names)


def _relevance(row: Row) -> float:
    """Return the probability of yes from the label of a reranker's row."""
    value = row.fields["label"]
    text = str(value).strip().lower()
    try:
        found = YES[text] if text in YES else float(text)  # CSV files have strings alone
    except ValueError:
        found = -1.0
    if 0 <= found <= 1:
        return found
    raise row.invalid(
        "label that is neither yes nor no",
        f"column 'label' is {str(value)[:40]!r}; use yes or no, true or false, 1 or 0, or the probability of "
        "yes from 0 to 1",
    )


# ---- tokens


def answer_tokens(tokenizer: Any, prefix: str, answers: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the token ids of a prefix, and the token of each answer after it.

    Raises ValueError for an answer that is not one token of its own there.
    """
    encoded = tokenizer([prefix, *(prefix + x for x in answers)], add_special_tokens=False).input_ids
    before, *found = encoded if prefix else ([], *encoded[1:])
    wrong = [
        x for x, ids in zip(answers, found, strict=True) if ids[:-1] != before or len(ids) <= len(before)
    ]
    if wrong:
        where = f"after {prefix!r}" if prefix else "alone"
        raise ValueError(
            f"the tokenizer does not make {wrong[0]!r} one token {where}, at which the probability of a "
            "choice is read; use a model with another tokenizer, or fewer choices"
        )
    tokens = [ids[-1] for ids in found]
    if len({*tokens}) < len(tokens):
        raise ValueError(f"the tokenizer makes two of {', '.join(answers)} the same token; use another model")
    return before, tokens
