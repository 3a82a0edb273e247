"""The speed of a run: tokens per second and the use of the hardware."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from meters import feed, make_meter

from jaxft.batch import Pairs, Rollout, Tokens, count_reads
from jaxft.distributed import devices
from jaxft.models.adapted import with_scalar_head
from jaxft.models.families.llama import PRESETS, llama
from jaxft.train.logs.logs import total_rates

LLAMA = PRESETS["meta-llama/Llama-3.2-1B"]
LAYERS = 973_078_528  # of its 16 layers: 16 x (2 x 2048 x 2048 + 2 x 2048 x 512 + 3 x 2048 x 8192)
HEAD = 2048 * 128_256
PEAK = 1e15


@pytest.fixture
def on_gpu(monkeypatch):
    """A GPU with a peak of 1e15 FLOP/s in place of this process's device."""
    gpu = SimpleNamespace(
        platform="gpu", device_kind="a GPU", memory_stats=lambda: {"peak_bytes_in_use": 2**30}
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    monkeypatch.setattr(devices, "peak_flops", lambda device: PEAK)


def packed_row():
    """Examples of 3 and 2 tokens and three slots of padding; the model is read at two positions, and two
    further read positions are padding.
    """
    segments = np.array([[[1, 1, 1, 2, 2, 0, 0, 0]]])
    positions = np.array([[[0, 1, 2, 0, 1, 0, 1, 2]]])
    read, weights = np.array([[[1, 3, 0, 0]]]), np.array([[[0.5, 0.5, 0, 0]]])
    return Tokens(np.ones_like(segments), segments, positions, read, np.ones_like(read), weights)


def test_reads_of_pairs_and_rollouts_are_counted_without_padding():
    def batch(kind, **given):
        return kind(**{**dict.fromkeys(field.name for field in dataclasses.fields(kind)), **given})

    pairs = batch(Pairs, responses=np.array([[0, 0, 1, 3, 4, 4]]), lengths=np.zeros((1, 2, 2)))
    rollout = batch(Rollout, responses=np.array([[0, 2, 3]]), lengths=np.zeros((1, 3)))
    assert (count_reads(pairs), count_reads(rollout)) == (4, 2)


@pytest.mark.parametrize(("model", "head"), [(llama(LLAMA), 2 * HEAD), (with_scalar_head(llama(LLAMA)), 0)])
def test_mfu_counts_tokens_their_own_example_and_the_head_where_it_is_read(on_gpu, model, head):
    meter = make_meter(None, model=model)
    feed(meter, 0, 1.0, batch=packed_row())
    _, perf = meter.read()
    earlier = 0 + 1 + 2 + 0 + 1  # tokens before each in its example: a score and a value for each
    forward = 2 * (5 * LAYERS + earlier * 16 * 2 * 2048 + head)
    assert perf["mfu"] * perf["seconds"] * PEAK == pytest.approx(2 * forward, rel=1e-12)  # LoRA: two passes
    assert perf["tokens_per_second"] * perf["seconds"] == pytest.approx(5)
    assert meter.read()[1]["mfu"] == 0


def test_a_cpu_has_a_speed_and_no_mfu():
    meter = make_meter(None)
    feed(meter, 0, 1.0)
    perf = meter.read()[1]
    assert perf["tokens_per_second"] > 0 and "mfu" not in perf
    both = total_rates([perf, perf])
    assert both.keys() == perf.keys() and both["tokens_per_second"] == 2 * perf["tokens_per_second"]


def test_members_of_a_sweep_share_time_and_memory_and_add_their_speeds():
    one = {"seconds": 2.0, "tokens_per_second": 10.0, "mfu": 0.1, "memory_gib": 3.0}
    assert total_rates([one, one]) == {**one, "tokens_per_second": 20.0, "mfu": 0.2}
    assert total_rates([{}, {}]) == {}
