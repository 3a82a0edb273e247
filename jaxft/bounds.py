"""Bounds of numbers and choices of texts in settings, as part of their annotations: `batch: Annotated[int,
at_least(1)] = 8`, `invalid: Annotated[str, one_of(INVALID)] = "error"`.

`check_bounds` checks bounds when a section is constructed; `jaxft settings` and `--help` show both.
"""

import functools
import math
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

INT32 = 2**31 - 1  # the largest number of 32 bits, in which steps and seconds are counted


@dataclass(frozen=True)
class Bounds:
    """An interval of numbers. open_least, open_most: the end itself is outside. No number may be infinite."""

    least: float = -math.inf
    most: float = math.inf
    open_least: bool = False
    open_most: bool = False

    def contain(self, number: float) -> bool:
        """Return whether a number is inside.

        >>> at_least(1).contain(0)
        False
        """
        inside = self.least <= number <= self.most and abs(number) < math.inf
        return inside and not (
            (self.open_least and number == self.least) or (self.open_most and number == self.most)
        )

    def __str__(self) -> str:
        low, high = f"{self.least:g}", "2^31 - 1" if self.most == INT32 else f"{self.most:g}"
        if self.most == math.inf:
            return f"above {low}" if self.open_least else f"at least {low}"
        if not self.open_least and not self.open_most:
            return f"from {low} to {high}"
        first, last = "above" if self.open_least else "at least", "below" if self.open_most else "at most"
        return f"{first} {low} and {last} {high}"


def at_least(least: float) -> Bounds:
    """Numbers from `least` on."""
    return Bounds(least)


def above(least: float) -> Bounds:
    """Numbers greater than `least`."""
    return Bounds(least, open_least=True)


def between(least: float, most: float) -> Bounds:
    """Numbers from `least` to `most`."""
    return Bounds(least, most)


def count_from(least: int) -> Bounds:
    """Numbers from `least` on that 32 bits hold."""
    return Bounds(least, INT32)


ABOVE_ZERO = Bounds(0.0, INT32, open_least=True)  # that 32 bits hold
ZERO_TO_ONE = Bounds(0.0, 1.0)
BELOW_ONE = Bounds(0.0, 1.0, open_most=True)
ABOVE_ZERO_TO_ONE = Bounds(0.0, 1.0, open_least=True)
INSIDE_ZERO_AND_ONE = Bounds(0.0, 1.0, open_least=True, open_most=True)


@dataclass(frozen=True)
class Choices:
    """The texts that a setting takes; None among them is written none."""

    known: tuple[str | None, ...]


def one_of(known: Iterable[str | None]) -> Choices:
    """Only these texts."""
    return Choices(tuple(known))


def choices_of(kind: Any) -> tuple[str, ...]:
    """Return the texts that an annotation declares as its choices, () for none."""
    marks = typing.get_args(kind)[1:] if typing.get_origin(kind) is typing.Annotated else ()
    found = next((mark.known for mark in marks if isinstance(mark, Choices)), ())
    return tuple("none" if text is None else text for text in found)


def bounds_of(kind: Any) -> Bounds | None:
    """Return the bounds that an annotation declares, None without any."""
    marks = typing.get_args(kind)[1:] if typing.get_origin(kind) is typing.Annotated else ()
    return next((mark for mark in marks if isinstance(mark, Bounds)), None)


@functools.cache
def _bounded_fields(cls: Any) -> tuple[tuple[str, Bounds, bool], ...]:
    """Return (field, bounds, whether it may be None) of a dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = ((name, bounds_of(kind), kind) for name, kind in hints.items())
    return tuple(
        (name, bounds, type(None) in typing.get_args(typing.get_args(kind)[0]))
        for name, bounds, kind in found
        if bounds is not None
    )


def check_bounds(settings: Any, section: str = "") -> None:
    """Raise ValueError for the first number of a dataclass that is out of its bounds.

    section: the section's name, such as "optim", "" for none. Values that are no numbers are not checked.
    """
    for name, bounds, optional in _bounded_fields(settings.__class__):
        value = getattr(settings, name)
        if isinstance(value, int | float) and not bounds.contain(value):
            setting = f"{section}.{name}" if section else name
            finite = "a finite number " if value in (math.inf, -math.inf) else ""
            raise ValueError(f"{setting}={value}; expected {finite}{bounds}{', or none' if optional else ''}")
