"""Update stacked layers inside the backward pass, so that only one layer's gradient is in memory at a time.

Fused updates as in LOMO (Lv et al. 2023, arXiv:2306.09782), for any optimizer that takes each layer alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxft import tree
from jaxft.tree import static, struct

FLOATS_OF_SIZE: dict[int, Any] = {1: jnp.float8_e4m3fn, 2: jnp.float16, 4: jnp.float32}  # by bytes an element


class CallCount:
    """Counts the uses of FusedLayers in a forward pass: their cotangents are right after exactly one."""

    def __init__(self) -> None:
        self.count = 0


@struct
class FusedLayers:
    """The layers of a model in a train step that updates each layer as soon as its gradient is known.

    The backward pass of `fused_scan` returns results in place of cotangents: for `layers` and `state` their
    updated values, for `squares` (zero) the gradients' sum of squares.

    layers: a tree with the trainable leaves [L, ...], in which `pick` finds the layers. frozen: the other
    leaves of the layers, None for a trainable one. state: the optimizer state, [L, ...], integers as
    `float_bits`, since only floats have cotangents. update: (gradients of a layer of `layers`, their norm,
    (that layer, its state), i) -> ((layer, state), the norm, NaN for an update that is not finite). calls:
    counts the uses of these layers.
    """

    layers: Any
    frozen: Any
    state: Any
    squares: Any  # a float scalar
    pick: Callable = static()
    update: Callable = static()
    calls: CallCount = static()


def unfused(params: Any) -> Any:
    """Replace FusedLayers by plain layers, for a forward pass that doesn't train them."""

    def node(x: Any) -> Any:
        return tree.combine(x.pick(x.layers), x.frozen) if isinstance(x, FusedLayers) else x

    return jax.tree.map(node, params, is_leaf=lambda x: isinstance(x, FusedLayers))


def float_bits(x: Array) -> Array:
    """Return integers as floats with the same bits, which are never computed with; floats unchanged."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jax.lax.bitcast_convert_type(x, FLOATS_OF_SIZE[x.dtype.itemsize])


def from_float_bits(x: Array, like: Any) -> Array:
    """Invert float_bits; like: an array of the original dtype."""
    return x if x.dtype == like.dtype else jax.lax.bitcast_convert_type(x, like.dtype)


def layer_at(x: Any, i: Array) -> Any:
    """Return layer i of stacked leaves."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), x)


def put_layer(x: Any, layer: Any, i: Array) -> Any:
    """Return stacked leaves with layer i replaced, in place where possible."""
    return jax.tree.map(lambda x, one: jax.lax.dynamic_update_index_in_dim(x, one, i, 0), x, layer)


def fused_scan(body: Callable, h: Float[Array, "..."], c: FusedLayers, more: Any) -> tuple[Array, Any]:
    """Return `jax.lax.scan(body, h, (layers, more))`; its backward pass recomputes each layer and updates it.

    The forward pass stores the layers' inputs. The backward pass carries parameters and state and updates
    them in place.
    """
    c.calls.count += 1
    count = jax.tree.leaves(c.layers)[0].shape[0]

    def one(h: Array, layer: Any, i: Array) -> tuple[Array, Any]:
        return body(h, (tree.combine(c.pick(layer), layer_at(c.frozen, i)), layer_at(more, i)))

    @jax.custom_vjp
    def through(h, layers, state, squares):
        return forward(h, layers, state, squares)[0]

    def forward(h, layers, state, squares):
        def step(h, i):
            after, outputs = one(h, layer_at(layers, i), i)
            return after, (outputs, h)

        h, (outputs, inputs) = jax.lax.scan(step, h, jnp.arange(count))
        return (h, outputs), (layers, state, squares, inputs)

    def backward(saved, cotangents):
        (dh, of_outputs), (layers, state, squares, inputs) = cotangents, saved

        def step(n, now):
            i = count - 1 - n
            dh, layers, state, squares = now
            layer = layer_at(layers, i)
            _, pull = jax.vjp(partial(one, i=i), layer_at(inputs, i), layer)
            dh, grads = pull((dh, layer_at(of_outputs, i)))
            norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(squares.dtype), grads))
            (layer, own), norm = c.update(grads, norm, (layer, layer_at(state, i)), i)
            return dh, put_layer(layers, layer, i), put_layer(state, own, i), squares + norm * norm

        return jax.lax.fori_loop(0, count, step, (dh, layers, state, squares))

    through.defvjp(forward, backward)
    return through(h, c.layers, c.state, c.squares)
