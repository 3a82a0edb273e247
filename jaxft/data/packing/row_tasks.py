"""Rows of SFT, preferences and rollouts as token ids: their loss masks, and rows that are too long.

A pair is split where TRL splits it (TRL 1.16, dpo_trainer.py, tokenize_fn). The prompt is tokenised alone,
with the generation prompt, and again together with each response. It ends at the first token in which the two
differ, and all responses of a pair share the shortest such prompt. A token that spans the end of the prompt
belongs to the response; such pairs are counted. A row is invalid if a response changes more tokens of the
prompt than the last one.
"""

import base64
import datetime
import decimal
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any

import numpy as np

from jaxft.data.chat import loss_mask
from jaxft.data.chat.loss_mask import WeightedTokens
from jaxft.data.packing.pack import split_lengths
from jaxft.data.packing.reader import CutRows, ParsedRows, Reader, RowTask, TokenisedRow
from jaxft.data.packing.row_cache import ColumnType, ColumnTypes
from jaxft.data.packing.tokenised import (
    MASS,
    NUMBERS,
    PROMPT_END_MOVED,
    ROW_FIELDS,
    TOKEN_WEIGHTS,
    TokenisedRows,
    ragged,
)
from jaxft.data.row_settings import DEFAULT_TEMPLATE_SETTINGS, RowSettings, TemplateSettings
from jaxft.data.rows import formats
from jaxft.data.rows.columns import column_of
from jaxft.data.rows.conversation import NO_PROMPT
from jaxft.data.rows.example import PROMPT, RESPONSE, Chat, Completion, Example, Message, ParsedRow, as_given
from jaxft.data.rows.format_choice import ChosenFormat, prompt_of, split_column
from jaxft.data.rows.formats import number_of
from jaxft.data.rows.invalid_rows import InvalidRow, attempt, valid
from jaxft.data.rows.row_files import Row

# ---- SFT


def text_columns(settings: RowSettings) -> ColumnTypes:
    """Return the types of the extra columns of SFT examples: MASS, the sum of their target weights before the
    factor `weights`, and TOKEN_WEIGHTS, the weights of all tokens if some differ from 1.
    """
    return {MASS: ColumnType(np.float64), **ragged(TOKEN_WEIGHTS, np.float32)}


def _tokenise_sft(rows: Sequence[ParsedRow], reader: Reader) -> CutRows:
    """Yield the examples of each row: one, or the pieces of a document that is split."""
    settings, tokenizer = reader.settings, reader.tokenizer
    examples = [row.examples[RESPONSE] for row in rows]
    tokenised = loss_mask.tokenise_examples(examples, tokenizer, settings.loss_on, settings.template)
    responses = _response_masks(examples, settings, tokenizer)
    for example, outcome, response in zip(examples, tokenised, responses, strict=True):
        yield attempt(_examples_of, example, outcome, response, settings)


CHECKS = (loss_mask.tools_warnings, loss_mask.content_warnings, loss_mask.prompt_warnings)
SFT_TASK = RowTask(formats.SFT, 13, "max_length", _tokenise_sft, text_columns, checks=CHECKS)


def _examples_of(
    example: Example, outcome: WeightedTokens | InvalidRow, response: np.ndarray | None, settings: RowSettings
) -> list[TokenisedRow]:
    """Return the examples of a row, [] if it is left out as too long.

    response: the mask of the response tokens; None if it equals the loss mask.
    """
    tokens, name = valid(outcome), example.name
    ids, mask = tokens.ids, tokens.learned.copy() if response is None else response
    tokens.learned[0] = mask[0] = False
    if not _fits(name, tokens.learned, settings):
        return []
    cut = settings.too_long == "truncate" and len(ids) > settings.max_length
    ends = [min(len(ids), settings.max_length)]
    if settings.too_long == "split":
        ends = np.cumsum(split_lengths(len(ids), settings.max_length)).tolist()
    examples = []
    for number, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        learned = tokens.learned[start:end]
        learned[0] = False
        weights = np.ones(0, np.float32) if tokens.weights is None else tokens.weights[start:end]
        mass = weights[learned].sum(dtype=np.float64) if len(weights) else learned.sum()
        first = int(learned.argmax())
        first = first if first > 1 else 0  # the first token of a text never is a target, and is no prompt
        total = int((mask if cut else mask[start:end]).sum())
        targets, extras = int((mask[start:end] & learned).sum()), {MASS: float(mass), TOKEN_WEIGHTS: weights}
        counts = first, end - start - first
        examples.append(TokenisedRow(ids[start:end], learned, counts, cut, total, targets, extras, number))
    return examples


