"""Decisions: a question with choices of which one is right, as rows and as prompts.

Accepted rows (`format="auto"` uses the one whose columns are present):

    decision   {"question" (a string) or "messages", "choices", "answer"}
    label      {"text", "label"}: a classifier; its labels are data.labels, or the labels in the rows
    reranker   {"query", "document", "label"}: whether the document is relevant, yes or no

choices: strings, or {"value", "description"} objects (value: a string, a number or a boolean), or ARC's two
lists {"label", "text"}. answer: a value, an index from 0, a letter A, B, ..., or the probability of each
choice, {"value": p} or a list in the order of the choices. All answers of a dataset are read in the same way,
as values, indices or letters (see reading_of). "context" is put in front of the question. label: a name, an
index where the names are not all numbers, or the probability of each name; for a reranker, true or false, yes
or no, 1 or 0, or the probability of yes. Rows of all three formats may have "weight" and
"chat_template_kwargs".

A prompt lists its choices as "choice#A ...", and the response is "choice#" with one letter, which is one
token, so that the probabilities of the choices are read at one position. The response to a reranker's prompt
is yes or no, as Qwen3-Reranker was trained (arXiv:2506.05176, section 2).
"""

import json
import math
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from jaxft.data.row_settings import DEFAULT_ROW_SETTINGS, RowSettings
from jaxft.data.rows.columns import messages_of, template_arguments_of, text_of, with_system
from jaxft.data.rows.example import ANSWER_PREFIX, Decision, DecisionChoice, Message
from jaxft.data.rows.invalid_rows import InvalidRow, similar_names
from jaxft.data.rows.row_files import Row

DECISION, LABEL, RERANKER = "decision", "label", "reranker"
READINGS = VALUE, LETTER, INDEX = "value", "letter", "index"  # of the answers of a dataset
NO_LABEL = "-1"  # marks a row without a label in Hugging Face datasets with the labels 0, 1, 2, ...
LETTERS = string.ascii_uppercase
DECISION_FILE = "decision.json"  # in a folder of weights
TOLERANCE = 0.01  # by which probabilities may differ from a sum of 1
LABEL_QUESTION = "Which label fits this text?"
RELEVANCE = "Given a web search query, retrieve relevant passages that answer the query"  # Qwen3-Reranker's
JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note "
    'that the answer can only be "yes" or "no".'
)
NO_YES = ("no", "yes")
_WHOLE = re.compile(r"-?\d+\.0+")
YES = {"true": 1.0, "yes": 1.0, "1": 1.0, "false": 0.0, "no": 0.0, "0": 0.0}


