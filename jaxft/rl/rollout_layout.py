"""Rows of a rollout, and compiled passes of a run's model over them.

A row has a prompt once, then its episodes, which do not attend to one another. An episode whose prompt
differs from the first one of its group is a segment of its own, after the others; so are later training rows
of an episode (see Trajectory.rows).

A read position is an index in a row whose logits predict a sampled token. Given tokens are in the rows, but
without read positions: they have no loss, entropy or KL. Only ECHO predicts them: their read positions follow
all others, and count as padding everywhere else.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxft.batch import Rollout, TrainState
from jaxft.data.packing.pack import RowShape
from jaxft.data.prompts import Prompts, rollout_batch_shapes
from jaxft.distributed import sharding, threads
from jaxft.models.model import Model
from jaxft.nn import tree
from jaxft.nn.tree import Aux, Batch, Params
from jaxft.objectives.objective import Objective, Scores
from jaxft.rl.advantages import PerToken
from jaxft.rl.trajectory import Episodes, Trajectory

ROW_FRACTIONS = (0.25, 0.5, 1.0)  # of the longest episodes: the sizes of the row shapes


def rollout_shapes(data: Prompts, longest: int, shards: int) -> dict[RowShape, Rollout]:
    """Return the shape of an optimizer step's batch [micro, rows, ...] for each row shape, smallest first.

    longest: tokens of the longest prompt. shards: number of devices among which the mesh divides rows.
    """
    rows = (data.group_row_shape(longest, fraction) for fraction in ROW_FRACTIONS)
    return {shape: rollout_batch_shapes(data, shape, shards) for shape in rows}


@dataclass(frozen=True)
class PackedRows:
    """The rows [R, ...] of a rollout, one for each prompt and then empty ones, with M read positions each.

    rows: log-probs, advantages and weights are zero. tokens: for each read position the index of its token in
    flattened arrays [n, S] over sampled tokens; -1 for padding.
    """

    shape: RowShape
    rows: Rollout
    tokens: Int[np.ndarray, "R M"]

    def from_tokens(self, x: PerToken) -> Float[np.ndarray, "R M"]:
        """Convert values of each sampled token to rows in float32, 0 at padding."""
        flat = np.append(np.asarray(x, np.float32), np.float32(0))
        return flat[self.tokens]

    def to_tokens(self, rows: Float[np.ndarray, "G M"], episodes: Episodes) -> PerToken:
        """Convert values at read positions, a row per prompt, to values of each sampled token in float64."""
        x = np.zeros(episodes.lengths.size * episodes.size)
        index = self.tokens[: len(rows)]
        x[index[index >= 0]] = rows[index >= 0]
        return x.reshape(-1, episodes.size)


class _Piece(NamedTuple):
    """A training row of an episode up to its last sampled token. slot: index of the episode in its group.
    is_branch: ids follow the prompt that the group shares; otherwise ids begin with the episode's own prompt.
    sampled: indices in ids of sampled tokens. given: indices of given tokens between sampled ones; empty for
    an episode with a fault.
    """

    slot: int
    is_branch: bool
    ids: Int[np.ndarray, " n"]
    sampled: Int[np.ndarray, " k"]
    given: Int[np.ndarray, " g"]


def _groups(episodes: Episodes) -> list[tuple[tuple[int, ...], list[_Piece]]]:
    """Return for each group the prompt of its row, which is the first prompt among its episodes, and the
    training rows of its episodes, beginning with those that share this prompt.
    """
    groups = []
    for first in range(0, len(episodes.trajectories), episodes.group):
        group = episodes.trajectories[first : first + episodes.group]
        prompt = next((t.start for t in group if t.start), ())
        pieces = [piece for slot, t in enumerate(group) for piece in _pieces(slot, t, prompt)]
        groups.append((prompt, sorted(pieces, key=lambda piece: not piece.is_branch)))
    return groups


def _pieces(slot: int, trajectory: Trajectory, prompt: tuple[int, ...]) -> Iterator[_Piece]:
    for number, row in enumerate(trajectory.rows()):
        is_branch = number == 0 and trajectory.start == prompt
        first, sampled = len(prompt) if is_branch else 0, np.flatnonzero(row.sampled)
        if len(sampled):
            stop = sampled[-1] + 1
            given = row.start + np.flatnonzero(~row.sampled[row.start : stop])
            given = given[:0] if trajectory.fault else given
            yield _Piece(slot, is_branch, row.ids[first:stop], sampled - first, given - first)


def pack_episodes(
    episodes: Episodes,
    shapes: Iterable[RowShape],
    size: tuple[int, int] | None = None,
    reads_given: bool = False,
) -> PackedRows:
    """Pack each prompt with its episodes into a row, of the first of `shapes` into which all rows fit.

    size: (rows, episode slots of a row), more than needed stay empty; None for as many as needed.
    reads_given: whether tokens that an episode was given before its last turn have read positions too, after
    all sampled tokens, as padding with an observation weight of 1.
    """
    rows, slots = size or episodes.lengths.shape
    groups = _groups(episodes)
    length = max(len(prompt) + sum(len(piece.ids) for piece in pieces) for prompt, pieces in groups)
    count = max(sum(len(p.sampled) + reads_given * len(p.given) for p in pieces) for _, pieces in groups)
    shape = next(shape for shape in shapes if length <= shape.length and count <= shape.reads)
    ids, segments, positions, branches = (np.zeros((rows, shape.length), np.int32) for _ in range(4))
    read, targets = (np.zeros((rows, shape.reads), np.int32) for _ in range(2))
    responses, tokens = (np.full((rows, shape.reads), x, np.int32) for x in (slots, -1))
    lengths, last = (np.zeros((rows, slots), np.int32) for _ in range(2))
    weights = np.zeros((rows, shape.reads), np.float32) if reads_given else None
    for r, (prompt, pieces) in enumerate(groups):
        start = column = len(prompt)
        ids[r, :start], segments[r, :start], positions[r, :start] = prompt, 1, np.arange(start)
        segment, m, observed = 1, 0, list[int]()
        for slot, is_branch, turn, sampled, given in pieces:
            segment += not is_branch
            span, reads = slice(column, column + len(turn)), slice(m, m + len(sampled))
            ids[r, span], segments[r, span] = turn, segment
            positions[r, span] = (start if is_branch else 0) + np.arange(len(turn))
            branches[r, span] = slot + 1 if is_branch else 0
            read[r, reads] = np.where(sampled, column + sampled, start) - 1
            targets[r, reads], responses[r, reads] = turn[sampled], slot
            first = (r * episodes.group + slot) * episodes.size + lengths[r, slot]
            tokens[r, reads] = first + np.arange(len(sampled))
            lengths[r, slot] += len(sampled)
            last[r, slot] = column + sampled[-1]
            observed += (column + given).tolist()
            column, m = span.stop, reads.stop
        if weights is not None:
            reads = slice(m, m + len(observed))
            read[r, reads], targets[r, reads] = np.array(observed, int) - 1, ids[r, observed]
            weights[r, reads] = 1
    zero = np.zeros((rows, shape.reads), np.float32)
    packed = Rollout(
        ids, segments, positions, read, targets, responses, logps=zero, advantages=zero, policy_weights=zero,
        lengths=lengths, branches=branches, last=last, sampled_length=episodes.longest,
        observation_weights=weights,
    )  # fmt: skip
    return PackedRows(shape, packed, tokens)


def per_episode(values: Float[np.ndarray, "R A"], rows: Rollout) -> Float[np.ndarray, "R M"]:
    """Repeat a value of each episode at the read positions of its tokens; 0 at padding."""
    padded = np.pad(
        np.asarray(values, np.float32), ((0, 0), (0, rows.lengths.shape[1] + 1 - values.shape[1]))
    )
    return np.take_along_axis(padded, rows.responses, 1)


def to_microbatches(rows: Batch, like: Batch) -> Batch:
    """Reshape rows [n, ...] to [micro, rows, ...] and append empty rows up to the shape of `like`."""
    micro, padded_rows = like.ids.shape[:2]
    grid = jax.tree.map(lambda x: x.reshape(micro, x.shape[0] // micro, *x.shape[1:]), rows)
    own_rows = grid.ids.shape[1]

    def pad_rows(x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, 0), (0, padded_rows - own_rows), *((0, 0),) * (x.ndim - 2)))

    grid = jax.tree.map(pad_rows, grid)
    is_padding = (np.arange(padded_rows) >= own_rows)[:, None]
    return replace(grid, responses=np.where(is_padding, math.prod(rows.lengths.shape[1:]), grid.responses))


RolloutPass = Callable[[PackedRows, TrainState], Any]
TokenScores = Callable[[PackedRows, Episodes, TrainState], Scores]
Counter = Callable[[str, int], Callable[[int], None]]  # Clock.counter


def uncounted(text: str, total: int) -> Callable[[int], None]:
    """Return a function that ignores counts: BoundRun.counter without a progress line."""
    return lambda more: None


@dataclass(frozen=True)
class BoundRun:
    """The parts of a run that a rollout source uses.

    state, frozen_shapes: shapes and shardings of TrainState and of the frozen parameters. frozen: arrays of
    the frozen parameters. stop: tokens that end a completion. folder: the run's folder. fused_backward:
    whether parameters are updated inside the backward pass. counter(text, total): begins to show progress,
    and returns a function to be called with the number of items done since its last call.
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
    """A run, with the shapes for which functions of a rollout's rows are compiled, a program for each row
    shape.

    shapes: shape of a batch [micro, rows, ...], by row shape. rows: number of rows of a batch before padding
    for the mesh. complete: adds the fields of a training batch to rows. max_length: most tokens of a prompt
    with an episode.
    """

    run: BoundRun
    shapes: Mapping[RowShape, Rollout]
    rows: int
    complete: Callable[[Rollout], Rollout]
    max_length: int

    def compile(self, fn: Callable[[Params, Aux, Rollout], Any]) -> RolloutPass:
        """Compile `fn(params, aux, batch)` of batches [micro, rows, ...] as a function of a rollout's rows.

        It runs `fn` on batches of the size of a training step and returns arrays [R, ...].
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

        def own_rows(x: jax.Array) -> np.ndarray:  # [rows, ...] without padding
            return np.asarray(x)[:, : self.rows // len(x)].reshape(self.rows, x.shape[-1])

        def over_rollout(packed: PackedRows, state: TrainState) -> Any:
            params, like, rows = run.params(state), self.shapes[packed.shape], self.complete(packed.rows)
            parts = []
            for start in range(0, len(packed.tokens), self.rows):
                chunk = jax.tree.map(lambda x, s=start: x[s : s + self.rows], rows)
                batch = sharding.shard_batch(run.mesh, to_microbatches(chunk, like))
                outputs = programs[packed.shape](params, state.aux, batch)
                parts.append(jax.tree.map(own_rows, outputs))
            return jax.tree.map(lambda *x: np.concatenate(x), *parts)

        return over_rollout

    def compile_scores(self) -> TokenScores:
        """Compile the pass that returns log-probs, reference log-probs and values of sampled tokens."""
        over_rollout = self.compile(partial(score_tokens, self.run.objective))

        def scores(packed: PackedRows, episodes: Episodes, state: TrainState) -> Scores:
            arrays = over_rollout(packed, state)
            return Scores(*(None if x is None else packed.to_tokens(x, episodes) for x in arrays))

        return scores


def score_tokens(objective: Objective, params: Params, aux: Aux, batch: Rollout) -> Scores:
    """Return log-probs, reference log-probs and critic values of a batch [micro, rows, ...]."""
    return jax.lax.map(lambda rows: objective.score(params, rows, aux), batch)
