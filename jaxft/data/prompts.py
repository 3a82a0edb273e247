"""Prompts of policies that are trained on their own completions, and the columns that rewards read."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxft.annotations import ABOVE_ZERO_TO_ONE, ZERO_TO_ONE, PositiveInt, at_least, one_of
from jaxft.batch import Rollout, Tokens
from jaxft.data.data_settings import DataSettings
from jaxft.data.packing.pack import RowShape, ascending, permutation, round_up
from jaxft.data.packing.reader import Reader, RowTask
from jaxft.data.packing.row_cache import Made
from jaxft.data.packing.row_tasks import PROMPT_TASK, TokenisedPrompts, row_fields, row_prompt
from jaxft.data.packing.tokenised import TokenisedRows
from jaxft.data.row_settings import RowSettings
from jaxft.data.rows.conversation import PROMPT_FORMATS
from jaxft.data.rows.mixture import SourceRef, SplitRows, held_out_sources, parse_sources, split_rows
from jaxft.data.rows.row_files import Row
from jaxft.nn.attention.kv_cache import CacheFormat

TOO_LONG = ("drop", "error")
LENGTH_STEP = 64  # lengths of prompts and rows are multiples of this, so that similar data share a program


@dataclass(frozen=True)
class Prompts(DataSettings):
    """Prompts of a run that trains on its own completions, and the settings of sampling and of the optimizer
    steps.

    format: "auto" uses a string as the user's turn, "plain" as text to continue; "implicit" is the common
    beginning of chosen and rejected, other values name the column of the prompt. max_prompt: the most tokens
    of a prompt. max_new: the most tokens of a completion. max_turns: the most completions of an episode,
    between which an environment or tools add tokens. max_episode: the most tokens after the prompt in an
    episode of several turns, sampled or added; none: max_turns x max_new. too_long: "drop" leaves out prompts
    of more than max_prompt tokens, "error" ends the run. batch: prompts of a rollout. group: completions of
    each prompt. eval_group: completions of each held-out prompt. temperature: of sampling; 0 takes the most
    likely token. top_k: sample from the k most likely tokens; none: from all. top_p: sample from the most
    likely tokens that together have this probability; none: from all. min_p: sample from tokens with at least
    this fraction of the most likely token's probability; none: from all. decode_rows: completions that are
    sampled at the same time; the next prompts take the rows of completions that ended. none: all on a CPU, at
    most 256 per GPU or TPU over which rows are divided. Another number may round sums differently and so
    change a token where two are almost equally likely, except in bfloat16 on a CPU with bfloat16
    instructions. kv_cache: how the sampler stores keys and values, "compute" for the compute dtype. passes:
    how often the policy is trained on a rollout (PPO's epochs, GRPO's iterations). minibatches: optimizer
    steps of each pass, of `micro` microbatches each.

    Other fields: see DataSettings.
    """

    format: Annotated[str, one_of(PROMPT_FORMATS)] = "auto"
    max_prompt: PositiveInt = 256
    max_new: PositiveInt = 128
    max_turns: PositiveInt = 1
    max_episode: PositiveInt | None = None
    too_long: Annotated[str, one_of(TOO_LONG)] = "drop"
    batch: PositiveInt = 16
    group: PositiveInt = 1
    eval_group: PositiveInt = 1
    temperature: Annotated[float, at_least(0)] = 1.0
    top_k: PositiveInt | None = None
    top_p: Annotated[float | None, ABOVE_ZERO_TO_ONE] = None
    min_p: Annotated[float | None, ZERO_TO_ONE] = None
    decode_rows: PositiveInt | None = None
    kv_cache: CacheFormat = "compute"
    passes: PositiveInt = 1
    minibatches: PositiveInt = 1
    unit: ClassVar[str] = "prompts"
    task: ClassVar[RowTask] = PROMPT_TASK
    packing: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is not None:
            raise ValueError(
                f"data.tokens={self.tokens}: the lengths of completions are not known before "
                "they are sampled; use data.epochs or loop.steps"
            )
        if self.batch % (self.minibatches * self.micro):
            raise ValueError(
                f"data.batch={self.batch} prompts are not divisible into data.minibatches={self.minibatches} "
                f"of data.micro={self.micro} microbatches; use a multiple of {self.minibatches * self.micro}"
            )
        if self.group > 1 and self.temperature == 0:
            raise ValueError(
                f"data.temperature=0 samples the same completion {self.group} times; raise it, or set "
                "data.group=1"
            )
        if self.eval_group > self.group:
            raise ValueError(
                f"data.eval_group={self.eval_group} exceeds data.group={self.group}, the number of "
                f"completions in a row; use at most {self.group}"
            )
        if self.max_episode is not None and (self.max_turns == 1 or self.max_episode < self.max_new):
            raise ValueError(
                f"data.max_episode={self.max_episode} must be at least data.max_new={self.max_new}, and "
                f"needs a data.max_turns of 2 or more, got {self.max_turns}; raise what is too "
                "small, or set data.max_episode=none"
            )
        if self.decode_rows is not None and self.decode_rows < self.group:
            raise ValueError(
                f"data.decode_rows={self.decode_rows} is less than data.group={self.group}, but all "
                f"completions of a prompt begin together; use at least {self.group}, or none for all"
            )

    @property
    def token_settings(self) -> RowSettings:
        return self.row_settings(
            max_length=self.max_prompt, too_long=self.too_long, tools=self.row_tools,
            optional=self.optional_prompts,
        )  # fmt: skip

    def held_out_mask(self, rows: TokenisedRows) -> Bool[np.ndarray, " rows"]:
        if not rows.group_by(0).any():
            raise ValueError(
                f"{self.train}: data.held_out={self.held_out} cannot split a single prompt; set "
                "data.held_out=none"
            )
        return super().held_out_mask(rows)

    @property
    def row_tools(self) -> str:
        """The environments' tools as JSON, which replace the tools of rows; see RowSettings. "" for none."""
        return ""

    @property
    def optional_prompts(self) -> bool:
        """Whether rows need no prompt; see RowSettings."""
        return False

    @property
    def max_length(self) -> int:
        """The largest number of tokens of a prompt with its episode."""
        return self.max_prompt + self.episode_length

    @property
    def length_settings(self) -> tuple[str, ...]:
        return "max_prompt", "max_new" if self.max_turns == 1 else "max_episode"

    @property
    def episode_length(self) -> int:
        """The largest number of tokens of an episode after its prompt."""
        return self.max_turns * self.max_new if self.max_episode is None else self.max_episode

    @property
    def sampled_length(self) -> int:
        """The largest number of tokens of an episode that the policy samples."""
        return min(self.max_turns * self.max_new, self.episode_length)

    @property
    def reads_given(self) -> bool:
        """Whether batches also read the log-probs of tokens that an environment adds to an episode."""
        return False

    @property
    def starts_per_row(self) -> int:
        """How many prompts a row of a batch has: one, unless the prompts of a group differ."""
        return 1

    def group_row_shape(self, longest: int, fraction: float = 1.0) -> RowShape:
        """Return the shape of a batch's row, with room for a prompt of `longest` tokens and its group of
        episodes. fraction: 1.0 if all episodes of the group may have their full length, less if only part of
        these tokens must fit.
        """
        more = int(fraction * (self.starts_per_row - 1) * longest)
        read_length = self.episode_length if self.reads_given else self.sampled_length
        tokens, reads = (int(fraction * self.group * n) for n in (self.episode_length, read_length))
        return RowShape(padded_length(longest + more + tokens), padded_length(reads))

    @property
    def steps_per_rollout(self) -> int:
        """Number of optimizer steps that use the same rollout."""
        return self.passes * self.minibatches

    @property
    def units_per_step(self) -> int:
        """Number of prompts of one optimizer step."""
        return self.batch // self.minibatches


