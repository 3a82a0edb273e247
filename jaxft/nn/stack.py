"""Run the layers of a model: in forward and backward passes over rows, and in generation.

A model is a sequence of stacks. A stack runs one block again and again by one `lax.scan`; a block has one or
more layers, each with parameters of its own and its kind of mixing tokens (Mixer), such as three recurrent
layers and one with attention. Models whose layers are all alike have one stack of blocks of one layer.

A family defines a function for each layer of a block, `layer(params, h, mix, key) -> (h, extras)`, on the
residual stream [B, T, D]. It calls `mix` once, with attention `mix(q, k, v) -> (o, extras)` with q
[B, T, H, E] and k, v [B, T, K, E] before rope, and returns these `extras`, perhaps with outputs of its own:
`extras._replace(outputs={"sparsity": fraction_of_zeros})`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxft.nn import tree
from jaxft.nn.attention.kv_cache import Cache, GivenChunk, NextToken
from jaxft.nn.attention.layer_attention import Extras
from jaxft.nn.tree import Batch, LayerOutputs, Params, static, struct

Mix = Callable[..., tuple[Array, Extras]]
Layer = Callable[[Params, Array, Mix, Array | None], tuple[Array, Extras]]
Observe = Callable[[Array, Array], LayerOutputs]  # (h before, h after a layer) -> further outputs of it


def _nothing(carry: Any, values: Any) -> None:
    """Cache nothing after a pass."""


class Pass(NamedTuple):
    """The token mixing of L layers with the same Mixer, in one pass of a scan over layers.

    mix(x, carry) -> the `mix` function that a layer calls. xs: arrays [L, ...]; layer i gets entry i as x.
    carry: the value that the scan passes from layer to layer. In generation a layer's `Extras.cached` is (the
    next carry, a value), and end(last carry, values [L, ...]) returns the cache after the pass.
    """

    mix: Callable[[Any, Any], Mix]
    xs: Any = None
    carry: Any = None
    end: Callable[[Any, Any], Any] = _nothing


class Mixer(NamedTuple):
    """How layers mix tokens: attention (attention_mixer.py) or a recurrence, in training and in generation.

    Each function returns a Pass. For training, rows(tokens, dtype) is the pass over rows of texts. For
    generation, with a cache of these layers only: prompts(tokens, new, dtype) is the pass over left-padded
    prompts (segment 0 is padding), with up to `new` tokens per completion; its `end` returns the cache of the
    prompts. token(cache, at, dtype) is the pass over one token of every row, chunk(cache, chunk, dtype) over
    some tokens of some rows; their `end` returns the cache of the rows. empty((prompts, slots), (rows,
    tokens), dtype, stored) returns the caches of prompts and of rows before any token.
    """

    rows: Callable[[Batch, DTypeLike], Pass]
    prompts: Callable[[Batch, int, DTypeLike], Pass]
    token: Callable[[Cache, NextToken, DTypeLike], Pass]
    chunk: Callable[[Cache, GivenChunk, DTypeLike], Pass]
    empty: Callable[..., tuple[Any, Any]]


@dataclass(frozen=True)
class BlockLayer:
    """A layer of a block. name: the key of its parameters in the block's parameters; "" if it is the only
    layer. numbers: for each block of the stack, the index of this layer in the model.
    """

    layer: Layer
    mixer: Mixer
    numbers: range
    name: str = ""

    def of(self, block: Any) -> Any:
        """Return this layer's part of the parameters (or specs) of a block."""
        return block[self.name] if self.name else block


@dataclass(frozen=True)
class Stack:
    """Blocks with the same layers, which one scan runs. name: the key of the stack's parameters, arrays
    [blocks, ...], in the model's parameters.
    """

    name: str
    layers: tuple[BlockLayer, ...]

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return len(self.layers[0].numbers)


Stacks = tuple[Stack, ...]


def layers_of(stacks: Stacks) -> list[BlockLayer]:
    """Return the BlockLayers of all stacks: stack after stack, in each the layers of its block. A cache has
    one part for each of them, in this order.
    """
    return [layer for stack in stacks for layer in stack.layers]


@dataclass(frozen=True)
class LayerPlace:
    """The place of a layer in a model. path: of the stacked parameters. layer: its BlockLayer. index: the
    index of its block in the stack, and so of its parameters in the stacked arrays.
    """

    path: str
    layer: BlockLayer
    index: int

    def specs(self, specs: Any) -> Any:
        """Return the subtree at `path` of a model's specs, which are stacked over blocks."""
        for name in self.path.split("/"):
            specs = specs[name]
        return specs


