"""Pairs as batches: their settings, and how they are laid out in rows. Batch k is a pure function of (rows,
tokenizer, settings, k).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxft.annotations import at_least, between, one_of
from jaxft.batch import Pairs
from jaxft.data import source
from jaxft.data.data_settings import DataSettings
from jaxft.data.packing import pair_layout
from jaxft.data.packing.pack import RowPlan, RowShape, round_up
from jaxft.data.packing.pair_layout import PairLayout
from jaxft.data.packing.reader import RowTask
from jaxft.data.packing.row_tasks import PAIR_TASK
from jaxft.data.packing.tokenised import NUMBERS, PROMPT_END_MOVED, TokenisedRows
from jaxft.data.row_settings import RowSettings
from jaxft.data.rows.mixture import sources_with_metrics, split_rows
from jaxft.data.rows.published_formats import kinds_of_ranking, rating_columns
from jaxft.nn.attention.layer_attention import AttentionLayers, varies_with_length

TOO_LONG = ("truncate", "drop", "error")
WEIGHTING = ("pair", "token")
LAYOUTS = ("auto", "branches", "plain")
THIRD = (None, "mismatched", "gold")
MIN_SAVING = 0.02  # fraction of the tokens that branches must save for layout "auto" to choose them


@dataclass(frozen=True)
class PairRows(DataSettings):
    """Responses to compare: the data of a run with a preference loss or a reward model.

    All pairs of one prompt stay on one side of the split into training and held-out rows. format: "auto"
    (detected from the columns), "plain" (strings are text without a chat template), or a name in formats.py,
    such as "preference" or "rated". max_length: the most tokens of a prompt with one response. too_long:
    "truncate" keeps the start, and leaves out a pair whose responses are then empty or equal; "drop" leaves
    the pair out, "error" ends the run. weighting: "pair" gives every pair of the optimizer batch the same
    weight, "token" every token of its responses. weight_column: a column of numbers that multiply the
    weights. extras: columns of numbers that the loss can read. layout: "branches" stores a prompt once for
    all its responses, "plain" before each; "auto" uses branches where they save 2 % of the tokens, if the
    model's rope does not depend on the length of a text. unpaired: also accept rows of one response and a
    label, for losses of single responses (KTO, BCO). third: a third response, "mismatched" (another pair's,
    for KTO's KL) or "gold" (column reference, for TPO). responses: how many responses of a ranking are read.
    With 2, the best and the worst: a pair. With k > 2, also responses between them, called "rank_2" to
    "rank_{k - 1}", and all ratings, as columns "score_chosen", "score_rejected", "score_rank_2" and so on. A
    row with fewer responses lacks the last ranks; of a row with more, the best, the worst and responses at
    even distances between them are read. best_first: whether responses without ratings are listed from the
    best to the worst; if not, a row without ratings is invalid. batch: pairs of one optimizer step, over all
    devices.

    Other fields: see DataSettings.

    >>> data = PairRows("pairs.jsonl", held_out=0.1, max_length=512, too_long="drop", batch=16, micro=4)
    >>> data.kinds
    ('chosen', 'rejected')
    >>> PairRows("ranked.jsonl", responses=4).kinds
    ('chosen', 'rejected', 'rank_2', 'rank_3')
    """

    max_length: Annotated[int, at_least(2)] = 1024
    too_long: Annotated[str, one_of(TOO_LONG)] = "truncate"
    weighting: Annotated[str, one_of(WEIGHTING)] = "pair"
    weight_column: str | None = None
    extras: tuple[str, ...] = ()
    layout: Annotated[str, one_of(LAYOUTS)] = "auto"
    unpaired: bool = False
    third: Annotated[str | None, one_of(THIRD)] = None
    responses: Annotated[int, between(2, 16)] = 2
    best_first: bool = False
    unit: ClassVar[str] = "pairs"
    task: ClassVar[RowTask] = PAIR_TASK
    packing: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.extras)) < len(self.extras):
            raise ValueError(f"data.extras={','.join(self.extras)} names a column twice; name each once")

    @property
    def token_settings(self) -> RowSettings:
        return self.row_settings(
            kinds=(*kinds_of_ranking(self.responses), *(["gold"] if self.third == "gold" else [])),
            max_length=self.max_length, too_long=self.too_long, extras=self.numbers,
            weight_column=self.weight_column, best_first=self.best_first,
        )  # fmt: skip

    @property
    def numbers(self) -> tuple[str, ...]:
        """The columns of numbers in a batch: data.extras, and the ratings of rankings."""
        ratings = rating_columns(self.responses) if self.responses > 2 else ()
        return tuple(dict.fromkeys((*self.extras, *ratings)))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of responses in a pair, such as "chosen" and "rejected"."""
        read = self.token_settings.kinds
        return (*read, "mismatched") if self.third == "mismatched" else read

    @property
    def least_held_out(self) -> int:
        """The smallest number of pairs to hold out: 2 with third=mismatched, where each pair also has a
        response of another one.
        """
        return 2 if self.third == "mismatched" else 1

    def for_attention(self, a: AttentionLayers) -> Self:
        """Return the settings for a model with these layers: layout "plain" where its rope depends on the
        length of a text. Responses that share a prompt would have the rope of the longest one.

        Raises ValueError for layout "branches" with such a model.
        """
        if not varies_with_length(a, self.max_length):
            return self
        if self.layout == "branches":
            raise ValueError(
                "data.layout=branches: the model's rope depends on the length of a text, so a response's "
                "log-probs would depend on the length of the other one; use data.layout=plain"
            )
        return replace(self, layout="plain")

    def start_lines(self, objective: Any, a: AttentionLayers) -> list[str]:
        """Return a line about responses that cannot share prompts; see DataSettings.start_lines."""
        if not varies_with_length(a, self.max_length):
            return []
        return [
            "responses don't share prompts (data.layout=plain): the model's rope depends on the length of a "
            "text, and a shared prompt would have the longer response's rope"
        ]

    def open(self, tokenizer: Any, shards: int = 1, cache: Path | None = None) -> "PairSource":
        """Read, tokenise (or load from the cache) and plan the batches; see DataSettings.open.

        A microbatch has `shards` rows. Neither shards nor data.micro nor data.layout changes which pairs a
        step sees, or the fingerprint. Call `for_attention` first: a model whose rope depends on the length of
        a text refuses pairs that share prompts.
        """
        row_count, split = _row_count(self, shards), split_rows(self, tokenizer, cache)
        split = replace(split, warnings=(*split.warnings, *_reversed_ratings(split.rows, self.numbers)))
        if not self.unpaired:
            _require_both_responses(split.rows)
        if self.third == "mismatched":
            sides, seed = (split.train, split.held), self.seed_of_split
            mismatched = pair_layout.mismatch_responses(split.rows, sides, seed, self.max_length)
            split = replace(split, rows=mismatched)
        pairs, train = split.rows, split.train
        branched, plain = (pair_layout.tokens_per_pair(pairs, branches) for branches in (True, False))
        saved = float(1 - branched[train].sum() / plain[train].sum())
        branches = self.layout == "branches" or (self.layout == "auto" and saved >= MIN_SAVING)
        tokens = branched if branches else plain

        @lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:  # the same for both layouts
            chosen = split.of_epoch(epoch)
            keys = None if self.order_by is None else pairs.order[chosen]
            batches = pair_layout.order_batches(branched[chosen], self.batch, self.seed, epoch, keys)
            return np.where(batches < 0, -1, chosen[batches])

        @lru_cache(maxsize=2)
        def plan(epoch: int) -> RowPlan:
            return pair_layout.assign_rows(order(epoch), tokens, row_count)

        epochs = source.plan_epochs(split, plan, tokens, row_count)
        last, _ = epochs.locate(self.total_steps(epochs) - 1)
        shape = pair_layout.row_shape(tokens, pairs.targets, map(plan, range(last + 1)))
        held_plan = pair_layout.fit_rows(split.held, tokens, pairs.targets, shape)
        rows = PairLayout(shards, shape, branches, self.numbers, self.max_length)
        layout = PairBatches(self, split, plan, held_plan, rows)
        # of all that the sum over a batch depends on, but not its division into microbatches and rows
        settings = (self.batch, self.seed, self.weighting, pairs.kinds, self.numbers, pairs.digest)
        fingerprint = source.fingerprint_of(settings, (train, split.held, order(0)))
        return PairSource.of(layout, epochs, tokenizer, _stats(layout, saved), fingerprint)

    def abstract(self, shards: int = 1, reference: bool = False) -> Pairs:
        """Return the shapes of the largest batch that the settings allow: all responses have max_length
        tokens, and all rows as many pairs.

        reference: whether the batch has the reference model's log-probs.
        """
        row_count = _row_count(self, shards)
        length = round_up(-(-self.batch // row_count) * len(self.kinds) * self.max_length, 64)
        shape = RowShape(length, length, self.batch - row_count + 1)
        layout = PairLayout(shards, shape, self.layout != "plain", self.numbers, self.max_length)
        shapes = pair_layout.pair_batch_shapes(layout, self.kinds, self.micro, reference)
        return pair_layout.with_sources(shapes, sources_with_metrics(self.train))


@dataclass(frozen=True)
class PairStats(source.RowStats):
    """Counts of tokenised pairs.

    layout: "branches" or "plain". pairs_per_row: slots of a row for pairs. prompt_end_moved: pairs where a
    token spans the end of the prompt. chosen_longer: fraction of the pairs whose chosen response is the
    longer one, None if every row has one response and a label. shared_prompts_save: fraction of the tokens
    that the layout "branches" saves.
    """

    layout: str
    pairs_per_row: int
    prompt_end_moved: int
    chosen_longer: float | None
    shared_prompts_save: float


@dataclass(frozen=True)
class PairBatches(source.BatchLayout[Pairs]):
    """Pairs in rows, as data.layout says. rows: the layout of a microbatch."""

    rows: PairLayout

    @property
    def rows_per_step(self) -> int:
        """Number of rows of all microbatches of a step."""
        return self.settings.micro * self.rows.rows

    @cached_property
    def lengths(self) -> Int[np.ndarray, " pairs"]:
        """Number of tokens that each pair takes in a row."""
        return pair_layout.tokens_per_pair(self.split.rows, self.rows.branches)

    def shapes(self, reference: bool = False) -> Pairs:
        """Return the shapes of a training batch. reference: whether it has the reference's log-probs."""
        reference |= self.rows.reference is not None
        kinds, micro = self.split.rows.kinds, self.settings.micro
        shapes = pair_layout.pair_batch_shapes(self.rows, kinds, micro, reference)
        return pair_layout.with_sources(shapes, self.split.train_names)

    def fill(self, plan: RowPlan) -> Pairs:
        pairs, rows, micro = self.split.rows, self.rows, self.settings.micro
        pair_layout.check_fit(plan, self.lengths, pairs.targets, rows.shape)
        means = pair_layout.batch_means(pairs, plan.members, self.settings.weighting)
        flat = pair_layout.fill_pairs(pairs, plan, replace(rows, rows=self.rows_per_step), means)
        flat = pair_layout.with_sources(flat, self.split.train_names, self.split.sources)
        return jax.tree.map(lambda x: x.reshape(micro, rows.rows, *x.shape[1:]), flat)

    def evaluation(self, plan: RowPlan) -> tuple[Pairs, ...]:
        split, rows = self.split, self.rows
        means = pair_layout.batch_means(split.rows, plan.members, self.settings.weighting)
        parts = [plan.slice(start, start + rows.rows) for start in range(0, plan.rows, rows.rows)]
        batches = (pair_layout.fill_pairs(split.rows, part, rows, means) for part in parts)
        batches = (pair_layout.with_sources(batch, split.held_names, split.sources) for batch in batches)
        return tuple(jax.tree.map(lambda x: x[None], batch) for batch in batches)

    def positions(self, batch: Pairs) -> int:
        """Return how many values a metrics.PerRow has for a batch: one for each slot for a pair."""
        return batch.index.size

    def name_at(self, batch: Pairs, number: int, position: int) -> str:
        """Return the name of the pair in a slot. position: the slot's index in flat batch.index."""
        return self.split.rows.names[batch.index.flat[position]]

    def prompts_of(self, batch: Pairs, row: int) -> Iterator[source.Prompt]:
        """Yield the prompt and chosen response of each pair of a row that has one and a weight above 0."""
        kinds = len(batch.kinds)
        for slot in np.flatnonzero(batch.pair_weights[0, row] > 0):
            where = np.flatnonzero(batch.responses[0, row] == slot * kinds + batch.kinds.index("chosen"))
            if not len(where):
                continue
            last = batch.read[0, row, where[0]]
            inside = np.flatnonzero(batch.segments[0, row] == batch.segments[0, row, last])
            ids = batch.ids[0, row, inside[0] : last + 1].tolist()
            yield source.Prompt(ids, batch.targets[0, row, where].tolist())


@dataclass(frozen=True)
class PairSource(source.RowSource[Pairs]):
    """Batches of Pairs, to which a reference model's log-probs can be added; see Source."""

    layout: PairBatches

    @property
    def keys(self) -> tuple[str, ...]:
        """A hash of each pair's tokens, of training and held-out pairs."""
        return self.split.rows.keys

    def cover(self, indices: Sequence[int]) -> tuple[Pairs, ...]:
        """Return evaluation batches of some pairs, with the shape of the held-out batches. Their weights sum
        to 1. indices: the positions of these pairs in split.rows.
        """
        members, layout = np.asarray(indices, np.int64), self.layout
        plan = pair_layout.fit_rows(members, layout.lengths, self.split.rows.targets, layout.rows.shape)
        return layout.evaluation(plan)

    def with_reference(self, logps: dict[int, Float[np.ndarray, " tokens"]]) -> "PairSource":
        """Return this source with the reference model's log-probs in its batches.

        logps: the log-probs of every pair, in the form that pair_layout.values_by_pair returns. Raises
        ValueError for log-probs of another number, or that are not finite.
        """
        pairs = self.split.rows
        for i, (name, expected) in enumerate(zip(pairs.names, pairs.targets, strict=True)):
            if len(logps[i]) != expected or not np.isfinite(logps[i]).all():
                raise ValueError(
                    f"reference log-probs of {name}: got {len(logps[i])} numbers, expected {expected} finite "
                    "ones; compute them again"
                )
        reference = np.zeros(len(pairs.ids), np.float32)  # 0 for tokens that are no targets
        reference[np.asarray(pairs.learned)] = np.concatenate([logps[i] for i in range(len(pairs))])
        layout = replace(self.layout, rows=replace(self.layout.rows, reference=reference))
        return replace(self, layout=layout, held_out=layout.evaluation(layout.held_plan))


def _reversed_ratings(pairs: TokenisedRows, numbers: Sequence[str]) -> list[str]:
    """Return a line about pairs whose chosen response has the lower rating, [] without any."""
    if not {*rating_columns(2)} <= {*numbers}:
        return []
    chosen, rejected = (pairs.extras[NUMBERS][:, numbers.index(name)] for name in rating_columns(2))
    lower = np.flatnonzero(chosen < rejected)
    if not len(lower):
        return []
    return [
        f"note: {len(lower)} of {len(pairs)} pairs have a score_chosen below their score_rejected, so their "
        f"margin is negative; the first is {pairs.names[int(lower[0])]}"
    ]


def _require_both_responses(pairs: TokenisedRows) -> None:
    alone = np.flatnonzero((pairs.reads[:, :2] == 0).any(1))
    if len(alone):
        raise ValueError(
            f"{pairs.names[alone[0]]}: the row has one response and a label ({len(alone)} such rows), and "
            "this loss compares two responses; use configs/kto.py, or data.unpaired=true with another loss "
            "of single responses"
        )


def _row_count(rows: PairRows, shards: int) -> int:
    """Return the number of rows of all microbatches of a step. Raises ValueError for too few pairs."""
    count = rows.micro * shards
    if rows.batch < count:
        raise ValueError(
            f"data.batch={rows.batch} pairs do not fill data.micro={rows.micro} microbatches of {shards} "
            f"rows; use a data.batch of at least {count} or a smaller data.micro"
        )
    return count


def _stats(layout: PairBatches, saved: float) -> PairStats:
    """Count pairs, rows and tokens. saved: the fraction of the tokens that branches save."""
    split, pairs, shape = layout.split, layout.split.rows, layout.rows.shape
    reads, chosen, truncated = pairs.reads[split.train], split.of_epoch(0), int(pairs.truncated.sum())
    paired, (desirable, undesirable) = reads[(reads[:, :2] > 0).all(1)], (reads[:, :2] > 0).sum(0)
    noun = "pairs" if len(paired) else f"responses, {desirable} desirable and {undesirable} undesirable,"
    if layout.settings.responses > 2:
        counts = (reads[:, : layout.settings.responses] > 0).sum(1)
        noun = f"rankings of {counts.min()} to {counts.max()} responses"
    learned = [kind != "mismatched" for kind in pairs.kinds]
    detail = f"{truncated:,} pairs are truncated to data.max_length={layout.settings.max_length}"
    line = source.learned_line(
        int(pairs.responses[chosen].sum()),
        int(pairs.learned_responses[chosen].sum()),
        detail if truncated else "all responses are whole",
    )
    targets = int(reads[pairs.weights[split.train] > 0][:, learned].sum())
    return PairStats(
        **vars(source.row_stats(layout, noun, (shape.length, shape.reads), (targets, line))),
        layout="branches" if layout.rows.branches else "plain",
        pairs_per_row=shape.slots,
        prompt_end_moved=int(pairs.extras[PROMPT_END_MOVED].sum()),
        chosen_longer=float((paired[:, 0] > paired[:, 1]).mean()) if len(paired) else None,
        shared_prompts_save=saved,
    )
