"""Second moments of the inputs of linear layers on calibration rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.data.invalid import invalid_lines
from jaxft.data.sft import Rows
from jaxft.distributed import sharding
from jaxft.models.model import Model
from jaxft.objectives.sft import sft
from jaxft.tree import Params
from jaxft.weights import gptq


@dataclass(frozen=True)
class Calibration:
    """Calibration rows, in the formats of training; all of their tokens count.

    rows: a file, a folder or a hub dataset. columns, invalid: as data.columns and data.invalid. tokens: how
    many are used. max_length: of a packed row.
    """

    rows: str
    columns: tuple[str, ...] = ()
    invalid: str = "error"
    tokens: int = 16384
    max_length: int = 512

    def __post_init__(self):
        if self.tokens < self.max_length:
            raise ValueError(
                f"--tokens {self.tokens} is less than one row of --max-length {self.max_length}; raise it"
            )


def input_moments(
    calibration: Calibration,
    model: Model,
    tokenizer: Any,
    paths: list[str],
    load: Callable[[jax.sharding.Mesh], Params],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Return the sum of x x^T over the inputs x of each of the linear layers `paths`, float32 [L, I, I].

    load(mesh): returns the base parameters. progress: called with lines for the user.
    """
    mesh = sharding.make_mesh(sharding.MeshShape())
    with jax.set_mesh(mesh):
        rows = Rows(
            calibration.rows,
            held_out=0.0,
            columns=calibration.columns,
            invalid=calibration.invalid,
            loss_on="all",
            max_length=calibration.max_length,
            batch=4,
        )
        source = rows.open(tokenizer, sharding.row_shards(mesh))
        for line in invalid_lines(source.info.stats.invalid):
            progress(line)
        base = load(mesh)
        steps = min(source.info.steps, -(-calibration.tokens // (rows.batch * rows.max_length)))
        objective = sft(model)

        def batches() -> Iterator[Any]:
            for step in range(steps):
                progress(f"calibrating on batch {step + 1} of {steps}")
                yield jax.tree.map(lambda x: jnp.asarray(x[0]), source.batch(step)[0])

        return gptq.second_moments(
            model, base, paths, batches(), lambda params, batch: objective(params, batch, None, {})[0]
        )