def layer_places(stacks: Stacks) -> list[LayerPlace]:
    """Return the place of every layer of a model, in the order of the layers' indices in the model."""
    places = {
        number: LayerPlace("/".join(filter(None, (stack.name, layer.name))), layer, index)
        for stack in stacks
        for layer in stack.layers
        for index, number in enumerate(layer.numbers)
    }
    return [places[number] for number in sorted(places)]


# Rows


RematPolicy = Literal["offload", "pairs", "full", "attention", "projections", "none"]


@dataclass(frozen=True)
class Remat:
    """A remat policy: the arrays that a block of layers stores for its backward pass.

    saved: names (jax.ad_checkpoint.checkpoint_name) of arrays that are stored in addition to the block's
    input; None stores everything. blocks: only the input of every `blocks`-th block is stored. offload:
    inputs are stored in the host's pinned memory.
    """

    saved: tuple[str, ...] | None
    blocks: int = 1
    offload: bool = False


REMAT: dict[RematPolicy, Remat] = {
    "offload": Remat((), offload=True),  # the least device memory; inputs go to the host and come back
    "pairs": Remat((), blocks=2),  # the input of every second block; one block more is recomputed at a time
    "full": Remat(()),  # a block's input only
    "attention": Remat(("attn_out", "attn_lse")),  # also attention's output and log-sum-exp
    # also the outputs of the projections that the backward pass needs: none of them is computed twice
    "projections": Remat(("q", "k", "v", "attn_out", "attn_lse", "o", "gate", "up")),
    "none": Remat(None),  # everything
}


@dataclass(frozen=True)
class RowOptions:
    """Options of a pass over rows. observe(h before a layer, h after it) -> further outputs of the layer."""

    remat: RematPolicy
    observe: Observe | None = None


@struct
class LayerMean:
    """A mean that a layer outputs and objectives log, such as a fraction of zeros.

    total, weight: sums over each row, [B]; the mean is sum(total) / sum(weight). numbers: () from a layer;
    once the outputs of several layers are stacked, the indices of these layers in the model.
    """

    total: Any
    weight: Any
    numbers: tuple[int, ...] = static(default=())


def scan_stacks(
    stacks: Stacks,
    h_BTD: Float[Array, "B T D"],
    params: Params,
    tokens: Batch,
    keys: Array | None,
    options: RowOptions,
) -> tuple[Float[Array, "B T D"], LayerOutputs]:
    """Return the residual stream after all layers, and the layers' outputs by name, each stacked over the
    layers that have it, [L, ...].

    params: of the model; in place of a stack's parameters, FusedLayers are updated by the backward pass.
    tokens: Tokens, Pairs or Rollout. keys: a random key per layer for dropout, or None. options: among them
    the remat policy of the backward pass.
    """
    by_layer: list[tuple[range, LayerOutputs]] = []
    for stack in stacks:
        passes = [layer.mixer.rows(tokens, h_BTD.dtype) for layer in stack.layers]
        own_keys = [None if keys is None else _of_layers(keys, layer.numbers) for layer in stack.layers]
        xs = own_keys, [extra.xs for extra in passes]
        h_BTD, outputs = _scan(stack, passes, options, h_BTD, params[stack.name], xs)
        by_layer += [(layer.numbers, extras) for layer, extras in zip(stack.layers, outputs, strict=True)]
    return h_BTD, _joined(by_layer)


def _block(stack: Stack, passes: Sequence[Pass], options: RowOptions) -> Callable:
    """Return the body of a scan over a stack's blocks: `(h, (params, (keys, xs))) -> (h, outputs)`."""
    offload = REMAT[options.remat].offload

    def block(h: Array, x: Any) -> tuple[Array, list[LayerOutputs]]:
        p, (keys, xs) = x
        outputs = []
        h = checkpoint_name(h, "layer_in") if offload else h
        for layer, layer_pass, key, x_of_layer in zip(stack.layers, passes, keys, xs, strict=True):
            before = h
            h, extras = layer.layer(layer.of(p), h, layer_pass.mix(x_of_layer, None), key)
            outputs.append(extras.outputs | (options.observe(before, h) if options.observe else {}))
        return h, outputs

    return block


