"""The head of some tokens alone: its logits are those of the head at these tokens, however it is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.nn.adapters.full_modules import TokenRows
from jaxft.nn.adapters.lora import Adapted
from jaxft.nn.layers import head_of_tokens, lm_head
from jaxft.nn.quant import quantize

V, D, R = 24, 16, 2
IDS = (3, 20, 4, 11)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def pair(weight, **more):
    return Adapted(weight, normal(1, D, R), normal(2, R, V), jnp.float32(0.5), **more)


def heads():
    table, matrix = normal(3, V, D), normal(4, D, V)
    dora = jnp.abs(normal(5, V)) + 1
    return {
        "matrix": {"head": matrix},
        "tied": {"embed": table},
        "adapter": {"head": pair(matrix)},
        "adapter of a tied head": {"embed": table, "head": pair(None)},
        "DoRA": {"head": pair(matrix, magnitude=dora)},
        "DoRA of a tied head": {"embed": table, "head": pair(None, magnitude=dora)},
        "gains": {"head": pair(matrix, gain=dora)},
        "int8": {"head": quantize(matrix, "int8")},
        "nf4 with an adapter": {"head": pair(quantize(matrix, "nf4", 8))},
        "affine4 table": {"embed": quantize(table, "affine4", 8)},
        "bits": {"head": quantize(matrix.astype(jnp.bfloat16), "bits")},
        "new tokens": {"head": TokenRows(matrix, normal(6, 2, D), (20, 5))},
        "new tokens of a tied head": {"embed": TokenRows(table, normal(6, 2, D), (5, 20))},
    }


@pytest.mark.parametrize("kind", heads())
def test_logits_of_some_tokens_are_those_of_the_whole_head(kind):
    head, h = heads()[kind], normal(0, 2, 3, D)
    h = h.astype(jnp.bfloat16) if kind == "bits" else h
    whole = lm_head(head, h)[..., np.asarray(IDS)]
    found = lm_head(head_of_tokens(head, jnp.asarray(IDS)), h)
    assert found.shape == (2, 3, len(IDS)) and found.dtype == whole.dtype
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)
