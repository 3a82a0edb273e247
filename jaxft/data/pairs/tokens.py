"""Tokenise pairs as one prompt and its responses, split where TRL splits them, and cache them on disk.

The prompt ends at the first difference between the tokens of the prompt alone (with the generation prompt)
and those of prompt and response; all responses of a pair share the shortest of these prompts (TRL 1.16,
dpo_trainer.py, tokenize_fn). A token that spans the end of the prompt belongs to the response, and such pairs
are counted. A row whose prompt differs in more than its last token is an error.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Bool, Float, Int, UInt64

from jaxft.data import cache as files
from jaxft.data import chat
from jaxft.data.cache import ChunkColumns, ColumnType, ColumnTypes
from jaxft.data.chat import MaskedTokens
from jaxft.data.example import Chat, Completion
from jaxft.data.formats import RowFormat
from jaxft.data.invalid import InvalidRow, InvalidRows, valid
from jaxft.data.left_out import has_placeholder
from jaxft.data.pack import number_groups
from jaxft.data.pairs.formats import (
    PairExample,
    PairTokenSettings,
    normalise_each_pair,
    normalise_pairs_as,
    pair_schemas,
)
from jaxft.data.row_files import Row
from jaxft.data.tokenise import DEFAULT_TOKENISING, RowKind, Tokenising, tokenise_dataset
from jaxft.data.tokens import TokenisedRows, last_targets, remedy_for_too_long, row_fields

VERSION = ("pairs", 10)  # increase it when the same rows become other tokens


@dataclass(frozen=True, kw_only=True)
class TokenisedPairs(TokenisedRows):
    """Concatenated pairs of K = 1 + len(kinds) pieces each: the prompt, and a response of each kind (empty if
    missing).

    Piece k of pair i is ids[offsets[i * K + k] : offsets[i * K + k + 1]]. learned: mask of the response
    tokens that are targets; the first token of a sequence never is. reads, ends: of each response, see
    TokenisedRows; the end of a missing response is -1. hashes: of the tokens of each piece. truncated: mask
    of truncated pairs. prompt_end_moved: mask of pairs in which a token spans the end of the prompt. extras:
    the columns of data.extras. reference: the reference's log-prob of each target, 0 for other tokens; None
    before they are computed.
    """

    kinds: tuple[str, ...]
    reads: Int[np.ndarray, "pairs A"]
    ends: Int[np.ndarray, "pairs A"]
    hashes: UInt64[np.ndarray, "pairs K"]
    prompt_end_moved: Bool[np.ndarray, " pairs"]
    extras: Float[np.ndarray, "pairs columns"]
    reference: Float[np.ndarray, " tokens"] | None = None

    @cached_property
    def starts(self) -> Int[np.ndarray, "pairs K"]:
        """Index of the first token of each piece."""
        return self.offsets[:-1].reshape(len(self), 1 + len(self.kinds))

    @cached_property
    def counts(self) -> Int[np.ndarray, "pairs K"]:
        """Tokens of each piece."""
        return np.diff(self.offsets).reshape(len(self), 1 + len(self.kinds))

    @cached_property
    def lengths(self) -> Int[np.ndarray, " pairs"]:
        """Tokens of all pieces of each pair."""
        return self.counts.sum(1)

    def piece(self, pair: int, number: int) -> Int[np.ndarray, " n"]:
        """Return the token ids of the prompt (0) or a response (1, 2, ...)."""
        start = self.starts[pair, number]
        return self.ids[start : start + self.counts[pair, number]]

    def group_by(self, *pieces: int) -> Int[np.ndarray, " pairs"]:
        """Return a number for each pair, equal for pairs whose given pieces have the same tokens."""
        return number_groups(self.hashes[:, list(pieces)])

    def content_hashes(self) -> UInt64[np.ndarray, " pairs"]:
        """Return a number for each pair, equal for pairs of the same tokens."""
        return self.group_by(*range(1 + len(self.kinds))).astype(np.uint64)

    def with_reference(self, logps: dict[int, Float[np.ndarray, " tokens"]]) -> "TokenisedPairs":
        """Add the reference's log-probs of every pair, in order of kind and position in the response."""
        missing = [self.names[i] for i in range(len(self)) if i not in logps]
        if missing:
            raise ValueError(
                f"reference log-probs: {len(missing)} of {len(self)} pairs lack them, first {missing[0]}; "
                "compute all"
            )
        for i, (name, expected) in enumerate(zip(self.names, self.reads.sum(1), strict=True)):
            if len(logps[i]) != expected or not np.isfinite(logps[i]).all():
                raise ValueError(
                    f"reference log-probs of {name}: got {len(logps[i])} numbers, expected {expected} finite "
                    "ones; compute them again"
                )
        reference = np.zeros(len(self.ids), np.float32)
        reference[np.asarray(self.learned)] = np.concatenate([logps[i] for i in range(len(self))])
        return replace(self, reference=reference)

    def keys(self) -> tuple[str, ...]:
        """Return a hash of each pair's prompt and responses: all that its log-probs depend on, apart from the
        model.
        """
        return tuple(self._key(i) for i in range(len(self)))

    def _key(self, pair: int) -> str:
        digest = hashlib.sha256()
        for number, (start, count) in enumerate(zip(self.starts[pair], self.counts[pair], strict=True)):
            digest.update(f"{number} {count} ".encode())
            digest.update(self.ids[start : start + count].tobytes())
            digest.update(self.learned[start : start + count].tobytes())
        return digest.hexdigest()[:40]


