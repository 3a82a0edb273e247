"""What a run shows of its pairs: the first as text, held-out prompts and responses, the ends of responses."""

from typing import Any

import numpy as np
from jaxtyping import Int

from jaxft.batch import Pairs
from jaxft.data.pairs.tokens import TokenisedPairs
from jaxft.data.source import Prompt


def prompts_of_row(batch: Pairs, row: int, count: int) -> list[Prompt]:
    """Return up to `count` prompts of a row with their chosen response."""
    prompts = []
    kinds = len(batch.kinds)
    for slot in np.flatnonzero(batch.pair_weights[0, row] > 0)[:count]:
        where = np.flatnonzero(batch.responses[0, row] == slot * kinds + batch.kinds.index("chosen"))
        if not len(where):
            continue
        last = batch.read[0, row, where[0]]
        inside = np.flatnonzero(batch.segments[0, row] == batch.segments[0, row, last])
        ids = batch.ids[0, row, inside[0] : last + 1].tolist()
        prompts.append(Prompt(ids, batch.targets[0, row, where].tolist()))
    return prompts


def preview_pair(pairs: TokenisedPairs, pair: int, tokenizer: Any) -> str:
    """Return a pair as text, a line for the prompt and each response."""
    names = ("prompt", *pairs.kinds)
    lines = [
        f"{name}: {tokenizer.decode(pairs.piece(pair, number), skip_special_tokens=False)}"
        for number, name in enumerate(names)
        if name == "prompt" or pairs.counts[pair, number]
    ]
    moved = int(pairs.prompt_end_moved.sum())
    if moved:
        lines.append(
            f"in {moved} of {len(pairs.prompt_end_moved)} pairs the response does not begin where the prompt "
            "ends, because a token spans both"
        )
    return "\n".join(lines)


def whole_ends(pairs: TokenisedPairs) -> Int[np.ndarray, " responses"]:
    """Return the last target of each response that is not truncated."""
    ends = pairs.ends[~pairs.truncated]
    return ends[ends >= 0]
