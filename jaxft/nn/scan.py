"""Run the stacked layers of a model by one `lax.scan` (prefill and decoding: cache.py).

A family defines one function, `layer(params, h, attend, key) -> (h, extra)`: a layer on the residual stream
[B, T, D]. It calls `attend(q, k, v) -> (o, extra)` once, with q [B, T, H, E] and k, v [B, T, K, E] before
rope, and returns this `extra`. `attend` applies what may differ between layers: rope, window and soft cap.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxft.nn import fused_update
from jaxft.nn.layer_attention import Attend, AttentionLayers, attend_rows, batch_angles, batch_ranges
from jaxft.nn.products import accumulation_dtype
from jaxft.tree import Batch, Params

Layer = Callable[[Params, Array, Attend, Array | None], tuple[Array, Any]]

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


@dataclass(frozen=True)
class LayerOptions:
    """How layers run: how each attends, and what is stored for the backward pass."""

    attention: AttentionLayers
    remat: RematPolicy


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
    options: LayerOptions,
) -> Float[Array, "B T D"]:
    """Return the residual stream after all layers, differentiable under the remat policy.

    layers: the stacked parameters, or FusedLayers, which the backward pass updates. tokens: Tokens, Pairs or
    Rollout. keys: a random key per layer for dropout, or None.
    """
    remat, a = options.remat, options.attention
    policy = REMAT[remat]
    angles = batch_angles(a, tokens, h_BTD.dtype)
    ranges = batch_ranges(tokens)

    def body(h: Array, x: Any) -> tuple[Array, None]:
        p, (key, kind) = x

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
            return attend_rows(a, kind, (q, k, v), angles, ranges, tokens.packed)[0], None

        h = checkpoint_name(h, "layer_in") if policy.offload else h
        return layer(p, h, attend, key)[0], None

    kinds = None if a.kind_numbers is None else jnp.asarray(a.kind_numbers)
    if isinstance(layers, fused_update.FusedLayers):
        if remat != "full":
            raise ValueError(
                f"optim.fused_backward recomputes layers from their inputs: use remat=full, got remat={remat}"
            )
        return fused_update.fused_scan(body, h_BTD, layers, (keys, kinds))
    xs = layers, (keys, kinds)
    recorded = _RECORDED.get()
    if recorded is not None:

        def recording(h: Array, x: Any) -> tuple[Array, Array]:
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


def run_layer(
    layer: Layer, h_BTD: Float[Array, "B T D"], p: Params, tokens: Batch, a: AttentionLayers, kind: Any
) -> Float[Array, "B T D"]:
    """Return the residual stream after one layer.

    p: its parameters, without the stacked axis. kind: its number in a.kind_numbers; None if that is None.
    """
    angles = batch_angles(a, tokens, h_BTD.dtype)
    ranges = batch_ranges(tokens)

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
        return attend_rows(a, kind, (q, k, v), angles, ranges, tokens.packed)[0], None

    return layer(p, h_BTD, attend, None)[0]


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
