"""Tokenised pairs: one prompt and its answers each, cut where TRL cuts them, and kept on disk like SFT's rows.

The prompt ends where the tokens of the prompt alone (with the generation prompt) and those of prompt and answer part; the prompt
of a pair is what this leaves to all of its answers (TRL 1.16, dpo_trainer.py, tokenize_fn). A token that spans the border belongs
to the answer, and is counted; where the two part earlier than that, the row is refused.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxft.data import cache as store
from jaxft.data import chat
from jaxft.data.pack import spread
from jaxft.data.pairs.formats import Pair, PairTokenSettings, normalise_pairs
from jaxft.data.rows import Row, read_rows

VERSION = ("pairs", 1)  # counts changes to what rows become
_ARRAYS = {
    "ids": np.int32, "learned": np.bool_, "offsets": np.int64, "kept": np.int64, "cut": np.bool_, "moved": np.bool_,
    "numbers": np.float64, "weights": np.float64,
}  # fmt: skip

Masked = tuple[np.ndarray, np.ndarray]  # token ids, learned?


@dataclass(frozen=True)
class TokenisedPairs:
    """Pairs one after the other, each in 1 + len(kinds) pieces: the prompt, and an answer of each kind (empty if missing).

    Piece k of pair i is ids[offsets[i * K + k] : offsets[i * K + k + 1]], K = 1 + len(kinds). `learned` marks tokens of answers
    that are targets; a sequence's first token never is. `cut` marks truncated pairs, `moved` those where a token spans the
    end of the prompt. `reference`, once known, is a log-prob at each learned token.
    """

    kinds: tuple[str, ...]
    ids: Int[np.ndarray, " tokens"]
    learned: Bool[np.ndarray, " tokens"]
    offsets: Int[np.ndarray, " pieces_plus_1"]
    kept: Int[np.ndarray, " pairs"]
    cut: Bool[np.ndarray, " pairs"]
    moved: Bool[np.ndarray, " pairs"]
    numbers: Float[np.ndarray, "pairs columns"]
    weights: Float[np.ndarray, " pairs"]
    names: tuple[str, ...]
    dropped: int = 0
    cache: str = field(default="off", compare=False)
    reference: Float[np.ndarray, " tokens"] | None = None

    @cached_property
    def starts(self) -> Int[np.ndarray, "pairs K"]:
        """Where each piece begins."""
        return self.offsets[:-1].reshape(len(self.names), 1 + len(self.kinds))

    @cached_property
    def counts(self) -> Int[np.ndarray, "pairs K"]:
        """Tokens of each piece."""
        return np.diff(self.offsets).reshape(len(self.names), 1 + len(self.kinds))

    @cached_property
    def reads(self) -> Int[np.ndarray, "pairs A"]:
        """Learned tokens of each answer."""
        before = np.concatenate([[0], np.cumsum(self.learned)])[self.offsets]
        return np.diff(before).reshape(len(self.names), 1 + len(self.kinds))[:, 1:]

    def piece(self, pair: int, number: int) -> Int[np.ndarray, " n"]:
        """Token ids of the prompt (0) or an answer (1, 2, ...)."""
        start = self.starts[pair, number]
        return self.ids[start : start + self.counts[pair, number]]

    def same(self, *pieces: int) -> Int[np.ndarray, " pairs"]:
        """A number for each pair, equal where the pieces of these numbers hold the same tokens."""
        seen: dict[tuple, int] = {}
        texts = (tuple(self.piece(i, k).tobytes() for k in pieces) for i in range(len(self.names)))
        return np.array([seen.setdefault(text, len(seen)) for text in texts], np.int64)

    def keys(self) -> tuple[str, ...]:
        """A hash of each pair's prompt and answers: all that its log-probs depend on beside the model."""

        def key(pair):
            digest = hashlib.sha256()
            for number, (start, count) in enumerate(zip(self.starts[pair], self.counts[pair], strict=True)):
                digest.update(f"{number} {count} ".encode())
                digest.update(self.ids[start : start + count].tobytes())
                digest.update(self.learned[start : start + count].tobytes())
            return digest.hexdigest()[:40]

        return tuple(key(i) for i in range(len(self.names)))


