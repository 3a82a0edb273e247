"""Random completions of random prompts, on the host and without a model."""

from types import SimpleNamespace

import numpy as np

from jaxft.data.example import Completion
from jaxft.data.prompts import TokenisedPrompts

TOKENIZER = SimpleNamespace(decode=lambda *_, **__: "", eos_token_id=0)
LENGTHS = np.array([[3, 0, 7], [1, 5, 2]])


def random_completions(lengths, seed=0, size=7):
    """(prompts of 2, 3, 4, ... tokens, tokens [G, N, size] of completions of these lengths)."""
    rng = np.random.default_rng(seed)
    ids = tuple(tuple(rng.integers(0, 40, 2 + i).tolist()) for i in range(len(lengths)))
    tokens = rng.integers(0, 40, (*lengths.shape, size))
    tokens[np.arange(size) >= lengths[..., None]] = -1
    names = tuple(f"rows:{i}" for i in range(len(ids)))
    return TokenisedPrompts(ids, names, (Completion("", "", ""),) * len(ids), ({},) * len(ids)), tokens


def random_prompts(count, group=1):
    """`count` prompts of 2, 3, 4, ... tokens."""
    return random_completions(np.ones((count, group), int))[0]
