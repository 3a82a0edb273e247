"""SFT rows as token ids with a loss mask."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from jaxft.data import cache as files
from jaxft.data import chat, formats
from jaxft.data.cache import ChunkColumns, ColumnType, ColumnTypes
from jaxft.data.example import Chat, Completion, Example
from jaxft.data.flat import Flat, RowNames
from jaxft.data.invalid import InvalidCount, InvalidRow, InvalidRows, add_counts, valid
from jaxft.data.left_out import has_placeholder, row_hashes
from jaxft.data.pack import split_lengths
from jaxft.data.row_files import Row
from jaxft.data.row_text import DOCUMENT
from jaxft.data.template_settings import TemplateSettings
from jaxft.data.tokenise import DEFAULT_TOKENISING, RowKind, TokenisedDataset, Tokenising, tokenise_dataset

VERSION = 11  # increase it when the same rows become other tokens


@dataclass(frozen=True)
class TokenSettings:
    """The settings that the tokens and the loss mask of a row depend on; they are part of the cache key."""

    columns: tuple[str, ...]
    format: str
    loss_on: str
    max_length: int
    too_long: str
    template: TemplateSettings
    order_by: str | None = None
    sample_by: str = DOCUMENT
    max_samples: int | None = None


SFT_COLUMNS: ColumnTypes = {
    "ids": ColumnType(np.int32, "counts"),
    "learned": ColumnType(np.bool_, "counts"),
    "counts": ColumnType(np.int32),
    "reads": ColumnType(np.int64),
    "truncated": ColumnType(np.bool_),
    "responses": ColumnType(np.int32),
    "learned_responses": ColumnType(np.int32),
    "ends": ColumnType(np.int32),
    "weights": ColumnType(np.float64),
    "order": ColumnType(np.float64),
    "placeholders": ColumnType(np.bool_),
    "pieces": ColumnType(np.int32),
    "mass": ColumnType(np.float64),
    "token_weights": ColumnType(np.float32, "weight_counts"),
    "weight_counts": ColumnType(np.int32),
    "source": ColumnType(np.int32),
    "number": ColumnType(np.int64),
}


@dataclass(frozen=True, kw_only=True)
class TokenisedRows:
    """Tokenised examples, concatenated: example i is ids[offsets[i]:offsets[i + 1]].

    learned: mask of the tokens that are targets; the first token of an example never is. reads: number of
    targets of each example. truncated: mask of truncated examples. responses: number of tokens of each
    example's responses before truncation; learned_responses: how many of them are targets with a weight above
    0. ends: the last target of each example that is not whitespace. weights: a factor of the weights of an
    example's targets. order: the numbers of data.order_by, 0 without it. placeholders: mask of the examples
    whose response is a placeholder (see left_out.py). names: the row of each example. digest: a hash of the
    columns, see cache.StoredRows. largest_id: the largest token id. dropped: number of rows that were left
    out as too long. invalid: the invalid rows that were left out. warnings: lines for the start of a run.
    cache: whether the cache had the columns, see cache.load_or_make.
    """

    ids: Flat
    learned: Flat
    offsets: Int[np.ndarray, " examples_plus_1"]
    reads: Int[np.ndarray, " examples"]
    truncated: Bool[np.ndarray, " examples"]
    responses: Int[np.ndarray, " examples"]
    learned_responses: Int[np.ndarray, " examples"]
    ends: Int[np.ndarray, " examples"]
    weights: Float[np.ndarray, " examples"]
    order: Float[np.ndarray, " examples"]
    placeholders: Bool[np.ndarray, " examples"]
    names: RowNames
    digest: str
    largest_id: int
    dropped: int = 0
    invalid: tuple[InvalidCount, ...] = ()
    warnings: tuple[str, ...] = ()
    cache: str = field(default="off", compare=False)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def lengths(self) -> Int[np.ndarray, " examples"]:
        """Tokens of each example."""
        return np.diff(self.offsets)

    @property
    def begins_row(self) -> Bool[np.ndarray, " examples"]:
        """Mask of the examples that begin a row: all but the later pieces of split rows."""
        return np.ones(len(self), bool)

    def content_hashes(self) -> UInt64[np.ndarray, " rows"]:
        """Return a hash of the tokens and the loss mask of each row, whose first examples are begins_row."""
        bounds = np.append(self.offsets[:-1][self.begins_row], self.offsets[-1])
        return row_hashes(self.ids, self.learned, bounds)

    def concatenate(self, other: Self) -> Self:
        """Return the examples of both, the other's last."""
        columns: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            mine, others = getattr(self, name), getattr(other, name)
            if isinstance(mine, Flat | RowNames):
                columns[name] = mine.concatenate(others)
            elif isinstance(mine, np.ndarray) and name != "offsets":
                columns[name] = np.concatenate([mine, others])
        return replace(
            self,
            **columns,
            offsets=np.concatenate([self.offsets, other.offsets[1:] + self.offsets[-1]]),
            digest=hashlib.sha256(f"{self.digest} {other.digest}".encode()).hexdigest(),
            largest_id=max(self.largest_id, other.largest_id),
            dropped=self.dropped + other.dropped,
            invalid=add_counts(self.invalid, other.invalid),
            warnings=tuple(dict.fromkeys(self.warnings + other.warnings)),
        )


