"""Synthetic preference pairs: a PairBatch of given log-ratios, lengths and log-probs, to test losses without
a model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxft.objectives.pair import PairBatch, PairTokens, Response

TOKENS = 16  # of a response, by default
PER_TOKEN = -1.5  # the reference's log-prob per token, by default
ZERO_COLUMNS = ("margin", "score_rejected")  # other columns are 1
READS = 160  # read positions of a row; one size, so that a loss is compiled once


def synthetic_pairs(
    ratio: Mapping[str, Any],
    length: Mapping[str, Any] | int = TOKENS,
    reference: Mapping[str, Any] | float = TOKENS * PER_TOKEN,
    columns: Iterable[str] = ("margin",),
    reads: int = READS,
    dtype: DTypeLike = np.float32,
) -> PairBatch:
    """Pairs [N, 1] of given summed log-ratios, lengths and summed reference log-probs: a number or an array
    [N] per kind.

    The log-prob of a response is spread evenly over its tokens, log sum_v p_v^2 is -1, columns are 1,
    those of ZERO_COLUMNS 0. A response of length 0 is missing; a mean length is that of the N pairs. The
    arrays are NumPy's. Raises ValueError if a pair has more than `reads` tokens.
    """
    kinds = tuple(sorted(ratio))  # the order of a dict's keys after jax.jit
    given = [
        np.atleast_1d(x[kind] if isinstance(x, Mapping) else x)
        for x in (ratio, length, reference)
        for kind in kinds
    ]
    table = np.stack(np.broadcast_arrays(*given)).astype(np.float64)  # [3 A, N]
    ratios, lengths, known = table.reshape(3, len(kinds), table.shape[1]).swapaxes(1, 2)
    longest = int(lengths.sum(1).max())
    if longest > reads:
        raise ValueError(
            f"a pair of {longest} tokens exceeds reads={reads}. Use synthetic_pairs(reads={longest})"
        )
    exists, divisor = lengths > 0, np.maximum(lengths, 1)
    known = np.where(exists, known, 0.0)
    logp = known + np.where(exists, ratios, 0.0)

    def column(x: np.ndarray) -> Any:
        return x[:, None].astype(dtype)

    mean = [divisor[exists[:, k], k].mean() if exists[:, k].any() else 1.0 for k in range(len(kinds))]
    responses = {
        kind: Response(
            logp=column(logp[:, k]),
            reference=column(known[:, k]),
            length=column(divisor[:, k]),
            mean_length=column(np.full(len(logp), mean[k])),
            present=column(exists[:, k]),
        )
        for k, kind in enumerate(kinds)
    }
    given_columns: Any = {
        name: np.full((len(logp), 1), float(name not in ZERO_COLUMNS), np.float32) for name in columns
    }
    return PairBatch(
        responses,
        _tokens(logp / divisor, known / divisor, lengths.astype(int), reads, dtype),
        given_columns,
        column(np.ones(len(logp))),
    )


def _tokens(
    logp: np.ndarray, known: np.ndarray, lengths: np.ndarray, reads: int, dtype: DTypeLike
) -> PairTokens:
    """Read positions of rows with one slot each, from log-probs per token and lengths [N, A]."""
    N, A = lengths.shape
    response, position = np.full((N, reads), A, np.int32), np.zeros((N, reads), np.int32)
    for n, row in enumerate(lengths):
        response[n, : row.sum()] = np.repeat(np.arange(A), row)
        position[n, : row.sum()] = np.concatenate([np.arange(count) for count in row])
    real = response < A

    def at(x: np.ndarray) -> Any:
        return np.where(real, np.take_along_axis(x, np.minimum(response, A - 1), 1), 0.0).astype(dtype)

    ids: Any = response
    positions: Any = position
    return PairTokens(at(logp), at(known), at(np.full((N, A), -1.0)), ids, positions)


def pack_rows(pair: PairBatch, slots: int) -> PairBatch:
    """Arrange pairs [N, 1] as a batch [N / slots, slots]. Raises ValueError if slots does not divide N."""
    N, A = pair.weight.shape[0], len(pair.responses)
    if N % slots:
        raise ValueError(f"{N} pairs do not fill rows of {slots}. Use a multiple of {slots} pairs")
    slot = (np.arange(N, dtype=np.int32) % slots)[:, None]
    ids: Any = np.where(pair.tokens.response < A, pair.tokens.response + slot * A, slots * A).astype(np.int32)
    whole = replace(pair, tokens=replace(pair.tokens, response=ids))
    return jax.tree.map(lambda x: x.reshape(N // slots, slots * x.shape[1]), whole)


def varied_pairs(kinds: tuple[str, ...], count: int, reach: float = 8.0) -> dict[str, Any]:
    """Arguments of synthetic_pairs for distinct pairs with |log-ratio| <= reach."""
    rng = np.random.default_rng(0)
    ratio = {kind: rng.uniform(-reach, reach, count) for kind in kinds}
    length = {kind: rng.permutation(np.linspace(4, 48, count)).astype(int) for kind in kinds}
    return {
        "ratio": ratio,
        "length": length,
        "reference": {kind: -reach - rng.uniform(4, 40, count) for kind in kinds},
    }