def pair_columns(settings: PairTokenSettings) -> ColumnTypes:
    """Return the columns of tokenised pairs in a cache file."""
    kinds, extras = len(settings.kinds), len(settings.extras)
    columns = {
        "ids": ColumnType(np.int32, "counts"),
        "learned": ColumnType(np.bool_, "counts"),
        "counts": ColumnType(np.int32, width=1 + kinds),
        "reads": ColumnType(np.int64, width=kinds),
        "ends": ColumnType(np.int32, width=kinds),
        "hashes": ColumnType(np.uint64, width=1 + kinds),
        "truncated": ColumnType(np.bool_),
        "responses": ColumnType(np.int32),
        "learned_responses": ColumnType(np.int32),
        "prompt_end_moved": ColumnType(np.bool_),
        "weights": ColumnType(np.float64),
        "order": ColumnType(np.float64),
        "placeholders": ColumnType(np.bool_),
        "source": ColumnType(np.int32),
        "number": ColumnType(np.int64),
    }
    return columns | ({"extras": ColumnType(np.float64, width=extras)} if extras else {})


def tokenise_pairs(
    ref: str, settings: PairTokenSettings, tokenizer: Any, how: Tokenising = DEFAULT_TOKENISING
) -> TokenisedPairs:
    """Read the rows of `ref` and tokenise them as pairs, or load the tokens from the cache."""
    kind = RowKind(
        version=VERSION,
        key=astuple(settings),
        settings=settings,
        stored=pair_columns(settings),
        schemas=pair_schemas(settings),
        tokenise=partial(_tokenise, settings=settings),
    )
    found = tokenise_dataset(ref, kind, tokenizer, how)
    columns = {"extras": np.empty((len(found.names), 0)), **row_fields(ref, found, settings.max_length)}
    examples = _responses(found.examples, settings)
    checks = (chat.tools_warnings, chat.content_warnings)
    warnings = [line for check in checks for line in check(examples, tokenizer, settings.template)]
    return TokenisedPairs(**columns, kinds=settings.kinds, warnings=(*found.notes, *warnings))


def _responses(rows: Sequence[Row], settings: PairTokenSettings) -> list[Chat | Completion]:
    """Return all responses of those rows that are valid."""
    pairs = normalise_each_pair(rows, settings) if rows else ()
    found = [pair.responses.values() for pair in pairs if not isinstance(pair, InvalidRow)]
    return [response for responses in found for response in responses if response is not None]


# ---- rows to tokens


