"""Normalise rows of several formats to one of three types: Text, Completion (of a prompt) or Chat.

Accepted formats (`format="auto"` uses the one whose columns are present):

    text               {"text"}
    messages           {"messages": [{"role", "content"}, ...]} and optionally "system"
    prompt-completion  {"prompt", "completion"}: strings or messages, see conversation.py
    instruction        {"instruction", "response" or "output"} and optionally "input", "history", "system"
    conversations      {"conversations": [{"from", "value"}, ...]} and optionally "system" (ShareGPT)

`format="plain"` takes the strings of prompt and completion as plain text. `columns=("prompt=question",
"completion=answer")` renames columns: left jaxft's name, right the dataset's. All formats but text may have
the columns "tools" (JSON schemas) and "chat_template_kwargs", and all of them "weight" (see loss_weights.py).

Names may have upper case and spaces around them. Rows that fit no format, but would with one of the
columns.COLUMN_SYNONYMS for each column that is missing, such as "question" and "answer", are read so.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from jaxft.data.columns import (
    COLUMN_SYNONYMS,
    FURTHER,
    column_of,
    further_columns,
    meant_columns,
    misspelled,
    other_name,
    respelled,
    suggested_columns,
    text_of,
)
from jaxft.data.conversation import PLAIN, chat_of, chats_of, plain_texts, response_index, split_row
from jaxft.data.example import Example, Text
from jaxft.data.invalid import InvalidRow, Value, attempt, similar_names, valid
from jaxft.data.loss_weights import row_weight
from jaxft.data.rows import Row

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # columns that any conversation may have
CHAT_COLUMNS = ("system", *TEMPLATE_COLUMNS, "weight")


@dataclass(frozen=True)
class Schemas:
    """The formats of one kind of rows.

    required: the columns of each format; a tuple lists the accepted names of one column. optional: further
    columns that a format may have. strings: the formats that may be plain text. example: the columns of one
    format, for error messages.
    """

    required: dict[str, tuple[tuple[str, ...], ...]]
    optional: dict[str, tuple[str, ...]]
    strings: tuple[str, ...]
    example: tuple[str, ...]


class RowFormat(NamedTuple):
    """The format of a dataset. plain: its strings are plain text, without a chat template. columns: (ours,
    theirs) of columns with other names, in addition to data.columns. unread: those of another format, which
    the rows have besides a text.
    """

    name: str
    plain: bool = False
    columns: tuple[tuple[str, str], ...] = ()
    unread: tuple[tuple[str, str], ...] = ()

    def note(self) -> list[str]:
        """Return a line about columns with other names, [] without any."""
        if self.unread:
            names = " and ".join(theirs.strip() for _, theirs in self.unread)
            setting = ",".join(f"{ours}={theirs.strip()}" for ours, theirs in self.unread)
            return [f"the column text is read, not {names}; otherwise set data.columns={setting}"]
        if not self.columns:
            return []
        read = ", ".join(f"{theirs.strip()} as {ours}" for ours, theirs in self.columns)
        setting = ",".join(f"{ours}={theirs.strip()}" for ours, theirs in self.columns)
        return [f"columns are read by other names: {read} (data.columns={setting})"]


SFT_SCHEMAS = Schemas(
    required={
        "text": (("text",),),
        "messages": (("messages",),),
        "prompt-completion": (("prompt",), ("completion",)),
        "instruction": (("instruction",), ("response", "output")),
        "conversations": (("conversations",),),
    },
    optional={
        "text": ("weight",),
        "messages": CHAT_COLUMNS,
        "prompt-completion": CHAT_COLUMNS,
        "instruction": ("input", "history", *CHAT_COLUMNS),
        "conversations": CHAT_COLUMNS,
    },
    strings=("text", "prompt-completion"),
    example=("prompt", "completion"),
)


def normalise_rows(rows: Sequence[Row], format: str = "auto", columns: Sequence[str] = ()) -> list[Example]:
    """Return every row as an Example. All have one format, by default the one that most rows fit.

    Raises InvalidRow for the first row that does not have it, and ValueError for wrong settings.
    """
    examples: list[Example] = []
    for outcome in normalise_each(rows, format, columns):
        if isinstance(outcome, InvalidRow):
            raise outcome
        examples.append(outcome)
    return examples


def normalise_each(
    rows: Sequence[Row], format: str = "auto", columns: Sequence[str] = ()
) -> Iterator[Example | InvalidRow]:
    """Yield every row as an Example or an InvalidRow; see normalise_rows."""
    found = choose_format(count_columns(rows, columns, SFT_SCHEMAS), format, columns, SFT_SCHEMAS)
    return normalise_as(found, rows, columns)


def normalise_as(
    format: RowFormat, rows: Iterable[Row], columns: Sequence[str] = ()
) -> Iterator[Example | InvalidRow]:
    """Yield every row as an Example of this format or an InvalidRow."""

    def convert(row: Row | InvalidRow) -> Example:
        return replace(_example(valid(row), format), weight=row_weight(valid(row)))

    found = (attempt(convert, row) for row in rename_rows(format, rows, columns, SFT_SCHEMAS))
    return by_their_names(found, format, columns)


def by_their_names(
    outcomes: Iterable[Value | InvalidRow], format: RowFormat, columns: Sequence[str]
) -> Iterator[Value | InvalidRow]:
    """Yield the outcomes; errors call renamed columns as the file does."""
    theirs = {ours: name.strip() for ours, name in (*map(split_column, columns), *format.columns)}

    def named(text: str) -> str:
        return re.sub(r"column '(\w+)'", lambda m: f"column {theirs.get(m[1], m[1])!r}", text)

    for outcome in outcomes:
        if theirs and isinstance(outcome, InvalidRow):
            yield InvalidRow(outcome.name, named(outcome.reason), named(outcome.problem))
        else:
            yield outcome


# ---- which format


@dataclass
class ColumnCounts:
    """Which columns the rows of a dataset have; its format is chosen from them.

    rows: non-null columns -> the number of rows with exactly these, and the first such row, whose fields are
    None for a null column and True for others. first: the dataset's first row in that form, or its error.
    """

    rows: dict[tuple[str, ...], tuple[int, Row]] = field(default_factory=dict)
    first: Row | InvalidRow | None = None

    def merge(self, later: "ColumnCounts") -> None:
        """Add the counts of later rows."""
        for names, (count, row) in later.rows.items():
            known, first = self.rows.get(names, (0, row))
            self.rows[names] = (known + count, first)
        self.first = self.first or later.first


def count_columns(rows: Iterable[Row], columns: Sequence[str], schemas: Schemas) -> ColumnCounts:
    """Count the columns of rows after they are renamed by `columns` (see data.columns)."""
    counts, naming = ColumnCounts(), _Names.of(columns, schemas)
    for row in rows:
        renamed = attempt(_rename, row, naming)
        if isinstance(renamed, Row):
            present = {column: None if x is None else True for column, x in renamed.fields.items()}
            renamed = Row(renamed.name, present)
            names = tuple(_present(present))
            known, first = counts.rows.get(names, (0, renamed))
            counts.rows[names] = (known + 1, first)
        counts.first = counts.first or renamed
    return counts


def choose_format(counts: ColumnCounts, format: str, columns: Sequence[str], schemas: Schemas) -> RowFormat:
    """Return the format of a dataset. format: data.format; "auto" chooses the format that most rows fit.

    Raises the first row's InvalidRow if no row fits any format.
    """
    mapping, plain = _column_mapping(columns, schemas), format == PLAIN
    chosen, others = format, tuple[tuple[str, str], ...]()
    if format in ("auto", PLAIN):
        chosen, others = _most_common_format(counts, set(mapping), schemas)
        others = tuple(item for item in others if not (plain and item[0] in FURTHER))
    if chosen not in schemas.required:
        known = ", ".join(schemas.required)
        raise ValueError(f"data.format={format!r}; use auto, {PLAIN} or one of {known}")
    if plain and chosen not in schemas.strings:
        raise ValueError(
            f"data.format={PLAIN} is for {' and '.join(schemas.strings)} rows, and these rows have format "
            f"{chosen}; set data.format=auto"
        )
    unread = _unread(counts, schemas) if (format, chosen) == ("auto", "text") else ()
    return RowFormat(chosen, plain, others, unread)


def _unread(counts: ColumnCounts, schemas: Schemas) -> tuple[tuple[str, str], ...]:
    """Return (ours, theirs) of a format's columns that rows with a text have too by other names."""
    _, row = max(counts.rows.values(), key=lambda found: found[0])
    rest = {column: x for column, x in row.fields.items() if column != "text"}
    found = attempt(_detect_by_other_names, Row(row.name, rest), set(), schemas)
    return () if isinstance(found, InvalidRow) else found[1]