@dataclass(frozen=True, kw_only=True)
class TokenisedExamples(TokenisedRows):
    """Examples of an SFT run, which may be pieces of a row (data.too_long=split).

    pieces: index of each example within its row, 0 for the first; a row's pieces follow one another. mass:
    the sum of the weights of an example's targets before the factor `weights`. token_weights: the weights of
    all tokens of those examples that have weights other than 1, concatenated. weight_counts: the number of
    each example's weights in it: its tokens, or 0.
    """

    pieces: Int[np.ndarray, " examples"]
    mass: Float[np.ndarray, " examples"]
    token_weights: Flat
    weight_counts: Int[np.ndarray, " examples"]

    @property
    def begins_row(self) -> Bool[np.ndarray, " examples"]:
        """Mask of the examples that begin a row: all but the later pieces of split rows."""
        return self.pieces == 0

    @cached_property
    def documents(self) -> Int[np.ndarray, " examples"]:
        """Index of the row that each example is a piece of, over all concatenated datasets."""
        return np.cumsum(self.begins_row) - 1

    @property
    def is_whole(self) -> Bool[np.ndarray, " examples"]:
        """Mask of the examples that contain the end of their row: not truncated, and the row's last piece."""
        return ~self.truncated & np.append(self.pieces[1:] == 0, True)

    @cached_property
    def weight_offsets(self) -> Int[np.ndarray, " examples"]:
        """Index in `token_weights` of each example's first weight."""
        return np.cumsum(self.weight_counts, dtype=np.int64) - self.weight_counts


def tokenise_rows(
    ref: str, settings: TokenSettings, tokenizer: Any, how: Tokenising = DEFAULT_TOKENISING
) -> TokenisedExamples:
    """Read the rows of `ref` and tokenise them, or load the tokens from the cache."""
    kind = RowKind(
        version=VERSION,
        key=astuple(settings),
        settings=settings,
        stored=SFT_COLUMNS,
        schemas=formats.SFT_SCHEMAS,
        tokenise=partial(_tokenise, settings=settings),
        further=(settings.order_by,) if settings.order_by else (),
        sample_by=settings.sample_by,
    )
    found = tokenise_dataset(ref, kind, tokenizer, how)
    some = found.examples
    examples = list(formats.normalise_each(some, settings.format, settings.columns)) if some else []
    checks = (chat.tools_warnings, chat.content_warnings, chat.prompt_warnings)
    warnings = [line for check in checks for line in check(examples, tokenizer, settings.template)]
    return TokenisedExamples(
        **row_fields(ref, found, settings.max_length), warnings=(*found.notes, *warnings)
    )


def row_fields(ref: str, found: TokenisedDataset, max_length: int) -> dict[str, Any]:
    """Return the fields of TokenisedRows but `warnings`. Raises ValueError if all rows are too long."""
    columns = dict(found.stored.columns)
    if not len(found.names):
        raise ValueError(
            f"{ref}: all {found.dropped} rows were dropped because they are longer than "
            f"data.max_length={max_length}; raise it"
        )
    long: dict[str, Any] = {
        name: columns.pop(name) for name in ("ids", "learned", "token_weights") if name in columns
    }
    counts = np.asarray(columns.pop("counts")).ravel()
    return {
        **long,
        **{name: np.asarray(column) for name, column in columns.items() if name not in files.NAMING},
        "offsets": np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        "names": found.names,
        "digest": found.stored.facts["digest"],
        "largest_id": found.largest_id,
        "dropped": found.dropped,
        "invalid": found.invalid,
        "cache": found.state,
    }


def last_targets(
    ids: Int[np.ndarray, " tokens"],
    learned: Bool[np.ndarray, " tokens"],
    ends: Int[np.ndarray, " sequences"],
    tokenizer: Any,
) -> Int[np.ndarray, " sequences"]:
    """Return the last target of each sequence that is not whitespace.

    ends: index after the last token of each sequence.
    """
    if not len(ends):
        return np.zeros(0, np.int32)
    targets = np.flatnonzero(learned)
    last = np.searchsorted(targets, ends) - 1
    for _ in range(2):  # a template that ends turns with a line break learns it
        found = ids[targets[last]]
        blank = [int(i) for i in np.unique(found) if not tokenizer.decode([int(i)]).strip()]
        last = np.maximum(last - np.isin(found, blank), 0)
    return ids[targets[last]]


