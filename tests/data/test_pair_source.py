"""The source of pairs: batches depend on the step alone, weights sum to 1; held-out pairs, evaluation
batches, references.
"""

import dataclasses
import json
import re
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pairs import epoch, flat, make_rows, same, seen, source, unpaired, write
from tiny_tokenizers import tiny

from jaxft.data.packing.pair_layout import values_by_pair
from jaxft.data.pairs import PairRows
from jaxft.data.sft import Rows
from jaxft.data.source import open_for
from jaxft.nn.attention.layer_attention import batch_angles, uniform
from jaxft.nn.rope import Rope


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "r.jsonl", make_rows(37))
    return tmp_path


@pytest.mark.parametrize("shards", (1, 2))
@pytest.mark.parametrize("micro", (1, 2))
@pytest.mark.parametrize("third", (None, "mismatched"))
def test_every_batch_has_one_shape_and_an_epoch_every_pair_once(folder, micro, shards, third):
    s = source(folder, micro=micro, shards=shards, third=third, extras=("margin",), epochs=2, held_out=0.1)
    rows, shape = make_rows(37), lambda t: jax.tree.map(lambda x: (x.shape, x.dtype), t)
    held = {pair for batch in s.held_out for pair in seen(batch)}
    assert len(held) == 4 and s.info.steps == 2 * s.info.steps_per_epoch == 2 * 9 and len(s.keys) == 37
    for number in (0, 1):
        found = epoch(s, number)
        assert found.keys() | held == set(range(37)) and not found.keys() & held
        assert all(value[1] == {"margin": rows[i]["margin"]} for i, value in found.items())
    for k in range(s.info.steps):
        batch = s.batch(k)[0]
        assert shape(batch) == shape(s.shapes[-1]) and batch.ids.shape[:2] == (micro, shards)
        assert sum(batch.index.ravel() >= 0) == (1 if k % 9 == 8 else 4)
    assert all(
        x.shape == (1, *y.shape[1:])
        for h in s.held_out
        for x, y in zip(*map(jax.tree.leaves, (h, s.shapes[-1])), strict=True)
    )


def test_micro_shards_and_layout_change_only_the_division_into_rows(folder):
    plain = source(folder, third="mismatched", epochs=2)
    for options in ({"micro": 2}, {"micro": 4}, {"shards": 2}, {"micro": 2, "shards": 2, "layout": "plain"}):
        other = source(folder, third="mismatched", epochs=2, **options)
        assert other.info.fingerprint == plain.info.fingerprint
        for k in range(plain.info.steps):
            assert seen(other.batch(k)[0]) == seen(plain.batch(k)[0])
            assert np.array_equal(
                np.unique(other.batch(k)[0].mean_lengths), np.unique(plain.batch(k)[0].mean_lengths)
            )


def test_batches_are_a_pure_function_of_seed_and_step(folder):
    s, again, other = source(folder, epochs=3), source(folder, epochs=2.5), source(folder, seed=1)
    assert (
        s.info.fingerprint == again.info.fingerprint != other.info.fingerprint
        and s.info.steps == 27
        and again.info.steps == 23
    )
    batches = [s.batch(k)[0] for k in range(s.info.steps)]
    for k in reversed(range(again.info.steps)):
        assert seen(batches[k]) == seen(again.batch(k)[0]) and same(batches[k], s.batch(k, state=object())[0])
    assert seen(batches[0]) != seen(batches[9]) and seen(batches[0]) != seen(other.batch(0)[0])
    assert same(s.held_out, source(folder, epochs=3).held_out)
    assert source(folder, epochs=1e-6).info.steps == 1


def test_whatever_changes_the_loss_changes_the_fingerprint(folder):
    changes = (
        {},
        {"seed": 1},
        {"batch": 5},
        {"weighting": "token"},
        {"weight_column": "w"},
        {"extras": ("margin",)},
    )
    changes += (
        {"third": "mismatched"},
        {"held_out": 0.2},
        {"format": "plain"},
        {"max_length": 60, "too_long": "drop"},
    )
    found = [source(folder, **change).info.fingerprint for change in changes]
    assert len(set(found)) == len(found)


