"""Prompts that a policy answers while it trains, and what a reward function reads of their rows."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jinja2
import numpy as np

from jaxft.batch import Rollout
from jaxft.data import chat, formats, pack
from jaxft.data.rows import Row, read_rows
from jaxft.data.settings import DataSettings

TOO_LONG = ("drop", "error")
STEP = 64  # prompts and rows are as long as a multiple of this, so that similar data share a program
ANSWERS = ("response", "output", "completion", "chosen", "rejected")


@dataclass(frozen=True)
class Prompts(DataSettings):
    """Prompts of a run that trains on its own completions, how they are sampled, and how they become optimizer steps.

    format: "chat" uses a string as the user's turn, "plain" as text to continue. max_prompt, max_new: tokens of a
    prompt and of a completion. too_long: "drop" leaves longer prompts out, "error" stops. batch: prompts of a rollout.
    group: completions of each. eval_group: completions of each held-out prompt. temperature, top_k, top_p: of the
    sampler. passes: how often the policy is trained on a rollout (PPO's epochs, GRPO's iterations), each time in
    `minibatches` optimizer steps, each of these in `micro` microbatches. Other fields: see DataSettings.
    """

    format: str = "chat"
    max_prompt: int = 256
    max_new: int = 128
    too_long: str = "drop"
    batch: int = 16
    group: int = 1
    eval_group: int = 1
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    passes: int = 1
    minibatches: int = 1
    unit: ClassVar[str] = "prompts"
    packing: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_choice("format", ("chat", "plain"))
        self.require_choice("too_long", TOO_LONG)
        self.require_at_least(1, "max_prompt", "max_new", "group", "eval_group", "passes", "minibatches")
        if self.batch % (self.minibatches * self.micro):
            raise ValueError(
                f"data.batch={self.batch} prompts are not divisible into data.minibatches={self.minibatches} of "
                f"data.micro={self.micro} microbatches; use a multiple of {self.minibatches * self.micro}"
            )
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"data.temperature={self.temperature}; use a number of at least 0 (greedy)")
        if self.group > 1 and self.temperature == 0:
            raise ValueError(
                f"data.temperature=0 samples the same completion {self.group} times; raise it, or set data.group=1"
            )
        if self.eval_group > self.group:
            raise ValueError(
                f"data.eval_group={self.eval_group} is more than data.group={self.group}, which rows have room for; "
                "lower it"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"data.top_k={self.top_k}; use at least 1, or none")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"data.top_p={self.top_p}; use a number above 0 and at most 1, or none")

    @property
    def max_length(self) -> int:
        """Positions of a prompt with a completion."""
        return self.max_prompt + self.max_new

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps that use the same rollout."""
        return self.passes * self.minibatches

    @property
    def units_per_step(self) -> int:
        """Prompts of one optimizer step."""
        return self.batch // self.minibatches


@dataclass(frozen=True)
class Room:
    """Size of a row: tokens, and read positions."""

    length: int
    reads: int

    @staticmethod
    def most(data: Prompts, longest: int) -> "Room":
        """What the longest prompt with a whole group of the longest completions takes."""
        return Room(rounded(longest + data.group * data.max_new), rounded(data.group * data.max_new))


