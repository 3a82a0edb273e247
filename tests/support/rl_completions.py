"""Random completions of random prompts, on the host and without a model."""

import json
from types import SimpleNamespace

import numpy as np

from jaxft.data.example import Completion
from jaxft.data.flat import Flat, RowNames
from jaxft.data.prompt_rows import PromptRows, TokenisedPrompts
from jaxft.data.prompts import Prompts

TOKENIZER = SimpleNamespace(decode=lambda *_, **__: "", eos_token_id=0, chat_template=None)
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


def stored_prompts(count):
    """The same prompts as a source of rollouts has them."""
    prompts = random_prompts(count)
    ids = np.array([i for prompt in prompts.ids for i in prompt], np.int32)
    texts = [json.dumps({"prompt": name}).encode() for name in prompts.names]
    return PromptRows(
        settings=Prompts("x", format="plain").token_settings,
        chosen=np.arange(count),
        ids=Flat([ids]),
        offsets=np.cumsum([0, *map(len, prompts.ids)]),
        texts=Flat([np.frombuffer(b"".join(texts), np.uint8)]),
        text_offsets=np.cumsum([0, *map(len, texts)]),
        hashes=np.arange(2 * count, dtype=np.uint64).reshape(count, 2),
        row_names=RowNames(["rows"], Flat([np.zeros(count, int)]), Flat([np.arange(count)])),
        largest_id=int(ids.max()),
        dropped=0,
        invalid=(),
        examples=(),
        order=np.zeros(count),
        placeholders=np.zeros(count, bool),
        sources=np.zeros(count, int),
        formats=("plain",),
    )
