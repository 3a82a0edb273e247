"""Log-probs, scores and logits at read positions, the positions of a row whose outputs an objective needs.

On a mesh that shards the time axis of rows, each shard reads its own hidden states: only the results, such as
one log-prob per read position, move between devices.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxft.distributed.sharding import constrain, num_shards
from jaxft.nn.adapters.lora import Several
from jaxft.nn.layers import head_of_tokens
from jaxft.nn.tree import Params, static, struct
from jaxft.objectives.logprobs import (
    Graded,
    HeadInput,
    LanguageModel,
    LogProbs,
    TargetLoss,
    logps_of_heads,
    weighted_loss,
)


@struct
class ReadSharding:
    """The assignment of a row's M read positions to C m slots, on a mesh that shards the time axis of rows
    over C devices (num_shards). Each device has m slots, for the read positions in its part of the row.

    read_of: for each slot an index in 0 .. M-1 into the row's read positions, -1 for an empty slot. slot_of:
    the inverse, for each of the M read positions the index of its slot, in 0 .. C m - 1.
    """

    read_of: Int[Array, "B Cm"]
    slot_of: Int[Array, "B M"]
    num_shards: int = static()


# A time shard may have this many more reads than positions: a prompt's last position is read once per
# response.
SPARE_SLOTS = 8


def read_sharding(read: Int[Array, "B M"], length: int, max_responses: int = 2) -> ReadSharding | None:
    """Assign the read positions of rows of `length` tokens to slots; None if the mesh does not shard time.

    read: indices of tokens in the row. max_responses: the largest number of responses that share a prompt.
        The prompt's last position occurs in `read` once for each of them.
    """
    count = num_shards(("time",), (length,))
    if count == 1:
        return None
    M, local = read.shape[1], length // count
    slots = min(M, local + max(SPARE_SLOTS, max_responses))
    part = read // local
    in_part = part[:, :, None] == jnp.arange(count, dtype=jnp.int32)[None, None]
    order = jnp.cumsum(in_part, axis=1, dtype=jnp.int32)
    nth = jnp.take_along_axis(order, part[:, :, None], axis=2)[:, :, 0] - 1
    # Reads that do not fit are padding, which reads position 0.
    slot = jnp.where(nth < slots, part * slots + nth, count * slots)
    none, numbers = jnp.full(count * slots, -1, jnp.int32), jnp.arange(M, dtype=jnp.int32)
    # Row by row, so that rows stay on their devices.
    read_of = jax.vmap(lambda slot: none.at[slot].set(numbers, mode="drop"))(slot)
    return ReadSharding(read_of, jnp.minimum(slot, count * slots - 1), count)


def gather_read(
    h_BTD: Float[Array, "B T D"], read: Int[Array, "B M"], sharding: ReadSharding | None
) -> Float[Array, "N m D"]:
    """Return the hidden states at the read positions, without communication between devices.

    They are [B, M, D] for sharding=None, else [C B, m, D] with a row for each time shard of each row, where
    the m slots of a time shard have the order of ReadSharding. read: indices of tokens in the row.
    """
    if sharding is None:
        return jnp.take_along_axis(h_BTD, read[:, :, None], axis=1)
    (B, T, D), count = h_BTD.shape, sharding.num_shards
    local = T // count
    at = _to_slots(read, sharding).reshape(B, count, sharding.read_of.shape[1] // count) % local
    split = constrain(h_BTD.reshape(B, count, local, D), "rows", "time", "whole_time", "act_width")
    gathered = jnp.take_along_axis(split, constrain(at, "rows", "time", "whole_time")[..., None], axis=2)
    return _by_shard(gathered.reshape(B, count * at.shape[2], D), sharding)


def _to_slots(x: Shaped[Array, "B M"], sharding: ReadSharding) -> Shaped[Array, "B Cm"]:
    """Move the value of each read position to its slot; empty slots are 0."""
    gathered = jnp.take_along_axis(x, jnp.maximum(sharding.read_of, 0), axis=1)
    return jnp.where(sharding.read_of >= 0, gathered, jnp.zeros((), x.dtype))


def _by_shard(x: Shaped[Array, "B Cm ..."], sharding: ReadSharding) -> Shaped[Array, "CB m ..."]:
    """Reshape slots so that each time shard of a row is a row, and shard these rows over all devices."""
    B, size, *rest = x.shape
    split = jnp.moveaxis(x.reshape(B, sharding.num_shards, size // sharding.num_shards, *rest), 1, 0)
    axes = ("read_rows", "whole_time", *("act_width",) * len(rest))
    return constrain(split.reshape(sharding.num_shards * B, size // sharding.num_shards, *rest), *axes)


def _in_order(x: Shaped[Array, "CB m ..."], sharding: ReadSharding) -> Shaped[Array, "B M ..."]:
    """Move the value or array of each slot to its read position: the inverse of _to_slots, then _by_shard."""
    rows, size, *rest = x.shape
    joined = jnp.moveaxis(x.reshape(sharding.num_shards, rows // sharding.num_shards, size, *rest), 0, 1)
    flat = joined.reshape(rows // sharding.num_shards, sharding.num_shards * size, *rest)
    return jnp.take_along_axis(flat, sharding.slot_of.reshape(*sharding.slot_of.shape, *(1,) * len(rest)), 1)


def read_logits(
    model: LanguageModel,
    params: Params,
    h_BTD: Float[Array, "B T D"],
    read: Int[Array, "B M"],
    tokens: Int[Array, " U"],
) -> Float[Array, "B M U"]:
    """Return the logits of the U token ids `tokens` at read positions (`read`: indices of tokens in the row),
    in float32 or wider. Only these tokens' part of the head is multiplied.
    """
    return read_numbers(partial(model.logits, head_of_tokens(model.head(params), tokens)), h_BTD, read)


def read_scores(
    model: LanguageModel, params: Params, h_BTD: Float[Array, "B T D"], read: Int[Array, "B M"]
) -> Float[Array, "B M"]:
    """Return the scalar head's output at read positions (indices of tokens), in float32 or wider."""
    if num_shards(("time",), (h_BTD.shape[1],)) > 1 and isinstance(params["score"], Several):
        raise ValueError(
            "several heads in one forward pass are not supported with mesh.context above 1. Set "
            "mesh.context=1, or train one member at a time"
        )
    return read_numbers(partial(model.scores, params), h_BTD, read)


