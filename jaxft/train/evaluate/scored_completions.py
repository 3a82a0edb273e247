"""Completions with their scores and pass@k: of a run's held-out prompts before and after training, and of the
prompts in a file (`jaxft evaluate --by`).
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxft.annotations import INT32
from jaxft.data.row_settings import DEFAULT_TEMPLATE_SETTINGS, RowSettings, TemplateSettings
from jaxft.data.rows.example import RESPONSE, Chat, Completion, Example, as_given
from jaxft.data.rows.format_choice import parse_dataset, prompt_of
from jaxft.data.rows.formats import SFT
from jaxft.data.rows.invalid_rows import InvalidRow
from jaxft.data.rows.row_files import Row
from jaxft.data.source import Prompt, Source
from jaxft.distributed import processes
from jaxft.engine.programs import compile_engine
from jaxft.engine.sampling import NONFINITE, Sampling, without_stop
from jaxft.engine.session import Session, complete
from jaxft.engine.state import Decoding, slots_for
from jaxft.nn.tree import Params
from jaxft.objectives.alarms import CLIPPED_RATIO
from jaxft.objectives.intervals import Interval, interval_of, prompt_means
from jaxft.objectives.metrics import HELD_OUT, FloatMetrics
from jaxft.rl.rewards import FunctionReward, call_reward, unique_names
from jaxft.runs.loaded_weights import LoadedWeights
from jaxft.runs.metrics_log import COMPLETION_LENGTH, SCORES, json_value
from jaxft.runs.run_texts import Evaluation, Sample
from jaxft.train.evaluate.completer import (
    Completer,
    completion_text,
    decode_completion,
    encode_prompts,
    renamed_rows,
)
from jaxft.train.evaluate.evaluate import Evaluated
from jaxft.train.logs.clock import Clock
from jaxft.train.settings import Run, Scoring

COMPLETIONS_AT_ONCE = 32  # the most that are sampled at the same time
ANSWER = "answer"  # the column that score functions compare with
CORRECT = 1.0  # the least score of a completion that passes, for pass@k


class PromptText(NamedTuple):
    """Texts of a held-out prompt for display: the user's last message, and the row's response, "" if none."""

    prompt: str
    reference: str


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
        _, separator, rest = question.rpartition(header) if header else ("", "", "")
        return rest.strip() if separator else None

    return last_turn


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
) -> Callable[[Params], list[Sample]]:
    """Return `complete(params)`, which returns a Sample for each completion: `decoding.group` for the first
    prompt, then as many for the second, and so on.

    Compiled once for `params`, the shapes of the parameters. At most COMPLETIONS_AT_ONCE completions, or all
    of one prompt, are in progress at the same time. mesh: None for a single device. clock: shows the
    progress.
    """
    shown = clock or Clock()
    if not prompts:
        return lambda params: []
    ids, stop = [prompt.ids for prompt in prompts], decoding.stop
    slots = slots_for(len(prompts), decoding.group, max(map(len, ids)), COMPLETIONS_AT_ONCE)
    engine = compile_engine(decoding, params, slots, mesh)
    texts = prompt_texts(prompts, tokenizer, stop)

    def completed(text: PromptText, row: np.ndarray) -> Sample:
        finish: Literal["stop", "length", "nonfinite"] = "length"
        if (row == NONFINITE).any():
            finish = "nonfinite"
        elif row[-1] < 0 or int(row[-1]) in stop:
            finish = "stop"
        completion = decode_completion(tokenizer, without_stop(row[row >= 0], stop))
        return Sample(prompt=text.prompt, completion=completion, reference=text.reference, finish=finish)

    def complete_held_out(params: Params) -> list[Sample]:
        ended = shown.counter("completions of held-out prompts", len(ids) * decoding.group)
        session = Session(engine, params, jax.random.key(0))
        tokens = complete(session, ids, ended=ended).tokens
        return [completed(text, row) for text, rows in zip(texts, tokens, strict=True) for row in rows]

    return complete_held_out


class FunctionScores(NamedTuple):
    """Scores of completions by a function. values: scores of G completions of each of n prompts, NaN for no
    score. fault: a message about the first completion without a score, "" for none.
    """

    name: str
    values: Float[np.ndarray, "n G"]
    fault: str

    @property
    def missing(self) -> str:
        """The number of completions without a score, "3 of 96"."""
        return f"{int(np.isnan(self.values).sum())} of {self.values.size}"

    def figures(self, ks: Sequence[int]) -> Iterator[tuple[str, float, list[float]]]:
        """Yield (metric name, mean over prompts, each prompt's value) for the score and each pass@k."""
        known = self.values[~np.isnan(self.values)]
        if len(known):
            yield self.name, float(known.mean()), prompt_means(self.values)
        for k, estimates in pass_at(self.values, ks).items():
            yield f"pass@{k}/{self.name}", float(np.nanmean(estimates)), estimates


def score_texts(
    functions: Sequence[Callable[..., float]],
    prompts: Sequence[Any],
    completions: Sequence[str],
    rows: Sequence[tuple[str, dict[str, Any]]],
    group: int,
) -> list[FunctionScores]:
    """Return the scores of completions by each function. prompts, rows: for each completion its prompt and
    the row's (name, columns). group: completions per prompt.
    """
    rewards, scores = [FunctionReward(fn) for fn in functions], []
    for name, reward in zip(unique_names(rewards), rewards, strict=True):
        values, faults, _ = call_reward(reward, prompts, completions, rows)
        scores.append(FunctionScores(name, values.reshape(-1, group), faults.first))
    return scores


def held_out_prompts(run: Run, source: Source[Any]) -> list[Prompt]:
    """Return the held-out prompts that are completed before and after training, to be shown or scored."""
    scored = (run.scoring.prompts or INT32) if run.scoring.functions else 0
    return source.prompts(max(run.samples, scored))


def check_scoring(run: Run, source: Source[Any]) -> None:
    """Raise ValueError if the run has score functions, but no held-out response to compare with."""
    if not run.scoring.functions:
        return
    first = source.prompts(1)
    if not first or not first[0].response:
        rewards = "; the rewards of rollouts are evaluated anyway" if source.info.samples else ""
        raise ValueError(
            "scoring.by compares completions with the responses of held-out rows, and there are none"
            f"{rewards}. Hold out rows with prompts and responses (held_out=), or set scoring.by= to nothing"
        )


def position_lines(run: Run, source: Source[Any]) -> list[str]:
    """Return a warning if a prompt and its completion may not fit into the model's positions, else []."""
    limit, new = run.model.config.max_positions, run.sampling.max_new
    sizes = [len(prompt.ids) for prompt in held_out_prompts(run, source)]
    longest = max(sizes, default=0)
    if not sizes or longest + new <= limit:
        return []
    return [
        f"warning: a held-out prompt of {longest} tokens plus sampling.max_new={new} exceeds the model's "
        f"{limit} positions, beyond which completions are poor; lower sampling.max_new, or remove the row"
    ]


def make_scorer(
    scoring: Scoring, samples: int, texts: Sequence[PromptText]
) -> Callable[[Sequence[Sample]], tuple[Evaluation, dict[str, FloatMetrics]]]:
    """Return `score(completions)`, which takes `scoring.samples` completions of each prompt, one prompt after
    the other. It keeps the first completion of the first `samples` prompts as text for logs and cards, where
    [...] marks a truncated one, and scores the completions of the first `scoring.prompts` prompts, or of all.

    score returns (the evaluation, whose metrics are the mean score by each function and pass@k; {name of a
    prompt: {metric: value}}, where a prompt has the same name in all runs).

    texts: the held-out prompts, with their rows' responses. Every function first scores these responses, so
    that one that does not fit the rows ends the run before it trains: no score raises ValueError.
    """
    functions, group = scoring.functions, scoring.samples

    def call(completions: Sequence[str], group: int) -> list[FunctionScores]:
        """Score completions on the first process. group: completions of each prompt."""
        known = [text for text in texts[: len(completions) // group] for _ in range(group)]
        rows = [
            (f"held-out prompt {1 + i // group}", {ANSWER: text.reference}) for i, text in enumerate(known)
        ]
        prompts = [text.prompt for text in known]
        scored_by = processes.from_first_process(
            lambda: [
                [name, values.tolist(), fault]
                for name, values, fault in score_texts(functions, prompts, completions, rows, group)
            ]
        )
        return [FunctionScores(name, np.array(values), fault) for name, values, fault in scored_by]

    for part in call([text.reference for text in texts[: scoring.prompts]], 1) if functions else ():
        if part.fault:
            raise ValueError(
                f"scoring.by: {part.fault}, called with that row's own response. Choose a function that fits "
                "the rows, or set scoring.by= to nothing"
            )

    prompt_names = _prompt_names(texts[: scoring.prompts]) if functions else []

    def score(completions: Sequence[Sample]) -> tuple[Evaluation, dict[str, FloatMetrics]]:
        shown = [x.copy() for x in completions[::group][:samples]]
        for x in shown:
            x["completion"] += "" if x["finish"] == "stop" else " [...]"
        metrics: FloatMetrics = {}
        intervals: dict[str, Interval] = {}
        of_prompts: dict[str, FloatMetrics] = {name: {} for name in prompt_names}
        faults = []
        prompts = len(texts[: scoring.prompts]) if functions else 0
        scored = [x["completion"] for x in completions[: prompts * group]]
        for scores in call(scored, group):
            for name, mean, by_prompt in scores.figures(scoring.pass_at):
                metric = f"{HELD_OUT}{SCORES}{name}"
                metrics[metric], intervals[metric] = mean, interval_of(by_prompt)
                for prompt, value in zip(prompt_names, by_prompt, strict=True) if name == scores.name else ():
                    of_prompts[prompt] |= {} if math.isnan(value) else {f"{SCORES}{name}": value}
            if scores.fault:
                faults.append(
                    f"{scores.missing} completions of held-out prompts have no score: {scores.fault}"
                )
        broken = np.array([x["finish"] == "nonfinite" for x in completions]).reshape(-1, group).any(1)
        intervals = {name: x for name, x in intervals.items() if math.isfinite(x.low)}  # one prompt has none
        of_prompts = {prompt: means for prompt, means in of_prompts.items() if means}
        evaluation = Evaluation(
            metrics=metrics, samples=shown, scored=prompts, intervals=intervals, score_faults=faults,
            nonfinite=int(broken.sum()),
        )  # fmt: skip
        return evaluation, of_prompts

    return score


def _prompt_names(texts: Sequence[PromptText]) -> list[str]:
    """Return the prompts' names: a hash of text and response, and of how often both occurred before."""
    seen, names = Counter[PromptText](), list[str]()
    for text in texts:
        digest = hashlib.sha256(json.dumps([text.prompt, text.reference, seen[text]]).encode()).hexdigest()
        names.append(f"prompt {digest[:16]}")
        seen[text] += 1
    return names


class ScoredPrompt(NamedTuple):
    """A prompt from a row of a file.

    row: the row's name. columns: the row's; a missing column "answer" is set to the row's response.
    """

    row: str
    prompt: Chat | Completion
    columns: dict[str, Any]


def scored_prompts(
    rows: Sequence[Row], format: str = "auto", columns: Sequence[str] = ()
) -> list[ScoredPrompt]:
    """Return the prompts of rows for SFT or reinforcement learning. format: as data.format, "auto" or
    "plain". columns: as data.columns.

    Raises InvalidRow for a row without a prompt.
    """
    renamed = renamed_rows(rows, columns)
    try:
        parsed = parse_dataset(renamed, SFT, RowSettings(format=format))
    except InvalidRow as error:  # no row has a response
        parsed = [error] * len(renamed)
    prompts = []
    for row, outcome in zip(renamed, parsed, strict=True):
        response = None if isinstance(outcome, InvalidRow) else response_text(outcome.examples[RESPONSE])
        answer = {} if response is None else {ANSWER: response}
        prompts.append(ScoredPrompt(row.name, prompt_of(row, format), {**answer, **row.fields}))
    return prompts


def response_text(example: Example) -> str | None:
    """Return the text of a row's response; None for plain text, and for a conversation without a response."""
    if isinstance(example, Completion):
        return example.completion
    if not isinstance(example, Chat) or example.response >= len(example.messages):
        return None
    return "".join(str(message.get("content") or "") for message in example.messages[example.response :])


@dataclass(frozen=True)
class CompletionScorer:
    """Completes prompts by loaded weights, and scores the completions.

    functions: of (prompt, completion, row), such as jaxft.rl.rewards.exact. samples: completions of each
    prompt. passes: the values of k for which pass@k is computed. template: how prompts are rendered.
    """

    functions: Sequence[Callable[..., float]]
    completer: Completer
    sampling: Sampling
    samples: int = 1
    passes: Sequence[int] = ()
    template: TemplateSettings = DEFAULT_TEMPLATE_SETTINGS

    def evaluate(self, loaded: LoadedWeights, prompts: Sequence[ScoredPrompt]) -> Evaluated:
        """Return the mean score by each function and pass@k, and every completion with its scores.

        A completion without a score, where the function raises or returns no number, is in no mean, and a
        note counts them. values: each prompt's mean. Raises ValueError if a function scores no completion at
        all.
        """
        named = encode_prompts(
            loaded, [(x.row, x.prompt) for x in prompts], self.template, self.sampling.max_new
        )
        sampled = self.completer.complete(loaded, named, self.sampling, self.samples)
        given = [prompt for prompt in prompts for _ in range(self.samples)]
        prompt_texts = [as_given(prompt.prompt) for prompt in given]
        tokens = sampled.reshape(len(given), -1)
        texts = [completion_text(loaded, row) for row in tokens]
        rows = [(prompt.row, prompt.columns) for prompt in given]
        scores = score_texts(self.functions, prompt_texts, texts, rows, self.samples)
        metrics: dict[str, float] = {"prompts": len(prompts), "completions": len(texts)}
        notes, by_row = [], {}
        for part in scores:
            if np.isnan(part.values).all():
                raise ValueError(
                    f"no completion has a score: {part.fault}; correct the function, or choose another one "
                    "with --by"
                )
            if part.fault:
                notes.append(f"{part.missing} completions have no score: {part.fault}")
            for name, mean, by_prompt in part.figures(self.passes):
                metrics[name], by_row[name] = mean, by_prompt
        ended = np.asarray(np.isin(tokens, loaded.stop).any(-1))
        metrics[COMPLETION_LENGTH] = float((tokens >= 0).sum(-1).mean())
        metrics[CLIPPED_RATIO] = float(1 - ended.mean())
        results = [
            {
                "row": rows[i][0],
                "prompt": prompt_texts[i],
                "completion": text,
                "finish": "stop" if ended[i] else "length",
                "scores": {part.name: json_value(part.values.ravel()[i]) for part in scores},
            }
            for i, text in enumerate(texts)
        ]
        return Evaluated(metrics, results, notes, by_row)


def pass_at(scores: Float[np.ndarray, "n G"], ks: Sequence[int]) -> dict[int, list[float]]:
    """Return an estimate of pass@k for each prompt, the probability that one of k completions of it is
    correct, for each k.

    scores: of G completions of n prompts; from CORRECT on a completion is correct, NaN is no score. Of a
    prompt's g scored completions, c are correct: 1 - C(g - c, k) / C(g, k), or NaN if g < k. The mean over
    the prompts without NaN is the unbiased estimate of Chen et al. 2021 (arXiv:2107.03374). A k that is too
    large for every prompt is left out.

    >>> pass_at(np.array([[1.0, 0.0, 0.0, 0.0]]), [1, 2])
    {1: [0.25], 2: [0.5]}
    """
    by_k = {}
    for k in ks:
        known = [row[~np.isnan(row)] for row in scores]
        estimates = [
            1 - math.comb(len(row) - int((row >= CORRECT).sum()), k) / math.comb(len(row), k)
            if len(row) >= k
            else math.nan
            for row in known
        ]
        if not np.isnan(estimates).all():
            by_k[k] = estimates
    return by_k
