"""What one process computes before training and all use: codes, EVA's directions, PiSSA's pairs."""

import numpy as np
import pytest
from process_group import ProcessGroup
from tiny_run import Place, write_place

pytestmark = [pytest.mark.alone, pytest.mark.slow]
COMMON = ["batch=8", "steps=1", "samples=0", "mesh.data=8"]
# Each process has a cache of its own, as on hosts without a shared disk, and notes what its watchdog hears.
OWN_CACHE = """
import os
from jaxft.distributed.processes import Watchdog
number = os.environ.get("JAXFT_PROCESS", "one")
os.environ["JAXFT_CACHE"] = "cache-" + number
at = Watchdog.at
def noted(self, phase, **how):
    with open("phases-" + number, "a") as file:
        print(phase, file=file)
    at(self, phase, **how)
Watchdog.at = noted
"""
# Saves the first `a` of every kernel; process 1's own decomposition has other signs.
DIRECTIONS = """
import os
import numpy as np
from jaxft.nn.adapters.lora import pairs_by_path
from jaxft.train import programs
from jaxft.train.start import eva
number = os.environ.get("JAXFT_PROCESS", "one")
adapter_of, directions_of = programs.eva_adapter, eva.principal_directions
def saved(*args):
    found = adapter_of(*args)
    local = {path: np.asarray(p["a"].addressable_shards[0].data) for path, p in pairs_by_path(found).items()}
    np.savez("eva-" + number, **local)
    return found
def other_signs(*args):
    found = directions_of(*args)
    return found._replace(vectors=-found.vectors) if number == "1" else found
programs.eva_adapter, eva.principal_directions = saved, other_signs
"""

# Process 1's own pairs have other signs.
PAIRS = """
import os
from jaxft.weights.edit import lora_start
pair_of = lora_start.principal_pair
def other_signs(*args):
    a, b = pair_of(*args)
    return (-a, -b) if os.environ["JAXFT_PROCESS"] == "1" else (a, b)
lora_start.principal_pair = other_signs
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base-on-hosts")
    write_place(path)
    return path


def both(folder, kind, *argv, hook):
    """The same run by two processes, then by one."""
    two, one = ProcessGroup(folder), Place(folder)
    assert two.run(*COMMON, *argv, f"name={kind}-two", hook=hook) == [0, 0], two.output()
    assert one.run(*COMMON, *argv, f"name={kind}-one", hook=hook, devices=8) == 0, one.err()


def test_every_process_has_the_codes_of_one_and_its_watchdog_hears_of_each_layer(folder):
    argv = ["quant=nf4", "quant.block=32", "quant.calibrate=run", "quant.calibrate_tokens=640"]
    both(folder, "calibrated", *argv, hook=OWN_CACHE)
    codes = [
        {path.name: path.read_bytes() for path in (folder / f"cache-{number}" / "calibrated").glob("*/*")}
        for number in ("one", "0", "1")
    ]
    assert len(codes[0]) == 5  # three layers, calibration.json and the hashes
    assert codes[0] == codes[1] == codes[2]
    layers = [f"calibrated layer {i} of 3" for i in (1, 2, 3)]
    for number, expected in (("one", layers), ("0", 2 * layers), ("1", 2 * layers)):
        phases = (folder / f"phases-{number}").read_text().splitlines()
        assert [phase for phase in phases if phase.startswith("calibrated layer")] == expected


def test_every_process_starts_from_the_directions_that_process_0_found(folder):
    both(folder, "eva", "adapter.init=eva", "adapter.eva_tokens=600", hook=DIRECTIONS)
    one, first, second = (dict(np.load(folder / f"eva-{number}.npz")) for number in ("one", "0", "1"))
    assert len(one) == 7
    for path, expected in one.items():
        np.testing.assert_array_equal(first[path], second[path])
        np.testing.assert_allclose(first[path], expected, atol=1e-3)


def test_every_process_starts_from_the_pairs_that_process_0_found(folder):
    """A checkpoint is published only if the processes have the same values."""
    two = ProcessGroup(folder)
    assert two.run(*COMMON, "adapter.init=pissa", "name=pissa", hook=PAIRS) == [0, 0], two.output()
