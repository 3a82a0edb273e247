"""Mix several sources of rows by weights, as in data=a.jsonl,b.parquet:0.3,org/name:train:0.2.

A source's columns and format, where they differ from data.columns and data.format, follow it after colons:
data=a.jsonl:prompt=question:completion=answer,b.csv:format=instruction:0.3.

Which rows of each source an epoch contains is a pure function of (numbers of rows, weights, seed, epoch).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int

from jaxft.data.data_settings import DUPLICATES, PLACEHOLDERS, DataSettings
from jaxft.data.packing.pack import permutation, ranges
from jaxft.data.packing.tokenised import TokenisedRows
from jaxft.data.rows.dataset_rows import SUFFIXES, try_find
from jaxft.data.rows.remote_files import file_name, without_secrets

SomeSettings = TypeVar("SomeSettings", bound=Any)
SOURCE_OPTIONS = ("format", "max_samples")  # options of a source that are not names of columns
_OPTION = re.compile(r"[A-Za-z_]\w*=[^/?#]+")


# ---- names and weights


@dataclass(frozen=True)
class SourceRef:
    """A dataset, see dataset_rows.read_rows.

    share: its fraction of an epoch's rows; None: an epoch has each of its rows once. name: the last part of
    its metrics' names. options: settings of its rows that replace the run's: SOURCE_OPTIONS and "columns".
    """

    ref: str
    share: float | None
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def adapt(self, settings: SomeSettings) -> SomeSettings:
        """Return the run's settings of tokenised rows with the options of this source."""
        return replace(settings, **self.options)


def parse_sources(text: str, setting: str = "data.train") -> tuple[SourceRef, ...]:
    """Return the sources that a setting names, separated by commas, with their fractions of an epoch.

    A source's weight is a number after a colon; an option NAME=VALUE also follows a colon. If all sources
    have weights, these are divided by their sum; if only some have, their weights are fractions, and the
    others divide the rest evenly. Raises ValueError for other weights, and for a source that is named twice.
    """
    if "," not in text or try_find(text) is not None:
        bare, options = _split_options(text, setting)
        head, weight = _split_weight(bare, setting)
        if weight is not None and try_find(head) is not None:
            raise ValueError(
                f"{setting}={text}: a weight needs several sources, as in a.jsonl:0.7,b.jsonl:0.3; remove it"
            )
        return (SourceRef(bare, None, _name(bare), options),)
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise ValueError(f"{setting}={text}: no source before or after a comma; name one, or remove it")
    with_options = [_split_options(item, setting) for item in items]
    weighted_refs = [_split_weight(bare, setting) for bare, _ in with_options]
    refs = [ref for ref, _ in weighted_refs]
    files = [path.resolve() if (path := try_find(ref)) else ref for ref in refs]
    twice = next((ref for ref, file in zip(refs, files, strict=True) if files.count(file) > 1), None)
    if twice:
        raise ValueError(f"{setting}={text}: {twice} is named twice; name it once, with a larger weight")
    short = list(map(_name, refs))
    names = [without_secrets(ref) if short.count(x) > 1 else x for x, ref in zip(short, refs, strict=True)]
    shares = _shares(text, setting, refs, [weight for _, weight in weighted_refs])
    return tuple(map(SourceRef, refs, shares, names, (options for _, options in with_options)))


def held_out_sources(text: str) -> tuple[SourceRef, ...]:
    """Return the datasets that data.held_out names. Raises ValueError if it gives one a weight."""
    sources = parse_sources(text, "data.held_out")
    if any(source.share is not None for source in sources):
        raise ValueError(f"data.held_out={text}: held-out rows have no weights; remove the weights")
    return sources


def _split_options(item: str, setting: str) -> tuple[str, dict[str, Any]]:
    """Return a dataset, with its weight, and its options: settings of its rows by name.

    Columns are items such as "prompt=question", as in data.columns; SOURCE_OPTIONS have other values.
    """
    parts, bare = list[str](), item
    weight = ""
    while try_find(bare) is None:
        head, _, tail = bare.rpartition(":")
        if head and _OPTION.fullmatch(tail):
            parts.insert(0, tail)
        elif (parts or _OPTION.fullmatch(head.rpartition(":")[2])) and not weight and _is_number(tail):
            weight = f":{tail}"  # before the options, or after them
        else:
            break
        bare = head
    if _OPTION.fullmatch(bare) and try_find(bare) is None:
        raise ValueError(
            f"{setting}: {bare} is no dataset; write a source's columns after it, each with a colon, as in "
            "a.jsonl:prompt=question:completion=answer"
        )
    options: dict[str, Any] = {}
    for part in parts:
        name, _, value = part.partition("=")
        if name not in SOURCE_OPTIONS:
            options["columns"] = (*options.get("columns", ()), part)
        elif name == "max_samples" and not (value.isdecimal() and int(value)):
            raise ValueError(f"{setting}: {item} has max_samples={value}; use a whole number above 0")
        else:
            options[name] = int(value) if name == "max_samples" else value
    return f"{bare}{weight}", options


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _split_weight(item: str, setting: str) -> tuple[str, float | None]:
    """Return a dataset and its weight, None without one."""
    head, colon, tail = item.rpartition(":")
    if not colon or try_find(item) is not None:
        return item, None
    try:
        weight = float(tail)
    except ValueError:
        file = try_find(head)
        if file is None or file.is_dir():  # a split of a hub dataset, or a file that does not exist
            return item, None
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(
            f"{setting}: {item} has the weight {tail!r}; use a number above 0, such as {head}:0.3"
        )
    return head, weight


