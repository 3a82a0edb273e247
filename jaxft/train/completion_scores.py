"""Scores of a model's completions of the prompts in a file, and pass@k."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxft.data.chat import example_prompt_ids
from jaxft.data.conversation import prompt_of
from jaxft.data.example import RESPONSE, Chat, Completion, Example, as_given
from jaxft.data.format_choice import parse_dataset, split_column
from jaxft.data.formats import SFT
from jaxft.data.invalid import InvalidRow, valid
from jaxft.data.progress import RowProgress
from jaxft.data.prompt_tokens import rename_columns
from jaxft.data.row_files import Row
from jaxft.data.row_settings import RowSettings
from jaxft.data.template_settings import DEFAULT_TEMPLATE_SETTINGS, TemplateSettings
from jaxft.engine.generate import complete
from jaxft.engine.programs import Engine, compile_engine
from jaxft.engine.sampling import Sampling, nonfinite_logits, without_stop
from jaxft.engine.session import Session
from jaxft.engine.state import Decoding, Slots, slots_for
from jaxft.nn.cache import CacheFormat
from jaxft.objectives.intervals import prompt_means
from jaxft.rl.rewards import FunctionReward, call_reward, unique_names
from jaxft.runs.loaded_weights import LoadedWeights
from jaxft.runs.metric_names import CLIPPED_RATIO, COMPLETION_LENGTH
from jaxft.train.likelihood import Evaluated
from jaxft.train.samples import decode_completion
from jaxft.weights.pretrained import check_token_id

ANSWER = "answer"  # the column that score functions compare with
CORRECT = 1.0  # the least score of a completion that passes, for pass@k


class ScoredPrompt(NamedTuple):
    """A prompt of a file with the columns of its row, and "answer": the row's own, or else its response."""

    row: str
    prompt: Chat | Completion
    columns: dict[str, Any]


@dataclass(frozen=True)
class Completing:
    """How prompts are completed. samples: completions of each prompt. batch: completions at the same time."""

    sampling: Sampling
    samples: int = 1
    batch: int = 8
    seed: int = 0
    cache: CacheFormat = "compute"
    template: TemplateSettings = field(default=DEFAULT_TEMPLATE_SETTINGS)


class SampledTexts(NamedTuple):
    """Completions of n prompts, G each. lengths: in tokens. ended: whether a stop token ended them."""

    texts: list[list[str]]
    lengths: np.ndarray
    ended: np.ndarray


def scored_prompts(
    rows: Sequence[Row], format: str = "auto", columns: Sequence[str] = ()
) -> list[ScoredPrompt]:
    """Return the prompts of rows of SFT or reinforcement learning. format: "auto" or "plain".

    Raises InvalidRow for a row without a prompt.
    """
    renamed = [
        rename_columns(row, [item for item in columns if split_column(item)[1] in row.fields]) for row in rows
    ]
    try:
        parsed = parse_dataset(renamed, SFT, RowSettings(format=format))
    except InvalidRow as error:  # no row has a response
        parsed = [error] * len(renamed)
    found = []
    for row, outcome in zip(renamed, parsed, strict=True):
        response = None if isinstance(outcome, InvalidRow) else response_text(outcome.examples[RESPONSE])
        answer = {} if response is None else {ANSWER: response}
        found.append(ScoredPrompt(row.name, prompt_of(row, format), {**answer, **row.fields}))
    return found


def response_text(example: Example) -> str | None:
    """Return the text of a row's response; None for a text, and for a conversation that ends in a prompt."""
    if isinstance(example, Completion):
        return example.completion
    if not isinstance(example, Chat) or example.response >= len(example.messages):
        return None
    return "".join(str(message.get("content") or "") for message in example.messages[example.response :])


def make_completion_scorer(
    functions: Sequence[Callable[..., float]], how: Completing, passes: Sequence[int] = ()
) -> Callable[[LoadedWeights, Sequence[ScoredPrompt]], Evaluated]:
    """Return `score(loaded, prompts)`: complete every prompt, and return the mean score by each function and
    pass@k for each k of `passes`. Programs are compiled once for weights of the same model and shapes.

    functions: of (prompt, completion, row), such as those of jaxft.rl.rewards. A completion without a score,
    where the function raises or returns no number, is in no mean, and a note counts them. Raises ValueError
    if a function scores no completion at all.
    """
    engines: dict[Any, Engine] = {}

    def engine_for(loaded: LoadedWeights, slots: Slots) -> Engine:
        if (loaded.stop, slots) not in engines:
            decoding = Decoding(loaded.model, how.sampling, loaded.stop, how.samples, how.cache)
            engines[loaded.stop, slots] = compile_engine(decoding, loaded.params, slots, loaded.mesh)
        return engines[loaded.stop, slots]

    def score(loaded: LoadedWeights, prompts: Sequence[ScoredPrompt]) -> Evaluated:
        found = sample_texts(loaded, prompts, how, engine_for)
        return _scored(prompts, found, functions, passes)

    return score