def _scan(
    stack: Stack, passes: Sequence[Pass], options: RowOptions, h: Array, params: Any, xs: Any
) -> tuple[Array, Any]:
    """Run a stack's blocks over rows under a remat policy. Return h and the outputs, stacked over blocks."""
    block, remat, policy = _block(stack, passes, options), options.remat, REMAT[options.remat]
    if isinstance(params, FusedLayers):
        if remat != "full":
            raise ValueError(
                f"optim.fused_backward recomputes layers from their inputs: use remat=full, got remat={remat}"
            )
        return fused_scan(block, h, params, xs)
    xs, count = (params, xs), jax.tree.leaves(params)[0].shape[0]
    if policy.blocks > 1:
        if count % policy.blocks:
            raise ValueError(
                f"remat={remat} needs a number of blocks that is divisible by {policy.blocks}, but the stack "
                f"{stack.name} has {count}; use remat=full"
            )
        xs = jax.tree.map(lambda x: x.reshape(count // policy.blocks, policy.blocks, *x.shape[1:]), xs)
        block = partial(jax.lax.scan, _rematerialised(block, policy))
    if policy.saved is not None:
        block = _rematerialised(block, policy)
    h, outputs = jax.lax.scan(block, h, xs)
    if policy.blocks > 1:
        outputs = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), outputs)
    return h, outputs


def _rematerialised(block: Callable, remat: Remat) -> Callable:
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
    return jax.checkpoint(block, policy=policy, prevent_cse=False)


def _of_layers(x: Array, numbers: range) -> Array:
    return x if len(x) == len(numbers) else x[numbers.start : numbers.stop : numbers.step]


def _joined(by_layer: Sequence[tuple[range, LayerOutputs]]) -> LayerOutputs:
    """Return outputs by name, stacked over all layers that have them, in the order of the layers."""
    joined: LayerOutputs = {}
    for name in dict.fromkeys(name for _, outputs in by_layer for name in outputs):
        parts = [(numbers, outputs[name]) for numbers, outputs in by_layer if name in outputs]
        value, numbers = parts[0][1], np.concatenate([numbers for numbers, _ in parts])
        if len(parts) > 1:
            order = np.argsort(numbers)
            value = jax.tree.map(lambda *x, order=order: jnp.concatenate(x)[order], *(x for _, x in parts))
        is_mean = isinstance(value, LayerMean)
        joined[name] = replace(value, numbers=tuple(sorted(numbers.tolist()))) if is_mean else value
    return joined


def run_layer(
    layer: BlockLayer, h_BTD: Float[Array, "B T D"], params: Params, tokens: Batch, index: Array
) -> tuple[Float[Array, "B T D"], LayerOutputs]:
    """Return the residual stream after one layer, and the layer's outputs by name.

    params: of this layer, without the stacked axis. index: of its block in the stack.
    """
    rows = layer.mixer.rows(tokens, h_BTD.dtype)
    xs = jax.tree.map(lambda x: jnp.asarray(x)[index], rows.xs)
    h_BTD, extras = layer.layer(params, h_BTD, rows.mix(xs, None), None)
    return h_BTD, extras.outputs


# Generation


def run_stacks(
    stacks: Stacks, h: Float[Array, "R T D"], params: Params, pass_of: Callable[[int, Mixer], Pass]
) -> tuple[Float[Array, "R T D"], tuple[Any, ...]]:
    """Return the residual stream of new tokens after all layers, and the parts of the cache in the order of
    layers_of(stacks).

    pass_of(i, mixer): returns the Pass of the layers with part i, for example mixer.token(...).
    """
    parts: list[Any] = []
    for stack in stacks:
        passes = [pass_of(len(parts) + i, layer.mixer) for i, layer in enumerate(stack.layers)]

        def block(state: Any, x: Any, stack: Stack = stack, passes: list[Pass] = passes) -> tuple[Any, Any]:
            h, carries, values = state[0], list(state[1]), []
            for i, layer in enumerate(stack.layers):
                mix = passes[i].mix(x[1][i], carries[i])
                h, extras = layer.layer(layer.of(x[0]), h, mix, None)
                carries[i], value = extras.cached
                values.append(value)
            return (h, carries), values

        start = h, [extra.carry for extra in passes]
        (h, carries), values = jax.lax.scan(
            block, start, (params[stack.name], [extra.xs for extra in passes])
        )
        parts += [extra.end(*ended) for extra, *ended in zip(passes, carries, values, strict=True)]
    return h, tuple(parts)


