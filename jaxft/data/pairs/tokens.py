"""Tokenise pairs: one prompt and its responses, split where TRL splits them, and cached on disk like SFT
rows.

The prompt ends at the first difference between the tokens of the prompt alone (with the generation prompt)
and those of prompt and response; all responses of a pair share the shortest of these prompts (TRL 1.16,
dpo_trainer.py, tokenize_fn). A token that spans the end of the prompt belongs to the response, and such pairs
are counted. A row whose prompt differs in more than its last token is an error.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxft.data import cache as files
from jaxft.data import chat
from jaxft.data.cache import Arrays
from jaxft.data.chat import MaskedTokens
from jaxft.data.example import Chat, Completion
from jaxft.data.invalid import InvalidRow, InvalidRows, valid
from jaxft.data.pack import ranges
from jaxft.data.pairs.formats import PairExample, PairTokenSettings, normalise_each_pair
from jaxft.data.rows import Row, read_rows
from jaxft.data.tokens import TokenisedRows, arrays_and_rows, first_rows

VERSION = ("pairs", 5)  # increase it when the same rows become other tokens


@dataclass(frozen=True, kw_only=True)
class TokenisedPairs(TokenisedRows):
    """Pairs one after the other, each in 1 + len(kinds) pieces: the prompt, and a response of each kind
    (empty if missing).

    Piece k of pair i is ids[offsets[i * K + k] : offsets[i * K + k + 1]], K = 1 + len(kinds). learned: marks
    the tokens of responses that are targets; the first token of a sequence never is. truncated: marks
    truncated pairs. prompt_end_moved: marks pairs where a token spans the end of the prompt. extras: the
    extra columns. reference: the reference's log-prob of each token, 0 where it is no target; None before
    they are computed.
    """

    DTYPES: ClassVar[dict[str, Any]] = {
        **TokenisedRows.DTYPES, "prompt_end_moved": np.bool_, "extras": np.float64, "weights": np.float64,
    }  # fmt: skip

    kinds: tuple[str, ...]
    prompt_end_moved: Bool[np.ndarray, " pairs"]
    extras: Float[np.ndarray, "pairs columns"]
    weights: Float[np.ndarray, " pairs"]
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

    @cached_property
    def reads(self) -> Int[np.ndarray, "pairs A"]:
        """Target tokens of each response."""
        before = np.concatenate([[0], np.cumsum(self.learned)])[self.offsets]
        return np.diff(before).reshape(len(self), 1 + len(self.kinds))[:, 1:]

    def piece(self, pair: int, number: int) -> Int[np.ndarray, " n"]:
        """Return the token ids of the prompt (0) or a response (1, 2, ...)."""
        start = self.starts[pair, number]
        return self.ids[start : start + self.counts[pair, number]]

    def group_by(self, *pieces: int) -> Int[np.ndarray, " pairs"]:
        """Return a number for each pair, equal for pairs whose given pieces have the same tokens."""
        groups: dict[tuple, int] = {}
        texts = (tuple(self.piece(i, k).tobytes() for k in pieces) for i in range(len(self)))
        return np.array([groups.setdefault(text, len(groups)) for text in texts], np.int64)

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
        reference[self.learned] = np.concatenate([logps[i] for i in range(len(self))])
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


def tokenise_pairs(
    ref: str,
    settings: PairTokenSettings,
    tokenizer: Any,
    cache: Path | None = None,
    invalid_limit: float | None = None,
) -> TokenisedPairs:
    """Read the rows of `ref` and tokenise them as pairs, or load the tokens from the cache.

    invalid_limit: see InvalidRows.
    """
    invalid = InvalidRows(invalid_limit)
    rows = read_rows(ref, invalid)
    key = files.content_key(rows, tokenizer, VERSION, astuple(settings))
    arrays, state = files.load_or_make(
        files.row_cache_folder(cache) / f"{key}.npz",
        TokenisedPairs.DTYPES | files.INVALID_DTYPE,
        lambda arrays: _is_sound(arrays, len(rows), settings),
        lambda: _tokenise(rows, settings, tokenizer, InvalidRows(invalid_limit)),
    )
    fields = arrays_and_rows(ref, rows, arrays, invalid, settings.max_length)
    some = first_rows([rows[i] for i in arrays["row_numbers"]], settings.columns)
    examples = _responses(some, settings)
    checks = (chat.tools_warnings, chat.content_warnings)
    warnings = [line for check in checks for line in check(examples, tokenizer, settings.template)]
    return TokenisedPairs(**fields, kinds=settings.kinds, warnings=tuple(warnings), cache=state)


def _responses(rows: Sequence[Row], settings: PairTokenSettings) -> list[Chat | Completion]:
    """Return all responses of those rows that are valid."""
    pairs = normalise_each_pair(rows, settings) if rows else ()
    found = [pair.responses.values() for pair in pairs if not isinstance(pair, InvalidRow)]
    return [response for responses in found for response in responses if response is not None]


def with_mismatched(pairs: TokenisedPairs, donors: Int[np.ndarray, " pairs"], limit: int) -> TokenisedPairs:
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
    starts = np.column_stack([pairs.starts, pairs.starts[donors, column]])
    counts = np.column_stack([pairs.counts, counts])
    where = ranges(starts.ravel(), counts.ravel())
    offsets = np.concatenate([[0], np.cumsum(counts)])
    learned = pairs.learned[where]
    without_prompt = counts[:, 0] == 0
    learned[offsets[:-1].reshape(counts.shape)[without_prompt, -1]] = False
    kinds = (*pairs.kinds, "mismatched")
    return replace(pairs, kinds=kinds, ids=pairs.ids[where], learned=learned, offsets=offsets)


# ---- rows to tokens


def _tokenise(
    rows: Sequence[Row], settings: PairTokenSettings, tokenizer: Any, invalid: InvalidRows
) -> Arrays:
    pairs = list(normalise_each_pair(rows, settings)) if rows else []
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
    columns: dict[str, Any] = {name: [] for name in TokenisedPairs.DTYPES}
    for number, outcome in enumerate(pairs):
        with invalid.skip():
            pair = valid(outcome)
            found = [(kind, next(sequences)) for kind, x in pair.responses.items() if x is not None]
            prompt = valid(next(prompts))
            tokens = _pair_tokens(pair.name, prompt, {k: valid(x) for k, x in found}, settings, tokenizer)
            if tokens is None:
                continue
            border, responses, flags = tokens
            _append_pieces(columns, pair, border, responses)
            for name, value in {
                "row_numbers": number,
                "extras": pair.extras,
                "weights": pair.weight,
                **flags,
            }.items():
                columns[name].append(value)
    columns["offsets"] = [0, *np.cumsum(columns["offsets"])]
    for name in ("ids", "learned"):
        columns[name] = np.concatenate(columns[name]) if columns[name] else []
    arrays = {name: np.asarray(columns[name], dtype) for name, dtype in TokenisedPairs.DTYPES.items()}
    arrays["extras"] = arrays["extras"].reshape(len(arrays["row_numbers"]), len(settings.extras))
    return {**arrays, "invalid": files.pack_invalid(invalid.found)}


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
    long = any(len(ids) > settings.max_length for ids, _ in responses.values())
    if long and settings.too_long == "drop":
        return None
    total = sum(int(learned.sum()) for _, learned in responses.values())
    responses = {
        kind: _truncated(f"{name}: {kind}", border, response, settings)
        for kind, response in responses.items()
    }
    _require_different_tokens(name, border, responses, settings.max_length if long else None)
    targets = sum(int(learned.sum()) for _, learned in responses.values())
    counts = {"responses": total, "learned_responses": targets}
    return border, responses, {"truncated": long, "prompt_end_moved": moved, **counts}


def _append_pieces(
    columns: dict[str, list], pair: PairExample, border: int, responses: dict[str, MaskedTokens]
) -> None:
    """Append the pieces of a pair; the column `offsets` collects their lengths."""
    ids, learned = next(iter(responses.values()))
    empty = (ids[:0], learned[:0])
    bodies = [responses.get(kind, empty) for kind in pair.responses]
    pieces = [(ids[:border], learned[:border]), *((i[border:], m[border:]) for i, m in bodies)]
    for i, m in pieces:
        columns["ids"].append(i)
        columns["learned"].append(m)
        columns["offsets"].append(len(i))


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


def _truncated(name: str, border: int, response: MaskedTokens, settings: PairTokenSettings) -> MaskedTokens:
    ids, learned = response
    limit = settings.max_length
    if len(ids) <= limit:
        return response
    remedy = "raise data.max_length or set data.too_long=drop"
    if not learned[:limit].any():
        raise InvalidRow(
            name,
            "prompt longer than data.max_length",
            f"the prompt has {border} tokens, and data.max_length={limit} leaves no room for a "
            f"response; {remedy}",
        )
    if settings.too_long == "error":
        raise ValueError(
            f"{name}: {len(ids)} tokens with the prompt are more than data.max_length={limit}; {remedy} or "
            "truncate"
        )
    return ids[:limit], learned[:limit]


def _require_different_tokens(
    name: str, border: int, responses: dict[str, MaskedTokens], truncated_to: int | None
) -> None:
    bodies = [responses[kind][0][border:] for kind in ("chosen", "rejected") if kind in responses]
    if len(bodies) == 2 and np.array_equal(bodies[0], bodies[1]):
        if truncated_to is None:
            raise InvalidRow(
                name,
                "responses of the same tokens",
                "chosen and rejected are the same tokens; change one or remove the row",
            )
        raise InvalidRow(
            name,
            "responses of the same tokens",
            f"chosen and rejected are the same tokens when truncated to "
            f"data.max_length={truncated_to}; raise data.max_length or set data.too_long=drop",
        )


def _is_sound(arrays: Arrays, row_count: int, settings: PairTokenSettings) -> bool:
    """Whether the shapes of loaded arrays agree with one another, the settings and the number of rows."""
    pairs, tokens, kinds = len(arrays["row_numbers"]), len(arrays["ids"]), len(settings.kinds)
    fits = all(
        arrays[name].shape == (pairs,)
        for name in ("truncated", "prompt_end_moved", "weights", "responses", "learned_responses")
    )
    fits = fits and arrays["extras"].shape == (pairs, len(settings.extras))
    fits = fits and arrays["learned"].shape == (tokens,)
    fits = fits and arrays["offsets"].shape == (pairs * (1 + kinds) + 1,) and arrays["offsets"][-1] == tokens
    return bool(fits and (arrays["row_numbers"] < row_count).all())