def decide(
    name: str, messages: Sequence[Message], choices: Sequence[DecisionChoice], **more: Any
) -> Decision:
    """Make a Decision: append the list of lettered choices to the last message, which must be a user's.

    name: the row's name. more: further fields of Decision. Raises InvalidRow for fewer than two choices, for
    more than there are LETTERS, for two choices with the same value, and if the last message is not a user's.
    """
    names = [choice.name for choice in choices]
    if not 2 <= len(names) <= len(LETTERS):
        raise InvalidRow(
            name,
            f"{'fewer than two' if len(names) < 2 else 'too many'} choices",
            f"a decision has 2 to {len(LETTERS)} choices, one letter each, got {len(names)}; "
            "list fewer or more",
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        problem = f"two choices have the value {twice[:60]!r}; give each choice its own value"
        raise InvalidRow(name, "choices of the same value", problem)
    if messages[-1]["role"] != "user":
        problem = f"the last message is from the {messages[-1]['role']}; end the row with a user's question"
        raise InvalidRow(name, "no question", problem)
    answers = tuple(LETTERS[: len(names)])
    lines = [
        f"{ANSWER_PREFIX}{letter} {choice.name}{': ' * bool(choice.description)}{choice.description}"
        for letter, choice in zip(answers, choices, strict=True)
    ]
    question = f"{messages[-1]['content']}\n\nAnswer with one of these choices:\n" + "\n".join(lines)
    asked = (*messages[:-1], {**messages[-1], "content": question})
    return Decision(name, asked, tuple(choices), answers, **more)


def relevance(name: str, query: str, document: str, instruction: str | None = None) -> Decision:
    """Return a Decision with the choices no and yes: whether a document is relevant to a query. name: the
    row's name. instruction: which documents are relevant; None for RELEVANCE, a web search.
    """
    text = f"<Instruct>: {instruction or RELEVANCE}\n<Query>: {query}\n<Document>: {document}"
    choices, messages = tuple(map(DecisionChoice, NO_YES)), tuple(user_messages(text, JUDGE))
    return Decision(name, messages, choices, NO_YES, prefix="")


def user_messages(text: str, system: str | None = None) -> list[Message]:
    """Return a user's message, after a system message if there is one."""
    before = [] if not system else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": text}]


@dataclass(frozen=True)
class DecisionPrompts:
    """The parts of a decision model's prompts that all rows share: the labels of a classifier in the order of
    their letters, () for other models, and data.question.
    """

    labels: tuple[str, ...] = ()
    question: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "DecisionPrompts":
        """Read decision.json; without the file, return the defaults. Raises ValueError for another program's
        file.
        """
        path = folder / DECISION_FILE
        if not path.is_file():
            return cls()
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            labels, question = stored["labels"], stored["question"]
            if not all(isinstance(x, str) for x in labels) or not isinstance(question, str | None):
                raise TypeError
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{path}: no labels and question as jaxft writes them; copy the file again from the run"
            ) from error
        return cls(tuple(labels), question)

    @property
    def described(self) -> str:
        """A sentence about the labels, "" without any."""
        each = zip(LETTERS, self.labels, strict=False)
        named = ", ".join(f"{letter} {label}" for letter, label in each)
        return f" Its labels, in the order of their letters: {named}." if named else ""

    def write(self, folder: Path) -> None:
        """Write decision.json into a folder of weights, unless there is neither a label nor a question."""
        if self.labels or self.question:
            text = json.dumps({"labels": self.labels, "question": self.question}, indent=2) + "\n"
            (folder / DECISION_FILE).write_text(text, encoding="utf-8")


def paths_of_decisions(formats: Iterable[str]) -> tuple[str, ...]:
    """Return the server's endpoints that answer questions of these row formats."""
    return tuple(sorted({"/v1/rerank" if x == RERANKER else "/v1/decisions" for x in formats}))


# ---- rows


def parse(row: Row, format: str, settings: RowSettings = DEFAULT_ROW_SETTINGS) -> Decision:
    """Return the decision of a row, whose columns have jaxft's names. format: DECISION, LABEL or RERANKER.
    Raises InvalidRow.
    """
    more: dict[str, Any] = {"arguments": template_arguments_of(row)}
    labels, question = settings.labels, settings.question
    answer = row.fields.get("answer" if format == DECISION else "label")
    has_answer = not settings.unlabelled or answer not in (None, "")
    if format == RERANKER:
        texts = text_of(row, "query"), text_of(row, "document")
        decision = relevance(row.name, *texts, row.fields.get("instruction") or question)
        yes = (_relevance(row),) if has_answer else ()
        return replace(decision, probabilities=tuple(p for x in yes for p in (1 - x, x)), **more)
    if format == LABEL:
        choices = tuple(map(DecisionChoice, labels))
        text = f"{text_of(row, 'text')}\n\n{question or LABEL_QUESTION}"
        messages = with_system(row, user_messages(text))
        p = _label(row, choices) if has_answer else ()
        return decide(row.name, messages, choices, probabilities=p, **more)
    row = _with_texts_as_choices(row)
    choices = row_choices(row.name, row.fields["choices"])
    if row.fields.get("messages") is not None:
        if row.fields.get("question") is not None:
            problem = "the row has 'question' and 'messages'; keep one of them"
            raise row.invalid("question and messages", problem)
        messages = with_system(row, messages_of(row, "messages"))
    else:
        messages = with_system(row, user_messages(text_of(row, "question")))
    if row.fields.get("context") not in (None, "") and messages:
        text = f"{text_of(row, 'context')}\n\n{messages[-1]['content']}"
        messages = [*messages[:-1], {**messages[-1], "content": text}]
    p = _answer(row, choices, settings.reading) if has_answer else ()
    return decide(row.name, messages, choices, probabilities=p, **more)


