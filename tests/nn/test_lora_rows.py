"""Adapters chosen by row: each row is computed as with its adapter alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.nn.adapters import lora_rows
from jaxft.nn.adapters.lora import Adapted, Several, attach
from jaxft.nn.layers import embed, head_params, lm_head
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
    found = attach(base, Several(stack), rows=jnp.asarray(rows))["layers"]
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
    assert attach(base, Several(None), rows=jnp.asarray(rows)) is base


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
        first = jax.tree.map(lambda leaf: leaf[0], attach(base, Several(some), rows=rows)["layers"]["q"])
        results.append(linear(x, first))
    np.testing.assert_array_equal(*results)
    assert not np.array_equal(results[0], x @ base["layers"]["q"][0])


def outside_layers(tied):
    """A base, and adapters of the head, the table, both and of DoRA on the head."""

    def two(ins, outs, rank):
        return {name: x[0] for name, x in pair(ins, outs, rank).items()}

    base = {"embed": jnp.asarray(RNG.normal(0, 1, (7, 6)), jnp.float32)}
    base |= {} if tied else {"head": jnp.asarray(RNG.normal(0, 1, (6, 7)), jnp.float32)}
    dora = {**two(6, 7, 2), "magnitude": RNG.uniform(1, 3, 7).astype(np.float32)}
    adapters = [{"head": two(6, 7, 3)}, {"embed": two(7, 6, 2)}, {"embed": two(7, 6, 1), "head": dora}]
    return base, jax.tree.map(jnp.asarray, adapters)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_table_and_the_head_of_each_row_are_those_of_its_adapter_alone(tied, dtype):
    base, adapters = outside_layers(tied)
    stack = lora_rows.stack_by_row([lora_rows.with_gains(base, one) for one in adapters])
    stored = jax.tree.map(jnp.asarray, lora_rows.stored_stack(stack, dtype))
    assert stored["embed"]["a"].dtype == ("uint16" if dtype == "bfloat16" else dtype)
    assert stored["head"]["gain"].dtype == "float32" and stored["head"]["gain"].shape == (4, 7)
    rows = jnp.asarray([3, 0, 1, 2, 3], jnp.int32)
    ids, h = jnp.asarray(RNG.integers(0, 7, (5, 3))), jnp.asarray(RNG.normal(0, 1, (5, 6)), dtype)
    base = jax.tree.map(lambda x: x.astype(dtype), base)
    found = attach(base, Several(stored), rows=rows)
    table, logits = embed(found["embed"], ids, dtype), lm_head(head_params(found), h)
    equal = lora_rows.of_equal_shapes([lora_rows.with_gains(base, one) for one in adapters])
    for i, number in enumerate(rows.tolist()):
        for alone in (adapters, equal):
            own = attach(base, alone[number - 1] if number else None)
            tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == "float32" else dict(rtol=0.03, atol=0.1)
            expected = embed(own["embed"], ids[i : i + 1], dtype)[0]
            np.testing.assert_allclose(np.float32(table[i]), np.float32(expected), **tolerance)
            np.testing.assert_allclose(logits[i], lm_head(head_params(own), h[i]), **tolerance)
    assert np.abs(logits[0] - lm_head(head_params(base), h[0])).max() > 0.3


def test_plain_adapters_have_gains_only_beside_those_of_dora():
    q = pair(6, 5, 3)
    assert "gain" not in lora_rows.stack_by_row([{"layers": {"q": q}}])["layers"]["q"]
    gain = RNG.uniform(1, 2, (2, 5)).astype(np.float32)
    stack = lora_rows.stack_by_row([{"layers": {"q": q}}, {"layers": {"q": {**q, "gain": gain}}}])
    np.testing.assert_array_equal(
        stack["layers"]["q"]["gain"], np.stack([1 + 0 * gain, 1 + 0 * gain, gain], 1)
    )


def test_adapters_that_train_parameters_in_full_are_not_stackable():
    q = pair(6, 5, 3)
    for adapter in ({"layers": {"q": {**q, "magnitude": q["scale"]}}}, {"head": q, "embed": q}):
        assert lora_rows.not_stackable(adapter) == ""
    assert lora_rows.not_stackable({"embed": {"rows": q["scale"]}}) == "it trains embed in full"
    with pytest.raises(
        ValueError, match="adapter b cannot be used together with others: it trains final_norm"
    ):
        lora_rows.check_stackable({"a": {"head": q}, "b": {"final_norm": {"weight": q["scale"]}}})
