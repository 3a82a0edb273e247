"""Arrange completions in rows: a prompt once, then its completions, which do not attend to one another.

On the host a rollout has per-token arrays [G N, S] of N completions of each of G prompts, 0 beyond the
length; a program reads rows [G, M] of read positions. `to_rows` and `to_completions` convert between the two.
"""

from dataclasses import dataclass, replace

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped

from jaxft.batch import Rollout
from jaxft.data.pack import RowShape
from jaxft.data.prompt_rows import TokenisedPrompts
from jaxft.data.prompts import Prompts, padded_length, rollout_batch_shapes
from jaxft.rl.advantages import GroupLengths, PerToken, token_mask
from jaxft.tree import Batch

ROW_FRACTIONS = (0.25, 0.5, 1.0)  # row shapes hold such a fraction of the longest completions


@dataclass(frozen=True)
class RolloutShapes:
    """Shapes of a rollout's rows. A rollout uses the smallest of them that holds its completions.

    prompt_size: tokens that prompts are padded to for sampling. rows: the row shapes, smallest first.
    batches: of an optimizer step [micro, rows, ...], one for each row shape.
    """

    prompt_size: int
    rows: tuple[RowShape, ...]
    batches: tuple[Rollout, ...]


def rollout_shapes(data: Prompts, longest: int, shards: int) -> RolloutShapes:
    """Return the shapes for prompts of at most `longest` tokens. shards: the mesh's divisor of rows."""
    counts = [int(fraction * data.group * data.max_new) for fraction in ROW_FRACTIONS]
    rows = tuple(
        dict.fromkeys(RowShape(padded_length(longest + count), padded_length(count)) for count in counts)
    )
    return RolloutShapes(
        padded_length(longest), rows, tuple(rollout_batch_shapes(data, shape, shards) for shape in rows)
    )


def fits(prompts: TokenisedPrompts, lengths: GroupLengths, shape: RowShape) -> bool:
    """Whether rows of this shape hold every prompt with all of its completions."""
    count = lengths.sum(1)
    prompt_lengths = np.array([len(ids) for ids in prompts.ids])
    return bool(count.max() <= shape.reads and (prompt_lengths + count).max() <= shape.length)


def pack_rollout(
    prompts: TokenisedPrompts,
    tokens: Int[np.ndarray, "G N S"],
    lengths: GroupLengths,
    shape: RowShape,
    size: tuple[int, int] | None = None,
) -> Rollout:
    """Pack each prompt with its completions into a row. Log-probs, advantages and weights are zero.

    tokens: padded to the most that a completion may have. size: (rows, completion slots of a row), None for
    those that the completions need; the others stay empty.
    """
    rows, slots = size or lengths.shape
    ids, segments, positions, branches = (np.zeros((rows, shape.length), np.int32) for _ in range(4))
    read, targets = (np.zeros((rows, shape.reads), np.int32) for _ in range(2))
    responses, zero = np.full((rows, shape.reads), slots, np.int32), np.zeros((rows, shape.reads), np.float32)
    slot_lengths = np.zeros((rows, slots), np.int32)
    slot_lengths[: len(lengths), : lengths.shape[1]] = lengths
    for r, prompt in enumerate(prompts.ids):
        start = column = len(prompt)
        ids[r, :start], segments[r, :start], positions[r, :start] = prompt, 1, np.arange(start)
        m = 0
        for j in np.flatnonzero(lengths[r]):
            n = lengths[r, j]
            span, reads = slice(column, column + n), slice(m, m + n)
            ids[r, span] = targets[r, reads] = tokens[r, j, :n]
            segments[r, span], branches[r, span], positions[r, span] = 1, j + 1, start + np.arange(n)
            read[r, m], read[r, m + 1 : m + n] = start - 1, column + np.arange(n - 1)
            responses[r, reads] = j
            column, m = column + n, m + n
    return Rollout(
        ids, segments, positions, read, targets, responses, logps=zero, advantages=zero, policy_weights=zero,
        lengths=slot_lengths, branches=branches, sampled_length=tokens.shape[2],
    )  # fmt: skip


def to_rows(
    x: Shaped[np.ndarray, "n S"], lengths: GroupLengths, reads: int
) -> Float[np.ndarray, "G {reads}"]:
    """Convert values of each completion's tokens [G N, S] to rows [G, reads] in float32."""
    rows = np.zeros((len(lengths), reads), np.float32)
    by_completion = np.asarray(x).reshape(*lengths.shape, -1)
    for r, (values, count) in enumerate(zip(by_completion, lengths, strict=True)):
        rows[r, : count.sum()] = values[token_mask(count, by_completion.shape[2])]
    return rows


def to_completions(rows: Float[np.ndarray, "G M"], lengths: GroupLengths, size: int) -> PerToken:
    """Convert rows [G, M] to values of each completion's tokens [G N, size] in float64."""
    x = np.zeros((*lengths.shape, size))
    for r, count in enumerate(lengths):
        x[r][token_mask(count, size)] = rows[r, : count.sum()]
    return x.reshape(lengths.size, size)


def to_microbatches(rows: Batch, like: Batch, padding: int) -> Batch:
    """Reshape rows [n, ...] to [micro, rows, ...] and append empty rows up to the shape of `like`. padding:
    the completion id that marks padding.
    """
    micro, padded_rows = like.ids.shape[:2]
    grid = jax.tree.map(lambda x: x.reshape(micro, x.shape[0] // micro, *x.shape[1:]), rows)
    own_rows = grid.ids.shape[1]

    def pad(x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, 0), (0, padded_rows - own_rows), *((0, 0),) * (x.ndim - 2)))

    grid = jax.tree.map(pad, grid)
    is_padding = (np.arange(padded_rows) >= own_rows)[:, None]
    return replace(grid, responses=np.where(is_padding, padding, grid.responses))
