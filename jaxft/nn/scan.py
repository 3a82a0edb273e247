"""Run the stacked layers of a model by one `lax.scan` (prefill and decoding: cache.py).

A family defines one function, `layer(params, h, attend, key) -> (h, extras)`: a layer on the residual stream
[B, T, D]. It calls `attend(q, k, v) -> (o, extras)` once, with q [B, T, H, E] and k, v [B, T, K, E] before
rope, and returns these `extras`, perhaps with outputs of its own:
`extras._replace(outputs={"load": tokens_per_expert})`. `attend` applies what may differ between layers: rope,
window and soft cap.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxft.nn import fused_update
from jaxft.nn.layer_attention import Attend, AttentionLayers, Extras, attend_rows, batch_angles, batch_ranges
from jaxft.tree import Batch, LayerOutputs, Params, struct

Layer = Callable[[Params, Array, Attend, Array | None], tuple[Array, Extras]]
Observe = Callable[[Array, Array], LayerOutputs]  # (h before, h after a layer) -> further outputs of it

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
    """How layers run: how each attends, what is stored for the backward pass, and what is observed."""

    attention: AttentionLayers
    remat: RematPolicy
    observe: Observe | None = None


@struct
class LayerMean:
    """A mean that layers have among their outputs and objectives log: its two sums over each row, [B]."""

    total: Any
    weight: Any


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
) -> tuple[Float[Array, "B T D"], LayerOutputs]:
    """Return the residual stream after all layers, and their outputs [L, ...], differentiable under the remat
    policy.

    layers: the stacked parameters, or FusedLayers, which the backward pass updates. tokens: Tokens, Pairs or
    Rollout. keys: a random key per layer for dropout, or None.
    """
    remat, a = options.remat, options.attention
    policy = REMAT[remat]
    angles = batch_angles(a, tokens, h_BTD.dtype)
    ranges = batch_ranges(tokens)

    def body(h: Array, x: Any) -> tuple[Array, LayerOutputs]:
        p, (key, kind) = x

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, Extras]:
            return attend_rows(a, kind, (q, k, v), angles, ranges, tokens.packed)[0], Extras()

        before = checkpoint_name(h, "layer_in") if policy.offload else h
        h, extras = layer(p, before, attend, key)
        return h, extras.outputs | (options.observe(before, h) if options.observe else {})

    kinds = None if a.kind_numbers is None else jnp.asarray(a.kind_numbers)
    if isinstance(layers, fused_update.FusedLayers):
        if remat != "full":
            raise ValueError(
                f"optim.fused_backward recomputes layers from their inputs: use remat=full, got remat={remat}"
            )
        return fused_update.fused_scan(body, h_BTD, layers, (keys, kinds))
    xs = layers, (keys, kinds)
    count = jax.tree.leaves(layers)[0].shape[0]
    if policy.layers > 1:
        if count % policy.layers:
            raise ValueError(
                f"remat={remat} groups layers by {policy.layers}, but the model has {count} layers; "
                "use remat=full"
            )
        xs = jax.tree.map(lambda x: x.reshape(count // policy.layers, policy.layers, *x.shape[1:]), xs)
        body = _several(_rematerialised(body, policy))
    if policy.saved is not None:
        body = _rematerialised(body, policy)
    h_BTD, outputs = jax.lax.scan(body, h_BTD, xs)
    if policy.layers > 1:
        outputs = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), outputs)
    return h_BTD, outputs


def run_layer(
    layer: Layer, h_BTD: Float[Array, "B T D"], p: Params, tokens: Batch, a: AttentionLayers, kind: Any
) -> tuple[Float[Array, "B T D"], LayerOutputs]:
    """Return the residual stream after one layer, and the layer's outputs.

    p: its parameters, without the stacked axis. kind: its number in a.kind_numbers; None if that is None.
    """
    angles = batch_angles(a, tokens, h_BTD.dtype)
    ranges = batch_ranges(tokens)

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, Extras]:
        return attend_rows(a, kind, (q, k, v), angles, ranges, tokens.packed)[0], Extras()

    h_BTD, extras = layer(p, h_BTD, attend, None)
    return h_BTD, extras.outputs


def _several(body: Callable) -> Callable:
    """A scan's body that runs several layers by an inner scan."""

    def block(h: Array, xs: Any) -> tuple[Array, LayerOutputs]:
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
