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
from jaxft.distributed import sharding, threads
from jaxft.models.model import Model
from jaxft.objectives.objective import Objective, Scores
from jaxft.rl.layout import PackedRows, to_microbatches
from jaxft.tree import Aux, Params

RowFunction = Callable[[Params, Aux, Rollout], Any]
Counter = Callable[[str, int], Callable[[int], None]]  # Clock.counter
RolloutPass = Callable[[PackedRows, TrainState], Any]


def uncounted(text: str, total: int) -> Callable[[int], None]:
    """Return a function that shows no progress."""
    return lambda more: None


@dataclass(frozen=True)
class BoundRun:
    """The parts of a run that a rollout source uses.

    state, frozen_shapes: shapes and shardings of TrainState and of the frozen parameters. frozen: their
    arrays. stop: tokens that end a completion. folder: of completions.jsonl. fused_backward: whether
    parameters are updated inside the backward pass. counter(text, total) -> a function that is called with
    the number of further items that are done, and shows the progress.
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
    counter: Counter = uncounted

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
    complete: adds the fields of a training batch to rows. max_length: most tokens of a prompt with an
    episode.
    """

    run: BoundRun
    shapes: Mapping[RowShape, Rollout]
    rows: int
    complete: Callable[[Rollout], Rollout]
    max_length: int

    def compile(self, fn: RowFunction) -> RolloutPass:
        """Compile `fn(params, aux, batch)` of batches [micro, rows, ...] as a function of a whole rollout.

        It runs `fn` on batches of the size that the policy is trained on and returns arrays [R, ...].
        """
        run = self.run
        jitted = jax.jit(fn, out_shardings=sharding.replicated(run.mesh))

        def sharded(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(run.mesh, x.shape))

        lowered = {
            shape: jitted.lower(run.param_shapes, run.state.aux, jax.tree.map(sharded, batch))
            for shape, batch in self.shapes.items()
        }
        programs = threads.compile_all(lowered, run.mesh.devices.flat[0].platform)

        def over_rollout(packed: PackedRows, state: TrainState) -> Any:
            params, like, rows = run.params(state), self.shapes[packed.shape], self.complete(packed.rows)
            parts = []
            for start in range(0, len(packed.tokens), self.rows):
                own = jax.tree.map(lambda x, s=start: x[s : s + self.rows], rows)
                batch = sharding.shard_batch(run.mesh, to_microbatches(own, like, like.lengths.shape[-1]))
                found = programs[packed.shape](params, state.aux, batch)
                parts.append(jax.tree.map(self._without_padding, found))
            return jax.tree.map(lambda *x: np.concatenate(x), *parts)

        return over_rollout

    def _without_padding(self, x: jax.Array) -> np.ndarray:
        """The arrays [rows, ...] of a batch's own rows."""
        return np.asarray(x)[:, : self.rows // len(x)].reshape(self.rows, x.shape[-1])


def score_tokens(objective: Objective, params: Params, aux: Aux, batch: Rollout) -> Scores:
    """Return log-probs, the reference's and values of a batch [micro, rows, ...]."""
    return jax.lax.map(lambda rows: objective.score(params, rows, aux), batch)
