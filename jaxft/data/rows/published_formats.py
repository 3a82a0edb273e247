"""Formats whose rows are rewritten into the columns of another one: questions with options, rankings,
comparisons of two responses, and transcripts, as public datasets have them.

A ranking becomes "prompt", "chosen" (the best response), "rejected" (the worst) and "rank_2", "rank_3", ...
(those between, in order), with the ratings "score_chosen", "score_rejected", "score_rank_2", ...: higher is
better, and rank 2 is the rating -2. So a loss reads pairs with ratings and rankings alike.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from jaxft.data.row_settings import DEFAULT_ROW_SETTINGS, RowSettings
from jaxft.data.rows.columns import instruction_of, list_of, text_of
from jaxft.data.rows.example import Message, parse_number
from jaxft.data.rows.invalid_rows import InvalidRow
from jaxft.data.rows.row_files import Row

PROMPT = ("prompt", "instruction", "context")
RANKED = ("responses", "completions", "answers")
RATINGS = ("ratings", "rating", "scores", "score", "rewards", "reward", "ranks")  # a number per response
_RATING = "score_"  # what the names of the columns of ratings begin with
_TEXTS = ("answer", "response", "completion", "text")
_NUMBERS = ("score", "rating", "reward", "overall_score", "fine-grained_score", "pm_score", "rank")


# ---- decisions


def from_texts(row: Row, settings: RowSettings, columns: Sequence[str]) -> Row:
    """Return the row with a column `text` that joins the texts of `columns`, a line "COLUMN: TEXT" each."""
    text = "\n".join(f"{column}: {text_of(row, column)}" for column in columns)
    return Row(row.name, {**row.fields, "text": text})


def from_options(
    row: Row, settings: RowSettings, question: Sequence[str], options: Sequence[str], answer: str, first: int
) -> Row:
    """Return a row with columns question, choices and answer, made from the columns of its dataset.

    question: columns of texts, which are joined. options: one column with a list of choices, or a column for
    each choice, or () for the choices false and true. answer: the column of the answer. first: the number of
    the first choice in answers, 0 or 1.
    """
    choices: list[Any] = [row.fields[column] for column in options] or [False, True]
    value: Any = row.fields.get(answer)
    if not options and value in (0, 1):  # SuperGLUE's label
        value = bool(value)
    fields = {
        "context": None,  # part of the question
        "question": "\n\n".join(text_of(row, column) for column in question),
        "choices": list_of(row, options[0]) if len(options) == 1 else choices,
        "answer": int(value) - first if first and str(value).isdecimal() else value,
    }
    return Row(row.name, {**row.fields, **fields})


# ---- rankings


def kinds_of_ranking(responses: int) -> tuple[str, ...]:
    """Return the kinds of the responses of a ranking: chosen, rejected, and between them rank_2, rank_3 and
    so on.
    """
    return ("chosen", "rejected", *(f"rank_{place}" for place in range(2, responses)))


def best_first(kinds: Sequence[str]) -> list[str]:
    """Return the kinds of ranked responses from the best to the worst, without others such as "gold"."""
    return ["chosen", *(kind for kind in kinds if kind.startswith("rank_")), "rejected"]


def rating_columns(responses: int) -> tuple[str, ...]:
    """Return the columns of the ratings in a ranking of this many responses."""
    return tuple(_RATING + kind for kind in kinds_of_ranking(responses))


def with_ratings(row: Row, settings: RowSettings) -> Row:
    """Return a ranking's row with the ratings of its responses: its own or, if it rates none of them, minus
    the ranks. The rating of a missing rank_2, rank_3, ... is 0. Raises InvalidRow if it rates only some.
    """
    further = [kind for kind in settings.kinds if kind.startswith("rank_")]
    fields = {_RATING + kind: 0.0 for kind in further if row.fields.get(kind) is None}
    names = [_RATING + kind for kind in best_first(settings.kinds) if _RATING + kind not in fields]
    unrated = [name for name in names if row.fields.get(name) is None]
    if len(unrated) == len(names):
        fields |= {name: -float(rank) for rank, name in enumerate(names, 1)}
    elif unrated:
        raise row.invalid(
            "response without a rating",
            f"column {unrated[0]!r} is missing, and other responses have ratings; rate all responses or none",
        )
    present = {name: value for name, value in row.fields.items() if value is not None or name not in fields}
    return Row(row.name, {**fields, **present})


def from_ranking(row: Row, settings: RowSettings) -> Row:
    """Return a ranking as a pair or, with data.responses above 2, as that many responses.

    Of a row with more, the best, the worst and responses at even distances between them are read. Responses
    of equal ratings stay in the order of the row. Raises InvalidRow for a row without ratings, unless
    data.best_first says that its order is the ranking.
    """
    column = _first(row, RANKED)
    items = list_of(row, column)
    if len(items) < 2:
        problem = f"column {column!r} has {len(items)} responses; a ranking needs 2 or more: remove the row"
        raise row.invalid("ranking of one response", problem)
    texts = [_response(row, f"{column}[{index}]", item) for index, item in enumerate(items)]
    ratings = _ratings(row, column, items)
    if ratings is None and not settings.best_first:
        raise row.invalid(
            "responses without ratings",
            f"the row does not rate the responses in {column!r}; name a list of ratings with "
            "data.columns=ratings=COLUMN, or set data.best_first=true if they are from the best to the worst",
        )
    ratings = [-float(place) for place in range(1, len(items) + 1)] if ratings is None else ratings
    order = sorted(range(len(items)), key=lambda index: -ratings[index])
    if ratings[order[0]] == ratings[order[-1]]:
        raise row.invalid("no preference", f"all responses have the rating {ratings[0]:g}; remove the row")
    kinds = best_first(settings.kinds)
    count = min(len(items), len(kinds))
    chosen = [order[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]
    fields = with_ranked_prompt(row).fields
    for kind, index in zip([*kinds[: count - 1], kinds[-1]], chosen, strict=True):
        fields |= {kind: texts[index], _RATING + kind: ratings[index]}
    return Row(row.name, fields)


def with_ranked_prompt(row: Row) -> Row:
    """Return a row of several responses with its prompt in the column `prompt`: the first of the columns
    prompt, instruction, context and history that is not null, with Alpaca's input after an instruction.
    """
    column = _first(row, (*PROMPT, "history"))
    if column == "context" and row.fields.get("question") is not None:
        problem = "the row has 'question' and 'context'; choose the prompt with data.columns=prompt=question"
        raise row.invalid("question and context", problem)
    if column == "instruction" and row.fields.get("input"):
        return Row(row.name, {**row.fields, "prompt": instruction_of(row), "system": None})
    return Row(row.name, {**row.fields, "prompt": row.fields[column]})


def has_ratings(row: Row) -> bool:
    """Whether a row has at least two responses in a list, and a number for each of them."""
    try:
        column = _first(row, RANKED)
        items = list_of(row, column)
        return len(items) > 1 and _ratings(row, column, items) is not None
    except InvalidRow:
        return False


def ranking_note(settings: RowSettings) -> str:
    """Return a line for the start of a run about how rankings are read."""
    count = len(best_first(settings.kinds))
    order = "; responses without ratings are from the best to the worst (data.best_first)"
    note = "rankings are read as pairs, the best response against the worst; data.responses=4 reads up to 4"
    if count > 2:
        note = f"up to data.responses={count} responses of each ranking are read: the best, the worst and, "
        note += "of a longer one, responses at even distances between them"
    return note + order * settings.best_first


def _first(row: Row, names: Sequence[str]) -> str:
    """Return the first of these columns that is not null; if all are null, the first that the row has."""
    there = [name for name in names if name in row.fields]
    return next((name for name in there if row.fields[name] is not None), there[0])


def _response(row: Row, where: str, item: Any) -> Any:
    """Return a response without its rating. where: its place in the row, for errors."""
    if isinstance(item, dict) and "content" in item:  # a message
        item = {key: x for key, x in item.items() if key not in _NUMBERS} if item["content"] else None
        item = item if item is None or "role" in item else item["content"]
    elif isinstance(item, dict) and any(key in item for key in _TEXTS):
        item = next(item[key] for key in _TEXTS if key in item)
    if not item or (isinstance(item, str) and not item.strip()) or not isinstance(item, str | list | dict):
        raise row.invalid(
            "ranking without a response",
            f"{where} has no response; use a string, a list of messages, or an object with one of "
            f"{', '.join(_TEXTS)}",
        )
    return item


def _rating(row: Row, where: str, value: Any, is_rank: bool) -> float:
    """Return a rating, or minus a rank. where: its place in the row, for errors."""
    number = parse_number(value)
    if number is None:
        raise row.invalid("rating that is no number", f"{where} is {repr(value)[:40]}; use a finite number")
    return -number if is_rank else number


def _ratings(row: Row, column: str, items: Sequence[Any]) -> list[float] | None:
    """Return each response's rating, from a parallel column or its own key; None without ratings."""
    parallel = next((name for name in RATINGS if _is_list(row.fields.get(name))), None)
    if parallel is not None:
        values = list_of(row, parallel)
        if len(values) != len(items):
            raise row.invalid(
                "ratings of another number",
                f"column {parallel!r} has {len(values)} entries and {column!r} {len(items)} responses; use "
                "one for each response",
            )
        return [_rating(row, f"{parallel}[{i}]", x, parallel == "ranks") for i, x in enumerate(values)]
    mappings = [item if isinstance(item, dict) else {} for item in items]
    counts = {key: sum(item.get(key) is not None for item in mappings) for key in _NUMBERS}
    key = max(counts, key=lambda key: counts[key])  # the first that most responses have
    if not counts[key]:
        return None
    if counts[key] < len(items):
        missing = next(i for i, item in enumerate(mappings) if item.get(key) is None)
        problem = f"{column}[{missing}] has no rating, and others have one; rate all responses or none"
        raise row.invalid("response without a rating", problem)
    return [_rating(row, f"{column}[{i}].{key}", x[key], key == "rank") for i, x in enumerate(mappings)]


