"""Arrange episodes in rows: a prompt once, then its episodes, which do not attend to one another.

Later training rows of an episode (see Trajectory.rows) are after the others, each as a segment with its own
start, and so is an episode whose prompt differs from that of the first one of its group. Given tokens are in
the rows, but have no read position: no loss, entropy or KL is ever computed there. ECHO alone predicts them:
its read positions follow those of sampled tokens and are padding to everything else.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxft.batch import Rollout
from jaxft.data.pack import RowShape
from jaxft.data.prompts import Prompts, rollout_batch_shapes
from jaxft.rl.advantages import PerToken
from jaxft.rl.trajectory import Episodes, Trajectory
from jaxft.tree import Batch

ROW_FRACTIONS = (0.25, 0.5, 1.0)  # row shapes hold such a fraction of the longest episodes


def rollout_shapes(data: Prompts, longest: int, shards: int) -> dict[RowShape, Rollout]:
    """Return the shape of an optimizer step's batch [micro, rows, ...] for each row shape, smallest first.

    longest: tokens of the longest prompt. shards: the mesh's divisor of rows.
    """
    rows = (data.group_row_shape(longest, fraction) for fraction in ROW_FRACTIONS)
    return {shape: rollout_batch_shapes(data, shape, shards) for shape in rows}


def smallest_shape(episodes: Episodes, shapes: Iterable[RowShape], reads_given: bool = False) -> RowShape:
    """Return the first shape that holds every prompt with all of its episodes; see pack_episodes."""
    length = reads = 0
    for prompt, pieces in _groups(episodes):
        length = max(length, len(prompt) + sum(len(piece.ids) for piece in pieces))
        given = sum(len(piece.given) for piece in pieces) if reads_given else 0
        reads = max(reads, given + sum(len(piece.sampled) for piece in pieces))
    return next(shape for shape in shapes if length <= shape.length and reads <= shape.reads)


@dataclass(frozen=True)
class PackedRows:
    """The rows [R, ...] of a rollout, one for each prompt and then empty ones.

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
        """Convert the rows of prompts to values of each sampled token in float64."""
        x = np.zeros(episodes.lengths.size * episodes.size)
        index = self.tokens[: len(rows)]
        x[index[index >= 0]] = rows[index >= 0]
        return x.reshape(-1, episodes.size)


class _Piece(NamedTuple):
    """A training row of an episode up to its last sampled token: after the prompt that its group shares if
    `is_branch`, otherwise with its own start. sampled: indices of sampled tokens in ids. given: of the tokens
    between them, none of an episode with a fault.
    """

    slot: int
    is_branch: bool
    ids: Int[np.ndarray, " n"]
    sampled: Int[np.ndarray, " k"]
    given: Int[np.ndarray, " g"]


def _groups(episodes: Episodes) -> Iterator[tuple[tuple[int, ...], list[_Piece]]]:
    """Yield the prompt that a row begins with, that of the first episode of a group that has one, and the
    training rows of the group's episodes, those that share its tokens first.
    """
    for first in range(0, len(episodes.trajectories), episodes.group):
        group = episodes.trajectories[first : first + episodes.group]
        prompt = next((t.start for t in group if t.start), ())
        pieces = [piece for slot, t in enumerate(group) for piece in _pieces(slot, t, prompt)]
        yield prompt, sorted(pieces, key=lambda piece: not piece.is_branch)


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
    shape: RowShape,
    size: tuple[int, int] | None = None,
    reads_given: bool = False,
) -> PackedRows:
    """Pack each prompt with its episodes into a row.

    size: (rows, episode slots of a row), None for those that the episodes need; the others stay empty.
    reads_given: whether tokens that an episode was given before its last turn have read positions too, after
    those of all sampled tokens, as padding with an observation weight of 1.
    """
    rows, slots = size or episodes.lengths.shape
    ids, segments, positions, branches = (np.zeros((rows, shape.length), np.int32) for _ in range(4))
    read, targets = (np.zeros((rows, shape.reads), np.int32) for _ in range(2))
    responses, tokens = (np.full((rows, shape.reads), x, np.int32) for x in (slots, -1))
    lengths, last = (np.zeros((rows, slots), np.int32) for _ in range(2))
    weights = np.zeros((rows, shape.reads), np.float32) if reads_given else None
    for r, (prompt, pieces) in enumerate(_groups(episodes)):
        start = column = len(prompt)
        ids[r, :start], segments[r, :start], positions[r, :start] = prompt, 1, np.arange(start)
        segment, m, observed = 1, 0, list[int]()
        for slot, is_branch, own, sampled, given in pieces:
            segment += not is_branch
            span, reads = slice(column, column + len(own)), slice(m, m + len(sampled))
            ids[r, span], segments[r, span] = own, segment
            positions[r, span] = (start if is_branch else 0) + np.arange(len(own))
            branches[r, span] = slot + 1 if is_branch else 0
            read[r, reads] = np.where(sampled, column + sampled, start) - 1
            targets[r, reads], responses[r, reads] = own[sampled], slot
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


def to_microbatches(rows: Batch, like: Batch, padding: int) -> Batch:
    """Reshape rows [n, ...] to [micro, rows, ...] and append empty rows up to the shape of `like`. padding:
    the response id that marks padding.
    """
    micro, padded_rows = like.ids.shape[:2]
    grid = jax.tree.map(lambda x: x.reshape(micro, x.shape[0] // micro, *x.shape[1:]), rows)
    own_rows = grid.ids.shape[1]

    def pad_rows(x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, 0), (0, padded_rows - own_rows), *((0, 0),) * (x.ndim - 2)))

    grid = jax.tree.map(pad_rows, grid)
    is_padding = (np.arange(padded_rows) >= own_rows)[:, None]
    return replace(grid, responses=np.where(is_padding, padding, grid.responses))
