"""Bounds of settings: what an annotation declares is checked, shown, and the same for every section."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pytest

from jaxft.annotations import (
    ABOVE_ZERO,
    ABOVE_ZERO_TO_ONE,
    BELOW_ONE,
    INSIDE_ZERO_AND_ONE,
    ZERO_TO_ONE,
    FiniteFloat,
    Fraction,
    PositiveInt,
    above,
    at_least,
    between,
    check_bounds,
    count_from,
    one_of,
)
from jaxft.distributed.processes import Hosts
from jaxft.runs.settings.setting_values import describe_kind
from jaxft.train.settings import Loop


@pytest.mark.parametrize(
    ("bounds", "text", "inside", "outside"),
    [
        (at_least(1), "at least 1", (1, 7), (0, -1, float("inf"), float("nan"))),
        (above(0), "above 0", (1e-9, 3), (0, -1, float("inf"))),
        (count_from(1), "from 1 to 2^31 - 1", (1, 2**31 - 1), (0, 2**31)),
        (ABOVE_ZERO, "above 0 and at most 2^31 - 1", (0.1, 2**31 - 1), (0, 2.0**31)),
        (between(2, 4), "from 2 to 4", (2, 4), (1.9, 4.1)),
        (ZERO_TO_ONE, "from 0 to 1", (0, 1), (-0.1, 1.1)),
        (BELOW_ONE, "at least 0 and below 1", (0, 0.9), (1, -0.1)),
        (ABOVE_ZERO_TO_ONE, "above 0 and at most 1", (0.1, 1), (0, 1.1)),
        (INSIDE_ZERO_AND_ONE, "above 0 and below 1", (0.5,), (0, 1)),
    ],
)
def test_bounds_contain_what_their_text_says(bounds, text, inside, outside):
    assert str(bounds) == text
    assert all(map(bounds.contain, inside)) and not any(map(bounds.contain, outside))


@dataclass(frozen=True)
class Section:
    rank: Annotated[int, at_least(1)] = 4
    rate: Annotated[float | None, ZERO_TO_ONE] = None
    every: Annotated[int | float, above(0), "save_every"] = 1
    pair: tuple[Fraction, PositiveInt] | None = None
    weights: tuple[FiniteFloat, ...] = ()
    kind: Literal["a", "b"] | None = "a"
    full: bool | None = None

    def __post_init__(self) -> None:
        check_bounds(self, "section")


def test_a_section_refuses_numbers_out_of_bounds_and_takes_none():
    assert Section(rate=None).rank == 4
    with pytest.raises(ValueError, match=r"^section.rank=0; expected at least 1$"):
        Section(0)
    with pytest.raises(ValueError, match=r"^section.rate=1.5; expected from 0 to 1, or none$"):
        Section(rate=1.5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank", True, "section.rank=True; expected a whole number at least 1"),
        ("rank", 1.5, "section.rank=1.5; expected a whole number at least 1"),
        ("rank", None, "section.rank=None; expected a whole number at least 1"),
        ("rate", "x", "section.rate='x'; expected a number from 0 to 1, or none"),
        ("rate", math.nan, "section.rate=nan; expected a finite number from 0 to 1, or none"),
        ("every", "x", "section.save_every='x'; expected a number above 0"),
        ("pair", (0.5, 0), "section.pair=(0.5, 0); expected at least 1 as value 2"),
        ("pair", (0.5,), "section.pair=(0.5,); expected 2 values"),
        ("weights", (1, math.inf), "section.weights=(1, inf); expected a finite number as value 2"),
        ("kind", "c", "section.kind='c'; use one of a, b, none"),
        ("full", 1, "section.full=1; use one of true, false, none"),
        ("full", "x", "section.full='x'; use one of true, false, none"),
    ],
)
def test_a_section_refuses_values_of_other_types_and_other_choices(field, value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Section(**{field: value})


def test_numbers_that_are_no_python_numbers_are_not_checked():
    assert Section(rank=np.int64(3), every=np.float32(0.5), rate=1, kind=None).rank == 3


@pytest.mark.parametrize(
    ("section", "name"), [(Loop, "steps"), (Loop, "save_every"), (Hosts, "stop_seconds")]
)
def test_numbers_that_32_bits_do_not_hold_are_refused(section, name):
    with pytest.raises(
        ValueError, match=rf"^{section.__name__.lower()}\.{name}=2147483648; expected .* 2\^31 - 1"
    ):
        section(**{name: 2**31})
    assert getattr(section(**{name: 2**31 - 1}), name) == 2**31 - 1


def test_the_type_of_a_setting_is_shown_with_its_bounds():
    assert describe_kind(Annotated[int, at_least(1)]) == "int, at least 1"
    assert describe_kind(Annotated[float | None, ZERO_TO_ONE]) == "float or none, from 0 to 1"
    assert describe_kind(Fraction | None) == "float or none, from 0 to 1"
    assert describe_kind(tuple[Fraction, int]) == "a list a,b of float (from 0 to 1) and int"
    assert describe_kind(Annotated[str | None, one_of((None, "gold"))]) == "one of none, gold"
