"""Choose the format of a dataset by the columns of its rows, and read the rows in it.

`columns=("prompt=question", "completion=answer")` renames columns: left jaxft's name, right the dataset's. In
this file the former is called `ours`, the latter `theirs`. Names may have upper case and spaces around them.
If no row fits a format, synonyms are tried: columns such as "question" in place of "prompt"
(COLUMN_SYNONYMS).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

from jaxft.data.decisions import DECISION, LABEL, NO_LABEL, VALUE, answer_readings, label_names, reading_of
from jaxft.data.row_settings import DEFAULT_ROW_SETTINGS, RowSettings
from jaxft.data.rows.columns import (
    COLUMN_SYNONYMS,
    FURTHER,
    MEDIA,
    column_of,
    further_columns,
    meant_columns,
    misspelled,
    other_name,
    require_text_alone,
    respelled,
    suggested_columns,
)
from jaxft.data.rows.conversation import PLAIN, prompt_in_columns
from jaxft.data.rows.example import Chat, Completion, ParsedRow
from jaxft.data.rows.formats import (
    DECISIONS,
    RATED,
    ROW_FORMATS,
    TASKS,
    RowFormat,
    formats_of,
    number_of,
    own_columns,
)
from jaxft.data.rows.invalid_rows import InvalidRow, attempt, similar_names, valid
from jaxft.data.rows.published_formats import with_ratings
from jaxft.data.rows.row_files import Row

Formats = Mapping[str, RowFormat]
TEXT = "text"  # the format, and its column
MOST_LABELS = 100  # that are counted
OtherNames = tuple[tuple[str, str], ...]  # (name in the format, name in the dataset) of columns


class ChosenFormat(NamedTuple):
    """The format of a dataset, chosen from its rows.

    plain: strings are plain text, without a chat template. columns: (the format's name, the dataset's name)
    of each renamed column, in addition to data.columns. unread: (the format's name, the dataset's name) of
    columns that are not read, because the rows have both a text and another format. labels: the labels of a
    classifier's rows if data.labels is not set. reading: how answers name a choice, see decisions.READINGS.
    """

    name: str
    plain: bool = False
    columns: OtherNames = ()
    unread: OtherNames = ()
    labels: tuple[str, ...] = ()
    reading: str = VALUE

    @classmethod
    def of(cls, stored: list[Any]) -> "ChosenFormat":
        """Return the format that a cache file stores as a JSON list."""
        name, plain, columns, unread, labels, reading = stored
        return cls(name, plain, tuple(map(tuple, columns)), tuple(map(tuple, unread)), tuple(labels), reading)

    def note(self) -> list[str]:
        """Return a line about columns or labels that may be read otherwise than expected, [] without any."""
        if self.unread and self.name != TEXT:
            return [f"the columns of format {self.name} are read, not text; data.format=text reads it"]
        if self.unread:
            names = " and ".join(theirs.strip() for _, theirs in self.unread)
            setting = ",".join(f"{ours}={theirs.strip()}" for ours, theirs in self.unread)
            return [f"the column text is read, not {names}; to read these, set data.columns={setting}"]
        if {*self.labels} == {NO_LABEL, "0", "1"}:
            return ["the label -1 is a choice as 0 and 1 are; data.labels=0,1 reads it as no label"]
        if self.labels[:1] == ("0",) and all(map(str.isdecimal, self.labels)):
            return ["the labels are numbers; data.labels=NAME,NAME,... gives 0, 1, ... names"]
        if not self.columns:
            return []
        read = ", ".join(f"{theirs.strip()} as {ours}" for ours, theirs in self.columns)
        setting = ",".join(f"{ours}={theirs.strip()}" for ours, theirs in self.columns)
        return [f"columns are read by other names: {read} (data.columns={setting})"]


def parse_rows(
    format: ChosenFormat, rows: Iterable[Row], settings: RowSettings, task: str
) -> Iterator[ParsedRow | InvalidRow]:
    """Yield each row's prompt and responses, or its error, which has the file's names of renamed columns."""
    formats = formats_of(task, settings.numbers, settings.unlabelled)
    chosen, order_by = formats[format.name], settings.order_by
    settings = replace(settings, labels=format.labels or settings.labels, reading=format.reading)

    def convert(row: Row) -> ParsedRow:
        row = _require_columns(_rename(row, names), format.name, formats)
        require_text_alone(row)
        row = chosen.rewrite(row, settings)
        row = with_ratings(row, settings) if "rank_2" in settings.kinds else row
        examples, weight = chosen.parse(row, settings), chosen.weight(row, settings)
        numbers = tuple(number_of(row, column, "data.extras") for column in settings.extras)
        order = 0.0 if order_by is None else number_of(row, order_by, "data.order_by")
        return ParsedRow(row.name, examples, weight, order, numbers)

    theirs = {ours: x.strip() for ours, x in (*map(split_column, settings.columns), *format.columns)}

    def named(text: str) -> str:
        return re.sub(r"column '(\w+)'", lambda m: f"column {theirs.get(m[1], m[1])!r}", text)

    names = _Names.of(settings.columns, formats)._replace(others=format.columns)
    for row in rows:
        parsed = attempt(convert, row)
        if theirs and isinstance(parsed, InvalidRow):
            parsed = InvalidRow(parsed.name, named(parsed.reason), named(parsed.problem))
        yield parsed


def parse_dataset(
    rows: Sequence[Row], task: str, settings: RowSettings = DEFAULT_ROW_SETTINGS
) -> list[ParsedRow | InvalidRow]:
    """Return each row's prompt and responses, or the error that makes it invalid. All rows have one format,
    by default the one that most of them fit. task: see RowFormat. Raises the errors of choose_format.
    """
    formats = formats_of(task, settings.numbers, settings.unlabelled)
    counts = count_columns(rows, settings.columns, formats)
    format = choose_format(counts, settings.format, settings.columns, formats)
    return [*parse_rows(format, rows, settings, task)]


# ---- prompts without responses


def prompt_of(row: Row, format: str = "auto") -> Chat | Completion:
    """Return a row's prompt without a response, as its format in ROW_FORMATS reads it; the prompt of a
    question lists its choices.

    format: one of conversation.PROMPT_FORMATS. Raises InvalidRow.
    """
    require_text_alone(row)
    known, columns = _prompt_format(tuple(name for name, x in row.fields.items() if x is not None))
    if format != "auto" or known is None or known.prompt is None:
        return prompt_in_columns(row, format)
    renamed = {ours: row.fields[theirs] for ours, theirs in columns}
    return prompt_in_columns(known.prompt(Row(row.name, {**row.fields, **renamed})))


@lru_cache(maxsize=1024)
def _prompt_format(names: tuple[str, ...]) -> tuple[RowFormat | None, OtherNames]:
    """Return the format of rows with these columns, and (ours, theirs) of its columns with other names. None
    for rows whose prompt is in one of PROMPT_COLUMNS, or that fit no format.
    """
    formats = [x if x.name != DECISION else replace(x, required=x.required[:2]) for x in ROW_FORMATS]
    formats = [x for x in formats if x.prompt is not None]
    spelled = respelled(names, frozenset(c for x in formats for c in x.columns))
    fields = {**dict.fromkeys(names, True), **dict.fromkeys(spelled, True)}
    other = other_name(fields, "choices") if "choices" not in fields and "question" in fields else None
    if {"prompt", "instruction"} & {*fields}:
        return None, ()
    others = {**spelled, **({"choices": other} if other else {})}
    fields |= dict.fromkeys(others, True)
    fits = [x for x in formats if _has(fields, x.required)]
    if "question" in fields:  # a context of it is no prompt
        fits = [x for x in fits if x.task == DECISIONS]
    return max(fits, key=lambda x: len(x.required), default=None), tuple(others.items())


# ---- which format


def task_of(
    row: Row, columns: Sequence[str], tasks: Sequence[str], settings: RowSettings = DEFAULT_ROW_SETTINGS
) -> str:
    """Return the first of the tasks that has a format for a row, the last one if none has. columns: see
    data.columns. The row's values must fit too: responses in a list need ratings, unless settings.best_first
    is set, and a label must be true or false.
    """
    for task in tasks:
        formats = formats_of(task)
        try:
            counts = count_columns([row], columns, formats)
            known = formats[choose_format(counts, "auto", columns, formats).name]
        except ValueError:  # no format, or data.columns names columns of another task
            continue
        fits = counts.first is not None and known.fits(valid(counts.first))
        if fits or (known.name == RATED and settings.best_first):
            return task
    return tasks[-1]


@dataclass
class ColumnCounts:
    """Counts of the columns of a dataset's rows, from which its format is chosen.

    rows: non-null columns -> the number of rows with exactly these, and the first such row, whose fields are
    None for a null column and True for others. first: the dataset's first row, or its error. labels: the
    labels in the rows, if a format is a classifier's; only some if there are more than MOST_LABELS. answers:
    decisions.answer_readings -> number of rows, if a format is for decisions.
    """

    rows: dict[tuple[str, ...], tuple[int, Row]] = field(default_factory=dict)
    first: Row | InvalidRow | None = None
    labels: set[str] = field(default_factory=set)
    answers: Counter[tuple[str, ...]] = field(default_factory=Counter)

    def merge(self, later: "ColumnCounts") -> None:
        """Add the counts of later rows."""
        for names, (count, row) in later.rows.items():
            known, first = self.rows.get(names, (0, row))
            self.rows[names] = (known + count, first)
        self.first = self.first or later.first
        self.add_labels(later.labels)
        self.answers.update(later.answers)

    def add_labels(self, labels: Iterable[str]) -> None:
        """Add labels of later rows."""
        if len(self.labels) < MOST_LABELS:
            self.labels.update(labels)


def count_columns(rows: Iterable[Row], columns: Sequence[str], formats: Formats) -> ColumnCounts:
    """Count the columns of rows after they are renamed by `columns` (see data.columns)."""
    counts, naming = ColumnCounts(), _Names.of(columns, formats)
    for row in rows:
        renamed = attempt(_rename, row, naming)
        if isinstance(renamed, Row):
            if LABEL in formats:
                counts.add_labels(label_names(renamed.fields.get("label")))
            if DECISION in formats:
                counts.answers[answer_readings(_with_synonyms(renamed, ("choices", "answer")))] += 1
            present = {column: None if x is None else True for column, x in renamed.fields.items()}
            names = tuple(_present(present))
            known, first = counts.rows.get(names, (0, Row(renamed.name, present)))
            counts.rows[names] = (known + 1, first)
        counts.first = counts.first or renamed
    return counts


def choose_format(
    counts: ColumnCounts, format: str, columns: Sequence[str], formats: Formats
) -> ChosenFormat:
    """Return the format of a dataset. format, columns: the settings data.format, where "auto" chooses the
    format that most rows fit, and data.columns.

    Raises the first row's InvalidRow if no row fits any format, and ValueError for wrong settings.
    """
    mapping, plain = _column_mapping(columns, formats), format == PLAIN
    chosen, others = format, OtherNames()
    if format in ("auto", PLAIN):
        chosen, others = _most_common_format(counts, set(mapping), formats)
        others = tuple(item for item in others if not (plain and item[0] in FURTHER))
    if chosen not in formats:
        known = ", ".join(formats)
        raise ValueError(f"data.format={format!r}; use auto, {PLAIN} or one of {known}")
    if plain and not formats[chosen].plain:
        strings = " and ".join(name for name, candidate in formats.items() if candidate.plain)
        raise ValueError(
            f"data.format={PLAIN} is for {strings or 'other'} rows, and these rows have format "
            f"{chosen}; set data.format=auto"
        )
    unread = _unread(counts, chosen, formats) if format == "auto" and TEXT in formats else ()
    return ChosenFormat(chosen, plain, others, unread, reading=reading_of(counts.answers))


def _with_synonyms(row: Row, columns: Sequence[str]) -> Row:
    """Return the row with each of `columns` that it lacks, copied from a column whose name is a synonym."""
    others = {ours: other_name(row.fields, ours) for ours in columns if row.fields.get(ours) is None}
    return Row(row.name, {**row.fields, **{x: row.fields[y] for x, y in others.items() if y is not None}})


def _unread(counts: ColumnCounts, chosen: str, formats: Formats) -> OtherNames:
    """Return ChosenFormat.unread, from the columns that the most rows have."""
    _, row = max(counts.rows.values(), key=lambda read: read[0])
    if chosen != TEXT:
        return ((TEXT, TEXT),) if row.fields.get(TEXT) is not None else ()
    rest = {column: x for column, x in row.fields.items() if column != TEXT}
    read = attempt(_detect_by_other_names, Row(row.name, rest), set(), formats)
    return () if isinstance(read, InvalidRow) else read[1]


def unread_columns(format: ChosenFormat, columns: Sequence[str], formats: Formats, row: Row) -> list[str]:
    """Return the columns of a row that its format does not read and whose text has several words."""
    names = _Names.of(columns, formats)._replace(others=format.columns)
    read = {*formats[format.name].columns, *MEDIA}
    kept = {ours: theirs for ours, theirs in (*names.mapping.items(), *format.columns) if ours in read}
    read |= {theirs.strip().lower() for theirs in kept.values()}
    texts = {name: x for name, x in row.fields.items() if str(name).strip().lower() not in read}
    return [str(name) for name, x in texts.items() if isinstance(x, str) and len(x.split()) > 1]


def _most_common_format(counts: ColumnCounts, mapped: set[str], formats: Formats) -> tuple[str, OtherNames]:
    """Return the format that most rows fit, and (ours, theirs) of its columns that are read by synonyms:
    optional ones, and required ones if no row fits a format without synonyms. mapped: the columns that
    data.columns sets. Raises the first row's InvalidRow if no row fits a format with synonyms either.
    """
    for detect in (_detect_as_named, _detect_by_other_names):
        votes: Counter[tuple[str, OtherNames]] = Counter()
        rows = defaultdict[Any, list[Row]](list)
        for count, row in counts.rows.values():
            detected = attempt(detect, row, mapped, formats)
            if not isinstance(detected, InvalidRow):
                votes[detected] += count
                rows[detected].append(row)
        if votes:
            format, columns = best = votes.most_common(1)[0][0]
            each = (further_columns(row.fields, formats[format].optional) for row in rows[best])
            return format, (*columns, *dict.fromkeys(item for more in each for item in more.items()))
    if counts.first is None:
        raise ValueError("cannot choose a format: the data has no rows; add rows, or set data.format")
    return _detect_as_named(valid(counts.first), mapped, formats)


def _detect_as_named(row: Row, mapped: set[str], formats: Formats) -> tuple[str, OtherNames]:
    return _detect(row, mapped, formats), ()


def _detect_by_other_names(row: Row, mapped: set[str], formats: Formats) -> tuple[str, OtherNames]:
    """Return the format that a row fits with the fewest COLUMN_SYNONYMS, and (ours, theirs) of these. A
    question with a context is an instruction with an input.
    """
    renamed = dict[str, dict[str, str]]()
    has_input = row.fields.get("input") is None and other_name(row.fields, "input") is not None
    for format, known in formats.items():
        missing = [names for names in known.required if not any(row.fields.get(c) is not None for c in names)]
        if not missing and mapped <= known.columns:
            return _detect_as_named(row, mapped, formats)  # raises that it fits two formats
        others = {names[0]: other_name(row.fields, names[0]) for names in missing}
        if "instruction" in others and not has_input:
            continue
        taken = [theirs for theirs in others.values() if theirs is not None]
        if missing and len({*taken}) == len(missing) and mapped <= known.columns:
            renamed[format] = dict(zip(others, taken, strict=True))
    renamed = {x: others for x, others in renamed.items() if "instruction" in others} or renamed
    fewest = min(map(len, renamed.values()), default=0)
    best = [format for format, others in renamed.items() if len(others) == fewest]
    if len(best) != 1:
        raise row.invalid("columns of no format", "no format fits with other names of columns")
    return best[0], tuple(renamed[best[0]].items())


def describe_formats(formats: Formats) -> str:
    """Return the formats and their columns in one line."""
    listed = {name: each_format for name, each_format in formats.items() if each_format.listed}
    each = ((name, map(" or ".join, each_format.required)) for name, each_format in listed.items())
    return "; ".join(f"{name} ({' + '.join(columns)})" for name, columns in each)


def known_columns(formats: Formats) -> list[str]:
    """Return the names of all columns that the formats may have."""
    return sorted(set().union(*(known.columns for known in formats.values())))


def names_in_datasets(formats: Formats) -> list[str]:
    """Return all names by which the formats find columns: their own, COLUMN_SYNONYMS of these, and MEDIA."""
    known = known_columns(formats)
    return [*known, *MEDIA, *(name for ours in known for name in COLUMN_SYNONYMS.get(ours, ()))]


def _column_mapping(columns: Sequence[str], formats: Formats) -> dict[str, str]:
    known = known_columns(formats)
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
    """Split an item of data.columns, "prompt=question", into jaxft's name and the dataset's. Raises
    ValueError for another form.
    """
    ours, equals, theirs = (part.strip() for part in item.partition("="))
    if not (ours and equals and theirs):
        raise ValueError(
            f"data.columns must be of the form NAME=COLUMN, for example prompt=question, got {item!r}"
        )
    return ours, theirs


class _Names(NamedTuple):
    """A renaming of columns.

    mapping: data.columns as ours -> theirs. others: (ours, theirs) of columns that are read by synonyms.
    known: all columns that the formats may have. optional: columns that a row may lack. spellings: all names
    of a mapped column, such as response and output.
    """

    mapping: dict[str, str]
    known: frozenset[str]
    optional: frozenset[str]
    spellings: frozenset[str]
    others: OtherNames = ()

    @classmethod
    def of(cls, columns: Sequence[str], formats: Formats) -> "_Names":
        mapping = _column_mapping(columns, formats)
        alike = [names for f in formats.values() for names in f.required if {*names} & {*mapping}]
        return cls(
            mapping,
            frozenset(known_columns(formats)),
            frozenset(c for known in formats.values() for c in known.optional),
            frozenset(c for names in alike for c in names),
        )


def _rename(row: Row, names: _Names) -> Row:
    """Return the row with its columns renamed by data.columns, by their spelling and by synonyms.

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
            raise row.invalid(
                f"missing column {theirs!r}",
                f"no column {theirs!r}, which data.columns={ours}={theirs} names; name one that the row has: "
                f"{', '.join(map(str, row.fields))}",
            )
    others = {c: v for c, v in row.fields.items() if c not in mapping.values() and c not in names.spellings}
    return Row(row.name, others | {ours: row.fields.get(theirs) for ours, theirs in mapping.items()})