def _scored(
    prompts: Sequence[ScoredPrompt],
    found: SampledTexts,
    functions: Sequence[Callable[..., float]],
    passes: Sequence[int],
) -> Evaluated:
    """Return metrics and single scores of completions; see make_completion_scorer."""
    rewards, samples = [FunctionReward(fn) for fn in functions], len(found.texts[0])
    given = [as_given(prompt.prompt) for prompt in prompts for _ in range(samples)]
    columns = [(prompt.row, prompt.columns) for prompt in prompts for _ in range(samples)]
    texts = [text for own in found.texts for text in own]
    metrics: dict[str, float] = {"prompts": len(prompts), "completions": len(texts)}
    notes, scores, by_row = [], {}, {}
    for name, reward in zip(unique_names(rewards), rewards, strict=True):
        values, faults, _ = call_reward(reward, given, texts, columns)
        missing = int(np.isnan(values).sum())
        if missing == len(values):
            raise ValueError(f"no completion has a score: {faults.first}")
        if missing:
            notes.append(f"{missing} of {len(values)} completions have no score: {faults.first}")
        scores[name] = values.reshape(len(prompts), samples)
        metrics[name], by_row[name] = float(np.nanmean(values)), prompt_means(scores[name])
        for k, estimates in pass_at(scores[name], passes).items():
            metric = f"pass@{k}/{name}"
            metrics[metric], by_row[metric] = float(np.nanmean(estimates)), estimates
    metrics[COMPLETION_LENGTH] = float(found.lengths.mean())
    metrics[CLIPPED_RATIO] = float(1 - found.ended.mean())
    return Evaluated(metrics, _results(prompts, found, scores), notes, by_row)


def _results(
    prompts: Sequence[ScoredPrompt], found: SampledTexts, scores: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Return each completion as a JSON object; null for no score."""
    return [
        {
            "row": prompt.row,
            "prompt": as_given(prompt.prompt),
            "completion": found.texts[i][j],
            "finish": "stop" if found.ended[i, j] else "length",
            "scores": {name: None if np.isnan(x[i, j]) else float(x[i, j]) for name, x in scores.items()},
        }
        for i, prompt in enumerate(prompts)
        for j in range(len(found.texts[i]))
    ]


def sample_texts(
    loaded: LoadedWeights,
    prompts: Sequence[ScoredPrompt],
    how: Completing,
    engine_for: Callable[[LoadedWeights, Slots], Engine],
) -> SampledTexts:
    """Complete every prompt `how.samples` times. engine_for: returns a compiled engine.

    Raises ValueError that names the row for a prompt without a token, and for one that is too long for the
    model.
    """
    tokenizer, limit = loaded.tokenizer, loaded.model.config.max_positions
    encoded = example_prompt_ids([prompt.prompt for prompt in prompts], tokenizer, how.template)
    ids = [valid(tokens) for tokens in encoded]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not tokens:
            raise ValueError(f"{prompt.row}: the prompt has no tokens; fill it or remove the row")
        if len(tokens) + how.sampling.max_new > limit:
            raise ValueError(
                f"{prompt.row}: {len(tokens)} tokens plus --max-new {how.sampling.max_new} exceed the "
                f"model's {limit} positions; use a smaller --max-new, or remove the row"
            )
    check_token_id("the model", max(max(tokens) for tokens in ids), loaded.model.config.vocab)
    slots = slots_for(len(ids), how.samples, max(map(len, ids)), how.batch)
    session = Session(engine_for(loaded, slots), loaded.params, jax.random.key(how.seed))
    with RowProgress("completing", len(ids) * how.samples, enabled=True) as progress:
        sampled = complete(session, ids, ended=progress.add).tokens
    if where := nonfinite_logits(sampled.reshape(-1, sampled.shape[-1])):
        raise ValueError(
            f"{prompts[where[0] // how.samples].row}: the logits of token {where[1] + 1} are not finite; use "
            "--dtype float32, or check the weights of the model"
        )
    texts = [
        [decode_completion(tokenizer, without_stop(row[row >= 0], loaded.stop)) for row in own]
        for own in sampled
    ]
    ended = np.asarray(np.isin(sampled, loaded.stop).any(-1))
    return SampledTexts(texts, (sampled >= 0).sum(-1), ended)


def pass_at(scores: Float[np.ndarray, "n G"], ks: Sequence[int]) -> dict[int, list[float]]:
    """Return an estimate of pass@k for each prompt, the probability that one of k completions of it is
    correct, for each k.

    scores: of G completions of n prompts; from CORRECT on a completion is correct, NaN is no score. Of a
    prompt's g scored completions, c are correct: 1 - C(g - c, k) / C(g, k), NaN if g < k, whose mean over the
    other prompts is the unbiased estimate of Chen et al. 2021 (arXiv:2107.03374). A k that is too large for
    every prompt is left out.
    """
    found = {}
    for k in ks:
        known = [own[~np.isnan(own)] for own in scores]
        estimates = [
            1 - math.comb(len(own) - int((own >= CORRECT).sum()), k) / math.comb(len(own), k)
            if len(own) >= k
            else math.nan
            for own in known
        ]
        if not np.isnan(estimates).all():
            found[k] = estimates
    return found
