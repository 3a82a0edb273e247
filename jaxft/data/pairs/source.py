"""Pairs as batches: batch k is a pure function of (rows, tokenizer, settings, k), as it is for SFT rows."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxft.batch import Pairs, TrainState
from jaxft.bounds import at_least, one_of
from jaxft.data.epochs import epochs_of
from jaxft.data.mixture import SourceRef, SplitRows, sources_with_metrics, split_sources
from jaxft.data.pack import RowPlan, RowShape, round_up
from jaxft.data.pairs import batches as planning
from jaxft.data.pairs.formats import PairTokenSettings
from jaxft.data.pairs.layout import (
    PairLayout,
    batch_means,
    fill_pairs,
    pair_batch_shapes,
    tokens_per_pair,
    values_by_pair,
    with_sources,
)
from jaxft.data.pairs.shown import preview_pair, prompts_of_row, whole_ends
from jaxft.data.pairs.split import held_out_pairs, mismatch_responses
from jaxft.data.pairs.tokens import TokenisedPairs, tokenise_pairs
from jaxft.data.settings import DataSettings
from jaxft.data.sft import RowStats
from jaxft.data.source import FixedSource, Prompt, SourceInfo, learned_line, length_percentiles
from jaxft.data.tokens import count_ids
from jaxft.nn.layer_attention import AttentionLayers, varies_with_length
from jaxft.tree import Metrics

TOO_LONG = ("truncate", "drop", "error")
WEIGHTING = ("pair", "token")
LAYOUTS = ("auto", "branches", "plain")
THIRD = (None, "mismatched", "gold")
MIN_SAVING = 0.02  # fraction of the tokens that branches must save for layout "auto" to choose them


@dataclass(frozen=True)
class PairRows(DataSettings):
    """Responses to compare: the data of a run with a preference loss or a reward model.

    All pairs of one prompt stay on one side of the split into training and held-out rows. format: "auto",
    "plain" or a name of pairs/formats.py. max_length: tokens of a prompt and one response. too_long:
    "truncate" keeps the start, and leaves out a pair whose prompt alone is that long; "drop" leaves the pair
    out, "error" stops. weighting: "pair" gives every pair
    of the optimizer batch the same weight, "token" every token of its responses. weight_column: a column of
    numbers that multiply the weights. extras: columns of numbers that the loss can read. layout: "branches"
    stores a prompt once for all its responses, "plain" before each; "auto" uses branches where they save 2 %
    of the tokens, if the model's rope does not depend on the length of a text. unpaired: also accept rows of
    one response and a label, for losses of single responses (KTO, BCO). third: a third response, "mismatched"
    (another pair's, for KTO's KL) or "gold" (column reference, for TPO). Other fields: see DataSettings;
    batch counts pairs.
    """

    max_length: Annotated[int, at_least(2)] = 1024
    too_long: Annotated[str, one_of(TOO_LONG)] = "truncate"
    weighting: Annotated[str, one_of(WEIGHTING)] = "pair"
    weight_column: str | None = None
    extras: tuple[str, ...] = ()
    layout: Annotated[str, one_of(LAYOUTS)] = "auto"
    unpaired: bool = False
    third: Annotated[str | None, one_of(THIRD)] = None
    unit: ClassVar[str] = "pairs"
    packing: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        choices: tuple[tuple[str, tuple], ...] = (
            ("too_long", TOO_LONG), ("weighting", WEIGHTING), ("layout", LAYOUTS), ("third", THIRD),
        )  # fmt: skip
        for name, known in choices:
            self.require_choice(name, known)
        if len(set(self.extras)) < len(self.extras):
            raise ValueError(f"data.extras={','.join(self.extras)} names a column twice; name each once")

    @property
    def token_settings(self) -> PairTokenSettings:
        """The settings that the tokens of a pair depend on."""
        kinds = ("chosen", "rejected", "gold") if self.third == "gold" else ("chosen", "rejected")
        return PairTokenSettings(
            self.columns, self.format, self.max_length, self.too_long, self.template_settings,
            self.extras, self.weight_column, kinds, self.order_by, self.max_samples,
        )  # fmt: skip

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of responses in a pair."""
        read = self.token_settings.kinds
        return (*read, "mismatched") if self.third == "mismatched" else read

    def for_attention(self, a: AttentionLayers) -> Self:
        """Return the settings for a model with these layers: layout "plain" where its rope depends on the
        length of a text. Responses that share a prompt would have the rope of the longest one.

        Raises ValueError for layout "branches" there.
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
        """Return a line about responses that cannot share prompts; see Dataset.start_lines."""
        if not varies_with_length(a, self.max_length):
            return []
        return [
            "responses don't share prompts (data.layout=plain): the model's rope depends on the length of a "
            "text, and that of a shared prompt would be the longer response's"
        ]

    def open(self, tokenizer: Any, shards: int = 1, cache: Path | None = None) -> "PairSource":
        """Read, tokenise (or load from the cache) and plan the batches; see Dataset.open.

        A microbatch has `shards` rows. They, data.micro and data.layout change neither which pairs a step
        sees nor the fingerprint. The model is not known here: one whose rope depends on the length of a text
        refuses pairs that share prompts, see `for_attention`.
        """
        row_count = _row_count(self, shards)
        split = self._read(tokenizer, cache)
        tokenised, train = split.rows, split.train
        branched, plain = (tokens_per_pair(tokenised, branches) for branches in (True, False))

        @lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:  # the same for both layouts
            chosen = split.of_epoch(epoch)
            keys = None if self.order_by is None else tokenised.order[chosen]
            batches = planning.order_batches(branched[chosen], self.batch, self.seed, epoch, keys)
            return np.where(batches < 0, -1, chosen[batches])

        saved = float(1 - branched[train].sum() / plain[train].sum())
        branches = self.layout == "branches" or (self.layout == "auto" and saved >= MIN_SAVING)
        tokens = branched if branches else plain

        def batch_tokens(epoch: int) -> np.ndarray:
            return np.where(order(epoch) < 0, 0, tokens[order(epoch)]).sum(1)

        epochs = epochs_of(batch_tokens, alike=split.mixture is None)
        steps = self.total_steps(epochs)
        orders = [order(epoch) for epoch in range(epochs.locate(steps - 1)[0] + 1)]
        assigned = [planning.assign_rows(batches, tokens, row_count) for batches in orders]
        shape = planning.row_shape(tokens, tokenised.reads.sum(1), assigned, row_count)
        layout = PairLayout(shards, shape, branches, self.extras, self.max_length)
        pairs = PlannedPairs(self, split, row_count, layout, order)
        info = SourceInfo(
            steps=steps,
            steps_per_epoch=len(order(0)),
            fingerprint=_fingerprint(pairs),
            preview=preview_pair(tokenised, int(train.min()), tokenizer),
            stats=_stats(pairs, saved),
            warnings=tokenised.warnings + self.held_out_notes(len(pairs.held), len(tokenised)),
            learned_ends=count_ids(whole_ends(tokenised)),
        )
        return _source(info, pairs)

    def _read(self, tokenizer: Any, cache: Path | None) -> SplitRows[TokenisedPairs]:
        """Return all pairs, and which are for training and which are held out."""

        def tokenise(source: SourceRef) -> TokenisedPairs:
            settings = source.adapt(self).token_settings
            return tokenise_pairs(source.ref, settings, tokenizer, self.tokenising(cache))

        def held_out(pairs: TokenisedPairs) -> np.ndarray:
            least = 2 if self.third == "mismatched" else 1
            return held_out_pairs(pairs, self.seed_of_split, self.held_out_count(len(pairs), least))

        split = split_sources(self, tokenise, held_out)
        if not self.unpaired:
            _require_both_responses(split.rows)
        if self.third == "mismatched":
            sides = split.train, split.held
            split = replace(
                split, rows=mismatch_responses(split.rows, sides, self.seed_of_split, self.max_length)
            )
        return split

    def abstract(self, shards: int = 1, reference: bool = False) -> Pairs:
        """Return the shapes of the largest batch that the settings allow: responses of max_length in equally
        full rows.

        reference: with the reference's log-probs.
        """
        row_count = _row_count(self, shards)
        length = round_up(-(-self.batch // row_count) * len(self.kinds) * self.max_length, 64)
        shape = RowShape(length, length, self.batch - row_count + 1)
        layout = PairLayout(shards, shape, self.layout != "plain", self.extras, self.max_length)
        shapes = pair_batch_shapes(layout, self.kinds, self.micro, reference)
        return with_sources(shapes, sources_with_metrics(self.train))


@dataclass(frozen=True)
class PairStats(RowStats):
    """Counts of tokenised pairs.

    prompt_end_moved: pairs where a token spans the end of the prompt. chosen_longer: fraction of the pairs
    whose chosen response is the longer one, None for responses with a label. shared_prompts_save: fraction
    of the tokens that the layout "branches" saves.
    """

    layout: str
    pairs_per_row: int
    prompt_end_moved: int
    chosen_longer: float | None
    shared_prompts_save: float


@dataclass(frozen=True)
class PlannedPairs:
    """All pairs, the layout of their rows, and the order of the batches.

    row_count: rows of all microbatches together. order: the pairs of each batch of an epoch.
    """

    settings: PairRows
    split: SplitRows[TokenisedPairs]
    row_count: int
    layout: PairLayout
    order: Callable[[int], Int[np.ndarray, "batches size"]]

    @property
    def tokenised(self) -> TokenisedPairs:
        """All pairs."""
        return self.split.rows

    @property
    def train(self) -> Int[np.ndarray, " train"]:
        """Indices of the training pairs."""
        return self.split.train

    @property
    def held(self) -> Int[np.ndarray, " held"]:
        """Indices of the held-out pairs."""
        return self.split.held

    @cached_property
    def tokens(self) -> Int[np.ndarray, " pairs"]:
        """Tokens that each pair takes in a row."""
        return tokens_per_pair(self.tokenised, self.layout.branches)


@dataclass(frozen=True)
class PairSource(FixedSource[Pairs]):
    """Batches of Pairs; see Source."""

    pairs: PlannedPairs

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """A hash of each pair's tokens, of training and held-out pairs."""
        return self.pairs.tokenised.keys()

    def batch(self, step: int, state: TrainState | None = None) -> tuple[Pairs, Metrics]:
        """Return the batch of a step and no metrics."""
        pairs, layout, plan = self.pairs, self.pairs.layout, self._rows_of(step)
        means = batch_means(pairs.tokenised, plan.members, pairs.settings.weighting)
        flat = fill_pairs(pairs.tokenised, plan, replace(layout, rows=pairs.row_count), means)
        flat = with_sources(flat, pairs.split.train_names, pairs.split.sources)
        micro = pairs.settings.micro
        return jax.tree.map(lambda x: x.reshape(micro, layout.rows, *x.shape[1:]), flat), {}

    def given(self, step: int) -> Pairs:
        """Return the batch of a step."""
        return self.batch(step)[0]

    def row_names(self, step: int) -> list[str]:
        """Return the names of the pairs in each row of a batch, the rows of all microbatches one after the
        other.
        """
        names = list(map(", ".join, self._rows_of(step).names(self.pairs.tokenised.names)))
        while not names[-1]:  # the last rows of a batch with fewer pairs
            names.pop()
        return names

    def held_out_name(self, position: int) -> str:
        """Return the name of the pair at a position of the slots of all batches that are evaluated."""
        batch, slot = divmod(position, self.held_out[0].index.size)
        return self.pairs.tokenised.names[self.held_out[self.evaluated_batch(batch)].index.flat[slot]]

    def prompts(self, count: int) -> list[Prompt]:
        """Return the first `count` held-out prompts with their chosen response."""
        prompts: list[Prompt] = []
        for batch in self.held_out:
            for row in range(batch.ids.shape[1]):
                prompts += prompts_of_row(batch, row, count - len(prompts))
        return prompts

    def cover(self, indices: Sequence[int]) -> tuple[Pairs, ...]:
        """Return evaluation batches of these pairs in the shape of the held-out ones.

        Their weights sum to 1.
        """
        return _evaluation_batches(self.pairs, np.asarray(indices, np.int64))

    def values(self, batch: Pairs, x: Float[np.ndarray, "... M"]) -> dict[int, Float[np.ndarray, " tokens"]]:
        """Return values at the read positions of a batch by pair, in order of kind and position in the
        response.
        """
        return values_by_pair(batch, x)

    def abstract(self, reference: bool = False) -> Pairs:
        """Return the shapes of the training batches. reference: with the reference's log-probs."""
        pairs = self.pairs
        shapes = pair_batch_shapes(pairs.layout, pairs.tokenised.kinds, pairs.settings.micro, reference)
        return with_sources(shapes, pairs.split.train_names)

    def with_reference(self, logps: dict[int, Float[np.ndarray, " tokens"]]) -> "PairSource":
        """Return this source with the reference's log-probs in its batches.

        logps: of every pair, as `values` has them.
        """
        split = replace(self.pairs.split, rows=self.pairs.tokenised.with_reference(logps))
        return _source(self.info, replace(self.pairs, split=split)).limit_evaluation(self.most_evaluated)

    def _rows_of(self, step: int) -> RowPlan:
        """Return the plan of the rows of one step."""
        pairs = self.pairs
        epoch, k = divmod(step, int(self.info.steps_per_epoch))
        batch = pairs.order(epoch)[k : k + 1]
        (members,), (row,) = planning.assign_rows(batch, pairs.tokens, pairs.row_count)
        plan = planning.plan_rows(members, row, pairs.row_count)
        planning.check_fit(plan, pairs.tokens, pairs.tokenised.reads.sum(1), pairs.layout.shape)
        return plan


