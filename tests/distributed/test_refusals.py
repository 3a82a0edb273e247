"""Invalid or ineffective settings raise one-line errors."""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
import tiny_experts
from tiny_model import CONFIG

from jaxft.distributed import sharding
from jaxft.distributed.sharding import MeshShape
from jaxft.engine.sampling import Sampling
from jaxft.models.families.llama import llama
from jaxft.models.model_types import FAMILIES
from jaxft.nn.adapters.lora import Adapter
from jaxft.optim.optimizer import Optim
from jaxft.train import trainable_params

HF = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)


@pytest.mark.parametrize(
    ("rope", "text"),
    [
        ({"factor": 4.0}, "no rope_type"),
        ({"full_attention": {"rope_theta": 5e5}}, "one object per layer type"),
        ({"rope_type": "linear", "factor": 0.0}, "factor"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "low_freq_factor"),
        ({"rope_type": "mrope", "factor": 2.0}, "'mrope'"),
    ],
)
def test_unsupported_rope_scaling_is_an_error(rope, text):
    with pytest.raises(ValueError, match=text):
        FAMILIES["llama"].from_hf({**HF, "rope_scaling": rope})
    assert FAMILIES["llama"].from_hf({**HF, "rope_scaling": LLAMA3}).rope.factor == 8.0


def test_dtype_of_trainable_base_weights_needs_some():
    model = llama(CONFIG, jnp.float32)
    with pytest.raises(
        ValueError,
        match="run.params=bfloat16 applies to trainable base weights, but there are none",
    ):
        trainable_params.partition_params(model, Adapter(rank=2), None, dtype=jnp.bfloat16)
    stored = trainable_params.partition_params(
        model, Adapter(rank=2), "adapter/.*|base/layers/mlp_norm", dtype=jnp.bfloat16
    ).storage
    assert (
        stored["base/layers/mlp_norm"].dtype == jnp.bfloat16
        and stored["adapter/layers/attn/q/a"].dtype == jnp.float32
    )


def test_pattern_that_selects_only_the_constant_scale_is_an_error():
    with pytest.raises(ValueError, match="selects no trainable parameter"):
        trainable_params.partition_params(llama(CONFIG, jnp.float32), Adapter(rank=2), "adapter/.*/scale")


class FakeDevice(SimpleNamespace):
    """A stand-in for a jax device, from which a mesh can be made."""

    __hash__ = object.__hash__


def fake_devices(count, per_host, platform="cpu", **more):
    """Return `count` devices, `per_host` on each host."""
    coords = [0, 0, 0]
    return [
        FakeDevice(
            id=i, process_index=i // per_host, platform=platform, device_kind=platform, coords=coords, **more
        )
        for i in range(count)
    ]


TPU = {"platform": "tpu", "core_on_chip": 0}
GPUS = fake_devices(16, 8, "gpu")
for gpu in GPUS:
    gpu.slice_index = gpu.process_index  # jax uses a slice per GPU host


@pytest.mark.parametrize(
    "shape, devices, message",
    [
        (
            MeshShape(1, 1, 8),
            fake_devices(8, 4),
            "mesh.tensor=8 crosses hosts; use a divisor of the 4 devices of a host",
        ),
        (
            MeshShape(-1, slices=4),
            fake_devices(12, 2),
            "mesh.slices=4: the devices are in 6 processes; use mesh.slices=6",
        ),
        (
            MeshShape(-1),
            fake_devices(8, 4, **TPU, slice_index=1)[4:] + fake_devices(4, 4, **TPU, slice_index=0),
            "mesh.slices=1: the devices are in 2 slices; use mesh.slices=2",
        ),
        (MeshShape(1, 1, 16), GPUS, "mesh.tensor=16 crosses hosts; use a divisor of the 8 devices of a host"),
    ],
)
def test_mesh_that_crosses_hosts_or_slices_is_an_error(shape, devices, message):
    with pytest.raises(ValueError) as error:
        sharding.make_mesh(shape, devices)
    assert str(error.value) == message


def test_gpus_of_two_hosts_support_every_mesh_with_tensor_inside_a_host():
    assert sharding.make_mesh(MeshShape(1, -1), GPUS).devices.shape == (1, 1, 16, 1, 1, 1)
    assert sharding.make_mesh(MeshShape(1, -1, slices=2), GPUS).devices.shape == (2, 1, 8, 1, 1, 1)
    rows = sharding.make_mesh(MeshShape(-1, 1, 8), GPUS).devices.reshape(-1, 8)
    assert all(len({d.process_index for d in row}) == 1 for row in rows)


@pytest.mark.parametrize(
    "bad", [{"temperature": float("nan")}, {"temperature": 1e-40}, {"top_p": 0.0}, {"max_new": 0}]
)
def test_sampling_settings_out_of_range_are_errors(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


@pytest.mark.parametrize(
    "bad", [{"lr": float("nan")}, {"lr": float("inf")}, {"b1": 2.0}, {"weight_decay": -1.0}, {"end": -1.0}]
)
def test_optimizer_settings_out_of_range_are_errors(bad):
    with pytest.raises(ValueError, match="optim"):
        Optim(**bad)


@pytest.mark.parametrize("alpha", [0.0, float("inf"), float("nan")])
def test_lora_alpha_out_of_range_is_an_error(alpha):
    with pytest.raises(ValueError, match="alpha"):
        Adapter(alpha=alpha)


def test_rows_longer_than_the_max_positions_of_the_model_are_an_error():
    from jaxft.runs.settings import config
    from jaxft.train import programs

    run = config.load_config("configs/sft.py", [])
    long = dataclasses.replace(run, data=dataclasses.replace(run.data, max_length=10000))
    with pytest.raises(ValueError, match="max_length=10000 is beyond the model's 8192"):
        programs.build(long, 10)


def test_a_ring_without_a_mesh_that_shards_rows_is_an_error():
    from jaxft.runs.settings import config
    from jaxft.train import programs

    run = config.load_config("configs/sft.py", ["context_keys=ring"])
    with pytest.raises(ValueError, match="context_keys=ring needs rows that are sharded .* set mesh.context"):
        programs.build(run, 10)


def test_a_mesh_that_shards_experts_needs_a_model_with_some():
    from jaxft.runs.settings import config
    from jaxft.train import programs

    run = config.load_config("configs/sft.py", ["mesh.expert=2"])
    with pytest.raises(
        ValueError, match="mesh.expert=2 shards the experts of layers, and this model has none"
    ):
        programs.build(run, 10)
    short = dataclasses.replace(run.data, max_length=64)
    model, mesh = tiny_experts.experts(tiny_experts.CONFIG), dataclasses.replace(run.mesh, expert=4)
    run = dataclasses.replace(run, model=model, mesh=mesh, data=short)
    with pytest.raises(ValueError, match="mesh.expert=4 does not divide the 2 experts of a layer"):
        programs.build(run, 10)


def test_limits_of_the_model_name_settings_that_the_recipe_has():
    from jaxft.runs.settings import config
    from jaxft.train import programs

    grpo = config.load_config("configs/grpo.py", ["max_new=9000"])
    total = r"data\.max_prompt=\d+ \+ data\.max_new=9000 are beyond the model's 8192 .* Lower data\.max_new\."
    with pytest.raises(ValueError, match=total):
        programs.build(grpo, 10)
    with pytest.raises(
        ValueError, match="train all weights: by configs/sft_full.py, or with full=true where"
    ):
        programs.build(config.load_config("configs/sft.py", ["rank=577"]), 10)
