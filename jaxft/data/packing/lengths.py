"""Tokens of a dataset's rows before a limit truncates or drops them, and what each limit keeps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxft.data.packing.pack import round_up
from jaxft.data.packing.pair_layout import assign_rows, order_batches, row_shape
from jaxft.data.packing.reader import Reader
from jaxft.data.packing.row_tasks import row_fields
from jaxft.data.packing.tokenised import ROW_FIELDS, TokenisedRows
from jaxft.data.pairs import PairRows
from jaxft.data.prompts import LENGTH_STEP, Prompts
from jaxft.data.rows.mixture import parse_sources
from jaxft.data.sft import Rows
from jaxft.data.source import RowStats, SourceStats

UNLIMITED = 2**30
MEASURED = 10_000  # rows; of a larger dataset so many at even distances
ALARMING = 0.1  # fraction of the rows
ANSWERS = 1_000  # reference answers that are tokenised
ANSWER_COLUMNS = ("answer", "solution", "response", "completion", "output", "target", "ground_truth")


@dataclass(frozen=True)
class RowLengths:
    """Tokens of each row's prompt and responses, without any limit.

    responses: a column for each of `kinds`, none for prompts of rollouts. targets: tokens of each row that
    have a loss. answers: tokens of the reference answers that rows of prompts have. read: rows that
    were read, also invalid ones. total: of the dataset, of which these are a sample if `read` is less; None
    if it is not known.
    """

    prompts: Int[np.ndarray, " rows"]
    responses: Int[np.ndarray, "rows A"]
    kinds: tuple[str, ...]
    targets: Int[np.ndarray, " rows"]
    answers: Int[np.ndarray, " answers"]
    read: int = 0
    total: int | None = 0

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def is_sample(self) -> bool:
        """Whether the dataset has, or may have, rows that are not measured."""
        return self.total is None or self.total > self.read

    @property
    def scale(self) -> float:
        """How many rows of the dataset each measured row stands for, at least."""
        return max(1.0, (self.total or 0) / max(1, self.read))

    @property
    def described(self) -> str:
        """Describe which rows were measured, without their unit: "100", or "a sample of 10,000 of 60,000"."""
        if self.total is None:
            return f"the first {self.read:,}"
        return f"a sample of {self.read:,} of {self.total:,}" if self.is_sample else f"{len(self):,}"

    @property
    def longest(self) -> Int[np.ndarray, " rows"]:
        """Tokens of each row's longest sequence: what data.max_length, or data.max_prompt, limits."""
        return self.prompts + self.responses.max(1, initial=0)

    @property
    def parts(self) -> dict[str, Int[np.ndarray, " rows"]]:
        """Tokens of the prompts, the responses and so on, by name; parts without any tokens are left out."""
        several = len(self.kinds) > 1
        responses = {k: x[x > 0] for k, x in zip(self.kinds, self.responses.T, strict=True)}
        parts = {"prompt": self.prompts, **responses}
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

    Invalid rows are left out. Raises ValueError or OSError for a dataset that cannot be read.
    """
    how = {"sample": MEASURED, "invalid_limit": 1.0, "names_first": False}
    sources = parse_sources(data.train)
    readers = [source.adapt(data).reader(tokenizer, cache).otherwise(**how) for source in sources]
    return measure_datasets([source.ref for source in sources], readers)


def measure_datasets(refs: Sequence[str], readers: Sequence[Reader]) -> RowLengths:
    """Tokenise datasets without a limit of their rows' lengths. readers: of each."""
    parts = []
    for ref, reader in zip(refs, readers, strict=True):
        free = replace(reader.settings, max_length=UNLIMITED, too_long="truncate")
        parts.append(replace(reader, settings=free).read(ref))
    rows = reduce(TokenisedRows.concatenate, parts)
    counts, answers = rows.counts.astype(np.int64), _reference_answers(rows, readers[0].tokenizer)
    return RowLengths(counts[:, 0], counts[:, 1:], rows.kinds, rows.targets, answers, rows.read, rows.total)


def _reference_answers(rows: TokenisedRows, tokenizer: Any) -> Int[np.ndarray, " answers"]:
    """Return the tokens of the reference answers of some prompts: of each, the first column that is one."""
    some = np.linspace(0, len(rows) - 1, min(len(rows), ANSWERS)) if ROW_FIELDS in rows.extras else ()
    each = (
        [fields.get(name) for name in ANSWER_COLUMNS] for fields in (row_fields(rows, int(i)) for i in some)
    )
    answers = [next((value for value in values if isinstance(value, str)), None) for values in each]
    texts = [text for text in answers if text]
    counts = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []
    return np.array(counts, np.int64)


