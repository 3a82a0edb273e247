"""The size of blockwise attention's blocks: small on CPUs, large elsewhere, with the same results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxft.distributed.sharding import MeshShape, make_mesh
from jaxft.nn.attention.attention import dense
from jaxft.nn.attention.flash_attention import default_block, flash, key_ranges


@pytest.mark.parametrize(("platform", "block"), [("cpu", 64), ("cuda", 256), ("tpu", 256)])
def test_blocks_are_small_on_cpus(platform, block):
    device = AbstractDevice(platform, None, platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        assert default_block() == block
    assert default_block() == 64  # without a mesh, of the devices that jax uses


@pytest.mark.parametrize("length", [150, 1030])
def test_a_cpus_blocks_equal_dense(length):
    """Rows of packed examples with shared prompts, whose ends are not those of blocks."""
    rng = np.random.default_rng(length)
    q, k, v, do = (jnp.asarray(rng.normal(size=(1, length, n, 4)), jnp.float32) for n in (2, 1, 1, 2))
    at = np.arange(length)
    segments, branches = at // 70 + 1, np.maximum(at % 70 - 30, 0) // 15
    ranges = key_ranges(jnp.asarray(segments[None], jnp.int32), jnp.asarray(branches[None], jnp.int32))

    def value_and_gradients(kernel):
        o, pull = jax.vjp(lambda *qkv: kernel(*qkv, ranges), q, k, v)
        return o, *pull(do)

    with jax.set_mesh(make_mesh(MeshShape(), jax.devices()[:1])):
        found = jax.jit(lambda: value_and_gradients(flash))()
    for x, y in zip(found, jax.jit(lambda: value_and_gradients(dense))(), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