def _tokenise(
    rows: Sequence[Row],
    format: RowFormat,
    tokenizer: Any,
    invalid: InvalidRows,
    settings: PairTokenSettings,
) -> ChunkColumns:
    """Return the columns of a chunk's pairs; see RowKind."""
    pairs = list(normalise_pairs_as(format, rows, settings))
    present = [
        [response for response in pair.responses.values() if response is not None]
        for pair in pairs
        if isinstance(pair, PairExample)
    ]
    sequences = chat.tokenise_examples(
        [response for responses in present for response in responses],
        tokenizer,
        "completion",
        settings.template,
    )
    prompts = chat.example_prompt_ids([responses[0] for responses in present], tokenizer, settings.template)
    stored = pair_columns(settings)
    columns: dict[str, Any] = {name: [] for name in (*stored, "extras", "index")}
    for number, outcome in enumerate(pairs):
        with invalid.skip():
            pair = valid(outcome)
            found = [(kind, next(sequences)) for kind, x in pair.responses.items() if x is not None]
            prompt = valid(next(prompts))
            tokens = _pair_tokens(pair.name, prompt, {k: valid(x) for k, x in found}, settings, tokenizer)
            if tokens is None:
                continue
            border, responses, flags = tokens
            flags |= {} if pair.weight else {"learned_responses": 0}
            _append_pieces(columns, pair, border, responses)
            for name, value in {
                "index": number,
                "extras": pair.extras,
                "weights": pair.weight,
                "order": pair.order,
                "placeholders": any(
                    has_placeholder(x) for kind, x in pair.responses.items() if x and kind != "rejected"
                ),
                **flags,
            }.items():
                columns[name].append(value)
    columns |= {name: np.concatenate(columns[name]) for name in ("ids", "learned") if columns[name]}
    index = np.asarray(columns["index"], np.int64)
    part: ChunkColumns = {}
    for name, (dtype, _, width) in stored.items():
        if name not in (*files.NAMING, "ends"):
            values = np.asarray(columns[name], dtype)
            part[name] = values if width is None else values.reshape(-1, width)
    return {**part, "ends": _ends(part, tokenizer), "index": index}


def _ends(part: ChunkColumns, tokenizer: Any) -> Int[np.ndarray, "pairs A"]:
    """Return the last target of each response, -1 of a missing one."""
    after = np.cumsum(part["counts"]).reshape(part["counts"].shape)[:, 1:]
    present = part["counts"][:, 1:] > 0
    ends = np.full(present.shape, -1, np.int32)
    ends[present] = last_targets(part["ids"], part["learned"], after[present], tokenizer)
    return ends


def _pair_tokens(
    name: str,
    prompt: list[int],
    responses: dict[str, MaskedTokens],
    settings: PairTokenSettings,
    tokenizer: Any,
) -> tuple[int, dict[str, MaskedTokens], dict[str, int]] | None:
    """Return the end of the prompt, the sequences, and flags and counts of the pair; None if it is to be left
    out as too long.
    """
    border, moved = _border(name, prompt, responses, tokenizer)
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
            return None
        responses = kept
    targets = sum(int(learned.sum()) for _, learned in responses.values())
    counts = {"responses": total, "learned_responses": targets}
    return border, responses, {"truncated": truncated, "prompt_end_moved": moved, **counts}


def _append_pieces(
    columns: dict[str, list], pair: PairExample, border: int, responses: dict[str, MaskedTokens]
) -> None:
    """Append the pieces of a pair with their counts and hashes, and the reads of its responses."""
    ids, learned = next(iter(responses.values()))
    empty = (ids[:0], learned[:0])
    bodies = [responses.get(kind, empty) for kind in pair.responses]
    pieces = [(ids[:border], learned[:border]), *((i[border:], m[border:]) for i, m in bodies)]
    columns["ids"] += [i for i, _ in pieces]
    columns["learned"] += [m for _, m in pieces]
    columns["counts"].append([len(i) for i, _ in pieces])
    columns["hashes"].append([xxhash.xxh3_64_intdigest(i.tobytes()) for i, _ in pieces])
    columns["reads"].append([int(m.sum()) for _, m in pieces[1:]])


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
    name: str, longest: int, responses: dict[str, MaskedTokens], settings: PairTokenSettings
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
