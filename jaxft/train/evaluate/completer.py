"""Completions of prompts in rows by loaded weights, for `jaxft generate`, `jaxft evaluate` and jaxft.load."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxft.data.chat.loss_mask import example_prompt_ids
from jaxft.data.packing.row_tasks import rename_columns
from jaxft.data.progress import RowProgress
from jaxft.data.row_settings import TemplateSettings
from jaxft.data.rows.example import Chat, Completion
from jaxft.data.rows.format_choice import prompt_of, split_column
from jaxft.data.rows.invalid_rows import valid
from jaxft.data.rows.row_files import Row
from jaxft.engine.programs import Engine, compile_engine
from jaxft.engine.sampling import Sampling, nonfinite_logits, without_stop
from jaxft.engine.session import RequestSettings, Session, complete
from jaxft.engine.state import Decoding, slots_for
from jaxft.nn.attention.kv_cache import CacheFormat
from jaxft.runs.loaded_weights import LoadedWeights
from jaxft.weights.pretrained import check_token_id


def renamed_rows(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """Return rows with the columns that they have renamed. columns: as data.columns."""
    return [
        rename_columns(row, [item for item in columns if split_column(item)[1] in row.fields]) for row in rows
    ]


def prompts_of_rows(rows: Sequence[Row], data: Mapping[str, Any]) -> list[tuple[str, Chat | Completion]]:
    """Return (name, prompt) of each row. data: see prompt_settings. Raises InvalidRow for a row without a
    prompt.
    """
    renamed = renamed_rows(rows, data["columns"])
    return [(row.name, prompt_of(row, data.get("format", "auto"))) for row in renamed]


def encode_prompts(
    loaded: LoadedWeights,
    prompts: Sequence[tuple[str, Chat | Completion]],
    template: TemplateSettings,
    new: int,
) -> list[tuple[str, list[int]]]:
    """Return (name, token ids) of each prompt. Raises ValueError that names the prompt if it has no token, or
    if `new` more tokens exceed the model's positions.
    """
    limit, encoded = loaded.model.config.max_positions, list[tuple[str, list[int]]]()
    examples = [prompt for _, prompt in prompts]
    for (name, _), ids in zip(prompts, example_prompt_ids(examples, loaded.tokenizer, template), strict=True):
        tokens = valid(ids)
        if not tokens:
            raise ValueError(f"{name}: the prompt has no tokens; fill it, or leave it out")
        if len(tokens) + new > limit:
            raise ValueError(
                f"{name}: {len(tokens)} tokens plus max_new={new} exceed the model's {limit} positions; use "
                "a smaller max_new, or a shorter prompt"
            )
        encoded.append((name, tokens))
    return encoded


def decode_completion(tokenizer: Any, tokens: list[int]) -> str:
    """Return tokens as text, without special tokens and surrounding space, and otherwise as it is: some
    tokenizers remove spaces before punctuation by default.
    """
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def completion_text(loaded: LoadedWeights, tokens: np.ndarray) -> str:
    """Return the text of a completion from Completer.complete, see decode_completion."""
    return decode_completion(loaded.tokenizer, without_stop(tokens[tokens >= 0], loaded.stop))


@dataclass(frozen=True)
class Completer:
    """Completes prompts by loaded weights. A program is compiled once for all weights of a model.

    batch: how many completions are sampled at the same time. seed: random seed of sampling. cache: how keys
    and values are stored. engines: the compiled programs, filled by `complete`.
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
        grammar: Any = None,
    ) -> Int[np.ndarray, "n G S"]:
        """Return the token ids of `samples` completions of each prompt, and negative numbers after the end of
        a completion.

        prompts: names for errors, and token ids. is_enough(token ids so far): ends a completion where it
        returns True. grammar: a Grammar of serve/constraint.py that completions match. Raises ValueError for
        a token that the model does not have, and for logits that are not finite.
        """
        ids = [tokens for _, tokens in prompts]
        check_token_id("the model", max(map(max, ids)), loaded.model.config.vocab)
        slots = slots_for(len(ids), samples, max(map(len, ids)), self.batch)
        program = sampling, loaded.stop, samples, slots, grammar is None
        if program not in self.engines:
            decoding = Decoding(
                loaded.model, sampling, loaded.stop, samples, self.cache, constrained=grammar is not None
            )
            self.engines[program] = compile_engine(decoding, loaded.params, slots, loaded.mesh)
        choice = RequestSettings(sampling, loaded.stop, grammar=grammar)
        session = Session(self.engines[program], loaded.params, jax.random.key(self.seed), choice)
        with RowProgress("completing", len(ids) * samples, enabled=True) as progress:
            completions = complete(session, ids, is_enough=is_enough, ended=progress.add).tokens
        if where := nonfinite_logits(completions.reshape(-1, completions.shape[-1])):
            raise ValueError(
                f"{prompts[where[0] // samples][0]}: the logits of token {where[1] + 1} are not finite; use "
                "--dtype float32, or check the weights of the model"
            )
        return completions
