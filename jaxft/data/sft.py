"""SFT rows, and solutions in steps with a label for each, as batches: their settings, and how they are
packed. Batch k is a pure function of (rows, tokenizer, settings, k).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxft.annotations import count_from, one_of
from jaxft.batch import Tokens
from jaxft.data import source
from jaxft.data.chat import loss_mask
from jaxft.data.chat.loss_mask import LOSS_ON
from jaxft.data.data_settings import DataSettings
from jaxft.data.packing import pack
from jaxft.data.packing.pack import RowPlan
from jaxft.data.packing.reader import CutRows, Reader, RowTask, TokenisedRow
from jaxft.data.packing.row_cache import ColumnTypes
from jaxft.data.packing.row_tasks import SFT_TASK, text_columns, too_long
from jaxft.data.packing.tokenised import LABELS, MASS, TOKEN_WEIGHTS, Ragged, TokenisedRows, ragged
from jaxft.data.row_settings import RowSettings
from jaxft.data.rows import formats
from jaxft.data.rows.example import RESPONSE, ParsedRow, Solution
from jaxft.data.rows.invalid_rows import InvalidRow, attempt
from jaxft.data.rows.mixture import sources_with_metrics, split_rows
from jaxft.data.rows.text_files import DOCUMENT, SAMPLE_BY
from jaxft.data.source import RowSource

TOO_LONG = ("truncate", "split", "drop", "error")
WEIGHTING = ("token", "sequence")
TEXT_PROMPT = 32  # the most tokens of a document that are its prompt where a completion is sampled
Packing = bool | Literal["wrapped"]


@dataclass(frozen=True)
class Rows(DataSettings):
    """Documents, prompts with completions, or conversations for next-token prediction: the data of an SFT
    run.

    format: "auto" (detected from the columns), "plain" (strings are text without a chat template), or "text",
    "messages", "prompt-completion", "instruction" or "conversations" (see formats.py). loss_on: "assistant"
    (every assistant turn of a conversation), "completion" (only its last turn) or "all" (every token). In a
    row with a prompt and a response, the first two train on the response; in a text row, all three train on
    every token. max_length: the most tokens of an example, and of a row with several. too_long: "truncate"
    keeps the start, and leaves out an example if only its prompt would remain; "split" makes several examples
    of a document, "drop" leaves the example out, "error" ends the run. packing: true packs several examples
    into a row of max_length tokens, and they do not attend to one another; false puts each into its own row;
    "wrapped" concatenates documents and cuts them into rows of max_length tokens, which attend over all of
    their documents (needs too_long=split). weighting: "token" gives every target token of the optimizer batch
    the same weight, "sequence" every example; a column `weight` multiplies them. sample_by: the part of a
    text file that is one row: "document" (all of it, or a part between lines <|endoftext|>), "paragraph" or
    "line". batch: packed rows, or examples without packing, of one optimizer step, over all devices.

    Other fields: see DataSettings.

        data = Rows("rows.jsonl", held_out="test.jsonl", loss_on="completion", max_length=512, batch=16)
        run = Run("mine", weights, model_for(weights), sft, data)
        books = Rows("books/", too_long="split", packing="wrapped", sample_by="paragraph")

    >>> Rows("rows.jsonl", too_long="cut")
    Traceback (most recent call last):
    ValueError: data.too_long='cut'; use one of truncate, split, drop, error
    """

    loss_on: Annotated[str, one_of(loss_mask.LOSS_ON)] = "assistant"
    max_length: Annotated[int, count_from(2)] = 1024
    too_long: Annotated[str, one_of(TOO_LONG)] = "truncate"
    packing: Packing = True
    weighting: Annotated[str, one_of(WEIGHTING)] = "token"
    sample_by: Annotated[str, one_of(SAMPLE_BY)] = DOCUMENT
    unit: ClassVar[str] = "rows"
    task: ClassVar[RowTask] = SFT_TASK

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.too_long == "split" and self.max_length < 3:
            raise ValueError(f"data.max_length={self.max_length} with data.too_long=split; use at least 3")
        if self.packing == "wrapped" and (self.too_long != "split" or self.weighting != "token"):
            raise ValueError(
                f"data.too_long={self.too_long} data.weighting={self.weighting} with data.packing=wrapped, "
                "which cuts documents anywhere; set data.too_long=split data.weighting=token"
            )

    @property
    def token_settings(self) -> RowSettings:
        return self.row_settings(
            kinds=(RESPONSE,), max_length=self.max_length, too_long=self.too_long, loss_on=self.loss_on,
            sample_by=self.sample_by,
        )  # fmt: skip

    def open(self, tokenizer: Any, shards: int = 1, cache: Path | None = None) -> source.RowSource[Tokens]:
        """Read, tokenise (or load from the cache) and plan the batches; see DataSettings.open.

        Where `shards` does not divide the rows of a microbatch, empty rows are added; they change no result.
        """
        row_count = _rows_per_microbatch(self, shards)
        wrapped, split = self.packing == "wrapped", split_rows(self, tokenizer, cache)
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
            rows = first_plan if epoch == 0 else _plan(self, examples, split.of_epoch(epoch), size, epoch)
            return pack.limit_reads(rows, member_targets(examples, rows), reads)

        layout = self.batches(self, split, plan, held_plan, (row_count, size, reads))
        epochs = source.plan_epochs(split, plan, examples.lengths, self.batch)
        arrays = (array for x in (plan(0), held_plan) for array in (x.members, x.offsets, x.starts))
        shape = (self.batch, size, reads)
        fingerprint = source.fingerprint_of((shape, self.seed, self.weighting, examples.digest), arrays)
        return source.RowSource.of(layout, epochs, tokenizer, _stats(layout), fingerprint)

    @property
    def batches(self) -> "Callable[..., PackedBatches]":
        """The BatchLayout class of these rows."""
        return PackedBatches

    def held_out_mask(self, rows: TokenisedRows) -> Bool[np.ndarray, " rows"]:
        """Return the mask of the held-out examples. All pieces of a split document are on one side; if it is
        the only document, its last pieces are held out.
        """
        count = int(rows.documents[-1]) + 1
        if count == 1:
            return np.arange(len(rows)) >= len(rows) - self.held_out_count(len(rows))
        mask = np.zeros(count, bool)
        mask[pack.permutation(count, self.seed_of_split, 0)[: self.held_out_count(count)]] = True
        return mask[rows.documents]

    def abstract(self, shards: int = 1) -> Tokens:
        """Return the shapes of the largest batch, with T = M = max_length. shards: see DataSettings.open."""
        return _shapes(self, (_rows_per_microbatch(self, shards), self.max_length, self.max_length))


@dataclass(frozen=True)
class PackedBatches(source.BatchLayout[Tokens]):
    """Texts and conversations packed into rows. shape: rows of a microbatch, then slots of a row for tokens
    (T) and for tokens with a loss (M).
    """

    shape: tuple[int, int, int]

    @property
    def rows_per_step(self) -> int:
        return self.settings.batch

    def shapes(self) -> Tokens:
        return _shapes(self.settings, self.shape)

    def fill(self, plan: RowPlan) -> Tokens:
        settings, (row_count, *size) = self.settings, self.shape
        shape = (settings.batch, *size)
        weights = weights_of_members(self.split.rows, plan, settings.weighting)
        flat = self._filled(plan, shape, weights, self.split.train_names)

        def split(x: np.ndarray) -> np.ndarray:
            grid = x.reshape(settings.micro, settings.batch // settings.micro, x.shape[-1])
            return np.pad(grid, ((0, 0), (0, row_count - grid.shape[1]), (0, 0)))

        return jax.tree.map(split, flat)

    def evaluation(self, plan: RowPlan) -> tuple[Tokens, ...]:
        """Return rows as held-out batches [1, rows, ...], in which every target has the same weight."""
        weights, batches = weights_of_members(self.split.rows, plan, "token"), []
        for start in range(0, plan.rows, self.shape[0]):
            part = plan.slice(start, start + self.shape[0])
            part_weights = weights[plan.offsets[start] :][: len(part.members)]
            flat = self._filled(part, self.shape, part_weights, self.split.held_names)
            batches.append(jax.tree.map(lambda x: x[None], flat))
        return tuple(batches)

    def _filled(
        self, plan: RowPlan, shape: tuple[int, ...], weights: np.ndarray, names: tuple[str, ...]
    ) -> Tokens:
        flat = fill_rows(self.split.rows, plan, shape, weights, self.split.sources if names else None)
        return replace(flat, packed=self.settings.packing is True, source_names=names)

    def positions(self, batch: Tokens) -> int:
        """Return how many values a metrics.PerRow has: for each row T + 1, of which the first has no meaning
        and value i belongs to the row's i-th example.
        """
        _, rows, length = batch.ids.shape
        return rows * (length + 1)

    def name_at(self, batch: Tokens, number: int, position: int) -> str:
        """Return the name of an example, or in wrapped rows the names of all examples of the row; see
        BatchLayout.
        """
        _, rows, length = batch.ids.shape
        row, example = divmod(position, length + 1)
        row += number * rows
        members = self.held_plan.slice(row, row + 1).names(self.split.rows.names)[0]
        return ", ".join(members) if self.settings.packing == "wrapped" else members[example - 1]

    def prompts_of(self, batch: Tokens, row: int) -> Iterator[source.Prompt]:
        """Yield the prompts of a row; the response is the last run of tokens with a loss. For a text, of
        which every token is a target, the prompt is the beginning.
        """
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
            if first > inside[0]:
                yield source.Prompt(ids[inside[0] : first].tolist(), ids[first:end].tolist())


def _shapes(rows: Rows, shape: tuple[int, int, int]) -> Tokens:
    """Return the shapes of a batch. shape: see PackedBatches."""
    row_count, length, reads = shape

    def array(last: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((rows.micro, row_count, last), dtype)

    ids, read, names = array(length, np.int32), array(reads, np.int32), sources_with_metrics(rows.train)
    return Tokens(
        ids, ids, ids, read, read, array(reads, np.float32), packed=rows.packing is True,
        sources=read if names else None, source_names=names,
    )  # fmt: skip


def _rows_per_microbatch(rows: Rows, shards: int) -> int:
    """Return the number of rows of a microbatch, with the empty ones that are added for the mesh."""
    if rows.batch % rows.micro:
        fits = ", ".join(str(m) for m in range(1, rows.batch + 1) if rows.batch % m == 0)
        raise ValueError(
            f"data.batch={rows.batch} is not divisible by data.micro={rows.micro} microbatches; use a "
            f"data.micro of {fits}"
        )
    return pack.round_up(rows.batch // rows.micro, shards)


def _require_texts(examples: TokenisedRows) -> None:
    """Raise ValueError if wrapped rows would cut an example with a prompt, or lose weights of turns."""
    others = np.flatnonzero(examples.targets < examples.lengths - 1)
    if len(others) or len(examples.extras[TOKEN_WEIGHTS].values):
        name = examples.names[others[0] if len(others) else 0]
        raise ValueError(
            f"{name}: the row has a prompt or turns with weights, and data.packing=wrapped is for text of "
            "which every token is learned with the same weight; use data.packing=true"
        )


def _plan(rows: Rows, examples: TokenisedRows, chosen: np.ndarray, size: int, epoch: int) -> RowPlan:
    if not len(chosen):
        return RowPlan(chosen, np.zeros(1, np.int64))
    lengths, keys = examples.lengths[chosen], None if rows.order_by is None else examples.order[chosen]
    if rows.packing == "wrapped":
        plan = pack.wrap_examples(lengths, examples.documents[chosen], size, (rows.seed, epoch), keys)
    elif not rows.packing:
        plan = pack.one_per_row(len(chosen), rows.seed, epoch, keys)
    elif keys is not None:
        plan = pack.pack_in_order(lengths, keys, size, rows.batch, rows.seed)
    else:
        plan = pack.pack_examples(lengths, examples.targets[chosen], size, rows.seed, epoch)
    return replace(plan, members=chosen[plan.members])


def _stats(layout: PackedBatches) -> source.RowStats:
    examples, plan = layout.split.rows, layout.plan(0)
    targets = int(member_targets(examples, plan)[examples.weights[plan.members] > 0].sum())
    return source.row_stats(layout, "examples", layout.shape[1:], (targets, _learned_line(layout)))


def _learned_line(layout: PackedBatches) -> str:
    """Return the line about the learned fraction of the response tokens of the first epoch's examples."""
    rows, examples, train = layout.settings, layout.split.rows, layout.split.of_epoch(0)
    if rows.packing == "wrapped":
        tokens = int(examples.lengths[train].sum())
        detail = "data.packing=wrapped: every token but the first of each row"
        return source.learned_line(tokens, tokens - layout.plan(0).rows, detail)
    targets = int(examples.learned_responses[train].sum())
    weights = examples.weights[train]
    others = int(examples.targets[train][weights > 0].sum()) - targets
    detail = f"data.loss_on={rows.loss_on}"
    detail += f", and {others:,} tokens of prompts" if others else ""
    if (weights != 1).any():
        detail += f", rows weigh {weights.min():g} to {weights.max():g} (column weight)"
    if len(examples.extras[TOKEN_WEIGHTS].values):
        turn_weights = np.append(examples.extras[TOKEN_WEIGHTS].values, 1)
        detail += f", turns weigh {turn_weights.min():g} to {turn_weights.max():g}"
    cut = int(examples.truncated[train].sum())
    if cut:
        detail += f", {cut:,} of {len(train):,} rows are truncated to data.max_length={rows.max_length}"
    return source.learned_line(int(examples.responses[train].sum()), targets, detail)


