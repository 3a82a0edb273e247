"""Plans of a tiny run: its programs, their bytes by part, and what scripts/plan.py prints.

Tests that compile for NVIDIA GPUs need jax's CUDA plugin and those for TPUs libtpu, or are skipped.
"""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from tiny_plan import CHIP, HAS_CUDA, HAS_TPU, TINY, made_up, tiny, tiny_pairs, tiny_ppo

from jaxft.distributed import sharding
from jaxft.engine.sampling import Sampling
from jaxft.nn.quant import Quant
from jaxft.plan import machines, plan, plan_report
from jaxft.train import programs

ROOT = Path(__file__).resolve().parents[2]


def test_parts_sum_to_the_total_and_cover_all_arguments():
    run = tiny(mesh=sharding.MeshShape(data=2, fsdp=4), quant=Quant("nf4"))
    found = plan.plan(run, made_up())
    assert found.total == sum(found.parts.values())
    rows = 6 * 2 * 8 * 64 * 4 // 8  # arrays of a batch, microbatches, rows, tokens, bytes, over eight devices
    assert rows <= found.parts["batch and counters"] < rows + 256  # all other arguments are accounted for
    assert found.parts["adapters"] < found.parts["optimizer"] < 2.1 * found.parts["adapters"]  # two moments
    assert found.parts["quantised base"] > 0 and found.fits and found.limit == CHIP.memory - CHIP.reserved
    assert json.loads(json.dumps(found.json()))["flops_per_token"] > 0
    assert found.collectives["all-gather"]["within"] > 0 and found.collectives["all-gather"]["across"] == 0
    text = plan_report.plan_report(found)
    assert "quantised base" in text and "fits," in text and "MFU" in text and "assumed:" in text


def test_a_run_has_a_program_for_each_of_its_phases():
    def names(run):
        p, _ = programs.abstract(run, jax.devices()[:1])
        with jax.set_mesh(p.mesh):
            return [one.name for one in plan.all_programs(run, p) if one.trace().jaxpr.jaxpr.eqns]

    # for SFT, general text is the evaluation program
    assert names(tiny(general="text")) == [
        "train step",
        "evaluation",
        "sample completions: prefill",
        "sample completions",
    ]
    bare = tiny(samples=0)
    assert names(replace(bare, data=replace(bare.data, held_out=None))) == ["train step"]
    assert names(tiny_pairs(general="text")) == [
        "train step",
        "evaluation",
        "sample completions: prefill",
        "sample completions",
        "general text",
        "reference log-probs",
    ]


def test_resident_bytes_are_equal_in_all_programs():
    found = plan.plans(tiny(samples=64, sampling=Sampling(max_new=400)), made_up(2))
    sizes = {p.program: p for p in found}
    assert [p.total for p in found] == sorted((p.total for p in found), reverse=True) and len(found) == 4
    resident = {p.total - sum(p.parts.get(name, 0) for name in plan.PROGRAM_PARTS) for p in found}
    assert len(resident) == 1  # weights, adapters and optimizer state
    # keys and values, rows over two devices; 448 slots of a completion are the next multiple of 64
    cache = TINY.layers * 64 * (64 + 448) * TINY.kv_heads * TINY.head_dim * 2 * 4 // 2
    step, sampling = sizes["train step"], sizes["sample completions"]
    assert cache < sampling.parts[plan.SAMPLER] < 1.1 * cache
    assert found[0] is sampling
    assert step.flops and step.estimate and sampling.flops is sampling.estimate is None
    text = plan_report.programs_report(found)
    assert "the largest is sample completions: fits," in text and all(name in text for name in sizes)
    assert "sample completions on" in plan_report.plan_report(sampling)
    small = plan_report.record(step, [replace(p, missing=1) if p is sampling else p for p in found])
    assert not small["fits"] and small["programs"]["train step"]["fits"] and small["total"] == step.total
    assert json.loads(json.dumps(small))["programs"] == small["programs"]


