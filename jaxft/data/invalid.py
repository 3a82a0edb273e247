"""Invalid rows: the error of one row, and whether it ends the run or leaves the row out (`data.invalid`).

Code that reads, normalises, renders or tokenises a row raises InvalidRow. A loop over rows passes these
errors on as values (`attempt`) and ends in `InvalidRows.skip`, which raises or collects them.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

INVALID = ("error", "drop")
HINT = "data.invalid=drop leaves invalid rows out"

Value = TypeVar("Value")


class InvalidRow(ValueError):
    """A row that cannot be used; as a string "NAME: PROBLEM".

    name: of the row, FILE:LINE. reason: a short phrase without details of the row, such as "empty response";
    rows that are left out are counted by it. problem: what is wrong with this row and what to do.
    """

    def __init__(self, name: str, reason: str, problem: str):
        super().__init__(name, reason, problem)
        self.name, self.reason, self.problem = name, reason, problem

    def __str__(self) -> str:
        return f"{self.name}: {self.problem}"


class InvalidCount(NamedTuple):
    """How many rows are invalid for one reason, and the error of the first of them."""

    reason: str
    rows: int
    first: str


class InvalidRows:
    """The invalid rows of a dataset: the first is raised, or all are collected in `found`.

    limit: the largest fraction of the rows that may be left out (data.invalid=drop); None to raise the first.
    """

    def __init__(self, limit: float | None):
        self.limit = limit
        self.found: list[InvalidRow] = []

    def add(self, error: InvalidRow) -> None:
        """Collect the error, or raise it with the setting that would leave the row out."""
        if self.limit is None:
            raise InvalidRow(error.name, error.reason, f"{error.problem}; {HINT}") from error
        self.found.append(error)

    @contextmanager
    def skip(self) -> Iterator[None]:
        """Run the statements of one row up to its InvalidRow, which is added."""
        try:
            yield
        except InvalidRow as error:
            self.add(error)

    def check(self, ref: str, total: int) -> None:
        """Raise ValueError if all of the `total` rows of dataset `ref` are invalid, or more than `limit`
        allows.
        """
        if self.limit is None or not self.found:
            return
        count, allowed = len(self.found), math.floor(self.limit * total + 1e-9)  # 0.29 * 100 is just below 29
        if count <= allowed and count < total:
            return
        allows = f"data.invalid_limit={self.limit:g} allows {allowed}" if count < total else "none is left"
        remedy = "fix the rows, correct data.format or data.columns, or raise data.invalid_limit"
        reasons = count_by_reason(self.found)
        listed = [f"{rows} x {reason} (first {first[:300]})" for reason, rows, first in reasons[:5]]
        listed += [f"and {len(reasons) - 5} further reasons"] if len(reasons) > 5 else []
        raise ValueError(
            f"{ref}: {count} of {total} rows are invalid, {allows}; {remedy}: {'; '.join(listed)}"
        )


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


def count_by_reason(invalid: Sequence[InvalidRow]) -> tuple[InvalidCount, ...]:
    """Count invalid rows by reason, the most frequent first."""
    counts = Counter(error.reason for error in invalid)
    first = {error.reason: str(error) for error in reversed(invalid)}
    return tuple(InvalidCount(reason, count, first[reason]) for reason, count in counts.most_common())


def invalid_lines(counts: Sequence[InvalidCount]) -> list[str]:
    """Return lines about the rows that were left out: how many for each reason, and the first of them."""
    if not counts:
        return []
    total = sum(count for _, count, _ in counts)
    header = f"{total} invalid rows left out (data.invalid=drop):"
    return ["\n".join([header, *(f"{count:7,d}  {reason}: {first}" for reason, count, first in counts)])]
