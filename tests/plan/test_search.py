"""The search: candidates are valid, the fastest that fits is recommended, and its settings load."""

from dataclasses import dataclass, replace

import jax
import pytest
from tiny_plan import CHIP, TINY, made_up, tiny

from jaxft.distributed import sharding
from jaxft.plan import machines, plan, search
from jaxft.plan.plan import Flops


def test_the_search_recommends_the_fastest_choice_that_fits(monkeypatch):
    tried, all_planned = [], []

    def fake_plans(run, machine):
        """The evaluation of the first recommendation does not fit; the second one raises."""
        all_planned.append(run)
        if len(all_planned) == 2:
            raise ValueError("its samples do not divide")
        more = (
            {"program": "evaluation", "estimate": None, "flops": None, "total": 900, "missing": 700}
            if len(all_planned) == 1
            else {}
        )
        return [replace(made(run), **more)]

    def fake(run, machine):
        tried.append(run)
        return made(run)

    def made(run):
        mesh, rows = run.mesh, run.data.batch // run.data.micro
        if mesh.tensor == 4:
            raise ValueError("mlp does not divide")
        step = 1.0 / rows + (0.5 if mesh.tensor > 1 else 0)
        guess = plan.Estimate(step, 0, 0, 0, 0, step, step, "matmuls", 0.1, 0.1, step)
        none = dict.fromkeys(("collectives", "parts", "largest"), {})
        size = 100 if rows < 4 else 300
        return plan.Plan(
            "m", 8, "step", none["parts"], size, 200, None if size <= 200 else 100, 0, Flops(1, 1, 1.0, 1.0),
            {}, 0.0, 0, guess, 0.0, False, {},
        )  # fmt: skip

    monkeypatch.setattr(search, "plan", fake)
    monkeypatch.setattr(search, "plans", fake_plans)

    def load(texts):
        values = dict(text.split("=") for text in texts)
        mesh = sharding.MeshShape(
            **{name[5:]: int(n) for name, n in values.items() if name.startswith("mesh.")}
        )
        return replace(
            tiny(), data=replace(tiny().data, batch=16, micro=int(values.get("data.micro", 1))), mesh=mesh
        )

    command = search.Command(load, ["mesh.fsdp=1", "remat=full"], ["remat"])
    found = search.search(command, made_up(2), 9, lambda text: None)
    assert 0 < len(found) == len(tried) <= 9
    best = min(t.seconds for t in found)
    assert found[0].seconds == best < float("inf") and found[0].plan.fits
    assert not any(t.plan and t.plan.fits for t in found if t.seconds == float("inf"))
    (out,) = [t for t in found if t.plan and t.plan.program == "evaluation"]
    assert "error: its samples do not divide" in map(search.trial_summary, found)
    assert len(all_planned) == 3 and out.seconds == float("inf")
    assert search.trial_summary(out).endswith("the program 'evaluation' does not fit")
    text = search.search_report(found, command)
    assert text.splitlines()[-1].startswith("use: remat=") and text.count("remat=") == len(found) + 1
    large = search.Trial(found[0].choice, replace(found[0].plan, missing=1))
    assert "no choice fits" in search.search_report([large], command) and not search.any_fits([large])


@dataclass(frozen=True)
class Described:
    """A simulated device."""

    id: int
    process_index: int
    platform: str
    device_kind: str
    slice_index: int = 0
    core_on_chip: int = 0


@dataclass(frozen=True)
class OnTorus(Described):
    coords: tuple = (0, 0, 0)


def two_slices():
    """Two slices of 2 x 2 chips."""
    chips = [(s, x, y) for s in range(2) for x in range(2) for y in range(2)]
    return [OnTorus(n, s, "tpu", "TPU v5 lite", s, coords=(x, y, 0)) for n, (s, x, y) in enumerate(chips)]