def test_names_are_those_of_the_rows(folder):
    s = source(folder, micro=2, shards=2, held_out="none", batch=5)
    for k in range(s.info.steps):
        index = flat(s.batch(k)[0]).index
        target = [", ".join(f"r.jsonl:{i + 1}" for i in row if i >= 0) for row in index]
        assert [*s.row_names(k), *[""] * (4 - len(s.row_names(k)))] == target and all(s.row_names(k))


@pytest.mark.parametrize("weighting", ("pair", "token"))
@pytest.mark.parametrize("column", (None, "w"))
def test_weights_of_a_batch_sum_to_one(folder, weighting, column):
    s, rows = source(folder, weighting=weighting, weight_column=column, held_out=0.3), make_rows(37)
    for group in [[s.batch(k)[0]] for k in range(s.info.steps)] + [s.held_out]:
        found = {pair: value for batch in group for pair, value in seen(batch).items()}
        share = {i: rows[i][column] if column else 1 for i in found}
        if weighting == "token":
            share = {i: w * sum(len(targets) for _, targets, _ in found[i][2]) for i, w in share.items()}
        assert sum(share.values()) > 0
        for i, (weight, _, _) in found.items():
            assert weight == pytest.approx(share[i] / sum(share.values()), rel=1e-6)


def test_a_batch_of_no_weight_stays_at_zero(folder):
    write(folder / "r.jsonl", [{**row, "w": i // 7} for i, row in enumerate(make_rows(8))])
    s = source(folder, weight_column="w", held_out="none")
    (batch,) = [b for b in (s.batch(0)[0], s.batch(1)[0]) if not b.pair_weights.any()]
    assert (
        (batch.pair_weights == 0).all() and (batch.index >= 0).sum() == 4 and (batch.mean_lengths == 0).all()
    )


@pytest.mark.parametrize("rows", (make_rows(37), unpaired(37)), ids=("paired", "unpaired"))
def test_mean_lengths_are_those_of_the_whole_batch(folder, rows):
    write(folder / "r.jsonl", rows)
    s = source(folder, micro=2, held_out=0.3, batch=6)
    for group in [[s.batch(k)[0]] for k in range(s.info.steps)] + [s.held_out]:
        lengths = np.concatenate([flat(batch).lengths.reshape(-1, 2) for batch in group])
        target = [column[column > 0].mean() if (column > 0).any() else 0 for column in lengths.T]
        for batch in group:
            assert np.allclose(batch.mean_lengths, np.float32(target))


# ---- who is held out


def test_pairs_of_one_prompt_are_never_on_both_sides(folder):
    rows = [{**row, "prompt": f"{i % 9}"} for i, row in enumerate(make_rows(37))]
    write(folder / "r.jsonl", rows)
    s = source(folder, held_out=0.3)
    held = {i % 9 for batch in s.held_out for i in seen(batch)}
    assert held and not held & {i % 9 for i in epoch(s)} and 11 <= s.info.stats.held_out <= 15
    write(folder / "r.jsonl", [{**row, "prompt": "q"} for row in rows])
    assert source(folder, held_out=0.3).info.stats.held_out == 11
    write(folder / "r.jsonl", [{**row, "prompt": "pq"[i > 0]} for i, row in enumerate(rows)])
    assert {source(folder, held_out=0.9, seed=seed).info.stats.held_out for seed in range(9)} <= {1, 36}


def test_another_file_may_be_held_out(folder):
    held = write(folder / "h.jsonl", make_rows(40)[37:])
    s = source(folder, held_out=held)
    assert (
        {i for batch in s.held_out for i in seen(batch)} == {37, 38, 39}
        and len(s.keys) == 40
        and len(epoch(s)) == 37
    )
    assert s.info.fingerprint != source(folder, held_out="none").info.fingerprint


# ---- the mismatched answer


def bodies(s, members):
    return {
        i: [a and a[1] for a in value[2]] for batch in s.cover(members) for i, value in seen(batch).items()
    }


def test_mismatched_responses_are_of_other_pairs_and_each_pair_lends_one(folder):
    """Of pairs, half lend the chosen and half the rejected response: TRL makes two rows of a pair first."""
    for rows in (make_rows(37), unpaired(37)):
        write(folder / "r.jsonl", rows)
        s = source(folder, third="mismatched", held_out=0.3)
        held = {i for batch in s.held_out for i in seen(batch)}
        assert s.shapes[-1].kinds == ("chosen", "rejected", "mismatched")
        for side in (held, set(range(37)) - held):
            found = bodies(s, sorted(side))
            responses = [(i, k, body) for i, own in found.items() for k, body in enumerate(own[:2])]
            owner = {tuple(body): (i, k) for i, k, body in responses if body}
            lent = {i: owner[tuple(c)] for i, (*_, c) in found.items()}
            assert sorted(donor for donor, _ in lent.values()) == sorted(found)
            assert all(donor != i for i, (donor, _) in lent.items())
            if all(a and b for a, b, _ in found.values()):
                assert abs(sum(kind for _, kind in lent.values()) - len(found) / 2) <= 3
        assert bodies(source(folder, third="mismatched", held_out=0.3, epochs=3), range(37)) == bodies(
            s, range(37)
        )


def test_a_mismatched_response_has_another_prompt_if_there_are_enough(folder):
    rows = [{**row, "prompt": "pqr"[i % 3], "chosen": f"{i % 3} {i}"} for i, row in enumerate(make_rows(21))]
    write(folder / "r.jsonl", rows)
    found = bodies(source(folder, third="mismatched", held_out="none"), range(21))
    assert all(tiny("llama3").decode(c)[0] != str(i % 3) for i, (*_, c) in found.items())
    write(folder / "r.jsonl", [{**row, "prompt": "p"} for row in rows])
    assert all(
        a != c for a, _, c in bodies(source(folder, third="mismatched", held_out="none"), range(21)).values()
    )
    write(folder / "r.jsonl", rows[:1] * 3)
    with pytest.raises(
        ValueError, match="data.third=mismatched takes each pair's third response from another pair"
    ):
        source(folder, third="mismatched", held_out="none")


def test_a_mismatched_response_is_truncated_with_its_new_prompt(folder):
    rows = [{"prompt": "a " * n, "chosen": "b " * (20 - n) + "c", "rejected": "d"} for n in (1, 18)]
    write(folder / "r.jsonl", rows)
    s = source(folder, "none", format="plain", third="mismatched", held_out="none", max_length=22, batch=2)
    for batch in (s.batch(0)[0], *s.cover([0, 1])):
        for _, _, answers in seen(batch).values():
            assert all(len(prompt) + len(targets) <= 22 for prompt, targets, _ in answers)


# ---- evaluation batches and the reference


@settings(max_examples=20, deadline=None)
@given(members=st.sets(st.integers(0, 36), min_size=1), shards=st.integers(1, 3))
def test_cover_returns_the_given_pairs_in_the_shape_of_the_held_out_batches(covered, members, shards):
    s = covered(shards)
    order = list(members)
    batches = s.cover(order)
    found = [pair for batch in batches for pair in seen(batch)]
    assert sorted(found) == sorted(members)
    assert sum(batch.pair_weights.sum() for batch in batches) == pytest.approx(1, abs=1e-5)
    for batch in batches:
        assert [x.shape for x in jax.tree.leaves(batch)] == [x.shape for x in jax.tree.leaves(s.held_out[0])]


@pytest.fixture(scope="module")
def covered(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("cover"), {}
    write(folder / "r.jsonl", make_rows(37))
    return lambda shards: made.setdefault(
        shards, source(folder, shards=shards, third="mismatched", epochs=0.2)
    )


def test_cover_of_no_pairs_is_empty(folder):
    assert source(folder).cover([]) == ()


def made_up(pair, kind, place):
    return -1 - pair - kind / 4 - place / 1024


@pytest.mark.parametrize("layout", ("branches", "plain"))
@pytest.mark.parametrize("third", (None, "mismatched"))
def test_reference_values_come_back_at_their_tokens(folder, layout, third):
    s = source(folder, layout=layout, third=third, micro=2)
    values = {}
    for batch in s.cover(range(37)):
        kinds, slots = len(batch.kinds), batch.index.shape[-1]
        x = np.zeros(batch.read.shape, np.float32)
        for at in zip(*np.nonzero(batch.responses < slots * kinds), strict=True):
            slot, kind = divmod(int(batch.responses[at]), kinds)
            x[at] = made_up(int(batch.index[(*at[:-1], slot)]), kind, int(batch.offsets[at]))
        values.update(values_by_pair(batch, x))

    def target(i, lengths):
        return [made_up(i, kind, place) for kind, n in enumerate(lengths) for place in range(n)]

    lengths = {
        i: [len(a[1]) for a in value[2]] for batch in s.cover(range(37)) for i, value in seen(batch).items()
    }
    assert {i: v.tolist() for i, v in values.items()} == {i: target(i, lengths[i]) for i in range(37)}
    known = s.with_reference(values)
    assert (
        known.info.fingerprint == s.info.fingerprint
        and known.keys == s.keys
        and s.batch(0)[0].reference is None
    )
    for batch in [known.batch(k)[0] for k in range(known.info.steps)] + [*known.held_out, *known.cover([3])]:
        for i, (_, _, answers) in seen(batch).items():
            assert sum((a[2] for a in answers), []) == target(i, lengths[i])
        assert batch.reference.dtype == np.float32
    assert jax.tree.structure(known.shapes[-1]) == jax.tree.structure(known.batch(0)[0])
    assert known.shapes[-1].reference.shape == known.shapes[-1].read.shape
    assert same(dataclasses.replace(known.batch(1)[0], reference=None), s.batch(1)[0])


def test_a_reference_of_other_tokens_or_without_a_number_is_an_error(folder):
    s = source(folder)
    values = {}
    for batch in s.cover(range(37)):
        values |= values_by_pair(batch, np.zeros(batch.read.shape))
    s.with_reference(values)
    for wrong in (values[5][1:], np.append(values[5][1:], np.nan)):
        with pytest.raises(
            ValueError, match=rf"of r.jsonl:6: got {len(wrong)} numbers, expected {len(values[5])} finite"
        ):
            s.with_reference({**values, 5: wrong})


def test_keys_are_of_the_tokens(folder):
    rows = make_rows(6)
    write(folder / "r.jsonl", [*rows, rows[0]])
    keys = source(folder).keys
    assert keys[0] == keys[6] and len(set(keys)) == 6
    write(folder / "r.jsonl", [{**rows[1], "rejected": "else"}, rows[0], {**rows[2], "margin": 3}])
    again = source(folder, batch=1, seed=3, max_length=512).keys
    assert again[0] not in keys and again[1:] == (keys[0], keys[2])
    assert not set(source(folder, format="plain").keys) & set(keys)


# ---- settings, shapes and statistics


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"too_long": "cut"}, "data.too_long='cut'; use one of truncate, drop, error"),
        ({"weighting": "sequence"}, "data.weighting='sequence'; use one of pair, token"),
        ({"layout": "rows"}, "data.layout='rows'; use one of auto, branches, plain"),
        ({"third": "silver"}, "data.third='silver'; use one of none, mismatched, gold"),
        ({"extras": ("a", "a")}, "data.extras=a,a names a column twice"),
        ({"batch": 0}, "data.batch=0; expected at least 1"),
        ({"epochs": 0.0}, "data.epochs=0.0; expected above 0"),
        ({"held_out": 1.0}, "data.held_out=1.0; expected at least 0 and below 1, or text"),
        (
            {"batch": 3, "micro": 4},
            "data.batch=3 pairs do not fill data.micro=4 microbatches of 1 rows; use a data.batch of at",
        ),
        ({"held_out": "no/file.jsonl"}, "data 'no/file.jsonl' not found"),
    ],
)
def test_wrong_settings_are_one_line(folder, options, error):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(error)):
        source(folder, **options)


