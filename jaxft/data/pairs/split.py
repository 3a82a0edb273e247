"""Choose the held-out pairs, and the pairs that mismatched responses come from."""

import hashlib
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Int

from jaxft.data.flat import Flat
from jaxft.data.pack import permutation, ranges
from jaxft.data.pairs.batches import derangement
from jaxft.data.pairs.tokens import TokenisedPairs


def held_out_pairs(pairs: TokenisedPairs, seed: int, count: int) -> Bool[np.ndarray, " pairs"]:
    """Return a mask of at least `count` pairs to hold out.

    All pairs of one prompt are on one side, and neither is empty.
    """
    prompts = pairs.group_by(0)
    if not prompts.any():  # all pairs have the same prompt
        prompts = np.arange(len(pairs))
    shuffled = prompts[permutation(len(pairs), seed, 0)]
    distinct = shuffled[np.sort(np.unique(shuffled, return_index=True)[1])]
    sizes = np.bincount(prompts)[distinct]
    held = distinct[:-1][(np.cumsum(sizes) - sizes < count)[:-1]]
    return np.isin(prompts, held)


def mismatch_responses(
    pairs: TokenisedPairs, sides: tuple[Int[np.ndarray, " _"], ...], seed: int, limit: int
) -> TokenisedPairs:
    """Add to each pair a response of another pair of the same split, if possible with another prompt.
    Otherwise the other pair has the same prompt and other responses. limit: tokens of the prompt with that
    response.
    """
    donors = np.arange(len(pairs))
    prompts, everything = pairs.group_by(0), pairs.group_by(*range(1 + len(pairs.kinds)))
    for members in filter(len, sides):
        partner = derangement(prompts[members], seed)
        partner = derangement(everything[members], seed) if partner is None else partner
        if partner is None:
            raise ValueError(
                f"{pairs.names[members[0]]}: data.third=mismatched takes each pair's third response from "
                f"another pair, and more than half of these {len(members)} pairs are the same; add rows or "
                "change data.held_out"
            )
        donors[members] = members[partner]
    return with_mismatched(pairs, donors, limit)


def with_mismatched(pairs: TokenisedPairs, donors: Int[np.ndarray, " pairs"], limit: int) -> TokenisedPairs:
    """Add a response "mismatched" to each pair: one of pair donors[i], truncated to `limit` tokens with the
    prompt.

    Of donors with both responses, every other one lends its chosen response and the rest their rejected one:
    KTO's reference point is a mean over both kinds (arXiv:2402.01306, section 4.1), as in TRL, which makes
    two rows of a pair.
    """
    has_response = pairs.counts[donors, 1:3] > 0
    column = 1 + has_response.argmax(1)
    both = np.flatnonzero(has_response.all(1))
    column[both] = 1 + np.arange(len(both)) % 2
    counts = np.minimum(pairs.counts[donors, column], limit - pairs.counts[:, 0])
    ends = np.where(counts < pairs.counts[donors, column], -1, pairs.ends[donors, column - 1])
    starts = np.column_stack([pairs.starts, pairs.starts[donors, column]])
    counts = np.column_stack([pairs.counts, counts])
    where = ranges(starts.ravel(), counts.ravel())
    offsets = np.concatenate([[0], np.cumsum(counts)])
    learned = pairs.learned[where]
    without_prompt = counts[:, 0] == 0
    learned[offsets[:-1].reshape(counts.shape)[without_prompt, -1]] = False
    bounds = np.concatenate([[0], np.cumsum(learned)])[offsets]
    digest = hashlib.sha256(pairs.digest.encode() + learned.tobytes() + donors.tobytes())
    return replace(
        pairs,
        kinds=(*pairs.kinds, "mismatched"),
        ids=Flat([pairs.ids[where]]),
        learned=Flat([learned]),
        offsets=offsets,
        reads=np.diff(bounds).reshape(counts.shape)[:, 1:],
        ends=np.column_stack([pairs.ends, ends]),
        hashes=np.column_stack([pairs.hashes, pairs.hashes[donors, column]]),
        digest=digest.hexdigest(),
    )