def hosts(count, each):
    return [Described(n, n // each, "cuda", "NVIDIA H100 80GB HBM3") for n in range(count * each)]


PLACES = {"one host": lambda: jax.devices()[:8], "two slices": two_slices, "two hosts": lambda: hosts(2, 4)}


@pytest.mark.parametrize(
    "mesh", [{}, {"slices": -1, "data": 1}, {"context": -1, "data": 1}, {"slices": 2}], ids=str
)
@pytest.mark.parametrize("where", PLACES)
def test_candidates_divide_batch_heads_and_time_and_have_valid_meshes(where, mesh):
    run = replace(tiny(mesh=sharding.MeshShape(**mesh)), data=replace(tiny().data, batch=16))
    machine = machines.Machine(where, CHIP, PLACES[where]())
    found = list(search.candidates(run, machine))
    for candidate in {c.mesh for c in found}:
        assert sharding.make_mesh(candidate, machine.devices).size == 8
    for c in found:
        assert (
            16 % (c.micro * c.mesh.slices * c.mesh.data * c.mesh.fsdp) == 0
            and TINY.kv_heads % c.mesh.tensor == 0
        )
        assert (
            run.data.max_length % c.mesh.context == 0 and TINY.heads % (c.mesh.context * c.mesh.tensor) == 0
        )
        _, seconds, size = search.rough_estimate(run, machine, c)
        assert seconds > 0 and size > 0
    assert {1, 2} <= {c.mesh.context for c in found} and {1, 4} <= {c.mesh.fsdp for c in found}
    slices = {"two slices": 2}.get(
        where, {-1: 2 if where == "two hosts" else 1}.get(mesh.get("slices"), mesh.get("slices", 1))
    )
    assert {c.mesh.slices for c in found} == {slices}


def test_a_rough_estimate_divides_memory_by_every_mesh_axis():
    def size(**axes):
        return search.rough_estimate(
            run, machine, search.Choice(1, "full", sharding.MeshShape(**{"data": 1, **axes}))
        )[2]

    run = replace(tiny(full=True), data=replace(tiny().data, batch=8, max_length=64))
    machine = machines.Machine("eight", CHIP, jax.devices()[:8])
    # weights and tokens are sharded over eight devices
    assert size(fsdp=2, context=4) == size(fsdp=4, context=2) == size(fsdp=8)
    assert size(slices=8) == size(data=8) < size(slices=2)
    assert size(context=2) < size(data=2) < size()


def test_a_search_whose_choices_all_raise_reports_the_first_error(monkeypatch):
    def fail(run, machine):
        raise ValueError("rows of 100 tokens do not divide")

    monkeypatch.setattr(search, "plan", fail)
    command = search.Command(lambda texts: tiny(), [], [])
    found = search.search(command, made_up(2), 3, lambda text: None)
    assert len(found) == 3 and not search.any_fits(found)
    last = search.search_report(found, command).splitlines()[-1]
    assert last == "every choice raises an error; the first: rows of 100 tokens do not divide"
    assert "set data.batch to a multiple" in search.search_report([], command) and not search.any_fits([])


@pytest.mark.slow
def test_a_search_that_compiles_recommends_settings_that_load(monkeypatch):
    """Nothing is faked: the overrides go through a config, and the programs are compiled."""

    def load(texts):
        values = dict(text.split("=") for text in texts)
        mesh = sharding.MeshShape(
            **{name[5:]: int(n) for name, n in values.items() if name.startswith("mesh.")}
        )
        run = tiny(values.get("remat", "full"), mesh=mesh)
        return replace(
            run, data=replace(run.data, batch=8, max_length=16, micro=int(values.get("data.micro", 1)))
        )

    command = search.Command(load, ["mesh.slices=-1", "mesh.data=1"], [])
    found = search.search(command, made_up(2), 2, lambda text: None)
    assert [t.why for t in found] == ["", ""] and search.any_fits(found)
    best = search.search_report(found, command).splitlines()[-1].removeprefix("use: ").split()
    assert load(best).mesh == found[0].choice.mesh and found[0].plan.devices == 2