@pytest.mark.parametrize("third", (None, "mismatched"))
@pytest.mark.parametrize("layout", ("branches", "plain"))
def test_abstract_shapes_are_the_same_tree_and_no_smaller(folder, layout, third):
    for micro, shards in ((1, 1), (2, 2)):
        options = {
            "layout": layout,
            "third": third,
            "extras": ("margin",),
            "max_length": 128,
            "micro": micro,
            "batch": 6,
        }
        s = source(folder, shards=shards, **options)
        most = PairRows("r", **options).abstract(shards)
        assert jax.tree.structure(most) == jax.tree.structure(s.shapes[-1])
        for a, b in zip(jax.tree.leaves(most), jax.tree.leaves(s.shapes[-1]), strict=True):
            assert (
                a.dtype == b.dtype
                and a.shape[:2] == b.shape[:2]
                and all(x >= y for x, y in zip(a.shape, b.shape, strict=True))
            )
    assert PairRows("r").abstract(reference=True).reference.dtype == np.float32


def test_stats_count_rows_and_tokens(folder):
    s = source(folder, held_out="none", layout="plain", shards=2)
    found = epoch(s)
    learned = sum(len(a[1]) for value in found.values() for a in value[2])
    total = learned + sum(len(a[0]) for value in found.values() for a in value[2])
    assert (
        s.info.stats.tokens,
        s.info.stats.learned_tokens,
        s.info.stats.examples,
        s.info.stats.dropped,
    ) == (
        total,
        learned,
        37,
        0,
    )
    assert (
        s.info.stats.fill == total / (s.info.stats.rows * s.info.stats.row_length)
        and s.info.stats.rows == 2 * s.info.steps_per_epoch
    )
    longer = [len(a[1]) > len(b[1]) for *_, (a, b) in found.values()]
    assert s.info.stats.chosen_longer == np.mean(longer) and json.dumps(dataclasses.asdict(s.info.stats))
    assert (
        s.shapes[-1].ids.shape[-1] % 64 == 0
        and s.shapes[-1].read.shape[-1] % (s.shapes[-1].ids.shape[-1] // 8) == 0
    )


def test_single_responses_are_an_error_unless_unpaired(tmp_path):
    write(tmp_path / "r.jsonl", unpaired(4))
    with pytest.raises(
        ValueError,
        match="r.jsonl:1: the row has one response and a label .4 such rows., and this loss compares two",
    ):
        source(tmp_path, unpaired=False)
    write(tmp_path / "r.jsonl", make_rows(5))
    assert len(source(tmp_path, unpaired=False).keys) == 5


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_responses_whose_rope_depends_on_their_length_do_not_share_a_prompt(folder, kind):
    factors = {"short_factor": (1.0,) * 4, "long_factor": (2.0,) * 4} if kind == "longrope" else {}
    varying = uniform(2, 8, Rope(kind=kind, factor=2.0, original_max_positions=64, **factors))
    rows = PairRows(str(folder / "r.jsonl"), batch=4, max_length=64)
    within, beyond = (dataclasses.replace(rows, max_length=n).for_attention(varying) for n in (64, 65))
    assert within.open(tiny("plain")).batch(0)[0].branches is not None
    batch = beyond.open(tiny("plain")).batch(0)[0]
    assert batch.branches is None and batch.segments.max() == 8  # four pairs of two texts
    assert dataclasses.replace(rows, max_length=65).for_attention(uniform(2, 8, Rope())).layout == "auto"
    with pytest.raises(ValueError, match="data.layout=branches: .* use data.layout=plain"):
        dataclasses.replace(rows, max_length=65, layout="branches").for_attention(varying)
    longer = dataclasses.replace(rows, max_length=65)
    assert open_for(varying, longer, tiny("plain")).batch(0)[0].branches is None
    for data, refused in ((rows, False), (longer, True)):  # opened without a model
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), data.abstract())
        assert shapes.branches is not None
        with pytest.raises(ValueError, match="pairs share prompts, but") if refused else nullcontext():
            jax.eval_shape(lambda batch: batch_angles(varying, batch, jnp.float32), shapes)
        assert data.open(tiny("plain")).shapes[-1].max_length == data.max_length
    (line,) = beyond.start_lines(None, varying)
    assert line.startswith("responses don't share prompts (data.layout=plain)")
    assert within.start_lines(None, varying) == []


def test_data_of_single_texts_is_the_same_for_every_rope():
    varying = uniform(2, 8, Rope(kind="dynamic", factor=2.0, original_max_positions=64))
    rows = Rows("rows.jsonl", max_length=65)
    assert rows.for_attention(varying) is rows and rows.start_lines(None, varying) == []
