"""Bytes that a compiled program moves: small programs on eight simulated devices, and hand-written HLO."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.distributed import sharding
from jaxft.plan import hlo, plan, program_bytes

N = 8
MESH = dict(data=1, fsdp=8)


def compiled(program, *shapes, domains=None, **kwargs):
    text = jax.jit(program, **kwargs).lower(*shapes).compile().as_text()
    module = hlo.parse_hlo(text)
    return module, program_bytes.collectives(module, domains or [0] * N)


def on(mesh, shape, *axes):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.array_sharding(mesh, axes, shape))


def test_an_all_gather_moves_all_shards_but_the_local_one():
    mesh = sharding.make_mesh(sharding.MeshShape(**MESH), jax.devices()[:N])
    w = on(mesh, (64, 32), "width", "act_width")
    with jax.set_mesh(mesh):
        _, collectives = compiled(lambda w: jnp.sin(w), w, out_shardings=sharding.replicated(mesh))
    (one,) = collectives
    assert (one.kind, one.size, one.group, one.span, one.times) == ("all-gather", 64 * 32 * 4, 8, 1, 1)
    assert one.moved == 64 * 32 * 4 * 7 / 8 and one.across == 0


def test_trip_counts_of_nested_loops_multiply():
    mesh = sharding.make_mesh(sharding.MeshShape(**MESH), jax.devices()[:N])
    x = on(mesh, (16, 64), "time", "width")

    def program(x):
        def inner(h, _):
            return jnp.sin(h + jnp.sum(x * h[:, None], 1)), None

        def outer(h, _):
            return jax.lax.scan(inner, h, None, length=5)[0], None

        return jax.lax.scan(outer, jnp.ones(16), None, length=3)[0]

    with jax.set_mesh(mesh):
        module, collectives = compiled(program, x)
    assert not module.unknown_loops
    reduces = [c for c in collectives if c.kind == "all-reduce"]
    assert sum(c.times * c.size for c in reduces) == 3 * 5 * 16 * 4
    assert sum(c.times * c.moved for c in reduces) == 3 * 5 * 16 * 4 * 2 * 7 / 8


def test_traffic_across_hosts_is_divided_over_their_devices():
    mesh = sharding.make_mesh(sharding.MeshShape(**MESH), jax.devices()[:N])
    w = on(mesh, (64, 32), "width", "act_width")
    with jax.set_mesh(mesh):
        text = jax.jit(jnp.sin, out_shardings=sharding.replicated(mesh)).lower(w).compile().as_text()
    size = 64 * 32 * 4
    (one,) = program_bytes.collectives(hlo.parse_hlo(text), [0] * 4 + [1] * 4)
    # half is on the other host, and four devices receive it
    assert one.span == 2 and one.across == size / 2 / 4
    (alone,) = program_bytes.collectives(hlo.parse_hlo(text), list(range(8)))
    assert alone.across == alone.moved == size * 7 / 8


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,1},{2,3}}, x", ((0, 1), (2, 3))),
        ("replica_groups={}, x", ((0, 1, 2, 3),)),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
        ("channel_id=1", ((0, 1, 2, 3),)),
    ],
)
def test_every_format_of_replica_groups_is_parsed(text, groups):
    parsed = program_bytes.replica_groups(text, 4)
    assert {frozenset(g) for g in parsed} == {frozenset(g) for g in groups}


HAND = """HloModule hand

%inside (p: bf16[8,4]) -> bf16[8,16] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[8,16]{1,0} all-gather(%p), channel_id=5, replica_groups=[1,4]<=[4], dimensions={1}, CHAIN
}

%middle (p.1: bf16[8,4]) -> bf16[8,16] {
  %p.1 = bf16[8,4]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,16]{1,0} all-gather(%p.1), channel_id=5, replica_groups=[1,4]<=[4], dimensions={1}, CHAIN
}

%all-reduce-scatter.9 (p.2: f32[16]) -> f32[4] {
  %p.2 = f32[16]{0} parameter(0)
  %all-reduce.3 = f32[16]{0} all-reduce(%p.2), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %dynamic-slice = f32[4]{0} dynamic-slice(%all-reduce.3, %c), dynamic_slice_sizes={4}
}

