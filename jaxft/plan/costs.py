"""Steps, hours and money of a run on planned devices."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from jaxft.data.pairs import PairRows
from jaxft.data.progress import time_in_words
from jaxft.data.prompts import Prompts
from jaxft.data.rows.dataset_rows import check_rows, list_chunks
from jaxft.data.rows.invalid import InvalidRow, InvalidRows
from jaxft.data.rows.mixture import parse_sources
from jaxft.data.sft import Rows
from jaxft.plan.plan import Plan
from jaxft.train.settings import Run

CHARACTERS = 4  # of a token, where the rows cannot be tokenised


@dataclass(frozen=True)
class RunSteps:
    """Optimizer steps of a run, and where their number comes from. samples: they train on rollouts."""

    count: int
    source: str
    samples: bool = False


def steps_of(run: Run, tokenizer: Callable[[], Any]) -> RunSteps:
    """Return the steps of a run. tokenizer: loads the model's tokenizer, for the lengths of the rows.

    Without a tokenizer that can be loaded, tokens are estimated from characters. Raises ValueError or
    FileNotFoundError if there are no rows.
    """
    data, samples = run.data, isinstance(run.data, Prompts)
    if run.loop.steps is not None:
        return RunSteps(run.loop.steps, "loop.steps", samples)
    if not isinstance(data, Rows | PairRows | Prompts):
        return RunSteps(data.open(tokenizer()).info.steps, "the run's data")
    length = f"{data.tokens or 0:,} tokens"
    if data.epochs is not None:
        length = f"{data.epochs:g} epoch{'s' * (data.epochs != 1)}"
    try:
        loaded = tokenizer()
    except OSError:  # the model's files are not here
        return _estimated(data, length)
    info = data.open(loaded).info
    return RunSteps(info.steps, f"{length} of {info.stats.examples:,} {data.unit}", samples)


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
        if self.steps.samples:
            lines.append("the rollouts are sampled in addition, which often takes longer than the steps")
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


def unknown_lines(step: Plan) -> list[str]:
    """Return the lines in place of a cost, for a train step without an estimate of its time."""
    why = f"no speed of {step.machine} is known" if step.fits else "the train step does not fit"
    return [f"time and cost: unknown, because {why}"]


class _Counted(NamedTuple):
    """Rows of a dataset that can be read, and their characters."""

    rows: int
    characters: int


def _count(data: Rows | PairRows | Prompts, ref: str) -> _Counted:
    """Count the rows of a dataset that the run reads. Raises ValueError if too many are invalid."""
    invalid = InvalidRows(data.allowed_invalid, names_first=True)
    rows = characters = 0
    listing = list_chunks(ref).first(data.max_samples)
    for row in chain.from_iterable(chunk.rows() for chunk in listing.chunks()):
        if isinstance(row, InvalidRow):
            invalid.add(row)
        else:
            rows, characters = rows + 1, characters + sum(len(str(x)) for x in row.fields.values())
    check_rows(ref, rows, invalid.total, invalid)
    return _Counted(rows, characters)


def _estimated(data: Rows | PairRows | Prompts, length: str) -> RunSteps:
    """Return the steps of rows that are not tokenised."""
    parts = [_count(source.adapt(data), source.ref) for source in parse_sources(data.train)]
    rows, characters = (sum(values) for values in zip(*parts, strict=True))
    is_fraction = isinstance(data.held_out, int | float) and data.held_out > 0
    trained = rows - (data.held_out_count(rows) if is_fraction else 0)
    source = f"{length} of {trained:,} {data.unit}, at {CHARACTERS} characters per token"
    source += f", with those that data.drop={','.join(data.drop)} leaves out" if data.drop else ""
    tokens, epochs = characters / CHARACTERS * trained / rows, data.epochs or 1.0
    if data.tokens is not None:
        steps = math.ceil(data.tokens / (data.batch * data.max_length))
    elif isinstance(data, Rows) and data.packing:
        steps = math.ceil(epochs * tokens / (data.batch * data.max_length))
    else:
        steps = math.ceil(epochs * trained / data.batch)
    each = data.passes * data.minibatches if isinstance(data, Prompts) else 1
    return RunSteps(max(1, steps) * each, source, isinstance(data, Prompts))