def micro_tokens(data: Rows | PairRows | Prompts, lengths: RowLengths, limit: int) -> int:
    """Return the tokens of the largest microbatch with a limit of the rows' lengths."""
    rows = -(-data.units_per_step // data.micro)
    if isinstance(data, Prompts):
        return rows * (min(limit, int(lengths.longest.max())) + data.group * data.episode_length)
    if isinstance(data, Rows):
        return rows * limit
    return _fullest_row(data, lengths.kept(limit))


def _fullest_row(data: PairRows, tokens: Int[np.ndarray, " pairs"]) -> int:
    """Return the tokens of a row, padding included, that has room for the pairs of any microbatch."""
    tokens = tokens[tokens > 0]
    if not len(tokens):
        return LENGTH_STEP
    batches = order_batches(tokens, data.batch, data.seed, 0)
    return row_shape(tokens, tokens, [assign_rows(batches, tokens, min(data.micro, data.batch))]).length


@dataclass(frozen=True)
class LimitCost:
    """The fractions that a limit of the rows' lengths keeps, and its cost.

    whole, truncated, dropped: numbers of rows. tokens: of an epoch. time, memory: of an epoch, and for the
    activations of the largest microbatch, relative to the setting's own limit.
    """

    limit: int
    whole: int
    truncated: int
    dropped: int
    tokens: int
    time: float
    memory: float


def limit_costs(
    data: Rows | PairRows | Prompts, lengths: RowLengths, context: int = UNLIMITED
) -> list[LimitCost]:
    """Return the costs of limits that cover 50, 90, 95, 99 and 100 % of the rows, and of the present one.

    context: the positions of the model, which no limit exceeds.
    """
    now = getattr(data, data.length_settings[0])
    most = context - (data.episode_length if isinstance(data, Prompts) else 0)
    covering = [
        min(most, round_up(percentile(lengths.longest, p), LENGTH_STEP)) for p in (50, 90, 95, 99, 100)
    ]
    costs, sizes = [], {limit: _epoch_tokens(data, lengths, limit) for limit in {now, *covering}}
    for limit, tokens in sorted(sizes.items()):
        whole = int((lengths.longest <= limit).sum())
        left = whole if data.too_long in ("drop", "error") else int(np.count_nonzero(lengths.kept(limit)))
        time = tokens / max(1, sizes[now])
        memory = micro_tokens(data, lengths, limit) / micro_tokens(data, lengths, now)
        costs.append(LimitCost(limit, whole, left - whole, len(lengths) - left, tokens, time, memory))
    return costs


def _epoch_tokens(data: Rows | PairRows | Prompts, lengths: RowLengths, limit: int) -> int:
    """Return the tokens that an epoch trains on, of rollouts with completions of full length."""
    if data.too_long == "split":
        return int(lengths.longest.sum())
    kept = lengths.kept(limit)
    if data.too_long != "truncate":
        kept = np.where(lengths.longest <= limit, kept, 0)
    further = data.group * data.episode_length if isinstance(data, Prompts) else 0
    return int(kept.sum() + further * np.count_nonzero(kept))


def limit_alarms(data: object, stats: SourceStats, tokenizer: Any, context: int = UNLIMITED) -> list[str]:
    """Return an alarm with a remedy if more than ALARMING of the rows are truncated or left out.

    context: the positions of the model, which the remedy does not exceed.
    """
    if not isinstance(data, Rows | PairRows | Prompts):
        return []
    truncated = stats.truncated if isinstance(stats, RowStats) else 0
    rows = stats.examples + stats.held_out + stats.dropped
    if stats.dropped + truncated <= ALARMING * rows:
        return []
    name, unit = data.length_settings[0], data.unit
    now, lengths = getattr(data, name), measure(data, tokenizer)
    better = min(round_up(percentile(lengths.longest, 99), LENGTH_STEP), max(now, context))
    covered = "99 %" if better < context else f"{100 * lengths.covered(better):.0f} %"
    dropped = f"{100 * stats.dropped / rows:.0f} % of the {unit} are left out"
    cut = f"{100 * truncated / rows:.0f} % are truncated" if truncated else ""
    remedy = f"{name}={better} covers {covered} of them and needs "
    remedy += f"{micro_tokens(data, lengths, better) / micro_tokens(data, lengths, now):.1f} x the memory"
    leave_out = "; data.too_long=drop leaves all of these out" if truncated else ""
    problem = " and ".join(text for text in (dropped * bool(stats.dropped), cut) if text)
    return [f"{problem}, because they have more tokens than {name}={now}. {remedy}{leave_out}"]


def percentile(counts: Sequence[int] | Int[np.ndarray, " n"], percent: float) -> int:
    """Return the smallest count that at least `percent` percent of the counts do not exceed."""
    return int(np.percentile(counts, percent, method="inverted_cdf"))