def _source(info: SourceInfo, pairs: PlannedPairs) -> PairSource:
    source = PairSource(info, (), _evaluation_batches(pairs, pairs.held), pairs)
    return replace(source, shapes=(source.abstract(pairs.tokenised.reference is not None),))


def _require_both_responses(pairs: TokenisedPairs) -> None:
    alone = np.flatnonzero((pairs.reads[:, :2] == 0).any(1))
    if len(alone):
        raise ValueError(
            f"{pairs.names[alone[0]]}: the row has one response and a label ({len(alone)} such rows), and "
            "this loss compares two responses; use configs/kto.py, or data.unpaired=true with another loss "
            "of single responses"
        )


def _row_count(rows: PairRows, shards: int) -> int:
    """Return the rows of all microbatches of a step."""
    count = rows.micro * shards
    if rows.batch < count:
        raise ValueError(
            f"data.batch={rows.batch} pairs do not fill data.micro={rows.micro} microbatches of {shards} "
            f"rows; use a data.batch of at least {count} or a smaller data.micro"
        )
    return count


# ---- batches


def _evaluation_batches(pairs: PlannedPairs, members: Int[np.ndarray, " n"]) -> tuple[Pairs, ...]:
    tokenised, layout = pairs.tokenised, pairs.layout
    if len(members) and (members.min() < 0 or members.max() >= len(tokenised)):
        raise ValueError(
            f"pairs {members.min()} to {members.max()} are not all in the source, which has 0 to "
            f"{len(tokenised) - 1}; pass indices of this source"
        )
    plan = planning.fit_rows(members, pairs.tokens, tokenised.reads.sum(1), layout.shape)
    means = batch_means(tokenised, members, pairs.settings.weighting)
    parts = [plan.slice(start, start + layout.rows) for start in range(0, plan.rows, layout.rows)]
    batches = (
        with_sources(fill_pairs(tokenised, part, layout, means), pairs.split.held_names, pairs.split.sources)
        for part in parts
    )
    return tuple(jax.tree.map(lambda x: x[None], batch) for batch in batches)


