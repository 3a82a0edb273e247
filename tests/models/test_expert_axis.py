"""Kernels with an axis of experts: everything works on an expert's kernel as on a dense one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_experts
from merged_arrays import merged_arrays
from test_mesh_laws import MESHES, gradient_of, rows_of
from tiny_experts import CONFIG, KERNELS
from tiny_model import assert_close, examples, one_by_one

from jaxft.distributed.sharding import MeshShape, make_mesh
from jaxft.models.adapted import adapted, adapted_by_row
from jaxft.models.families.llama import LlamaConfig, llama
from jaxft.nn import param_spec, tree
from jaxft.nn.adapters import lora, lora_rows
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.adapters.lora_specs import adapter_specs, pair_layouts
from jaxft.nn.quant import quantize
from jaxft.optim import rules, schedules
from jaxft.optim.optimizer import Optim, make_optimizer
from jaxft.optim.update import StepInfo
from jaxft.weights.edit.lora_start import init_magnitudes

pytestmark = pytest.mark.usefixtures("x64")
EXPERTS = "layers/mlp/experts"
ADAPTER = Adapter(rank=4, targets=("q", *KERNELS), rank_pattern=(("experts.1.up_proj", 2),))
jit = lambda fn: jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})  # noqa: E731


def qlora():
    """The toy with NF4 kernels and a DoRA adapter on the experts."""
    model, params = tiny_experts.tiny_experts(replace(ADAPTER, dora=True))
    base = tree.map_with_path(
        lambda path, x: quantize(x, "nf4", 8) if "/mlp/experts/" in path else x, params["base"]
    )
    return model, {"base": base, "adapter": init_magnitudes(base, params["adapter"])}


def parts(kind):
    """(model, parameters, pattern of trainable paths)."""
    if kind == "full":
        return *tiny_experts.tiny_experts(), ".*"
    return *qlora(), "adapter/.*/([ab]|magnitude)"


def test_a_config_in_files_is_read_as_it_was_written():
    family = tiny_experts.FAMILY
    assert family.from_hf(family.to_hf(CONFIG)) == CONFIG


@pytest.mark.parametrize(
    "kind, mesh",
    [
        ("full", MeshShape(2, 1, 2, expert=2)),
        pytest.param("qlora", MeshShape(2, 2, 1, expert=2), marks=pytest.mark.slow),
        pytest.param("qlora", MESHES["2x2x2"], marks=pytest.mark.slow),
        pytest.param("full", MESHES["context 2"], marks=pytest.mark.slow),
    ],
    ids=["full", "qlora", "qlora 2x2x2", "full context 2"],
)
def test_loss_and_gradients_on_a_mesh_are_those_of_one_device(kind, mesh):
    expected, devices = gradient_of("sft", parts(kind), rows_of("sft")), make_mesh(mesh)
    grads = tree.paths(expected[0])
    for name in KERNELS:
        path = f"base/{EXPERTS}/{name}" if kind == "full" else f"adapter/{EXPERTS}/{name}/b"
        assert np.all(np.abs(grads[path]).max((-2, -1)) > 1e-4)  # of every expert in every layer
    with jax.set_mesh(devices):
        assert_close(gradient_of("sft", parts(kind), rows_of("sft"), devices), expected)


def dense(params):
    """Parameters of a model with one expert as those of a dense one."""
    layers = params["layers"]
    mlp = jax.tree.map(lambda x: x[:, 0], layers["mlp"]["experts"])
    return {**params, "layers": {**layers, "mlp": mlp}}


def test_one_expert_with_a_dora_adapter_on_nf4_kernels_is_a_dense_model():
    settings, config = Adapter(rank=4, targets=KERNELS, dora=True), replace(CONFIG, experts=1)
    ours, params = tiny_experts.tiny_experts(settings, config=config)
    sizes = {name: x for name, x in vars(config).items() if name != "experts"}
    theirs = adapted(llama(LlamaConfig(**sizes), jnp.float64), settings)
    quantised = tree.map_with_path(
        lambda path, x: quantize(x, "nf4", 8) if path.rpartition("/")[2] in KERNELS else x, params["base"]
    )
    adapter, rows = init_magnitudes(quantised, params["adapter"]), one_by_one(examples(4))

    def loss(model, base, adapter):
        return jnp.sum(jnp.sin(model.hidden({"base": base, "adapter": adapter}, rows)[0]))

    found, grads = jit(jax.value_and_grad(lambda x: loss(ours, quantised, x)))(adapter)
    expected, others = jit(jax.value_and_grad(lambda x: loss(theirs, dense(quantised), x)))(dense(adapter))
    assert_close((found, dense(grads)), (expected, others))


def test_each_expert_has_the_codes_and_scales_of_its_kernel_alone():
    w = jax.random.normal(jax.random.key(0), (2, 3, 16, 6), jnp.float32)
    for form in (("nf4", 8, True), ("int8",), ("affine4", 8)):
        stack = quantize(w, *form)
        for at in np.ndindex(2, 3):
            assert_close(jax.tree.map(lambda x, at=at: x[at], stack), quantize(w[at], *form), 0)


def test_settings_of_adapters_select_single_experts_by_name():
    specs, names = tiny_experts.expert_specs(CONFIG), tiny_experts.NAMES
    found = pair_layouts(specs, ADAPTER, names)
    assert found[f"{EXPERTS}/up"].ranks == (4, 2) * 3 and found[f"{EXPERTS}/gate"].ranks == (4,) * 6
    pair = adapter_specs(specs, ADAPTER, names)["layers"]["mlp"]["experts"]["up"]
    assert pair["a"].shape == (3, 2, 32, 4) and pair["b"].shape == (3, 2, 4, 48)
    assert [pair[name].axes[:2] for name in ("a", "b", "scale")] == [("layers", "experts")] * 3
    a = param_spec.init_params(pair, jax.random.key(0))["a"]
    assert np.all(a[:, 1, :, 2:] == 0) and np.all(a[:, 0] != 0) and np.all(a[:, 1, :, :2] != 0)
    some = replace(ADAPTER, layers_to_transform=(1,), exclude_modules=("experts.0.down_proj",))
    assert pair_layouts(specs, some, names)[f"{EXPERTS}/down"].ranks == (0, 0, 0, 4, 0, 0)
    assert {path.rpartition("/")[2] for path in lora.target_paths(specs, "all-linear")} >= {*KERNELS}


def test_a_merged_model_computes_what_the_adapter_does():
    model, params = qlora()
    merged = merged_arrays(params["base"], params["adapter"], jnp.float64)
    rows = one_by_one(examples(4))
    hidden = jit(lambda *args: model.hidden(*args)[0])
    assert_close(hidden({"base": merged}, rows), hidden(params, rows))
    assert np.abs(hidden({"base": params["base"]}, rows) - hidden(params, rows)).max() > 0.1


def some_adapters():
    """The toy's base, and two adapters on it, of which one is a DoRA adapter of another rank."""
    model, params = qlora()
    _, plain = tiny_experts.tiny_experts(Adapter(rank=2, targets=("down",)))
    return model, params["base"], [lora_rows.with_gains(params["base"], params["adapter"]), plain["adapter"]]


