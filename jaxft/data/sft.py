"""SFT rows as batches. Batch k is a pure function of (rows, tokenizer, settings, k)."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import numpy as np

from jaxft.batch import Tokens, TrainState
from jaxft.bounds import at_least, one_of
from jaxft.data import chat, pack
from jaxft.data.epochs import Epochs, epochs_of
from jaxft.data.mixture import SourceRef, SplitRows, sources_with_metrics, split_sources
from jaxft.data.pack import RowPlan
from jaxft.data.row_batches import (
    fill_rows,
    held_out_batches,
    member_targets,
    read_length,
    tokens_per_row,
    weights_of_members,
)
from jaxft.data.row_text import DOCUMENT, SAMPLE_BY
from jaxft.data.settings import DataSettings
from jaxft.data.source import FixedSource, Prompt, SourceInfo, SourceStats, learned_line, length_percentiles
from jaxft.data.tokenise import Tokenising
from jaxft.data.tokens import (
    TokenisedExamples,
    TokenSettings,
    count_ids,
    tokenise_rows,
)
from jaxft.tree import Metrics

TOO_LONG = ("truncate", "split", "drop", "error")
WEIGHTING = ("token", "sequence")
TEXT_PROMPT = 32  # tokens of the prompt that a text begins with, in samples
Packing = bool | Literal["wrapped"]


@dataclass(frozen=True)
class Rows(DataSettings):
    """Documents, prompts with completions, or conversations for next-token prediction: the data of an SFT
    run.

    format: "auto", "plain" or a name of formats.py. loss_on: "assistant" (every assistant turn of a
    conversation), "completion" (only its last turn) or "all" (every token). Of a row with a prompt and a
    response, the first two train on the response; of a text row, all three train on every token.
    max_length: tokens of a row. too_long: "truncate" keeps the start, and leaves out an example of which only
    its prompt would be left; "split" makes several examples of a document, "drop" leaves the example out,
    "error" stops. packing: True packs several examples into a row
    of max_length tokens, and they do not attend to one another; "wrapped" concatenates documents and cuts
    them into rows of max_length tokens, which attend over all of their documents (needs too_long=split).
    weighting: "token" gives every target token of the optimizer batch the same weight, "sequence" every
    example; a column `weight` multiplies them. sample_by: what is a row of a text file: "document" (all of
    it, or the parts between lines <|endoftext|>), "paragraph" or "line". Other fields: see DataSettings;
    batch counts packed rows, or examples without packing.
    """

    loss_on: Annotated[str, one_of(chat.LOSS_ON)] = "assistant"
    max_length: Annotated[int, at_least(2)] = 1024
    too_long: Annotated[str, one_of(TOO_LONG)] = "truncate"
    packing: Packing = True
    weighting: Annotated[str, one_of(WEIGHTING)] = "token"
    sample_by: Annotated[str, one_of(SAMPLE_BY)] = DOCUMENT
    unit: ClassVar[str] = "rows"

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {"loss_on": chat.LOSS_ON, "too_long": TOO_LONG, "weighting": WEIGHTING}
        for name, known in {**choices, "sample_by": SAMPLE_BY}.items():
            self.require_choice(name, known)
        self.require_at_least(3 if self.too_long == "split" else 2, "max_length")
        if self.packing not in (True, False, "wrapped"):
            raise ValueError(f"data.packing={self.packing!r}; use true, false or wrapped")
        if self.packing == "wrapped" and (self.too_long != "split" or self.weighting != "token"):
            raise ValueError(
                "data.packing=wrapped cuts documents anywhere, so none is too long or weighted as a whole: "
                "set data.too_long=split data.weighting=token"
            )

    @property
    def token_settings(self) -> TokenSettings:
        """The settings that the tokens of a row depend on."""
        return TokenSettings(
            self.columns, self.format, self.loss_on, self.max_length, self.too_long, self.template_settings,
            self.order_by, self.sample_by, self.max_samples,
        )  # fmt: skip

    def open(self, tokenizer: Any, shards: int = 1, cache: Path | None = None) -> "RowSource":
        """Read, tokenise (or load from the cache) and plan the batches; see Dataset.open.

        Where `shards` does not divide the rows of a microbatch, empty rows are added; they change no result.
        """
        row_count = _rows_per_microbatch(self, shards)
        wrapped = self.packing == "wrapped"

        def tokenise(source: SourceRef) -> TokenisedExamples:
            settings = source.adapt(self).token_settings
            return self.tokenise(source.ref, settings, tokenizer, self.tokenising(cache))

        split = split_sources(self, tokenise, self._held_out_mask)
        examples, train, held = split.rows, split.train, split.held
        if wrapped:
            _require_texts(examples)
        longest = max(examples.lengths[train].max(), examples.lengths[held].max(initial=0))
        size = self.max_length if self.packing else min(self.max_length, pack.round_up(int(longest), 64))

        held_plan = _plan(replace(self, order_by=None), examples, held, size, 0)
        first_plan = _plan(self, examples, split.of_epoch(0), size, 0)
        reads = size if wrapped else read_length(examples, (first_plan, held_plan), size, split.train)

        @lru_cache(maxsize=2)
        def plan(epoch: int) -> RowPlan:
            found = first_plan if epoch == 0 else _plan(self, examples, split.of_epoch(epoch), size, epoch)
            return pack.limit_reads(found, member_targets(examples, found), reads)

        def batch_tokens(epoch: int) -> np.ndarray:
            starts = np.arange(0, plan(epoch).rows, self.batch)
            return np.add.reduceat(tokens_per_row(examples, plan(epoch)), starts)

        epochs = epochs_of(batch_tokens, alike=split.mixture is None)
        first = examples.ids[slice(*examples.offsets[train.min() :][:2])]
        info = SourceInfo(
            steps=self.total_steps(epochs),
            steps_per_epoch=epochs.steps_in(0),
            fingerprint=_fingerprint(self, examples, (plan(0), held_plan), (self.batch, size, reads)),
            preview=tokenizer.decode(first, skip_special_tokens=False),
            stats=_stats(self, split, plan(0), (size, reads)),
            warnings=examples.warnings,
            learned_ends=count_ids(examples.ends[examples.is_whole]),
        )
        shapes, names = _shapes(self, (row_count, size, reads)), split.held_names
        held_out = held_out_batches(
            examples, held_plan, (row_count, size, reads), split.sources if names else None
        )
        held_out = tuple(replace(b, packed=self.packing is True, source_names=names) for b in held_out)
        return RowSource(info, (shapes,), held_out, self, split, plan, held_plan, epochs)

    def tokenise(self, ref: str, settings: Any, tokenizer: Any, how: Tokenising) -> TokenisedExamples:
        """Read the rows of `ref` and tokenise them, or load the tokens from the cache. settings:
        token_settings, perhaps with other limits.
        """
        return tokenise_rows(ref, settings, tokenizer, how)

    def _held_out_mask(self, examples: TokenisedExamples) -> np.ndarray:
        """Return the mask of the held-out examples. All pieces of a split document are on one side, unless it
        is the only one, of which the end is held out.
        """
        rows = int(examples.documents[-1]) + 1
        if rows == 1:
            return np.arange(len(examples)) >= len(examples) - self.held_out_count(len(examples))
        mask = np.zeros(rows, bool)
        mask[pack.permutation(rows, self.seed_of_split, 0)[: self.held_out_count(rows)]] = True
        return mask[examples.documents]

    def abstract(self, shards: int = 1) -> Tokens:
        """Return the shapes of the largest batch that the settings allow: T = M = max_length."""
        return _shapes(self, (_rows_per_microbatch(self, shards), self.max_length, self.max_length))


@dataclass(frozen=True)
class RowStats(SourceStats):
    """Statistics of tokenised rows.

    truncated: number of truncated examples. tokens, learned_tokens: of the first epoch, and those of them
    with a loss. lengths: percentiles of the training examples' tokens. rows: rows of the first epoch's
    batches, or its pairs. fill: fraction of the slots for tokens that are used. row_length, read_length:
    slots of a row for tokens, and for tokens with a loss. cache: see cache.load_or_make.
    """

    truncated: int
    tokens: int
    learned_tokens: int
    lengths: dict[str, float]
    rows: int
    fill: float
    row_length: int
    read_length: int
    cache: str


@dataclass(frozen=True)
class RowSource(FixedSource[Tokens]):
    """Batches of Tokens; see Source. plan: which examples share a row, by epoch; held_plan: of the held-out
    batches.
    """

    settings: Rows
    split: SplitRows[TokenisedExamples]
    plan: Callable[[int], RowPlan]
    held_plan: RowPlan
    epochs: Epochs

    def batch(self, step: int, state: TrainState | None = None) -> tuple[Tokens, Metrics]:
        """Return the batch of a step and no metrics."""
        rows, part = self.settings, self._rows_of(step)
        _, row_count, size = self.shapes[0].ids.shape
        shape = (rows.batch, size, self.shapes[0].read.shape[-1])
        examples, names = self.split.rows, self.split.train_names
        weights = weights_of_members(examples, part, rows.weighting)
        flat = fill_rows(examples, part, shape, weights, self.split.sources if names else None)
        flat = replace(flat, packed=rows.packing is True, source_names=names)

        def split(x: np.ndarray) -> np.ndarray:
            grid = x.reshape(rows.micro, rows.batch // rows.micro, x.shape[-1])
            return np.pad(grid, ((0, 0), (0, row_count - grid.shape[1]), (0, 0)))

        return jax.tree.map(split, flat), {}

    def given(self, step: int) -> Tokens:
        """Return the batch of a step."""
        return self.batch(step)[0]

    def row_names(self, step: int) -> list[str]:
        """Return the names of the examples in each row of a batch."""
        return list(map(", ".join, self.member_names(step)))

    def member_names(self, step: int) -> list[list[str]]:
        """Return the names of the examples in each row of a batch, one by one."""
        return self._rows_of(step).names(self.split.rows.names)

    def held_out_name(self, position: int) -> str:
        """Return the name of the example at position row * (T + 1) + its number in the row, of the rows that
        are evaluated; of wrapped rows, which have no single examples, those of the row.
        """
        _, rows, length = self.held_out[0].ids.shape
        row, number = divmod(position, length + 1)
        row = self.evaluated_batch(row // rows) * rows + row % rows
        members = self.held_plan.slice(row, row + 1).names(self.split.rows.names)[0]
        return ", ".join(members) if self.settings.packing == "wrapped" else members[number - 1]

    def prompts(self, count: int) -> list[Prompt]:
        """Return the first `count` held-out prompts; the response is the last run of tokens with a loss. Of a
        text, all of which is learned, the prompt is the beginning.
        """
        found: list[Prompt] = []
        for batch in self.held_out:
            for row in range(batch.ids.shape[1]):
                ids, segments = batch.ids[0, row], batch.segments[0, row]
                reads = batch.read[0, row][batch.token_weights[0, row] > 0]
                for segment in range(1, int(segments.max(initial=0)) + 1):
                    inside = np.flatnonzero(segments == segment)
                    targets = np.sort(reads[segments[reads] == segment]) + 1
                    if not len(targets):  # a row of weight 0
                        continue
                    first = int(targets[np.diff(targets, prepend=-1) > 1][-1])
                    end = int(targets[-1]) + 1
                    if first == inside[0] + 1:
                        first += min(TEXT_PROMPT, (end - first) // 2)
                    if len(found) < count and first > inside[0]:
                        found.append(Prompt(ids[inside[0] : first].tolist(), ids[first:end].tolist()))
        return found

    def _rows_of(self, step: int) -> RowPlan:
        """Return the plan of the rows of one step."""
        epoch, k = self.epochs.locate(step)
        return self.plan(epoch).slice(k * self.settings.batch, (k + 1) * self.settings.batch)


def _shapes(rows: Rows, shape: tuple[int, int, int]) -> Tokens:
    """Return the shapes of a batch. shape: rows of a microbatch, T, M."""
    row_count, length, reads = shape

    def array(last: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((rows.micro, row_count, last), dtype)

    ids, read, names = array(length, np.int32), array(reads, np.int32), sources_with_metrics(rows.train)
    return Tokens(
        ids, ids, ids, read, read, array(reads, np.float32), packed=rows.packing is True,
        sources=read if names else None, source_names=names,
    )  # fmt: skip


def _rows_per_microbatch(rows: Rows, shards: int) -> int:
    """Return the rows of a microbatch, with the empty ones that are added for the mesh."""
    if rows.batch % rows.micro:
        fits = ", ".join(str(m) for m in range(1, rows.batch + 1) if rows.batch % m == 0)
        raise ValueError(
            f"data.batch={rows.batch} is not divisible by data.micro={rows.micro} microbatches; use a "
            f"data.micro of {fits}"
        )
    return pack.round_up(rows.batch // rows.micro, shards)


def _require_texts(examples: TokenisedExamples) -> None:
    """Raise ValueError if wrapped rows would cut an example with a prompt, or lose weights of turns."""
    others = np.flatnonzero(examples.reads < examples.lengths - 1)
    if len(others) or len(examples.token_weights):
        name = examples.names[others[0] if len(others) else 0]
        raise ValueError(
            f"{name}: the row has a prompt or turns with weights, and data.packing=wrapped is for text of "
            "which every token is learned with the same weight; use data.packing=true"
        )


def _plan(rows: Rows, examples: TokenisedExamples, chosen: np.ndarray, size: int, epoch: int) -> RowPlan:
    if not len(chosen):
        return RowPlan(chosen, np.zeros(1, np.int64))
    lengths, keys = examples.lengths[chosen], None if rows.order_by is None else examples.order[chosen]
    if rows.packing == "wrapped":
        plan = pack.wrap_examples(lengths, examples.documents[chosen], size, (rows.seed, epoch), keys)
    elif keys is not None:
        if rows.packing:
            plan = pack.pack_in_order(lengths, keys, size, rows.batch, rows.seed)
        else:
            plan = RowPlan(pack.ascending(keys, rows.seed), np.arange(len(chosen) + 1))
    elif rows.packing:
        plan = pack.pack_examples(lengths, examples.reads[chosen], size, rows.seed, epoch)
    else:
        plan = pack.one_per_row(len(chosen), rows.seed, epoch)
    return replace(plan, members=chosen[plan.members])


def _fingerprint(
    rows: Rows, examples: TokenisedExamples, plans: tuple[RowPlan, ...], shape: tuple[int, int, int]
) -> str:
    digest = hashlib.sha256(repr((shape, rows.seed, rows.weighting, examples.digest)).encode())
    arrays = [array for plan in plans for array in (plan.members, plan.offsets, plan.starts)]
    for array in (array for array in arrays if array is not None):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def _stats(
    rows: Rows, split: SplitRows[TokenisedExamples], plan: RowPlan, shape: tuple[int, int]
) -> RowStats:
    """Count rows and tokens. plan: of the first epoch. shape: T, M."""
    examples, train, held = split.rows, split.train, split.held
    size, reads = shape
    lengths = examples.lengths[train]
    tokens, truncated = int(tokens_per_row(examples, plan).sum()), int(examples.truncated.sum())
    further = int((examples.pieces > 0).sum())
    pieces = f", {further} further pieces of split documents" if further else ""
    fill = tokens / (plan.rows * size)
    return RowStats(
        examples=len(train),
        held_out=len(held),
        dropped=examples.dropped,
        invalid=examples.invalid,
        largest_id=examples.largest_id,
        summary=f"{len(train)} examples in {plan.rows} rows of {size} tokens ({100 * fill:.0f} % full), "
        f"{len(held)} held out, {examples.dropped} dropped as too long, {truncated} truncated{pieces}"
        f"{split.summary}",
        learned=_learned_line(rows, examples, split.of_epoch(0), plan),
        truncated=truncated,
        tokens=tokens,
        learned_tokens=int(member_targets(examples, plan)[examples.weights[plan.members] > 0].sum()),
        lengths=length_percentiles(lengths),
        rows=plan.rows,
        fill=fill,
        row_length=size,
        read_length=reads,
        cache=examples.cache,
    )


def _learned_line(rows: Rows, examples: TokenisedExamples, train: np.ndarray, plan: RowPlan) -> str:
    """Return the line about the learned fraction of the response tokens of an epoch's examples."""
    if rows.packing == "wrapped":
        tokens = int(examples.lengths[train].sum())
        detail = "data.packing=wrapped: every token but the first of each row"
        return learned_line(tokens, tokens - plan.rows, detail)
    targets = int(examples.learned_responses[train].sum())
    weights = examples.weights[train]
    others = int(examples.reads[train][weights > 0].sum()) - targets
    detail = f"data.loss_on={rows.loss_on}"
    detail += f", and {others:,} tokens of prompts" if others else ""
    if (weights != 1).any():
        detail += f", rows weigh {weights.min():g} to {weights.max():g} (column weight)"
    if len(examples.token_weights):
        own = np.append(examples.token_weights, 1)
        detail += f", turns weigh {own.min():g} to {own.max():g}"
    cut = int(examples.truncated[train].sum())
    if cut:
        detail += f", {cut:,} of {len(train):,} rows are truncated to data.max_length={rows.max_length}"
    return learned_line(int(examples.responses[train].sum()), targets, detail)