def _shares(
    text: str, setting: str, refs: Sequence[str], weights: Sequence[float | None]
) -> list[float | None]:
    given = [weight for weight in weights if weight is not None]
    if not given:
        return [None] * len(weights)
    total, missing = sum(given), len(weights) - len(given)
    if not missing:
        return [weight / total for weight in given]
    if total >= 1:
        bare = next(ref for ref, weight in zip(refs, weights, strict=True) if weight is None)
        raise ValueError(
            f"{setting}={text}: the weights add up to {total:g}, which leaves nothing for {bare}; give every "
            "source a weight, or lower these to less than 1 in total"
        )
    return [(1 - total) / missing if weight is None else weight for weight in weights]


def _name(ref: str) -> str:
    """Return a dataset's name in metrics: the file's without suffix, the folder's, or the hub dataset's."""
    path, parts = Path(file_name(ref)), ref.partition(":")[0].split("/")
    if try_find(ref) is None and path.suffix not in SUFFIXES:
        return parts[min(1, len(parts) - 1)]
    return path.stem if path.suffix in SUFFIXES else path.name


def sources_with_metrics(text: str) -> tuple[str, ...]:
    """Return the names of the sources if there are several, which then have separate metrics; else ()."""
    sources = parse_sources(text)
    return tuple(source.name for source in sources) if len(sources) > 1 else ()


def source_names(text: str) -> str:
    """Return the names of the files and datasets that a setting names, for model cards."""
    return ", ".join(file_name(source.ref) for source in parse_sources(text))


# ---- the rows of an epoch


