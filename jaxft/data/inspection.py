"""A dataset as `jaxft inspect` shows it: statistics, invalid rows, and examples with the weights of tokens.

The examples are those of SFT rows, preference rows or prompts for rollouts, as training batches have them.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxft.batch import Tokens
from jaxft.data import prompts
from jaxft.data.packing.lengths import measure_dataset
from jaxft.data.packing.prompt_tokens import row_fields
from jaxft.data.packing.tokenised import LABELS, TOKEN_WEIGHTS, TokenisedRows
from jaxft.data.pairs import PairRows, PairSource
from jaxft.data.prompts import PromptRows, Prompts
from jaxft.data.rows.invalid import InvalidCount, InvalidRow
from jaxft.data.rows.mixture import SplitRows, held_out_sources, parse_sources
from jaxft.data.sft import Rows
from jaxft.data.source import RowSource

# columns that the prompt's text shows, so that they are not listed
SHOWN_AS_PROMPT = ("prompt", "messages", "conversations", "instruction", "input", "system", "tools")


class ShownPart(NamedTuple):
    """The prompt, a response or the whole of an example: its token ids and the loss weight of each.

    label: "prompt", the kind of a response such as "chosen", or "" for a whole example.
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

    rows: their number, with invalid and dropped ones. placeholders: names of the rows whose response is a
    placeholder. split: all rows. of_step(step) yields the examples of that step's
    batch; train() and held_out() yield all of them.
    """

    statistics: dict[str, Any]
    invalid: tuple[InvalidCount, ...]
    of_step: Callable[[int], Iterator[ShownExample]]
    train: Callable[[], Iterator[ShownExample]]
    held_out: Callable[[], Iterator[ShownExample]]
    rows: int
    placeholders: tuple[str, ...]
    split: SplitRows


def inspect(data: Rows | PairRows | Prompts, tokenizer: Any) -> Inspected:
    """Read and tokenise a dataset. Invalid rows are left out and counted, whatever data.invalid is."""
    data = dataclasses.replace(data, invalid="drop", invalid_limit=1.0)
    if isinstance(data, Prompts):
        return inspect_prompts(data, *prompts.split_prompts(data, tokenizer))
    return inspect_source(data.open(tokenizer))


def row_problem(data: Rows | PairRows | Prompts, tokenizer: Any, name: str) -> str:
    """Return why no example is of the row with this name, FILE:LINE: what is wrong with it, that something
    leaves it out, or that no dataset has it.
    """
    held_out = data.held_out if isinstance(data.held_out, str) else None
    sources = [*parse_sources(data.train), *(held_out_sources(held_out) if held_out else ())]
    for source in sources:
        reader = source.adapt(data).reader(tokenizer).otherwise(only=name, invalid_limit=None, workers=1)
        try:
            size = int(measure_dataset(source.ref, reader).longest.max())
        except InvalidRow as error:
            return error.problem
        except ValueError:  # it has no such row
            continue
        limit = f"data.{data.length_settings[0]}={getattr(data, data.length_settings[0])}"
        return f"the row is valid, has {size} tokens, and is left out: see {limit}, data.drop and max_samples"
    return "no dataset has a row of this name; rows are named FILE:LINE"


def inspect_source(source: RowSource[Any]) -> Inspected:
    """Return the dataset of an open source."""
    stats = {name: x for name, x in vars(source.info.stats).items() if x is not None}
    del stats["lengths"], stats["invalid"]  # shown for each part, and by reason
    stats["tokens_with_a_loss"] = stats["learned_tokens"] / stats["tokens"]
    stats |= {"steps": source.info.steps, "fingerprint": source.info.fingerprint}
    split, rows = source.split, source.split.rows
    if isinstance(source, PairSource):
        weight = 1 / source.layout.settings.batch

        def of_step(step: int) -> Iterator[ShownExample]:
            batch = source.batch(step)[0]
            found = zip(batch.index.ravel().tolist(), batch.pair_weights.ravel(), strict=True)
            return (_pair(rows, index, weight) for index, weight in found if index >= 0)  # -1: empty

        example: Callable[[int], ShownExample] = partial(_pair, rows, weight=weight)
    else:

        def of_step(step: int) -> Iterator[ShownExample]:
            found = source.batch(step)[0]
            if LABELS in rows.extras:  # a label is shown at the token where it is read
                found = dataclasses.replace(found, read=found.read - 1)
            return examples_of(found, source.member_names(step))

        example = partial(_text, rows)
    return _inspected(split, stats, of_step, example)


def _inspected(
    split: SplitRows,
    stats: dict[str, Any],
    of_step: Callable[[int], Iterator[ShownExample]],
    example: Callable[[int], ShownExample],
) -> Inspected:
    """Return a dataset. example(index): one of split.rows."""
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
    """Return an example as one part, or if it has several responses, the prompt and each of them. factor: of
    the weights of its targets.
    """
    ids, own = rows.sequence(index), rows.extras.get(TOKEN_WEIGHTS)
    weights = factor * rows.learned[rows.offsets[index] : rows.offsets[index + 1]]
    if own is not None and own.counts[index]:
        weights = weights * own[index]
    if len(rows.kinds) < 2:
        return [ShownPart("", ids, weights)]
    ends = np.cumsum(rows.counts[index])[:-1]
    pieces = zip(("prompt", *rows.kinds), np.split(ids, ends), np.split(weights, ends), strict=True)
    return [ShownPart(label, ids, weights) for label, ids, weights in pieces if len(ids)]


def _text(rows: TokenisedRows, index: int) -> ShownExample:
    """Return an SFT example."""
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
    """Yield the examples of an SFT batch; a row of concatenated documents is one.

    names: the names of the examples packed into each row of the batch.
    """
    flat = [
        np.asarray(x).reshape(-1, x.shape[-1])
        for x in (batch.ids, batch.segments, batch.read, batch.token_weights)
    ]
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
        columns = [
            f"{name}={value!r}"[:80]
            for name, value in row_fields(rows, index).items()
            if name not in SHOWN_AS_PROMPT
        ]
        sampled = f"{data.group} completion{'s' * (data.group > 1)} of at most {data.max_new} tokens"
        facts = f"{rows.lengths[index]} tokens, {'; '.join([sampled, *columns])}"
        return ShownExample(rows.names[index], facts, _parts(rows, index, 0.0))

    def of_step(step: int) -> Iterator[ShownExample]:
        rollout, part = divmod(step, data.steps_per_rollout)
        numbers = prompts.prompts_of_rollout(data, train, rollout)
        chosen = train.chosen[numbers[prompts.prompts_of_step(data, rollout, part)]]
        return map(example, chosen.tolist())

    return _inspected(split, stats, of_step, example)