def _is_list(value: Any) -> bool:
    """Whether a column is a list, or its JSON string."""
    return isinstance(value, list | tuple) or (isinstance(value, str) and value.lstrip()[:1] == "[")


# ---- two responses


def from_preference(row: Row, settings: RowSettings, responses: tuple[str, str], column: str) -> Row:
    """Return the row with two responses as a pair. responses: their columns. column: a number, below 0 if the
    first response is better, above 0 if the second is; its size is the difference of their ratings
    (HelpSteer2, HelpSteer3).
    """
    value = _rating(row, column, row.fields[column], is_rank=False)
    if not value:
        problem = f"column {column!r} is 0: neither response is better; remove the row"
        raise row.invalid("no preference", problem)
    scores = {_RATING + "chosen": abs(value), _RATING + "rejected": 0.0}
    return _pair(row, responses if value < 0 else responses[::-1], scores)


def from_better(
    row: Row, settings: RowSettings, responses: tuple[str, str], column: str, better: tuple[str, str]
) -> Row:
    """Return the row with two responses as a pair. responses: their columns. column: has better[0] if the
    first one is better, better[1] if the second one is (PKU-SafeRLHF, and SHP, whose votes score_A and
    score_B are the ratings).
    """
    value = row.fields[column]
    written = str(int(value)) if isinstance(value, bool) or value in (0.0, 1.0) else str(value).strip()
    if written not in better:
        raise row.invalid(
            "no preference",
            f"column {column!r} is {repr(value)[:40]}; use {better[0]} if {responses[0]} is better, "
            f"{better[1]} if {responses[1]} is",
        )
    first = written == better[0]
    votes = [row.fields.get(f"score_{response[-1]}") for response in responses]
    scores = {}
    if None not in votes:
        each = zip(responses, votes, strict=True)
        numbers = [_rating(row, f"score_{name[-1]}", x, False) for name, x in each]
        chosen, rejected = numbers if first else numbers[::-1]
        if chosen < rejected:
            raise row.invalid(
                "label that contradicts the votes",
                f"column {column!r} is {repr(value)[:40]}, and the other response has more votes "
                f"({rejected:g} against {chosen:g}); fix or remove the row",
            )
        scores = dict(zip(rating_columns(2), (chosen, rejected), strict=True))
    return _pair(row, responses if first else responses[::-1], scores)


