"""Optimizer state on a mesh: sharded as its parameter is, replicated if that is declared, else refused."""

import jax
import jax.numpy as jnp
import optax
import pytest
from tiny_model import assert_close

from jaxft.distributed import sharding
from jaxft.distributed.sharding import MeshShape
from jaxft.nn import param_spec, tree
from jaxft.nn.param_spec import ParamSpec, full
from jaxft.optim.low_precision import adamw_8bit, adamw_bf16
from jaxft.optim.optimizer import Optim, make_optimizer, skip_spikes, state_shardings
from jaxft.optim.rules import UpdateRule, adafactor, adamw, muon, schedule_free_adamw
from jaxft.optim.schedules import constant_schedule
from jaxft.optim.update import StepInfo

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
    places = param_spec.shardings(SPECS, mesh)
    shape = lambda s, place: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=place)  # noqa: E731
    return mesh, jax.tree.map(shape, SPECS, places, is_leaf=param_spec.is_spec)


def sharded(optimizer, shape=MESH, **settings):
    """(state as shapes, its shardings, parameters) by path, and the mesh."""
    mesh, params = setting(shape)
    made = make_optimizer(Optim(optimizer=optimizer, **settings), SPECS, 10)
    state = jax.eval_shape(made.init, params)
    places = state_shardings(made, state, params, SPECS, mesh)
    assert jax.tree.structure(places) == jax.tree.structure(state)
    return tree.paths(state), tree.paths(places), tree.paths(params), mesh


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("optimizer", [adamw, adafactor, adamw_8bit, adamw_bf16, muon, optax.lion])
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


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize(
    "settings", [{"ema": 0.9}, {"optimizer": schedule_free_adamw, "schedule": constant_schedule}]
)
def test_averages_are_sharded_as_their_parameters_and_the_losses_of_spikes_are_on_every_device(
    settings, layerwise
):
    mesh, params = setting(MESH)
    made = skip_spikes(make_optimizer(Optim(layerwise=layerwise, **settings), SPECS, 10), 6.0, 16)
    state = jax.eval_shape(made.init, params)
    places, shapes = tree.paths(state_shardings(made, state, params, SPECS, mesh)), tree.paths(params)
    averages = {path: places[path] for path in places if "/average/" in path or "/z/" in path}
    assert len(averages) == 3
    for path, place in averages.items():
        assert place == next(x.sharding for name, x in shapes.items() if path.endswith(f"/{name}"))
    assert places["losses"] == places["norms"] == sharding.replicated(mesh)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "settings",
    [{"optimizer": muon, "ema": 0.9}, {"optimizer": schedule_free_adamw, "schedule": constant_schedule}],
)
def test_updates_on_a_mesh_are_those_of_one_device(settings):
    """Orthogonalising a sharded matrix sums over devices in another order."""
    mesh, shapes = setting(MESH)
    made = skip_spikes(make_optimizer(Optim(lr=0.1, weight_decay=0.1, **settings), SPECS, 10), 6.0, 16)

    def steps(params):
        state, trained = made.init(params), params
        for i in range(2):
            grads = jax.tree.map(lambda x, i=i: jnp.cos((3.0 + i) * x), params)
            info = StepInfo(optax.tree.norm(grads), jnp.array(True), loss=jnp.float64(1))
            trained, state = made.update(grads, state, trained, info)
        return trained, made.averaged(state, trained)

    params = jax.tree.map(lambda s: jnp.sin(jnp.arange(s.size, dtype=jnp.float64)).reshape(s.shape), shapes)
    places = jax.tree.map(lambda s: s.sharding, shapes)
    expected = jax.jit(steps)(params)
    with jax.set_mesh(mesh):
        found = jax.jit(steps, out_shardings=(places, places))(jax.device_put(params, places))
    assert_close(found, expected, 1e-9)


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
