"""A dataset as `jaxft inspect` and a run's report show it: statistics, lengths, invalid and repeated rows,
examples token by token with their weights in the loss.

The examples are SFT rows, preference rows or prompts for rollouts, as training batches have them.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxft.batch import Decisions, Tokens
from jaxft.data import prompts
from jaxft.data.packing.pack import round_up
from jaxft.data.packing.pair_layout import assign_rows, order_batches, row_shape
from jaxft.data.packing.reader import Reader
from jaxft.data.packing.row_tasks import row_fields
from jaxft.data.packing.tokenised import LABELS, ROW_FIELDS, TOKEN_WEIGHTS, TokenisedRows
from jaxft.data.pairs import PairRows, PairSource
from jaxft.data.prompts import LENGTH_STEP, PromptRows, Prompts
from jaxft.data.rows.invalid_rows import InvalidCount, InvalidRow
from jaxft.data.rows.mixture import SplitRows, held_out_sources, parse_sources
from jaxft.data.sft import Rows
from jaxft.data.source import RowSource, RowStats, SourceStats, length_percentiles

AnyRows = Rows | PairRows | Prompts
# columns that the prompt's text shows, so that they are not listed
SHOWN_AS_PROMPT = ("prompt", "messages", "conversations", "instruction", "input", "system", "tools")


class ShownPart(NamedTuple):
    """A full example, its prompt or one of its responses: the token ids, and the loss weight of each token.

    label: "prompt", the kind of a response such as "chosen", or "" for a full example.
    """

    label: str
    ids: np.ndarray
    weights: np.ndarray


class ShownExample(NamedTuple):
    """An example: the name of its row, a line of facts such as its lengths, and its parts.

    piece: its number within a row that is split into several examples (data.too_long=split), from 0.
    in_order: whether its parts follow one another; otherwise responses are alternatives.
    """

    name: str
    facts: str
    parts: list[ShownPart]
    piece: int = 0
    in_order: bool = False


class Inspected(NamedTuple):
    """A dataset: statistics of its valid rows by name, counts of its invalid rows, and its examples.

    rows: number of rows, with invalid and dropped ones. placeholders: names of the rows whose response is a
    placeholder. split: all rows. of_step(step) yields the examples of that step's batch; train() and
    held_out() yield all examples of that side.
    """

    statistics: dict[str, Any]
    invalid: tuple[InvalidCount, ...]
    of_step: Callable[[int], Iterator[ShownExample]]
    train: Callable[[], Iterator[ShownExample]]
    held_out: Callable[[], Iterator[ShownExample]]
    rows: int
    placeholders: tuple[str, ...]
    split: SplitRows


def inspect(data: AnyRows, tokenizer: Any) -> Inspected:
    """Read and tokenise a dataset. Invalid rows are left out and counted, whatever data.invalid is."""
    data = dataclasses.replace(data, invalid="drop", invalid_limit=1.0)
    if isinstance(data, Prompts):
        return inspect_prompts(data, *prompts.split_prompts(data, tokenizer))
    return inspect_source(data.open(tokenizer))


def row_problem(data: AnyRows, tokenizer: Any, name: str) -> str:
    """Explain why a row (FILE:LINE) has no example: its error, the settings that may leave it out, or that no
    dataset has such a row.
    """
    held_out = data.held_out if isinstance(data.held_out, str) else None
    sources = [*parse_sources(data.train), *(held_out_sources(held_out) if held_out else ())]
    for source in sources:
        reader = source.adapt(data).reader(tokenizer).otherwise(only=name, invalid_limit=None, workers=1)
        try:
            size = int(measure_datasets([source.ref], [reader]).longest.max())
        except InvalidRow as error:
            return error.problem
        except ValueError:  # it has no such row
            continue
        limit = f"data.{data.length_settings[0]}={getattr(data, data.length_settings[0])}"
        return f"the row is valid, has {size} tokens, and is left out: see {limit}, data.drop and max_samples"
    return "no dataset has a row of this name; rows are named FILE:LINE"


def inspect_source(source: RowSource[Any]) -> Inspected:
    """Return the dataset of a source that is open: its statistics and examples."""
    stats = {name: x for name, x in vars(source.info.stats).items() if x is not None}
    del stats["lengths"], stats["invalid"]  # shown for each part, and by reason
    stats["tokens_with_a_loss"] = stats["learned_tokens"] / stats["tokens"]
    stats |= {"steps": source.info.steps, "fingerprint": source.info.fingerprint}
    split, rows = source.split, source.split.rows
    if isinstance(source, PairSource):
        weight = 1 / source.layout.settings.batch

        def of_step(step: int) -> Iterator[ShownExample]:
            batch = source.batch(step)[0]
            weighted = zip(batch.index.ravel().tolist(), batch.pair_weights.ravel(), strict=True)
            return (_pair(rows, index, weight) for index, weight in weighted if index >= 0)  # -1: empty

        example: Callable[[int], ShownExample] = partial(_pair, rows, weight=weight)
    else:

        def of_step(step: int) -> Iterator[ShownExample]:
            batch = source.batch(step)[0]
            if LABELS in rows.extras:  # a label is shown at the token where it is read
                batch = dataclasses.replace(batch, read=batch.read - 1)
            examples = examples_of(batch, source.member_names(step))
            return _with_probabilities(examples, batch) if isinstance(batch, Decisions) else examples

        example = partial(_text, rows)
    return _inspected(split, stats, of_step, example)


def _inspected(
    split: SplitRows,
    stats: dict[str, Any],
    of_step: Callable[[int], Iterator[ShownExample]],
    example: Callable[[int], ShownExample],
) -> Inspected:
    """Return the inspected dataset. stats: its statistics. of_step: see Inspected. example: returns the
    example of an index in split.rows.
    """
    rows, used = split.rows, np.concatenate([split.train, split.held])
    count = int(rows.begins_row.sum()) + rows.dropped + sum(kind.rows for kind in rows.invalid)
    empty = used[rows.placeholders[used] & rows.begins_row[used]]
    return Inspected(
        stats,
        rows.invalid,
        of_step,
        lambda: map(example, split.train.tolist()),
        lambda: map(example, split.held.tolist()),
        count,
        tuple(rows.names[int(index)] for index in empty),
        split,
    )


def _parts(rows: TokenisedRows, index: int, factor: float) -> list[ShownPart]:
    """Return an example as one part, or if it has several responses, as the prompt and each of them. factor:
    multiplies the weights of its targets.
    """
    ids, turn_weights = rows.sequence(index), rows.extras.get(TOKEN_WEIGHTS)
    weights = factor * rows.learned[rows.offsets[index] : rows.offsets[index + 1]]
    if turn_weights is not None and turn_weights.counts[index]:
        weights = weights * turn_weights[index]
    if len(rows.kinds) < 2:
        return [ShownPart("", ids, weights)]
    ends = np.cumsum(rows.counts[index])[:-1]
    pieces = zip(("prompt", *rows.kinds), np.split(ids, ends), np.split(weights, ends), strict=True)
    return [ShownPart(label, ids, weights) for label, ids, weights in pieces if len(ids)]


def _text(rows: TokenisedRows, index: int) -> ShownExample:
    """Return the SFT example with an index in `rows`."""
    piece, factor = int(rows.pieces[index]), rows.weights[index]
    (part,) = _parts(rows, index, factor)
    facts = f"{len(part.ids)} tokens, {(part.weights > 0).sum()} with loss"
    facts += f", weight {factor:g}" if factor != 1 else ""
    facts += f", piece {piece + 1} of the row" if piece else ""
    return ShownExample(rows.names[index], facts, [part], piece)


def _pair(rows: TokenisedRows, index: int, weight: float) -> ShownExample:
    parts = _parts(rows, index, weight)
    lengths = ", ".join(f"{part.label} {len(part.ids)} tokens" for part in parts)
    facts = f"{lengths}, {rows.targets[index]} with loss, weight {weight:.4f} of the batch"
    return ShownExample(rows.names[index], facts, parts)


def examples_of(batch: Tokens, names: list[list[str]]) -> Iterator[ShownExample]:
    """Yield the examples of an SFT batch; a row of concatenated documents is one example.

    names: the names of the examples packed into each row of the batch.
    """
    arrays = (batch.ids, batch.segments, batch.read, batch.token_weights)
    flat = [np.asarray(x).reshape(-1, x.shape[-1]) for x in arrays]
    for ids, segments, read, token_weights, labels in zip(*flat, names, strict=False):
        weight = np.zeros(len(ids) + 1)
        np.add.at(weight, read + 1, token_weights)
        count = int(segments.max(initial=0))
        if count < len(labels):
            labels = [f"{labels[0]} and {len(labels) - 1} after it"]
        for number in range(1, count + 1):
            here = segments == number
            weights = weight[:-1][here]
            facts = f"{here.sum()} tokens, {(weights > 0).sum()} with loss"
            facts += f", weight {weights.sum():.4f} of the batch"
            yield ShownExample(labels[number - 1], facts, [ShownPart("", ids[here], weights)])


def _with_probabilities(examples: Iterator[ShownExample], batch: Decisions) -> Iterator[ShownExample]:
    """Yield decisions with the probabilities of their choices, where these are not 0 and 1."""
    decisions = batch.choices[..., 0] >= 0
    each = zip(examples, batch.choices[decisions], batch.probabilities[decisions], strict=True)
    for example, choices, p in each:
        soft = ", ".join(f"{x:.3g}" for x in p[choices >= 0])
        yield example if p.max() == 1 else example._replace(facts=f"{example.facts}, probabilities {soft}")


def inspect_prompts(data: Prompts, train: PromptRows, held: PromptRows) -> Inspected:
    """Return tokenised prompts for rollouts, split into training and held-out ones; each is one part."""
    split, rows = train.split, train.split.rows
    stats = {
        "prompts": len(train),
        "held_out": len(held),
        "dropped": rows.dropped,
        "summary": f"{len(train)} prompts, {len(held)} held out, {rows.dropped} dropped as too long"
        f"{split.left_out}",
        "fingerprint": prompts.prompts_fingerprint(data, train, held),
    }

    def example(index: int) -> ShownExample:
        fields = row_fields(rows, index).items()
        columns = [f"{name}={value!r}"[:80] for name, value in fields if name not in SHOWN_AS_PROMPT]
        sampled = f"{data.group} completion{'s' * (data.group > 1)} of at most {data.max_new} tokens"
        facts = f"{rows.lengths[index]} tokens, {'; '.join([sampled, *columns])}"
        return ShownExample(rows.names[index], facts, _parts(rows, index, 0.0))

    def of_step(step: int) -> Iterator[ShownExample]:
        rollout, part = divmod(step, data.steps_per_rollout)
        numbers = prompts.prompts_of_rollout(data, train, rollout)
        chosen = train.chosen[numbers[prompts.prompts_of_step(data, rollout, part)]]
        return map(example, chosen.tolist())

    return _inspected(split, stats, of_step, example)


COUNTED_ROWS = 20_000  # training rows whose lengths are counted
SHOWN_EXAMPLES = 3  # of the first batch
EXAMPLE_TOKENS = 1000  # of each part of an example
BINS = 24
CONTEXT = 16  # pieces of text that are decoded before a token's own


def data_summary(dataset: Inspected, tokenizer: Any) -> dict[str, Any]:
    """Return statistics by name, lengths in tokens by part, invalid rows by reason, and the first examples
    of the first batch as texts of tokens with their loss weights.
    """
    plain = {name: x for name, x in dataset.statistics.items() if isinstance(x, bool | int | float | str)}
    return {
        "statistics": plain,
        "lengths": {
            label: length_histogram(x) for label, x in part_lengths(dataset.split, COUNTED_ROWS).items()
        },
        "invalid": [count._asdict() for count in dataset.invalid],
        "examples": [
            {
                "name": example.name,
                "facts": example.facts,
                "parts": [part_pieces(part, tokenizer) for part in example.parts],
            }
            for example in itertools.islice(_distinct(dataset.of_step(0)), SHOWN_EXAMPLES)
        ],
    }


def _distinct(examples: Iterable[ShownExample]) -> Iterator[ShownExample]:
    """Yield the first example of each name: a batch that is longer than the dataset repeats rows."""
    seen = set[str]()
    for example in examples:
        if example.name not in seen:
            yield example
        seen.add(example.name)


def part_lengths(split: SplitRows, most: int) -> dict[str, np.ndarray]:
    """Return the token counts of each part, by name, in the first `most` training rows that have the part.

    Pairs have the parts "prompt" and one for each kind of response; other rows "all", and if any has a loss,
    "prompt" and "with loss" (their targets).
    """
    rows, members = split.rows, split.train[:most]
    counts = rows.counts[members]
    if len(rows.kinds) > 1:
        parts = zip(("prompt", *rows.kinds), counts.T, strict=True)
        return {label: column[column > 0] for label, column in parts if column.any()}
    learns = (rows.targets[members] > 0) & (rows.weights[members] > 0)
    of_learned = {"prompt": counts[learns, 0], "with loss": rows.targets[members][learns]}
    return {"all": counts.sum(1)} | (of_learned if learns.any() else {})


def length_histogram(counts: np.ndarray) -> dict[str, Any]:
    """Return percentiles and mean of token counts, and how many are in each of BINS equal ranges from the
    minimum to the maximum.
    """
    return {
        "percentiles": {**length_percentiles(counts), "mean": round(float(counts.mean()), 1)},
        "examples": len(counts),
        "histogram": np.histogram(counts, BINS)[0].tolist(),
    }


def part_pieces(part: ShownPart, tokenizer: Any) -> dict[str, Any]:
    """Return the first EXAMPLE_TOKENS tokens of a part as [text, weight], and how many more there are."""
    pieces = token_pieces(tokenizer, part.ids[:EXAMPLE_TOKENS], part.weights[:EXAMPLE_TOKENS])
    more = max(0, len(part.ids) - EXAMPLE_TOKENS)
    return {"label": part.label, "pieces": [list(piece) for piece in pieces], "more": more}


def token_pieces(tokenizer: Any, ids: np.ndarray, weight: np.ndarray) -> Iterator[tuple[str, float]]:
    """Yield (text, weight) of each token. Tokens that form one character together are yielded as one.

    All texts, joined, are the text of all ids. The time is linear in the number of ids.
    """
    shown, begin, ends = "", 0, [0]  # tokens are decoded behind some before them, as a tokenizer may need
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[begin:end].tolist(), skip_special_tokens=False)
        if text.endswith("\ufffd") and end < len(ids):
            continue
        yield text[len(shown) :], float(weight[ends[-1] : end].max())
        ends.append(end)
        if len(ends) > 2 * CONTEXT:
            ends = ends[-CONTEXT:]
            begin = ends[0]
            text = tokenizer.decode(ids[begin:end].tolist(), skip_special_tokens=False)
        shown = text


OVERLAPS = {  # kind of overlap of a row with an earlier training row -> the line about such rows
    "duplicates": "training rows that repeat another one: {n}; the first is {a}, equal to {b}",
    "repeated prompts": "training rows with the prompt of another one: {n}; the first is {a}, as in {b}",
    "leaked": "held-out rows that are also training rows, so that their loss is too low: {n}; the first "
    "is {a}, equal to {b}",
    "leaked prompts": "held-out rows with the prompt of a training row: {n}; the first is {a}, as in {b}",
}  # fmt: skip


def find_overlaps(split: SplitRows, most: int) -> dict[str, list[tuple[int, int]]]:
    """Find rows that repeat an earlier training row. Return for each kind, a key of OVERLAPS, a list of (row,
    earlier row), as indices in split.rows.

    most: how many training rows, and how many held-out rows, are compared. Rows that share only their prompt
    have different responses.
    """
    overlaps = {kind: list[tuple[int, int]]() for kind in OVERLAPS}
    rows, known, prompts = split.rows, dict[int, int](), dict[int, int]()
    content, documents = rows.content_hashes().tolist(), rows.documents.tolist()
    first, has_prompt = np.asarray(rows.hashes)[:, 0].tolist(), rows.counts[:, 0] > 0
    for side, same in ((split.train, "duplicates"), (split.held, "leaked")):
        similar = "repeated prompts" if same == "duplicates" else "leaked prompts"
        for i in side[rows.begins_row[side]][:most].tolist():
            whole, prompt = content[documents[i]], first[i] if has_prompt[i] else None
            if whole in known:
                overlaps[same].append((i, known[whole]))
            elif prompt in prompts:
                overlaps[similar].append((i, prompts[prompt]))
            if side is split.train:
                known.setdefault(whole, i)
                if prompt is not None:
                    prompts.setdefault(prompt, i)
    return overlaps


def overlap_lines(split: SplitRows, overlaps: dict[str, list[tuple[int, int]]]) -> list[str]:
    """Return a line for each kind of overlap, or a single line that there is none. overlaps: see
    find_overlaps.
    """
    names = split.rows.names
    lines = [
        OVERLAPS[kind].format(n=len(pairs), a=names[pairs[0][0]], b=names[pairs[0][1]])
        for kind, pairs in overlaps.items()
        if pairs
    ]
    return lines or ["no row repeats another one, and no held-out row is a training row"]


# ---- tokens of rows before a limit truncates or drops them, and what each limit keeps


UNLIMITED = 2**30
MEASURED = 10_000  # rows; of a larger dataset so many at even distances
ALARMING = 0.1  # fraction of the rows
ANSWERS = 1_000  # reference answers that are tokenised
ANSWER_COLUMNS = ("answer", "solution", "response", "completion", "output", "target", "ground_truth")


@dataclass(frozen=True)
class RowLengths:
    """Tokens of each row's prompt and responses, without any limit.

    responses: a column for each of `kinds`; prompts of rollouts have no column. targets: tokens of each row
    that have a loss. answers: tokens of the reference answers that rows of prompts have. read: rows that were
    read, also invalid ones. total: rows of the dataset, None if unknown; if `read` is less, these rows are a
    sample.
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
        """Number of tokens of each row's longest sequence, the subject of data.max_length and max_prompt."""
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
        """Return the fraction of the rows that this limit does not truncate."""
        return float((self.longest <= limit).mean())

    def kept(self, limit: int) -> Int[np.ndarray, " rows"]:
        """Return how many tokens of each row a length limit keeps: 0 if no token of a response fits."""
        room = limit - self.prompts[:, None]
        tokens = self.prompts + np.minimum(self.responses, room).sum(1)
        return np.where(self.prompts < limit + (not self.kinds), tokens, 0)


