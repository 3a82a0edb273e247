"""Held-out prompts that a run answers before and after, as text."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxft.batch import Pairs
from jaxft.data.sft import Source
from jaxft.inference.generate import Sampling, left_pad, make_generate, stop_tokens
from jaxft.models.model import Model


def held_out_prompts(source: Source, count: int) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) of the first `count` held-out examples: the answer begins at the first token with a loss."""
    found: list[tuple[list[int], list[int]]] = []
    if hasattr(source, "asked"):
        return source.asked(count)
    for batch in source.held_out:
        for row in range(batch.ids.shape[1]):
            ids, segments = batch.ids[0, row], batch.segments[0, row]
            if isinstance(batch, Pairs):
                found += _pair_prompts(batch, row, count - len(found))
                continue
            reads = batch.read[0, row][batch.token_weights[0, row] > 0]
            for segment in range(1, int(segments.max(initial=0)) + 1):
                inside = np.flatnonzero(segments == segment)
                first = reads[segments[reads] == segment].min() + 1
                if len(found) < count and first > inside[0]:
                    found.append((ids[inside[0] : first].tolist(), ids[first : inside[-1] + 1].tolist()))
    return found


def _pair_prompts(batch: Pairs, row: int, count: int) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, ids of the preferred answer) of up to `count` pairs of a row."""
    found = []
    kinds = len(batch.kinds)
    for slot in np.flatnonzero(batch.pair_weights[0, row] > 0)[:count]:
        where = np.flatnonzero(batch.answers[0, row] == slot * kinds + batch.kinds.index("chosen"))
        if not len(where):
            continue
        last = batch.read[0, row, where[0]]
        inside = np.flatnonzero(batch.segments[0, row] == batch.segments[0, row, last])
        found.append(
            (batch.ids[0, row, inside[0] : last + 1].tolist(), batch.targets[0, row, where].tolist())
        )
    return found


def last_question(tokenizer: Any) -> Callable[[str], str | None]:
    """Picks the user's last words out of a prompt that the chat template has rendered; None where they can't be told apart."""

    def render(*texts: str) -> str:
        turns = [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant", "user"), texts, strict=False)
        ]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    try:
        before, _, tail = render("Qx7w").partition("Qx7w")
        between = render("Qx7w", "Zk9y", "Jv5u").partition("Zk9y")[2].partition("Jv5u")[0]
    except Exception:  # no template, or one that refuses so plain a conversation
        return lambda text: None
    header = os.path.commonprefix([before[::-1], between[::-1]])[::-1]

    def pick(text: str) -> str | None:
        _, found, rest = text.removesuffix(tail).rpartition(header)
        return rest.strip() if header and found and text.endswith(tail) else None

    return pick


def answerer(model: Model, s: Sampling, whole: Any, source: Source, tokenizer: Any, count: int) -> Callable:
    """`answer(params)`: the first `count` held-out prompts with the model's completion and the row's own answer, as text.

    Compiled here for `whole`, the shapes of the parameters.
    """
    pairs = held_out_prompts(source, count)
    if not pairs:
        return lambda params: []
    prompts, key = left_pad([prompt for prompt, _ in pairs], len(pairs)), jax.random.key(0)
    stop = stop_tokens(model.config.eos, tokenizer)
    generate: Any = make_generate(model, s, stop)
    run = generate.lower(whole, prompts, key).compile()
    question = last_question(tokenizer)
    plain = lambda ids: tokenizer.decode(ids, skip_special_tokens=True).strip()  # noqa: E731
    asked = [question(tokenizer.decode(prompt)) or plain(prompt) for prompt, _ in pairs]
    whole_answer = lambda row: row[-1] < 0 or int(row[-1]) in stop  # noqa: E731

    def answer(params: Any) -> list[dict[str, str]]:
        found = np.asarray(run(params, prompts, key))
        texts = [plain(row[row >= 0].tolist()) + ("" if whole_answer(row) else " [...]") for row in found]
        return [
            {"prompt": prompt, "completion": text, "reference": plain(wanted)}
            for prompt, text, (_, wanted) in zip(asked, texts, pairs, strict=True)
        ]

    return answer
