"""A whole run on a mesh of 8 devices: losses as on one, and it ends with weights and answers."""

import pytest
from tiny_run import Place, write_place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    write_place(folder)
    return Place(folder)


@pytest.mark.parametrize("kind", ["full=false", "full=true"])
def test_a_run_on_a_mesh_has_the_losses_of_one_device(place, kind):
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
