"""Annotations of settings: bounds of numbers, choices of texts, descriptions, and short names of functions.

`rate: Annotated[float, at_least(1)] = 8.0`, `invalid: Annotated[str, one_of(INVALID)] = "error"`,
`optimizer: Annotated[Callable, ShortNames.of(OPTIMIZERS)]` for `optim.optimizer=muon`. Usual bounds have
names: `batch: PositiveInt = 8`, `beta: PositiveFloat | None = None`.

A string in Annotated[...] is the setting's name in a file, such as "rms_norm_eps"; About("...") describes a
knob that several recipes have.

A dataclass of settings calls `check_bounds` when it is constructed, which checks types, bounds and choices;
`check_values` does the same for a recipe's knobs. `jaxft settings` and `--help` show them. This file imports
neither jax nor the functions that have short names, so that the shell's tab completion can import it quickly.
"""

import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

INT32 = 2**31 - 1  # the largest number of 32 bits, in which steps and seconds are counted


@dataclass(frozen=True)
class Bounds:
    """An interval of finite numbers. open_least, open_most: `least` or `most` itself is outside. also:
    another number that is allowed.
    """

    least: float = -math.inf
    most: float = math.inf
    open_least: bool = False
    open_most: bool = False
    also: float | None = None

    def contain(self, number: float) -> bool:
        """Return whether a number is inside.

        >>> at_least(1).contain(0)
        False
        """
        if number == self.also:
            return True
        inside = self.least <= number <= self.most and abs(number) < math.inf
        return inside and not (
            (self.open_least and number == self.least) or (self.open_most and number == self.most)
        )

    def __str__(self) -> str:
        if self.least == -math.inf and self.most == math.inf:
            return "finite"
        if self.also is not None:
            return f"{self.also:g}, or {replace(self, also=None)}"
        low, high = _short(self.least), _short(self.most)
        if self.most in (INT32, math.inf):  # errors about larger numbers name INT32, see `broken_by`
            return f"above {low}" if self.open_least else f"at least {low}"
        if not self.open_least and not self.open_most:
            return f"from {low} to {high}"
        first, last = "above" if self.open_least else "at least", "below" if self.open_most else "at most"
        return f"{first} {low} and {last} {high}"

    def broken_by(self, number: float) -> str:
        """Return what was expected in place of a number outside: the bounds, or only INT32 if it is larger.

        >>> count_from(1).broken_by(0), count_from(1).broken_by(2**40)
        ('at least 1', 'at most 2^31 - 1')
        """
        is_larger = self.most == INT32 and self.most < number < math.inf
        return f"at most {_short(INT32)}" if is_larger else str(self)


def _short(number: float) -> str:
    """Format a number for a message: 16777215 as 2^24 - 1, 0.5 as 0.5."""
    power = round(math.log2(number + 1)) if 2**10 < number < 2**64 else 0
    return f"2^{power} - 1" if power and number == 2**power - 1 else f"{number:g}"


def at_least(least: float) -> Bounds:
    """Return a bound of a setting: numbers from `least` on."""
    return Bounds(least)


def above(least: float) -> Bounds:
    """Return a bound of a setting: numbers greater than `least`."""
    return Bounds(least, open_least=True)


def between(least: float, most: float) -> Bounds:
    """Return bounds of a setting: numbers from `least` to `most`."""
    return Bounds(least, most)


def count_from(least: int) -> Bounds:
    """Return a bound of a setting: whole numbers from `least` on that fit into 32 bits, which its text
    does not say.
    """
    return Bounds(least, INT32)


FINITE = Bounds()
ABOVE_ZERO = Bounds(0.0, INT32, open_least=True)
ZERO_TO_ONE = Bounds(0.0, 1.0)
BELOW_ONE = Bounds(0.0, 1.0, open_most=True)
ABOVE_ZERO_TO_ONE = Bounds(0.0, 1.0, open_least=True)
INSIDE_ZERO_AND_ONE = Bounds(0.0, 1.0, open_least=True, open_most=True)
POSITIVE_FLOAT32 = Bounds(1e-37, 3.4e38, open_least=True)  # XLA may round subnormal numbers to 0