# Updates inside the backward pass, as in LOMO (Lv et al. 2023, arXiv:2306.09782), for any optimizer that
# takes each layer alone: only one layer's gradient is in memory at a time.


FLOATS_OF_SIZE: dict[int, Any] = {1: jnp.float8_e4m3fn, 2: jnp.float16, 4: jnp.float32}  # by bytes an element


class CallCount:
    """The number of times that a forward pass uses FusedLayers; their results are correct only if it is 1."""

    def __init__(self) -> None:
        self.count = 0


@struct
class FusedLayers:
    """The layers of a model in a train step that updates each layer as soon as its gradient is known.

    The backward pass of `fused_scan` returns results in place of gradients: for `layers` and `state` the
    updated values, for `squares` (pass 0) the sum of squares of all gradients.

    layers: a tree with the trainable leaves [L, ...]; pick(layers) returns the stack's parameters, None for a
    frozen leaf. frozen: the frozen leaves [L, ...], None for a trainable one. state: the optimizer state,
    arrays [L, ...], integers as `float_bits`, since only floats have gradients. update: (gradients of layer
    i, their norm, (the layer, its state), i) -> ((layer, state), norm), with norm NaN if the update is not
    finite. calls: counts the uses of these layers.
    """

    layers: Any
    frozen: Any
    state: Any
    squares: Any  # a float scalar
    pick: Callable = static()
    update: Callable = static()
    calls: CallCount = static()


def unfused(params: Any) -> Any:
    """Replace every FusedLayers in `params` by plain parameters, for a forward pass without gradients."""

    def node(x: Any) -> Any:
        return tree.combine(x.pick(x.layers), x.frozen) if isinstance(x, FusedLayers) else x

    return jax.tree.map(node, params, is_leaf=lambda x: isinstance(x, FusedLayers))


def float_bits(x: Array) -> Array:
    """Return an integer array as floats with the same bits, only for storage; a float array unchanged."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jax.lax.bitcast_convert_type(x, FLOATS_OF_SIZE[x.dtype.itemsize])


def from_float_bits(x: Array, like: Any) -> Array:
    """Invert float_bits; like: an array of the original dtype."""
    return x if x.dtype == like.dtype else jax.lax.bitcast_convert_type(x, like.dtype)


def layer_at(x: Any, i: Array) -> Any:
    """Return the tree of layer i, from leaves [L, ...]."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), x)


def put_layer(x: Any, layer: Any, i: Array) -> Any:
    """Return a tree of leaves [L, ...] with layer i replaced, in place where possible."""
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), x, layer)


def fused_scan(body: Callable, h: Float[Array, "..."], c: FusedLayers, more: Any) -> tuple[Array, Any]:
    """Return `jax.lax.scan(body, h, (layers, more))`; its backward pass recomputes each layer and updates it.

    The forward pass stores the input of each layer. The backward pass updates parameters and optimizer state
    in place, from the last layer to the first. c: the layers. more: arrays [L, ...] without gradients.
    """
    c.calls.count += 1
    count = jax.tree.leaves(c.layers)[0].shape[0]

    def run(h: Array, layer: Any, i: Array) -> tuple[Array, Any]:
        return body(h, (tree.combine(c.pick(layer), layer_at(c.frozen, i)), layer_at(more, i)))

    @jax.custom_vjp
    def through(h, layers, state, squares):
        return forward(h, layers, state, squares)[0]

    def forward(h, layers, state, squares):
        def step(h, i):
            after, outputs = run(h, layer_at(layers, i), i)
            return after, (outputs, h)

        h, (outputs, inputs) = jax.lax.scan(step, h, jnp.arange(count))
        return (h, outputs), (layers, state, squares, inputs)

    def backward(saved, cotangents):
        (dh, of_outputs), (layers, state, squares, inputs) = cotangents, saved

        def step(n, now):
            i = count - 1 - n
            dh, layers, state, squares = now
            layer = layer_at(layers, i)
            _, pull = jax.vjp(partial(run, i=i), layer_at(inputs, i), layer)
            dh, grads = pull((dh, layer_at(of_outputs, i)))
            norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(squares.dtype), grads))
            (layer, new_state), norm = c.update(grads, norm, (layer, layer_at(state, i)), i)
            return dh, put_layer(layers, layer, i), put_layer(state, new_state, i), squares + norm * norm

        return jax.lax.fori_loop(0, count, step, (dh, layers, state, squares))

    through.defvjp(forward, backward)
    return through(h, c.layers, c.state, c.squares)
