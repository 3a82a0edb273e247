"""SFT rows as token ids with a loss mask, and the split into training and held-out rows."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, Self, TypeVar

import numpy as np
from jaxtyping import Bool, Int

from jaxft.data import cache as files
from jaxft.data import chat, formats
from jaxft.data.cache import ChunkColumns, ColumnType, ColumnTypes
from jaxft.data.example import Chat, Completion, Example
from jaxft.data.flat import Flat, RowNames
from jaxft.data.invalid import InvalidCount, InvalidRow, InvalidRows, add_counts, valid
from jaxft.data.row_files import Row
from jaxft.data.settings import DataSettings
from jaxft.data.template_settings import TemplateSettings
from jaxft.data.tokenise import DEFAULT_TOKENISING, RowKind, TokenisedDataset, Tokenising, tokenise_dataset

VERSION = 7  # increase it when the same rows become other tokens


@dataclass(frozen=True)
class TokenSettings:
    """The settings that the tokens and the loss mask of a row depend on; they are part of the cache key."""

    columns: tuple[str, ...]
    format: str
    loss_on: str
    max_length: int
    too_long: str
    template: TemplateSettings


SFT_COLUMNS: ColumnTypes = {
    "ids": ColumnType(np.int32, "counts"),
    "learned": ColumnType(np.bool_, "counts"),
    "counts": ColumnType(np.int32),
    "reads": ColumnType(np.int64),
    "truncated": ColumnType(np.bool_),
    "responses": ColumnType(np.int32),
    "learned_responses": ColumnType(np.int32),
    "ends": ColumnType(np.int32),
    "source": ColumnType(np.int32),
    "number": ColumnType(np.int64),
}


@dataclass(frozen=True, kw_only=True)
class TokenisedRows:
    """Examples one after the other: example i is ids[offsets[i]:offsets[i + 1]].

    learned: marks the tokens that are targets; the first token of an example never is. reads: target tokens
    of each example. truncated: marks truncated examples. responses, learned_responses: tokens of each
    example's responses before it is truncated, and how many of them are targets. ends: the last target of
    each example, apart from whitespace after it. names: of the dataset rows. digest: a hash of all columns.
    largest_id: the largest token id. dropped: number of rows that were left out because they are too long.
    invalid: the invalid rows that were left out. warnings: lines for the start of a run. cache: how the
    columns came about, see cache.load_or_make.
    """

    ids: Flat
    learned: Flat
    offsets: Int[np.ndarray, " examples_plus_1"]
    reads: Int[np.ndarray, " examples"]
    truncated: Bool[np.ndarray, " examples"]
    responses: Int[np.ndarray, " examples"]
    learned_responses: Int[np.ndarray, " examples"]
    ends: Int[np.ndarray, " examples"]
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


SomeRows = TypeVar("SomeRows", bound=TokenisedRows)


def tokenise_rows(
    ref: str, settings: TokenSettings, tokenizer: Any, how: Tokenising = DEFAULT_TOKENISING
) -> TokenisedRows:
    """Read the rows of `ref` and tokenise them, or load the tokens from the cache."""
    kind = RowKind(
        version=VERSION,
        key=astuple(settings),
        settings=settings,
        stored=SFT_COLUMNS,
        schemas=formats.SFT_SCHEMAS,
        tokenise=partial(_tokenise, settings=settings),
    )
    found = tokenise_dataset(ref, kind, tokenizer, how)
    some = found.examples
    examples = list(formats.normalise_each(some, settings.format, settings.columns)) if some else []
    checks = (chat.tools_warnings, chat.content_warnings, chat.prompt_warnings)
    warnings = [line for check in checks for line in check(examples, tokenizer, settings.template)]
    return TokenisedRows(**row_fields(ref, found, settings.max_length), warnings=tuple(warnings))


def row_fields(ref: str, found: TokenisedDataset, max_length: int) -> dict[str, Any]:
    """Return the fields of TokenisedRows but `warnings`. Raises ValueError if all rows are too long."""
    columns = dict(found.stored.columns)
    if not len(found.names):
        raise ValueError(
            f"{ref}: all {found.dropped} rows were dropped because they are longer than "
            f"data.max_length={max_length}; raise it"
        )
    long = {name: columns.pop(name) for name in ("ids", "learned")}
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
    """Return the last target of each sequence, apart from whitespace after it.

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


