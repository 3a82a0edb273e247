"""Score completions of held-out prompts, before and after training, against the responses in their rows."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxft.bounds import INT32
from jaxft.data.source import Prompt, Source
from jaxft.distributed import processes
from jaxft.objectives.intervals import Interval, interval_of, prompt_means
from jaxft.objectives.metrics import HELD_OUT, FloatMetrics
from jaxft.rl.rewards import FunctionReward, call_reward, unique_names
from jaxft.runs.metric_names import SCORES
from jaxft.runs.report import Sample
from jaxft.train.completion_scores import pass_at
from jaxft.train.samples import Completed, PromptText
from jaxft.train.settings import Run, Scoring


class Scored(NamedTuple):
    """Held-out completions of a model.

    samples: those that logs and cards show. scored: number of prompts whose completions were scored. metrics:
    mean score by each function, and pass@k. intervals: of these means over the prompts. values: of each
    prompt, by a name that is the same in every run that has the prompt. faults: a line for
    each function that returned no score for some completions. nonfinite: number of prompts of which a
    completion ended because of non-finite logits.
    """

    samples: list[Sample]
    scored: int
    metrics: FloatMetrics
    intervals: dict[str, Interval]
    values: dict[str, FloatMetrics]
    faults: list[str]
    nonfinite: int


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
    """Return a warning if completions of held-out prompts may be longer than the model's positions."""
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
) -> Callable[[Sequence[Completed]], Scored]:
    """Return `score(completions)` of all completions, `scoring.samples` of each prompt. It keeps the first
    one of the first `samples` prompts as text, and scores those of the first `scoring.prompts`, or of all.

    texts: the held-out prompts, with their rows' responses. Every function is called with these responses
    first; ValueError is raised if it returns no score for one, so that a function that does not fit the rows
    ends the run before it trains.
    """
    functions = [FunctionReward(fn) for fn in scoring.functions]
    names, group = unique_names(functions), scoring.samples

    def call(completions: Sequence[str], group: int) -> list[tuple[list[float], str]]:
        """Return the scores by each function, NaN for none, and a message about the first fault. group:
        completions of each prompt.
        """
        known = [text for text in texts[: len(completions) // group] for _ in range(group)]
        rows = [
            (f"held-out prompt {1 + i // group}", {"answer": text.reference}) for i, text in enumerate(known)
        ]
        prompts = [text.prompt for text in known]

        def on_first() -> list[Any]:
            found = [call_reward(fn, prompts, completions, rows) for fn in functions]
            return [[one.scores.tolist(), one.faults.first] for one in found]

        return [(values, fault) for values, fault in processes.from_first_process(on_first)]

    for _, fault in call([text.reference for text in texts[: scoring.prompts]], 1) if functions else ():
        if fault:
            raise ValueError(
                f"scoring.by: {fault}, called with that row's own response. Choose a function that fits the "
                "rows, or set scoring.by= to nothing"
            )

    prompt_names = [_prompt_name(text, number) for number, text in enumerate(texts[: scoring.prompts])]
    prompt_names = prompt_names if functions else []

    def score(completions: Sequence[Completed]) -> Scored:
        shown = [one.shown() for one in completions[::group][:samples]]
        metrics: FloatMetrics = {}
        intervals: dict[str, Interval] = {}
        of_prompts: dict[str, FloatMetrics] = {name: {} for name in prompt_names}
        faults = []
        prompts = len(texts[: scoring.prompts]) if functions else 0
        scored = [one.completion for one in completions[: prompts * group]]
        for name, (values, fault) in zip(names, call(scored, group), strict=True):
            known = np.array(values)[~np.isnan(values)]
            by_prompt, metric = np.array(values).reshape(prompts, group), f"{HELD_OUT}{SCORES}{name}"
            if len(known):
                metrics[metric] = float(known.mean())
                means = prompt_means(by_prompt)
                intervals[metric] = interval_of(means)
                for prompt, mean in zip(prompt_names, means, strict=True):
                    of_prompts[prompt] |= {} if math.isnan(mean) else {f"{SCORES}{name}": mean}
            for k, estimates in pass_at(by_prompt, scoring.pass_at).items():
                metric = f"{HELD_OUT}{SCORES}pass@{k}/{name}"
                metrics[metric], intervals[metric] = float(np.nanmean(estimates)), interval_of(estimates)
            if fault:
                missing = f"{len(values) - len(known)} of {len(values)}"
                faults.append(f"{missing} completions of held-out prompts have no score: {fault}")
        broken = np.array([one.finish == "nonfinite" for one in completions]).reshape(-1, group).any(1)
        intervals = {name: x for name, x in intervals.items() if math.isfinite(x.low)}  # of one prompt
        of_prompts = {prompt: own for prompt, own in of_prompts.items() if own}
        return Scored(shown, prompts, metrics, intervals, of_prompts, faults, int(broken.sum()))

    return score


def _prompt_name(text: PromptText, number: int) -> str:
    """Return a name of a held-out prompt from its text and response; `number` tells equal ones apart."""
    digest = hashlib.sha256(json.dumps([text.prompt, text.reference, number]).encode()).hexdigest()
    return f"prompt {digest[:16]}"