def rounded(size: int) -> int:
    """The next multiple of STEP."""
    return -(-size // STEP) * STEP


def shapes(data: Prompts, room: Room, shards: int = 1) -> Rollout:
    """Shapes of one optimizer step's batch, [micro, rows, ...]: a row holds a prompt and its group."""
    rows = -(-data.batch // (data.minibatches * data.micro * shards)) * shards

    def shape(last: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((data.micro, rows, last), dtype)

    token, read, number = (
        shape(room.length, np.int32),
        shape(room.reads, np.int32),
        shape(room.reads, np.float32),
    )
    return Rollout(
        ids=token, segments=token, positions=token, read=read, targets=read, answers=read, logps=number, advantages=number,
        policy_weights=number, lengths=shape(data.group, np.int32), branches=token,
    )  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """Prompts as token ids; names and fields of their rows, and the prompt as it stands there."""

    ids: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    prompts: tuple[Any, ...]
    fields: tuple[dict[str, Any], ...]
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, chosen: Sequence[int] | np.ndarray) -> "Asked":
        """Some of them."""
        take = lambda x: tuple(x[int(i)] for i in chosen)  # noqa: E731
        return Asked(take(self.ids), take(self.names), take(self.prompts), take(self.fields))


def prompt_of(row: Row) -> Any:
    """A row's prompt: a string, or the messages up to the answer. Raises ValueError, naming the row, where there is none."""
    fields = {name: value for name, value in row.fields.items() if name not in ANSWERS}
    if isinstance(fields.get("prompt"), str) and not _is_messages(fields["prompt"]):
        return formats.text_of(row, "prompt")
    if "prompt" in fields:
        fields["messages"] = fields.pop("prompt")
    if "instruction" in fields:
        fields["response"] = "-"  # a row has an answer; it is cut off below
    if not {"messages", "conversations", "instruction"} & fields.keys():
        raise ValueError(
            f"{row.name}: found columns {', '.join(row.fields)}; wanted prompt, messages or instruction"
        )
    (example,) = formats.normalise_rows([row._replace(fields=fields)])
    if not isinstance(example, formats.Chat):
        raise ValueError(
            f"{row.name}: the columns {', '.join(row.fields)} have no prompt; add prompt, messages or instruction"
        )
    messages = list(example.messages)
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not asked or not str(asked[-1]["content"]).strip():
        raise ValueError(
            f"{row.name}: the prompt is empty; wanted a text to answer before the assistant's turn"
        )
    return asked


def _is_messages(text: str) -> bool:
    """Whether a string holds a conversation as JSON."""
    if not text.lstrip().startswith("["):
        return False
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return bool(found) and all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in found)


def read(ref: str, data: Prompts, tokenizer: Any) -> Asked:
    """The prompts of `ref`, tokenised as training sees them. Raises ValueError naming the row of one that can't be asked."""
    ids, names, prompts, fields, dropped = [], [], [], [], 0
    for row in read_rows(ref):
        row = _renamed(row, data.columns)
        prompt = prompt_of(row)
        turns = (
            [{"role": "user", "content": prompt}]
            if isinstance(prompt, str) and data.format == "chat"
            else prompt
        )
        try:
            found = chat.prompt_ids(turns, tokenizer, data.date)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(
                f"{row.name}: the chat template refuses the prompt: {str(error).splitlines()[0]}"
            ) from error
        if not found:
            raise ValueError(f"{row.name}: the prompt has no tokens; fill it or remove the row")
        if len(found) > data.max_prompt:
            if data.too_long == "error":
                raise ValueError(
                    f"{row.name}: a prompt of {len(found)} tokens, and data.max_prompt={data.max_prompt}"
                )
            dropped += 1
            continue
        ids.append(tuple(found))
        names.append(row.name)
        prompts.append(prompt)
        fields.append(row.fields)
    if not ids:
        raise ValueError(
            f"{ref}: all {dropped} prompts have more tokens than data.max_prompt={data.max_prompt}; raise it"
        )
    return Asked(tuple(ids), tuple(names), tuple(prompts), tuple(fields), dropped)


def _renamed(row: Row, columns: tuple[str, ...]) -> Row:
    fields = dict(row.fields)
    for item in columns:
        ours, equals, theirs = (part.strip() for part in item.partition("="))
        if not (ours and equals and theirs):
            raise ValueError(f"data.columns: found {item!r}, wanted ours=theirs, for example prompt=question")
        if theirs not in row.fields:
            found = ", ".join(map(str, row.fields))
            raise ValueError(
                f"{row.name}: no column {theirs!r} (data.columns maps {ours}={theirs}); found columns: {found}"
            )
        fields[ours] = row.fields[theirs]
    return Row(row.name, fields)


def split(data: Prompts, tokenizer: Any) -> tuple[Asked, Asked]:
    """(prompts to learn from, prompts held out); of a share all rows with the same prompt are on one side."""
    asked = read(data.train, data, tokenizer)
    if not data.holds_out:
        return asked, asked.at(())
    if isinstance(data.held_out, str):
        return asked, read(data.held_out, data, tokenizer)
    apart = list(dict.fromkeys(asked.ids))
    if len(apart) < 2:
        raise ValueError(
            f"{data.train}: one prompt can't be split by data.held_out={data.held_out}; set data.held_out=none"
        )
    share = data.held_out_count(len(apart))
    held = {apart[i] for i in pack.permutation(len(apart), data.seed, 0)[:share]}
    here = np.array([ids in held for ids in asked.ids])
    return replace(asked.at(np.flatnonzero(~here)), dropped=asked.dropped), asked.at(np.flatnonzero(here))


def drawn(data: Prompts, count: int, rollout: int) -> np.ndarray:
    """Which of `count` prompts rollout number `rollout` asks, [batch]: an endless sequence, shuffled anew each time around."""
    places = rollout * data.batch + np.arange(data.batch)
    orders = {
        epoch: pack.permutation(count, data.seed, 4, epoch) for epoch in np.unique(places // count).tolist()
    }
    return np.array([orders[place // count][place % count] for place in places.tolist()])


def dealt(data: Prompts, rollout: int, part: int) -> np.ndarray:
    """Which of a rollout's prompts its optimizer step number `part` learns from: each pass is shuffled anew."""
    turn, place = divmod(part, data.minibatches)
    order = pack.permutation(data.batch, data.seed, 5, rollout, turn)
    size = data.batch // data.minibatches
    return order[place * size : (place + 1) * size]


def fingerprint(data: Prompts, train: Asked, held: Asked) -> str:
    """A hash of what is asked and of all that decides in which order."""
    settings = (
        data.batch,
        data.group,
        data.passes,
        data.minibatches,
        data.seed,
        data.max_new,
        data.temperature,
    )
    told = [settings, data.top_k, data.top_p, train.ids, train.fields, held.ids, held.fields]
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()[:32]
