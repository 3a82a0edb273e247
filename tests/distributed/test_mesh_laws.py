"""The laws of layout: loss, gradients and metrics of one device on every kind of mesh, for all that is trained and held."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pair_batches import laid, random_pairs
from test_attention import arrays, packed, value_and_gradients
from tiny_model import assert_close, batch_of, examples, micro, tiny

from jaxft import tree
from jaxft.data.pack import RowShape
from jaxft.data.prompts import TokenisedPrompts
from jaxft.distributed import sharding
from jaxft.distributed.sharding import MeshShape, make_mesh
from jaxft.nn import attention
from jaxft.nn.lora import Adapter
from jaxft.nn.param import spec_paths
from jaxft.nn.quant import is_qtensor, quantize
from jaxft.objectives import preference_losses as P
from jaxft.objectives.critic import value_function
from jaxft.objectives.policy import policy
from jaxft.objectives.policy_losses import clipped
from jaxft.objectives.preference import preference
from jaxft.objectives.read_positions import SPARE_SLOTS, read_sharding
from jaxft.objectives.sft import sft
from jaxft.rl.layout import pack_rollout
from jaxft.train.step import accumulate_gradients
from jaxft.weights import storage

MESHES = {
    "1x8": MeshShape(1, 8),
    "2x2x2": MeshShape(2, 2, 2),
    "context 2": MeshShape(1, 2, 2, context=2),
    "context 4 in slices": MeshShape(1, 1, context=4, slices=2),
}


pytestmark = pytest.mark.usefixtures("x64")


def kind_of(kind):
    """(model, its whole tree, what is trained) in full, with an adapter, or with one on a base in 4 bits."""
    if kind == "full":
        model, whole = tiny(tied=True)
        return model, whole, ".*"
    model, whole = tiny(adapter=Adapter(rank=4, targets=("q", "o", "down", "head")))
    if kind == "qlora":
        blocks = {"embed": 2, "head": 16}  # 40 of a vocabulary, cut over everything but data
        pack = lambda path, x: x if "norm" in path else quantize(x, "nf4", blocks.get(path, 8))  # noqa: E731
        whole = {**whole, "base": tree.map_with_path(pack, whole["base"])}
    return model, whole, "adapter/.*/[ab]"


def rows_of(task):
    """A batch [1, rows, ...]: packed rows for sft, pairs with shared prompts for dpo."""
    if task == "dpo":
        return micro(laid(random_pairs(16), rows=8, room=(72, 48, 4)), 1)
    some = examples(16)
    return micro(
        batch_of([some[i : i + 2] for i in range(0, 16, 2)], 32, 32, 1 / sum(len(i) - p for i, p in some)), 1
    )


def gradient_of(task, parts, batch, mesh=None):
    """(gradients, metrics) of a whole optimizer batch; a mesh has it laid out as a run lays it."""
    model, whole, trained = parts
    if mesh is not None:
        specs = spec_paths(model.specs)

        def lay(path, x):
            return jax.tree.map(jax.device_put, x, storage.leaf_sharding(specs[path], x, mesh, path))

        whole, batch = tree.map_with_path(lay, whole, is_leaf=is_qtensor), sharding.shard_batch(mesh, batch)
    objective = sft(model) if task == "sft" else preference(model, P.dpo)
    mask = tree.map_with_path(lambda path, _: bool(re.fullmatch(trained, path)), whole, is_leaf=is_qtensor)

    def both(trainable, frozen, batch):
        return accumulate_gradients(objective, (trainable, frozen), batch, jax.random.key(0), {})

    trainable, frozen = (
        jax.tree.map(lambda x, m, side=side: x if m is side else None, whole, mask, is_leaf=is_qtensor)
        for side in (True, False)
    )
    run = jax.jit(both, compiler_options={"xla_backend_optimization_level": 0})
    return jax.device_get(run(trainable, frozen, batch))


QUICK = {
    ("sft", "full"): ("1x8", "context 2"),
    ("sft", "lora"): ("2x2x2",),
    ("sft", "qlora"): ("context 2",),
    ("dpo", "full"): ("context 2",),
    ("dpo", "lora"): ("1x8", "context 4 in slices"),
    ("dpo", "qlora"): ("2x2x2",),
}
CASES = [
    pytest.param(*what, mesh, id="-".join((*what, mesh)), marks=() if mesh in quick else pytest.mark.slow)
    for what, quick in QUICK.items()
    for mesh in MESHES
]


@functools.cache
def on_one_device(task, kind):
    found = gradient_of(task, kind_of(kind), rows_of(task))
    assert max(np.abs(g).max() for g in jax.tree.leaves(found[0])) > 1e-3
    return found


@pytest.mark.parametrize("task, kind, mesh", CASES)
def test_every_mesh_has_the_loss_and_gradients_of_one_device(task, kind, mesh):
    one, laid_out = on_one_device(task, kind), make_mesh(MESHES[mesh])
    with jax.set_mesh(laid_out):
        assert_close(gradient_of(task, kind_of(kind), rows_of(task), laid_out), one)


@pytest.mark.parametrize(
    "mesh", [MeshShape(2, context=4), MeshShape(1, context=8), MeshShape(2, context=2, tensor=2)], ids=str
)
@pytest.mark.parametrize("heads, kv_heads", [(8, 4), (8, 2), (6, 2)])
def test_attention_on_a_mesh_that_cuts_time_is_that_of_whole_rows(mesh, heads, kv_heads):
    """Heads that divide over tensor x context, key heads that several devices share, and heads that don't divide."""
    rng, laid_out = np.random.default_rng(8), make_mesh(mesh)
    q, k, v, do = arrays(rng, 2, 40, heads, kv_heads, 8, jnp.float64)
    segments, branches = packed(rng, 2, 40)
    wanted = value_and_gradients(attention.dense, q, k, v, do, segments, branches)
    lay = lambda x, *axes: jax.device_put(x, sharding.array_sharding(laid_out, axes, x.shape))  # noqa: E731
    axes = ("heads", "kv_heads", "kv_heads", "heads")
    cut = [lay(x, "rows", "time", axis, "head_dim") for x, axis in zip((q, k, v, do), axes, strict=True)]
    with jax.set_mesh(laid_out):
        assert_close(value_and_gradients(attention.attention, *cut, segments, branches), wanted)


