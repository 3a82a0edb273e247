"""Tokens of a dataset's rows before a limit truncates or drops them, and what each limit keeps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxft.data.mixture import parse_sources
from jaxft.data.pairs.source import PairRows
from jaxft.data.pairs.tokens import TokenisedPairs, tokenise_pairs
from jaxft.data.prompt_rows import PromptRows, tokenise_prompts
from jaxft.data.prompts import Prompts
from jaxft.data.sft import Rows
from jaxft.data.tokenise import Tokenising
from jaxft.data.tokens import TokenisedExamples, tokenise_rows

UNLIMITED = 2**30
MEASURED = 20_000  # rows; of a larger dataset parts at even distances are measured
ANSWERS = 1_000  # reference answers that are tokenised
ANSWER_COLUMNS = ("answer", "solution", "response", "completion", "output", "target", "ground_truth")


@dataclass(frozen=True)
class RowLengths:
    """Tokens of each row's prompt and responses, without any limit.

    responses: a column for each of `kinds`, none for prompts of rollouts. targets: tokens of each row that
    have a loss. answers: tokens of the reference answers that rows of prompts have.
    """

    prompts: Int[np.ndarray, " rows"]
    responses: Int[np.ndarray, "rows A"]
    kinds: tuple[str, ...]
    targets: Int[np.ndarray, " rows"]
    answers: Int[np.ndarray, " answers"]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def longest(self) -> Int[np.ndarray, " rows"]:
        """Tokens of each row's longest sequence: what data.max_length, or data.max_prompt, limits."""
        return self.prompts + self.responses.max(1, initial=0)

    @property
    def parts(self) -> dict[str, Int[np.ndarray, " rows"]]:
        """Tokens of each part that has any, by name."""
        several = len(self.kinds) > 1
        parts = {"prompt": self.prompts, **dict(zip(self.kinds, self.responses.T, strict=True))}
        parts |= {} if several else {"with loss": self.targets}
        parts |= {"answer": self.answers, "prompt with longest response" if several else "all": self.longest}
        return {name: counts for name, counts in parts.items() if counts.any()}

    def covered(self, limit: int) -> float:
        """Return the fraction of the rows that are whole with this limit."""
        return float((self.longest <= limit).mean())

    def kept(self, limit: int) -> Int[np.ndarray, " rows"]:
        """Return the tokens of each row that are left: 0 if the limit leaves nothing of a response."""
        room = limit - self.prompts[:, None]
        tokens = self.prompts + np.minimum(self.responses, room).sum(1)
        return np.where(self.prompts < limit + (not self.kinds), tokens, 0)


def measure(data: Rows | PairRows | Prompts, tokenizer: Any, cache: Path | None = None) -> RowLengths:
    """Tokenise the training rows, or load their tokens from the cache, without a limit of their length.

    Raises ValueError or OSError as opening the data does.
    """
    refs = [source.ref for source in parse_sources(data.train)]
    how = data.tokenising(cache)._replace(sample=MEASURED)
    return reduce(_concatenate, [_measure_one(ref, data, tokenizer, how) for ref in refs])


def _measure_one(ref: str, data: Rows | PairRows | Prompts, tokenizer: Any, how: Tokenising) -> RowLengths:
    if isinstance(data, Prompts):
        free = replace(data.token_settings, max_prompt=UNLIMITED)
        return _of_prompts(tokenise_prompts(ref, free, tokenizer, how), tokenizer)
    if isinstance(data, PairRows):
        pairs = replace(data.token_settings, max_length=UNLIMITED, too_long="truncate")
        return _of_pairs(tokenise_pairs(ref, pairs, tokenizer, how))
    rows = replace(data.token_settings, max_length=UNLIMITED, too_long="truncate")
    return _of_examples(tokenise_rows(ref, rows, tokenizer, how))


def _of_examples(rows: TokenisedExamples) -> RowLengths:
    learned = np.flatnonzero(np.asarray(rows.learned))
    first = learned[np.searchsorted(learned, rows.offsets[:-1])] - rows.offsets[:-1]
    prompts = np.where(first > 1, first, 0)  # the first token of a text never has a loss, and is no prompt
    responses = (rows.lengths - prompts)[:, None]
    return RowLengths(prompts, responses, ("response",), rows.reads, np.zeros(0, np.int64))


def _of_pairs(pairs: TokenisedPairs) -> RowLengths:
    counts = pairs.counts
    return RowLengths(counts[:, 0], counts[:, 1:], pairs.kinds, pairs.reads.sum(1), np.zeros(0, np.int64))


def _of_prompts(rows: PromptRows, tokenizer: Any) -> RowLengths:
    some = [rows.fields[int(i)] for i in np.linspace(0, len(rows) - 1, min(len(rows), ANSWERS))]
    texts = [text for text in map(_reference_answer, some) if text]
    counts = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []
    none = np.zeros((len(rows), 0), np.int64)
    return RowLengths(rows.lengths, none, (), np.zeros(len(rows), np.int64), np.array(counts, np.int64))


def _reference_answer(fields: dict[str, Any]) -> str | None:
    """Return the first column of a row that is a reference answer."""
    return next((fields[name] for name in ANSWER_COLUMNS if isinstance(fields.get(name), str)), None)


def _concatenate(a: RowLengths, b: RowLengths) -> RowLengths:
    return RowLengths(
        np.concatenate([a.prompts, b.prompts]),
        np.concatenate([a.responses, b.responses]),
        a.kinds,
        np.concatenate([a.targets, b.targets]),
        np.concatenate([a.answers, b.answers]),
    )


def percentile(counts: Sequence[int] | Int[np.ndarray, " n"], percent: float) -> int:
    """Return the smallest of the counts that at least so many percent of them do not exceed."""
    return int(np.percentile(counts, percent, method="inverted_cdf"))
