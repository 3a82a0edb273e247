"""A run with a moving average: it trains as without, and evaluates, exports and reports the average."""

import json
from pathlib import Path

import numpy as np
import pytest
from prepared import working_directory
from safetensors.numpy import load_file
from tiny_run import write_place

from jaxft.runs.settings.config import resolve_config
from jaxft.train import loop

ARGV = ["steps=1", "samples=0", "lr=0.02", "optim.warmup=0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A function that runs with the overrides of a command line and returns the run's folder."""
    folder = tmp_path_factory.mktemp("averaged")
    write_place(folder)

    def run(name, *argv):
        with working_directory(folder):
            settings = resolve_config("config.py", [*ARGV, *argv, f"name={name}"])
            assert loop.run(settings.value, settings.describe(), Path("runs")) == 0
        return folder / "runs" / name

    return run


def logged(folder, name):
    """The values of a metric in metrics.jsonl."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


@pytest.mark.slow
def test_the_average_is_evaluated_and_exported_and_training_is_unchanged(finished):
    """After one step the average is 0.1 of the start and 0.9 of the step: b starts at 0, and as long as b is
    0, a does not move.
    """
    plain, averaged = finished("plain"), finished("ema", "optim.ema=0.2")
    assert logged(plain, "loss") == logged(averaged, "loss")
    start, end = logged(plain, "eval_loss"), logged(averaged, "eval_loss")
    assert start[0] == end[0] and start[1] != end[1]
    weights, found = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (plain, averaged))
    for name, x in found.items():
        np.testing.assert_allclose(x, (0.9 if "lora_B" in name else 1.0) * weights[name], rtol=1e-5)
    assert "averages over the steps (optim.ema=0.2)" in (averaged / "README.md").read_text()
    assert "averages over the steps" not in (plain / "README.md").read_text()