def test_a_rollout_plan_has_all_programs():
    found = {p.program: p for p in plan.plans(tiny_ppo(), made_up(2))}
    assert found.keys() == {
        "train step",
        "rollout sampling: prefill",
        "rollout sampling",
        "rollout log-probs",
        "reward head reward",
    }
    assert (
        len({p.total - sum(p.parts.get(name, 0) for name in plan.PROGRAM_PARTS) for p in found.values()}) == 1
    )
    # 4 prompts and 8 completions, over two devices
    cache = TINY.layers * (4 * 64 + 8 * 16) * TINY.kv_heads * TINY.head_dim * 2 * 4 // 2
    assert cache < found["rollout sampling"].parts[plan.SAMPLER] < 1.1 * cache
    assert found["train step"].flops and not found["rollout log-probs"].flops


def test_a_plan_that_does_not_fit_reports_the_missing_bytes():
    chip = replace(CHIP, memory=2**19 + 2**18, reserved=2**18)
    found = plan.plan(tiny(), machines.Machine("small", chip, jax.devices()[:1]))
    assert (
        not found.fits
        and found.missing == found.total - 2**19
        and "does not fit: exceeds the limit of 0.00 GiB by 0.0" in plan_report.plan_report(found)
    )


def test_the_script_plans_a_gemma_preset(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(machines, "machine", lambda name: made_up(1))
    script = runpy.run_path(str(ROOT / "scripts/plan.py"))
    config = ["--config", str(ROOT / "configs/gemma3_4b_sft.py"), "--devices", "made-up:1", "--train-only"]
    small = ["model=google/gemma-3-270m-it", "batch=2", "micro=1", "max_length=1024"]
    monkeypatch.setattr(sys, "argv", ["plan.py", *config, "--json", *small])
    assert script["main"]() == 0
    (found,) = map(json.loads, capsys.readouterr().out.splitlines())
    published = 268_098_176  # parameters of google/gemma-3-270m, with a tied head
    assert found["parts"]["weights"] == 2 * published and found["fits"], found


def planned(*argv, config="configs/llama32_sft.py"):
    command = [sys.executable, "scripts/plan.py", "--config", config, "--json", "--train-only", *argv]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not HAS_CUDA, reason="needs jax's CUDA plugin, pip install 'jaxft[cuda12]'")
def test_quantisation_and_fsdp_reduce_memory():
    (plain,), (packed,) = (
        planned("--devices", "h100:1", "batch=8", f"quant={kind}") for kind in ("none", "nf4")
    )
    (many,) = planned("--devices", "h100:8", "batch=8", "quant=nf4", "mesh.fsdp=8")
    assert (
        packed["parts"]["quantised base"] < 0.5 * plain["parts"]["weights"]
        and packed["total"] < plain["total"]
    )
    assert (
        many["parts"]["quantised base"] < packed["parts"]["quantised base"] / 4
        and many["total"] < packed["total"]
    )
    assert many["collectives"]["all-gather"]["within"] > 0 and "all-gather" not in packed["collectives"]
    assert 0 < max(packed["largest_arrays"].values()) <= packed["parts"]["activations and temporaries"]


@pytest.mark.skipif(not HAS_TPU, reason="needs libtpu, pip install 'jaxft[tpu]'")
def test_slices_replicate_weights_and_reduce_gradients_across():
    small = [
        "max_length=256",
        "batch={devices}",
        "micro=1",
        "model=HuggingFaceTB/SmolLM2-135M",
        "remat=full",
        "full=true",
    ]
    one, two = planned(
        "--devices",
        "v5e:2x2",
        "2xv5e:2x2",
        *small,
        "mesh.slices=-1",
        "mesh.fsdp=4",
        config="configs/llama31_8b_sft.py",
    )
    assert one["fits"] and one["devices"] == 4 and two["devices"] == 8
    assert (
        all(row["across"] == 0 for row in one["collectives"].values())
        and one["parts"]["weights"] == two["parts"]["weights"]
    )
    assert sum(row["across"] for row in two["collectives"].values()) > 0.5 * two["parts"]["weights"]


def test_a_quick_plan_has_a_note_on_tpus_only():
    tpu = machines.Machine("one TPU", None, [SimpleNamespace(platform="tpu")])
    assert not plan.quick_notes(tpu)
    plan.set_quick(True)
    try:
        assert "compiled with --quick" in plan.quick_notes(tpu)[0] and not plan.quick_notes(made_up())
    finally:
        plan.set_quick(False)
    assert not plan.quick_notes(tpu)
