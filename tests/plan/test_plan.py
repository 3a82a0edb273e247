"""The planner: machines, memory and FLOPs of a tiny run, the roofline by hand, and the search.

Tests that compile for NVIDIA GPUs need jax's CUDA plugin and those for TPUs libtpu, or are skipped.
"""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxft.data.pairs.source import PairRows
from jaxft.data.sft import Rows
from jaxft.distributed import devices, sharding
from jaxft.inference.generate import Sampling
from jaxft.models import heads
from jaxft.models.heads import HeadSettings
from jaxft.models.llama import llama
from jaxft.models.llama_config import LlamaConfig, to_hf
from jaxft.nn.lora import Adapter
from jaxft.nn.quant import Quant
from jaxft.objectives import policy
from jaxft.objectives.critic import Critic, value_function
from jaxft.objectives.kl import FixedKL, KLInReward
from jaxft.objectives.policy_losses import clipped
from jaxft.objectives.preference import preference
from jaxft.objectives.preference_losses import dpo
from jaxft.objectives.sft import sft
from jaxft.plan import hlo, machines, memory, plan, roofline, search, traffic
from jaxft.plan import programs as plan_programs
from jaxft.plan import text as plan_text
from jaxft.plan.flops import Flops, flops, matmul_flops
from jaxft.rl.estimators import actor_critic
from jaxft.rl.reward_models import HeadReward, ModelReward
from jaxft.rl.rollout import Rollouts
from jaxft.rl.rules import Rules
from jaxft.train import programs
from jaxft.train.settings import Run

ROOT = Path(__file__).resolve().parents[2]
HAS_CUDA = (
    importlib.util.find_spec("jax_plugins.xla_cuda12") is not None
    if importlib.util.find_spec("jax_plugins")
    else False
)
HAS_TPU = importlib.util.find_spec("libtpu") is not None
TINY = LlamaConfig(vocab=512, width=64, layers=4, heads=4, kv_heads=2, head_dim=16, mlp=128)
CHIP = machines.Chip("cpu", 2**40, 2**30, 1e9, 1e8, 1e7, "made up")


def tiny(remat="projections", full=False, quant=None, **kwargs):
    rows = Rows("none", batch=8, micro=2, max_length=64)
    adapter = None if full else Adapter(rank=4)
    return Run(
        "tiny",
        "tiny",
        llama(TINY, jnp.float32, remat=remat),
        sft,
        rows,
        adapter=adapter,
        quant=quant,
        **kwargs,
    )


def made_up(count=8):
    return machines.Machine(f"{count} made up", CHIP, jax.devices()[:count])


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    monkeypatch.setattr(devices, "peak_flops", lambda device: 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "h100",
        "h100:0x",
        "b300:8",
        "h100:2x2x2",
        "../h100:1",
        "",
        "v5p:4x4",
        "v5e:4x4x4",
        "2xh100:8",
        "h100:0",
    ],
)
def test_an_unknown_machine_raises_one_line(name):
    with pytest.raises(ValueError, match="is unknown; ") as found:
        machines.machine(name)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100:16", "a host has at most 8 GPUs; use h100:HOSTSxGPUS, such as h100:2x8"),
        ("a100-40:2x16", "a host has at most 8 GPUs; use a100-40:HOSTSxGPUS"),
        ("v5e:32x32", "a slice of v5e has at most 256 chips"),
        ("v6e:3x3", "1 or an even number of them along each axis"),
    ],
)
def test_a_machine_that_does_not_exist_raises(name, message):
    with pytest.raises(ValueError, match=f"--devices '{name}' does not exist: .*{message}"):
        machines.machine(name)


def test_a100_variants_are_distinguished_by_memory_for_any_memory_fraction(monkeypatch):
    for fraction in ("0.75", "0.5", "0.9"):
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", fraction)
        for name in ("a100-40", "a100-80"):
            stats = {"bytes_limit": int(machines.CHIPS[name].memory * float(fraction))}
            gpu = SimpleNamespace(
                device_kind="NVIDIA A100-SXM4", platform="gpu", memory_stats=lambda stats=stats: stats
            )
            monkeypatch.setattr(jax, "devices", lambda gpu=gpu: [gpu])
            assert machines.local().chip is machines.CHIPS[name]


