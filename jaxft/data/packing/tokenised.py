"""Tokenised rows in a memory-mapped file: a prompt and its continuations as token ids with a loss mask.

A row has one continuation for SFT, two or three in a pair, more in a ranking, and none if it is a prompt of a
rollout. Further contents of rows, such as weights of tokens or columns that rewards read, are extra columns.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Bool, Float, Int, UInt64

from jaxft.data.packing.pack import number_groups, ranges
from jaxft.data.packing.row_cache import NAMING, ColumnType, ColumnTypes, Flat, RowNames, StoredRows
from jaxft.data.rows.invalid_rows import InvalidCount, add_counts

MASS, TOKEN_WEIGHTS = "mass", "token_weights"  # extras of SFT rows
LABELS = "labels"  # of solutions in steps: a label for each target, predicted at the target's position
NUMBERS, PROMPT_END_MOVED = "numbers", "prompt_end_moved"  # of pairs
ROW_FIELDS = "fields"  # of prompts
PROBABILITIES = "probabilities"  # of decisions
OF_CONTENT = (ROW_FIELDS, PROBABILITIES)  # extras in which duplicates must agree too


@dataclass(frozen=True)
class Ragged:
    """Arrays of different lengths stored as one: row i is values[offsets[i]:offsets[i + 1]] and has counts[i]
    values.
    """

    values: Flat
    counts: Int[np.ndarray, " rows"]

    @cached_property
    def offsets(self) -> Int[np.ndarray, " rows"]:
        """Index in `values` of each row's first value."""
        return np.cumsum(self.counts, dtype=np.int64) - self.counts

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row] + self.counts[row]]

    def of(self, rows: Int[np.ndarray, " n"]) -> np.ndarray:
        """Return the values of some rows, one row after the other."""
        return self.values[ranges(self.offsets[rows], self.counts[rows])]

    def concatenate(self, other: "Ragged") -> "Ragged":
        """Return these rows and then the other's."""
        return Ragged(self.values.concatenate(other.values), np.concatenate([self.counts, other.counts]))


def ragged(name: str, dtype: Any) -> ColumnTypes:
    """Return the types of an extra column with any number of values in a row, and of its counts."""
    counts = f"{name}_counts"
    return {name: ColumnType(dtype, counts), counts: ColumnType(np.int32)}


def column_types(responses: int, extras: ColumnTypes) -> ColumnTypes:
    """Return the types of a cache file's columns by name. responses: number of continuations of a row."""
    of_responses = {"reads": np.int64, "ends": np.int32} if responses else {}
    return {
        "ids": ColumnType(np.int32, "counts"),
        "learned": ColumnType(np.bool_, "counts"),
        "counts": ColumnType(np.int32, width=1 + responses),
        "hashes": ColumnType(np.uint64, width=1 + responses),
        "content": ColumnType(np.uint64),
        **{name: ColumnType(dtype, width=responses) for name, dtype in of_responses.items()},
        "truncated": ColumnType(np.bool_),
        "responses": ColumnType(np.int32),
        "learned_responses": ColumnType(np.int32),
        "weights": ColumnType(np.float64),
        "order": ColumnType(np.float64),
        "placeholders": ColumnType(np.bool_),
        "pieces": ColumnType(np.int32),
        "source": ColumnType(np.int32),
        "number": ColumnType(np.int64),
        **extras,
    }


