"""Pairs that no model scored: a PairBatch of given log-ratios, lengths and log-probs, to look at losses with."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxft.objectives.pair import PairBatch, PairTokens, Response

TOKENS = 16  # of an answer, where nothing else is said
PER_TOKEN = -1.5  # the reference's log-prob of a token
ROOM = 160  # read positions of a row; one size, so that a loss is compiled once


def pairs(
    ratio: Mapping[str, Any],
    length: Mapping[str, Any] | int = TOKENS,
    reference: Mapping[str, Any] | float = TOKENS * PER_TOKEN,
    columns: Iterable[str] = ("margin",),
    room: int = ROOM,
    dtype: Any = np.float32,
) -> PairBatch:
    """Pairs [N, 1] of given summed log-ratios, lengths and summed reference log-probs; a number or an array
    [N] a kind.

    The log-prob of an answer is spread evenly over its tokens, log sum_v p_v^2 is -1, columns 1, `margin` 0.
    Length 0: no answer; a mean length is that of the N pairs. The arrays are NumPy's. Raises ValueError where
    a pair doesn't fit into `room`.
    """
    kinds = tuple(
        sorted(ratio)
    )  # the order that a dict has once it went through jax.jit, where answers are counted off again
    given = [
        np.atleast_1d(x[kind] if isinstance(x, Mapping) else x)
        for x in (ratio, length, reference)
        for kind in kinds
    ]
    table = np.stack(np.broadcast_arrays(*given)).astype(np.float64)  # [3 A, N]
    ratios, lengths, known = table.reshape(3, len(kinds), table.shape[1]).swapaxes(1, 2)
    most = int(lengths.sum(1).max())
    if most > room:
        raise ValueError(f"a pair of {most} tokens doesn't fit into room={room}; give pairs(...) room={most}")
    there, long = lengths > 0, np.maximum(lengths, 1)
    known = np.where(there, known, 0.0)
    logp = known + np.where(there, ratios, 0.0)
    cast: Any = lambda x: x[:, None].astype(dtype)  # noqa: E731
    mean = [long[there[:, k], k].mean() if there[:, k].any() else 1.0 for k in range(len(kinds))]
    answers = {
        kind: Response(
            logp=cast(logp[:, k]),
            reference=cast(known[:, k]),
            length=cast(long[:, k]),
            mean_length=cast(np.full(len(logp), mean[k])),
            present=cast(there[:, k]),
        )
        for k, kind in enumerate(kinds)
    }
    zeros: Any = {name: np.full((len(logp), 1), float(name != "margin"), np.float32) for name in columns}
    return PairBatch(
        answers,
        _tokens(logp / long, known / long, lengths.astype(int), room, dtype),
        zeros,
        cast(np.ones(len(logp))),
    )


def _tokens(logp: np.ndarray, known: np.ndarray, lengths: np.ndarray, room: int, dtype: Any) -> PairTokens:
    """Read positions of rows with one slot each, from log-probs a token and lengths [N, A]."""
    N, A = lengths.shape
    answer, place = np.full((N, room), A, np.int32), np.zeros((N, room), np.int32)
    for n, row in enumerate(lengths):
        answer[n, : row.sum()] = np.repeat(np.arange(A), row)
        place[n, : row.sum()] = np.concatenate([np.arange(count) for count in row])
    real = answer < A

    def at(x: np.ndarray) -> Any:
        return np.where(real, np.take_along_axis(x, np.minimum(answer, A - 1), 1), 0.0).astype(dtype)

    owner: Any = answer
    where: Any = place
    return PairTokens(at(logp), at(known), at(np.full((N, A), -1.0)), owner, where)


def in_rows(pair: PairBatch, slots: int) -> PairBatch:
    """Pairs [N, 1] as a batch [N / slots, slots]. Raises ValueError where N isn't a multiple of slots."""
    N, A = pair.weight.shape[0], len(pair.responses)
    if N % slots:
        raise ValueError(
            f"{N} pairs don't fill rows of {slots}; give in_rows(...) a multiple of {slots} pairs"
        )
    slot = (np.arange(N, dtype=np.int32) % slots)[:, None]
    owner: Any = np.where(pair.tokens.response < A, pair.tokens.response + slot * A, slots * A).astype(
        np.int32
    )
    whole = replace(pair, tokens=replace(pair.tokens, response=owner))
    return jax.tree.map(lambda x: x.reshape(N // slots, slots * x.shape[1]), whole)


def varied(kinds: tuple[str, ...], count: int, reach: float = 8.0) -> dict[str, Any]:
    """`ratio`, `length` and `reference` for pairs(): no two pairs alike, log-ratios within reach, no log-prob
    above 0.
    """
    rng = np.random.default_rng(0)
    ratio = {kind: rng.uniform(-reach, reach, count) for kind in kinds}
    length = {kind: rng.permutation(np.linspace(4, 48, count)).astype(int) for kind in kinds}
    return {
        "ratio": ratio,
        "length": length,
        "reference": {kind: -reach - rng.uniform(4, 40, count) for kind in kinds},
    }
