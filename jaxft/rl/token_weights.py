"""Rules for the weight of a token in the loss of an optimizer batch.

A rule is a function (lengths, mask, max_new) -> weight of a token of each completion, [G, N]. lengths: tokens
of each completion, 0 for an empty slot. mask: completions with a loss (with a score, not filtered out, ...).
max_new: the limit of a completion's length, which most rules ignore. The weights of all tokens in the mask
sum to 1, except for constant_length and sequence_sum; outside of it they are 0.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from jaxft.rl.advantages import GroupLengths, GroupMask, GroupScores

TokenWeights = Callable[[GroupLengths, GroupMask, int], GroupScores]


def token_mean(lengths: GroupLengths, mask: GroupMask, max_new: int) -> GroupScores:
    """Return the same weight for every token: PPO and DAPO (arXiv:2503.14476, eq. 8)."""
    mask = _with_tokens(lengths, mask)
    return mask / max(int((mask * lengths).sum()), 1)


def sequence_mean(lengths: GroupLengths, mask: GroupMask, max_new: int) -> GroupScores:
    """Return the same weight for every completion, shared by its tokens: GRPO (arXiv:2402.03300, eq. 3)."""
    mask = _with_tokens(lengths, mask)
    return mask / (np.maximum(lengths, 1) * max(int(mask.sum()), 1))


def prompt_mean(lengths: GroupLengths, mask: GroupMask, max_new: int) -> GroupScores:
    """Return the same weight for every group, divided among its tokens: ScaleRL (arXiv:2510.13786)."""
    mask = _with_tokens(lengths, mask)
    tokens = (mask * lengths).sum(1, keepdims=True)
    return mask / (np.maximum(tokens, 1) * max(int((tokens > 0).sum()), 1))


def constant_length(
    lengths: GroupLengths, mask: GroupMask, max_new: int, length: int | None = None
) -> GroupScores:
    """Return `1 / (completions * length)`: Dr. GRPO (arXiv:2503.20783). length: None for max_new.

    All completions count, in the mask or not, so that the divisor is a constant. The weights sum to the mean
    over completions of (tokens with a loss) / length. Raises ValueError for a completion longer than that.
    """
    length = max_new if length is None else length
    longest = np.max(lengths, initial=0)
    if longest > length:
        raise ValueError(
            f"constant_length: a completion has {longest} tokens, more than length={length}. Raise it."
        )
    return _with_tokens(lengths, mask) / (max(int((np.asarray(lengths) > 0).sum()), 1) * length)


def sequence_sum(lengths: GroupLengths, mask: GroupMask, max_new: int) -> GroupScores:
    """Return `1 / completions`: the weight of a completion is proportional to its length, as in RLOO and
    LUSPO (arXiv:2602.05261). The weights sum to the mean length of the completions in the mask, by which loss
    and gradients are larger.
    """
    mask = _with_tokens(lengths, mask)
    return mask / max(int(mask.sum()), 1)


def _with_tokens(lengths: Int[np.ndarray, "..."], mask: np.ndarray) -> np.ndarray:
    """The mask without empty slots. Raises ValueError unless it has the shape of lengths."""
    if np.shape(lengths) != np.shape(mask):
        raise ValueError(
            f"the mask of completions has shape {np.shape(mask)}, the lengths {np.shape(lengths)}. "
            "Use one entry for each completion."
        )
    return np.asarray(mask, bool) & (np.asarray(lengths) > 0)