def tokenised_pairs(
    ref: str, rows: PairTokenSettings, tokenizer: Any, cache: Path | None = None
) -> TokenisedPairs:
    """The pairs of `ref` as tokens, from the cache if it has them; a cache that can't be read is made anew."""
    found, kinds = read_rows(ref), rows.kinds
    path = store.cache_folder(cache) / f"{store.key_of(found, tokenizer, VERSION, astuple(rows))}.npz"
    stored, state = store.load(
        path, _ARRAYS, lambda stored: _sound(stored, len(found), (len(kinds), len(rows.extras)))
    )
    if stored is None:
        stored = _tokenise(found, rows, tokenizer)
        state = store.save(path, stored) or state
    if not len(stored["kept"]):
        raise ValueError(
            f"{ref}: all {len(found)} rows were dropped, longer than data.max_length={rows.max_length}; raise it"
        )
    names = tuple(found[i].name for i in stored["kept"])
    return TokenisedPairs(kinds, **stored, names=names, dropped=len(found) - len(names), cache=state)


def join(first: TokenisedPairs, second: TokenisedPairs) -> TokenisedPairs:
    """The pairs of both, the first's in front."""
    both = {
        name: np.concatenate([getattr(first, name), getattr(second, name)])
        for name in _ARRAYS
        if name != "offsets"
    }
    return TokenisedPairs(
        first.kinds,
        **both,
        offsets=np.concatenate([first.offsets, second.offsets[1:] + first.offsets[-1]]),
        names=first.names + second.names,
        dropped=first.dropped + second.dropped,
        cache=first.cache,
    )


def with_mismatched(pool: TokenisedPairs, donors: Int[np.ndarray, " pairs"], limit: int) -> TokenisedPairs:
    """Each pair with one more answer, "mismatched": the first that pair donors[i] has, cut to `limit` tokens with the prompt."""
    first = 1 + (pool.counts[donors, 1:] > 0).argmax(1)
    counts = np.minimum(pool.counts[donors, first], limit - pool.counts[:, 0])
    starts = np.column_stack([pool.starts, pool.starts[donors, first]])
    counts = np.column_stack([pool.counts, counts])
    where = spread(starts.ravel(), counts.ravel())
    offsets = np.concatenate([[0], np.cumsum(counts)])
    learned = pool.learned[where]
    bare = counts[:, 0] == 0
    learned[offsets[:-1].reshape(counts.shape)[bare, -1]] = False
    kinds = (*pool.kinds, "mismatched")
    return replace(pool, kinds=kinds, ids=pool.ids[where], learned=learned, offsets=offsets)


# ---- rows to tokens


def _tokenise(found: Sequence[Row], rows: PairTokenSettings, tokenizer: Any) -> dict[str, np.ndarray]:
    pairs = normalise_pairs(found, rows)
    given = [[answer for answer in pair.answers.values() if answer is not None] for pair in pairs]
    sequences = chat.tokenise(
        [answer for answers in given for answer in answers], tokenizer, "completion", rows.date
    )
    prompts = chat.prompts([answers[0] for answers in given], tokenizer, rows.date)
    columns: dict[str, Any] = {name: [] for name in _ARRAYS}
    for number, pair in enumerate(pairs):
        answers = {kind: next(sequences) for kind, answer in pair.answers.items() if answer is not None}
        border, moved = _border(pair.name, next(prompts), answers, tokenizer)
        answers = {kind: _from_border(pair.name, kind, border, *answer) for kind, answer in answers.items()}
        long = any(len(ids) > rows.max_length for ids, _ in answers.values())
        if long and rows.too_long == "drop":
            continue
        answers = {
            kind: _cut(f"{pair.name}: {kind}", border, answer, rows) for kind, answer in answers.items()
        }
        _refuse_same(pair.name, border, answers, long, rows)
        _append(columns, pair, border, answers)
        known = {"kept": number, "cut": long, "moved": moved, "numbers": pair.numbers, "weights": pair.weight}
        for name, value in known.items():
            columns[name].append(value)
    columns["offsets"] = [0, *np.cumsum(columns["offsets"])]
    for name in ("ids", "learned"):
        columns[name] = np.concatenate(columns[name]) if columns[name] else []
    arrays: dict[str, np.ndarray] = {
        name: np.asarray(columns[name], dtype) for name, dtype in _ARRAYS.items()
    }
    arrays["numbers"] = arrays["numbers"].reshape(len(arrays["kept"]), len(rows.extras))
    return arrays