PositiveInt = Annotated[int, count_from(1)]
Seed = Annotated[int, Bounds(0, 2**63 - 1)]  # that JAX can make a random key of
NonNegativeInt = Annotated[int, count_from(0)]
FiniteFloat = Annotated[float, FINITE]
PositiveFloat = Annotated[float, above(0)]
NonNegativeFloat = Annotated[float, at_least(0)]
Fraction = Annotated[float, ZERO_TO_ONE]
PositiveFraction = Annotated[float, ABOVE_ZERO_TO_ONE]
AnyTemperature = Annotated[float, Bounds(1e-4, also=0)]  # of sampling; 0 is greedy

# Choices of several settings and options of commands
FormatName = Literal["int8", "fp8", "int4", "nf4", "fp4", "affine4"]  # of quantised weights
QuantKind = Literal["none", FormatName, "checkpoint"]  # of settings
ComputeDtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class About:
    """A description of a knob, in the annotation that several recipes share: About("factor of the KL")."""

    text: str


@dataclass(frozen=True)
class Choices:
    """The texts that a setting accepts. None among them: it may be None, which users write as none."""

    known: tuple[str | None, ...]


def one_of(known: Iterable[str | None]) -> Choices:
    """Return the choices of a setting: only these texts."""
    return Choices(tuple(known))


def types_and_marks(kind: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return (the types that an annotation allows, the marks of its Annotated[...]), also in a union.

    >>> types_and_marks(Annotated[int, "rows"] | None)
    ((<class 'int'>, <class 'NoneType'>), ('rows',))
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        types_of, marks = types_and_marks(args[0])
        return types_of, (*args[1:], *marks)
    if origin in (typing.Union, types.UnionType):
        inner = [types_and_marks(member) for member in args]
        return tuple(t for some, _ in inner for t in some), tuple(m for _, some in inner for m in some)
    return (kind,), ()


def choices_of(kind: Any) -> tuple[str, ...]:
    """Return the texts that an annotation allows by `one_of`; () if it has no `one_of`."""
    texts = next((mark.known for mark in types_and_marks(kind)[1] if isinstance(mark, Choices)), ())
    return tuple("none" if text is None else text for text in texts)


def bounds_of(kind: Any) -> Bounds | None:
    """Return the bounds in an annotation such as Annotated[float, at_least(1)]; None if it has none."""
    return next((mark for mark in types_and_marks(kind)[1] if isinstance(mark, Bounds)), None)


def about(kind: Any) -> str:
    """Return the description in an annotation, "" if it has none."""
    return next((mark.text for mark in types_and_marks(kind)[1] if isinstance(mark, About)), "")


TYPE_TEXTS = {
    bool: "true, false",
    int: "a whole number",
    float: "a number",
    str: "text",
    types.NoneType: "none",
}
FEW = {bool: (True, False), types.NoneType: (None,)}  # all values of a type
CHECKED_TYPES = (*TYPE_TEXTS, list, tuple, dict)  # other objects, such as arrays, are not checked


@dataclass(frozen=True)
class _Kind:
    """The parsed annotation of a setting.

    name: the setting's name, as users write it. members: the types that it allows, such as (int, NoneType)
    for int | None. choices: all allowed values; None if the annotation does not list them. items: of a tuple,
    the annotations of its items, as in tuple[int, ...] or tuple[float, int]; () for none.
    """

    name: str
    members: tuple[Any, ...]
    choices: tuple[Any, ...] | None
    bounds: Bounds | None
    items: tuple[Any, ...] = ()

    @classmethod
    def of(cls, field: str, kind: Any) -> "_Kind":
        members, marks = types_and_marks(kind)
        marked = (mark.known for mark in marks if isinstance(mark, Choices))
        choices: tuple[Any, ...] | None = next(marked, None)
        literals = [typing.get_args(m) if typing.get_origin(m) is Literal else FEW.get(m) for m in members]
        if choices is None and None not in literals:
            choices = tuple(value for values in literals if values for value in values)
        name = next((mark for mark in marks if isinstance(mark, str)), field)
        items = next((typing.get_args(m) for m in members if typing.get_origin(m) is tuple), ())
        return cls(name, members, choices, bounds_of(kind), items)

    def expected(self, value: Any) -> str:
        """Return the end of the error about a value, such as "expected at least 1"; "" if it is allowed."""
        if self.choices is not None:
            known = [str(choice).lower() for choice in self.choices]
            known_types = {type(choice) for choice in self.choices}  # 1 == True
            is_known = type(value) in known_types and value in self.choices
            return "" if is_known else f"use one of {', '.join(known)}"
        if self.items and isinstance(value, tuple):
            return self._expected_items(value)
        is_checked = isinstance(value, CHECKED_TYPES) and TYPE_TEXTS.keys() >= {*self.members}
        is_wrong = is_checked and not any(_has_type(value, member) for member in self.members)
        is_number = isinstance(value, int | float)
        if not is_wrong and (self.bounds is None or not is_number or self.bounds.contain(value)):
            return ""
        names = [TYPE_TEXTS[m] for m in self.members if m not in (int, float) or m is self._number]
        if self.bounds is None:
            return "expected " + " or ".join(", ".join(names).rsplit(", ", 1))
        others = "".join(f", or {TYPE_TEXTS[m]}" for m in self.members if m not in (int, float))
        if self.bounds == FINITE:
            return f"expected a finite number{others}"
        also = ": " if self.bounds.also is not None else " "  # "a finite number: 0, or at least 0.0001"
        finite = f"a finite number{also}" if is_number and not math.isfinite(value) else ""
        number = f"{TYPE_TEXTS[self._number]} " if is_wrong else finite
        bounds = self.bounds.broken_by(value) if is_number and not is_wrong else self.bounds
        return f"expected {number}{bounds}{others}"

    @property
    def _number(self) -> type:
        return float if float in self.members else int

    def _expected_items(self, value: tuple[Any, ...]) -> str:
        kinds = self.items[:1] * len(value) if Ellipsis in self.items else self.items
        if len(kinds) != len(value):
            return f"expected {len(kinds)} values"
        for place, (item, kind) in enumerate(zip(value, kinds, strict=True), 1):
            if text := _Kind.of("", kind).expected(item):
                where = f"in {_written(item)}" if isinstance(item, tuple) else f"as value {place}"
                return f"{text} {where}"
        return ""


def _has_type(value: Any, member: Any) -> bool:
    """Return whether a value has a type: an int is a float too, a bool is only a bool."""
    if isinstance(value, bool):
        return member is bool
    return isinstance(value, int | float if member is float else member)


@functools.cache
def _kinds(cls: Any) -> dict[str, _Kind]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field: _Kind.of(field, kind) for field, kind in hints.items()}