def rename_rows(
    format: RowFormat, rows: Iterable[Row], columns: Sequence[str], schemas: Schemas
) -> Iterator[Row | InvalidRow]:
    """Yield the rows with renamed columns, or an InvalidRow for one without a column that format requires."""
    names = _Names.of(columns, schemas)
    names = names._replace(others=format.columns)

    def rename(row: Row) -> Row:
        return _require_columns(_rename(row, names), format.name, schemas)

    return (attempt(rename, row) for row in rows)


def _most_common_format(
    counts: ColumnCounts, mapped: set[str], schemas: Schemas
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return the format that most rows fit, and the columns with other names that it needs if no row fits
    one without, and further ones of its rows. Raises the first row's InvalidRow if none fits one with these
    either.
    """
    for detect in (_detect_as_named, _detect_by_other_names):
        votes: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
        rows = defaultdict[Any, list[Row]](list)
        for count, row in counts.rows.values():
            found = attempt(detect, row, mapped, schemas)
            if not isinstance(found, InvalidRow):
                votes[found] += count
                rows[found].append(row)
        if votes:
            format, columns = best = votes.most_common(1)[0][0]
            each = (further_columns(row.fields, schemas.optional[format]) for row in rows[best])
            return format, (*columns, *dict.fromkeys(item for more in each for item in more.items()))
    if counts.first is None:
        raise ValueError("no rows to read the format from")
    return _detect_as_named(valid(counts.first), mapped, schemas)


def _detect_as_named(row: Row, mapped: set[str], schemas: Schemas) -> tuple[str, tuple[tuple[str, str], ...]]:
    return _detect(row, mapped, schemas), ()


def _detect_by_other_names(
    row: Row, mapped: set[str], schemas: Schemas
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return the format that a row fits with the fewest COLUMN_SYNONYMS, and these."""
    found = dict[str, dict[str, str]]()
    for format, required in schemas.required.items():
        ours_of = set(schemas.optional[format]) | {c for names in required for c in names}
        missing = [names for names in required if not any(row.fields.get(c) is not None for c in names)]
        if not missing and mapped <= ours_of:
            return _detect_as_named(row, mapped, schemas)  # raises that it fits two formats
        others = {names[0]: other_name(row.fields, names[0]) for names in missing}
        taken = [theirs for theirs in others.values() if theirs is not None]
        if missing and len({*taken}) == len(missing) and mapped <= ours_of:
            found[format] = dict(zip(others, taken, strict=True))
    fewest = min(map(len, found.values()), default=0)
    best = [format for format, others in found.items() if len(others) == fewest]
    if len(best) != 1:
        raise InvalidRow(row.name, "columns of no format", "no format fits with other names of columns")
    return best[0], tuple(found[best[0]].items())


def describe_schemas(schemas: Schemas) -> str:
    """Return the formats and their columns in one line."""
    formats = schemas.required.items()
    return "; ".join(f"{name} ({' + '.join(' or '.join(c) for c in columns)})" for name, columns in formats)


def known_columns(schemas: Schemas) -> list[str]:
    """Return the names of all columns that the formats may have."""
    return sorted(
        {c for group in schemas.required.values() for names in group for c in names}
        | {c for o in schemas.optional.values() for c in o}
    )


def names_in_datasets(schemas: Schemas) -> list[str]:
    """Return the names of columns that the formats are read from, with COLUMN_SYNONYMS."""
    known = known_columns(schemas)
    return [*known, *(name for ours in known for name in COLUMN_SYNONYMS.get(ours, ()))]


def _column_mapping(columns: Sequence[str], schemas: Schemas) -> dict[str, str]:
    known = known_columns(schemas)
    mapping: dict[str, str] = {}
    for item in columns:
        ours, theirs = split_column(item)
        if ours not in known:
            remedy = f"use one of {', '.join(similar_names(ours, known))}"
            if theirs in known:
                remedy += f", or write {theirs}={ours} if {ours!r} is the column of the rows"
            raise ValueError(f"data.columns: {item!r} maps to unknown column {ours!r}; {remedy}")
        if ours in mapping:
            raise ValueError(
                f"data.columns: {ours!r} is mapped twice, from {mapping[ours]!r} and {theirs!r}; keep one"
            )
        mapping[ours] = theirs
    return mapping


def split_column(item: str) -> tuple[str, str]:
    """Split an item of data.columns, "ours=theirs". Raises ValueError for another form."""
    ours, equals, theirs = (part.strip() for part in item.partition("="))
    if not (ours and equals and theirs):
        raise ValueError(
            f"data.columns: {item!r} is not of the form ours=theirs, for example prompt=question"
        )
    return ours, theirs


class _Names(NamedTuple):
    """How columns are renamed. mapping: data.columns. others: (ours, theirs) of columns with other names.
    known: all columns that the formats may have. optional: those that a row may lack. spellings: all names of
    a mapped column, such as response and output.
    """

    mapping: dict[str, str]
    known: frozenset[str]
    optional: frozenset[str]
    spellings: frozenset[str]
    others: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, columns: Sequence[str], schemas: Schemas) -> "_Names":
        mapping = _column_mapping(columns, schemas)
        alike = [names for group in schemas.required.values() for names in group if {*names} & {*mapping}]
        return cls(
            mapping,
            frozenset(known_columns(schemas)),
            frozenset(c for extra in schemas.optional.values() for c in extra),
            frozenset(c for names in alike for c in names),
        )


