"""A model of two stacks, one of whose blocks have two kinds of layers (support/two_stacks.py): whatever runs
layers, trains them or names them follows.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_continuation import differences
from tiny_families import random_ids, rows
from two_stacks import two_stacks

from jaxft.batch import TrainState
from jaxft.distributed.sharding import MeshShape, make_mesh
from jaxft.models.adapted import adapted
from jaxft.nn import tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.adapters.lora_specs import pair_layouts
from jaxft.nn.attention import kv_cache
from jaxft.nn.param_spec import init_params, is_spec, kernel, spec_paths
from jaxft.nn.quant import Quant, dequantize, quantize
from jaxft.nn.stack import layer_places, run_layer
from jaxft.objectives import metrics
from jaxft.objectives.sft import sft
from jaxft.optim.optimizer import Optim, make_optimizer
from jaxft.train.step import make_train_step, make_watch
from jaxft.weights.edit.calibrated_base import CalibrationRows, calibrate_layers
from jaxft.weights.hf import hf_read, hf_write
from jaxft.weights.param_loading import param_readers
from jaxft.weights.peft import peft_write
from jaxft.weights.peft.peft_read import read_adapter
from jaxft.weights.tensors import tensors_of

BATCH = rows(random_ids(2, 12), segments=[[1] * 7 + [2] * 5, [1] * 10 + [0] * 2],
             positions=[[*range(7), *range(5)], [*range(10), 0, 0]])  # fmt: skip
BATCH = BATCH.replace(
    read=jnp.arange(8)[None].repeat(2, 0), targets=BATCH.ids[:, 1:9], token_weights=jnp.full((2, 8), 1 / 16)
)


@pytest.fixture(scope="module", autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def params(x64):
    return init_params(two_stacks().specs, jax.random.key(0), jnp.float64)


def test_remat_in_pairs_names_the_stack_whose_blocks_are_not_even(params):
    message = "divisible by 2, but the stack first has 1; use remat=full"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(two_stacks(remat="pairs").hidden, params, BATCH)


def test_layers_run_in_the_order_of_the_stacks_and_of_their_blocks(params):
    model = two_stacks()
    places = layer_places(model.stacks)
    expected = ["first 0", "blocks/recurrent 0", "blocks/full 0", "blocks/recurrent 1", "blocks/full 1"]
    assert [f"{x.path} {x.index}" for x in places] == expected
    h, means, states = model.embed(params, BATCH.ids), [], []
    for place in places:
        own = jax.tree.map(lambda x, i=place.index: x[i], place.specs(params))
        h, outputs = run_layer(place.layer, h, own, BATCH, place.index)
        means += [outputs["first_channel"].total] if "first_channel" in outputs else []
        states += [outputs["state"]] if "state" in outputs else []
    found, outputs = jax.jit(model.hidden)(params, BATCH)
    h = np.asarray(h)
    norm = np.sqrt(np.square(h).mean(-1, keepdims=True) + model.config.norm_eps)
    np.testing.assert_allclose(found, h / norm * np.asarray(params["final_norm"]), rtol=1e-12)
    np.testing.assert_allclose(outputs["first_channel"].total, jnp.stack(means), rtol=1e-12)
    np.testing.assert_allclose(outputs["state"], jnp.stack(states), rtol=1e-12)
    assert outputs["first_channel"].numbers == (0, 2, 4)


def test_a_text_in_chunks_has_the_log_probs_of_one_forward_pass(params):
    """With shared prompts, states of prompts that rows start from, and rows of other lengths."""
    for error in differences(two_stacks(window=7), params):
        assert error.max() < 1e-10, error.max()


def test_the_state_of_a_recurrence_is_sharded_along_its_named_axes():
    state, rest = kv_cache.RecurrentState(jnp.zeros((2, 4, 12)), ("mlp",)), ("layers", "rows", "mlp")
    assert kv_cache.cache_axes((state,))[0].value == rest
    with jax.set_mesh(make_mesh(MeshShape(2, 1, 4))):
        (found,) = jax.jit(kv_cache.sharded)((state,))
    assert found.value.sharding.shard_shape(found.value.shape) == (2, 2, 3)


def loss_and_gradient(model, params):
    objective = sft(model)

    def loss(params):
        outputs = objective.forward(params, BATCH, None, {})  # an objective that reads its model's layers
        value, found = objective.loss(outputs, {})
        return value + jnp.mean(outputs.layers["state"]) + jnp.mean(
            outputs.layers["first_channel"].total
        ), found

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def test_an_objective_reads_outputs_of_layers_whatever_is_rematerialised(params):
    (value, found), expected = loss_and_gradient(two_stacks(remat="none"), params)
    logged = metrics.as_floats(found)
    assert [name for name in logged if "/" in name] == [f"first_channel/{i}" for i in (0, 2, 4)]
    (same, _), grads = loss_and_gradient(two_stacks(remat="full"), params)
    np.testing.assert_allclose(same, value, rtol=1e-12)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-14), grads, expected)


@pytest.mark.parametrize("kind", ["layerwise", "fused_backward"])
def test_layers_that_are_updated_one_by_one_are_those_of_one_update(params, kind):
    found = []
    for options in ({}, {kind: True}):
        model = adapted(two_stacks(remat="full"), None)
        optimizer = make_optimizer(Optim(lr=1e-2, clip=None, warmup=0.0, **options), model.specs, 10)
        whole = {"base": params}
        state = TrainState(jnp.int32(0), whole, optimizer.init(whole), {}, jnp.zeros(2, jnp.int32))
        step = jax.jit(make_train_step(sft(model), optimizer, 0))
        frozen = jax.tree.map(lambda _: None, whole)
        for _ in range(2):
            state, reported = step(state, frozen, jax.tree.map(lambda x: x[None], BATCH))
        found.append((state.trainable, metrics.as_floats(reported)))
    (expected, before), (updated, after) = found
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8), updated, expected)
    assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-6)
    assert np.abs(expected["base"]["first"]["attn"]["q"] - params["first"]["attn"]["q"]).max() > 1e-3


def test_adapters_files_and_norms_have_the_numbers_of_the_models_layers(params):
    model, settings = two_stacks(), Adapter(rank=2, targets=("q", "out"), layers_to_transform=(1, 4))
    ranks = {path: x.ranks for path, x in pair_layouts(model.specs, settings, model.weight_names).items()}
    assert ranks == {"blocks/recurrent/mix/out": (2, 0), "blocks/full/attn/q": (0, 2)}
    names = [tensor.name for tensor in tensors_of(model)["blocks/full/attn/q"]]
    assert names == [f"model.layers.{i}.self_attn.q_proj.weight" for i in (2, 4)]
    specs = adapted(model, settings).specs["adapter"]
    grads = jax.tree.map(lambda s: jnp.ones(s.shape), specs, is_leaf=is_spec)
    found = metrics.by_layer(make_watch({"adapter": specs})(*[{"adapter": grads}] * 3))
    norms = {name.removeprefix("grad_norm/blocks/") for name in found if name.startswith("grad_norm")}
    assert norms == {"recurrent/mix/out/1", "recurrent/mix/out/3", "full/attn/q/2", "full/attn/q/4"}
    for targets, layer, shown in [(settings.targets, 5, "0 to 4"), (("q",), 1, "0, 2, 4")]:
        other = replace(settings, targets=targets, layers_to_transform=(layer,))
        with pytest.raises(ValueError, match=f"={layer}: the layers with adapter.targets are {shown};"):
            pair_layouts(model.specs, other, model.weight_names)
    for name in ("blocks.2.full.attn.q", "layers.2.self_attn.q_proj"):
        one = Adapter(rank=2, targets=("q",), rank_pattern=((name, 4),))
        assert pair_layouts(model.specs, one, model.weight_names)["blocks/full/attn/q"].ranks == (4, 2)


def test_an_adapters_file_has_pairs_of_every_kind_of_layer_and_is_read_again(tmp_path, params):
    model, settings = two_stacks(jnp.float32), Adapter(rank=2, targets=("q", "out"))
    whole = adapted(model, settings)
    adapter = jax.tree.map(lambda s: np.random.default_rng(0).normal(size=s.shape), whole.specs["adapter"],
                           is_leaf=is_spec)  # fmt: skip
    adapter = tree.map_with_path(lambda p, x: np.full_like(x, 16.0) if p.endswith("scale") else x, adapter)
    peft_write.save_adapter(tmp_path / "adapter", adapter, settings, whole, "base")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    modules = [f"{i}.recurrence.out_proj" for i in (1, 3)] + [f"{i}.self_attn.q_proj" for i in (0, 2, 4)]
    assert names.keys() == {
        f"base_model.model.model.layers.{m}.lora_{half}.weight" for m in modules for half in "AB"
    }
    found, again = read_adapter(tmp_path / "adapter", model)
    assert again.rank == 2 and set(again.targets) == {"q", "out"}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), found, adapter)


def test_a_quantised_base_with_adapters_computes_the_same_from_a_cache(params):
    """With int8 kernels and an adapter on every one, in all layers."""
    model = adapted(two_stacks(), Adapter(rank=2, targets="all-linear"))
    whole = {"base": params, "adapter": init_params(model.specs["adapter"], jax.random.key(1), jnp.float64)}
    kernels = {path for path, spec in spec_paths(model.specs["base"]).items() if kernel(spec) and "/" in path}
    coded = tree.map_with_path(lambda p, x: quantize(x, "int8") if p in kernels else x, params)
    near = jax.jit(model.hidden)({**whole, "base": coded}, BATCH)[0]
    expected = jax.jit(model.hidden)(whole, BATCH)[0]
    assert 0 < np.abs(near - expected).max() < 0.2
    for error in differences(model, {**whole, "base": coded}):
        assert error.max() < 1e-10, error.max()


@pytest.mark.slow
def test_calibration_rounds_the_layers_of_all_stacks_in_their_order(tmp_path, params):
    model, base = two_stacks(jnp.float32), jax.tree.map(np.float32, params)
    hf_write.save_folder(tmp_path, model, base, None)
    readers = param_readers(hf_read.open_folder(tmp_path), model)
    rows = CalibrationRows(*(np.asarray(x) for x in (BATCH.ids, BATCH.segments, BATCH.positions)))
    found = list(calibrate_layers(model, readers, Quant("int8"), rows, {}))
    assert [len(layer.weights) for layer in found] == [7, 3, 7, 3, 7]
    for number, layer in enumerate(found):
        assert all(name.startswith(f"model.layers.{number}.") for name in layer.weights)
    weight = dequantize(found[3].weights["model.layers.3.recurrence.out_proj.weight"])
    expected = base["blocks"]["recurrent"]["mix"]["out"][1]
    assert 0 < np.abs(weight - expected).max() < 0.02 * np.abs(expected).max()
