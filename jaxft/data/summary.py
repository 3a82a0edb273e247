"""A run's data as JSON for its report: statistics, lengths, invalid rows, and examples token by token."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxft.data.inspection import Inspected, ShownExample, ShownPart
from jaxft.data.rows.mixture import SplitRows
from jaxft.data.source import length_percentiles

COUNTED_ROWS = 20_000  # training rows whose lengths are counted
SHOWN_EXAMPLES = 3  # of the first batch
EXAMPLE_TOKENS = 1000  # of each part of an example
BINS = 24
CONTEXT = 16  # pieces of text that are decoded before a token's own


def data_summary(found: Inspected, tokenizer: Any) -> dict[str, Any]:
    """Return statistics by name, lengths in tokens by part, invalid rows by reason, and the first examples
    of the first batch as texts of tokens with their loss weights.
    """
    plain = {name: x for name, x in found.statistics.items() if isinstance(x, bool | int | float | str)}
    return {
        "statistics": plain,
        "lengths": {
            label: length_histogram(x) for label, x in part_lengths(found.split, COUNTED_ROWS).items()
        },
        "invalid": [
            {"reason": reason, "rows": rows, "first": first} for reason, rows, first in found.invalid
        ],
        "examples": [
            {
                "name": example.name,
                "facts": example.facts,
                "parts": [part_pieces(part, tokenizer) for part in example.parts],
            }
            for example in itertools.islice(_distinct(found.of_step(0)), SHOWN_EXAMPLES)
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
    """Return the token counts of each part of the first `most` training rows, of those that have it.

    A row with one response is one part, "all"; the counts of its prompt and of its targets are added.
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

    The texts together are the text of all ids. The cost is linear in their number.
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