def measure(data: AnyRows, tokenizer: Any, cache: Path | None = None) -> RowLengths:
    """Tokenise the training rows without a length limit, or load their tokens from the cache.

    Invalid rows are left out. Raises ValueError or OSError for a dataset that cannot be read.
    """
    how = {"sample": MEASURED, "invalid_limit": 1.0, "names_first": False}
    sources = parse_sources(data.train)
    readers = [source.adapt(data).reader(tokenizer, cache).otherwise(**how) for source in sources]
    return measure_datasets([source.ref for source in sources], readers)


def measure_datasets(refs: Sequence[str], readers: Sequence[Reader]) -> RowLengths:
    """Tokenise datasets without a length limit. readers: the reader of each dataset."""
    parts = []
    for ref, reader in zip(refs, readers, strict=True):
        free = replace(reader.settings, max_length=UNLIMITED, too_long="truncate")
        parts.append(replace(reader, settings=free).read(ref))
    rows = reduce(TokenisedRows.concatenate, parts)
    counts, answers = rows.counts.astype(np.int64), _reference_answers(rows, readers[0].tokenizer)
    return RowLengths(counts[:, 0], counts[:, 1:], rows.kinds, rows.targets, answers, rows.read, rows.total)


def _reference_answers(rows: TokenisedRows, tokenizer: Any) -> Int[np.ndarray, " answers"]:
    """Return the token counts of the reference answers of up to ANSWERS prompts. A row's reference answer is
    the first string among ANSWER_COLUMNS.
    """
    some = np.linspace(0, len(rows) - 1, min(len(rows), ANSWERS)) if ROW_FIELDS in rows.extras else ()
    texts = list[str]()
    for fields in (row_fields(rows, int(i)) for i in some):
        answers = (fields.get(name) for name in ANSWER_COLUMNS)
        texts += filter(None, [next((x for x in answers if isinstance(x, str)), None)])
    counts = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []
    return np.array(counts, np.int64)


