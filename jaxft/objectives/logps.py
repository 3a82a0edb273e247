"""Log-probs of target tokens without ever holding the logits of all of them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.params import Model
from jaxft.tree import struct

CHUNK_LOGITS = 2**23  # elements of one chunk's logits: 32 MiB in float32


@struct
class LogProbs:
    """What losses and metrics read of each target, [B, M] in float32 or wider.

    logp has a gradient; lse (log-sum-exp of the logits), entropy and top1 (is the target the most likely token) have none.
    """

    logp: Array
    lse: Array
    entropy: Array
    top1: Array


def gather_read(h_BTD: Float[Array, "B T D"], read: Int[Array, "B M"]) -> Float[Array, "B M D"]:
    """Hidden states at the read positions, row by row: on a mesh nothing moves between rows."""
    return jnp.take_along_axis(h_BTD, read[:, :, None], axis=1)


def token_logps(model: Model, params: Any, h_BMD: Float[Array, "B M D"], targets: Int[Array, "B M"]) -> LogProbs:
    """Log-probs of `targets` under the model's head, in chunks along M.

    The gradient of a token's log-prob by its hidden state, `W[target] - sum_v p_v W[v]`, doesn't depend on the loss, so it
    is made in the forward pass while the chunk's logits are at hand, and the backward pass runs no product for it. The
    head's own gradient, where it is trained, recomputes each chunk once.
    """
    B, M, _ = h_BMD.shape
    vocab = jax.eval_shape(model.logits, model.head(params), h_BMD).shape[-1]
    size = max(1, min(M, CHUNK_LOGITS // (B * vocab)))
    count = -(-M // size)
    size = -(-M // count)  # even chunks
    pad = count * size - M
    h = jnp.pad(h_BMD, ((0, 0), (0, pad), (0, 0)))
    t = jnp.pad(targets, ((0, 0), (0, pad)))
    out = _chunked(model.logits, count, model.head(params), h, t)
    return jax.tree.map(lambda x: x[:, :M], out)


def _chunks(x: Array, count: int) -> Array:
    B, M, *rest = x.shape
    return jnp.moveaxis(x.reshape(B, count, M // count, *rest), 1, 0)


def _rows(x: Array) -> Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _read(logits: Array, targets: Array) -> tuple[LogProbs, Array]:
    lse = jax.nn.logsumexp(logits, -1)
    at = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    p = jnp.exp(logits - lse[..., None])
    entropy = lse - jnp.sum(p * logits, -1)
    return LogProbs(at - lse, lse, entropy, (at >= jnp.max(logits, -1)).astype(lse.dtype)), p


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(logits_fn, count, head, h, targets):
    def body(_, chunk):
        return None, _read(logits_fn(head, chunk[0]), chunk[1])[0]

    return jax.tree.map(_rows, jax.lax.scan(body, None, (_chunks(h, count), _chunks(targets, count)))[1])


def _slope(p: Array, targets: Array) -> Array:
    """d logp / d logits = onehot(target) - p."""
    return (jax.lax.broadcasted_iota(targets.dtype, p.shape, p.ndim - 1) == targets[..., None]).astype(p.dtype) - p


def _chunked_fwd(logits_fn, count, head, h, targets):
    def body(_, chunk):
        x, t = chunk
        logits, pull = jax.vjp(partial(logits_fn, head), x)
        out, p = _read(logits, t)
        return None, (out, pull(_slope(p, t))[0])

    out, slope = jax.lax.scan(body, None, (_chunks(h, count), _chunks(targets, count)))[1]
    return jax.tree.map(_rows, out), (head, h, targets, _rows(slope))


def _chunked_bwd(logits_fn, count, residuals, g):
    head, h, targets, slope = residuals
    g_logp = g.logp
    dh = (slope.astype(g_logp.dtype) * g_logp[..., None]).astype(h.dtype)
    floats = jax.tree.map(lambda w: w if jnp.issubdtype(w.dtype, jnp.floating) else None, head)

    def body(total, chunk):
        x, t, weight = chunk

        def weighted(trained):
            whole = jax.tree.map(lambda a, b: b if a is None else a, trained, head, is_leaf=lambda a: a is None)
            return logits_fn(whole, x)

        logits, pull = jax.vjp(weighted, floats)
        p = jax.nn.softmax(logits, -1)
        return jax.tree.map(jnp.add, total, pull(_slope(p, t) * weight[..., None])[0]), None

    zeros = jax.tree.map(jnp.zeros_like, floats)
    dhead, _ = jax.lax.scan(body, zeros, (_chunks(h, count), _chunks(targets, count), _chunks(g_logp, count)))
    return dhead, dh, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