def split_rows(
    settings: DataSettings, tokenise: Callable[[str], SomeRows], held_out: Callable[[SomeRows], np.ndarray]
) -> tuple[SomeRows, Int[np.ndarray, " train"], Int[np.ndarray, " held"]]:
    """Return all examples, and the indices of the training and of the held-out ones.

    tokenise(ref): reads a dataset. held_out(examples): a mask of those to hold out if data.held_out is a
    fraction.
    """
    examples = tokenise(settings.train)
    everything = np.arange(len(examples))
    if not settings.holds_out:
        return examples, everything, everything[:0]
    if isinstance(settings.held_out, str):
        held = tokenise(settings.held_out)
        return examples.concatenate(held), everything, len(examples) + np.arange(len(held))
    if len(examples) < 2:
        raise ValueError(
            f"{settings.train}: data.held_out={settings.held_out} cannot split a single row; set "
            "data.held_out=none"
        )
    mask = held_out(examples)
    return examples, everything[~mask], everything[mask]


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
    tokenised = chat.tokenise_examples(examples, tokenizer, settings.loss_on, settings.template)
    responses = _response_masks(examples, settings, tokenizer)
    for number, (outcome, response) in enumerate(zip(tokenised, responses, strict=True)):
        with invalid.skip():
            ids, learned = valid(outcome)
            long = len(ids) > settings.max_length
            if long and settings.too_long == "drop":
                continue
            learned[0] = False
            _check_mask(rows[number].name, learned, settings)
            mask = learned if response is None else response
            ids, kept = ids[: settings.max_length], learned[: settings.max_length]
            columns["ids"].append(ids)
            columns["learned"].append(kept)
            columns["counts"].append(len(ids))
            columns["reads"].append(int(kept.sum()))
            columns["index"].append(number)
            columns["truncated"].append(long)
            columns["responses"].append(int(mask[1:].sum()))
            columns["learned_responses"].append(int((mask & learned)[1 : settings.max_length].sum()))
    columns |= {name: np.concatenate(columns[name]) for name in ("ids", "learned") if columns[name]}
    part = {
        name: np.asarray(x, SFT_COLUMNS[name].dtype) for name, x in columns.items() if name in SFT_COLUMNS
    }
    part["ends"] = last_targets(part["ids"], part["learned"], np.cumsum(part["counts"]), tokenizer)
    return part | {"index": np.asarray(columns["index"], np.int64)}


def _response_masks(
    examples: Sequence[Example | InvalidRow], settings: TokenSettings, tokenizer: Any
) -> Iterator[np.ndarray | None]:
    """Yield a mask of the response tokens of each example, None where it is the loss mask or is not known."""

    def differs(example: Example | InvalidRow) -> bool:
        if settings.loss_on == "completion":
            return isinstance(example, Chat) and any(
                m["role"] == "assistant" for m in example.messages[example.given : example.response]
            )
        return settings.loss_on == "all" and isinstance(example, Chat | Completion)

    others = [example for example in examples if differs(example)]
    tokenised = chat.tokenise_examples(others, tokenizer, "assistant", settings.template)
    for example in examples:
        found = next(tokenised) if differs(example) else None
        yield None if found is None or isinstance(found, InvalidRow) else found[1]


def _check_mask(name: str, learned: np.ndarray, settings: TokenSettings) -> None:
    if not learned.any():
        raise InvalidRow(
            name,
            "empty loss mask",
            f"the loss mask is empty with data.loss_on={settings.loss_on}; fix or remove the row, or "
            "set another data.loss_on",
        )
    limit = settings.max_length
    if len(learned) <= limit:
        return
    remedy = "raise data.max_length or set data.too_long=drop"
    if not learned[:limit].any():
        raise InvalidRow(
            name,
            "prompt longer than data.max_length",
            f"the prompt has {int(learned.argmax())} tokens, and data.max_length={limit} leaves no "
            "room for a response; raise data.max_length",
        )
    if settings.too_long == "error":
        raise ValueError(
            f"{name}: {len(learned)} tokens are more than data.max_length={limit}; {remedy} or truncate"
        )
