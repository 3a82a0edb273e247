"""Adapters chosen by row: each row is computed as with its adapter alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.nn import lora_rows
from jaxft.nn.lora import Adapted
from jaxft.nn.matmul import linear

RNG = np.random.default_rng(0)


def pair(ins, outs, rank, layers=2):
    return {
        "a": RNG.normal(0, 1, (layers, ins, rank)).astype(np.float32),
        "b": RNG.normal(0, 1, (layers, rank, outs)).astype(np.float32),
        "scale": RNG.uniform(0.5, 2, layers).astype(np.float32),
    }


def test_each_row_has_its_adapter_whatever_ranks_and_kernels_the_adapters_have():
    base = {"layers": {name: RNG.normal(0, 1, (2, 6, 5)).astype(np.float32) for name in ("q", "k", "v")}}
    adapters = [
        {"layers": {"q": pair(6, 5, 3)}},
        {"layers": {"q": pair(6, 5, 1), "k": pair(6, 5, 2)}},
    ]
    stack = lora_rows.stack_by_row(adapters)
    assert stack["layers"]["q"]["a"].shape == (2, 3, 6, 3) and stack["layers"].keys() == {"q", "k"}
    rows, x = np.asarray([1, 0, 2, 2, 1], np.int32), RNG.normal(0, 1, (5, 4, 6)).astype(np.float32)
    found = lora_rows.attach_rows(base, stack, jnp.asarray(rows))["layers"]
    for name in base["layers"]:
        for layer in range(2):
            w = jax.tree.map(lambda leaf, layer=layer: leaf[layer], found[name])
            y = np.asarray(linear(jnp.asarray(x), w))
            for row, number in enumerate(rows):
                expected = x[row] @ base["layers"][name][layer]
                own = adapters[number - 1]["layers"].get(name) if number else None
                if own:
                    expected = expected + own["scale"][layer] * (x[row] @ own["a"][layer] @ own["b"][layer])
                np.testing.assert_allclose(y[row], expected, rtol=1e-4, atol=1e-4)
    assert not isinstance(found["v"], Adapted)
    assert lora_rows.attach_rows(base, None, jnp.asarray(rows)) is base


@pytest.mark.parametrize("tokens", [1, 3])
def test_16_bit_stacks_are_stored_as_raw_bits_and_compute_the_same(tokens):
    base = {"layers": {"q": jnp.asarray(RNG.normal(0, 1, (2, 6, 5)), jnp.bfloat16)}}
    stack = lora_rows.stack_by_row([{"layers": {"q": pair(6, 5, 3)}}, {"layers": {"q": pair(6, 5, 1)}}])
    stored = lora_rows.stored_stack(stack, jnp.bfloat16)["layers"]["q"]
    assert {name: x.dtype for name, x in stored.items()} == {
        "a": "uint16",
        "b": "uint16",
        "scale": "bfloat16",
    }
    plain = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), stack)
    rows, x = (
        jnp.asarray([2, 0, 1, 2], jnp.int32),
        jnp.asarray(RNG.normal(0, 1, (4, tokens, 6)), jnp.bfloat16),
    )
    results = []
    for some in (plain, {"layers": {"q": jax.tree.map(jnp.asarray, stored)}}):
        first = jax.tree.map(lambda leaf: leaf[0], lora_rows.attach_rows(base, some, rows)["layers"]["q"])
        results.append(linear(x, first))
    np.testing.assert_array_equal(*results)
    assert not np.array_equal(results[0], x @ base["layers"]["q"][0])


def test_adapters_that_need_more_than_pairs_in_layers_are_not_stackable():
    q = pair(6, 5, 3)
    assert lora_rows.not_stackable({"layers": {"q": q}}) == ""
    assert "DoRA" in lora_rows.not_stackable({"layers": {"q": {**q, "magnitude": q["scale"]}}})
    assert "embed" in lora_rows.not_stackable({"embed": {"rows": q["scale"]}})
    assert "outside" in lora_rows.not_stackable({"head": q})
