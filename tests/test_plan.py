"""The planner: names of machines, and where the CUDA plugin is installed the bytes of a small run on one and on eight GPUs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxft import plan

ROOT = Path(__file__).resolve().parents[1]
HAS_CUDA = importlib.util.find_spec("jax_plugins.xla_cuda12") is not None if importlib.util.find_spec("jax_plugins") else False


@pytest.mark.parametrize("name", ["h100", "h100:0x", "b300:8", "h100:2x2x2", "../h100:1", ""])
def test_an_unknown_machine_is_one_line(name):
    with pytest.raises(ValueError, match="is not known; use h100:GPUS, or :HOSTSxGPUS for several hosts"):
        plan.devices(name)


def test_the_largest_arrays_are_those_that_are_made_and_kept():
    def program(w, x):  # the table is given, the sum within a fusion is never in memory
        return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), h), x, w)[1] ** 2) + jnp.sum(jnp.outer(x, x)[None] + w)

    w, x = jax.ShapeDtypeStruct((7, 90, 90), jnp.float32), jax.ShapeDtypeStruct((90,), jnp.float32)
    found = plan.largest(jax.jit(program).lower(w, x).compile().as_text())
    assert "f32[7,90,90]" not in found and found["f32[7,90]"] == 7 * 90 * 4
    assert plan.largest("") == {}


@pytest.mark.skipif(HAS_CUDA, reason="the CUDA plugin is installed")
def test_without_the_plugin_it_says_what_to_install():
    with pytest.raises(ValueError, match=r"takes jax's CUDA plugin: pip install 'jaxft\[cuda12\]'"):
        plan.devices("h100:1")


def planned(*argv):
    command = [sys.executable, "scripts/plan.py", "--config", "configs/llama32_1b_sft.py", "--json", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not HAS_CUDA, reason="takes jax's CUDA plugin, pip install 'jaxft[cuda12]'")
def test_a_quantised_run_takes_less_and_eight_gpus_take_their_share():
    plain, packed = (planned("--devices", "h100:1", "batch=8", f"quant={kind}") for kind in ("none", "nf4"))
    many = planned("--devices", "h100:8", "batch=8", "quant=nf4", "mesh.fsdp=8")
    assert packed["frozen base"] < 0.5 * plain["frozen base"] and packed["in all"] < plain["in all"]
    assert many["frozen base"] < packed["frozen base"] / 4 and many["in all"] < packed["in all"]
    assert plain["in all"] > sum(size for name, size in plain.items() if name not in ("in all", "largest")) - 2**20
    assert 0 < max(packed["largest"].values()) <= packed["temporaries"]