def _pair(row: Row, columns: Sequence[str], scores: dict[str, Any]) -> Row:
    """Return the row with the texts of two columns as chosen and rejected, and with columns `scores`."""
    texts = {kind: row.fields[column] for kind, column in zip(("chosen", "rejected"), columns, strict=True)}
    return Row(row.name, {**with_ranked_prompt(row).fields, **texts, **scores})


def from_openai(row: Row, settings: RowSettings) -> Row:
    """Return a row of OpenAI's preference fine-tuning as a pair: input.messages and input.tools,
    preferred_output and non_preferred_output.
    """
    pair = {"chosen": row.fields["preferred_output"], "rejected": row.fields["non_preferred_output"]}
    return Row(row.name, {**with_openai_prompt(row).fields, **pair})


def with_openai_prompt(row: Row) -> Row:
    """Return a row of OpenAI's preference fine-tuning with input's messages in `prompt`, its tools in
    `tools`.
    """
    given = row.fields["input"]
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list):
        raise row.invalid("input without messages", "column 'input' has no messages; use {'messages': [...]}")
    others = {name: value for name, value in row.fields.items() if name != "input"}
    return Row(row.name, {**others, "prompt": given["messages"], "tools": given.get("tools") or None})


# ---- transcripts


_SPEAKER = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")
_CALL = re.compile(r"<functioncall>(.*)", re.DOTALL)
_QUOTED = re.compile(r"""("arguments"\s*:\s*)'(.*)'(\s*\}\s*)$""", re.DOTALL)
_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}


