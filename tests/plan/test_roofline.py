"""FLOPs of a tiny run by the formula, and the roofline estimate by hand."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from tiny_plan import TINY, made_up, tiny

from jaxft.distributed import sharding
from jaxft.nn.quant import Quant
from jaxft.plan import plan, plan_report, program_bytes
from jaxft.plan.plan import Flops, flops, is_fp8, matmul_flops
from jaxft.train import programs


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
    text = plan_report.plan_report(found)
    assert "per step of 128 tokens" in text and "75 % of its 512 token slots that are empty" in text
    assert "6 of the 8 slots for rows in a step are empty (75 %)" in text and "FP8" not in text
    some = replace(found, flops=replace(found.flops, fp8=found.flops.program / 4))
    assert "FP8: 25 % of the program's FLOPs; in bfloat16 its matmuls would take" in plan_report.plan_report(
        some
    )
    assert alone.empty_fraction == 0 and "empty" not in plan_report.plan_report(
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


def test_fp8_matmuls_are_counted_and_take_less_time():
    run = tiny(quant=Quant("fp8", fp8_matmul=True))
    assert counted(run).fp8 == 0  # emulated in other dtypes

    def one(x):
        small = x.astype(jnp.float8_e4m3fn)
        both = jax.lax.dot_general(
            small, x.astype(jnp.float8_e5m2), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        return both + x @ x

    jaxpr = jax.make_jaxpr(one)(jax.ShapeDtypeStruct((8, 8), jnp.float32)).jaxpr
    assert matmul_flops(jaxpr) == 2 * matmul_flops(jaxpr, is_fp8) == 2 * 2 * 8**3
    e = plan.estimate(made_up(2), (1e9, 2e9), 0, [], 1e12, (0.5e9, 4e12))
    assert e.compute == pytest.approx((1.5e9 / 1e12 + 0.5e9 / 4e12) / 2 / 0.7)
    assert e.step == e.compute and e.without_fp8 == pytest.approx(2e9 / (2 * 1e12 * 0.7))


def collective(kind, overlapped, groups=((0, 1),), span=1, size=1000):
    return program_bytes.Collective("x", kind, size, 2, span, 10, ("f32",), groups, overlapped)


def test_a_step_takes_its_largest_overlapped_part_plus_exposed_collectives():
    machine = made_up(2)
    gather, reduce = collective("all-gather", True), collective("all-reduce", False, span=2)
    e = plan.estimate(machine, (1e9, 2e9), 4e5, [gather, reduce], 1e12)
    assert e.compute == pytest.approx(2e9 / (2 * 1e12 * 0.7)) and e.memory == pytest.approx(4e5 / (1e9 * 0.8))
    assert e.overlapped == pytest.approx(10 * 500 / (1e8 * 0.8))
    assert e.exposed == pytest.approx(10 * 1000 / (1e7 * 0.8))
    assert e.step == pytest.approx(e.compute + e.exposed)
    assert e.serial == e.compute + e.memory + e.overlapped + e.exposed
    assert e.mfu == pytest.approx(1e9 / (e.step * 2 * 1e12)) and e.hfu == pytest.approx(2 * e.mfu)
    assert plan.by_kind([gather, reduce])["all-reduce"] == {
        "runs": 10,
        "within": 0.0,
        "across": 10000.0,
    }


def test_exposed_weight_gathers_are_the_bottleneck_and_limit_scaling():
    machine, done = made_up(2), [replace(collective("all-gather", False), as_all_reduce=True)]
    e = plan.estimate(machine, (1e7, 1e7), 0, done, 1e12)
    assert e.weights == e.exposed == pytest.approx(10 * 1000 / (1e8 * 0.8)) and e.overlapped == 0
    assert e.step == pytest.approx(e.compute + e.weights) and e.bottleneck == "exposed weight gathers"
    assert plan.by_kind(done)["all-gather"] == {
        "runs": 10,
        "within": 10000.0,
        "across": 0.0,
        "as_all_reduce": 10,
    }
    counts, kinds = Flops(100, 100, 1e7, 1e7), plan.by_kind(done)
    plain = plan.Plan("m", 2, "step", {}, 1, 2, None, 0, counts, kinds, 0, 0, e, 0.0, False, {})
    enough = 50 * e.weights / e.compute  # tokens a device
    assert "10 as all-reduces" in plan_report.plan_report(plain)
    limit = plan_report.scaling_limit(plain)
    assert f"more than B / {enough:,.0f} devices" in limit and "Gathers are exposed" in limit
    overlapped = plan.estimate(machine, (1e7, 1e7), 0, [collective("all-gather", True)], 1e12)
    assert overlapped.weights == overlapped.overlapped > 0
    assert "B tokens are not faster" in plan_report.scaling_limit(replace(plain, estimate=overlapped))
    none = plan.estimate(machine, (1e7, 1e7), 0, [collective("all-reduce", False)], 1e12)
    assert none.bottleneck == "activation collectives"
    assert "gathers no weights" in plan_report.scaling_limit(replace(plain, estimate=none))