def _present(fields: dict) -> dict:
    """Return the columns that are not null; a table has null where a row of another format has no column."""
    return {column: value for column, value in fields.items() if value is not None}


def _has(fields: dict, columns: tuple[tuple[str, ...], ...]) -> bool:
    return all(any(c in fields for c in names) for names in columns)


def _detect(row: Row, mapped: set[str], formats: Formats) -> str:
    needed = {name: known.required for name, known in formats.items()}

    def fitting(fields: dict) -> list[str]:  # a format without a column of data.columns is not meant
        fits = [x.name for x in formats.values() if _has(fields, x.required) and mapped <= x.columns]
        fits = [name for name in fits if not any(set(needed[name]) < set(needed[other]) for other in fits)]
        return [name for name in fits if name != TEXT] or fits  # `text` often repeats the other columns

    fits = fitting(row.fields)
    if len(fits) > 1:
        fits = fitting(_present(row.fields)) or fits
    if len(fits) == 1:
        return fits[0]
    columns = ", ".join(map(str, row.fields))
    if fits:
        raise row.invalid(
            "columns of two formats",
            f"the columns {columns} fit the formats {' and '.join(fits)}; set data.format to one of them",
        )
    names = [str(name) for name in row.fields]
    other = _other_task(row, formats)
    if other is not None:
        raise row.invalid("columns of no format", f"the columns {columns} belong to {TASKS[other]}")
    ours = _nearest_columns(names, formats)
    near = misspelled(names, ours)
    meant = f"did you mean {' and '.join(f'{ours} for {theirs!r}' for ours, theirs in near.items())}? "
    raise row.invalid(
        "columns of no format",
        f"the columns {columns} fit no format; {meant if near else ''}accepted are "
        f"{describe_formats(formats)}; rename columns, for example with "
        f"{suggested_columns(names, ours)}",
    )


