"""Loss, gradients and metrics on every mesh equal those of one device, for full, LoRA and QLoRA training."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pair_batches import laid, random_pairs
from rl_completions import episodes_of
from test_attention import arrays, packed, value_and_gradients
from tiny_model import assert_close, batch_of, examples, micro, tiny

from jaxft.data.packing.pack import RowShape
from jaxft.data.packing.row_tasks import TokenisedPrompts
from jaxft.data.rows.example import Completion
from jaxft.distributed import sharding
from jaxft.distributed.sharding import MeshShape, make_mesh
from jaxft.nn import tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.attention import attention
from jaxft.nn.attention.flash_attention import key_ranges
from jaxft.nn.param_spec import spec_paths
from jaxft.nn.quant import is_qtensor, quantize
from jaxft.objectives.losses import preference_losses as P
from jaxft.objectives.losses.policy_losses import clipped
from jaxft.objectives.policy import policy, value_function
from jaxft.objectives.preference import preference
from jaxft.objectives.read_positions import SPARE_SLOTS, read_sharding
from jaxft.objectives.sft import sft
from jaxft.rl.rollout_layout import pack_episodes
from jaxft.train.step import accumulate_gradients
from jaxft.weights import storage
from jaxft.weights.edit.lora_start import init_magnitudes

MESHES = {
    "1x8": MeshShape(1, 8),
    "2x2x2": MeshShape(2, 2, 2),
    "context 2": MeshShape(1, 2, 2, context=2),
    "context 4 in slices": MeshShape(1, 1, context=4, slices=2),
}


pytestmark = pytest.mark.usefixtures("x64")


def make_model(kind):
    """Return (model, parameters, pattern of trainable paths) for full, LoRA or QLoRA (NF4) training."""
    if kind == "full":
        model, params = tiny(tied=True)
        return model, params, ".*"
    if kind == "lora and others":  # a tied head reads the rows of tokens
        settings = dict(
            rank_pattern=(("q", 6),), modules_to_save=("final_norm",), trainable_token_indices=(3, 9)
        )
        model, params = tiny(tied=True, adapter=Adapter(rank=4, targets=("q", "o"), **settings))
        return model, params, "adapter/.*/([ab]|weight|rows)"
    if kind == "lora on tables":
        model, params = tiny(adapter=Adapter(rank=4, targets=("q", "embed"), modules_to_save=("head",)))
        return model, params, "adapter/.*/([ab]|weight)"
    targets, dora = ("q", "o", "down", "head"), kind == "qlora"
    model, params = tiny(adapter=Adapter(rank=4, targets=targets, dora=dora))
    if kind == "qlora":
        blocks = {"embed": 2, "head": 16}  # a vocabulary of 40, sharded over everything but data
        pack = lambda path, x: x if "norm" in path else quantize(x, "nf4", blocks.get(path, 8))  # noqa: E731
        base = tree.map_with_path(pack, params["base"])
        params = {**params, "base": base, "adapter": init_magnitudes(base, params["adapter"])}
    return model, params, "adapter/.*/([ab]|magnitude)"


def rows_of(task):
    """Return a batch [1, rows, ...]: packed rows for sft, pairs with shared prompts for dpo."""
    if task == "dpo":
        return micro(laid(random_pairs(16), rows=8, room=(72, 48, 4)), 1)
    rows = examples(16)
    return micro(
        batch_of([rows[i : i + 2] for i in range(0, 16, 2)], 32, 32, 1 / sum(len(i) - p for i, p in rows)), 1
    )


def gradient_of(task, parts, batch, mesh=None):
    """Return (gradients, metrics) of an optimizer batch; with a mesh, sharded as in a run."""
    model, params, pattern = parts
    if mesh is not None:
        specs = spec_paths(model.specs)

        def shard(path, x):
            return jax.tree.map(jax.device_put, x, storage.leaf_sharding(specs[path], x, mesh, path))

        params = tree.map_with_path(shard, params, is_leaf=is_qtensor)
        batch = sharding.shard_batch(mesh, batch)
    objective = sft(model) if task == "sft" else preference(model, P.dpo)
    mask = tree.map_with_path(lambda path, _: bool(re.fullmatch(pattern, path)), params, is_leaf=is_qtensor)

    def both(trainable, frozen, batch):
        return accumulate_gradients(objective, (trainable, frozen), batch, jax.random.key(0), {})

    trainable, frozen = (
        jax.tree.map(lambda x, m, side=side: x if m is side else None, params, mask, is_leaf=is_qtensor)
        for side in (True, False)
    )
    run = jax.jit(both, compiler_options={"xla_backend_optimization_level": 0})
    return jax.device_get(run(trainable, frozen, batch))


KINDS = {
    "sft": ("full", "lora", "lora and others", "lora on tables", "qlora"),
    "dpo": ("full", "lora", "qlora"),
}
CASES = [
    pytest.param(task, kind, mesh, id=f"{task}-{kind}-{mesh}")
    for task, kinds in KINDS.items()
    for kind in kinds
    for mesh in MESHES
]


@functools.cache
def on_one_device(task, kind):
    result = gradient_of(task, make_model(kind), rows_of(task))
    assert max(np.abs(g).max() for g in jax.tree.leaves(result[0])) > 1e-3
    return result


@pytest.mark.quick_cases(
    "sft-full-context 2", "sft-lora and others-2x2x2", "dpo-full-context 2", "dpo-lora-2x2x2"
)
@pytest.mark.parametrize("task, kind, mesh", CASES)
def test_every_mesh_has_the_loss_and_gradients_of_one_device(task, kind, mesh):
    one, devices = on_one_device(task, kind), make_mesh(MESHES[mesh])
    with jax.set_mesh(devices):
        assert_close(gradient_of(task, make_model(kind), rows_of(task), devices), one)


@pytest.mark.quick_cases("8-4-context 4", "8-2-context 4", "6-2-context 2")
@pytest.mark.parametrize(
    "mesh",
    [MeshShape(2, context=4), MeshShape(1, context=8), MeshShape(2, context=2, tensor=2)],
    ids=["context 4", "context 8", "context 2"],
)
@pytest.mark.parametrize("heads, kv_heads", [(8, 4), (8, 2), (6, 2)])
def test_attention_with_sharded_time_equals_one_device(mesh, heads, kv_heads):
    """Heads that divide over tensor x context, replicated kv heads, and heads that do not divide."""
    rng, devices = np.random.default_rng(8), make_mesh(mesh)
    q, k, v, do = arrays(rng, 2, 40, heads, kv_heads, 8, jnp.float64)
    rows = key_ranges(*packed(rng, 2, 40))
    expected = value_and_gradients(attention.dense, q, k, v, do, rows)
    shard = lambda x, *axes: jax.device_put(x, sharding.array_sharding(devices, axes, x.shape))  # noqa: E731
    axes = ("heads", "kv_heads", "kv_heads", "heads")
    sharded = [
        shard(x, "rows", "time", axis, "head_dim") for x, axis in zip((q, k, v, do), axes, strict=True)
    ]
    with jax.set_mesh(devices):
        assert_close(value_and_gradients(attention.attention, *sharded, rows), expected)


def test_read_positions_are_grouped_by_shard_of_time():
    with jax.set_mesh(make_mesh(MeshShape(1, 1, context=8))):
        read = jnp.asarray([[0, 1, 2, 2, 15, 16, 63, 0, 0], [62, 63, 0, 0, 0, 0, 0, 0, 0]], jnp.int32)
        slots = read_sharding(read, 64)
        assert slots.num_shards == 8 and slots.read_of.shape == (2, 8 * 9)
        round_trip = jnp.take_along_axis(slots.read_of, slots.slot_of, 1)
        assert round_trip.tolist() == [list(range(9))] * 2
        assert (slots.slot_of // 9 == read // 8).all()
        # more padding reads than slots in a shard: the first ones get the slots
        crowded = read_sharding(jnp.zeros((1, 40), jnp.int32), 64)
        used = 8 + SPARE_SLOTS
        assert crowded.read_of.shape == (1, 8 * used)
        assert crowded.read_of[0, :used].tolist() == list(range(used))
        assert (crowded.read_of[0, used:] == -1).all()
        assert (crowded.slot_of < crowded.read_of.shape[1]).all()


@pytest.mark.quick_cases("8")
@pytest.mark.parametrize("prompt", [7, 8, 9, 12])
def test_completions_of_a_group_share_the_prompt_also_across_shards_of_time(prompt):
    """The last prompt token is before, at or after the shard boundary at 8."""
    group, length = 20, 64
    prompts = TokenisedPrompts((tuple(range(1, prompt + 1)),), ("row",), (Completion("row", "", ""),), ({},))
    lengths = np.full((1, group), 2)
    lengths[0, 0] = 10  # the first completion fills the rest of the shard
    episodes = episodes_of(prompts, np.ones((1, group, 10), np.int32), lengths)
    rows = jax.tree.map(jnp.asarray, pack_episodes(episodes, [RowShape(length, length)]).rows)
    values, h = (
        value_function(lambda params, batch, h: h, lambda params, h: h[:, :, 0]),
        jnp.arange(float(length))[None, :, None],
    )
    model, params, _ = make_model("full")

    def logps():
        return jax.jit(lambda: policy(model, clipped).forward(params, rows, None, {}).logp)()

    one_device = values(None, rows, h), logps()
    with jax.set_mesh(make_mesh(MeshShape(1, 1, context=8))):
        sharded = values(None, rows, h), logps()
    real = np.asarray(rows.responses[0] < group)
    assert real.sum() == lengths.sum()
    for actual, expected in zip(sharded, one_device, strict=True):
        np.testing.assert_allclose(np.asarray(actual)[0][real], np.asarray(expected)[0][real], rtol=1e-10)


def test_rows_that_do_not_divide_over_context_are_an_error():
    model, params, _ = make_model("full")
    with (
        jax.set_mesh(make_mesh(MeshShape(2, context=4))),
        pytest.raises(
            ValueError,
            match="rows of 30 tokens do not divide over mesh.context=4; "
            "use a data.max_length that is divisible by 4",
        ),
    ):
        model.hidden(params, batch_of([[e] for e in examples(4)], 30, 16, 1.0))[0]