%condition (t: (s32[], f32[16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(10)
  %t = (s32[]{:T(128)}, f32[16]{0:T(256)}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %less = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

%body (t.1: (s32[], f32[16])) -> (s32[], f32[16]) {
  %t.1 = (s32[]{:T(128)}, /*index=1*/f32[16]{0:T(256)}) parameter(0)
  %at.1 = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  %x = f32[16]{0:T(256)} get-tuple-element(%t.1), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%at.1, %two)
  %piece = bf16[8,16]{1,0} fusion(%y), kind=kCustom, calls=%inside
  %piece.1 = bf16[8,16]{1,0} fusion(%y), kind=kCustom, calls=%middle
  %kernel = f32[4]{0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="x"}
  %over = (f32[8]{0}, u32[], token[]) send(%x), OVER
  %part = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.9
  %start = (bf16[8]{0}, bf16[8]{0}, u32[], u32[]) collective-permute-start(%y), channel_id=8, source_target_pairs={{0,1},{1,0}}
  %done = bf16[8]{0} collective-permute-done(%start)
  ROOT %out = (s32[]{:T(128)}, f32[16]{0:T(256)}) tuple(%next, %x)
}

ENTRY %main (a: f32[16]) -> f32[16] {
  %a = f32[16]{0} parameter(0)
  %two.1 = s32[] constant(2)
  %first = (s32[], f32[16]{0}) tuple(%two.1, %a)
  %loop = (s32[]{:T(128)}, f32[16]{0:T(256)}) while(%first), condition=%condition, body=%body
  %free = (s32[], f32[16]{0}) while(%loop), condition=%nothing, body=%nowhere
  %wait = ((f32[16]{0}, s4[6]{0}), (f32[64]{0}, s4[24]{0})) all-gather-start(%a, %b), replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %got = f32[64]{0} all-gather-done(%wait)
}
"""  # noqa: E501
HAND = HAND.replace("CHAIN", 'frontend_attributes={chain_id="2"}')
HAND = HAND.replace(
    "OVER", 'is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'
)


def test_chained_pieces_count_once_and_trip_counts_follow_from_start_step_and_limit():
    program = hlo.parse_hlo(HAND)
    by_name = {c.name: c for c in program_bytes.collectives(program, [0, 0, 1, 1])}
    assert by_name.keys() == {"all-gather.1", "all-reduce.3", "start", "wait", "over"}
    assert all(by_name[name].times == 4 for name in ("all-gather.1", "all-reduce.3", "start"))  # 2, 4, 6, 8
    assert by_name["all-gather.1"].size == 8 * 16 * 2 and by_name["wait"].size == 64 * 4 + 12
    scatter = by_name["all-reduce.3"]
    assert (scatter.kind, scatter.size, scatter.span) == ("reduce-scatter", 16 * 4, 2)
    assert (by_name["start"].size, by_name["start"].span, by_name["start"].moved) == (16, 1, 16)
    assert (by_name["over"].kind, by_name["over"].span, by_name["over"].across, by_name["over"].times) == (
        "all-reduce",
        2,
        32,
        4,
    )
    assert program.unknown_loops == ["free"]


def test_loops_without_a_known_trip_count_are_reported():
    start, body_end = "  %two.1 = s32[] constant(2)\n", "}\n\nENTRY"
    copied = HAND.replace(start, "  %was = s32[] constant(2)\n  %two.1 = s32[] copy(%was)\n")
    threaded = HAND.replace(body_end, '}, execution_thread="sparsecore"\n\nENTRY')
    for text in (HAND, copied, threaded):
        program = hlo.parse_hlo(text)
        times = {c.name: c.times for c in program_bytes.collectives(program, [0, 0, 1, 1])}
        assert times["all-gather.1"] == 4 and program.unknown_loops == ["free"]
    for old, new in ((start, "  %two.1 = s32[] parameter(1)\n"), ("add(%at.1, %two)", "add(%at.1, %x)")):
        assert old in HAND
        program = hlo.parse_hlo(HAND.replace(old, new))
        program_bytes.collectives(program, [0, 0, 1, 1])
        assert program.unknown_loops == ["loop", "free"]
    for truncated in (HAND[: HAND.rindex("}")], HAND.replace("ENTRY ", "")):
        with pytest.raises(ValueError, match="no complete entry computation"):
            hlo.parse_hlo(truncated)


EXCHANGED = """HloModule exchanged

ENTRY %main (a: f32[128]) -> f32[128] {
  %a = f32[128]{0} parameter(0)
  %each = f32[128]{0} all-to-all(%a), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %next = f32[128]{0} collective-permute(%each), channel_id=2, source_target_pairs={PAIRS}
}
"""


def test_bytes_across_hosts_of_an_all_to_all_and_a_ring():
    """In an all-to-all a device sends half of its data; in a ring over two hosts two devices send."""
    text = EXCHANGED.replace("PAIRS", ",".join(f"{{{i},{(i + 1) % 8}}}" for i in range(8)))
    each, ring = program_bytes.collectives(hlo.parse_hlo(text), [0] * 4 + [1] * 4)
    assert (each.kind, each.moved, each.across) == ("all-to-all", 512 * 7 / 8, 512 / 2)
    assert (ring.kind, ring.moved, ring.across) == ("collective-permute", 512, 512 / 4)
    machine = SimpleNamespace(chip=SimpleNamespace(within=1e4, across=1e3), axes=lambda group: 1)
    assert plan.seconds(machine, ring) == pytest.approx(512 / 1e3 / plan.LINKS)  # the slowest pair


SUMMED = """HloModule summed

%part (z: bf16[1,8,16], at: u32[], w: bf16[3,2,16], i: s32[]) -> bf16[1,8,16] {
  %z = bf16[1,8,16]{2,1,0} parameter(0)
  %w = bf16[3,2,16]{2,1,0} parameter(2)
  %i = s32[] parameter(3)
  %none = s32[] constant(0)
  %own = bf16[1,2,16]{2,1,0} dynamic-slice(%w, %i, %none, %none), dynamic_slice_sizes={1,2,16}
  %at = u32[] parameter(1)
  %zero = u32[] constant(0)
  ROOT %placed = bf16[1,8,16]{2,1,0} dynamic-update-slice(%z, %own, %zero, %at, %zero)
}

%keep (g: f32[8,16], at.1: s32[]) -> f32[2,16] {
  %g = f32[8,16]{1,0} parameter(0)
  %at.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  ROOT %mine = f32[2,16]{1,0} dynamic-slice(%g, %at.1, %zero.1), dynamic_slice_sizes={2,16}
}

%all (g.1: f32[8,16]) -> f32[] {
  %g.1 = f32[8,16]{1,0} parameter(0)
  ROOT %sum = f32[] reduce(%g.1, %nothing), dimensions={0,1}, to_apply=%add
}

ENTRY %main (a: bf16[3,2,16], b: f32[8,16], at.2: u32[], n: s32[]) -> f32[2,16] {
  %a = bf16[3,2,16]{2,1,0} parameter(0)
  %b = f32[8,16]{1,0} parameter(1)
  %at.2 = u32[] parameter(2)
  %n = s32[] parameter(3)
  %nil = bf16[] constant(0)
  %zeros = bf16[1,8,16]{2,1,0} broadcast(%nil), dimensions={}
  %padded = bf16[1,8,16]{2,1,0} fusion(%zeros, %at.2, %a, %n), kind=kLoop, calls=%part
  %own.1 = bf16[1,2,16]{2,1,0} slice(%a), slice={[0:1], [0:2], [0:16]}
  %padded.1 = bf16[1,8,16]{2,1,0} dynamic-update-slice(%zeros, %own.1, %n, %n, %n)
  %held = bf16[1,8,16]{2,1,0} dynamic-update-slice(%padded, %own.1, %n, %n, %n)
  %gathered = (bf16[1,8,16]{2,1,0}, bf16[1,8,16]{2,1,0}) all-reduce(%padded, %padded.1), GROUPS
  %scattered = f32[8,16]{1,0} all-reduce(%b), GROUPS
  %part.1 = f32[2,16]{1,0} fusion(%scattered, %n), kind=kLoop, calls=%keep
  %pair = (f32[8,16]{1,0}, f32[8,16]{1,0}) all-reduce(%b, %b), GROUPS
  %one = f32[8,16]{1,0} get-tuple-element(%pair), index=0
  %two = f32[8,16]{1,0} get-tuple-element(%pair), index=1
  %part.2 = f32[2,16]{1,0} fusion(%one, %n), kind=kLoop, calls=%keep
  %part.3 = f32[2,16]{1,0} fusion(%two, %n), kind=kLoop, calls=%keep
  %added = f32[8,16]{1,0} all-reduce(%b), GROUPS
  %part.4 = f32[2,16]{1,0} fusion(%added, %n), kind=kLoop, calls=%keep
  %norm = f32[] fusion(%added), kind=kLoop, calls=%all
  %real = bf16[1,8,16]{2,1,0} all-reduce(%held), GROUPS
  %start = (f32[2,16]{1,0}, f32[8,16]{1,0}) all-gather-start(%part.1), dimensions={0}, GROUPS
  %waiting = (f32[2,16]{1,0}, f32[8,16]{1,0}) all-gather-start(%part.2), dimensions={0}, GROUPS, backend_config={"is_sync":true}
  %plain = f32[8,16]{1,0} all-gather(%part.3), dimensions={0}, GROUPS
  ROOT %end = f32[2,16]{1,0} copy(%part.4)
}
""".replace("GROUPS", "replica_groups={{0,1,2,3}}, to_apply=%add")  # noqa: E501


def test_an_all_reduce_that_gathers_or_scatters_is_recognised_and_counts_twice():
    by_name = {c.name: c for c in program_bytes.collectives(hlo.parse_hlo(SUMMED), [0, 0, 1, 1])}
    kinds = {name: (c.kind, c.as_all_reduce) for name, c in by_name.items() if "gather-" not in name}
    assert kinds == {
        "gathered": ("all-gather", True), "scattered": ("reduce-scatter", True),
        "pair": ("reduce-scatter", True), "added": ("all-reduce", False), "real": ("all-reduce", False),
        "plain": ("all-gather", False), "start": ("all-gather", False), "waiting": ("all-gather", False),
    }  # fmt: skip
    assert (
        by_name["gathered"].moved == 2 * (2 * 8 * 16 * 2) * 3 / 4
        and by_name["gathered"].across == 2 * (2 * 8 * 16 * 2) / 2 / 2
    )
    assert (
        by_name["scattered"].moved
        == by_name["added"].moved
        == 2 * by_name["plain"].moved
        == 2 * (8 * 16 * 4) * 3 / 4
    )
    assert {name for name, c in by_name.items() if c.overlapped} == {"start"}  # the others are synchronous
    assert {name for name, c in by_name.items() if not c.gathers_or_scatters} == {"added", "real"}


def test_memory_traffic_of_a_slice_or_in_place_update_is_its_size():
    def program(x):  # reads and writes one row per iteration
        def step(i, x):
            return x.at[i].set(jnp.sin(x[i]))

        return jax.lax.fori_loop(0, 256, step, x)

    x = jax.ShapeDtypeStruct((256, 4096), jnp.float32)
    moved = program_bytes.memory_bytes(
        hlo.parse_hlo(jax.jit(program, donate_argnums=0).lower(x).compile().as_text())
    )
    size = 256 * 4096 * 4
    assert 2 * size <= moved < 6 * size  # not 256 times the array


def test_memory_traffic_of_a_matmul_is_its_operands_and_result():
    a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((256, 512), (512, 128)))
    moved = program_bytes.memory_bytes(hlo.parse_hlo(jax.jit(jnp.dot).lower(a, b).compile().as_text()))
    exact = 4 * (256 * 512 + 512 * 128 + 256 * 128)
    np.testing.assert_allclose(moved, exact, rtol=0.01)


def test_bits_per_element_of_hlo_dtypes():
    assert [hlo.bits(d) for d in ("pred", "s4", "bf16", "f8e4m3fn", "u32", "c64")] == [8, 4, 16, 8, 32, 64]
    assert hlo.arrays("(s4[3]{0:T(8)S(1)}, f32[])") == [
        hlo.Array("s4", (3,), "0:T(8)S(1)"),
        hlo.Array("f32", (), ""),
    ]
    assert hlo.arrays("s4[3]")[0].bytes == 2