def _response_masks(
    examples: Sequence[Example], settings: RowSettings, tokenizer: Any
) -> Iterator[np.ndarray | None]:
    """Yield each example's mask of response tokens, None where it equals the loss mask or is unknown."""

    def differs(example: Example) -> bool:
        if isinstance(example, Chat) and (example.weights or settings.loss_on == "completion"):
            earlier = example.messages[example.given : example.response]
            return bool(example.weights) or any(m["role"] == "assistant" for m in earlier)
        return settings.loss_on == "all" and isinstance(example, Chat | Completion)

    others = [replace(x, weights={}) if isinstance(x, Chat) else x for x in examples if differs(x)]
    tokenised = loss_mask.tokenise_examples(others, tokenizer, "assistant", settings.template)
    for example in examples:
        tokens = next(tokenised) if differs(example) else None
        yield None if tokens is None or isinstance(tokens, InvalidRow) else tokens[1]


def _fits(name: str, learned: np.ndarray, settings: RowSettings) -> bool:
    """Whether a row with this loss mask is kept (in full, truncated or split). Raises InvalidRow for an
    empty mask, and ValueError if data.too_long ends the run.
    """
    if not learned.any():
        raise InvalidRow(
            name,
            "empty loss mask",
            f"the loss mask is empty with data.loss_on={settings.loss_on}; fix or remove the row, or "
            "set another data.loss_on",
        )
    limit = settings.max_length
    if len(learned) <= limit:
        return True
    if settings.too_long == "split" and not learned[1:].all():
        why = ", and data.too_long=split only splits text rows, not responses to a prompt"
        raise too_long(name, f"{len(learned)} tokens are", limit, why=why)
    if settings.too_long == "error":
        raise too_long(name, f"{len(learned)} tokens are", limit)
    if settings.too_long == "truncate":
        return bool(learned[:limit].any())  # a row without any of its response teaches nothing
    return settings.too_long == "split"


def too_long(row: str, count: str, limit: int, why: str = "", truncates: bool = True) -> ValueError:
    """Return the error of a row that is longer than data.max_length=`limit`. count: such as "9 tokens are".
    why: a clause about further settings. truncates: whether data.too_long=truncate is a remedy.
    """
    remedy = "raise data.max_length or set data.too_long=drop" + ", or truncate" * truncates
    return ValueError(f"{row}: {count} more than data.max_length={limit}{why}; {remedy}")


# ---- pairs


MaskedTokens = tuple[np.ndarray, np.ndarray]  # token ids, loss mask


def _pair_columns(settings: RowSettings) -> ColumnTypes:
    """Return the types of extra columns: whether a token spans the end of the prompt, and data.extras."""
    numbers = {NUMBERS: ColumnType(np.float64, width=len(settings.extras))} if settings.extras else {}
    return {PROMPT_END_MOVED: ColumnType(np.bool_), **numbers}


def _tokenise_pairs(rows: Sequence[ParsedRow], reader: Reader) -> CutRows:
    """Yield each pair as an example, [] if it is left out as too long."""
    template, tokenizer = reader.settings.template, reader.tokenizer
    present: list[list[Any]] = [[*row.examples.values()] for row in rows]
    examples = [example for examples in present for example in examples]
    sequences = loss_mask.tokenise_examples(examples, tokenizer, "completion", template)
    prompts = loss_mask.example_prompt_ids([examples[0] for examples in present], tokenizer, template)
    for row in rows:
        responses = {kind: next(sequences) for kind in row.examples}
        yield attempt(_pair_of, row, next(prompts), responses, reader)


PAIR_TASK = RowTask(formats.PAIRS, 13, "max_length", _tokenise_pairs, _pair_columns)


