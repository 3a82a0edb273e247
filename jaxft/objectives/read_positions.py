"""Log-probs and scores at the positions that are read, also on a mesh that cuts the time of rows into parts.

There every part of a row has its own reads beside its own hidden states: only numbers, one a read, move
between devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.distributed.sharding import constrain, parts
from jaxft.objectives.logprobs import Graded, LanguageModel, LogProbs, token_logps, weighted_logp
from jaxft.tree import static, struct


@struct
class Places:
    """Where the read positions of B rows are on a mesh that cuts their time into C parts, in parts of m
    places each.

    of: for each place the number of its read, -1 for none. at: the other way round.
    """

    of: Int[Array, "B Cm"]
    at: Int[Array, "B M"]
    parts: int = static()


EXTRA = (
    8  # how many reads more than positions a part of the time may have: a prompt's end is read once an answer
)


def placed(read: Int[Array, "B M"], length: int, answers: int = 2) -> Places | None:
    """The places of reads in rows of `length` tokens; None where the mesh doesn't cut time.

    answers: how many at most share a prompt, whose last token is read once for each of them.
    """
    count = parts(("time",), (length,))
    if count == 1:
        return None
    M, own = read.shape[1], length // count
    room = min(M, own + max(EXTRA, answers))
    part = read // own
    order = jnp.cumsum(part[:, :, None] == jnp.arange(count), axis=1, dtype=jnp.int32)
    nth = jnp.take_along_axis(order, part[:, :, None], axis=2)[:, :, 0] - 1
    at = jnp.where(
        nth < room, part * room + nth, count * room
    )  # what doesn't fit is padding, which reads position 0
    none, numbers = jnp.full(count * room, -1, jnp.int32), jnp.arange(M, dtype=jnp.int32)
    of = jax.vmap(lambda at: none.at[at].set(numbers, mode="drop"))(
        at
    )  # row by row: rows stay where they are
    return Places(of, jnp.minimum(at, count * room - 1), count)


def gather_read(
    h_BTD: Float[Array, "B T D"], read: Int[Array, "B M"], places: Places | None
) -> Float[Array, "N m D"]:
    """Hidden states at the read positions: on a mesh nothing moves between rows, or parts of them."""
    if places is None:
        return jnp.take_along_axis(h_BTD, read[:, :, None], axis=1)
    (B, T, D), count = h_BTD.shape, places.parts
    own = T // count
    at = _to_places(read, places).reshape(B, count, places.of.shape[1] // count) % own
    apart = constrain(h_BTD.reshape(B, count, own, D), "rows", "time", "whole_time", "act_width")
    found = jnp.take_along_axis(apart, constrain(at, "rows", "time", "whole_time")[..., None], axis=2)
    return _by_part(found.reshape(B, count * at.shape[2], D), places)


def _to_places(x: Array, places: Places) -> Array:
    """Numbers of the reads [B, M] in their places [B, C m]; 0 where there is none."""
    found = jnp.take_along_axis(x, jnp.maximum(places.of, 0), axis=1)
    return jnp.where(places.of >= 0, found, jnp.zeros((), x.dtype))


def _by_part(x: Float[Array, "B Cm ..."], places: Places) -> Float[Array, "CB m ..."]:
    """A row a part of the time: rows that lie as their devices do."""
    B, size, *rest = x.shape
    apart = jnp.moveaxis(x.reshape(B, places.parts, size // places.parts, *rest), 1, 0)
    axes = ("read_rows", "whole_time", *("act_width",) * len(rest))
    return constrain(apart.reshape(places.parts * B, size // places.parts, *rest), *axes)


def _in_order(x: Float[Array, "CB m"], places: Places) -> Float[Array, "B M"]:
    """Numbers of each place as numbers of the reads."""
    rows, size = x.shape
    together = jnp.moveaxis(x.reshape(places.parts, rows // places.parts, size), 0, 1)
    return jnp.take_along_axis(together.reshape(rows // places.parts, places.parts * size), places.at, axis=1)


def read_scores(
    model: LanguageModel, params: Any, h_BTD: Float[Array, "B T D"], read: Int[Array, "B M"]
) -> Float[Array, "B M"]:
    """The scalar head's value at read positions, in float32 or wider."""
    places = placed(read, h_BTD.shape[1])
    if places is not None and params["score"].ndim > 2:
        raise ValueError("several heads in one forward pass don't go with mesh.context; train one at a time")
    out = model.scores(params, gather_read(h_BTD, read, places))
    return out if places is None else _in_order(out, places)


Reads = tuple[Int[Array, "B M"], Int[Array, "B M"], Float[Array, "B M"]]


def read_logps(
    model: LanguageModel,
    params: Any,
    h_BTD: Float[Array, "B T D"],
    read: Int[Array, "B M"],
    targets: Int[Array, "B M"],
    graded: Graded = ("logp",),
    answers: int = 2,
) -> LogProbs:
    """token_logps (LogProbs) at read positions; answers: as placed has it."""
    places = placed(read, h_BTD.shape[1], answers)
    h = gather_read(h_BTD, read, places)
    if places is None:
        return token_logps(model, params, h, targets, graded)
    out = token_logps(model, params, h, _by_part(_to_places(targets, places), places), graded)
    return jax.tree.map(lambda x: _in_order(x, places), out)


def read_numbers(
    number: Callable[[Array], Array], h_BTD: Float[Array, "B T D"], read: Int[Array, "B M"], answers: int = 2
) -> Float[Array, "B M"]:
    """`number(h [N, m, D]) -> [N, m]`, such as a scalar head, at read positions; answers: as placed has it."""
    places = placed(read, h_BTD.shape[1], answers)
    found = number(gather_read(h_BTD, read, places))
    return found if places is None else _in_order(found, places)


def weighted_read_logp(
    model: LanguageModel, params: Any, h_BTD: Float[Array, "B T D"], reads: Reads
) -> tuple[Float[Array, ""], LogProbs]:
    """weighted_logp at read positions; reads: positions, targets, weights."""
    places = placed(reads[0], h_BTD.shape[1])
    h = gather_read(h_BTD, reads[0], places)
    if places is None:
        return weighted_logp(model, params, h, *reads[1:])
    total, out = weighted_logp(
        model, params, h, *(_by_part(_to_places(x, places), places) for x in reads[1:])
    )
    return total, jax.tree.map(lambda x: _in_order(x, places), out)