def from_glaive(row: Row, settings: RowSettings = DEFAULT_ROW_SETTINGS) -> Row:
    """Return a transcript of glaive-function-calling-v2 as messages and tools: "chat" is text with USER:,
    ASSISTANT:, FUNCTION RESPONSE: and <functioncall>, and "system" has the tools as JSON.
    """
    text, system = row.fields["chat"], row.fields["system"]
    if not isinstance(text, str) or not isinstance(system, str):
        problem = "columns 'system' and 'chat' must be strings; fix or remove the row"
        raise row.invalid("transcript that is no text", problem)
    before, *parts = _SPEAKER.split(text)
    if before.strip() or not parts:
        problem = "column 'chat' does not begin with 'USER:'; fix the row"
        raise row.invalid("transcript without speakers", problem)
    turns = [_turn(row, who, said) for who, said in zip(parts[::2], parts[1::2], strict=True)]
    tools = _objects(system)
    introduction = [] if tools else [{"role": "system", "content": system.removeprefix("SYSTEM:").strip()}]
    fields = {"messages": [*introduction, *turns], "tools": tools or None, "system": None}
    return Row(row.name, {**row.fields, **fields})


def _turn(row: Row, who: str, said: str) -> Message:
    said = said.replace("<|endoftext|>", "").strip()
    call = _CALL.search(said) if who == "ASSISTANT" else None
    if call is None:
        return {"role": _ROLES[who], "content": said}
    written = _QUOTED.sub(lambda m: f"{m[1]}{json.dumps(m[2])}{m[3]}", call[1].strip())
    try:
        function = json.loads(written)
    except ValueError:
        function = None
    if not isinstance(function, dict):
        raise row.invalid(
            "function call that is no JSON",
            f"the function call {call[1].strip()[:40]!r} in column 'chat' is not the JSON of a call; fix or "
            "remove the row",
        )
    before = said[: call.start()].strip()
    return {
        "role": "assistant",
        "content": before or None,
        "tool_calls": [{"type": "function", "function": function}],
    }


def _objects(text: str) -> list[Any]:
    """Return the JSON objects that are in a text one after the other."""
    decoder, objects, at = json.JSONDecoder(), list[Any](), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError:
            end = at + 1
        else:
            objects.append(value)
        at = text.find("{", end)
    return objects