def test_every_chip_has_a_peak_and_every_gpu_a_compilation_target():
    gpus = {name for name, chip in machines.CHIPS.items() if not chip.kind.startswith("TPU")}
    assert {path.stem for path in machines.TARGETS.glob("*.txtpb")} == gpus
    for name, chip in machines.CHIPS.items():
        assert any(chip.kind.startswith(kind) or kind.startswith(chip.kind) for kind in devices.PEAK_BF16), (
            name
        )
        assert chip.source and chip.reserved < chip.memory and chip.across < chip.within < chip.memory_rate
    for name in gpus:
        assert (
            f"device_memory_size: {machines.CHIPS[name].memory}\n"
            in (machines.TARGETS / f"{name}.txtpb").read_text()
        )


def test_parts_sum_to_the_total_and_cover_all_arguments():
    run = tiny(mesh=sharding.MeshShape(data=2, fsdp=4), quant=Quant("nf4"))
    found = plan.plan(run, made_up())
    assert found.total == sum(found.parts.values())
    rows = 6 * 2 * 8 * 64 * 4 // 8  # arrays of a batch, microbatches, rows, tokens, bytes, over eight devices
    assert rows <= found.parts["batch and counters"] < rows + 256  # all other arguments are accounted for
    assert found.parts["adapters"] < found.parts["optimizer"] < 2.1 * found.parts["adapters"]  # two moments
    assert found.parts["quantised base"] > 0 and found.fits and found.limit == CHIP.memory - CHIP.reserved
    assert json.loads(json.dumps(found.json()))["flops_per_token"] > 0
    assert found.collectives["all-gather"]["within"] > 0 and found.collectives["all-gather"]["across"] == 0
    text = plan_text.plan_report(found)
    assert "quantised base" in text and "fits," in text and "MFU" in text and "assumed:" in text


def tiny_pairs(**kwargs):
    rows = PairRows("none", batch=4, micro=2, max_length=32)
    objective = partial(preference, loss=partial(dpo, beta=0.1), beta=0.1, reference="precomputed")
    return Run("tiny", "tiny", llama(TINY, jnp.float32), objective, rows, Adapter(rank=4), **kwargs)


def test_a_run_has_a_program_for_each_of_its_phases():
    def names(run):
        p, _ = programs.abstract(run, jax.devices()[:1])
        with jax.set_mesh(p.mesh):
            return [one.name for one in plan_programs.all_programs(run, p) if one.trace().jaxpr.jaxpr.eqns]

    # for SFT, general text is the evaluation program
    assert names(tiny(general="text")) == ["train step", "evaluation", "sample completions"]
    bare = tiny(samples=0)
    assert names(replace(bare, data=replace(bare.data, held_out=None))) == ["train step"]
    assert names(tiny_pairs(general="text")) == [
        "train step",
        "evaluation",
        "sample completions",
        "general text",
        "reference log-probs",
    ]


def test_resident_bytes_are_equal_in_all_programs():
    found = plan.plans(tiny(samples=64, sampling=Sampling(max_new=400)), made_up(2))
    sizes = {p.program: p for p in found}
    assert [p.total for p in found] == sorted((p.total for p in found), reverse=True) and len(found) == 3
    resident = {p.total - sum(p.parts.get(name, 0) for name in plan.PROGRAM_PARTS) for p in found}
    assert len(resident) == 1  # weights, adapters and optimizer state
    # keys and values, rows over two devices
    cache = TINY.layers * 64 * (64 + 400) * TINY.kv_heads * TINY.head_dim * 2 * 4 // 2
    step, sampling = sizes["train step"], sizes["sample completions"]
    assert cache < sampling.parts["activations and temporaries"] and found[0] is sampling
    assert step.flops and step.estimate and sampling.flops is sampling.estimate is None
    text = plan_text.programs_report(found)
    assert "the largest is sample completions: fits," in text and all(name in text for name in sizes)
    assert "sample completions on" in plan_text.plan_report(sampling)
    small = plan_text.record(step, [replace(p, missing=1) if p is sampling else p for p in found])
    assert not small["fits"] and small["programs"]["train step"]["fits"] and small["total"] == step.total
    assert json.loads(json.dumps(small))["programs"] == small["programs"]