def _rename(row: Row, names: _Names) -> Row:
    """Return the row with the columns that data.columns, their spelling or their other names say.

    Other spellings of a mapped column, such as output for response, are removed.
    """
    known = respelled(tuple(row.fields), names.known)
    if known:
        mapped = [column_of(row.fields, theirs) for theirs in names.mapping.values()]
        respelt = {theirs: ours for ours, theirs in known.items() if theirs not in mapped}
        row = Row(row.name, {respelt.get(name, name): value for name, value in row.fields.items()})
    for ours, theirs in names.others:
        if row.fields.get(ours) is None and theirs in row.fields:
            row = Row(row.name, {ours if name == theirs else name: x for name, x in row.fields.items()})
    if not names.mapping:
        return row
    mapping = {ours: column_of(row.fields, theirs) for ours, theirs in names.mapping.items()}
    for ours, theirs in mapping.items():
        if theirs not in row.fields and ours not in names.optional:
            raise InvalidRow(
                row.name,
                f"missing column {theirs!r}",
                f"no column {theirs!r}, which data.columns={ours}={theirs} names; the row has "
                f"{', '.join(map(str, row.fields))}",
            )
    others = {c: v for c, v in row.fields.items() if c not in mapping.values() and c not in names.spellings}
    return Row(row.name, others | {ours: row.fields.get(theirs) for ours, theirs in mapping.items()})


