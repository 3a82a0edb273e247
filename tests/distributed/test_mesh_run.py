"""Complete runs on a mesh of 8 devices: losses equal those of one device, and empty row slots are
reported.
"""

import itertools
import re
from dataclasses import replace

import jax
import pytest
from prepared import prepare, working_directory
from tiny_run import Place, write_place

from jaxft.data.sft import Rows
from jaxft.runs.run_texts import empty_slot_lines
from jaxft.train.logs.logs import startup_lines
from jaxft.train.programs import step_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    write_place(folder)
    return Place(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full=false", "full=true"])
def test_run_on_a_mesh_has_the_losses_of_one_device(place, kind):
    common = [kind, "batch=8", "lr=0.0001"]
    name = kind.replace("=", "")
    assert place.run(*common, "steps=3", f"name={name}-one") == 0, place.err()
    sizes = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    assert place.run(*common, *sizes, f"name={name}-many", "steps=3", devices=8) == 0, place.err()
    one, many = place.metrics(f"{name}-one"), place.metrics(f"{name}-many")
    assert [line["step"] for line in one] == [line["step"] for line in many]
    for a, b in zip(one, many, strict=True):
        for key in a.keys() & {"loss", "eval_loss"}:
            assert b[key] == pytest.approx(a[key], rel=1e-4)
    out = "adapter" if kind == "full=false" else "model"
    assert list((place.runs(f"{name}-many") / out).glob("*.safetensors"))
    assert place.run(*common, *sizes, f"name={name}-many", "steps=4", devices=8) == 0, place.err()
    assert place.metrics(f"{name}-many")[-1]["step"] == 4


def test_empty_row_slots_are_reported_at_startup(place):
    job = prepare(place.folder, "batch=4", "micro=2", "mesh.data=1", "mesh.fsdp=-1", devices=8)
    with working_directory(place.folder, 8), jax.set_mesh(job.lead.programs.mesh):
        (line,) = [line for line in startup_lines(job, 0, []) if "are empty" in line]
    assert line.startswith(
        "12 of the 16 slots for rows in a step are empty (75 %): data.batch=4 is split into data.micro=2"
    )
    assert line.endswith("data.batch=16 fills them")


@pytest.mark.parametrize(
    "batch, micro, shards", list(itertools.product((1, 4, 6, 9, 16, 24), (1, 2, 4, 6), (1, 3, 8)))
)
def test_suggested_settings_fill_all_row_slots(batch, micro, shards):
    data = Rows("none", batch=batch, micro=micro)
    rows = -(-batch // (micro * shards)) * shards  # of a microbatch, after padding by the source
    assert step_rows(data, shards).slots == rows * micro
    lines = empty_slot_lines(step_rows(data, shards))
    assert bool(lines) == (rows * micro > batch)
    for setting, numbers in (
        re.findall(r"data\.(\w+)=([\d or]+)", lines[0].partition(";")[2]) if lines else []
    ):
        for number in numbers.split(" or "):
            assert empty_slot_lines(step_rows(replace(data, **{setting: int(number)}), shards)) == []
