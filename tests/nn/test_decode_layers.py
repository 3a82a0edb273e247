"""Separate layers share the memory of stacked ones, and a decoding step copies no weights and no keys."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.models.llama import llama
from jaxft.models.llama_config import LlamaConfig
from jaxft.nn.cache import NextToken
from jaxft.nn.cached_attention import equal_groups
from jaxft.nn.decode_layers import separate_layers
from jaxft.nn.param import init_params
from jaxft.nn.quant import dequantize, quantize
from jaxft.plan.hlo import parse_hlo

CONFIG = LlamaConfig(
    vocab=40, width=96, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=128, max_positions=64
)
MODEL = llama(CONFIG, jnp.float32)
FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant")  # make no array


def test_separate_layers_share_the_memory_of_stacked_ones():
    weight = np.random.default_rng(0).normal(size=(3, 64, 64)).astype(np.float32)
    bits, nf4 = quantize(jnp.asarray(weight, jnp.bfloat16), "bits"), quantize(weight, "nf4")
    nf4 = jax.tree.map(jnp.asarray, nf4)
    base = {"embed": bits, "layers": {"attn": {"q": bits, "k": nf4}, "norm": jnp.asarray(weight[:, 0])}}
    found = separate_layers({"base": base, "adapter": {}})
    assert found["adapter"] == {} and found["base"]["embed"] is bits
    layers = found["base"]["layers"]
    assert len(layers) == 3
    for i, one in enumerate(layers):
        np.testing.assert_array_equal(one["attn"]["q"], dequantize(bits)[i])
        assert one["attn"]["k"].kind == "nf4" and one["attn"]["k"].shape == (64, 64)
        np.testing.assert_array_equal(one["attn"]["k"].codes, nf4.codes[i])
        np.testing.assert_array_equal(one["norm"], weight[i, 0])
        start = bits.codes.unsafe_buffer_pointer()
        assert one["attn"]["q"].unsafe_buffer_pointer() == start + i * 64 * 64 * 2


def test_a_decoding_step_copies_no_weights_and_no_keys():
    """Every array that a step makes is smaller than a weight and than a layer's keys of prompts or rows."""
    params = separate_layers(init_params(MODEL.specs, jax.random.key(0), jnp.float32))
    cache = MODEL.empty_cache((2, 64), 2, 64)
    visible = jnp.ones_like(cache.prompts.visible)
    cache = replace(cache, prompts=replace(cache.prompts, visible=visible))

    def steps(params, cache, count):
        def step(i, cache):
            at = NextToken(jnp.full(2, 64) + i, jnp.full(2, 1) + i, equal_groups(2, 1))
            return MODEL.decode(params, cache, jnp.zeros(2, jnp.int32), at)[1]

        return jax.lax.fori_loop(0, count, step, cache)

    program = parse_hlo(jax.jit(steps, donate_argnums=1).lower(params, cache, 9).compile().as_text())
    bodies = [
        program.computations[re.search(r"body=%?([\w.-]+)", one.attributes)[1]]
        for part in program.computations.values()
        for one in part.values()
        if one.opcode == "while"
    ]
    made = [one for one in max(bodies, key=len).values() if one.opcode not in FREE]
    smallest = min(
        x.size for x in jax.tree.leaves((params["layers"], cache.prompts.layers, cache.rows)) if x.ndim > 1
    )
    assert len(made) > 40
    assert all(np.prod(array.shape) < smallest for one in made for array in one.arrays), smallest
