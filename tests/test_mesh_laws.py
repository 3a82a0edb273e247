"""The laws of layout: loss, gradients and metrics of one device on every kind of mesh, for what is trained and held in every way."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pair_batches import laid, random_pairs
from tiny_model import assert_close, batch_of, examples, micro, one_by_one, tiny

from jaxft import attention, prepare, sharding, tree
from jaxft.accumulate import accumulated
from jaxft.lora import Adapter
from jaxft.objectives import preference as P
from jaxft.objectives.pairwise import preference
from jaxft.objectives.reads import EXTRA, placed
from jaxft.objectives.sft import sft
from jaxft.params import spec_paths
from jaxft.quant import is_qtensor, quantize
from jaxft.sharding import MeshShape, make_mesh

MESHES = {
    "1x8": MeshShape(1, 8),
    "2x2x2": MeshShape(2, 2, 2),
    "context 2": MeshShape(1, 2, 2, context=2),
    "context 4 in slices": MeshShape(1, 1, context=4, slices=2),
}


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


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
    return micro(batch_of([some[i : i + 2] for i in range(0, 16, 2)], 32, 32, 1 / sum(len(i) - p for i, p in some)), 1)


def gradient_of(task, parts, batch, mesh=None):
    """(gradients, metrics) of a whole optimizer batch; a mesh has it laid out as a run lays it."""
    model, whole, trained = parts
    if mesh is not None:
        model = model.with_attention(attention.choose(mesh, 8, jnp.float64))
        specs = spec_paths(model.specs)
        lay = lambda path, x: jax.tree.map(jax.device_put, x, prepare.place(specs[path], x, mesh, path))  # noqa: E731
        whole, batch = tree.map_with_path(lay, whole, is_leaf=is_qtensor), sharding.place_batch(mesh, batch)
    objective = sft(model) if task == "sft" else preference(model, P.dpo)
    mask = tree.map_with_path(lambda path, _: bool(re.fullmatch(trained, path)), whole, is_leaf=is_qtensor)

    def both(trainable, frozen, batch):
        return accumulated(objective, (trainable, frozen), batch, jax.random.key(0), {})

    trainable, frozen = (
        jax.tree.map(lambda x, m, side=side: x if m is side else None, whole, mask, is_leaf=is_qtensor) for side in (True, False)
    )
    run = jax.jit(both, compiler_options={"xla_backend_optimization_level": 0})
    return jax.device_get(run(trainable, frozen, batch))


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_every_mesh_has_the_loss_and_gradients_of_one_device(task, kind, capfd):
    parts, batch = kind_of(kind), rows_of(task)
    one = gradient_of(task, parts, batch)
    assert max(np.abs(g).max() for g in jax.tree.leaves(one[0])) > 1e-3
    for shape in MESHES.values():
        mesh = make_mesh(shape)
        with jax.set_mesh(mesh):
            assert_close(gradient_of(task, parts, batch, mesh), one)
    err = capfd.readouterr().err
    assert "rematerialization" not in err, err