def label_name(label: str | int | float) -> str:
    """Return a label as text, without spaces around it and without the decimals of a whole number: pandas
    writes the integers of a column with gaps as 1.0.
    """
    name = DecisionChoice(label).name.strip()
    return name.partition(".")[0] if _WHOLE.fullmatch(name) else name


def label_names(value: Any) -> Iterable[str]:
    """Return the labels in the column `label` of a classifier's row, [] for a row without a label."""
    each = value if isinstance(value, Mapping) else (value,)
    names = (label_name(label) for label in each if isinstance(label, str | int | float))
    return [name for name in names if name]


def labels_as_choices(labels: Iterable[str], ref: str) -> tuple[str, ...]:
    """Return the labels of rows, each once, in the order of their letters: sorted as numbers if all are whole
    numbers, else as text.

    ref: the dataset, for errors. A label -1 is left out if the labels 0, 1 and 2 occur: it marks rows without
    a label. Raises ValueError for fewer than two labels, and for more than there are letters.
    """
    distinct = {*labels}
    if distinct >= {"0", "1", "2"}:
        distinct.discard(NO_LABEL)
    if not distinct:
        raise ValueError(f"{ref}: no row names a label; list the labels in data.labels")
    if len(distinct) < 2:
        only = ", ".join(distinct)[:60]
        raise ValueError(f"{ref}: all rows have the same label, {only!r}; list all labels in data.labels")
    if len(distinct) > len(LETTERS):
        raise ValueError(
            f"{ref}: the rows have at least {len(distinct)} different labels, and a decision has at most "
            f"{len(LETTERS)} choices; list fewer in data.labels, or give each row a column of choices"
        )
    numbers = all(label.lstrip("-").isdecimal() for label in distinct)
    return tuple(sorted(distinct, key=int if numbers else str))


def row_choices(name: str, value: Any) -> tuple[DecisionChoice, ...]:
    """Return the choices of a row: strings or {"value", "description"} objects. name: the row's name."""
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
            f"choices[{number}] has no value, got {str(item)[:40]!r}; use a string or number, or an object "
            "with a value and optionally a description",
        )
    if not isinstance(text, str | None):
        problem = f"choices[{number}]: the description must be a string, got {type(text).__name__}"
        raise InvalidRow(name, "description that is no text", problem)
    return DecisionChoice(value, (text or "").strip())


def _with_texts_as_choices(row: Row) -> Row:
    """Rewrite a row with choices in ARC's form {"label": [...], "text": [...]}: the texts become the choices,
    an answer that is one of the labels becomes probabilities. Return other rows unchanged.
    """
    choices, answer = row.fields.get("choices"), row.fields.get("answer")
    if not isinstance(choices, Mapping):
        return row
    labels, texts = choices.get("label"), choices.get("text")
    if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts):
        raise row.invalid(
            "choices of a wrong type",
            f"choices: label and text must be lists of equal length, got {str(choices)[:60]}; fix or remove "
            "the row",
        )
    if answer in labels:  # as probabilities, which are read whatever the other answers are
        answer = [int(label == answer) for label in labels]
    return Row(row.name, {**row.fields, "choices": texts, "answer": answer})


# ---- answers


