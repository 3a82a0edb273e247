"""The run that a rollout source is bound to, and compiled passes of its model over the rows of a rollout."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft import tree
from jaxft.batch import Rollout, TrainState
from jaxft.data.pack import RowShape
from jaxft.distributed import sharding
from jaxft.models.model import Model
from jaxft.objectives.objective import Objective
from jaxft.rl.completions import Completions
from jaxft.tree import Aux, Params

RowFunction = Callable[[Params, Aux, Rollout], Any]
RolloutPass = Callable[[Completions, TrainState], Any]


@dataclass(frozen=True)
class BoundRun:
    """The parts of a run that a rollout source uses.

    state, frozen_shapes: shapes and shardings of TrainState and of the frozen parameters. frozen: their
    arrays. stop: tokens that end a completion. folder: of completions.jsonl. fused_backward: whether
    parameters are updated inside the backward pass.
    """

    mesh: jax.sharding.Mesh
    model: Model
    objective: Objective
    state: TrainState
    frozen_shapes: Params
    frozen: Params
    stop: tuple[int, ...]
    folder: Path
    fused_backward: bool = False

    @property
    def param_shapes(self) -> Params:
        """Shapes and shardings of all parameters."""
        return tree.combine(self.state.trainable, self.frozen_shapes)

    def params(self, state: TrainState) -> Params:
        """All parameters of a state."""
        return tree.combine(state.trainable, self.frozen)


@dataclass(frozen=True)
class RolloutPrograms:
    """Compile functions of a rollout's rows, one program for each row shape.

    shapes: of a batch [micro, rows, ...] by row shape. rows: rows of a batch before padding for the mesh.
    complete: adds the fields of a training batch to rows. max_length: most tokens of a prompt with a
    completion.
    """

    run: BoundRun
    shapes: Mapping[RowShape, Rollout]
    rows: int
    complete: Callable[[Rollout], Rollout]
    max_length: int

    def compile(self, fn: RowFunction) -> RolloutPass:
        """Compile `fn(params, aux, batch)` of batches [micro, rows, ...] as a function of a whole rollout.

        It runs `fn` on batches of the size that the policy is trained on and returns arrays [prompts, ...].
        """
        run = self.run
        jitted = jax.jit(fn, out_shardings=sharding.replicated(run.mesh))

        def sharded(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(run.mesh, x.shape))

        programs = {
            shape: jitted.lower(run.param_shapes, run.state.aux, jax.tree.map(sharded, batch)).compile()
            for shape, batch in self.shapes.items()
        }

        def over_rollout(completions: Completions, state: TrainState) -> Any:
            program, params = programs[completions.row_shape], run.params(state)
            rows = self.complete(completions.rows)
            starts = range(0, rows.ids.shape[0], self.rows)
            batches = [jax.tree.map(lambda x, s=start: x[s : s + self.rows], rows) for start in starts]
            parts = [self._over_batch(program, params, state.aux, batch) for batch in batches]
            count = len(completions.prompts)
            return jax.tree.map(lambda *x: np.concatenate(x)[:count], *parts)

        return over_rollout

    def _over_batch(self, program: Any, params: Params, aux: Aux, rows: Rollout) -> Any:
        """The arrays [rows, ...] of one batch of rows, padded for the mesh and back."""
        micro, padded_rows = next(iter(self.shapes.values())).ids.shape[:2]
        own_rows = self.rows // micro

        def pad(x: np.ndarray) -> np.ndarray:
            x = x.reshape(micro, own_rows, x.shape[-1])
            return np.pad(x, ((0, 0), (0, padded_rows - own_rows), (0, 0)))

        def unpad(x: jax.Array) -> np.ndarray:
            return np.asarray(x)[:, :own_rows].reshape(self.rows, x.shape[-1])

        batch = sharding.shard_batch(self.run.mesh, jax.tree.map(pad, rows))
        return jax.tree.map(unpad, program(params, aux, batch))