def tiny_ppo(critic=None, rewards=None, group=2):
    def objective(model):
        hidden = lambda params, batch, h: model.hidden(heads.view(params, "critic"), batch)  # noqa: E731
        value = value_function(hidden, lambda params, h: heads.scores(heads.view(params, "critic"), h))
        return policy.policy(model, clipped, KLInReward(FixedKL(0.1)), critic=Critic(value))

    prompts = Rollouts(
        "none", held_out=None, max_prompt=32, max_new=16, batch=4, group=group, micro=2,
        rules=Rules(rewards or (HeadReward("reward"),), actor_critic),
    )  # fmt: skip
    settings = {
        "critic": critic or HeadSettings(Adapter(rank=4)),
        "reward": HeadSettings(Adapter(rank=4), "none", trained=False),
    }
    llm = llama(TINY, jnp.float32)
    return Run("tiny", "tiny", llm, objective, prompts, Adapter(rank=4), heads=settings, samples=0)


def test_a_rollout_plan_has_all_programs():
    found = {p.program: p for p in plan.plans(tiny_ppo(), made_up(2))}
    assert found.keys() == {"train step", "rollout sampling", "rollout log-probs", "reward head reward"}
    assert (
        len({p.total - sum(p.parts.get(name, 0) for name in plan.PROGRAM_PARTS) for p in found.values()}) == 1
    )
    # 4 prompts x 2, over two devices
    cache = TINY.layers * 8 * (64 + 16) * TINY.kv_heads * TINY.head_dim * 2 * 4 // 2
    assert cache < found["rollout sampling"].parts["activations and temporaries"]
    assert found["train step"].flops and not found["rollout log-probs"].flops


def test_separate_critic_and_reward_models_are_resident(tmp_path):
    shared, separate = (
        memory.resident(programs.abstract(run)[0], run)
        for run in (tiny_ppo(), tiny_ppo(HeadSettings(weights="tiny")))
    )
    head = TINY.vocab * TINY.width * 4
    critic = separate["weights"] - shared["weights"]
    assert critic == shared["weights"] - head and separate["optimizer"] > 2 * critic
    write_config(tmp_path / "reward_model", TINY)
    run = tiny_ppo(rewards=(ModelReward(str(tmp_path / "reward_model"), dtype=jnp.float32),))
    found = memory.resident(programs.abstract(run)[0], run)
    # a scalar per position instead of logits
    assert found["reward models"] == shared["weights"] - head + TINY.width * 4


def write_config(folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({**to_hf(config), "architectures": ["LlamaForSequenceClassification"]})
    )


def test_a_large_weight_that_the_mesh_does_not_divide_is_reported(monkeypatch):
    def notes(**axes):
        return memory.replicated_weights(
            programs.abstract(tiny(mesh=sharding.MeshShape(data=1, **axes)), jax.devices()[: axes["fsdp"]])[0]
        )

    monkeypatch.setattr(memory, "LARGE_WEIGHT", 10_000)
    assert notes(fsdp=8) == [] and notes(fsdp=1) == []
    (line,) = notes(fsdp=3)  # vocab 512, width 64
    assert "into 3 shards" in line and "[512, 64]" in line and "layers/attn" in line


def test_a_plan_that_does_not_fit_reports_the_missing_bytes():
    chip = replace(CHIP, memory=2**19 + 2**18, reserved=2**18)
    found = plan.plan(tiny(), machines.Machine("small", chip, jax.devices()[:1]))
    assert (
        not found.fits
        and found.missing == found.total - 2**19
        and "does not fit: exceeds the limit of 0.00 GiB by 0.0" in plan_text.plan_report(found)
    )


def counted(run):
    p, batch = programs.abstract(run, jax.devices()[:1])
    with jax.set_mesh(p.mesh):
        return flops(run, p, batch, p.train_step.trace(p.state, p.frozen, batch))