def _other_task(row: Row, formats: Formats) -> str | None:
    """Return the task of a format that a row fits, other than the tasks of `formats`; None without one. That
    format has a column that `formats` lack, or all columns of the row.
    """
    here, tasks = known_columns(formats), {candidate.task for candidate in formats.values()}
    named = {str(name).strip().lower(): value for name, value in row.fields.items()}
    fits = list[tuple[int, bool, str]]()
    for candidate in (x for x in ROW_FORMATS if x.task not in tasks and x.task in TASKS):
        required = tuple(tuple(map(str.lower, group)) for group in candidate.required)
        foreign = [c for group in required for c in group if c in named and c not in here]
        is_one = _has(named, required) and candidate.fits(Row(row.name, named))
        if is_one and (foreign or {*named} <= {"id", *candidate.columns}):
            fits.append((len(required), candidate.listed, candidate.task))
    return max(fits)[2] if fits else None


def _nearest_columns(names: Sequence[str], formats: Formats) -> list[str]:
    """Return the columns that a row lacks of the format nearest to it. Nearest is the format with the fewest
    columns that no name of the row seems to mean; of several, the one with the most other columns. If every
    format lacks all its columns, return the columns of an example format.
    """
    near: list[tuple[int, int, list[str]]] = []
    named = (x for x in formats.values() if x.listed and x.rewrite is own_columns)
    for groups in (x.required for x in named):
        missing = [group for group in groups if not {*group} & {*names}]
        meant = meant_columns(names, [column for group in missing for column in group])
        columns = [next((c for c in group if c in meant), group[0]) for group in missing]
        unknown = sum(column not in meant for column in columns)
        if unknown < len(groups):
            near.append((unknown, unknown - len(groups), columns))
    fewest = min(near, key=lambda candidate: candidate[:2], default=None)
    wanted = (x.required for x in sorted(formats.values(), key=lambda x: not x.plain) if len(x.required) > 1)
    return fewest[2] if fewest else [names[0] for names in next(wanted)]


def _require_columns(row: Row, format: str, formats: Formats) -> Row:
    fields, required = row.fields, formats[format].required
    if not _has(fields, required):
        missing = next(names for names in required if not any(c in fields for c in names))
        raise row.invalid(
            f"missing column {' or '.join(map(repr, missing))}",
            f"no column {' or '.join(missing)}, which format {format} requires; the row has "
            f"{', '.join(map(str, fields))}; accepted formats are {describe_formats(formats)}; rename "
            f"columns, for example with {suggested_columns(list(fields), missing[:1])}",
        )
    return row
