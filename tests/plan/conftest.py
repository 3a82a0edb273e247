"""Every test of plans: the simulated CPU devices have a peak of 1 TFLOP/s."""

import pytest

from jaxft.distributed import devices


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    monkeypatch.setattr(devices, "peak_flops", lambda device: 1e12)
