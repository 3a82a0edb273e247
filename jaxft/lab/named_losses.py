"""Preference losses that a command line names, with values of their knobs: `file.py:name,beta=0.2`."""

import inspect
import re
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxft.annotations import PREFERENCE_LOSSES
from jaxft.objectives.pair import declaration, loss_signature
from jaxft.runs.settings.setting_values import UNANNOTATED, find_file, load_callable, parse_value
from jaxft.tree import nearest


@dataclass(frozen=True)
class NamedLoss:
    """A loss of the command line: its label in tables, its function with its knobs, and its file."""

    label: str
    fn: Callable
    file: Path


def parse_losses(texts: Sequence[str], known: Sequence[NamedLoss] = ()) -> list[NamedLoss]:
    """Parse losses, each `name` or `name,knob=value,...`, leaving out duplicates and those in `known`.

    A loss that has the label of another one is labelled with its file too. Raises ValueError for a name that
    is no loss, a knob that the loss does not have, and a value that the knob does not take.
    """
    by_label = {loss.label: loss for loss in known}
    listed = {(loss.file, loss.label) for loss in known}
    for text in texts:
        loss = parse_loss(text)
        if (loss.file, loss.label) in listed:
            continue
        listed.add((loss.file, loss.label))
        labels = (loss.label, f"{loss.file.stem}:{loss.label}", f"{loss.file}:{loss.label}")
        label = next(label for label in labels if label not in by_label)
        by_label[label] = replace(loss, label=label)
    return list(by_label.values())[len(known) :]


def parse_loss(text: str) -> NamedLoss:
    """Parse one loss, `name` or `name,knob=value,...`."""
    name, *items = re.split(r",(?=\s*[^\W\d]\w*\s*=)", text)
    fn, file = _function(name.strip())
    available, values = loss_knobs(fn), dict[str, Any]()
    for item in items:
        knob, _, given = (x.strip() for x in item.partition("="))
        if knob not in available:
            near = ", ".join(nearest(knob, list(available), 5)) or "none, it has no knobs"
            raise ValueError(f"{name} has no knob {knob!r}; near: {near}")
        values[knob] = _knob_value(item.strip(), given, *available[knob])
    label = ",".join([name.rpartition(":")[2], *(item.replace(" ", "") for item in items)])
    return NamedLoss(label, partial(fn, **values) if values else fn, file)


def loss_knobs(loss: Callable) -> dict[str, tuple[Any, Any]]:
    """Return knob -> (annotation, default) of a loss: its parameters after the pair."""
    named = list(loss_signature(loss).parameters.values())[1:]
    try:
        hints = typing.get_type_hints(inspect.unwrap(declaration(loss).fn))
    except (NameError, TypeError):  # an unreadable annotation counts as none
        hints = {}
    return {
        p.name: (hints.get(p.name, UNANNOTATED), p.default)
        for p in named
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }


def loss_beta(loss: NamedLoss) -> float:
    """Return the loss's beta, which scales the logged rewards, or 0.1 if it has none."""
    default = loss_knobs(loss.fn).get("beta", (None, None))[1]
    return float(default) if isinstance(default, int | float) else 0.1


def _function(name: str) -> tuple[Callable, Path]:
    """Return the loss `file.py:name`, `package.module:name` or a short name of jaxft's, and its file."""
    if ":" not in name and name not in PREFERENCE_LOSSES:
        near = ", ".join(nearest(name, list(PREFERENCE_LOSSES), 5))
        raise ValueError(f"no loss is called {name!r}; near: {near}. Use file.py:name for a loss in a file")
    full = PREFERENCE_LOSSES.get(name, name)
    fn, where = load_callable(full), full.rpartition(":")[0]
    return fn, find_file(where) if where.endswith(".py") else Path(inspect.getfile(sys.modules[where]))


def _knob_value(item: str, text: str, kind: Any, default: Any) -> Any:
    """Parse the value of a knob as the type of its annotation, or else of its default."""
    if kind in (UNANNOTATED, Any):
        if default is UNANNOTATED or default is None:
            raise ValueError(
                f"{item}: the knob has neither an annotation nor a default. Annotate it in the loss"
            )
        kind = Callable if callable(default) else type(default)
        kind = int | float if kind is int else kind  # a default of 1 does not exclude 0.5
    try:
        return parse_value(text, kind)
    except ValueError as error:
        raise ValueError(f"{item}: {error}") from error
