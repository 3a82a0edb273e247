"""Prompts and answers of a judgement from files: jaxft's, AlpacaEval's, Arena-Hard's and RewardBench 2's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.data.rows.dataset_rows import Row, read_rows
from jaxft.lab.judging import Match
from jaxft.train.python_api import load_model

QUESTION_COLUMNS = ("prompt", "instruction", "question")
TEXT_COLUMNS = ("completion", "response", "output", "answer")
NAME_COLUMNS = ("uid", "question_id", "id")  # columns that name a prompt


class ModelAnswers(NamedTuple):
    """A model's answers by the name of their prompt, in order. named: whether the file names the prompts."""

    texts: dict[str, str]
    named: bool


class JudgedPrompts(NamedTuple):
    """JudgedPrompts by name: strings or lists of messages, and the columns of their rows."""

    texts: dict[str, Any]
    columns: dict[str, dict[str, Any]]
    named: bool


class BenchmarkRow(NamedTuple):
    """A row of a reward benchmark: every chosen answer should win against every rejected one."""

    name: str
    subset: str
    prompt: Any
    chosen: list[str]
    rejected: list[str]


def read_judged_prompts(ref: str) -> JudgedPrompts:
    """Read prompts: `prompt`, `instruction` or `question` as text, `messages`, or Arena-Hard's `turns`.

    Raises ValueError, with file and row, for a row that has none of them.
    """
    rows = read_rows(ref)
    names, named = _names(rows)
    return JudgedPrompts(
        {name: _prompt(row) for name, row in zip(names, rows, strict=True)},
        {name: dict(row.fields) for name, row in zip(names, rows, strict=True)},
        named,
    )


def read_answers(ref: str) -> ModelAnswers:
    """Read answers: `completion`, `response`, `output` or `answer`, the last assistant's turn of `messages`,
    or Arena-Hard's `choices`.

    Raises ValueError, with file and row, for a row that has none of them.
    """
    rows = read_rows(ref)
    names, named = _names(rows)
    return ModelAnswers({name: _answer(row) for name, row in zip(names, rows, strict=True)}, named)


def answers_of(ref: str, prompts: JudgedPrompts, max_new: int) -> ModelAnswers:
    """Return a model's answers: from a file, or by completing the prompts greedily with a run or a model."""
    if Path(ref).suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        return read_answers(ref)
    texts = load_model(ref).generate(list(prompts.texts.values()), max_new=max_new)
    return ModelAnswers(dict(zip(prompts.texts, texts, strict=True)), True)


def matches_of(
    prompts: JudgedPrompts, one: ModelAnswers, other: ModelAnswers, files: Sequence[str]
) -> list[Match]:
    """Return the matches of two models. Answers belong to prompts by name, or else by their order.

    files: names of the answers, for errors. Raises ValueError where answers are missing.
    """
    by_name = []
    for answers, file in zip((one, other), files, strict=True):
        if answers.named and prompts.named:
            missing = [name for name in prompts.texts if name not in answers.texts]
            if missing:
                count = f"{len(missing)} of {len(prompts.texts)} prompts"
                raise ValueError(f"{file}: {count} have no answer, such as {missing[0]}")
            by_name.append(answers.texts)
        elif len(answers.texts) != len(prompts.texts):
            raise ValueError(
                f"{file} has {len(answers.texts)} answers for {len(prompts.texts)} prompts, and no ids that "
                "say which belong together"
            )
        else:
            by_name.append(dict(zip(prompts.texts, answers.texts.values(), strict=True)))
    first, second = by_name
    return [
        Match(name, prompt, first[name], second[name], prompts.columns[name])
        for name, prompt in prompts.texts.items()
    ]


def read_preferences(ref: str) -> list[BenchmarkRow]:
    """Read RewardBench 2: `prompt`, `chosen` and `rejected` as lists of answers, and `subset`.

    Raises ValueError, with file and row, for rows without them.
    """
    found = []
    for row in read_rows(ref):
        chosen, rejected = (_texts(row, column) for column in ("chosen", "rejected"))
        found.append(
            BenchmarkRow(row.name, str(row.fields.get("subset", "all")), _prompt(row), chosen, rejected)
        )
    return found


def preference_matches(rows: Sequence[BenchmarkRow]) -> list[Match]:
    """Return a match of each chosen with each rejected answer of each row, in order."""
    return [
        Match(row.name, row.prompt, chosen, rejected, {})
        for row in rows
        for chosen in row.chosen
        for rejected in row.rejected
    ]


def accuracy_by_subset(rows: Sequence[BenchmarkRow], values: Sequence[float]) -> dict[str, tuple[int, int]]:
    """Return (rows in which every chosen answer beats every rejected one, rows) of each subset.

    values: of preference_matches. A match without a verdict counts as lost. RewardBench 2's score of its
    subset Ties also weighs margins, which this does not.
    """
    found: dict[str, tuple[int, int]] = {}
    at = 0
    for row in rows:
        count = len(row.chosen) * len(row.rejected)
        right = all(value > 0.5 for value in values[at : at + count])
        at += count
        before = found.get(row.subset, (0, 0))
        found[row.subset] = before[0] + right, before[1] + 1
    return found


def _names(rows: Sequence[Row]) -> tuple[list[str], bool]:
    """Return the names of rows, and whether a column has them. Raises ValueError for a name that is there
    twice.
    """
    column = next((c for c in NAME_COLUMNS if all(c in row.fields for row in rows)), None)
    if column is None:
        return [row.name for row in rows], False
    names = [str(row.fields[column]) for row in rows]
    seen: dict[str, str] = {}
    for row, name in zip(rows, names, strict=True):
        if name in seen:
            raise ValueError(f"{row.name}: {column} {name!r} is also that of {seen[name]}; remove one")
        seen[name] = row.name
    return names, True


def _prompt(row: Row) -> Any:
    fields = row.fields
    if column := next((c for c in QUESTION_COLUMNS if isinstance(fields.get(c), str | list)), None):
        return fields[column]
    turns = fields.get("turns")
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
        return str(turns[0].get("content", ""))
    if isinstance(messages := fields.get("messages"), list) and messages:
        return messages[:-1] if messages[-1].get("role") == "assistant" else messages
    raise ValueError(f"{row.name}: no prompt; expected {', '.join(QUESTION_COLUMNS)}, messages or turns")


def _answer(row: Row) -> str:
    fields = row.fields
    if column := next((c for c in TEXT_COLUMNS if isinstance(fields.get(c), str)), None):
        return fields[column]
    for outer, inner in (("messages", None), ("choices", "turns")):  # of Arena-Hard, its first release last
        turns = fields.get(outer)
        if inner and isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
            turns = turns[0].get(inner)
        if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
            content = turns[-1].get("content")
            content = content.get("answer") if isinstance(content, Mapping) else content
            if isinstance(content, str):
                return content
    raise ValueError(f"{row.name}: no answer; expected {', '.join(TEXT_COLUMNS)}, messages or choices")


def _texts(row: Row, column: str) -> list[str]:
    value = row.fields.get(column)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{row.name}: {column} must be a text or a list of texts")
    return texts