def test_model_flops_match_the_formula_and_exclude_recomputation():
    full = counted(tiny("none", full=True))
    forward = TINY.layers * (2 * TINY.width * 16 * 6 + 3 * TINY.width * TINY.mlp) + TINY.width * TINY.vocab
    scores = TINY.layers * 2 * TINY.heads * TINY.head_dim * 64 / 2
    assert full.tokens == 512 and full.model == pytest.approx(3 * 2 * 512 * (forward + scores))
    again = counted(tiny("full", full=True))
    assert (
        again.model == full.model and 1.15 < again.program / full.program < 1.34
    )  # the head runs again in both
    assert counted(tiny("none")).model == pytest.approx(full.model * 2 / 3)


def test_empty_rows_count_in_program_flops_but_not_in_tokens():
    run = tiny(mesh=sharding.MeshShape(data=1, fsdp=-1))
    few = replace(run, data=replace(run.data, batch=2, micro=1))
    alone = counted(replace(few, mesh=sharding.MeshShape()))
    found = plan.plan(few, made_up(8))
    assert (found.flops.tokens, found.flops.slots, found.flops.empty_fraction) == (2 * 64, 8 * 64, 0.75)
    assert found.flops.model == pytest.approx(alone.model) and found.flops.program == pytest.approx(
        4 * alone.program
    )
    assert found.estimate.mfu == pytest.approx(found.estimate.hfu * alone.model / alone.program / 4)
    text = plan_text.plan_report(found)
    assert "per step of 128 tokens" in text and "75 % of its 512 token slots that are empty" in text
    assert "6 of the 8 slots for rows in a step are empty (75 %)" in text
    assert alone.empty_fraction == 0 and "empty" not in plan_text.plan_report(
        replace(found, flops=alone, notes=())
    )


def test_matmul_flops_multiply_scans_and_take_the_largest_branch():
    def one(x):
        return jax.lax.scan(
            lambda h, _: (jax.lax.cond(h[0, 0] > 0, lambda h: h @ h, lambda h: h, h), None), x, None, length=5
        )[0]

    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    assert matmul_flops(jax.make_jaxpr(one)(x).jaxpr) == 5 * 2 * 8**3
    assert matmul_flops(jax.make_jaxpr(jax.grad(lambda x: one(x).sum()))(x).jaxpr) == 3 * 5 * 2 * 8**3


def collective(kind, overlapped, groups=((0, 1),), span=1, size=1000):
    return traffic.Collective("x", kind, size, 2, span, 10, ("f32",), groups, overlapped)


def test_a_step_takes_its_largest_overlapped_part_plus_exposed_collectives():
    machine = made_up(2)
    gather, reduce = collective("all-gather", True), collective("all-reduce", False, span=2)
    e = roofline.estimate(machine, (1e9, 2e9), 4e5, [gather, reduce], 1e12)
    assert e.compute == pytest.approx(2e9 / (2 * 1e12 * 0.7)) and e.memory == pytest.approx(4e5 / (1e9 * 0.8))
    assert e.overlapped == pytest.approx(10 * 500 / (1e8 * 0.8))
    assert e.exposed == pytest.approx(10 * 1000 / (1e7 * 0.8))
    assert e.step == pytest.approx(e.compute + e.exposed)
    assert e.serial == e.compute + e.memory + e.overlapped + e.exposed
    assert e.mfu == pytest.approx(1e9 / (e.step * 2 * 1e12)) and e.hfu == pytest.approx(2 * e.mfu)
    assert roofline.by_kind([gather, reduce])["all-reduce"] == {
        "runs": 10,
        "within": 0.0,
        "across": 10000.0,
    }