def test_each_row_and_each_group_of_rows_has_its_adapter():
    model, base, adapters = some_adapters()
    rows = one_by_one(examples(4))
    alone = [jit(model.hidden)({"base": base, "adapter": adapter}, rows)[0] for adapter in adapters]
    stack = jax.tree.map(jnp.asarray, lora_rows.stack_by_row(adapters))
    numbers = jnp.asarray([2, 1, 1, 2], jnp.int32)
    by_row = adapted_by_row(tiny_experts.experts(CONFIG, jnp.float64))
    found = jit(by_row.hidden)({"base": base, "stack": stack, "rows": numbers}, rows)[0]
    assert_close(found, jnp.stack([alone[number - 1][i] for i, number in enumerate(numbers.tolist())]))
    equal = lora.several({"adapter": lora.stack_adapters(lora_rows.of_equal_shapes(adapters))})
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), rows)
    assert_close(jit(model.hidden)({"base": base, **equal}, twice)[0], jnp.concatenate(alone))


@pytest.mark.parametrize("rule", [rules.muon, rules.adafactor, optax.lamb], ids=["muon", "adafactor", "lamb"])
@pytest.mark.parametrize("layerwise", [False, True], ids=["whole", "layerwise"])
def test_an_update_of_experts_is_that_of_each_kernel_alone(rule, layerwise):
    axes = ("layers", "experts", "width", "mlp")
    whole = {"w": param_spec.ParamSpec((2, 3, 130, 140), axes, param_spec.normal(1.0))}
    alone = {"w": param_spec.ParamSpec((130, 140), axes[2:], param_spec.normal(1.0))}
    settings = Optim(lr=0.1, optimizer=rule, clip=None, weight_decay=0.1, warmup=0.0)
    settings = replace(settings, schedule=schedules.constant_schedule)
    start = param_spec.init_params(whole, jax.random.key(0), jnp.float32)
    sizes = jnp.asarray([[1.0, 10, 0.1], [5.0, 0.01, 2]], jnp.float32)[..., None, None]
    info = StepInfo(jnp.float32(1), jnp.array(True))

    def step(specs, params, **more):
        made = make_optimizer(replace(settings, **more), specs, 10)
        grads = jax.tree.map(jnp.sin, params)
        return jit(made.update)(grads, made.init(params), params, info)[0]["w"]

    with jax.numpy_dtype_promotion("standard"):
        start = jax.tree.map(lambda x: x * sizes, start)
        found = step(whole, start, layerwise=layerwise)
        for at in np.ndindex(2, 3):
            assert_close(found[at], step(alone, {"w": start["w"][at]}), 1e-6)