def _pair_of(
    row: ParsedRow,
    prompt: list[int] | InvalidRow,
    outcomes: dict[str, WeightedTokens | InvalidRow],
    reader: Reader,
) -> list[TokenisedRow]:
    """Return the pair as an example, [] if it is left out as too long, or if its responses are equal when
    truncated. outcomes: the tokens of each response with the prompt.
    """
    name, settings, alone = row.name, reader.settings, valid(prompt)
    responses = {kind: valid(outcome)[:2] for kind, outcome in outcomes.items()}
    border, moved = _border(name, alone, responses, reader.tokenizer)
    responses = {
        kind: _mask_from_border(f"{name}: {kind}", border, response) for kind, response in responses.items()
    }
    if _are_equal(border, responses):
        problem = "chosen and rejected are the same tokens; change one or remove the row"
        raise InvalidRow(name, "responses of the same tokens", problem)
    longest = max(len(ids) for ids, _ in responses.values())
    total = sum(int(learned.sum()) for _, learned in responses.values())
    limit, truncated = settings.max_length, longest > settings.max_length
    if truncated:
        if settings.too_long == "error":
            raise too_long(name, f"{longest} tokens of a response with its prompt are", limit)
        responses = {kind: (ids[:limit], learned[:limit]) for kind, (ids, learned) in responses.items()}
        has_room = all(learned.any() for _, learned in responses.values())
        if settings.too_long == "drop" or not has_room or _are_equal(border, responses):
            return []
    targets = sum(int(learned.sum()) for _, learned in responses.values())
    extras = {PROMPT_END_MOVED: moved, **({NUMBERS: row.numbers} if row.numbers else {})}
    first, mask = next(iter(responses.values()))
    bodies = {kind: (tokens[border:], learned[border:]) for kind, (tokens, learned) in responses.items()}
    missing = first[:0], mask[:0]
    pieces = [(first[:border], mask[:border]), *(bodies.get(kind, missing) for kind in settings.kinds)]
    tokens, masks = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    counts = [len(piece) for piece, _ in pieces]
    return [TokenisedRow(tokens, masks, counts, truncated, total, targets, extras)]


def _border(
    name: str, prompt: list[int], responses: dict[str, MaskedTokens], tokenizer: Any
) -> tuple[int, bool]:
    """Return how many tokens of the prompt all sequences share, and whether a token spans its end, or the
    loss mask begins elsewhere. prompt: its tokens alone. responses: tokens of the prompt with each response.
    Raises InvalidRow if a response changes more than the prompt's last token.
    """
    border = len(commonprefix([prompt, *(ids.tolist() for ids, _ in responses.values())]))
    if border < len(prompt) - 1:
        lost = tokenizer.decode(prompt[border:])
        raise InvalidRow(
            name,
            "prompt that changes before a response",
            f"only {border} of the prompt's {len(prompt)} tokens are the same with and without a "
            f"response, {lost!r} changes; end the prompt at a token boundary, or use a chat template that "
            "renders a prompt in the same way with and without a response (data.system=merge if it moves the "
            "system message)",
        )
    begins = [int(learned[1:].argmax()) + 1 for _, learned in responses.values()]
    return border, border < len(prompt) or any(start != max(border, 1) for start in begins)


def _mask_from_border(name: str, border: int, response: MaskedTokens) -> MaskedTokens:
    """Return the sequence up to its last target; all tokens from index `border` to the first target become
    targets too. name: the row's. Raises InvalidRow without any target.
    """
    ids, learned = response[0], response[1].copy()
    learned[: max(border, 1)] = False
    if not learned.any():
        raise InvalidRow(
            name,
            "response without targets",
            "no token of the response can be a target, because a row's first token never is one; give the "
            "row a prompt or a longer response, or remove it",
        )
    learned[max(border, 1) : learned.argmax()] = True
    end = len(learned) - int(learned[::-1].argmax())
    return ids[:end], learned[:end]


def _are_equal(border: int, responses: dict[str, MaskedTokens]) -> bool:
    """Whether the chosen and the rejected response have the same tokens from `border` on."""
    bodies = [responses[kind][0][border:] for kind in ("chosen", "rejected") if kind in responses]
    return len(bodies) == 2 and np.array_equal(bodies[0], bodies[1])


# ---- prompts


ENVIRONMENT, EVERY_ROW = "environment", ""  # column that names a row's environment; name of one for all rows


@dataclass(frozen=True)
class TokenisedPrompts:
    """Prompts as token ids, with the names and columns of their rows.

    prompts: the messages or texts before tokenising. template: the settings by which they were rendered.
    sources: for each prompt, the index of its source in source_names; both are () for a single source.
    """

    ids: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    prompts: tuple[Chat | Completion, ...]
    fields: tuple[dict[str, Any], ...]
    template: TemplateSettings = DEFAULT_TEMPLATE_SETTINGS
    sources: tuple[int, ...] = ()
    source_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def as_given(self, number: int) -> str | list[Message]:
        """Return prompt `number` as reward functions read it: a string or the messages."""
        return as_given(self.prompts[number])


def _parse_prompts(format: ChosenFormat, rows: Iterable[Row], settings: RowSettings, task: str) -> ParsedRows:
    def read(row: Row) -> ParsedRow:
        renamed, column = rename_columns(row, settings.columns), settings.order_by
        prompt = row_prompt(renamed, settings)
        order = 0.0 if column is None else number_of(renamed, column, "data.order_by")
        return ParsedRow(row.name, {PROMPT: prompt}, order=order, fields=renamed.fields)

    return (attempt(read, row) for row in rows)


