"""The batch types that sources build and objectives read, and the state that a train step carries.

Legend of array suffixes used all over jaxft: B batch rows, T time, S source time, D width, H query heads, K
kv heads, G = H/K, E head dim, F mlp, V vocab, R rank, L layers, M read positions of a row.
"""

from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxft.tree import Aux, OptState, Params, static, struct

T = TypeVar("T", "Pairs", "Rollout")


@struct
class Tokens:
    """Rows of tokens and the positions that have a loss.

    In a train step the arrays carry a leading microbatch axis and are sharded over rows; an objective sees
    one microbatch. They are NumPy arrays where a source makes them, jax arrays in a program,
    ShapeDtypeStructs where only shapes matter. The shift by one lives here: `read[b, m]` is where the model
    is read, `targets[b, m]` the token that should follow. `token_weights` sums to 1 over the whole optimizer
    batch (0 marks padding), so an objective adds and never averages.
    """

    ids: Int[Any, "B T"]
    segments: Int[Any, "B T"]  # 0 is padding; 1, 2, ... the examples packed into the row
    positions: Int[Any, "B T"]  # for rope; starts at 0 in each segment
    read: Int[Any, "B M"]
    targets: Int[Any, "B M"]
    token_weights: Float[Any, "B M"]
    branches: Int[Any, "B T"] | None = None  # 0 a shared prompt, 1, 2, ... answers that don't see one another
    packed: bool = static(default=True)  # a row may have several segments, or padding before its first token


@struct
class Pairs:
    """Answers to prompts that are compared, packed into rows; a pair never spans two rows.

    A row has P slots, a slot one prompt and A answers, named by `kinds`: ("chosen", "rejected") and sometimes
    a third. Laid out by branches the prompt is stored once and the answers don't see one another; plain, each
    answer is a segment with the prompt in front. Everything an objective needs is told by answer id, so that
    it never looks at the layout. `pair_weights` sums to 1 over the whole optimizer batch; 0 marks an empty
    slot. A missing answer has length 0.
    """

    ids: Int[Any, "B T"]
    segments: Int[Any, "B T"]
    positions: Int[Any, "B T"]
    read: Int[Any, "B M"]
    targets: Int[Any, "B M"]
    answers: Int[
        Any, "B M"
    ]  # slot * A + kind of the answer that a read position belongs to; P * A marks padding
    places: Int[Any, "B M"]  # 0, 1, ... within the answer
    lengths: Int[Any, "B P A"]  # tokens of each answer, its end-of-turn token included
    last: Int[
        Any, "B P A"
    ]  # where in the row the last of them stands, from where a score is read; 0 where it is missing
    mean_lengths: Float[
        Any, "B P A"
    ]  # mean over the optimizer batch's answers of that kind, the same everywhere
    pair_weights: Float[Any, "B P"]
    index: Int[Any, "B P"]  # the pair's number among the source's pairs, -1 for an empty slot
    columns: dict[str, Float[Any, "B P"]]  # further numbers of the rows, such as margin
    reference: Float[Any, "B M"] | None = (
        None  # the reference's log-probs where they were computed beforehand
    )
    branches: Int[Any, "B T"] | None = None
    kinds: tuple[str, ...] = static(default=("chosen", "rejected"))
    packed: ClassVar[bool] = True  # as in Tokens


@struct
class Rollout:
    """Completions of prompts, packed into rows: a prompt is stored once for its group.

    A row has A places for completions, of one prompt or of several. Each weight array sums to 1 over the
    whole optimizer batch (except where advantages.py says otherwise) and is 0 for what has no such loss,
    though it may be a completion's token. What a completion holds and the model didn't draw, such as a tool's
    answer, has no read position.
    """

    ids: Int[Any, "B T"]
    segments: Int[Any, "B T"]
    positions: Int[Any, "B T"]
    read: Int[Any, "B M"]  # as in Tokens: where the model is read, and the token that follows
    targets: Int[Any, "B M"]
    answers: Int[
        Any, "B M"
    ]  # which completion of the row (0 .. A-1) a read position belongs to; A marks padding
    logps: (
        Float[Any, "B M"] | None
    )  # the trainer's when the completions were drawn, at that temperature; None: as it is now
    advantages: Float[Any, "B M"]
    policy_weights: Float[Any, "B M"]
    lengths: Int[Any, "B A"]  # tokens of each completion, 0 for an empty place
    reference: Float[Any, "B M"] | None = None  # the reference's log-probs
    values: Float[Any, "B M"] | None = None  # the critic's when the completions were drawn
    returns: Float[Any, "B M"] | None = None  # what the critic should learn
    value_weights: Float[Any, "B M"] | None = None
    branches: Int[Any, "B T"] | None = None
    packed: ClassVar[bool] = True  # as in Tokens


@struct
class TrainState:
    """Everything a run needs to resume. `bad` counts non-finite steps: [in total, in a row up to now]."""

    step: Int[Any, ""]
    trainable: Params
    opt_state: OptState
    aux: Aux
    bad: Int[Any, "2"]


def without_fields(batch: T, names: tuple[str, ...]) -> T:
    """The batch with None in place of some of its fields."""
    nothing: dict[str, Any] = dict.fromkeys(names)
    return replace(batch, **nothing)


def widened(batch: Any, like: Any) -> Any:
    """Pad a batch of NumPy arrays with empty tokens, read positions and slots to the shapes of `like`."""
    wide = jax.tree.map(
        lambda x, s: np.pad(x, [(0, n - m) for m, n in zip(x.shape, s.shape, strict=True)]), batch, like
    )
    if isinstance(batch, Rollout):
        return replace(wide, answers=_answers(batch, wide, batch.lengths.shape[-1], like.lengths.shape[-1]))
    if not isinstance(batch, Pairs):
        return wide
    old, new = (b.lengths.shape[-2] * len(b.kinds) for b in (batch, like))
    index = np.full_like(wide.index, -1)
    index[..., : batch.index.shape[-1]] = batch.index
    return replace(wide, answers=_answers(batch, wide, old, new), index=index)


def _answers(batch: Any, wide: Any, old: int, new: int) -> Any:
    """The answer ids in the shape of `wide`, padding marked by `new` where it was by `old`."""
    answers, rows, reads = np.full_like(wide.answers, new), batch.answers.shape[-2], batch.answers.shape[-1]
    answers[..., :rows, :reads] = np.where(batch.answers == old, new, batch.answers)
    return answers