def micro_tokens(data: AnyRows, lengths: RowLengths, limit: int) -> int:
    """Return the number of tokens of the largest microbatch if rows or prompts have up to `limit` tokens."""
    rows = -(-data.units_per_step // data.micro)
    if isinstance(data, Prompts):
        return rows * (min(limit, int(lengths.longest.max())) + data.group * data.episode_length)
    if isinstance(data, Rows):
        return rows * limit
    tokens = lengths.kept(limit)
    tokens = tokens[tokens > 0]
    if not len(tokens):
        return LENGTH_STEP
    batches = order_batches(tokens, data.batch, data.seed, 0)  # of the first epoch
    return row_shape(tokens, tokens, [assign_rows(batches, tokens, min(data.micro, data.batch))]).length


@dataclass(frozen=True)
class LimitCost:
    """Rows that a length limit keeps, and its cost.

    whole, truncated, dropped: numbers of rows. tokens: tokens of an epoch. time: the time of an epoch, and
    memory: the memory of the activations of the largest microbatch, both relative to the present limit.
    """

    limit: int
    whole: int
    truncated: int
    dropped: int
    tokens: int
    time: float
    memory: float


def limit_costs(data: AnyRows, lengths: RowLengths, context: int = UNLIMITED) -> list[LimitCost]:
    """Return the costs of the present limit, and of limits that cover 50, 90, 95, 99 and 100 % of the rows.

    context: the longest sequence, in tokens, that the model supports; the other limits stay within it.
    """
    now = getattr(data, data.length_settings[0])
    most = context - (data.episode_length if isinstance(data, Prompts) else 0)
    needed = (round_up(percentile(lengths.longest, p), LENGTH_STEP) for p in (50, 90, 95, 99, 100))
    covering = [min(most, limit) for limit in needed]
    costs, sizes = [], {limit: _epoch_tokens(data, lengths, limit) for limit in {now, *covering}}
    for limit, tokens in sorted(sizes.items()):
        whole = int((lengths.longest <= limit).sum())
        left = whole if data.too_long in ("drop", "error") else int(np.count_nonzero(lengths.kept(limit)))
        time = tokens / max(1, sizes[now])
        memory = micro_tokens(data, lengths, limit) / micro_tokens(data, lengths, now)
        costs.append(LimitCost(limit, whole, left - whole, len(lengths) - left, tokens, time, memory))
    return costs


def _epoch_tokens(data: AnyRows, lengths: RowLengths, limit: int) -> int:
    """Return how many tokens an epoch trains on with this limit; completions of rollouts count in full."""
    if data.too_long == "split":
        return int(lengths.longest.sum())
    kept = lengths.kept(limit)
    if data.too_long != "truncate":
        kept = np.where(lengths.longest <= limit, kept, 0)
    further = data.group * data.episode_length if isinstance(data, Prompts) else 0
    return int(kept.sum() + further * np.count_nonzero(kept))


def limit_alarms(data: object, stats: SourceStats, tokenizer: Any, context: int = UNLIMITED) -> list[str]:
    """Return a warning with a remedy, [] unless more than ALARMING of the rows are truncated or left out.

    context: the longest sequence, in tokens, that the model supports; the remedy stays within it.
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
