"""The batch types that sources build and objectives read, and the state that a train step carries.

Legend of array suffixes in all of jaxft: B batch rows, T time, S source time, D width, H query heads, K
kv heads, G = H/K, E head dim, F mlp, V vocab, R rank, L layers, M read positions of a row.
"""

from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxft.nn.tree import Aux, OptState, Params, static, struct

T = TypeVar("T", "Pairs", "Rollout")


@struct
class Tokens:
    """Rows of tokens and the positions with a loss.

    In a train step the arrays have a leading microbatch axis and are sharded over rows; an objective sees one
    microbatch. They are NumPy arrays in sources, jax arrays in programs and ShapeDtypeStructs where only
    shapes matter. The shift by one happens here: `read[b, m]` is a position in the row whose logits are used
    (a read position), `targets[b, m]` the token that follows it. `token_weights`, the weights of the targets'
    losses, sum to 1 over the optimizer batch (0 marks padding): objectives sum and never average.
    """

    ids: Int[Any, "B T"]
    segments: Int[Any, "B T"]  # 0 is padding; 1, 2, ... the examples packed into the row
    positions: Int[Any, "B T"]  # for rope; starts at 0 in each segment
    read: Int[Any, "B M"]
    targets: Int[Any, "B M"]
    token_weights: Float[Any, "B M"]
    branches: Int[Any, "B T"] | None = None  # 0: a shared prompt; 1, 2, ...: its responses, mutually masked
    sources: Int[Any, "B M"] | None = None  # where each target's row is from, an index of source_names
    source_names: tuple[str, ...] = static(default=())
    packed: bool = static(default=True)  # a row may have several segments, or padding before its first token
    max_length: ClassVar[int] = 0  # see Pairs
    sampled_length: ClassVar[None] = None  # see Rollout


@struct
class Decisions(Tokens):
    """Rows of tokens with decisions: read positions (see Tokens) at which the dataset gives the probability
    of each of several next tokens, the choices.

    `targets[b, m]` is the token of the most probable choice. `choices[b, m, c]` is the token of choice c, as
    an index into `tokens`; -1 if the decision has fewer choices. `probabilities[b, m, c]` is the probability
    of choice c in the dataset; they sum to 1 over c. `token_weights[b, m]` is the weight of a decision.
    """

    choices: Int[Any, "B M C"] = None
    probabilities: Float[Any, "B M C"] = None
    tokens: tuple[int, ...] = static(default=())  # of all choices in the dataset, each once


@struct
class Pairs:
    """Pairs of preference data, packed into rows: a prompt and the responses to it that a loss compares.

    A row has P slots for pairs; a pair is never split over two rows. A slot has one prompt and A responses,
    named by `kinds`: ("chosen", "rejected") and perhaps a third. With `branches` a prompt is stored once and
    its responses do not attend to one another; without, each response is a segment that starts with the
    prompt. `responses` assigns each read position (see Tokens) to a response, so that objectives do not
    depend on the layout. `pair_weights` sum to 1 over the optimizer batch; 0 marks an empty slot. A missing
    response has length 0.
    """

    ids: Int[Any, "B T"]
    segments: Int[Any, "B T"]
    positions: Int[Any, "B T"]
    read: Int[Any, "B M"]  # as in Tokens
    targets: Int[Any, "B M"]
    responses: Int[Any, "B M"]  # response id of a read position: slot * A + kind; P * A marks padding
    offsets: Int[Any, "B M"]  # 0, 1, ... within the response
    lengths: Int[Any, "B P A"]  # tokens of each response, end-of-turn token included
    last: Int[Any, "B P A"]  # position in the row of its last token, whose score a reward model reads
    mean_lengths: Float[Any, "B P A"]  # mean length of the optimizer batch's responses of that kind
    pair_weights: Float[Any, "B P"]
    index: Int[Any, "B P"]  # the pair's index in the source, -1 for an empty slot
    columns: dict[str, Float[Any, "B P"]]  # further numeric columns of the dataset, such as margin
    reference: Float[Any, "B M"] | None = None  # precomputed log-probs of the reference
    branches: Int[Any, "B T"] | None = None
    sources: Int[Any, "B P"] | None = None  # where each pair is from, an index of source_names
    source_names: tuple[str, ...] = static(default=())
    kinds: tuple[str, ...] = static(default=("chosen", "rejected"))
    max_length: int = static(default=0)  # most tokens of a response with its prompt; 0 if unknown
    sampled_length: int | None = static(default=None)  # as in Rollout
    packed: ClassVar[bool] = True  # as in Tokens


