"""Collectives of a compiled train step on a mesh: every array is moved once, in its storage format."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from partitioned import moved

from jaxft.data.pairs import PairRows
from jaxft.data.sft import Rows
from jaxft.distributed.sharding import MeshShape
from jaxft.models.families.llama import LlamaConfig, llama
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.quant import Quant
from jaxft.objectives.losses.preference_losses import dpo
from jaxft.objectives.preference import preference
from jaxft.objectives.sft import sft
from jaxft.optim import optimizer
from jaxft.train import programs
from jaxft.train.settings import Run

# T equals no size of a weight or of a shard of one, so a shape identifies the array.
CONFIG = LlamaConfig(
    vocab=2048, width=256, layers=3, heads=8, kv_heads=4, head_dim=40, mlp=768, max_positions=512
)
T, RANK = 144, 8
MESHES = {
    "fsdp": MeshShape(1, 8),
    "tensor": MeshShape(1, 2, 4),
    "context": MeshShape(1, 2, 2, context=2),
    "slices": MeshShape(1, 2, context=2, slices=2),
}
WIDE = ("f32", "f64")


def lowered(kind, task, mesh):
    rows = (
        Rows("none", max_length=T, batch=16)
        if task == "sft"
        else PairRows("none", max_length=T // 2, batch=8)
    )
    run = Run(
        name="x",
        weights="none",
        model=llama(CONFIG, jnp.bfloat16, remat="full"),
        objective=sft if task == "sft" else lambda model: preference(model, dpo),
        data=rows,
        adapter=None if kind == "full" else Adapter(rank=RANK),
        quant=Quant("nf4") if kind == "qlora" else None,
        mesh=mesh,
        optim=optimizer.Optim(),
    )
    p, batch = programs.abstract(run)
    with jax.set_mesh(p.mesh):
        return p.train_step.lower(p.state, p.frozen, batch)


@pytest.mark.quick_cases("qlora-sft-slices")
@pytest.mark.parametrize(
    "kind, task, mesh",
    [
        ("full", "sft", "fsdp"),
        ("full", "sft", "context"),
        ("lora", "dpo", "tensor"),
        ("qlora", "sft", "slices"),
    ],
)
def test_train_step_moves_every_array_once_in_its_storage_format(kind, task, mesh, tmp_path, capfd):
    transfers = moved(lowered(kind, task, MESHES[mesh]), tmp_path)
    assert "rematerialization" not in capfd.readouterr().err
    assert transfers and {m.kind for m in transfers} & {"all-gather", "all-reduce"}
    large = [m for m in transfers if m.size > T * 16]

    # nothing stacked over layers: parameters, gradients, optimizer state
    assert not [m for m in large if m.shape[0] == CONFIG.layers]

    loops = [m for m in large if m.kind == "all-gather" and "while" in m.where]
    assert all(m.size <= CONFIG.width * CONFIG.mlp for m in loops)  # one layer's largest weight
    outside = Counter(m.shape for m in large if m.kind == "all-gather" and "while" not in m.where)
    shards = {"tensor": 4, "context": 2}.get(mesh, 1)
    assert all(set(shape) == {CONFIG.vocab // shards, CONFIG.width} for shape in outside), outside
    passes = 2 if task == "dpo" else 1  # policy and reference
    assert sum(outside.values()) <= 2 * passes  # embedding table and head

    def of_weights(m):
        """Whether the shape is that of a parameter gradient: two dimensions, neither of them rows or time."""
        sizes = {
            CONFIG.width,
            CONFIG.mlp,
            CONFIG.vocab,
            RANK,
            CONFIG.heads * CONFIG.head_dim,
            CONFIG.kv_heads * CONFIG.head_dim,
        }
        dims = [n for n in m.shape if n != 1]
        return len(dims) == 2 and set(dims) <= {size // parts for size in sizes for parts in (1, 2, 4, 8)}

    assert not [m for m in large if m.dtype in WIDE and not of_weights(m)]  # activations are moved in 16 bits
    if kind != "full":
        stored = {"u16"} if kind == "lora" else {"u8", "u16", "f32"}
        gathers = {m.dtype for m in loops if RANK not in m.shape}
        assert gathers <= stored and ("u8" in gathers or kind == "lora")
        sizes = {CONFIG.mlp, CONFIG.mlp // shards}
        dequantised = ("bf16", *WIDE)
        assert not [
            m for m in loops if m.dtype in dequantised and sizes & set(m.shape) and RANK not in m.shape
        ]