def test_reads_of_parts_of_the_time_have_places_of_their_own():
    with jax.set_mesh(make_mesh(MeshShape(1, 1, context=8))):
        read = jnp.asarray([[0, 1, 2, 2, 15, 16, 63, 0, 0], [62, 63, 0, 0, 0, 0, 0, 0, 0]], jnp.int32)
        places = read_sharding(read, 64)
        assert places.parts == 8 and places.read_of.shape == (2, 8 * 9)
        found = jnp.take_along_axis(places.read_of, places.slot_of, 1)
        assert found.tolist() == [list(range(9))] * 2  # there and back
        part = places.slot_of // 9
        assert (part == read // 8).all()
        crowded = read_sharding(
            jnp.zeros((1, 40), jnp.int32), 64
        )  # padding beyond what a part has room for: the first ones stay
        assert crowded.read_of.shape == (1, 8 * (8 + SPARE_SLOTS)) and crowded.read_of[
            0, : 8 + SPARE_SLOTS
        ].tolist() == list(range(8 + SPARE_SLOTS))
        assert (crowded.read_of[0, 8 + SPARE_SLOTS :] == -1).all() and (
            crowded.slot_of < crowded.read_of.shape[1]
        ).all()


@pytest.mark.parametrize("prompt", [7, 8, 9, 12])
def test_a_group_s_prompt_is_read_once_for_each_of_its_completions_also_where_the_time_is_cut(prompt):
    """Its last token stands before, at, and after the cut at 8; the first completion fills the rest of the part."""
    group, length = 20, 64
    asked = TokenisedPrompts((tuple(range(1, prompt + 1)),), ("row",), ("",), ({},))
    lengths = np.full((1, group), 2)
    lengths[0, 0] = 10
    rows = pack_rollout(asked, np.ones((1, group, 10), np.int32), lengths, RowShape(length, length))
    rows = jax.tree.map(jnp.asarray, rows)
    values, h = (
        value_function(lambda params, batch, h: h, lambda params, h: h[:, :, 0]),
        jnp.arange(float(length))[None, :, None],
    )
    model, whole, _ = kind_of("full")
    seen = lambda: jax.jit(lambda: policy(model, clipped).forward(whole, rows, None, {}).logp)()  # noqa: E731
    plain = values(None, rows, h), seen()
    with jax.set_mesh(make_mesh(MeshShape(1, 1, context=8))):
        cut = values(None, rows, h), seen()
    real = np.asarray(rows.answers[0] < group)
    assert real.sum() == lengths.sum()
    for found, wanted in zip(cut, plain, strict=True):
        np.testing.assert_allclose(np.asarray(found)[0][real], np.asarray(wanted)[0][real], rtol=1e-10)


def test_rows_that_context_does_not_cut_evenly_are_refused():
    model, whole, _ = kind_of("full")
    with (
        jax.set_mesh(make_mesh(MeshShape(2, context=4))),
        pytest.raises(
            ValueError,
            match="rows of 30 tokens do not divide over mesh.context=4; use a data.max_length that does",
        ),
    ):
        model.hidden(whole, batch_of([[e] for e in examples(4)], 30, 16, 1.0))
