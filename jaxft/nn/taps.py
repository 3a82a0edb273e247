"""Taps on weights: they collect the inputs of linear layers while a function is traced."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jaxtyping import Array, Float

from jaxft.tree import static, struct

Inputs = dict[str, Float[Array, "... I"]]
_COLLECTED: ContextVar[Inputs | None] = ContextVar("inputs of tapped weights", default=None)


@struct
class InputTap:
    """A weight [I, O] whose input `collect_inputs` collects under `name`."""

    weight: Any
    name: str = static()


@contextmanager
def collect_inputs() -> Iterator[Inputs]:
    """While this is entered, every matmul with an InputTap adds its input to the yielded dict, by name.

    The inputs are tracers of the function that is traced: it has to return them, and must not run the matmul
    inside a scan.
    """
    collected: Inputs = {}
    token = _COLLECTED.set(collected)
    try:
        yield collected
    finally:
        _COLLECTED.reset(token)


def tapped(w: InputTap, x: Float[Array, "... I"]) -> Any:
    """Return the weight of a tap, whose input is x."""
    collected = _COLLECTED.get()
    if collected is not None:
        collected[w.name] = x
    return w.weight