def _present(fields: dict) -> dict:
    """Return the columns that are not null; a table has null where a row of another format has no column."""
    return {column: value for column, value in fields.items() if value is not None}


def _has(fields: dict, columns: tuple[tuple[str, ...], ...]) -> bool:
    return all(any(c in fields for c in names) for names in columns)


def _detect(row: Row, mapped: set[str], schemas: Schemas) -> str:
    needed = schemas.required

    def uses_mapped(name: str) -> bool:  # a format without a column of data.columns is not meant
        return mapped <= {c for names in needed[name] for c in names} | set(schemas.optional[name])

    def fitting(fields: dict) -> list[str]:
        fits = [name for name, columns in needed.items() if _has(fields, columns) and uses_mapped(name)]
        return [name for name in fits if not any(set(needed[name]) < set(needed[other]) for other in fits)]

    fits = fitting(row.fields)
    if len(fits) > 1:
        fits = fitting(_present(row.fields)) or fits
    if len(fits) == 1:
        return fits[0]
    columns = ", ".join(map(str, row.fields))
    if fits:
        raise InvalidRow(
            row.name,
            "columns of two formats",
            f"the columns {columns} fit the formats {' and '.join(fits)}; set data.format to one of them",
        )
    names = [str(name) for name in row.fields]
    if {"chosen", "rejected"} <= {name.strip().lower() for name in names} and schemas == SFT_SCHEMAS:
        raise InvalidRow(
            row.name,
            "columns of no format",
            f"the columns {columns} are those of preference pairs; train on pairs with the recipe dpo",
        )
    if schemas != SFT_SCHEMAS and _only_sft(row.fields):
        raise InvalidRow(
            row.name,
            "columns of no format",
            f"the columns {columns} are those of SFT, for which there is the recipe sft; accepted here are "
            f"{describe_schemas(schemas)}",
        )
    ours = _nearest_columns(names, schemas)
    near = misspelled(names, ours)
    meant = f"did you mean {' and '.join(f'{ours} for {theirs!r}' for ours, theirs in near.items())}? "
    raise InvalidRow(
        row.name,
        "columns of no format",
        f"the columns {columns} fit no format; {meant if near else ''}accepted are "
        f"{describe_schemas(schemas)}; rename columns, for example with "
        f"{suggested_columns(names, ours)}",
    )