# ---- fingerprint, preview and statistics


def _fingerprint(pairs: PlannedPairs) -> str:
    """Hash everything that the sum over a batch depends on, but not its division into microbatches, rows and
    segments.
    """
    rows, tokenised = pairs.settings, pairs.tokenised
    settings = (rows.batch, rows.seed, rows.weighting, tokenised.kinds, rows.extras, tokenised.digest)
    digest = hashlib.sha256(repr(settings).encode())
    for array in (pairs.train, pairs.held, pairs.order(0)):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def _stats(pairs: PlannedPairs, saved: float) -> PairStats:
    """Count pairs, rows and tokens. saved: the fraction of the tokens that branches save."""
    tokenised, shape = pairs.tokenised, pairs.layout.shape
    lengths, reads = pairs.tokens[pairs.train], tokenised.reads[pairs.train]
    chosen = pairs.split.of_epoch(0)
    total, rows = int(pairs.tokens[chosen].sum()), len(pairs.order(0)) * pairs.row_count
    truncated = int(tokenised.truncated.sum())
    fill = total / (rows * shape.length)
    paired, (desirable, undesirable) = reads[(reads[:, :2] > 0).all(1)], (reads[:, :2] > 0).sum(0)
    learned = [kind != "mismatched" for kind in tokenised.kinds]
    what = f"responses, {desirable} desirable and {undesirable} undesirable,"
    return PairStats(
        examples=len(pairs.train),
        held_out=len(pairs.held),
        dropped=tokenised.dropped,
        invalid=tokenised.invalid,
        largest_id=tokenised.largest_id,
        summary=f"{len(pairs.train)} {'pairs' if len(paired) else what} in {rows} rows of {shape.length} "
        f"tokens ({100 * fill:.0f} % full), "
        f"{len(pairs.held)} held out, {tokenised.dropped} dropped as too long, {truncated} truncated"
        f"{pairs.split.summary}",
        learned=learned_line(
            int(tokenised.responses[chosen].sum()),
            int(tokenised.learned_responses[chosen].sum()),
            f"{truncated:,} pairs are truncated to data.max_length={pairs.settings.max_length}"
            if truncated
            else "all responses are whole",
        ),
        truncated=truncated,
        tokens=total,
        learned_tokens=int(reads[tokenised.weights[pairs.train] > 0][:, learned].sum()),
        lengths=length_percentiles(lengths),
        rows=rows,
        fill=fill,
        row_length=shape.length,
        read_length=shape.reads,
        cache=tokenised.cache,
        layout="branches" if pairs.layout.branches else "plain",
        pairs_per_row=shape.slots,
        prompt_end_moved=int(tokenised.prompt_end_moved.sum()),
        chosen_longer=float((paired[:, 0] > paired[:, 1]).mean()) if len(paired) else None,
        shared_prompts_save=saved,
    )
