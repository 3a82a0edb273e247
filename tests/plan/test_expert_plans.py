"""Runs of a toy mixture of experts: bytes of each part, programs for a mesh that shards experts, refusals."""

from dataclasses import replace

import jax.numpy as jnp
import pytest
import tiny_experts
from tiny_experts import CONFIG, KERNELS
from tiny_plan import made_up

from jaxft.data.sft import Rows
from jaxft.distributed.sharding import MeshShape
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.quant import Quant
from jaxft.objectives.sft import sft
from jaxft.optim import rules
from jaxft.optim.optimizer import Optim
from jaxft.plan import plan, program_bytes
from jaxft.train import programs
from jaxft.train.settings import Run
from jaxft.weights.edit.calibrated_base import calibrate_layers

EXPERTS = "layers/mlp/experts"
MODEL = tiny_experts.experts(replace(CONFIG, vocab=512, max_positions=256), jnp.float32)
ROWS = Rows("none", batch=8, micro=1, max_length=32)
SHARDED, REPLICATED = MeshShape(4, expert=2), MeshShape(8)


def a_run(mesh=REPLICATED, **changes):
    """QLoRA of the experts alone."""
    settings = dict(adapter=Adapter(rank=4, targets=KERNELS), quant=Quant("nf4", 8, False, f"{EXPERTS}/.*"))
    return Run("tiny", "tiny", MODEL, sft, ROWS, mesh=mesh, **{**settings, **changes})


def test_memory_counts_every_expert_and_a_mesh_shards_them():
    split, whole = (program_bytes.resident(programs.build(a_run(mesh), 10)) for mesh in (SHARDED, REPLICATED))
    values, stacks = 3 * 2 * 3 * 32 * 48, 3 * 2
    assert whole["quantised base"] == values // 2 + 4 * values // 8  # codes, and float32 scales of blocks
    assert whole["adapters"] == 4 * stacks * 3 * (4 * (32 + 48) + 1)  # a, b and scale of three kernels
    for part in ("quantised base", "adapters"):
        assert split[part] == whole[part] // 2


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["qlora", "full with muon"])
def test_the_programs_of_a_run_compile_for_a_mesh_that_shards_experts(full):
    changes = dict(adapter=None, quant=None, optim=Optim(optimizer=rules.muon)) if full else {}
    run = a_run(SHARDED, **changes)
    found = plan.plan(run, made_up())
    assert (
        found.fits
        and found.parts.get("adapters", 0) == program_bytes.resident(programs.build(run, 10))["adapters"]
    )


def test_statistics_of_inputs_are_refused_where_every_expert_has_inputs_of_its_own():
    with pytest.raises(
        ValueError, match=f"{EXPERTS}/down has a kernel for each of its experts, which cannot be calibrated"
    ):
        next(calibrate_layers(MODEL, {}, Quant("nf4", 8, calibrate="rows.jsonl"), None, {}))
    with pytest.raises(ValueError, match=f"adapter.init=eva .*; leave {EXPERTS}/up out of adapter.targets"):
        programs.build(a_run(adapter=Adapter(targets=("q", "up"), init="eva"), quant=None), 10)
