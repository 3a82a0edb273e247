"""The laws of layout for every family, in float64: accumulation, packing, shared prompts, meshes, QLoRA."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pair_batches import assert_same, laid, loss_gradients_metrics, random_pairs, start_aux
from test_mesh_laws import MESHES, gradient_of, rows_of
from tiny_families import FAMILIES, our_model, params_of, torch_model
from tiny_model import assert_close, batch_of, examples, micro

from jaxft.batch import TrainState
from jaxft.distributed.sharding import make_mesh
from jaxft.models.adapted import adapted
from jaxft.nn import tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.param_spec import init_params
from jaxft.nn.quant import dequantize, is_qtensor, quantize
from jaxft.objectives.losses import preference_losses as P
from jaxft.objectives.preference import preference
from jaxft.objectives.sft import sft
from jaxft.optim.optimizer import Optim, make_optimizer
from jaxft.train.step import make_train_step
from jaxft.train.trainable_params import partition_params, split_params

pytestmark = pytest.mark.usefixtures("x64")
QUICK = ("qwen2 with windows",)  # rows of tests that aren't wholly slow


def quick_first(names):
    """Rows as test parameters. Those that are not QUICK are marked as slow."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


every_family = pytest.mark.parametrize("name", quick_first(FAMILIES))


def full_training(name):
    """(model over {"base"}, random parameters, pattern of the trainable ones) in float64."""
    model = our_model(name, jnp.float64)
    return adapted(model, None), {"base": params_of(torch_model(name).state_dict(), model, np.float64)}, ".*"


def lora(name):
    """The same with an adapter on every linear layer whose b is not zero."""
    model, params, _ = full_training(name)
    model = adapted(our_model(name, jnp.float64), Adapter(rank=3, alpha=6.0))
    adapter = init_params(model.specs["adapter"], jax.random.key(0), jnp.float64)
    key = jax.random.key(1)

    def moved(path, x):
        return (
            x + 0.1 * jax.random.normal(jax.random.fold_in(key, len(path)), x.shape) if path[-1] == "b" else x
        )

    return model, {**params, "adapter": tree.map_with_path(moved, adapter)}, "adapter/.*/[ab]"


@functools.cache
def on_one_device(name, task, kind):
    result = gradient_of(task, {"full": full_training, "lora": lora}[kind](name), rows_of(task))
    assert max(np.abs(g).max() for g in jax.tree.leaves(result[0])) > 1e-3
    return result


@every_family
@pytest.mark.parametrize("task", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_gradients_of_microbatches_add_up(name, task):
    batch = jax.tree.map(lambda x: x.reshape(4, x.shape[1] // 4, *x.shape[2:]), rows_of(task))
    assert_close(gradient_of(task, full_training(name), batch)[0], on_one_device(name, task, "full")[0])


@every_family
def test_packing_changes_no_gradient(name):
    some = examples(8)
    weight = 1 / sum(len(ids) - prompt for ids, prompt in some)
    alone = micro(batch_of([[e] for e in some], 16, 16, weight), 1)
    packed = micro(batch_of([some[:3], some[3:6], some[6:]], 48, 48, weight), 1)
    parts = full_training(name)
    assert_close(gradient_of("sft", parts, packed)[0], gradient_of("sft", parts, alone)[0])


@every_family
def test_pairs_that_share_a_prompt_have_the_gradient_of_separate_sequences(name):
    pairs, parts = random_pairs(8), full_training(name)
    shared, alone = (micro(laid(pairs, rows=8, room=(72, 48, 4), branches=s), 1) for s in (True, False))
    assert_close(gradient_of("dpo", parts, shared)[0], gradient_of("dpo", parts, alone)[0])


@pytest.mark.slow
@every_family
def test_a_coupled_loss_in_microbatches_equals_that_of_the_whole_batch(name):
    model, params, pattern = lora(name)
    mask = tree.map_with_path(lambda path, _: bool(re.fullmatch(pattern, path)), params)
    objective, pairs = preference(model, P.aot), laid(random_pairs(16), rows=8, room=(72, 48, 4))
    whole, parts = (
        loss_gradients_metrics(objective, params, mask, micro(pairs, count), start_aux(objective))
        for count in (1, 4)
    )
    assert_same(parts, whole)


@pytest.mark.slow
@every_family
def test_updates_inside_the_backward_pass_equal_updates_after_it(name):
    def two_steps(fused):
        model = our_model(name, jnp.float64, remat="full")
        t = partition_params(model, None, None)
        trainable, frozen = split_params(t, full_training(name)[1])
        settings = Optim(0.01, layerwise=True, fused_backward=fused, clip=None, warmup=0.0)
        made = make_optimizer(settings, t.trainable_specs, 10)
        step = jax.jit(make_train_step(sft(t.model), made, 0))
        state = TrainState(jnp.int32(0), trainable, made.init(trainable), {}, jnp.zeros(2, jnp.int32))
        for _ in range(2):
            state, _ = step(state, frozen, rows_of("sft"))
        return state.trainable

    assert_close(two_steps(True), two_steps(False))


def mesh_cases():
    """Every family on every mesh, full SFT and DPO with LoRA. All but one mesh of QUICK rows are slow."""
    cases = []
    for name in FAMILIES:
        for mesh in MESHES:
            for task, kind in (("sft", "full"), ("dpo", "lora")):
                quick = name in QUICK and task == "sft" and mesh == "context 2"
                marks = () if quick else pytest.mark.slow
                cases.append(pytest.param(name, task, kind, mesh, id=f"{name}-{task}-{mesh}", marks=marks))
    return cases


@pytest.mark.parametrize("name, task, kind, mesh", mesh_cases())
def test_every_mesh_has_the_loss_and_gradients_of_one_device(name, task, kind, mesh):
    parts, devices = {"full": full_training, "lora": lora}[kind](name), make_mesh(MESHES[mesh])
    with jax.set_mesh(devices):
        found = gradient_of(task, parts, rows_of(task), devices)
    assert_close(found, on_one_device(name, task, kind))


@pytest.mark.slow
@every_family
def test_a_quantised_base_has_the_gradients_of_the_dequantised_one(name):
    model, params, pattern = lora(name)

    def pack(path, x):
        return quantize(x, "nf4", 8) if path.startswith("base/layers") and x.ndim == 3 else x

    packed = tree.map_with_path(pack, params)
    assert sum(is_qtensor(x) for x in jax.tree.leaves(packed, is_leaf=is_qtensor)) >= 4
    plain = jax.tree.map(
        lambda x: dequantize(x).astype(np.float64) if is_qtensor(x) else x, packed, is_leaf=is_qtensor
    )
    found, expected = (gradient_of("sft", (model, p, pattern), rows_of("sft")) for p in (packed, plain))
    assert_close(found[0], expected[0], rtol=1e-9)
