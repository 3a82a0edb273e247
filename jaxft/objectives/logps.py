"""Log-probs of target tokens without ever holding the logits of all of them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.params import Model, is_spec
from jaxft.sharding import constrain, gathered, parts
from jaxft.tree import struct

CHUNK_LOGITS = 2**23  # elements of one chunk's logits on a device: 32 MiB in float32


@struct
class LogProbs:
    """What losses and metrics read of each target, [B, M] in float32 or wider.

    logp has a gradient. lse (log-sum-exp of the logits), entropy, top1 (is the target the most likely token), square
    (log sum_v p_v^2) and mean_logit (over the vocabulary) have none.
    """

    logp: Array
    lse: Array
    entropy: Array
    top1: Array
    square: Array
    mean_logit: Array


def gather_read(h_BTD: Float[Array, "B T D"], read: Int[Array, "B M"]) -> Float[Array, "B M D"]:
    """Hidden states at the read positions, row by row: on a mesh nothing moves between rows."""
    return jnp.take_along_axis(h_BTD, read[:, :, None], axis=1)


def token_logps(model: Model, params: Any, h_BMD: Float[Array, "B M D"], targets: Int[Array, "B M"]) -> LogProbs:
    """Log-probs of `targets` under the model's head, in chunks along M.

    The gradient of a token's log-prob by its hidden state, `W[target] - sum_v p_v W[v]`, doesn't depend on the loss, so it
    is made in the forward pass while the chunk's logits are at hand, and the backward pass runs no product for it. The
    head's own gradient, where it is trained, recomputes each chunk once. On a mesh the head is gathered along fsdp once a
    pass, and each block of rows adds up a gradient of its own, so that the head's gradient is reduced once.
    """
    B, M, _ = h_BMD.shape
    head = model.head(params)
    axes = _axes(model.head({name: model.specs[name] for name in params}), head)
    vocab = jax.eval_shape(model.logits, head, h_BMD).shape[-1]
    own = B * vocab // parts(("rows", "act_vocab"), (B, vocab))
    size = max(1, min(M, CHUNK_LOGITS // own))
    count = -(-M // size)
    size = -(-M // count)  # even chunks
    pad = count * size - M
    h = jnp.pad(h_BMD, ((0, 0), (0, pad), (0, 0)))
    t = jnp.pad(targets, ((0, 0), (0, pad)))
    out = _chunked(model.logits, count, axes, head, h, t)
    return jax.tree.map(lambda x: x[:, :M], out)


def _axes(specs: Any, head: Any) -> tuple[tuple[str, ...], ...]:
    """The logical axes of each leaf of the head, a packed one's leaves included."""
    each = jax.tree.map(lambda s, leaf: jax.tree.map(lambda _: s, leaf), specs, head, is_leaf=is_spec)
    return tuple(s.axes for s in jax.tree.leaves(each, is_leaf=is_spec))


def _lay(head: Any, axes: tuple[tuple[str, ...], ...]) -> Any:
    """The head as products use it, gathered along fsdp."""
    leaves, structure = jax.tree.flatten(head)
    return jax.tree.unflatten(structure, [constrain(x, *gathered(a)) for x, a in zip(leaves, axes, strict=True)])


def _chunks(x: Array, count: int) -> Array:
    B, M, *rest = x.shape
    return jnp.moveaxis(x.reshape(B, count, M // count, *rest), 1, 0)


def _rows(x: Array) -> Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _read(logits: Array, targets: Array) -> tuple[LogProbs, Array]:
    logits = constrain(logits, "rows", "time", "act_vocab")
    lse = jax.nn.logsumexp(logits, -1)
    at = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    p = jnp.exp(logits - lse[..., None])
    entropy = lse - jnp.sum(p * logits, -1)
    top1 = (at >= jnp.max(logits, -1)).astype(lse.dtype)
    return LogProbs(at - lse, lse, entropy, top1, jnp.log(jnp.sum(p * p, -1)), jnp.mean(logits, -1)), p


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(logits_fn, count, axes, head, h, targets):
    head = _lay(head, axes)

    def body(_, chunk):
        return None, _read(logits_fn(head, chunk[0]), chunk[1])[0]

    return jax.tree.map(_rows, jax.lax.scan(body, None, (_chunks(h, count), _chunks(targets, count)))[1])


def _slope(p: Array, targets: Array) -> Array:
    """d logp / d logits = onehot(target) - p."""
    return (jax.lax.broadcasted_iota(targets.dtype, p.shape, p.ndim - 1) == targets[..., None]).astype(p.dtype) - p


def _chunked_fwd(logits_fn, count, axes, head, h, targets):
    whole = _lay(head, axes)

    def body(_, chunk):
        x, t = chunk
        logits, pull = jax.vjp(partial(logits_fn, whole), x)
        out, p = _read(logits, t)
        return None, (out, pull(_slope(p, t))[0])

    out, slope = jax.lax.scan(body, None, (_chunks(h, count), _chunks(targets, count)))[1]
    return jax.tree.map(_rows, out), (head, h, targets, _rows(slope))


def _chunked_bwd(logits_fn, count, axes, residuals, g):
    head, h, targets, slope = residuals
    g_logp = g.logp
    dh = (slope.astype(g_logp.dtype) * g_logp[..., None]).astype(h.dtype)
    leaves, structure = jax.tree.flatten(_lay(head, axes))
    floats = [w if jnp.issubdtype(w.dtype, jnp.floating) else None for w in leaves]
    blocks = parts(("rows",), h.shape[:1])

    def block(x, t, weight):
        def logits_of(floats):
            return logits_fn(jax.tree.unflatten(structure, [w if f is None else f for w, f in zip(leaves, floats)]), x)

        logits, pull = jax.vjp(logits_of, floats)
        return pull(_slope(jax.nn.softmax(logits, -1), t) * weight[..., None])[0]

    def body(total, chunk):
        by_block = [x.reshape(blocks, x.shape[0] // blocks, *x.shape[1:]) for x in chunk]
        return jax.tree.map(jnp.add, total, jax.vmap(block)(*by_block)), None

    def start(w, a):
        return None if w is None else constrain(jnp.zeros((blocks, *w.shape), w.dtype), "rows", *gathered(a))

    zeros = [start(w, a) for w, a in zip(floats, axes)]
    total, _ = jax.lax.scan(body, zeros, (_chunks(h, count), _chunks(targets, count), _chunks(g_logp, count)))
    grads = [None if x is None else constrain(jnp.sum(x, 0), *a) for x, a in zip(total, axes)]
    return jax.tree.unflatten(structure, grads), dh, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
