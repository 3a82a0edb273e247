"""Run the stacked layers of a model: one `lax.scan` in training, at prefill, and in decoding with a cache.

A family defines one function, `layer(params, h, attend, key) -> (h, extra)`: a layer on the residual stream
[B, T, D]. It calls `attend(q, k, v) -> (o, extra)` once, with q [B, T, H, E] and k, v [B, T, K, E] after
rope, and returns this `extra`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxft.nn import fused_update
from jaxft.nn.attention import attention, cached_attention
from jaxft.nn.flash_attention import Visibility
from jaxft.nn.matmul import accumulation_dtype, from_bits, to_bits
from jaxft.tree import Batch, Params

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
Layer = Callable[[Params, Array, Attend, Array | None], tuple[Array, Any]]
Cache = dict[str, Array]  # k [L, B, K, E, S] and v [L, B, K, S, E] as raw bits, visible [B, S]

RematPolicy = Literal["offload", "pairs", "full", "attention", "projections", "none"]


@dataclass(frozen=True)
class Remat:
    """What a layer stores for its backward pass.

    saved: checkpoint names that are stored in addition to the layer's input; None stores everything. layers:
    number of successive layers that form one block, of which only the input is stored. offload: inputs go to
    the host's pinned memory.
    """

    saved: tuple[str, ...] | None
    layers: int = 1
    offload: bool = False


REMAT: dict[RematPolicy, Remat] = {
    "offload": Remat((), offload=True),  # the least device memory; inputs go to the host and come back
    "pairs": Remat((), layers=2),  # the input of every second layer; one layer more is recomputed at a time
    "full": Remat(()),  # a layer's input only
    "attention": Remat(("attn_out", "attn_lse")),  # and attention's residuals other than q, k, v
    # and the output of every matmul: no matmul runs twice
    "projections": Remat(("q", "k", "v", "attn_out", "attn_lse", "o", "gate", "up")),
    "none": Remat(None),  # everything
}


_RECORDED: ContextVar[list[Array] | None] = ContextVar("recorded layer outputs", default=None)


@contextmanager
def record_layer_outputs() -> Iterator[list[Float[Array, "outputs B"]]]:
    """While this is entered, every `scan_layers` that is traced appends norms of its rows, [1 + L, B].

    They are those of the input and of each layer's output. For debugging: layers run without
    rematerialisation then.
    """
    recorded: list[Array] = []
    token = _RECORDED.set(recorded)
    try:
        yield recorded
    finally:
        _RECORDED.reset(token)


def _row_norms(h: Float[Array, "B T D"]) -> Float[Array, " B"]:
    return jnp.sqrt(jnp.sum(jnp.square(h.astype(accumulation_dtype(h.dtype))), (1, 2)))


def check_remat(policy: str) -> None:
    """Raise ValueError for a name that is not in REMAT."""
    if policy not in REMAT:
        raise ValueError(f"unknown remat={policy!r}; use one of {', '.join(get_args(RematPolicy))}")


def scan_layers(
    layer: Layer,
    h_BTD: Float[Array, "B T D"],
    layers: Params,
    tokens: Batch,
    keys: Array | None,
    remat: RematPolicy,
) -> Float[Array, "B T D"]:
    """Return the residual stream after all layers, differentiable under the remat policy.

    layers: the stacked parameters, or FusedLayers, which the backward pass updates. tokens: Tokens, Pairs or
    Rollout.
    keys: a random key per layer for dropout, or None.
    """
    policy = REMAT[remat]
    rows = Visibility(tokens.segments, tokens.branches, tokens.positions)

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
        return attention(q, k, v, rows, tokens.packed), None

    def body(h: Array, x: tuple[Params, Array | None]) -> tuple[Array, None]:
        p, key = x
        h = checkpoint_name(h, "layer_in") if policy.offload else h
        return layer(p, h, attend, key)[0], None

    if isinstance(layers, fused_update.FusedLayers):
        if remat != "full":
            raise ValueError(
                f"optim.fused_backward recomputes layers from their inputs: use remat=full, got remat={remat}"
            )
        return fused_update.fused_scan(body, h_BTD, layers, keys)
    xs = layers, keys
    recorded = _RECORDED.get()
    if recorded is not None:

        def recording(h: Array, x: tuple[Params, Array | None]) -> tuple[Array, Array]:
            h, _ = body(h, x)
            return h, _row_norms(h)

        last, norms = jax.lax.scan(recording, h_BTD, xs)
        recorded.append(jnp.concatenate([_row_norms(h_BTD)[None], norms]))
        return last
    if policy.layers > 1:
        count = jax.tree.leaves(layers)[0].shape[0]
        if count % policy.layers:
            raise ValueError(
                f"remat={remat} groups layers by {policy.layers}, but the model has {count} layers; "
                "use remat=full"
            )
        xs = jax.tree.map(lambda x: x.reshape(count // policy.layers, policy.layers, *x.shape[1:]), xs)
        body = _several(_rematerialised(body, policy))
    if policy.saved is not None:
        body = _rematerialised(body, policy)
    return jax.lax.scan(body, h_BTD, xs)[0]


def _several(body: Callable) -> Callable:
    """A scan's body that runs several layers by an inner scan."""

    def block(h: Array, xs: Any) -> tuple[Array, None]:
        return jax.lax.scan(body, h, xs)

    return block