# ---- rows of a plan as arrays


def member_targets(examples: TokenisedRows, plan: RowPlan) -> Int[np.ndarray, " members"]:
    """Return the number of target tokens of each member (example) of a plan; in wrapped rows, all tokens but
    the row's first are targets.
    """
    if plan.counts is None:
        return examples.targets[plan.members]
    return plan.counts - plan.is_first


def read_length(
    examples: TokenisedRows, plans: tuple[RowPlan, ...], size: int, chosen: Int[np.ndarray, " n"]
) -> int:
    """Return how many targets a row must have room for: the most in a row of the plans, or in one of the
    chosen examples alone. It is rounded up to a multiple of 1/8 of the row, so that similar data share a
    program.

    size: tokens of a row.
    """
    alone = int(examples.targets[chosen].max(initial=1))
    most = max(int(plan.row_sums(member_targets(examples, plan)).max()) for plan in plans if plan.rows)
    return min(pack.round_up(max(most, alone), max(1, size // 8)), size)


def weights_of_members(
    examples: TokenisedRows, plan: RowPlan, weighting: str
) -> Float[np.ndarray, " members"]:
    """Return, for each member of the plan, the weight of its target tokens before it is multiplied by the
    weights of turns (TOKEN_WEIGHTS). weighting: see Rows.

    The multiplied weights sum to 1 over the targets of the plan, or are 0 if all examples have weight 0.
    """
    factors = examples.weights[plan.members]
    mass = examples.extras[MASS][plan.members] if plan.counts is None else member_targets(examples, plan)
    total = (factors * mass).sum() if weighting == "token" else factors.sum()
    scale = factors / total if total else factors
    return scale if weighting == "token" else scale / mass


def fill_rows(
    examples: TokenisedRows,
    plan: RowPlan,
    shape: tuple[int, ...],
    weights: Float[np.ndarray, " members"],
    sources: Int[np.ndarray, " examples"] | None = None,
) -> Tokens:
    """Return the plan's rows as arrays of `shape` (rows, T, M); rows that the plan does not have stay empty.

    weights: see weights_of_members. Each member is a segment; a wrapped row, whose plan has starts, is a
    single segment. Targets are the tokens that follow a read position, or the labels of the tokens there.
    sources: the index of each example's source; None for a single source.
    """
    rows, length, reads = shape
    counts = plan.lengths_of(examples.lengths)
    per_row = np.diff(plan.offsets)
    row = np.repeat(np.arange(plan.rows), per_row)  # of each member
    before = np.cumsum(counts) - counts
    column = before - np.repeat(before[plan.offsets[:-1]], per_row)
    number = np.arange(len(row)) - np.repeat(plan.offsets[:-1], per_row) + 1

    first = examples.offsets[plan.members] + (0 if plan.starts is None else plan.starts)
    where = pack.ranges(first, counts)  # index of each token in examples.ids
    at = (np.repeat(row, counts), pack.ranges(column, counts))
    ids, segments, positions = (np.zeros((rows, length), np.int32) for _ in range(3))
    ids[at] = examples.ids[where]
    wrapped = plan.starts is not None
    segments[at] = 1 if wrapped else np.repeat(number, counts)
    positions[at] = at[1] if wrapped else pack.ranges(np.zeros_like(counts), counts)

    learned = (at[1] > 0 if wrapped else examples.learned[where]).nonzero()[0]
    target_row = at[0][learned]
    slot = (target_row, np.arange(len(learned)) - np.searchsorted(target_row, target_row))
    read, targets = (np.zeros((rows, reads), np.int32) for _ in range(2))
    token_weights = np.zeros((rows, reads), np.float32)
    labels = examples.extras.get(LABELS)
    read[slot] = at[1][learned] - (labels is None)
    targets[slot] = examples.ids[where[learned]] if labels is None else labels.of(plan.members)
    token_weights[slot] = np.repeat(weights, counts)[learned]
    turn_weights: Ragged = examples.extras[TOKEN_WEIGHTS]
    if turn_weights.counts[plan.members].any():
        lengths, own = examples.lengths[plan.members], np.ones(len(where), np.float32)
        own[np.repeat(turn_weights.counts[plan.members] > 0, lengths)] = turn_weights.of(plan.members)
        token_weights[slot] *= own[learned]
    batch = Tokens(ids, segments, positions, read, targets, token_weights)
    if sources is None:
        return batch
    number_of = np.zeros((rows, reads), np.int32)
    number_of[slot] = np.repeat(sources[plan.members], counts)[learned]
    return replace(batch, sources=number_of)


# ---- solutions in steps, for process reward models
#
# The tokens are as TRL's PRMTrainer makes them: BOS if the tokenizer has one, the prompt, and each step
# followed by the separator, all tokenised apart from one another. The label of a step is read at its last
# token, which is the separator's last.


STEPS_TOO_LONG = ("truncate", "drop", "error")


def _step_columns(settings: RowSettings) -> ColumnTypes:
    return {**text_columns(settings), **ragged(LABELS, np.int32)}


def _tokenise_steps(rows: Sequence[ParsedRow], reader: Reader) -> CutRows:
    """Yield a list for each solution: its example, or [] if it is left out as too long."""
    tokenizer, settings = reader.tokenizer, reader.settings
    solutions: list[Any] = [row.examples[RESPONSE] for row in rows]
    texts = [text for x in solutions for text in (x.prompt, *x.steps)]
    encoded = tokenizer([*texts, settings.separator], add_special_tokens=False, verbose=False)
    *each, separator = encoded.input_ids
    pieces, bos = iter(each), [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for solution in solutions:
        prompt = [*bos, *next(pieces)]
        steps = [[*next(pieces), *separator] for _ in solution.steps]
        yield attempt(_tokenised_steps, solution, prompt, steps, settings)


STEP_TASK = RowTask(formats.STEPS, 1, "max_length", _tokenise_steps, _step_columns, checks=())


def _tokenised_steps(
    solution: Solution, prompt: list[int], steps: list[list[int]], settings: RowSettings
) -> list[TokenisedRow]:
    """Return a list with a solution's example, [] if it is left out as too long. prompt, steps: token ids."""
    if not all(steps):
        raise InvalidRow(
            solution.name,
            "step without tokens",
            f"step {next(i for i, step in enumerate(steps) if not step)} has no token; fill it, or set a "
            "data.separator",
        )
    last = len(prompt) + np.cumsum([len(step) for step in steps]) - 1
    ids = np.array([*prompt, *(token for step in steps for token in step)], np.int32)
    limit, whole = settings.max_length, len(ids) <= settings.max_length
    if not whole and settings.too_long == "error":
        raise too_long(solution.name, f"{len(ids)} tokens are", limit)
    kept = last[last < limit]
    if not whole and (settings.too_long == "drop" or not len(kept)):
        return []
    if settings.last_step and len(kept) < len(steps):
        return []
    ids, at = ids[:limit], min(len(prompt), limit)
    learned = np.zeros(len(ids), bool)
    learned[kept] = True
    labels = np.array(solution.labels[: len(kept)], np.int32)
    weights = np.zeros(len(ids) * settings.last_step, np.float32)
    weights[-1:] = 1  # a solution ends with its last step
    mass = float(weights.sum()) if settings.last_step else float(len(kept))
    extras = {MASS: mass, TOKEN_WEIGHTS: weights, LABELS: labels}
    return [TokenisedRow(ids, learned, (at, len(ids) - at), not whole, len(steps), len(kept), extras)]


@dataclass(frozen=True)
class SolutionRows(Rows):
    """Prompts, the steps of a solution, and whether each is right: the data of process reward models.

    Rows are {"prompt", "completions": [steps], "labels": [true or false]}. separator: the text after every
    step; \\n is a line break. last_step_only: train on the last step of each solution alone, and leave out
    solutions whose last step ends after max_length tokens; evaluation reads all steps. too_long: "truncate"
    leaves out the steps that end after max_length tokens, "drop" the row, "error" ends the run. weighting:
    "token" gives every step of the optimizer batch the same weight, "sequence" every solution; a column
    `weight` multiplies them.

    All solutions of one prompt stay on one side of the split into training and held-out rows. Other fields:
    see Rows; loss_on and sample_by have no meaning here.
    """

    too_long: Annotated[str, one_of(STEPS_TOO_LONG)] = "truncate"
    packing: bool = True
    separator: str = "\n"
    last_step_only: bool = False
    task: ClassVar[RowTask] = STEP_TASK
    held_out_mask = DataSettings.held_out_mask  # solutions of one prompt are on one side

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_on != LOSS_ON[1] or self.format not in ("auto", formats.STEPS):
            raise ValueError(
                f"data.loss_on={self.loss_on} and data.format={self.format}: steps with labels are plain "
                "text, which these settings cannot change; remove them"
            )

    @property
    def token_settings(self) -> RowSettings:
        separator = self.separator.replace("\\n", "\n")
        return replace(super().token_settings, separator=separator, last_step=self.last_step_only)

    @property
    def batches(self) -> type[PackedBatches]:
        return StepBatches

    def open(self, tokenizer: Any, shards: int = 1, cache: Path | None = None) -> RowSource[Tokens]:
        opened = super().open(tokenizer, shards, cache)
        labels, train = opened.split.rows.extras[LABELS], opened.split.train
        steps, right = int(labels.counts[train].sum()), sum(int(labels[int(i)].sum()) for i in train)
        line = f"{steps:,} steps with labels, {100 * right / max(1, steps):.0f} % of them right"
        stats = replace(opened.info.stats, learned=line)
        return replace(opened, info=replace(opened.info, learned_ends={}, stats=stats))


@dataclass(frozen=True)
class StepBatches(PackedBatches):
    """Solutions packed into rows; evaluation reads all steps."""

    def evaluation(self, plan: RowPlan) -> tuple[Tokens, ...]:
        """Return rows as held-out batches [1, rows, ...], in which every step has the same weight."""
        rows = self.split.rows
        weights = replace(rows.extras[TOKEN_WEIGHTS], counts=np.zeros(len(rows), np.int32))
        extras = {**rows.extras, MASS: rows.targets.astype(np.float64), TOKEN_WEIGHTS: weights}
        every = replace(self.split, rows=replace(rows, extras=extras))
        return PackedBatches.evaluation(replace(self, split=every), plan)
