"""SFT rows as token ids with a loss mask, and the split into training and held-out rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from jaxtyping import Bool, Int

from jaxft.data import cache as files
from jaxft.data import chat, formats
from jaxft.data.cache import Arrays
from jaxft.data.example import Chat, Completion, Example
from jaxft.data.invalid import InvalidRow, InvalidRows, valid
from jaxft.data.rows import Row, read_rows
from jaxft.data.settings import DataSettings
from jaxft.data.template_settings import TemplateSettings

VERSION = 6  # increase it when the same rows become other tokens


@dataclass(frozen=True)
class TokenSettings:
    """The settings that the tokens and the loss mask of a row depend on; they are part of the cache key."""

    columns: tuple[str, ...]
    format: str
    loss_on: str
    max_length: int
    too_long: str
    template: TemplateSettings


@dataclass(frozen=True, kw_only=True)
class TokenisedRows:
    """Examples one after the other: example i is ids[offsets[i]:offsets[i + 1]].

    learned: marks the tokens that are targets; the first token of an example never is. row_numbers: the
    dataset row of each example. truncated: marks truncated examples. responses, learned_responses: tokens of
    each example's responses before it is truncated, and how many of them are targets. names: of the dataset
    rows. dropped: number of rows that were left out because they are too long. invalid: the invalid rows that
    were left out. warnings: lines for the start of a run. cache: how the arrays came about, see
    cache.load_or_make.
    """

    DTYPES: ClassVar[dict[str, Any]] = {
        "ids": np.int32, "learned": np.bool_, "offsets": np.int64, "row_numbers": np.int64,
        "truncated": np.bool_, "responses": np.int64, "learned_responses": np.int64,
    }  # fmt: skip

    ids: Int[np.ndarray, " tokens"]
    learned: Bool[np.ndarray, " tokens"]
    offsets: Int[np.ndarray, " examples_plus_1"]
    row_numbers: Int[np.ndarray, " examples"]
    truncated: Bool[np.ndarray, " examples"]
    responses: Int[np.ndarray, " examples"]
    learned_responses: Int[np.ndarray, " examples"]
    names: tuple[str, ...]
    dropped: int = 0
    invalid: tuple[InvalidRow, ...] = ()
    warnings: tuple[str, ...] = ()
    cache: str = field(default="off", compare=False)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def lengths(self) -> Int[np.ndarray, " examples"]:
        """Tokens of each example."""
        return np.diff(self.offsets)

    @cached_property
    def reads(self) -> Int[np.ndarray, " examples"]:
        """Target tokens of each example."""
        return np.diff(np.concatenate([[0], np.cumsum(self.learned)])[self.offsets])

    def concatenate(self, other: Self) -> Self:
        """Return the examples of both, the other's last."""
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(self, name), getattr(other, name)])
            for name in self.DTYPES
            if name != "offsets"
        }
        offsets = np.concatenate([self.offsets, other.offsets[1:] + self.offsets[-1]])
        names, dropped = self.names + other.names, self.dropped + other.dropped
        invalid = self.invalid + other.invalid
        warnings = tuple(dict.fromkeys(self.warnings + other.warnings))
        return replace(
            self, **arrays, offsets=offsets, names=names, dropped=dropped, invalid=invalid, warnings=warnings
        )


SomeRows = TypeVar("SomeRows", bound=TokenisedRows)


def tokenise_rows(
    ref: str,
    settings: TokenSettings,
    tokenizer: Any,
    cache: Path | None = None,
    invalid_limit: float | None = None,
) -> TokenisedRows:
    """Read the rows of `ref` and tokenise them, or load the tokens from the cache.

    invalid_limit: see InvalidRows.
    """
    invalid = InvalidRows(invalid_limit)
    rows = read_rows(ref, invalid)
    key = files.content_key(rows, tokenizer, VERSION, astuple(settings))
    arrays, state = files.load_or_make(
        files.row_cache_folder(cache) / f"{key}.npz",
        TokenisedRows.DTYPES | files.INVALID_DTYPE,
        lambda arrays: _is_sound(arrays, len(rows)),
        lambda: _tokenise(rows, settings, tokenizer, InvalidRows(invalid_limit)),
    )
    some = first_rows([rows[i] for i in arrays["row_numbers"]], settings.columns)
    examples = list(formats.normalise_each(some, settings.format, settings.columns)) if some else []
    checks = (chat.tools_warnings, chat.content_warnings, chat.prompt_warnings)
    warnings = [line for check in checks for line in check(examples, tokenizer, settings.template)]
    return TokenisedRows(
        **arrays_and_rows(ref, rows, arrays, invalid, settings.max_length),
        warnings=tuple(warnings),
        cache=state,
    )


