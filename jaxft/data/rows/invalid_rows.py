"""Invalid rows: the error of a row, and whether it ends the run or only excludes the row (`data.invalid`):
FEW leaves out up to FEW_ROWS of a dataset, as most public ones need, and ends the run if there are more.

Code that reads, normalises, renders or tokenises a row raises InvalidRow. Loops over rows pass these errors
on as values (`attempt`, `valid`) up to `InvalidRows.skip`, which raises or collects them.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

FEW, ERROR, DROP = INVALID = ("few", "error", "drop")
LINE_BYTES = 64 << 20  # of a row, such as a line of a file; larger ones are invalid
FEW_ROWS = 0.01  # the largest fraction of a dataset's rows that FEW leaves out
HINT = "data.invalid=drop leaves invalid rows out"

Value = TypeVar("Value")


class InvalidRow(ValueError):
    """A row that cannot be used. Its message is "NAME: PROBLEM".

    name: the row's FILE:LINE. reason: a short phrase without details of the row, such as "empty response", by
    which excluded rows are counted. problem: what is wrong with this row and what to do.
    """

    def __init__(self, name: str, reason: str, problem: str):
        super().__init__(name, reason, problem)
        self.name, self.reason, self.problem = name, reason, problem

    def __str__(self) -> str:
        return f"{self.name}: {self.problem}"


class InvalidCount(NamedTuple):
    """The number of rows that are invalid for one reason, and the error of the first."""

    reason: str
    rows: int
    first: str


class Tally(NamedTuple):
    """A running count of the rows that are invalid for one reason, and the first of them."""

    rows: int
    first: InvalidRow


class InvalidRows:
    """Counts a dataset's invalid rows in `tallies` by reason, or raises the first.

    limit: the largest fraction of rows that may be left out; None raises the first. names_first: above the
    limit, raise the error of the first invalid row, instead of one that counts them by reason.
    """

    def __init__(self, limit: float | None, names_first: bool = False):
        self.limit, self.names_first = limit, names_first
        self.tallies: dict[str, Tally] = {}

    @property
    def total(self) -> int:
        """Number of invalid rows."""
        return sum(tally.rows for tally in self.tallies.values())

    def counts(self) -> tuple[InvalidCount, ...]:
        """Return the number of rows and the first of each reason, the most frequent reason first."""
        ordered = sorted(self.tallies.items(), key=lambda item: -item[1].rows)
        return tuple(InvalidCount(reason, rows, str(first)) for reason, (rows, first) in ordered)

    def add(self, error: InvalidRow) -> None:
        """Count the row. Without a limit, raise its error with a hint at data.invalid=drop."""
        self.merge({error.reason: Tally(1, error)})

    def merge(self, tallies: Mapping[str, Tally]) -> None:
        """Add the counts of later rows of the dataset. Without a limit, raise the first of their errors."""
        for reason, (rows, first) in tallies.items():
            if self.limit is None:
                raise _with_hint(first) from first
            known = self.tallies.get(reason, Tally(0, first))
            self.tallies[reason] = Tally(known.rows + rows, known.first)

    @contextmanager
    def skip(self) -> Iterator[None]:
        """Run the body of `with` for one row. If it raises InvalidRow, `add` that."""
        try:
            yield
        except InvalidRow as error:
            self.add(error)

    def check_begun(self, ref: str, seen: int, total: int | None) -> None:
        """With names_first, raise the error of `check` as soon as it is certain, or likely if the total is
        unknown.

        seen: rows read so far. total: all rows of the dataset, None if unknown.
        """
        if self.names_first and (total is not None or self.total > max(100, seen // 2)):
            self.check(ref, seen if total is None else total)

    def check(self, ref: str, total: int) -> None:
        """Raise ValueError if all `total` rows of dataset `ref` are invalid, or a fraction above `limit`.
        With limit=None do nothing: `add` has raised.
        """
        if self.limit is None or not self.tallies:
            return
        count, allowed = self.total, math.floor(self.limit * total + 1e-9)  # 0.29 * 100 is just below 29
        if count <= allowed and count < total:
            return
        if self.names_first:
            first = next(iter(self.tallies.values())).first
            none = f"all {total} rows are invalid: correct data.format or data.columns"
            hint = HINT if count < total else none
            raise _with_hint(first, hint) from first
        allows, remedy = "none is left", "Fix them, or correct data.format or data.columns"
        if count < total:
            allows = f"data.invalid_limit={self.limit:g} allows {allowed}"
            remedy = "Fix them, correct data.format or data.columns, or raise data.invalid_limit"
        reasons = self.counts()
        listed = [f"{rows} x {reason} (first {shortened(first)})" for reason, rows, first in reasons[:5]]
        listed += [f"and {len(reasons) - 5} further reasons"] if len(reasons) > 5 else []
        raise ValueError(
            f"{ref}: {count} of {total} rows are invalid, {allows}: {'; '.join(listed)}. {remedy}"
        )


def shortened(text: str, limit: int = 600) -> str:
    """Return an error of about `limit` characters at most: a longer one ends between two of its clauses."""
    if len(text) <= limit:
        return text
    clauses = [match.start() for match in re.finditer(r"[.;] ", text[:limit])]
    return f"{text[: clauses[-1]] if clauses else text[:limit].rpartition(' ')[0]} ..."


def _with_hint(error: InvalidRow, hint: str = HINT) -> InvalidRow:
    return InvalidRow(error.name, error.reason, f"{error.problem}; {hint}")


def attempt(function: Callable[..., Value], *args: object) -> Value | InvalidRow:
    """Return the function's value, or the InvalidRow that it raises."""
    try:
        return function(*args)
    except InvalidRow as error:
        return error


def valid(value: Value | InvalidRow) -> Value:
    """Return the value of an `attempt`, or raise its error."""
    if isinstance(value, InvalidRow):
        raise value
    return value


def json_type(value: object) -> str:
    """Return the type of a JSON value in words, such as "a list"."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list | tuple) else "an object")


def add_counts(*counts: Sequence[InvalidCount]) -> tuple[InvalidCount, ...]:
    """Return the counts of several datasets together, the most frequent reason first."""
    total: dict[str, InvalidCount] = {}
    for count in (count for part in counts for count in part):
        known = total.get(count.reason, count._replace(rows=0))
        total[count.reason] = known._replace(rows=known.rows + count.rows)
    return tuple(sorted(total.values(), key=lambda count: -count.rows))


def invalid_lines(counts: Sequence[InvalidCount]) -> list[str]:
    """Return log lines about the rows left out: the number for each reason, and the first of them."""
    if not counts:
        return []
    total = sum(count for _, count, _ in counts)
    header = f"{total} invalid rows left out (data.invalid):"
    return ["\n".join([header, *(f"{count:7,d}  {reason}: {first}" for reason, count, first in counts)])]


def similar_names(name: str, known: list[str]) -> list[str]:
    """Return the known names most similar to `name`, as jaxft.nn.tree.nearest does without importing JAX."""
    return difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