@dataclass(frozen=True, kw_only=True)
class TokenisedRows:
    """Examples of K = 1 + k pieces each, the prompt and a continuation of each of `kinds`, empty if missing.

    Example i has the tokens ids[offsets[i]:offsets[i + 1]], and its piece p begins at ids[starts[i, p]].
    learned: mask of the tokens that are targets; the first token of a sequence never is. counts: tokens of
    each piece. hashes: a hash of each piece's tokens. content: a hash that duplicates share. reads: number of
    targets of each continuation. ends: the token id of each continuation's last target, where up to two
    targets of whitespace at the end do not count; -1 if the continuation is missing. truncated: mask of
    truncated examples. responses: tokens of each example's responses before truncation; learned_responses:
    how many of them are targets with a weight above 0. weights: a factor of the weights of an example's
    targets. order: the numbers of data.order_by, 0 without it. placeholders: mask of examples whose response
    is a placeholder such as N/A. pieces: index of each example within its row, above 0 only if the row is
    split into several examples (data.too_long=split), which follow one another. extras: further columns by
    name. names: the name of each example's row. digest: a hash of the columns, see cache.StoredRows.
    largest_id: the largest token id. formats: row formats of the datasets. labels: the labels that a
    classifier chooses from, else (). dropped: number of rows that were left out as too long. invalid: the
    invalid rows that were left out. warnings: lines for the start of a run. read, total: numbers of rows that
    were read, and of all rows of the dataset, None if unknown. cache: whether the cache had the columns, see
    cache.load_or_make.
    """

    kinds: tuple[str, ...]
    ids: Flat
    learned: Flat
    counts: Int[np.ndarray, "examples K"]
    hashes: Flat
    content: Flat
    reads: Int[np.ndarray, "examples k"]
    ends: Int[np.ndarray, "examples k"]
    truncated: Bool[np.ndarray, " examples"]
    responses: Int[np.ndarray, " examples"]
    learned_responses: Int[np.ndarray, " examples"]
    weights: Float[np.ndarray, " examples"]
    order: Float[np.ndarray, " examples"]
    placeholders: Bool[np.ndarray, " examples"]
    pieces: Int[np.ndarray, " examples"]
    extras: dict[str, Any]
    names: RowNames
    digest: str
    largest_id: int
    formats: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    dropped: int = 0
    invalid: tuple[InvalidCount, ...] = ()
    warnings: tuple[str, ...] = ()
    read: int = field(default=0, compare=False)
    total: int | None = field(default=None, compare=False)
    cache: str = field(default="off", compare=False)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def lengths(self) -> Int[np.ndarray, " examples"]:
        """Number of tokens of each example."""
        return self.counts.sum(1, dtype=np.int64)

    @cached_property
    def offsets(self) -> Int[np.ndarray, " examples_plus_1"]:
        """Index of the first token of each example, and at the end the number of all tokens."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @cached_property
    def starts(self) -> Int[np.ndarray, "examples K"]:
        """Index of the first token of each piece."""
        return self.offsets[:-1, None] + np.cumsum(self.counts, axis=1, dtype=np.int64) - self.counts

    @cached_property
    def targets(self) -> Int[np.ndarray, " examples"]:
        """Number of targets of each example."""
        return self.reads.sum(1)

    def sequence(self, example: int) -> Int[np.ndarray, " n"]:
        """Return the token ids of an example, all pieces one after the other."""
        return self.ids[self.offsets[example] : self.offsets[example + 1]]

    def piece(self, example: int, number: int) -> Int[np.ndarray, " n"]:
        """Return the token ids of an example's prompt (number 0) or continuation (1, 2, ...)."""
        start = self.starts[example, number]
        return self.ids[start : start + self.counts[example, number]]

    @property
    def begins_row(self) -> Bool[np.ndarray, " examples"]:
        """Mask of the examples that begin a row: all but the later pieces of split rows."""
        return self.pieces == 0

    @cached_property
    def documents(self) -> Int[np.ndarray, " examples"]:
        """Index of the row that each example is a piece of, over all concatenated datasets."""
        return np.cumsum(self.begins_row) - 1

    @property
    def end_counts(self) -> dict[int, int]:
        """How often each token id ends an example that is not truncated and ends its row; see `ends`."""
        ends = self.ends[~self.truncated & np.append(self.pieces[1:] == 0, True)]
        ids, counts = np.unique(ends[ends >= 0], return_counts=True)
        return dict(zip(ids.tolist(), counts.tolist(), strict=True))

    def group_by(self, *pieces: int) -> Int[np.ndarray, " examples"]:
        """Number the groups of examples that have the same tokens in all `pieces`; piece 0 is the prompt.
        Return each example's number.
        """
        return number_groups(np.asarray(self.hashes)[:, list(pieces)])

    def content_hashes(self) -> UInt64[np.ndarray, " rows"]:
        """Return a hash of each row of the dataset, equal for duplicates. The rows are numbered as in
        `documents`.
        """
        content = np.asarray(self.content)
        if self.begins_row.all():
            return content
        parts = np.split(content, np.flatnonzero(self.begins_row)[1:])
        return np.array([xxhash.xxh3_64_intdigest(part.tobytes()) for part in parts], np.uint64)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """A hash of each example's prompt and responses. With the same model, examples of one hash have the
        same log-probs.
        """
        keys = []
        for starts, counts in zip(self.starts, self.counts, strict=True):
            digest = hashlib.sha256()
            for number, (start, count) in enumerate(zip(starts, counts, strict=True)):
                digest.update(f"{number} {count} ".encode())
                digest.update(self.ids[start : start + count].tobytes())
                digest.update(self.learned[start : start + count].tobytes())
            keys.append(digest.hexdigest()[:40])
        return tuple(keys)

    def concatenate(self, other: "TokenisedRows") -> "TokenisedRows":
        """Return these examples and then the other's."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        columns = {name: x for name, x in columns.items() if isinstance(x, Flat | RowNames | np.ndarray)}
        return replace(
            self,
            **{name: _joined(x, getattr(other, name)) for name, x in columns.items()},
            extras={name: _joined(x, other.extras[name]) for name, x in self.extras.items()},
            digest=hashlib.sha256(f"{self.digest} {other.digest}".encode()).hexdigest(),
            largest_id=max(self.largest_id, other.largest_id),
            formats=tuple(dict.fromkeys(self.formats + other.formats)),
            labels=self.labels or other.labels,
            dropped=self.dropped + other.dropped,
            invalid=add_counts(self.invalid, other.invalid),
            warnings=tuple(dict.fromkeys(self.warnings + other.warnings)),
            read=self.read + other.read,
            total=None if self.total is None or other.total is None else self.total + other.total,
        )


def _joined(mine: Any, other: Any) -> Any:
    return np.concatenate([mine, other]) if isinstance(mine, np.ndarray) else mine.concatenate(other)


def stored_columns(
    stored: StoredRows, kinds: tuple[str, ...], extras: ColumnTypes, labels: Sequence[str]
) -> dict[str, Any]:
    """Return the fields of TokenisedRows that a cache file has. `reads` and `ends` are empty if it lacks
    them.

    ids, learned, hashes, content and the values of Ragged columns stay in the file until they are read.
    kinds: of the continuations. extras: types of the further columns. labels: see RowNames.
    """
    columns = stored.columns
    names = RowNames(labels, columns["source"], columns["number"])
    nothing = {name: np.empty((len(names), 0), np.int64) for name in ("reads", "ends")}
    lazy = {name: columns[name] for name in ("ids", "learned", "hashes", "content")}
    along = {name: kind.along for name, kind in extras.items() if kind.along is not None}
    further: dict[str, Any] = {
        name: np.asarray(columns[name]) for name in extras if name not in (*along, *along.values())
    }
    further |= {name: Ragged(columns[name], np.asarray(columns[counts])) for name, counts in along.items()}
    read = {
        name: np.asarray(column) for name, column in columns.items() if name not in (*lazy, *extras, *NAMING)
    }
    return {**nothing, **lazy, **read, "kinds": kinds, "extras": further, "names": names,
            "digest": stored.facts["digest"], "largest_id": stored.facts["largest_id"]}  # fmt: skip


def preview(rows: TokenisedRows, example: int, tokenizer: Any) -> str:
    """Return an example as text, on several lines if it has several responses: the prompt, then each
    response.
    """
    if len(rows.kinds) < 2:
        return str(tokenizer.decode(rows.sequence(example), skip_special_tokens=False))
    lines = [
        f"{name}: {tokenizer.decode(rows.piece(example, number), skip_special_tokens=False)}"
        for number, name in enumerate(("prompt", *rows.kinds))
        if name == "prompt" or rows.counts[example, number]
    ]
    moved = int(rows.extras[PROMPT_END_MOVED].sum()) if PROMPT_END_MOVED in rows.extras else 0
    if moved:
        lines.append(
            f"in {moved} of {len(rows)} pairs the response does not begin where the prompt ends, because a "
            "token spans both"
        )
    return "\n".join(lines)