def first_rows(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """Return the first row, the first with a system message and the first with tools, on which warnings look.

    rows: the valid ones. columns: see data.columns.
    """
    return [*rows[:1], *_first_row_with_system(rows), *_first_row_with_tools(rows, columns)]


def _first_row_with_tools(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """Return the first row that has tools, [] without any. columns: see data.columns."""
    renamed = (item.partition("=") for item in columns)
    name = next((theirs.strip() for ours, _, theirs in renamed if ours.strip() == "tools"), "tools")
    return [row for row in rows if row.fields.get(name)][:1]


def _first_row_with_system(rows: Sequence[Row]) -> list[Row]:
    """Return the first row with a column of messages that begins with a system message, [] without any."""

    def begins(value: Any) -> bool:
        first = value[0] if isinstance(value, list | tuple) and value else None
        return isinstance(first, dict) and "system" in (first.get("role"), first.get("from"))

    return [row for row in rows if row.fields.get("system") or any(map(begins, row.fields.values()))][:1]


def arrays_and_rows(
    ref: str, rows: Sequence[Row], arrays: Arrays, invalid: InvalidRows, max_length: int
) -> dict[str, Any]:
    """Return the fields of TokenisedRows but `cache`: the arrays, names and what was left out.

    rows: those that can be read. arrays: as load_or_make returns them. invalid: the rows that cannot be read.
    Raises ValueError if too many rows are invalid or none is left.
    """
    total = len(rows) + len(invalid.found)
    arrays = dict(arrays)
    packed = files.unpack_invalid(arrays.pop("invalid"))
    for error in packed:
        invalid.add(error)
    invalid.check(ref, total)
    if not len(arrays["row_numbers"]):
        raise ValueError(
            f"{ref}: all {len(rows) - len(packed)} rows were dropped because they are longer than "
            f"data.max_length={max_length}; raise it"
        )
    names = tuple(rows[i].name for i in arrays["row_numbers"])
    dropped = len(rows) - len(packed) - len(names)
    return {**arrays, "names": names, "dropped": dropped, "invalid": tuple(invalid.found)}


def count_learned_ends(
    rows: TokenisedRows, ends: Int[np.ndarray, " sequences"], tokenizer: Any
) -> dict[int, int]:
    """Count the token ids that are the last target of a sequence, apart from whitespace after it.

    ends: index after the last token of each sequence.
    """
    targets = np.flatnonzero(rows.learned)
    last = np.searchsorted(targets, ends) - 1
    for _ in range(2):  # a template that ends turns with a line break learns it
        found = rows.ids[targets[last]]
        blank = [int(i) for i in np.unique(found) if not tokenizer.decode([int(i)]).strip()]
        last = np.maximum(last - np.isin(found, blank), 0)
    ids, counts = np.unique(rows.ids[targets[last]], return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


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


def _tokenise(rows: Sequence[Row], settings: TokenSettings, tokenizer: Any, invalid: InvalidRows) -> Arrays:
    examples = list(formats.normalise_each(rows, settings.format, settings.columns)) if rows else []
    pieces, masks, row_numbers, truncated = [], [], [], []
    counts: list[tuple[int, int]] = []
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
            pieces.append(ids[: settings.max_length])
            masks.append(learned[: settings.max_length])
            row_numbers.append(number)
            truncated.append(long)
            mask = learned if response is None else response
            counts.append((int(mask[1:].sum()), int((mask & learned)[1 : settings.max_length].sum())))
    values = {
        "ids": np.concatenate(pieces) if pieces else [],
        "learned": np.concatenate(masks) if masks else [],
        "offsets": np.cumsum([0, *map(len, pieces)]),
        "row_numbers": row_numbers,
        "truncated": truncated,
        "responses": [total for total, _ in counts],
        "learned_responses": [targets for _, targets in counts],
    }
    arrays = {name: np.asarray(values[name], dtype) for name, dtype in TokenisedRows.DTYPES.items()}
    return {**arrays, "invalid": files.pack_invalid(invalid.found)}


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
            f"room for a response; {remedy}",
        )
    if settings.too_long == "error":
        raise ValueError(
            f"{name}: {len(learned)} tokens are more than data.max_length={limit}; {remedy} or truncate"
        )


def _is_sound(arrays: Arrays, row_count: int) -> bool:
    """Whether the sizes of loaded arrays agree with one another and with the number of rows."""
    tokens, examples = len(arrays["ids"]), len(arrays["row_numbers"])
    sizes = {"learned": tokens, "offsets": examples + 1}
    sizes |= dict.fromkeys(("truncated", "responses", "learned_responses"), examples)
    fits = all(len(arrays[name]) == size for name, size in sizes.items()) and arrays["offsets"][-1] == tokens
    return bool(fits and (arrays["row_numbers"] < row_count).all())