def check_bounds(settings: Any, section: str = "") -> None:
    """Raise ValueError for the first field of a dataclass whose value its annotation does not allow.

    section: the prefix of names in errors: a section such as "optim", or "config:" for a file; "" for none.

    >>> @dataclass(frozen=True)
    ... class Batches:
    ...     rows: PositiveInt = 8
    ...     def __post_init__(self):
    ...         check_bounds(self, "data")
    >>> Batches(rows=0)
    Traceback (most recent call last):
    ValueError: data.rows=0; expected at least 1
    """
    for field, kind in _kinds(settings.__class__).items():
        _check(kind, getattr(settings, field), section)


def check_values(kinds: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise ValueError for the first value that its annotation does not allow. kinds: annotations by name.

    >>> check_values({"beta": PositiveFloat}, {"beta": -1.0})
    Traceback (most recent call last):
    ValueError: beta=-1.0; expected above 0
    """
    for name, value in values.items():
        _check(_Kind.of(name, kinds[name]), value)


def _check(kind: _Kind, value: Any, section: str = "") -> None:
    if expected := kind.expected(value):
        setting = f"{section}{' ' if section.endswith(':') else '.'}{kind.name}" if section else kind.name
        items = ",".join(map(_written, value)) if isinstance(value, tuple) else str(value)
        text = repr(value) if isinstance(value, str) else items
        raise ValueError(f"{setting}={text:.60}; {expected}")


def _written(item: Any) -> str:
    return ":".join(map(str, item)) if isinstance(item, tuple) else str(item)


def name_of(fn: Callable) -> str:
    """Return a function's name, also of a partial or a callable object."""
    while isinstance(fn, partial):
        fn = fn.func
    return str(getattr(fn, "__name__", type(fn).__name__))


class ShortNames(NamedTuple):
    """The short names of the functions that a setting accepts: (short name, package.module:name) pairs, put
    into its annotation.

    or_dict: whether the setting also accepts a dict of functions by name.
    """

    pairs: tuple[tuple[str, str], ...]
    or_dict: bool = False

    @classmethod
    def of(cls, names: Mapping[str, str], or_dict: bool = False) -> "ShortNames":
        """Return the ShortNames of a dict from short names to package.module:name."""
        return cls(tuple(names.items()), or_dict)


def _in(module: str, names: str) -> dict[str, str]:
    """Return {name: "module:name"} for functions of a module. names: separated by spaces."""
    return {name: f"{module}:{name}" for name in names.split()}


OPTIMIZERS = {
    "adamw": "jaxft.optim.rules:adamw",
    "adamw_8bit": "jaxft.optim.low_precision:adamw_8bit",
    "adamw_bf16": "jaxft.optim.low_precision:adamw_bf16",
    "adafactor": "jaxft.optim.rules:adafactor",
    "lion": "optax:lion",
    "muon": "jaxft.optim.rules:muon",
    "schedule_free_adamw": "jaxft.optim.rules:schedule_free_adamw",
}
SCHEDULES = {
    "constant": "jaxft.optim.schedules:constant_schedule",
    "linear": "jaxft.optim.schedules:linear_schedule",
    "cosine": "jaxft.optim.schedules:cosine_schedule",
    "wsd": "jaxft.optim.schedules:wsd_schedule",
    "cosine_with_restarts": "jaxft.optim.schedules:cosine_with_restarts_schedule",
}
PREFERENCE_LOSSES = {
    **_in(
        "jaxft.objectives.losses.preference_losses",
        "dpo cdpo dpo_margin dpop rdpo hinge squared_hinge ipo sigmoid_norm exo_pair robust discopop "
        "nca_pair bco_pair sppo_hard apo_zero apo_down nll aot aot_unpaired",
    ),
    **_in(
        "jaxft.objectives.losses.reference_free_losses",
        "simpo alphapo cpo cpo_hinge cpo_ipo orpo tpo tpo_hinge tpo_ipo tpo_l apo_zero_unpaired kto bco",
    ),
    **_in(
        "jaxft.objectives.losses.ranking_losses",
        "plackett_luce info_nca nca rpo_bwd_kl rpo_fwd_kl rpo_sq lipo",
    ),
}
POLICY_LOSSES = _in(
    "jaxft.objectives.losses.policy_losses",
    "policy_gradient unclipped clipped dual_clip dppo_tv dppo_kl gspo gspo_token cispo sapo geo_mean vespo "
    "near_policy",
)
DECISION_LOSSES = _in("jaxft.objectives.decision", "cross_entropy brier log_score")
KL_ESTIMATORS = _in("jaxft.objectives.losses.policy_losses", "k1 k2 k3")
REWARDS = _in("jaxft.rl.rewards", "exact number json_match")
COMBINATIONS = _in("jaxft.rl.advantages", "weighted_sum sum_of_known")
ADVANTAGES = _in("jaxft.rl.advantages", "grpo grpo_batch centred rloo opo maxrl gfpo adaptive_gfpo")
ESTIMATORS = _in("jaxft.rl.estimators", "by_group by_turn by_each group_whitened reinforce")
TOKEN_WEIGHTS = _in(
    "jaxft.rl.token_weights", "token_mean sequence_mean prompt_mean constant_length sequence_sum"
)
CORRECTIONS = _in(
    "jaxft.rl.token_weights",
    "truncated_tokens masked_tokens truncated_completions masked_completions masked_geometric_means",
)
ENVIRONMENTS = {
    "calculator": "jaxft.rl.environments.shipped_environments:Calculator",
    "code_interpreter": "jaxft.rl.environments.shipped_environments:CodeInterpreter",
    "guess_number": "jaxft.rl.environments.shipped_environments:GuessNumber",
    "search": "jaxft.rl.environments.shipped_environments:Search",
}
FILTERS = _in("jaxft.rl.advantages", "nonconstant_groups")

FUNCTION_TABLES = {
    "OPTIMIZERS": OPTIMIZERS,
    "SCHEDULES": SCHEDULES,
    "PREFERENCE_LOSSES": PREFERENCE_LOSSES,
    "POLICY_LOSSES": POLICY_LOSSES,
    "DECISION_LOSSES": DECISION_LOSSES,
    "KL_ESTIMATORS": KL_ESTIMATORS,
    "REWARDS": REWARDS,
    "COMBINATIONS": COMBINATIONS,
    "ADVANTAGES": ADVANTAGES,
    "ESTIMATORS": ESTIMATORS,
    "TOKEN_WEIGHTS": TOKEN_WEIGHTS,
    "CORRECTIONS": CORRECTIONS,
    "ENVIRONMENTS": ENVIRONMENTS,
    "FILTERS": FILTERS,
}