def read_numbers(
    head: Callable[[Array], Array],
    h_BTD: Float[Array, "B T D"],
    read: Int[Array, "B M"],
    max_responses: int = 2,
) -> Float[Array, "B M ..."]:
    """Return `head(h)` for the hidden states h at read positions.

    head: a function [N, m, D] -> [N, m, ...], for any N and m. read: indices of tokens in the row.
    max_responses: see read_sharding.
    """
    sharding = read_sharding(read, h_BTD.shape[1], max_responses)
    out = head(gather_read(h_BTD, read, sharding))
    return out if sharding is None else _in_order(out, sharding)


def read_logps(
    model: LanguageModel,
    params: Params,
    h_BTD: Float[Array, "B T D"],
    reads: tuple[Int[Array, "B M"], Int[Array, "B M"]],
    graded: Graded = ("logp",),
) -> LogProbs:
    """Return the LogProbs of targets at read positions. reads: (read positions, as indices of tokens in the
    row; the token id whose log-prob is computed at each of them). graded: see logprobs.token_logps.
    """
    return read_logps_of_heads([HeadInput(model, params, h_BTD)], reads, graded)[0]


def read_logps_of_heads(
    heads: Sequence[HeadInput],
    reads: tuple[Int[Array, "B M"], Int[Array, "B M"]],
    graded: Graded = ("logp",),
    max_responses: int = 2,
) -> tuple[LogProbs, ...]:
    """Return the LogProbs of targets at read positions under each head, in the order of `heads`.

    heads: the trained model's first, then those of frozen models, whose LogProbs have no gradient. Each h has
    the hidden states [B, T, D] of all tokens. reads, graded: see read_logps. max_responses: see
    read_sharding.
    """
    read, targets = reads
    sharding = read_sharding(read, heads[0].h.shape[1], max_responses)
    heads = [head._replace(h=gather_read(head.h, read, sharding)) for head in heads]
    if sharding is None:
        return logps_of_heads(heads, targets, graded)
    out = logps_of_heads(heads, _by_shard(_to_slots(targets, sharding), sharding), graded)
    return jax.tree.map(lambda x: _in_order(x, sharding), out)


def weighted_read_loss(
    model: LanguageModel,
    params: Params,
    h_BTD: Float[Array, "B T D"],
    reads: tuple[Int[Array, "B M"], Int[Array, "B M"], Float[Array, "B M"]],
    loss: TargetLoss,
) -> tuple[Float[Array, ""], LogProbs]:
    """Return (the sum of the losses at read positions times their weights, their LogProbs without gradient).

    reads: (read positions, as indices of tokens in the row; the token id that each should predict; weights).
    """
    read, targets, weights = reads
    sharding = read_sharding(read, h_BTD.shape[1])
    h = gather_read(h_BTD, read, sharding)
    if sharding is None:
        return weighted_loss(model, params, h, targets, weights, loss)
    targets, weights = (_by_shard(_to_slots(x, sharding), sharding) for x in (targets, weights))
    total, out = weighted_loss(model, params, h, targets, weights, loss)
    return total, jax.tree.map(lambda x: _in_order(x, sharding), out)
