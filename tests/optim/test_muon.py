"""Muon on stacked layers is torch.optim.Muon on each layer's matrix; Lion is its paper's algorithm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from tiny_model import assert_close

from jaxft.nn import tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.nn.param_spec import ParamSpec, full, spec_paths
from jaxft.optim.optimizer import Optim, make_optimizer
from jaxft.optim.rules import muon, orthogonalized
from jaxft.optim.schedules import constant_schedule
from jaxft.optim.update import StepInfo

pytestmark = pytest.mark.usefixtures("x64")
SPECS = {
    "embed": ParamSpec((9, 6), ("vocab", "table_width"), full(0.0)),
    "layers": {
        "wide": ParamSpec((3, 6, 10), ("layers", "width", "mlp"), full(0.0)),
        "tall": ParamSpec((3, 10, 6), ("layers", "mlp", "width"), full(0.0)),
        "bias": ParamSpec((3, 10), ("layers", "mlp"), full(0.0)),
    },
    "head": ParamSpec((6, 9), ("table_width", "vocab"), full(0.0)),
}
MATRICES = ("wide", "tall")


def random(seed):
    def leaf(s):
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed), len(s.shape)), s.shape)

    return jax.tree.map(leaf, SPECS, is_leaf=lambda s: isinstance(s, ParamSpec))


def trained(settings, steps=4):
    """Parameters after some steps of random gradients."""
    optimizer, params = make_optimizer(settings, SPECS, 10), random(99)
    state, info = optimizer.init(params), StepInfo(jnp.float64(1), jnp.array(True))
    update = jax.jit(optimizer.update)
    for i in range(steps):
        params, state = update(random(i), state, params, info)
    return params


def plain(**more):
    return Optim(lr=0.02, clip=None, warmup=0.0, schedule=constant_schedule, weight_decay=0.1, **more)


@pytest.fixture
def wide_torch(monkeypatch):
    """torch.optim.Muon iterates in bfloat16; here it does so in the gradient's own precision."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())


@pytest.mark.quick_cases("0.2-match_rms_adamw-True", "None-original-False")
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("rms, name", [(0.2, "match_rms_adamw"), (None, "original")])
def test_every_layers_matrix_is_that_of_torch_and_the_rest_is_adamws(rms, name, layerwise, wide_torch):
    kwargs = (("rms", rms),) if rms is None else ()
    found = trained(plain(optimizer=muon, optimizer_kwargs=kwargs, layerwise=layerwise))
    start = random(99)
    for path in MATRICES:
        for layer in range(3):
            weight = torch.tensor(np.asarray(start["layers"][path][layer]).T.copy(), requires_grad=True)
            optimizer = torch.optim.Muon([weight], lr=0.02, weight_decay=0.1, adjust_lr_fn=name)
            for i in range(4):
                weight.grad = torch.tensor(np.asarray(random(i)["layers"][path][layer]).T.copy())
                optimizer.step()
            assert_close(found["layers"][path][layer], weight.detach().numpy().T, 1e-6)
    adamw = trained(plain())
    assert_close((found["embed"], found["head"]), (adamw["embed"], adamw["head"]))
    assert_close(found["layers"]["bias"], adamw["layers"]["bias"])


def test_an_update_is_nearly_orthogonal_and_zeros_stay_zeros():
    u, _, v = np.linalg.svd(np.asarray(random(1)["layers"]["wide"]), full_matrices=False)
    x = u * np.array([3.0, 2.0, 1.0, 0.5, 0.2, 0.1]) @ v
    found = np.asarray(orthogonalized(jnp.asarray(x)))
    values = np.swapaxes(u, 1, 2) @ found @ np.swapaxes(v, 1, 2)  # the singular vectors stay
    diagonal = np.diagonal(values, axis1=1, axis2=2)
    assert diagonal.min() > 0.6 and diagonal.max() < 1.3
    np.testing.assert_allclose(values, diagonal[..., None] * np.eye(6), atol=1e-9)
    assert (np.asarray(orthogonalized(jnp.zeros((2, 4, 3)))) == 0).all()


def test_the_pairs_of_an_adapter_are_matrices_but_those_of_the_head_are_not():
    adapter = {
        "adapter": adapter_specs(
            SPECS | {"layers": {"q": SPECS["layers"]["wide"]}}, Adapter(rank=2, targets=("q", "head"))
        )
    }
    trained_specs = jax.tree.map(
        lambda s: None if "rank" not in s.axes else s, adapter, is_leaf=lambda s: isinstance(s, ParamSpec)
    )
    made = make_optimizer(Optim(optimizer=muon), trained_specs, 10)
    state = jax.eval_shape(
        made.init, jax.tree.map(lambda s: jnp.zeros(s.shape), trained_specs, is_leaf=is_spec)
    )
    of_matrices = {path.rpartition("momentum/")[2] for path in tree.paths(state) if "momentum" in path}
    assert of_matrices == {"adapter/layers/q/a", "adapter/layers/q/b"}
    assert {*spec_paths(trained_specs)} - of_matrices == {"adapter/head/a", "adapter/head/b"}


def is_spec(x):
    return isinstance(x, ParamSpec)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(b1=0.8), "optim.optimizer=muon can't be called .*leave out optim.b1=0.8"),
        (dict(optimizer_kwargs=(("nesterov", 1.0),)), "leave out optim.optimizer_kwargs=nesterov:1.0"),
        (dict(optimizer_kwargs=(("momentum", 1.0),)), "momentum:1.0 is out of range"),
    ],
)
def test_what_muon_does_not_take_is_one_line(settings, words):
    with pytest.raises(ValueError, match=words):
        make_optimizer(Optim(optimizer=muon, **settings), SPECS, 10)


def test_lion_is_algorithm_2_of_its_paper():
    """Chen et al. 2023, arXiv:2302.06675: the update is the sign of b1 m + (1 - b1) g, and m decays by b2."""
    found = trained(plain(optimizer=optax.lion, b1=0.8, b2=0.95))
    for path in MATRICES:
        weight, m = np.asarray(random(99)["layers"][path]), 0.0
        for i in range(4):
            g = np.asarray(random(i)["layers"][path])
            weight = weight - 0.02 * (np.sign(0.8 * m + 0.2 * g) + 0.1 * weight)
            m = 0.95 * m + 0.05 * g
        np.testing.assert_allclose(found["layers"][path], weight, rtol=1e-12)
