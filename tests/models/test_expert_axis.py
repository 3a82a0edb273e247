"""Room for an expert axis X: a family whose MLP is its own function with kernels [L, X, D, F]."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mesh_laws import MESHES, gradient_of, rows_of
from tiny_model import CONFIG, assert_close

from jaxft.distributed.sharding import make_mesh
from jaxft.models.adapted import adapted
from jaxft.models.dense import dense_model, llama_specs, one_stack, self_attention
from jaxft.nn.layer_attention import uniform
from jaxft.nn.layers import rms_norm, split_keys
from jaxft.nn.lora import Adapter, target_paths
from jaxft.nn.matmul import linear
from jaxft.nn.param import ParamSpec, fan_in, init_params, spec_paths
from jaxft.optim.rules import decay_mask
from jaxft.tree import paths
from jaxft.weights.storage import is_matrix

pytestmark = pytest.mark.usefixtures("x64")
X, CHOSEN = 4, 2


def expert_specs(c):
    """Llama's parameters with X experts and a router in place of the MLP."""
    specs, (L, D, F) = llama_specs(c), (c.layers, c.width, c.mlp)
    into, back = ("layers", "experts", "width", "mlp"), ("layers", "experts", "from_mlp", "out_width")
    specs["layers"]["mlp"] = {
        "router": ParamSpec((L, D, X), ("layers", "width", "experts"), fan_in(D)),
        "gate": ParamSpec((L, X, D, F), into, fan_in(D)),
        "up": ParamSpec((L, X, D, F), into, fan_in(D)),
        "down": ParamSpec((L, X, F, D), back, fan_in(F)),
    }
    return specs


def expert_mlp(p, x_BTD):
    """The sum of the outputs of each token's best experts, weighted by the router."""
    best, chosen = jax.lax.top_k(linear(x_BTD, p["router"]), CHOSEN)
    weights = jnp.sum(jax.nn.softmax(best)[..., None] * jax.nn.one_hot(chosen, X, dtype=x_BTD.dtype), -2)
    gate, up = (jnp.einsum("btd,xdf->btxf", x_BTD, p[name]) for name in ("gate", "up"))
    return jnp.einsum("btxf,xfd,btx->btd", jax.nn.silu(gate) * up, p["down"], weights)


def layer(f, p, h, attend, key):
    c, keys = f.config, split_keys(key, 4)
    o, extra = self_attention(c, p["attn"], rms_norm(h, p["attn_norm"], c.norm_eps, f.dtype), attend, keys)
    h = h + o
    return h + expert_mlp(p["mlp"], rms_norm(h, p["mlp_norm"], c.norm_eps, f.dtype)), extra


def expert_model(adapter=None):
    attention = uniform(CONFIG.layers, CONFIG.head_dim, CONFIG.rope)
    arch = one_stack(expert_specs(CONFIG), {}, layer, attention)
    return adapted(dense_model(CONFIG, arch, jnp.float64), adapter)


def parts(adapter=None, pattern=".*"):
    model = expert_model(adapter)
    params = init_params(model.specs, jax.random.key(0), np.float64)
    return model, params, pattern


@pytest.mark.parametrize("mesh", ["2x2x2", pytest.param("context 2", marks=pytest.mark.slow)])
def test_experts_have_the_loss_and_gradients_of_one_device_on_a_mesh(mesh):
    expected, devices = gradient_of("sft", parts(), rows_of("sft")), make_mesh(MESHES[mesh])
    grads = paths(expected[0])
    assert all(np.abs(grads[f"base/layers/mlp/{name}"]).max() > 1e-4 for name in ("router", "gate", "down"))
    with jax.set_mesh(devices):
        assert_close(gradient_of("sft", parts(), rows_of("sft"), devices), expected)


def test_adapters_and_quantisation_leave_experts_alone_and_decay_does_not():
    specs = expert_specs(CONFIG)
    found = {path.rsplit("/", 1)[-1] for path in target_paths(specs, "all-linear")}
    assert found == {"q", "k", "v", "o", "router"}
    with pytest.raises(ValueError, match="'gate' is not a linear layer"):
        target_paths(specs, ("gate",))
    experts = {path: spec for path, spec in spec_paths(specs).items() if len(spec.shape) == 4}
    assert len(experts) == 3 and not any(map(is_matrix, experts.values()))
    assert all(paths(decay_mask(specs))[path] for path in experts)


def test_a_model_with_experts_is_trained_by_an_adapter_of_its_attention():
    adapter = Adapter(rank=2, targets=("q", "o"))
    grads, _ = gradient_of("sft", parts(adapter, "adapter/.*/[ab]"), rows_of("sft"))
    assert {path.split("/")[3] for path in paths(grads) if paths(grads)[path] is not None} == {"q", "o"}
    assert np.abs(paths(grads)["adapter/layers/attn/o/b"]).max() > 1e-4