def _tokenise_prompts(rows: Sequence[ParsedRow], reader: Reader) -> CutRows:
    """Yield each prompt as an example without a response, [] if it is left out as too long."""
    prompts: list[Any] = [row.examples[PROMPT] for row in rows]
    tokenised = loss_mask.example_prompt_ids(prompts, reader.tokenizer, reader.settings.template)
    for row, outcome in zip(rows, tokenised, strict=True):
        yield attempt(_prompt_of, row, outcome, reader)


def _prompt_of(row: ParsedRow, outcome: list[int] | InvalidRow, reader: Reader) -> list[TokenisedRow]:
    ids, limit = np.asarray(valid(outcome), np.int32), reader.settings.max_length
    if not len(ids):
        raise InvalidRow(row.name, "empty prompt", "the prompt has no tokens; fill it or remove the row")
    if len(ids) > limit:
        if reader.settings.too_long == "error":
            raise ValueError(
                f"{row.name}: the prompt has {len(ids)} tokens, more than data.max_prompt={limit}; raise "
                "data.max_prompt or set data.too_long=drop"
            )
        return []
    text = np.frombuffer(json.dumps(row.fields, default=_json_of).encode(), np.uint8)
    return [TokenisedRow(ids, np.zeros(len(ids), bool), [len(ids)], False, 0, 0, {ROW_FIELDS: text})]


def _prompt_columns(settings: RowSettings) -> ColumnTypes:
    """Return the type of the extra column: the columns of the dataset as JSON, which rewards read."""
    return ragged(ROW_FIELDS, np.uint8)


PROMPT_TASK = RowTask(formats.PROMPTS, 5, "max_prompt", _tokenise_prompts, _prompt_columns, _parse_prompts)


def row_fields(rows: TokenisedRows, number: int) -> dict[str, Any]:
    """Return the columns of the dataset in row `number`, stored for rewards to read."""
    return json.loads(rows.extras[ROW_FIELDS][number].tobytes(), object_hook=_value_of)


def rename_columns(row: Row, columns: Sequence[str]) -> Row:
    """Rename a row's columns by data.columns (jaxft's name=the row's name). Other columns are unchanged.

    Raises InvalidRow if the row lacks one of them.
    """
    fields = dict(row.fields)
    for item in columns:
        ours, theirs = split_column(item)
        theirs = column_of(row.fields, theirs)
        if theirs not in row.fields:
            raise row.invalid(
                f"missing column {theirs!r}",
                f"no column {theirs!r}, which data.columns={ours}={theirs} names; name one that the row has: "
                f"{', '.join(map(str, row.fields))}",
            )
        fields[ours] = row.fields[theirs]
    return Row(row.name, fields)


def row_prompt(row: Row, settings: RowSettings) -> Chat | Completion:
    """Return the prompt of a row with its tools. Raises InvalidRow, also for the name of an unknown
    environment.
    """
    prompt: Chat | Completion
    try:
        prompt = prompt_of(row, settings.format)
    except InvalidRow as error:
        if error.reason != NO_PROMPT or not settings.optional:
            raise
        prompt = Chat(row.name, ({"role": "user", "content": ""},), 1)
    fields, tools = row.fields, json.loads(settings.tools) if settings.tools else {}
    if not tools:
        return prompt
    name = EVERY_ROW if EVERY_ROW in tools else fields.get(ENVIRONMENT)
    if not isinstance(name, str) or name not in tools:
        problem = f"column {ENVIRONMENT!r} is {name!r}, which names no environment; use {', '.join(tools)}"
        raise InvalidRow(prompt.name, "unknown environment", problem)
    if isinstance(prompt, Completion):
        prompt = Chat(prompt.name, ({"role": "user", "content": prompt.prompt},), 1, plain=True)
    return replace(prompt, tools=tools[name] or prompt.tools)


# ---- values that JSON lacks, of columns that rewards read

_TYPE = "__type__"
_READERS: dict[str, Callable[[str], Any]] = {
    "bytes": base64.b64decode,
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "Decimal": decimal.Decimal,
}


def _json_of(value: Any) -> Any:
    """Return a JSON object for a value of a type in _READERS, such as bytes, and text for other values."""
    name = type(value).__name__
    if isinstance(value, bytes):
        return {_TYPE: name, "value": base64.b64encode(value).decode()}
    if isinstance(value, datetime.date | datetime.time):
        return {_TYPE: name, "value": value.isoformat()}
    return {_TYPE: name, "value": str(value)} if isinstance(value, decimal.Decimal) else str(value)


def _value_of(stored: dict[str, Any]) -> Any:
    """Return the value that `_json_of` has stored."""
    if stored.keys() == {_TYPE, "value"} and stored[_TYPE] in _READERS:
        return _READERS[stored[_TYPE]](stored["value"])
    return stored
