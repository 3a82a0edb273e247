"""Choose the held-out pairs, and the pairs that mismatched responses come from."""

import numpy as np
from jaxtyping import Bool, Int

from jaxft.data.pack import permutation
from jaxft.data.pairs.batches import derangement
from jaxft.data.pairs.tokens import TokenisedPairs, with_mismatched


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
