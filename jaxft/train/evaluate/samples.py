"""Completions: of a run's held-out prompts before and after training, as text; and by loaded weights."""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from jaxft.data.progress import RowProgress
from jaxft.data.source import Prompt
from jaxft.engine.generate import complete
from jaxft.engine.programs import Engine, compile_engine
from jaxft.engine.sampling import NONFINITE, Sampling, nonfinite_logits, without_stop
from jaxft.engine.session import Session
from jaxft.engine.state import Decoding, slots_for
from jaxft.nn.attention.cache import CacheFormat
from jaxft.runs.loaded_weights import LoadedWeights
from jaxft.runs.run_texts import Sample
from jaxft.train.logs.clock import Clock
from jaxft.tree import Params
from jaxft.weights.pretrained import check_token_id

COMPLETIONS_AT_ONCE = 32  # that are in progress


class PromptText(NamedTuple):
    """The user's last message of a held-out prompt, and the response in its row, "" if it has none."""

    prompt: str
    reference: str


class Completed(NamedTuple):
    """A held-out prompt with the model's completion, and the response in its row, "" if it has none."""

    prompt: str
    completion: str
    reference: str
    finish: Literal["stop", "length", "nonfinite"]

    def shown(self) -> Sample:
        """Return it as logs and cards show it: a completion without an end token is followed by [...]."""
        mark = "" if self.finish == "stop" else " [...]"
        return Sample(
            prompt=self.prompt,
            completion=self.completion + mark,
            reference=self.reference,
            finish=self.finish,
        )


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


def decode_completion(tokenizer: Any, tokens: list[int]) -> str:
    """Return tokens as text, without special tokens and surrounding space, and otherwise as it is: some
    tokenizers remove spaces before punctuation by default.
    """
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def prompt_texts(prompts: list[Prompt], tokenizer: Any, stop: Collection[int]) -> list[PromptText]:
    """Return held-out prompts as text: the user's last message or, where none is found, the whole prompt.
    Responses are read as completions are, without the stop token at their end.
    """
    last_turn = make_last_turn(tokenizer)

    def decode(tokens: list[int]) -> str:
        return decode_completion(tokenizer, tokens)

    return [
        PromptText(
            last_turn(tokenizer.decode(p.ids)) or decode(p.ids), decode(without_stop(p.response, stop))
        )
        for p in prompts
    ]


def compile_sampler(
    decoding: Decoding,
    prompts: list[Prompt],
    tokenizer: Any,
    params: Params,
    mesh: Mesh | None = None,
    clock: Clock | None = None,
) -> Callable[[Params], list[Completed]]:
    """Return `complete(params)`: each prompt with the model's completion and the row's response, as text;
    with `decoding.group` completions, one after the other.

    Compiled once for `params`, the shapes of the parameters. At most COMPLETIONS_AT_ONCE completions, or
    those of one prompt, are in progress at the same time. mesh: None for a single device. clock: shows the
    progress.
    """
    shown = clock or Clock()
    if not prompts:
        return lambda params: []
    ids, stop = [prompt.ids for prompt in prompts], decoding.stop
    slots = slots_for(len(prompts), decoding.group, max(map(len, ids)), COMPLETIONS_AT_ONCE)
    engine = compile_engine(decoding, params, slots, mesh)
    texts = prompt_texts(prompts, tokenizer, stop)

    def completed(text: PromptText, row: np.ndarray) -> Completed:
        finish: Literal["stop", "length", "nonfinite"] = "length"
        if (row == NONFINITE).any():
            finish = "nonfinite"
        elif row[-1] < 0 or int(row[-1]) in stop:
            finish = "stop"
        completion = decode_completion(tokenizer, without_stop(row[row >= 0], stop))
        return Completed(text.prompt, completion, text.reference, finish)

    def complete_held_out(params: Params) -> list[Completed]:
        ended = shown.counter("completions of held-out prompts", len(ids) * decoding.group)
        session = Session(engine, params, jax.random.key(0))
        found = complete(session, ids, ended=ended).tokens
        return [completed(text, row) for text, rows in zip(texts, found, strict=True) for row in rows]

    return complete_held_out


@dataclass(frozen=True)
class Completer:
    """Completes prompts by loaded weights. Programs are compiled once for weights of one model and shapes.

    batch: completions at the same time. seed: of sampling. cache: how keys and values are stored.
    """

    batch: int = 8
    seed: int = 0
    cache: CacheFormat = "compute"
    engines: dict[Any, Engine] = field(default_factory=dict)

    def complete(
        self,
        loaded: LoadedWeights,
        prompts: Sequence[tuple[str, list[int]]],
        sampling: Sampling,
        samples: int = 1,
        is_enough: Callable[[list[int]], bool] | None = None,
    ) -> Int[np.ndarray, "n G S"]:
        """Return the token ids of `samples` completions of each prompt, below 0 after their ends.

        prompts: names for errors, and token ids. is_enough: see generate.complete. Raises ValueError for a
        token that the model does not have, and for logits that are not finite.
        """
        ids = [tokens for _, tokens in prompts]
        check_token_id("the model", max(map(max, ids)), loaded.model.config.vocab)
        slots = slots_for(len(ids), samples, max(map(len, ids)), self.batch)
        program = sampling, loaded.stop, samples, slots
        if program not in self.engines:
            decoding = Decoding(loaded.model, sampling, loaded.stop, samples, self.cache)
            self.engines[program] = compile_engine(decoding, loaded.params, slots, loaded.mesh)
        session = Session(self.engines[program], loaded.params, jax.random.key(self.seed))
        with RowProgress("completing", len(ids) * samples, enabled=True) as progress:
            found = complete(session, ids, is_enough=is_enough, ended=progress.add).tokens
        if where := nonfinite_logits(found.reshape(-1, found.shape[-1])):
            raise ValueError(
                f"{prompts[where[0] // samples][0]}: the logits of token {where[1] + 1} are not finite; use "
                "--dtype float32, or check the weights of the model"
            )
        return found
