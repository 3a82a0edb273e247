"""Taps on weights: while a layer is traced they collect the inputs of its linear layers, which the layer's
outputs may then contain.
"""

from collections.abc import Collection
from typing import Any

from jaxtyping import Array, Float

from jaxft import tree
from jaxft.nn.quant.quant import is_qtensor
from jaxft.tree import Params, static, struct


class Tapped:
    """The inputs that taps have collected of the layer that is traced."""

    def __init__(self) -> None:
        self.inputs: dict[str, Float[Array, "... I"]] = {}

    def take(self) -> dict[str, Float[Array, "... I"]]:
        """Return the inputs of the layer's tapped weights by the names of the taps, and forget them.

        They are tracers: the function of the layer, or the `observe` of a scan over layers, has to call this
        and to return what it computes from them.
        """
        taken, self.inputs = self.inputs, {}
        return taken


@struct
class InputTap:
    """A weight [I, O] of which every matmul puts its input into `tapped` under `name`."""

    weight: Any
    name: str = static()
    tapped: Tapped = static()


def with_taps(params: Params, paths: Collection[str]) -> tuple[Params, Tapped]:
    """Return parameters with taps, named by path, on the weights at `paths`, and what these collect."""
    tapped = Tapped()

    def leaf(path: str, w: Any) -> Any:
        return InputTap(w, path, tapped) if path in paths else w

    return tree.map_with_path(leaf, params, is_leaf=is_qtensor), tapped