def test_exposed_weight_gathers_are_the_bottleneck_and_limit_scaling():
    machine, done = made_up(2), [replace(collective("all-gather", False), as_all_reduce=True)]
    e = roofline.estimate(machine, (1e7, 1e7), 0, done, 1e12)
    assert e.weights == e.exposed == pytest.approx(10 * 1000 / (1e8 * 0.8)) and e.overlapped == 0
    assert e.step == pytest.approx(e.compute + e.weights) and e.bottleneck == "exposed weight gathers"
    assert roofline.by_kind(done)["all-gather"] == {
        "runs": 10,
        "within": 10000.0,
        "across": 0.0,
        "as_all_reduce": 10,
    }
    counts, kinds = Flops(100, 100, 1e7, 1e7), roofline.by_kind(done)
    plain = plan.Plan("m", 2, "step", {}, 1, 2, None, 0, counts, kinds, 0, 0, e, 0.0, False, {})
    enough = 50 * e.weights / e.compute  # tokens a device
    assert "10 as all-reduces" in plan_text.plan_report(plain)
    limit = plan_text.scaling_limit(plain)
    assert f"more than B / {enough:,.0f} devices" in limit and "Gathers are exposed" in limit
    overlapped = roofline.estimate(machine, (1e7, 1e7), 0, [collective("all-gather", True)], 1e12)
    assert overlapped.weights == overlapped.overlapped > 0
    assert "B tokens are not faster" in plan_text.scaling_limit(replace(plain, estimate=overlapped))
    none = roofline.estimate(machine, (1e7, 1e7), 0, [collective("all-reduce", False)], 1e12)
    assert none.bottleneck == "activation collectives"
    assert "gathers no weights" in plan_text.scaling_limit(replace(plain, estimate=none))


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
        guess = roofline.Estimate(step, 0, 0, 0, 0, step, step, "matmuls", 0.1, 0.1)
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


def test_libtpus_out_of_memory_error_is_parsed():
    text = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 24.50G of 15.75G hbm. Exceeded hbm capacity by 8.75G."
    )
    assert memory.parse_out_of_memory(text) == (round(24.5 * 2**30), round(8.75 * 2**30))
    assert memory.parse_out_of_memory("RESOURCE_EXHAUSTED: something else") == (None, None)
    assert memory.parse_out_of_memory("INTERNAL: x") is None


def test_largest_arrays_exclude_arguments_and_values_inside_fusions():
    def program(w, x):  # w is an argument, the sum inside a fusion is never in memory
        return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), h), x, w)[1] ** 2) + jnp.sum(
            jnp.outer(x, x)[None] + w
        )

    w, x = jax.ShapeDtypeStruct((7, 90, 90), jnp.float32), jax.ShapeDtypeStruct((90,), jnp.float32)
    found = memory.largest_arrays(hlo.parse_hlo(jax.jit(program).lower(w, x).compile().as_text()))
    assert "f32[7,90,90]" not in found and found["f32[7,90]"] == 7 * 90 * 4
    assert memory.largest_arrays(hlo.parse_hlo("")) == {}


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
    assert memory.largest_arrays(hlo.parse_hlo(text)) == {"f32[16,16]": 1024, "f32[4]": 16}


def test_the_default_table_has_all_cells_and_no_program_depends_on_the_planner():
    fits = runpy.run_path(str(ROOT / "scripts" / "bench" / "fits.py"))
    cells = list(fits["cells_of"](fits["arguments"]([])))
    assert [c for c in cells if c[1] == "405B"] == [("v5p", "405B", "LoRA", "sft")]
    others = len(fits["MODELS"]) - len(fits["ONLY"])
    assert len(set(cells)) == len(cells) == others * 3 * 2 * len(fits["HARDWARE"]) + 1
    package = ROOT / "jaxft"
    assert "plan" in fits["PLANNER"] and all((package / part).exists() for part in fits["PLANNER"])
    for path in package.rglob("*.py"):
        if not any(path.is_relative_to(package / part) for part in fits["PLANNER"]):
            assert not re.search(
                r"^(from jaxft import .*\bplan\b|from jaxft\.plan\b)", path.read_text(), re.M
            ), path


def test_the_script_plans_a_gemma_preset(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(machines, "machine", lambda name: made_up(1))
    script = runpy.run_path(str(ROOT / "scripts/plan.py"))
    config = ["--config", str(ROOT / "configs/gemma3_4b_sft.py"), "--devices", "made-up:1", "--train-only"]
    small = ["model=google/gemma-3-270m-it", "batch=2", "micro=1", "max_length=1024"]
    monkeypatch.setattr(sys, "argv", ["plan.py", *config, "--json", *small])
    assert script["main"]() == 0
    (found,) = map(json.loads, capsys.readouterr().out.splitlines())
    published = 268_098_176  # parameters of google/gemma-3-270m, with a tied head
    assert found["parts"]["weights"] == 2 * published and found["fits"], found


@pytest.mark.skipif(HAS_CUDA, reason="the CUDA plugin is installed")
def test_without_the_cuda_plugin_the_error_names_the_extra():
    with pytest.raises(ValueError, match=r"needs jax's CUDA plugin: pip install 'jaxft\[cuda12\]'"):
        machines.machine("h100:1")


@pytest.mark.skipif(HAS_TPU, reason="libtpu is installed")
def test_without_libtpu_the_error_names_the_extra():
    with pytest.raises(ValueError, match=r"needs libtpu: pip install 'jaxft\[tpu\]'"):
        machines.machine("v5e:4x4")


def planned(*argv, config="configs/llama32_sft.py"):
    command = [sys.executable, "scripts/plan.py", "--config", config, "--json", "--train-only", *argv]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not HAS_CUDA, reason="needs jax's CUDA plugin, pip install 'jaxft[cuda12]'")