def _append(columns: dict[str, list], pair: Pair, border: int, answers: dict[str, Masked]) -> None:
    """The pieces of a pair; `offsets` takes their lengths."""
    ids, learned = next(iter(answers.values()))
    empty = (ids[:0], learned[:0])
    bodies = [answers.get(kind, empty) for kind in pair.answers]
    pieces = [(ids[:border], learned[:border]), *((i[border:], m[border:]) for i, m in bodies)]
    for i, m in pieces:
        columns["ids"].append(i)
        columns["learned"].append(m)
        columns["offsets"].append(len(i))


def _border(name: str, prompt: list[int], answers: dict[str, Masked], tokenizer: Any) -> tuple[int, bool]:
    """(tokens that the prompt shares with every sequence, whether that is not all of it or not where the loss mask begins)."""
    alone = np.asarray(prompt, np.int32)
    border = min(_common(alone, ids) for ids, _ in answers.values())
    if border < len(prompt) - 1:
        lost = tokenizer.decode(prompt[border:])
        raise ValueError(
            f"{name}: only {border} of the prompt's {len(prompt)} tokens stay the same when an answer follows, {lost!r} not; "
            "end the prompt where a token ends, or use a chat template that shows a prompt alone as it shows it with an answer"
        )
    begins = [int(learned[1:].argmax()) + 1 for _, learned in answers.values()]
    return border, border < len(prompt) or any(at != max(border, 1) for at in begins)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    count = min(len(a), len(b))
    differs = a[:count] != b[:count]
    return int(differs.argmax()) if differs.any() else count


def _from_border(name: str, kind: str, border: int, ids: np.ndarray, learned: np.ndarray) -> Masked:
    """The sequence up to its last learned token; what is learned begins at the border."""
    learned = learned.copy()
    learned[: max(border, 1)] = False
    if not learned.any():
        raise ValueError(
            f"{name}: the {kind} answer has no token that can be learned; give the row a prompt, or remove it"
        )
    learned[max(border, 1) : learned.argmax()] = True
    end = len(learned) - int(learned[::-1].argmax())
    return ids[:end], learned[:end]


def _cut(name: str, border: int, answer: Masked, rows: PairTokenSettings) -> Masked:
    ids, learned = answer
    if len(ids) <= rows.max_length:
        return answer
    limit, advice = f"data.max_length={rows.max_length}", "raise it or set data.too_long=drop"
    if not learned[: rows.max_length].any():
        raise ValueError(f"{name}: the prompt has {border} tokens and {limit} leaves no answer; {advice}")
    if rows.too_long == "error":
        raise ValueError(
            f"{name}: {len(ids)} tokens with the prompt, more than {limit}; {advice} or truncate"
        )
    return ids[: rows.max_length], learned[: rows.max_length]


def _refuse_same(
    name: str, border: int, answers: dict[str, Masked], long: bool, rows: PairTokenSettings
) -> None:
    bodies = [answers[kind][0][border:] for kind in ("chosen", "rejected") if kind in answers]
    if len(bodies) == 2 and np.array_equal(bodies[0], bodies[1]):
        why = f"cut to data.max_length={rows.max_length} " if long else ""
        advice = "raise it or set data.too_long=drop" if long else "a pair needs two different answers"
        raise ValueError(f"{name}: chosen and rejected {why}are the same tokens; {advice}")


def _sound(stored: dict[str, np.ndarray], count: int, sizes: tuple[int, int]) -> bool:
    kinds, columns = sizes
    pairs, tokens = len(stored["kept"]), len(stored["ids"])
    fits = all(stored[name].shape == (pairs,) for name in ("kept", "cut", "moved", "weights"))
    fits = fits and stored["numbers"].shape == (pairs, columns) and stored["learned"].shape == (tokens,)
    fits = fits and stored["offsets"].shape == (pairs * (1 + kinds) + 1,) and stored["offsets"][-1] == tokens
    return bool(fits and (stored["kept"] < count).all())
