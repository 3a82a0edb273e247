"""RunSteps, hours and money of a run on planned devices."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxft.data.mixture import parse_sources
from jaxft.data.prompts import Prompts
from jaxft.data.rows import read_rows
from jaxft.data.sft import Rows
from jaxft.durations import time_in_words
from jaxft.train.settings import Run

CHARACTERS = 4  # of a token, where the rows cannot be tokenised


@dataclass(frozen=True)
class RunSteps:
    """Optimizer steps of a run, and where their number comes from."""

    count: int
    source: str


def steps_of(run: Run, tokenizer: Callable[[], Any]) -> RunSteps:
    """Return the steps of a run. tokenizer: loads the model's tokenizer, for the lengths of the rows.

    Without a tokenizer that can be loaded, tokens are estimated from characters. Raises ValueError or
    FileNotFoundError if there are no rows.
    """
    if run.loop.steps is not None:
        return RunSteps(run.loop.steps, "loop.steps")
    data: Any = run.data
    length = f"{data.epochs:g} epochs" if data.epochs is not None else f"{data.tokens:,} tokens"
    refs = [source.ref for source in parse_sources(data.train)]
    rows = [row for ref in refs for row in read_rows(ref)]
    trained = len(rows) - (data.held_out_count(len(rows)) if _is_fraction(data.held_out) else 0)
    try:
        loaded = tokenizer()
    except OSError:  # the model's files are not here
        return RunSteps(
            _estimated(run, rows, trained), f"{length} of {trained:,} rows, at 4 characters per token"
        )
    return RunSteps(run.data.open(loaded).info.steps, f"{length} of {trained:,} rows")


@dataclass(frozen=True)
class Cost:
    """Hours and money of a run.

    seconds: of a step. price: of a device and hour, in any currency; None for an unknown one.
    """

    steps: RunSteps
    seconds: float
    devices: int
    price: float | None = None

    @property
    def hours(self) -> float:
        """Hours of all steps."""
        return self.steps.count * self.seconds / 3600

    @property
    def money(self) -> float | None:
        """The price of the hours on all devices."""
        return None if self.price is None else self.hours * self.devices * self.price

    def lines(self) -> list[str]:
        """Return lines of a report."""
        lines = [
            f"time: {self.steps.count:,} steps ({self.steps.source}) x {self.seconds:.3f} s = "
            f"{time_in_words(3600 * self.hours)}, without loading, compiling, evaluation and sampling"
        ]
        if self.money is not None:
            each = f"{self.devices} device{'s' * (self.devices > 1)} x {self.price:g} an hour"
            lines.append(f"cost: {self.money:.2f} ({time_in_words(3600 * self.hours)} x {each})")
        return lines

    def json(self) -> dict[str, Any]:
        """Return the same as plain values."""
        return {
            "steps": self.steps.count,
            "steps_from": self.steps.source,
            "hours": self.hours,
            "cost": self.money,
        }


def _is_fraction(held_out: Any) -> bool:
    return isinstance(held_out, int | float) and held_out > 0


def _estimated(run: Run, rows: list[Any], trained: int) -> int:
    """Return the steps of rows that are not tokenised."""
    data: Any = run.data
    characters = sum(len(str(value)) for row in rows for value in row.fields.values())
    tokens = characters / CHARACTERS * trained / max(1, len(rows))
    if data.tokens is not None:
        return max(1, math.ceil(data.tokens / (data.batch * data.max_length)))
    epochs = data.epochs or 1.0
    if isinstance(data, Rows) and data.packing:
        return max(1, math.ceil(epochs * tokens / (data.batch * data.max_length)))
    rollouts = max(1, math.ceil(epochs * trained / data.batch))
    return rollouts * data.passes * data.minibatches if isinstance(data, Prompts) else rollouts
