"""Resident bytes, weights that a mesh does not divide, largest arrays, and out-of-memory errors."""

import json

import jax
import jax.numpy as jnp
from tiny_plan import TINY, tiny, tiny_ppo

from jaxft.distributed import sharding
from jaxft.models.adapted import HeadSettings
from jaxft.models.model_types import config_to_hf
from jaxft.plan import hlo, program_bytes
from jaxft.rl.reward_models import ModelReward
from jaxft.train import programs


def test_separate_critic_and_reward_models_are_resident(tmp_path):
    shared, separate = (
        program_bytes.resident(programs.abstract(run)[0], run)
        for run in (tiny_ppo(), tiny_ppo(HeadSettings(weights="tiny")))
    )
    head = TINY.vocab * TINY.width * 4
    critic = separate["weights"] - shared["weights"]
    assert critic == shared["weights"] - head and separate["optimizer"] > 2 * critic
    write_config(tmp_path / "reward_model", TINY)
    run = tiny_ppo(rewards=(ModelReward(str(tmp_path / "reward_model"), dtype=jnp.float32),))
    found = program_bytes.resident(programs.abstract(run)[0], run)
    # a scalar per position instead of logits
    assert found["reward models"] == shared["weights"] - head + TINY.width * 4


def write_config(folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({**config_to_hf(config), "architectures": ["LlamaForSequenceClassification"]})
    )


def test_a_large_weight_that_the_mesh_does_not_divide_is_reported(monkeypatch):
    def notes(**axes):
        return program_bytes.replicated_weights(
            programs.abstract(tiny(mesh=sharding.MeshShape(data=1, **axes)), jax.devices()[: axes["fsdp"]])[0]
        )

    monkeypatch.setattr(program_bytes, "LARGE_WEIGHT", 10_000)
    assert notes(fsdp=8) == [] and notes(fsdp=1) == []
    (line,) = notes(fsdp=3)  # vocab 512, width 64
    assert "into 3 shards" in line and "[512, 64]" in line and "layers/attn" in line


def test_libtpus_out_of_memory_error_is_parsed():
    text = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 24.50G of 15.75G hbm. Exceeded hbm capacity by 8.75G."
    )
    assert program_bytes.parse_out_of_memory(text) == (round(24.5 * 2**30), round(8.75 * 2**30))
    assert program_bytes.parse_out_of_memory("RESOURCE_EXHAUSTED: something else") == (None, None)
    assert program_bytes.parse_out_of_memory("INTERNAL: x") is None


def test_largest_arrays_exclude_arguments_and_values_inside_fusions():
    def program(w, x):  # w is an argument, the sum inside a fusion is never in memory
        return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), h), x, w)[1] ** 2) + jnp.sum(
            jnp.outer(x, x)[None] + w
        )

    w, x = jax.ShapeDtypeStruct((7, 90, 90), jnp.float32), jax.ShapeDtypeStruct((90,), jnp.float32)
    found = program_bytes.largest_arrays(hlo.parse_hlo(jax.jit(program).lower(w, x).compile().as_text()))
    assert "f32[7,90,90]" not in found and found["f32[7,90]"] == 7 * 90 * 4
    assert program_bytes.largest_arrays(hlo.parse_hlo("")) == {}


def test_largest_arrays_exclude_views():
    text = """HloModule views

ENTRY %main (a: u16[64,32], b: f32[8]) -> f32[16,16] {
  %a = u16[64,32]{1,0} parameter(0)
  %b = f32[8]{0} parameter(1)
  %view = bf16[64,32]{1,0} bitcast(%a)
  %both = (f32[16,16]{1,0}, f32[4]{0}) fusion(%view, %b), kind=kLoop, calls=%made
  %first = f32[16,16]{1,0} get-tuple-element(%both), index=0
  %moved = (u16[64,32]{1,0}, u16[64,32]{1,0:S(5)}, u32[]) copy-start(%a)
  %flat = f32[256]{0} bitcast(%first)
  ROOT %out = f32[16,16]{1,0} copy(%first)
}
"""
    assert program_bytes.largest_arrays(hlo.parse_hlo(text)) == {"f32[16,16]": 1024, "f32[4]": 16}
