"""Completions of held-out prompts before and after training, as text."""

import os
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from jaxft.data.source import Prompt
from jaxft.inference.generate import NONFINITE, Decoding, left_pad, make_generate
from jaxft.runs.report import Sample
from jaxft.tree import Params


def make_last_turn(tokenizer: Any) -> Callable[[str], str | None]:
    """Return `last_turn(prompt)`: the user's last message in a templated prompt, None if not found."""

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
        return lambda prompt: None
    header = os.path.commonprefix([before[::-1], between[::-1]])[::-1]

    def last_turn(prompt: str) -> str | None:
        question = prompt.rpartition(tail)[0] if tail else prompt  # an empty thinking block may follow
        _, found, rest = question.rpartition(header) if header else ("", "", "")
        return rest.strip() if found else None

    return last_turn


def compile_sampler(
    decoding: Decoding, prompts: list[Prompt], tokenizer: Any, params: Params
) -> Callable[[Params], list[Sample]]:
    """Return `sample(params)`: each prompt with the model's completion and the row's own, as text.

    Compiled for `params`, the shapes of the parameters.
    """
    if not prompts:
        return lambda params: []
    ids, key = left_pad([prompt.ids for prompt in prompts], len(prompts)), jax.random.key(0)
    stop = decoding.stop
    generate: Any = make_generate(decoding.model, decoding.sampling, stop)
    compiled = generate.lower(params, ids, key).compile()
    last_turn = make_last_turn(tokenizer)

    def decode(tokens: Any) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def finished_sample(text: str, row: np.ndarray, response: list[int]) -> Sample:
        finish: Literal["stop", "length", "nonfinite"] = "length"
        if (row == NONFINITE).any():
            finish = "nonfinite"
        elif row[-1] < 0 or int(row[-1]) in stop:
            finish = "stop"
        completion = decode(row[row >= 0].tolist()) + ("" if finish == "stop" else " [...]")
        return Sample(prompt=text, completion=completion, reference=decode(response), finish=finish)

    texts = [last_turn(tokenizer.decode(prompt.ids)) or decode(prompt.ids) for prompt in prompts]

    def sample(params: Params) -> list[Sample]:
        rows = np.asarray(compiled(params, ids, key))
        return [
            finished_sample(text, row, prompt.response)
            for text, row, prompt in zip(texts, rows, prompts, strict=True)
        ]

    return sample