def test_quantisation_and_fsdp_reduce_memory():
    (plain,), (packed,) = (
        planned("--devices", "h100:1", "batch=8", f"quant={kind}") for kind in ("none", "nf4")
    )
    (many,) = planned("--devices", "h100:8", "batch=8", "quant=nf4", "mesh.fsdp=8")
    assert (
        packed["parts"]["quantised base"] < 0.5 * plain["parts"]["weights"]
        and packed["total"] < plain["total"]
    )
    assert (
        many["parts"]["quantised base"] < packed["parts"]["quantised base"] / 4
        and many["total"] < packed["total"]
    )
    assert many["collectives"]["all-gather"]["within"] > 0 and "all-gather" not in packed["collectives"]
    assert 0 < max(packed["largest_arrays"].values()) <= packed["parts"]["activations and temporaries"]


@pytest.mark.skipif(not HAS_TPU, reason="needs libtpu, pip install 'jaxft[tpu]'")
def test_slices_replicate_weights_and_reduce_gradients_across():
    small = [
        "max_length=256",
        "batch={devices}",
        "micro=1",
        "model=HuggingFaceTB/SmolLM2-135M",
        "remat=full",
        "full=true",
    ]
    one, two = planned(
        "--devices",
        "v5e:2x2",
        "2xv5e:2x2",
        *small,
        "mesh.slices=-1",
        "mesh.fsdp=4",
        config="configs/llama31_8b_sft.py",
    )
    assert one["fits"] and one["devices"] == 4 and two["devices"] == 8
    assert (
        all(row["across"] == 0 for row in one["collectives"].values())
        and one["parts"]["weights"] == two["parts"]["weights"]
    )
    assert sum(row["across"] for row in two["collectives"].values()) > 0.5 * two["parts"]["weights"]


def test_a_quick_plan_has_a_note_on_tpus_only():
    tpu = machines.Machine("one TPU", None, [SimpleNamespace(platform="tpu")])
    assert not plan.quick_notes(tpu)
    plan.set_quick(True)
    try:
        assert "compiled with --quick" in plan.quick_notes(tpu)[0] and not plan.quick_notes(made_up())
    finally:
        plan.set_quick(False)
    assert not plan.quick_notes(tpu)


def test_the_table_of_fits_merges_files_and_counts_outdated_cells(tmp_path):
    cell = {"fits": True, "total": 3 * machines.GIB, "devices": 1, "source": "older"}
    for name, key in (("a", "h100:1 1B LoRA sft"), ("b", "v5e:2x2 1B LoRA sft")):
        devices_ = 4 if name == "b" else 1
        (tmp_path / f"{name}.json").write_text(json.dumps({key: {**cell, "devices": devices_}}))
    small = {**cell, "fits": False, "total": None}
    (tmp_path / "all.json").write_text(json.dumps({"v5e:1x1 1B LoRA sft": small}))
    command = [sys.executable, "scripts/bench/fits.py", "--out", str(tmp_path / "all.json"), "--models", "1B"]
    added = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    done = subprocess.run([*command, "--add", *added], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "| Llama-3.2-1B | LoRA | SFT |  |  | 3.0 | 3.0 × 4 |  |  |" in done.stdout
    assert "3 of 3 programs were compiled with an older jax or older code" in done.stdout
    assert set(json.loads((tmp_path / "all.json").read_text())) == {
        "v5e:1x1 1B LoRA sft", "h100:1 1B LoRA sft", "v5e:2x2 1B LoRA sft"
    }  # fmt: skip