def answer_readings(row: Row) -> tuple[str, ...]:
    """Return the ways to read a row's answer by which it names one of the choices, some of "value", "letter"
    and "index", the most likely first; () for probabilities and for a row that cannot be read.

    A JSON number is more likely an index than a value; a string is more likely a value than a letter or an
    index. If choices are numbers, a number is no index; if "b" is a choice, "B" is no letter.
    """
    try:
        row = _with_texts_as_choices(row)
        value, choices = row.fields.get("answer"), row_choices(row.name, row.fields.get("choices"))
    except InvalidRow:
        return ()
    names, is_text = [choice.name for choice in choices], isinstance(value, str)
    among_numbers = any(not isinstance(choice.value, str) for choice in choices)
    among_numbers |= is_text and all(name.strip().lstrip("-").isdecimal() for name in names)
    readings = [x for x in READINGS if _choice_number(value, names, x) is not None]
    if LETTER in readings and VALUE not in readings and str(value).lower() in names:
        readings.remove(LETTER)
    if INDEX in readings and among_numbers:
        readings.remove(INDEX)
    return tuple(readings if is_text else reversed(readings))


def reading_of(votes: Mapping[tuple[str, ...], int]) -> str:
    """Return how to read all answers of a dataset, "value", "letter" or "index": the reading by which most
    answers name a choice, in a tie the one that is most likely for more rows. votes: result of
    answer_readings → number of rows with it.
    """

    def support(reading: str) -> tuple[int, int]:
        return (
            sum(rows for readings, rows in votes.items() if reading in readings),
            sum(rows for readings, rows in votes.items() if readings[:1] == (reading,)),
        )

    return max(READINGS, key=support)


def _choice_number(value: Any, names: Sequence[str], reading: str) -> int | None:
    """Return the index of the choice that an answer names, read as `reading`; None if it names none."""
    if not isinstance(value, str | int | float):
        return None
    if reading == VALUE:
        name = DecisionChoice(value).name
        return names.index(name) if name in names else None
    if reading == LETTER:
        return [*LETTERS].index(str(value)) if value in [*LETTERS[: len(names)]] else None
    text = str(value).strip()
    if isinstance(value, bool) or not (_WHOLE.fullmatch(text) or text.isdecimal()):  # pandas' 1.0
        return None
    number = int(text.partition(".")[0])
    return number if 0 <= number < len(names) else None


def _answer(row: Row, choices: Sequence[DecisionChoice], reading: str | None) -> tuple[float, ...]:
    """Return each choice's probability from a row's answer. reading: None to guess it. Raises InvalidRow."""
    value, names = row.fields.get("answer"), [choice.name for choice in choices]
    soft = _soft(row.name, "answer", value, names)
    if soft is not None:
        return soft
    reading = reading or reading_of({answer_readings(row): 1})
    number = _choice_number(value, names, reading)
    if number is None:
        raise _no_choice(row.name, "answer", value, names, reading)
    return _certain(number, names)


def _label(row: Row, choices: Sequence[DecisionChoice]) -> tuple[float, ...]:
    """Return the probability of each label from a row's label. Raises InvalidRow."""
    value, names = row.fields.get("label"), [choice.name for choice in choices]
    if isinstance(value, Mapping):
        value = {key if key in names else label_name(key): p for key, p in value.items()}
    soft = _soft(row.name, "label", value, names)
    if soft is not None:
        return soft
    number, plain = _choice_number(value, names, VALUE), [label_name(name) for name in names]
    if number is None and isinstance(value, str | int | float):
        value = label_name(value)
        number = _choice_number(value, plain, VALUE)
        if number is None and value == NO_LABEL:
            problem = "label -1 means that the row has no label; remove the row, or list -1 in data.labels"
            raise InvalidRow(row.name, "no label", problem)
    if number is None and not all(name.lstrip("-").isdecimal() for name in plain):
        number = _choice_number(value, names, INDEX)
    if number is None:
        raise _no_choice(row.name, "label", value, names)
    return _certain(number, names)


def _certain(number: int, names: Sequence[str]) -> tuple[float, ...]:
    return tuple(float(i == number) for i in range(len(names)))