def _only_sft(fields: dict) -> bool:
    """Whether a row has the columns of SFT, and no other one that could be a response or a label."""
    return any(
        _has(fields, needs) and {*fields} <= {"id", *sum(needs, ()), *SFT_SCHEMAS.optional[name]}
        for name, needs in SFT_SCHEMAS.required.items()
    )


def _nearest_columns(names: Sequence[str], schemas: Schemas) -> list[str]:
    """Return the missing columns of the format that has the fewest without a name that may be meant, and the
    most with one; those of the example if no name is one of any format.
    """
    formats: list[tuple[int, int, list[str]]] = []
    for groups in schemas.required.values():
        missing = [group for group in groups if not {*group} & {*names}]
        meant = meant_columns(names, [column for group in missing for column in group])
        columns = [next((c for c in group if c in meant), group[0]) for group in missing]
        unknown = sum(column not in meant for column in columns)
        if unknown < len(groups):
            formats.append((unknown, unknown - len(groups), columns))
    fewest = min(formats, key=lambda found: found[:2], default=None)
    return fewest[2] if fewest else list(schemas.example)


def _require_columns(row: Row, format: str, schemas: Schemas) -> Row:
    fields, required = row.fields, schemas.required[format]
    if not _has(fields, required):
        missing = next(names for names in required if not any(c in fields for c in names))
        raise InvalidRow(
            row.name,
            f"missing column {' or '.join(map(repr, missing))}",
            f"no column {' or '.join(missing)}, which format {format} requires; the row has "
            f"{', '.join(map(str, fields))}; accepted formats are {describe_schemas(schemas)}; rename "
            f"columns, for example with {suggested_columns(list(fields), missing[:1])}",
        )
    return row


def _example(row: Row, chosen: RowFormat) -> Example:
    format = chosen.name
    if format == "text":
        return Text(row.name, text_of(row, "text"))
    if chosen.plain:
        return plain_texts(row, {"completion": "completion"})["completion"]
    if format in ("prompt-completion", "instruction"):
        prompt = "prompt" if format == "prompt-completion" else format
        response = "completion" if format == "prompt-completion" else response_column(row)
        return chats_of(row, split_row(row, prompt, {"completion": response}))["completion"]
    turns = split_row(row, format, {}).prompt
    return chat_of(row, turns, response_index(turns))


def response_column(row: Row) -> str:
    """Return the column of the response to an instruction, response or output."""
    columns = [c for c in ("response", "output") if c in row.fields]
    names = [c for c in columns if row.fields[c] is not None] or columns[:1]
    if len(names) > 1:
        raise InvalidRow(
            row.name,
            "two response columns",
            "the row has both 'response' and 'output'; choose one with data.columns=response=...",
        )
    return names[0]


def number_of(row: Row, column: str, setting: str) -> float:
    """Return the finite number in a column that a setting names. Raises InvalidRow for anything else."""
    value: Any = row.fields.get(column)
    if value is None:
        columns = ", ".join(map(str, row.fields))
        raise InvalidRow(
            row.name,
            "missing number",
            f"no number in column {column!r}, which {setting} names; the row has {columns}",
        )
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # CSV files have strings alone
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InvalidRow(
            row.name,
            "missing number",
            f"column {column!r} ({setting}) is {repr(value)[:40]}; use a finite number",
        )
    return number
