"""Log-probabilities of continuations of contexts, given as token ids, in batches of few shapes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxft.batch import Tokens
from jaxft.data.progress import RowProgress
from jaxft.distributed import sharding
from jaxft.engine.sampling import BUCKET
from jaxft.objectives.read_positions import read_logps
from jaxft.runs.loaded_weights import LoadedWeights
from jaxft.tree import Params
from jaxft.weights.pretrained import check_token_id

FEW_READS = 32  # read positions of rows with short continuations, such as those of multiple choice


class Continuation(NamedTuple):
    """Token ids of a context, at least one, and of a continuation, whose log-probability is computed."""

    context: Sequence[int]
    tokens: Sequence[int]


class ContinuationScore(NamedTuple):
    """logp: log-probability in nats. greedy: whether every token is the model's most likely one."""

    logp: float
    greedy: bool


class _Read(NamedTuple):
    """A position of a row, the token that follows it, and the index of its continuation."""

    position: int
    target: int
    number: int


class _ScoredRow(NamedTuple):
    """Tokens that the model reads, and what is read from it. Continuations that differ in the last token only
    share a row.
    """

    ids: tuple[int, ...]
    reads: list[_Read]


@dataclass(frozen=True)
class TokenScorer:
    """Scores continuations by one model. Programs are compiled for rows of 64, 128, 256, ... tokens.

    loaded: the model. batch: rows that are computed together. length: the most tokens that the model reads;
    of longer contexts the last ones. forward: compiled for each shape of a batch.
    """

    loaded: LoadedWeights
    batch: int
    length: int
    forward: Callable[[Params, Tokens], tuple[jax.Array, jax.Array]]

    def scores(self, continuations: Sequence[Continuation]) -> list[ContinuationScore]:
        """Return the score of each continuation, and print progress while it takes long.

        Raises ValueError for a continuation without tokens or with more than `length`, for a token that the
        model does not have, and for log-probabilities that are not finite.
        """
        rows = rows_of(continuations, self.length)
        largest = max((max(row.ids) for row in rows), default=0)
        largest = max(largest, max((read.target for row in rows for read in row.reads), default=0))
        check_token_id("the model", largest, self.loaded.model.config.vocab)
        logps, greedy = [0.0] * len(continuations), [True] * len(continuations)
        with RowProgress("scoring", len(rows), enabled=True) as progress:
            for shape, part in batches_of(rows, self.batch, self.length):
                logp, top1 = jax.device_get(self.forward(self.loaded.params, self._placed(part, shape)))
                for own_logps, own_top1, row in zip(logp, top1, part):  # the last rows are padding
                    for x, is_top, read in zip(own_logps, own_top1, row.reads):
                        logps[read.number] += float(x)
                        greedy[read.number] &= bool(is_top)
                progress.add(len(part))
        if not all(map(math.isfinite, logps)):
            raise ValueError("log-probabilities are not finite; use --dtype float32, or check the weights")
        return [ContinuationScore(*score) for score in zip(logps, greedy, strict=True)]

    def _placed(self, rows: Sequence[_ScoredRow], shape: tuple[int, int]) -> Tokens:
        """Return rows as a batch on the mesh. shape: tokens and read positions of a row."""
        shards = sharding.row_shards(self.loaded.mesh)
        count, (length, reads) = -(-self.batch // shards) * shards, shape
        ids, segments = (np.zeros((1, count, length), np.int32) for _ in range(2))
        read, targets = (np.zeros((1, count, reads), np.int32) for _ in range(2))
        for i, row in enumerate(rows):
            ids[0, i, : len(row.ids)], segments[0, i, : len(row.ids)] = row.ids, 1
            read[0, i, : len(row.reads)] = [x.position for x in row.reads]
            targets[0, i, : len(row.reads)] = [x.target for x in row.reads]
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape) * segments
        weights = np.zeros(read.shape, np.float32)
        return sharding.shard_batch(
            self.loaded.mesh, Tokens(ids, segments, positions, read, targets, weights, packed=False)
        )


def make_token_scorer(loaded: LoadedWeights, batch: int, length: int) -> TokenScorer:
    """Return the scorer of a model; see TokenScorer."""
    model = loaded.model

    def forward(params: Params, batch: Tokens) -> tuple[jax.Array, jax.Array]:
        rows: Any = jax.tree.map(lambda x: x[0], batch)
        h, _ = model.hidden(params, rows)
        found = read_logps(model, params, h, (rows.read, rows.targets))
        return found.logp, found.top1

    return TokenScorer(loaded, batch, length, jax.jit(forward))


def rows_of(continuations: Sequence[Continuation], length: int) -> list[_ScoredRow]:
    """Return the rows that are computed. Raises ValueError for a continuation of no or too many tokens."""
    found: dict[tuple[int, ...], _ScoredRow] = {}
    rows = []
    for number, (context, tokens) in enumerate(continuations):
        if not tokens or not context:
            raise ValueError(
                f"continuation {number + 1} has no {'context ' if tokens else ''}tokens; check that the "
                "task's contexts and choices are not empty"
            )
        if len(tokens) > length:
            raise ValueError(
                f"continuation {number + 1} has {len(tokens)} tokens, more than the {length} that the model "
                "reads; use a larger --max-length, or leave out this task"
            )
        ids = tuple([*context, *tokens][-(length + 1) : -1])
        first = len(ids) - len(tokens)
        reads = [_Read(first + i, token, number) for i, token in enumerate(tokens)]
        row = found.get(ids)
        if row is None or len(row.reads) + len(reads) > read_sizes(length_bucket(len(ids), length))[-1]:
            row = found[ids] = _ScoredRow(ids, [])
            rows.append(row)
        row.reads.extend(reads)
    return rows


def length_bucket(count: int, length: int) -> int:
    """Return the padded size of a row of `count` tokens: 64 times a power of two, or that of `length`."""
    size = BUCKET
    while size < count:
        size *= 2
    return min(size, -(-length // BUCKET) * BUCKET)


def read_sizes(size: int) -> tuple[int, ...]:
    """Return the numbers of read positions that rows of `size` tokens are padded to, ascending."""
    return (FEW_READS, size)


def batches_of(
    rows: Sequence[_ScoredRow], batch: int, length: int
) -> list[tuple[tuple[int, int], list[_ScoredRow]]]:
    """Return (tokens, read positions) of a padded row and its rows for each batch, the longest first: what is
    too large for the memory fails at once.
    """
    of_shape: dict[tuple[int, int], list[_ScoredRow]] = {}
    for row in rows:
        size = length_bucket(len(row.ids), length)
        reads = next(count for count in read_sizes(size) if count >= len(row.reads))
        of_shape.setdefault((size, reads), []).append(row)
    return [
        (shape, found[i : i + batch])
        for shape, found in sorted(of_shape.items(), key=lambda item: item[0], reverse=True)
        for i in range(0, len(found), batch)
    ]
