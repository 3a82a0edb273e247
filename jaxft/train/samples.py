"""Held-out prompts that a run answers before and after, as text."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxft.data.source import Source
from jaxft.inference.generate import Sampling, left_pad, make_generate, stop_tokens
from jaxft.models.model import Model


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


def answerer(
    model: Model, s: Sampling, whole: Any, source: Source[Any], tokenizer: Any, count: int
) -> Callable:
    """`answer(params)`: the first `count` held-out prompts with the model's completion and the row's own answer, as text.

    Compiled here for `whole`, the shapes of the parameters.
    """
    pairs = source.prompts(count)
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