@struct
class Rollout:
    """Sampled completions, packed into rows; a prompt is stored once for all of its completions in the row.

    A row has A slots for completions, of one prompt or several. The three `*_weights` multiply the losses of
    tokens: each array sums to 1 over the optimizer batch (some rules of rl/token_weights.py change that) and
    is 0 at positions without its loss. A completion may be an episode of several turns: tokens that the
    policy did not sample, such as a tool's output, are in the row but have no read position (see Tokens).
    """

    ids: Int[Any, "B T"]
    segments: Int[Any, "B T"]
    positions: Int[Any, "B T"]
    read: Int[Any, "B M"]  # as in Tokens
    targets: Int[Any, "B M"]
    responses: Int[Any, "B M"]  # completion id of a read position, 0 .. A-1; A marks padding
    logps: Float[Any, "B M"] | None  # the policy's at sampling; None: the current policy's
    advantages: Float[Any, "B M"]
    policy_weights: Float[Any, "B M"]
    lengths: Int[Any, "B A"]  # sampled tokens of each completion, 0 for an empty slot
    reference: Float[Any, "B M"] | None = None  # log-probs of the reference
    values: Float[Any, "B M"] | None = None  # the critic's at sampling
    returns: Float[Any, "B M"] | None = None  # the critic's targets
    value_weights: Float[Any, "B M"] | None = None
    observation_weights: Float[Any, "B M"] | None = None  # of tokens from the environment, padding otherwise
    branches: Int[Any, "B T"] | None = None
    last: Int[Any, "B A"] | None = None  # row position of the last sampled token, where a reward is read
    # most tokens of a completion; fixes the angles of dynamic and longrope
    sampled_length: int | None = static(default=None)
    max_length: ClassVar[int] = 0  # as in Pairs
    packed: ClassVar[bool] = True  # as in Tokens


@struct
class TrainState:
    """The state of a run that each train step changes. `bad` counts the steps whose loss, gradient norm or
    update was not finite: [in total, consecutive until now].
    """

    step: Int[Any, ""]
    trainable: Params
    opt_state: OptState
    aux: Aux
    bad: Int[Any, "2"]


def count_reads(batch: Any) -> int:
    """Return the number of read positions (see Tokens) of a Tokens, Pairs or Rollout, without padding."""
    if isinstance(batch, Tokens):
        return int((batch.token_weights != 0).sum())
    slots = batch.lengths.shape[-1] * (batch.lengths.shape[-2] if isinstance(batch, Pairs) else 1)
    return int((batch.responses < slots).sum())


def without_fields(batch: T, names: tuple[str, ...]) -> T:
    """Return a batch with the fields `names` set to None."""
    nothing: dict[str, Any] = dict.fromkeys(names)
    return replace(batch, **nothing)


def widened(batch: Any, like: Any) -> Any:
    """Pad a batch of NumPy arrays to the shapes of `like`; added tokens, reads and slots are padding."""
    wide = jax.tree.map(
        lambda x, s: np.pad(x, [(0, n - m) for m, n in zip(x.shape, s.shape, strict=True)]), batch, like
    )
    if isinstance(batch, Rollout):
        return replace(wide, responses=_relabel(batch, wide, batch.lengths.shape[-1], like.lengths.shape[-1]))
    if not isinstance(batch, Pairs):
        return wide
    old, new = (b.lengths.shape[-2] * len(b.kinds) for b in (batch, like))
    index = np.full_like(wide.index, -1)
    index[..., : batch.index.shape[-1]] = batch.index
    return replace(wide, responses=_relabel(batch, wide, old, new), index=index)


def _relabel(batch: Any, wide: Any, old: int, new: int) -> Any:
    """Return `batch.responses` padded like `wide`, with the padding's id changed from `old` to `new`."""
    responses = np.full_like(wide.responses, new)
    rows, reads = batch.responses.shape[-2:]
    responses[..., :rows, :reads] = np.where(batch.responses == old, new, batch.responses)
    return responses
