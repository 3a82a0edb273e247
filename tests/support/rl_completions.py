"""Random completions of random prompts, on the host and without a model."""

import json
from types import SimpleNamespace

import numpy as np

from jaxft.data.packing.row_cache import Flat, RowNames
from jaxft.data.packing.row_tasks import TokenisedPrompts
from jaxft.data.packing.tokenised import ROW_FIELDS, Ragged, TokenisedRows
from jaxft.data.prompts import PromptRows, Prompts
from jaxft.data.rows.example import Completion
from jaxft.data.rows.mixture import SplitRows
from jaxft.rl.trajectory import Fault, Segment, Trajectory, collect

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
    none, nothing = np.zeros(count, int), np.zeros((count, 0), int)
    fields = Ragged(Flat([np.frombuffer(b"".join(texts), np.uint8)]), np.array([*map(len, texts)]))
    rows = TokenisedRows(
        kinds=(), ids=Flat([ids]), learned=Flat([np.zeros(len(ids), bool)]),
        counts=np.array([[len(prompt)] for prompt in prompts.ids]), reads=nothing, ends=nothing,
        hashes=Flat([np.arange(count, dtype=np.uint64)[:, None]]),
        content=Flat([np.arange(count, dtype=np.uint64)]), truncated=none, responses=none,
        learned_responses=none, weights=np.ones(count), order=np.zeros(count), placeholders=none > 0,
        pieces=none, extras={ROW_FIELDS: fields}, digest="", largest_id=int(ids.max()),
        names=RowNames(["rows"], Flat([none]), Flat([np.arange(count)])),
    )  # fmt: skip
    split = SplitRows(rows, np.arange(count), np.arange(0), none, (), (), None)
    return PromptRows(split, split.train, (Prompts("x", format="plain").token_settings,))


def episodes_of(prompts, tokens, lengths, logps=None, limit=None):
    """Completions [G, N, size] as Episodes of one turn. limit: tokens at which they are truncated, None for
    the size.
    """
    size, group = tokens.shape[2], lengths.shape[1]
    logps = np.zeros(tokens.shape) if logps is None else logps.reshape(tokens.shape)
    limit = size if limit is None else limit
    found = []
    for g, ids in enumerate(prompts.ids):
        for n in range(group):
            count = lengths[g, n]
            turn = Segment(tokens[g, n, :count].astype(np.int32), logps[g, n, :count].astype(np.float32))
            said = ({"role": "assistant", "content": "x" * int(count)},)
            found.append(Trajectory(g, tuple(ids), (turn,), ended=bool(count < limit), turns=said))
    return collect(prompts, found, size, size)


def random_episodes(seed=0):
    """Two episodes of each of two prompts: of several turns with given tokens between them, of two training
    rows, with a prompt of its own, and one that the environment has failed before its first turn.
    """
    rng = np.random.default_rng(seed)
    prompts, _ = random_completions(np.ones((2, 2), int), seed)

    def some(count):
        return rng.integers(0, 40, count).astype(np.int32)

    def sampled(count, reward=np.nan):
        return Segment(some(count), rng.normal(-3, 0.3, count).astype(np.float32), reward)

    def given(count):
        return Segment(some(count), None)

    turns = (sampled(3, 0.5), given(4), sampled(1), given(2), sampled(2, 1.0), given(3))
    said = ({"role": "assistant", "content": "said"},)
    first = Trajectory(0, prompts.ids[0], turns, 1.5, turns=said)
    second = Segment(some(5), None, begins=True)
    rewritten = (sampled(2, 0.25), given(1), second, given(2), sampled(3))
    both = Trajectory(0, prompts.ids[0], rewritten, 1.0, turns=said)
    failed = Trajectory(1, (), (), fault="raised", faults=(Fault("raised", "it is broken"),), ended=False)
    other = Trajectory(1, tuple(some(6)), (sampled(4), given(2), sampled(1)), 0.5, turns=said)
    return collect(prompts, [first, both, failed, other], 12, 24, 6)