def _soft(row: str, column: str, value: Any, names: Sequence[str]) -> tuple[float, ...] | None:
    """Return the probabilities in a row's answer or label, None if it has none. Raises InvalidRow."""
    if isinstance(value, list | tuple) and len(value) == len(names):
        return _probabilities(row, column, dict(zip(names, value, strict=True)), names)
    if not isinstance(value, Mapping):
        return None
    given = {str(key): p for key, p in value.items() if p is not None}  # null in a table is none
    wrong = next((key for key in given if key not in names), None)
    if wrong is not None:
        raise _no_choice(row, column, wrong, names)
    return _probabilities(row, column, given, names)


def _no_choice(row: str, column: str, value: Any, names: Sequence[str], reading: str = VALUE) -> InvalidRow:
    remedies = {
        VALUE: f"near: {', '.join(similar_names(str(value), list(names)))[:200]}",
        LETTER: f"use A to {LETTERS[: len(names)][-1:]}, as most answers are letters",
        INDEX: f"use 0 to {len(names) - 1}, as most answers are indices",
    }
    return InvalidRow(
        row,
        f"{column} that is none of the choices",
        f"{column} {str(value)[:60]!r} is none of the {len(names)} choices; {remedies[reading]}",
    )


def _probabilities(
    row: str, column: str, given: Mapping[str, Any], names: Sequence[str]
) -> tuple[float, ...]:
    """Return the probabilities `given` by name in the order of `names`, divided by their sum; 0 for a name
    that `given` lacks. Raises InvalidRow unless they sum to about 1.
    """
    for name, p in given.items():
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1 + TOLERANCE:
            problem = f"{column}: the probability of {name[:60]!r} is {str(p)[:40]}; use a number from 0 to 1"
            raise InvalidRow(row, "probability that is no number from 0 to 1", problem)
    total = math.fsum(given.values())
    if abs(total - 1) > TOLERANCE + 1e-9:  # 0.99 is not below 0.99
        problem = f"{column}: the probabilities sum to {total:.4g}; they must sum to 1, within {TOLERANCE}"
        raise InvalidRow(row, "probabilities that do not sum to 1", problem)
    return tuple(given.get(name, 0.0) / total for name in names)


def _relevance(row: Row) -> float:
    """Return the probability of yes from the label of a reranker's row."""
    value = row.fields.get("label")
    text = str(value).strip().lower()
    try:
        probability = YES[text] if text in YES else float(text)  # CSV files have strings alone
    except ValueError:
        probability = -1.0
    if 0 <= probability <= 1:
        return probability
    raise row.invalid(
        "label that is neither yes nor no",
        f"column 'label' is {str(value)[:40]!r}; use yes or no, true or false, 1 or 0, or the probability of "
        "yes from 0 to 1",
    )


# ---- tokens


@lru_cache(maxsize=32)
def answer_tokens(
    tokenizer: Any, prefix: str, answers: tuple[str, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the token ids of `prefix`, the text in front of an answer ("" for none), and the single token of
    each answer after it.

    Raises ValueError for an answer that is not a single token there, and for two answers with the same token.
    """
    encoded = tokenizer([prefix, *(prefix + x for x in answers)], add_special_tokens=False).input_ids
    before, *answer_ids = encoded if prefix else ([], *encoded[1:])
    each = zip(answers, answer_ids, strict=True)
    wrong = [x for x, ids in each if ids[:-1] != before or len(ids) <= len(before)]
    if wrong:
        where = f"after {prefix!r}" if prefix else "alone"
        possible = LETTERS.find(wrong[0])  # the answers before it in the alphabet are single tokens
        fewer = f", or at most {possible} choices" if possible >= 2 else ""
        raise ValueError(
            f"the tokenizer does not encode the answer {wrong[0]!r} {where} as one token, but the "
            f"probability of a choice is that of a single token; use a model with another tokenizer{fewer}"
        )
    tokens = tuple(ids[-1] for ids in answer_ids)
    if len({*tokens}) < len(tokens):
        raise ValueError(f"the tokenizer makes two of {', '.join(answers)} the same token; use another model")
    return tuple(before), tokens