def count_ids(ids: Int[np.ndarray, " n"]) -> dict[int, int]:
    """Return how often each token id occurs."""
    found, counts = np.unique(ids, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _tokenise(
    rows: Sequence[Row],
    format: formats.RowFormat,
    tokenizer: Any,
    invalid: InvalidRows,
    settings: TokenSettings,
) -> ChunkColumns:
    """Return the columns of a chunk's rows; see RowKind."""
    examples = list(formats.normalise_as(format, rows, settings.columns))
    columns: dict[str, Any] = {name: [] for name in (*SFT_COLUMNS, "index") if name not in files.NAMING}
    tokenised = chat.tokenise_weighted(examples, tokenizer, settings.loss_on, settings.template)
    responses = _response_masks(examples, settings, tokenizer)
    for number, (outcome, response) in enumerate(zip(tokenised, responses, strict=True)):
        with invalid.skip():
            tokens = valid(outcome)
            name = settings.order_by
            tokens.learned[0] = False
            if not _fits(rows[number].name, tokens.learned, settings):
                continue
            order = 0.0 if name is None else formats.number_of(rows[number], name, "data.order_by")
            example = examples[number]
            assert not isinstance(example, InvalidRow)  # it was rendered
            row = {"order": order, "index": number, "placeholders": has_placeholder(example)}
            for found in _examples_of(tokens, response, example, settings):
                for column, value in {**found, **row}.items():
                    columns[column].append(value)
    for column in ("ids", "learned", "token_weights"):
        columns[column] = np.concatenate(columns[column]) if columns[column] else []
    part = {
        name: np.asarray(x, SFT_COLUMNS[name].dtype) for name, x in columns.items() if name in SFT_COLUMNS
    }
    part["ends"] = last_targets(part["ids"], part["learned"], np.cumsum(part["counts"]), tokenizer)
    return part | {"index": np.asarray(columns["index"], np.int64)}


def _examples_of(
    tokens: chat.WeightedTokens, response: np.ndarray | None, example: Example, settings: TokenSettings
) -> Iterator[dict[str, Any]]:
    """Yield the columns of a row's examples: of one, or of each piece of a document that is split.

    response: the mask of the response tokens; None if it equals the loss mask.
    """
    ids, mask = tokens.ids, tokens.learned.copy() if response is None else response
    mask[0] = False
    cut = settings.too_long == "truncate" and len(ids) > settings.max_length
    ends = [min(len(ids), settings.max_length)]
    if settings.too_long == "split":
        ends = np.cumsum(split_lengths(len(ids), settings.max_length)).tolist()
    for number, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        learned = tokens.learned[start:end]
        learned[0] = False
        own = np.ones(0, np.float32) if tokens.weights is None else tokens.weights[start:end]
        yield {
            "ids": ids[start:end],
            "learned": learned,
            "counts": end - start,
            "reads": int(learned.sum()),
            "truncated": cut,
            "responses": int((mask if cut else mask[start:end]).sum()),
            "learned_responses": int((mask[start:end] & learned).sum()) if example.weight else 0,
            "weights": example.weight,
            "pieces": number,
            "mass": float(own[learned].sum(dtype=np.float64) if len(own) else learned.sum()),
            "token_weights": own,
            "weight_counts": len(own),
        }


def _response_masks(
    examples: Sequence[Example | InvalidRow], settings: TokenSettings, tokenizer: Any
) -> Iterator[np.ndarray | None]:
    """Yield each example's mask of response tokens, None where it equals the loss mask or is unknown."""

    def differs(example: Example | InvalidRow) -> bool:
        if isinstance(example, Chat) and example.weights:
            return True
        if settings.loss_on == "completion":
            return isinstance(example, Chat) and any(
                m["role"] == "assistant" for m in example.messages[example.given : example.response]
            )
        return settings.loss_on == "all" and isinstance(example, Chat | Completion)

    others = [
        replace(example, weights={}) if isinstance(example, Chat) else example
        for example in examples
        if differs(example)
    ]
    tokenised = chat.tokenise_examples(others, tokenizer, "assistant", settings.template)
    for example in examples:
        found = next(tokenised) if differs(example) else None
        yield None if found is None or isinstance(found, InvalidRow) else found[1]


def _fits(name: str, learned: np.ndarray, settings: TokenSettings) -> bool:
    """Whether data.too_long keeps a row: whole, truncated or split. Raises ValueError if it ends the run."""
    if not learned.any():
        raise InvalidRow(
            name,
            "empty loss mask",
            f"the loss mask is empty with data.loss_on={settings.loss_on}; fix or remove the row, or "
            "set another data.loss_on",
        )
    limit = settings.max_length
    if len(learned) <= limit:
        return True
    remedy = f"{remedy_for_too_long('max_length')}, or truncate"
    if settings.too_long == "split" and not learned[1:].all():
        raise ValueError(
            f"{name}: {len(learned)} tokens are more than data.max_length={limit}, and data.too_long=split "
            f"only splits text rows, not responses to a prompt; {remedy}"
        )
    if settings.too_long == "error":
        raise ValueError(f"{name}: {len(learned)} tokens are more than data.max_length={limit}; {remedy}")
    if settings.too_long == "truncate":
        return bool(learned[:limit].any())  # a row without any of its response teaches nothing
    return settings.too_long == "split"


def remedy_for_too_long(limit: str) -> str:
    """Return what to do about a row that is longer than the setting `limit`, such as "max_length"."""
    return f"raise data.{limit} or set data.too_long=drop"