def padded_length(size: int) -> int:
    """Round a length up to a multiple of LENGTH_STEP."""
    return round_up(size, LENGTH_STEP)


def rollout_batch_shapes(data: Prompts, shape: RowShape, shards: int = 1) -> Rollout:
    """Return the shapes of a step's batch [micro, rows, ...]; a row has a prompt and its completions. shards:
    see DataSettings.open.
    """
    rows = round_up(data.units_per_step // data.micro, shards)

    def array(last: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((data.micro, rows, last), dtype)

    token, read, number = (
        array(shape.length, np.int32), array(shape.reads, np.int32), array(shape.reads, np.float32),
    )  # fmt: skip
    return Rollout(
        ids=token, segments=token, positions=token, read=read, targets=read, responses=read, logps=number,
        advantages=number, policy_weights=number, lengths=array(data.group, np.int32), branches=token,
        last=array(data.group, np.int32), sampled_length=data.episode_length,
    )  # fmt: skip


@dataclass(frozen=True)
class PromptRows:
    """The training or the held-out prompts of a split, in the order of `chosen`, their indices in split.rows.

    settings: the RowSettings of each dataset of this side. source_names: names of these datasets, () for a
    single one.
    """

    split: SplitRows
    chosen: Int[np.ndarray, " prompts"]
    settings: tuple[RowSettings, ...]
    source_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def lengths(self) -> Int[np.ndarray, " prompts"]:
        """Number of tokens of each prompt."""
        return self.split.rows.lengths[self.chosen]

    @property
    def names(self) -> Sequence[str]:
        """The names of the rows."""
        return Made(len(self), lambda i: self.split.rows.names[self.chosen[i]])

    @property
    def fields(self) -> Sequence[dict[str, Any]]:
        """The columns of the rows."""
        return Made(len(self), lambda i: row_fields(self.split.rows, self.chosen[i]))

    @property
    def token_ids(self) -> Sequence[tuple[int, ...]]:
        """The token ids of the prompts."""
        return Made(len(self), lambda i: tuple(self.split.rows.sequence(self.chosen[i]).tolist()))

    def select(self, numbers: Sequence[int] | Int[np.ndarray, " n"]) -> TokenisedPrompts:
        """Read the prompts with these positions in `chosen`."""
        names, fields = tuple(self.names[i] for i in numbers), tuple(self.fields[i] for i in numbers)
        ids = tuple(self.token_ids[i] for i in numbers)
        sources = self.split.sources[self.chosen[np.asarray(numbers, np.int64)]].tolist()
        prompts = (
            row_prompt(Row(name, columns), self.settings[source])
            for name, columns, source in zip(names, fields, sources, strict=True)
        )
        template, several = self.settings[0].template, bool(self.source_names)
        return TokenisedPrompts(
            ids, names, tuple(prompts), fields, template, tuple(sources) if several else (), self.source_names
        )


def read_prompts(ref: str, reader: Reader) -> PromptRows:
    """Read all prompts of a dataset."""
    rows = reader.read(ref)
    split = SplitRows(rows, np.arange(len(rows)), np.arange(0), np.zeros(len(rows), np.int16), (), (), None)
    return PromptRows(split, split.train, (reader.settings,))


def split_prompts(data: Prompts, tokenizer: Any, cache: Path | None = None) -> tuple[PromptRows, PromptRows]:
    """Return the training and the held-out prompts. All rows with the same prompt are on one side."""

    def side(chosen: np.ndarray, refs: Sequence[SourceRef], names: tuple[str, ...]) -> PromptRows:
        return PromptRows(split, chosen, tuple(ref.adapt(data).token_settings for ref in refs), names)

    split, refs = split_rows(data, tokenizer, cache), parse_sources(data.train)
    held_refs = held_out_sources(data.held_out) if isinstance(data.held_out, str) and data.holds_out else refs
    return side(split.train, refs, split.train_names), side(split.held, held_refs, split.held_names)


def prompts_of_rollout(data: Prompts, train: PromptRows, rollout: int) -> Int[np.ndarray, " batch"]:
    """Return the training prompts of a rollout, as indices into `train`.

    Rollouts take the prompts of one epoch after the other. An epoch is in random order, or sorted by
    data.order_by.
    """
    count = len(train)
    numbers = rollout * data.batch + np.arange(data.batch)

    def order(epoch: int) -> np.ndarray:
        rows = train.split.of_epoch(epoch)
        chosen = np.searchsorted(train.chosen, rows)
        if data.order_by is not None:
            return chosen[ascending(train.split.rows.order[rows], data.seed)]
        return chosen[permutation(count, data.seed, 4, epoch)]

    orders = {epoch: order(epoch) for epoch in np.unique(numbers // count).tolist()}
    return np.array([orders[number // count][number % count] for number in numbers.tolist()])


def prompts_of_step(data: Prompts, rollout: int, part: int) -> Int[np.ndarray, " minibatch"]:
    """Return which of a rollout's prompts an optimizer step uses, as indices from 0 to data.batch - 1. part:
    the step's number within the rollout, from 0. Every pass has another random order.
    """
    turn, minibatch = divmod(part, data.minibatches)
    order = permutation(data.batch, data.seed, 5, rollout, turn)
    size = data.units_per_step
    return order[minibatch * size : (minibatch + 1) * size]


def longest_prompt(train: PromptRows, eval_prompts: PromptRows) -> int:
    """Return the number of tokens of the longest training or held-out prompt."""
    return int(max(train.lengths.max(), eval_prompts.lengths.max(initial=0)))


def prompt_tokens(data: Prompts, train: PromptRows, step: int, shards: int) -> Tokens:
    """Return the prompts of an optimizer step, one per row and without targets: int32 [1, rows, T].

    T is the longest training prompt, rounded up. shards: empty rows make the number of rows a multiple of it.
    """
    number, part = divmod(step, data.steps_per_rollout)
    chosen = prompts_of_rollout(data, train, number)[prompts_of_step(data, number, part)]
    ids = np.zeros((round_up(len(chosen), shards), padded_length(int(train.lengths.max()))), np.int32)
    segments = np.zeros_like(ids)
    for row, i in enumerate(chosen):
        prompt_ids = train.token_ids[i]
        ids[row, : len(prompt_ids)], segments[row, : len(prompt_ids)] = prompt_ids, 1
    positions = np.where(segments > 0, np.arange(ids.shape[1], dtype=np.int32), 0)
    none = np.zeros((1, len(ids), 1), np.int32)
    return Tokens(ids[None], segments[None], positions[None], none, none, none.astype(np.float32))


def prompts_fingerprint(data: Prompts, train: PromptRows, held: PromptRows) -> str:
    """Return a hash of the prompts and of all settings that their order and the sampling depend on."""
    settings = (
        data.batch, data.group, data.passes, data.minibatches, data.seed, data.max_new, data.temperature,
    )  # fmt: skip
    added = [] if data.min_p is None else [data.min_p]  # a newer setting: without it, old hashes stay valid
    digest = hashlib.sha256(json.dumps([settings, data.top_k, data.top_p, *added]).encode())
    rows, mixture = train.split.rows, train.split.mixture
    for side in (train, held):
        digest.update(len(side).to_bytes(8, "little"))
        digest.update(np.asarray(rows.content)[side.chosen].tobytes())
    if mixture is not None:
        digest.update(repr((mixture.counts, train.source_names)).encode())
    if data.order_by is not None:
        digest.update(rows.order[train.chosen].tobytes())
    return digest.hexdigest()[:32]