@dataclass(frozen=True)
class Mixture:
    """Sources with weights: an epoch has as many rows as all sources together, `counts[i]` of source i.

    A source whose rows are not all used in one epoch continues in the next; after its last row it starts
    again in a new random order. rows: the indices of each source's rows.
    """

    rows: tuple[Int[np.ndarray, " _"], ...]
    counts: tuple[int, ...]
    seed: int

    def of_epoch(self, epoch: int) -> Int[np.ndarray, " rows"]:
        """Return the indices of an epoch's rows, one source after the other."""
        chosen = []
        for number, (rows, count) in enumerate(zip(self.rows, self.counts, strict=True)):
            first, skipped = divmod(epoch * count, len(rows))
            passes = range(first, first + -(-(skipped + count) // len(rows)))
            orders = [permutation(len(rows), self.seed, 6, number, turn) for turn in passes]
            chosen.append(rows[np.concatenate(orders)[skipped : skipped + count]])
        return np.concatenate(chosen)


def make_mixture(
    rows: Sequence[Int[np.ndarray, " _"]], sources: Sequence[SourceRef], seed: int
) -> Mixture | None:
    """Return the mixture of sources with weights, None if no source has a weight. rows: the indices of each
    source's rows.

    The counts of an epoch are the sources' fractions of all rows, rounded so that they add up (largest
    remainders). Raises ValueError for a source that would get no row, or has none.
    """
    shares = [source.share for source in sources if source.share is not None]
    if not shares:
        return None
    empty = next((source.ref for source, chosen in zip(sources, rows, strict=True) if not len(chosen)), None)
    if empty is not None:
        raise ValueError(f"{empty}: all of its rows are held out; lower data.held_out, or add rows")
    total = sum(map(len, rows))
    exact = np.array(shares) * total
    counts = np.floor(exact + 1e-9).astype(np.int64)
    most = np.argsort(counts - exact, kind="stable")[: total - counts.sum()]
    counts[most] += 1
    for source, count in zip(sources, counts, strict=True):
        if not count:
            raise ValueError(
                f"{source.ref}: its weight, {source.share:g} of the sum of weights, gives it none of the "
                f"{total} rows of an epoch; raise the weight, or leave the source out"
            )
    return Mixture(tuple(rows), tuple(counts.tolist()), seed)


# ---- training and held-out rows of all sources


@dataclass(frozen=True)
class SplitRows:
    """The tokenised rows of all sources, and the indices of the training and the held-out examples.

    sources: for each example, the index of its source among those of data.train; for a held-out example, of
    data.held_out if that names datasets. train_names, held_names: the names of several sources, for their
    metrics; () for one.
    mixture: the sources of an epoch if they have weights, else None. left_out: a clause with the number of
    rows that data.drop has left out, "" for none. warnings: lines for a run's start.
    """

    rows: TokenisedRows
    train: Int[np.ndarray, " train"]
    held: Int[np.ndarray, " held"]
    sources: Int[np.ndarray, " examples"]
    train_names: tuple[str, ...]
    held_names: tuple[str, ...]
    mixture: Mixture | None
    left_out: str = ""
    warnings: tuple[str, ...] = ()

    def of_epoch(self, epoch: int) -> Int[np.ndarray, " n"]:
        """Return the indices of an epoch's training examples; a mixture may use a row more than once."""
        if self.mixture is None:
            return self.train
        first = self.mixture.of_epoch(epoch)
        starts = np.flatnonzero(self.rows.begins_row)
        pieces = np.diff(np.append(starts, len(self.rows)))[np.searchsorted(starts, first)]
        return ranges(first, pieces)

    @property
    def summary(self) -> str:
        """How many rows an epoch takes from sources with weights, and how many data.drop has left out."""
        if self.mixture is None:
            return self.left_out
        each = zip(self.mixture.counts, self.mixture.rows, self.train_names, strict=True)
        parts = [f"{count} rows from the {len(rows)} of {name}" for count, rows, name in each]
        return f"; an epoch takes {', '.join(parts)}{self.left_out}"


def split_rows(settings: DataSettings, tokenizer: Any, cache: Path | None = None) -> SplitRows:
    """Read all sources and split them into training and held-out rows. cache: see DataSettings.open.

    Raises ValueError if a side has no rows left, or no training row has a weight.
    """

    def read(source: SourceRef) -> TokenisedRows:
        return source.adapt(settings).reader(tokenizer, cache).read(source.ref)

    sources, held_sources = parse_sources(settings.train), tuple[SourceRef, ...]()
    parts = [read(source) for source in sources]
    settings = settings.settled(parts)
    masks = [_held_out_mask(settings, x.ref, part) for x, part in zip(sources, parts, strict=True)]
    names = held_names = sources_with_metrics(settings.train)
    if isinstance(settings.held_out, str) and settings.holds_out:
        held_sources = held_out_sources(settings.held_out)
        held_names = sources_with_metrics(settings.held_out)
        parts += [read(source) for source in held_sources]
        masks += [np.ones(len(part), bool) for part in parts[len(sources) :]]
    numbers = np.array([*range(len(sources)), *range(len(held_sources))], np.int16)
    rows, starts = reduce(TokenisedRows.concatenate, parts), np.cumsum([0, *map(len, parts)])
    held, from_file = np.concatenate(masks), np.arange(len(rows)) >= starts[len(sources)]
    out, clause = _left_out(settings, rows, from_file)
    for name, side in (("train", ~held), ("held_out", held)):
        if side.any() and not (side & ~out).any():
            value, drop = getattr(settings, name), ",".join(settings.drop)
            raise ValueError(
                f"data.{name}={value}: data.drop={drop} leaves no {settings.unit[:-1]}; "
                "drop less, or add rows"
            )
    train = np.flatnonzero(~held & ~out)
    if not rows.weights[train].any():
        raise ValueError(
            f"data.train={settings.train}: every training row has weight 0, so that nothing would be "
            "learned; give some rows a weight above 0, or rename the column if it is no weight of the loss"
        )
    begins = train[rows.begins_row[train]]
    by_source = [begins[(begins >= a) & (begins < b)] for a, b in pairwise(starts[: len(sources) + 1])]
    return SplitRows(
        rows, train, np.flatnonzero(held & ~out), np.repeat(numbers, np.diff(starts)), names,
        held_names, make_mixture(by_source, sources, settings.seed), clause,
        rows.warnings + settings.held_out_notes(int(held[rows.begins_row].sum()), int(rows.begins_row.sum())),
    )  # fmt: skip


def _left_out(settings: DataSettings, rows: TokenisedRows, from_file: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the mask of the examples that data.drop leaves out, and a clause that counts their rows.

    from_file: mask of the examples of files that data.held_out names. They are never left out as duplicates;
    training rows that equal one of them are. Of equal training rows the first is kept.
    """
    begins = rows.begins_row
    fixed = from_file[begins]
    empty = rows.placeholders[begins] & (PLACEHOLDERS in settings.drop)
    twice = np.zeros(len(empty), bool)
    if DUPLICATES in settings.drop:
        order = np.concatenate([np.flatnonzero(fixed & ~empty), np.flatnonzero(~fixed & ~empty)])
        _, first = np.unique(rows.content_hashes()[order], return_index=True)
        twice[order] = True
        twice[order[first]] = False
        twice &= ~fixed
    counts = {"duplicates": int(twice.sum()), "placeholders as responses": int(empty.sum())}
    named = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
    clause = f"; left out by data.drop: {named}" if named else ""
    return (empty | twice)[np.cumsum(begins) - 1], clause


def _held_out_mask(settings: DataSettings, ref: str, part: TokenisedRows) -> np.ndarray:
    if not settings.holds_out or isinstance(settings.held_out, str):
        return np.zeros(len(part), bool)
    if len(part) < 2:
        raise ValueError(
            f"{ref}: data.held_out={settings.held_out} cannot split a single row; set data.held_out=none"
        )
    return settings.held_out_mask(part)
