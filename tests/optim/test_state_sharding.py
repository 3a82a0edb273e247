"""Optimizer state on a mesh: sharded as its parameter is, replicated if that is declared, else refused."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxft import tree
from jaxft.distributed import sharding
from jaxft.distributed.sharding import MeshShape
from jaxft.nn import param
from jaxft.nn.param import ParamSpec, full
from jaxft.optim.low_precision import adamw_8bit, adamw_bf16
from jaxft.optim.optimizer import Optim, UpdateRule, adafactor, adamw, make_optimizer
from jaxft.optim.state_sharding import state_shardings

SPECS = {
    "embed": ParamSpec((512, 256), ("vocab", "table_width"), full(0.0)),
    "layers": {
        "q": ParamSpec((3, 256, 128), ("layers", "width", "heads"), full(0.0)),
        "norm": ParamSpec((3, 256), ("layers", "norm"), full(0.0)),
    },
    "frozen": None,
}
MESH = MeshShape(data=2, fsdp=2, tensor=2)


def setting(mesh):
    """(mesh, parameters as shapes with shardings)."""
    mesh = sharding.make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor])
    places = param.shardings(SPECS, mesh)
    shape = lambda s, place: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=place)  # noqa: E731
    return mesh, jax.tree.map(shape, SPECS, places, is_leaf=param.is_spec)


def sharded(optimizer, shape=MESH, **settings):
    """(state as shapes, its shardings, parameters) by path, and the mesh."""
    mesh, params = setting(shape)
    made = make_optimizer(Optim(optimizer=optimizer, **settings), SPECS, 10)
    state = jax.eval_shape(made.init, params)
    places = state_shardings(made, state, params, mesh)
    assert jax.tree.structure(places) == jax.tree.structure(state)
    return tree.paths(state), tree.paths(places), tree.paths(params), mesh


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("optimizer", [adamw, adafactor, adamw_8bit, adamw_bf16])
def test_state_of_a_parameters_shape_is_sharded_as_it_is_and_all_else_is_on_every_device(
    optimizer, layerwise, monkeypatch
):
    monkeypatch.setattr("jaxft.optim.layerwise.LARGE", 1000)
    monkeypatch.setattr("jaxft.optim.low_precision.SMALL", 256)
    state, places, params, mesh = sharded(optimizer, layerwise=layerwise, lr_groups=((".*/q", 2.0),))
    matched = set()
    for path, x in state.items():
        owner = next((p for p in params if f"/{p}/" in f"/{path}/" and params[p].shape == x.shape), None)
        matched.add(owner)
        assert places[path] == (params[owner].sharding if owner else sharding.replicated(mesh)), path
    assert matched >= {None, "layers/norm"} and ("embed" in matched or optimizer is adafactor)


def factored(schedule, specs, weight_decay):
    return optax.chain(optax.scale_by_factored_rms(), optax.scale_by_learning_rate(schedule))


def test_state_whose_sharding_does_not_follow_is_refused_with_the_remedy():
    with pytest.raises(
        ValueError,
        match=r"optim.optimizer=factored: its state .*v_row/.* \[\d+(, \d+)*\] "
        r"differs from its parameter's .*replicated=",
    ):
        sharded(factored)

    def declared(*args):
        return UpdateRule(factored(*args), replicated=("v_row", "v_col", "v"))

    _, places, _, mesh = sharded(declared)
    assert {place for path, place in places.items() if "v_row" in path} == {sharding.replicated(mesh)}

    def flat(schedule, specs, weight_decay):  # a state of no parameter that is no count
        return optax.GradientTransformation(
            lambda params: {"sum": jnp.zeros(7)}, lambda g, s, params=None: (g, s)
        )

    with pytest.raises(ValueError, match=r"its state .*sum of shape \[7\] belongs to no parameter"):
        sharded(flat)


def test_on_one_device_nothing_is_refused():
    _, places, *_ = sharded(factored, MeshShape(data=1, fsdp=1, tensor=1))
    assert {place.mesh.size for place in places.values()} == {1}
