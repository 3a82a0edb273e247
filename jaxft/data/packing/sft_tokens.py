"""SFT rows as token ids: which tokens are learned, and rows that are too long."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jaxft.data.chat import loss_mask
from jaxft.data.chat.loss_mask import WeightedTokens
from jaxft.data.packing.cache import ColumnType, ColumnTypes
from jaxft.data.packing.pack import split_lengths
from jaxft.data.packing.reader import CutRows, Reader, RowTask, TokenisedRow
from jaxft.data.packing.tokenised import MASS, TOKEN_WEIGHTS, ragged
from jaxft.data.row_settings import RowSettings
from jaxft.data.rows import formats
from jaxft.data.rows.example import RESPONSE, Chat, Completion, Example, ParsedRow
from jaxft.data.rows.invalid import InvalidRow, attempt, valid


def text_columns(settings: RowSettings) -> ColumnTypes:
    """Return the further columns: the sum of the weights of an example's targets before the factor `weights`,
    and the weights of all its tokens if some have another one than 1.
    """
    return {MASS: ColumnType(np.float64), **ragged(TOKEN_WEIGHTS, np.float32)}


def _tokenise(rows: Sequence[ParsedRow | InvalidRow], reader: Reader) -> CutRows:
    """Yield the examples of each row: one, or a piece of a document that is split each."""
    settings, tokenizer = reader.settings, reader.tokenizer
    examples = [row if isinstance(row, InvalidRow) else row.examples[RESPONSE] for row in rows]
    tokenised = loss_mask.tokenise_weighted(examples, tokenizer, settings.loss_on, settings.template)
    responses = _response_masks(examples, settings, tokenizer)
    for example, outcome, response in zip(examples, tokenised, responses, strict=True):
        yield attempt(_examples_of, example, outcome, response, settings)


CHECKS = (loss_mask.tools_warnings, loss_mask.content_warnings, loss_mask.prompt_warnings)
SFT_TASK = RowTask(formats.SFT, 12, "max_length", _tokenise, text_columns, checks=CHECKS)


def _examples_of(
    example: Example | InvalidRow,
    outcome: WeightedTokens | InvalidRow,
    response: np.ndarray | None,
    settings: RowSettings,
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
    found = []
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
        found.append(TokenisedRow(ids[start:end], learned, counts, cut, total, targets, extras, number))
    return found


def _response_masks(
    examples: Sequence[Example | InvalidRow], settings: RowSettings, tokenizer: Any
) -> Iterator[np.ndarray | None]:
    """Yield each example's mask of response tokens, None where it equals the loss mask or is unknown."""

    def differs(example: Example | InvalidRow) -> bool:
        if isinstance(example, Chat) and example.weights:
            return True
        if settings.loss_on == "completion":
            return isinstance(example, Chat) and any(
                m["role"] == "assistant" for m in example.messages[example.given : example.response]
            )
        return settings.loss_on == "all" and isinstance(example, Chat | Completion)

    others = [
        replace(example, weights={}) if isinstance(example, Chat) else example
        for example in examples
        if differs(example)
    ]
    tokenised = loss_mask.tokenise_examples(others, tokenizer, "assistant", settings.template)
    for example in examples:
        found = next(tokenised) if differs(example) else None
        yield None if found is None or isinstance(found, InvalidRow) else found[1]


def _fits(name: str, learned: np.ndarray, settings: RowSettings) -> bool:
    """Whether data.too_long keeps a row: whole, truncated or split. Raises ValueError if it ends the run."""
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
    remedy = f"{remedy_for_too_long('max_length')}, or truncate"
    if settings.too_long == "split" and not learned[1:].all():
        raise ValueError(
            f"{name}: {len(learned)} tokens are more than data.max_length={limit}, and data.too_long=split "
            f"only splits text rows, not responses to a prompt; {remedy}"
        )
    if settings.too_long == "error":
        raise ValueError(f"{name}: {len(learned)} tokens are more than data.max_length={limit}; {remedy}")
    if settings.too_long == "truncate":
        return bool(learned[:limit].any())  # a row without any of its response teaches nothing
    return settings.too_long == "split"


def remedy_for_too_long(limit: str) -> str:
    """Return advice about a row that is longer than the setting `limit`, such as "max_length"."""
    return f"raise data.{limit} or set data.too_long=drop"
