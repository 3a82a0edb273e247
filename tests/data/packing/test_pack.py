"""Packing: every example once, unsplit, in rows with enough free tokens; the same for the same seed."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.data.packing import pack

LENGTHS = st.lists(st.integers(1, 32), min_size=1, max_size=120).map(np.array)


def naive_first_fit(lengths, size):
    rooms, rows = [], []
    for length in lengths:
        row = next((r for r, room in enumerate(rooms) if room >= length), len(rooms))
        if row == len(rooms):
            rooms.append(size)
        rooms[row] -= length
        rows.append(row)
    return rows


@settings(max_examples=300, deadline=None)
@given(LENGTHS, st.integers(32, 50))
def test_first_fit_is_the_naive_first_fit(lengths, size):
    lengths = -np.sort(-lengths)
    assert pack.first_fit(lengths, size).tolist() == naive_first_fit(lengths, size)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(0, 2**40), st.integers(0, 5), st.integers(32, 40))
def test_nothing_is_lost_doubled_or_too_long(lengths, seed, epoch, size):
    plan = pack.pack_examples(lengths, lengths // 2, size, seed, epoch)
    assert sorted(plan.members) == list(range(len(lengths)))
    sums = np.add.reduceat(lengths[plan.members], plan.offsets[:-1])
    assert sums.max() <= size and sums.sum() == lengths.sum() and (np.diff(plan.offsets) > 0).all()
    again = pack.pack_examples(lengths, lengths // 2, size, seed, epoch)
    assert np.array_equal(plan.members, again.members) and np.array_equal(plan.offsets, again.offsets)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.data())
def test_epochs_have_the_same_number_of_rows_and_the_same_largest_row(monkeypatch_window, lengths, data):
    reads = np.array(data.draw(st.lists(st.integers(1, 5), min_size=len(lengths), max_size=len(lengths))))
    plans = [pack.pack_examples(lengths, reads, 40, 7, epoch) for epoch in range(4)]
    assert len({p.rows for p in plans}) == 1
    assert len({np.add.reduceat(reads[p.members], p.offsets[:-1]).max() for p in plans}) == 1


@pytest.fixture(scope="module", params=[16, 2**16])
def monkeypatch_window(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "WINDOW", request.param)
        yield


def test_epochs_and_seeds_differ():
    lengths = np.full(64, 10)
    orders = {
        tuple(pack.pack_examples(lengths, lengths, 40, seed, epoch).members)
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9
    assert (
        len({tuple(pack.one_per_row(64, seed, epoch).members) for seed in range(3) for epoch in range(3)})
        == 9
    )


def test_permutation_is_a_shuffle_that_stays_the_same_for_ever():
    assert pack.permutation(8, 0, 1).tolist() == [7, 1, 5, 2, 6, 4, 0, 3]
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(6), pack.permutation(6, seed)] += 1
    assert sorted(pack.permutation(1000, 5)) == list(range(1000))
    assert ((counts - 500) ** 2 / 500).sum() < 60  # chi-square with 25 degrees of freedom: P(> 60) = 1e-4


def test_a_slice_past_the_end_is_shorter():
    plan = pack.one_per_row(10, 0, 0)
    part = plan.slice(8, 12)
    assert part.rows == 2 and part.members.tolist() == plan.members[8:].tolist() and part.offsets[0] == 0


def test_a_hundred_thousand_rows_are_packed_in_seconds_and_well():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5.2, 0.7, 100_000).astype(int) + 10, 2048)
    start = time.perf_counter()
    plan = pack.pack_examples(lengths, lengths, 2048, 0, 0)
    assert time.perf_counter() - start < 20
    assert lengths.sum() / (plan.rows * 2048) > 0.99
