"""Complete prompts that are given as token ids."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array

from jaxft.inference.engine import Engine
from jaxft.inference.sampling import nonfinite_logits
from jaxft.tree import Params


def generate(engine: Engine, params: Params, prompts: Sequence[Sequence[int]], key: Array) -> list[list[int]]:
    """Complete every prompt once: token ids, up to and including a stop token.

    Raises ValueError for an empty prompt, and where logits are not finite.
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ValueError(f"prompt {number} is empty; give at least one token, for example the BOS token")
    tokens = engine.complete(params, prompts, key).tokens[:, 0]
    where = nonfinite_logits(tokens)
    if where:
        raise ValueError(
            f"the logits of token {where[1] + 1} after prompt {where[0] + 1} are not finite; "
            "compute in float32, or check the weights"
        )
    return [row[row >= 0].tolist() for row in np.asarray(tokens)]
