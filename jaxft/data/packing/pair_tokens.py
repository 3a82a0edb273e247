"""Pairs as token ids: one prompt and its responses, split where TRL splits them.

The prompt ends at the first difference between the tokens of the prompt alone (with the generation prompt)
and those of prompt and response; all responses of a pair share the shortest of these prompts (TRL 1.16,
dpo_trainer.py, tokenize_fn). A token that spans the end of the prompt belongs to the response, and such pairs
are counted. A row whose prompt differs in more than its last token is an error.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxft.data.chat import loss_mask
from jaxft.data.chat.loss_mask import MaskedTokens
from jaxft.data.packing.cache import ColumnType, ColumnTypes
from jaxft.data.packing.flat import Flat
from jaxft.data.packing.pack import ranges
from jaxft.data.packing.pair_plan import derangement
from jaxft.data.packing.reader import CutRows, Reader, RowTask, TokenisedRow
from jaxft.data.packing.sft_tokens import remedy_for_too_long
from jaxft.data.packing.tokenised import NUMBERS, PROMPT_END_MOVED, TokenisedRows
from jaxft.data.row_settings import RowSettings
from jaxft.data.rows import formats
from jaxft.data.rows.example import ParsedRow
from jaxft.data.rows.invalid import InvalidRow, attempt, valid


def _extras(settings: RowSettings) -> ColumnTypes:
    """Return the further columns: whether a token spans the end of the prompt, and data.extras."""
    numbers = {NUMBERS: ColumnType(np.float64, width=len(settings.extras))} if settings.extras else {}
    return {PROMPT_END_MOVED: ColumnType(np.bool_), **numbers}


def _tokenise(rows: Sequence[ParsedRow | InvalidRow], reader: Reader) -> CutRows:
    """Yield each pair as an example, [] if it is left out as too long."""
    settings, tokenizer = reader.settings, reader.tokenizer
    present: list[list[Any]] = [[*row.examples.values()] for row in rows if isinstance(row, ParsedRow)]
    sequences = loss_mask.tokenise_examples(
        [example for examples in present for example in examples], tokenizer, "completion", settings.template
    )
    prompts = loss_mask.example_prompt_ids(
        [examples[0] for examples in present], tokenizer, settings.template
    )
    for row in rows:
        if isinstance(row, InvalidRow):
            yield row
            continue
        found = {kind: next(sequences) for kind in row.examples}
        yield attempt(_pair_of, row, next(prompts), found, reader)


PAIR_TASK = RowTask(formats.PAIRS, 11, "max_length", _tokenise, _extras)


def _pair_of(
    row: ParsedRow,
    prompt: list[int] | InvalidRow,
    outcomes: dict[str, MaskedTokens | InvalidRow],
    reader: Reader,
) -> list[TokenisedRow]:
    """Return the pair as an example, [] if it is left out as too long. outcomes: the tokens of each response
    with the prompt.
    """
    name, settings, alone = row.name, reader.settings, valid(prompt)
    responses = {kind: valid(outcome) for kind, outcome in outcomes.items()}
    border, moved = _border(name, alone, responses, reader.tokenizer)
    responses = {
        kind: _mask_from_border(f"{name}: {kind}", border, response) for kind, response in responses.items()
    }
    if _are_equal(border, responses):
        raise InvalidRow(
            name,
            "responses of the same tokens",
            "chosen and rejected are the same tokens; change one or remove the row",
        )
    longest = max(len(ids) for ids, _ in responses.values())
    total = sum(int(learned.sum()) for _, learned in responses.values())
    truncated = longest > settings.max_length
    if truncated:
        kept = _shortened(name, longest, responses, settings)
        if kept is None or _are_equal(border, kept):
            return []
        responses = kept
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
    """Return how many tokens of the prompt all sequences share, and whether a token spans the end of the
    prompt.

    The second value is also true if the loss mask of chat.tokenise_examples begins elsewhere.
    """
    alone = np.asarray(prompt, np.int32)
    border = min(_common_length(alone, ids) for ids, _ in responses.values())
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


def _common_length(a: np.ndarray, b: np.ndarray) -> int:
    count = min(len(a), len(b))
    differs = a[:count] != b[:count]
    return int(differs.argmax()) if differs.any() else count


def _mask_from_border(name: str, border: int, response: MaskedTokens) -> MaskedTokens:
    """Return the sequence up to its last target; all tokens from `border` to the first target become targets
    too.
    """
    ids, learned = response[0], response[1].copy()
    learned[: max(border, 1)] = False
    if not learned.any():
        raise InvalidRow(
            name,
            "response without targets",
            "the response has no token that can be a target; give the row a prompt, or remove it",
        )
    learned[max(border, 1) : learned.argmax()] = True
    end = len(learned) - int(learned[::-1].argmax())
    return ids[:end], learned[:end]


def _shortened(
    name: str, longest: int, responses: dict[str, MaskedTokens], settings: RowSettings
) -> dict[str, MaskedTokens] | None:
    """Return the sequences of a pair that is too long truncated, None for a pair that is left out, because of
    data.too_long=drop or because its prompt leaves nothing of a response. longest: tokens of a sequence.
    """
    limit = settings.max_length
    if settings.too_long == "error":
        raise ValueError(
            f"{name}: {longest} tokens of a response with its prompt are more than data.max_length={limit}; "
            f"{remedy_for_too_long('max_length')}, or truncate"
        )
    kept = {kind: (ids[:limit], learned[:limit]) for kind, (ids, learned) in responses.items()}
    whole = settings.too_long == "truncate" and all(learned.any() for _, learned in kept.values())
    return kept if whole else None


def _are_equal(border: int, responses: dict[str, MaskedTokens]) -> bool:
    """Whether the chosen and the rejected response are the same tokens."""
    bodies = [responses[kind][0][border:] for kind in ("chosen", "rejected") if kind in responses]
    return len(bodies) == 2 and np.array_equal(bodies[0], bodies[1])


# ---- mismatched responses


def mismatch_responses(
    pairs: TokenisedRows, sides: tuple[Int[np.ndarray, " _"], ...], seed: int, limit: int
) -> TokenisedRows:
    """Add to each pair a response of another pair of the same split, if possible with another prompt.
    Otherwise the other pair has the same prompt and other responses. limit: tokens of the prompt with that
    response.
    """
    donors = np.arange(len(pairs))
    prompts, everything = pairs.group_by(0), pairs.group_by(*range(1 + len(pairs.kinds)))
    for members in filter(len, sides):
        partner = derangement(prompts[members], seed)
        partner = derangement(everything[members], seed) if partner is None else partner
        if partner is None:
            raise ValueError(
                f"{pairs.names[members[0]]}: data.third=mismatched takes each pair's third response from "
                f"another pair, and more than half of these {len(members)} pairs are the same; add rows or "
                "change data.held_out"
            )
        donors[members] = members[partner]
    return with_mismatched(pairs, donors, limit)


def with_mismatched(pairs: TokenisedRows, donors: Int[np.ndarray, " pairs"], limit: int) -> TokenisedRows:
    """Add a response "mismatched" to each pair: one of pair donors[i], truncated to `limit` tokens with the
    prompt.

    Of donors with both responses, every other one lends its chosen response and the rest their rejected one:
    KTO's reference point is a mean over both kinds (arXiv:2402.01306, section 4.1), as in TRL, which makes
    two rows of a pair.
    """
    has_response = pairs.counts[donors, 1:3] > 0
    column = 1 + has_response.argmax(1)
    both = np.flatnonzero(has_response.all(1))
    column[both] = 1 + np.arange(len(both)) % 2
    counts = np.minimum(pairs.counts[donors, column], limit - pairs.counts[:, 0])
    ends = np.where(counts < pairs.counts[donors, column], -1, pairs.ends[donors, column - 1])
    starts = np.column_stack([pairs.starts, pairs.starts[donors, column]])
    counts = np.column_stack([pairs.counts, counts])
    where, offsets = ranges(starts.ravel(), counts.ravel()), np.concatenate([[0], np.cumsum(counts)])
    learned = pairs.learned[where]
    without_prompt = counts[:, 0] == 0
    learned[offsets[:-1].reshape(counts.shape)[without_prompt, -1]] = False
    bounds = np.concatenate([[0], np.cumsum(learned)])[offsets]
    hashes = np.asarray(pairs.hashes)
    digest = hashlib.sha256(pairs.digest.encode() + learned.tobytes() + donors.tobytes())
    return replace(
        pairs,
        kinds=(*pairs.kinds, "mismatched"),
        ids=Flat([pairs.ids[where]]),
        learned=Flat([learned]),
        counts=counts,
        reads=np.diff(bounds).reshape(counts.shape)[:, 1:],
        ends=np.column_stack([pairs.ends, ends]),
        hashes=Flat([np.column_stack([hashes, hashes[donors, column]])]),
        digest=digest.hexdigest(),
    )