def _rematerialised(body: Callable, remat: Remat) -> Callable:
    policies, saved = jax.checkpoint_policies, remat.saved or ()
    if remat.offload:
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(saved),
            names_which_can_be_offloaded=["layer_in"],
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = policies.save_only_these_names(*saved)
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def prefill_layers(
    layer: Layer, h_BTD: Float[Array, "B T D"], layers: Params, tokens: Batch, size: int
) -> tuple[Float[Array, "B T D"], Cache]:
    """Return the residual stream of prompts after all layers, and a key/value cache with `size` slots a row.

    Prompts are left-padded (segment 0), so that every row writes its next token to the same slot.
    """
    rows = Visibility(tokens.segments, tokens.branches, tokens.positions)

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
        o = attention(q, k, v, rows, tokens.packed)
        return o, (to_bits(k.transpose(0, 2, 3, 1)), to_bits(v.swapaxes(1, 2)))

    h_BTD, (k, v) = jax.lax.scan(lambda h, p: layer(p, h, attend, None), h_BTD, layers)
    free = size - tokens.ids.shape[1]
    visible = jnp.pad(tokens.segments > 0, ((0, 0), (0, free)))
    return h_BTD, {"k": _pad_axis(k, 4, free), "v": _pad_axis(v, 3, free), "visible": visible}


def _pad_axis(x: Array, axis: int, count: int) -> Array:
    return jnp.pad(x, [(0, count if i == axis else 0) for i in range(x.ndim)])


def decode_layers(
    layer: Layer, h_B1D: Float[Array, "B 1 D"], layers: Params, cache: Cache, slot: Int[Array, ""]
) -> tuple[Float[Array, "B 1 D"], Cache]:
    """Return the residual stream of one token a row after all layers; its keys and values go to `slot` of the
    cache.

    The cache is carried through the scan and updated in place: through xs and ys all of it would be copied
    for each token.
    """
    visible = cache["visible"] | (jnp.arange(cache["visible"].shape[1], dtype=slot.dtype) == slot)[None]
    zero = jnp.zeros_like(slot)  # of one integer type, whatever literals would have

    def body(carry: tuple[Array, Array, Array], x: tuple[Params, Array]) -> tuple[Any, None]:
        h, k_all, v_all = carry
        p, i = x

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            k, v = to_bits(k.transpose(0, 2, 3, 1)), to_bits(v.swapaxes(1, 2))
            k_new = jax.lax.dynamic_update_slice(k_all, k[None], (i, zero, zero, zero, slot))
            v_new = jax.lax.dynamic_update_slice(v_all, v[None], (i, zero, zero, slot, zero))
            k_BKES, v_BKSE = (
                from_bits(jax.lax.dynamic_index_in_dim(x, i, 0, False), q.dtype) for x in (k_new, v_new)
            )
            return cached_attention(q[:, 0], k_BKES, v_BKSE, visible)[:, None], (k_new, v_new)

        h, (k_all, v_all) = layer(p, h, attend, None)
        return (h, k_all, v_all), None

    count = jax.tree.leaves(layers)[0].shape[0]
    carry = h_B1D, cache["k"], cache["v"]
    (h_B1D, k, v), _ = jax.lax.scan(body, carry, (layers, jnp.arange(count, dtype=slot.dtype)))
    return h_B1D, {"k": k, "v": v, "visible": visible}


def repeat_cache(cache: Cache, count: int) -> Cache:
    """Return the cache with each row `count` times in succession, for as many completions of each prompt."""
    if count == 1:
        return cache
    return {name: jnp.repeat(x, count, axis=0 if name == "visible" else 1) for name, x in cache.items()}
