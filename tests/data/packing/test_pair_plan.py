"""Batches and rows of pairs: every pair once, batches of similar length, rows within their shape."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.data.packing import pair_layout
from jaxft.data.packing.pack import RowShape, permutation


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 999), min_size=1, max_size=99),
    size=st.integers(1, 9),
    epoch=st.integers(0, 3),
)
def test_an_epoch_has_every_pair_once(tokens, size, epoch):
    tokens = np.array(tokens)
    found = pair_layout.order_batches(tokens, size, 7, epoch)
    assert sorted(found[found >= 0].tolist()) == list(range(len(tokens))) and found.shape == (
        -(-len(tokens) // size),
        size,
    )
    assert (found[:-1] >= 0).all()
    plan = pair_layout.assign_rows(found, tokens, 3)
    assert plan.rows == 3 * len(found)
    for number, batch in enumerate(found):
        rows = [plan.slice(3 * number + r, 3 * number + r + 1).members.tolist() for r in range(3)]
        assert sorted(sum(rows, [])) == sorted(batch[batch >= 0].tolist())
        load = np.zeros(3, int)
        for i in sorted(batch[batch >= 0].tolist(), key=lambda i: -tokens[i]):
            (r,) = (r for r in range(3) if i in rows[r])
            assert load[r] == load.min()
            load[r] += tokens[i]
    assert np.array_equal(found, pair_layout.order_batches(tokens, size, 7, epoch))


def test_batches_have_nearly_equal_token_counts_and_change_with_the_epoch():
    tokens = np.round(100 * np.exp(np.random.default_rng(0).normal(0, 0.6, 640))).astype(int)
    found = [pair_layout.order_batches(tokens, 8, 0, epoch) for epoch in range(4)]
    loads = [tokens[f].sum(1) for f in found]
    loose = tokens[permutation(640, 1).reshape(80, 8)].sum(1)
    assert all(load.std() < 0.4 * loose.std() and load.max() < loose.max() for load in loads)
    together = [{frozenset((a, b)) for batch in f for a in batch for b in batch if a < b} for f in found]
    assert len(together[0] & together[1]) < 0.1 * len(together[0])


def test_rows_hold_no_more_than_the_row_shape():
    rng = np.random.default_rng(1)
    tokens, reads = rng.integers(1, 90, 200), rng.integers(1, 30, 200)
    room = RowShape(128, 40, 3)
    plan = pair_layout.fit_rows(np.arange(200), tokens, reads, room)
    assert sorted(plan.members) == list(range(200))
    for r in range(plan.rows):
        some = plan.slice(r, r + 1).members
        assert 0 < len(some) <= 3 and tokens[some].sum() <= 128 and reads[some].sum() <= 40


def test_a_batch_that_does_not_fit_the_planned_rows_is_one_line():
    tokens, reads, shape = np.array([60, 60, 20]), np.array([50, 5, 5]), RowShape(128, 64, 2)
    plan = pair_layout.plan_rows(np.array([0, 1, 2]), np.array([0, 0, 1]), 2)
    pair_layout.check_fit(plan, tokens, reads, shape)
    with pytest.raises(ValueError, match="they need 80 tokens, 55 read .* raise data.epochs to cover"):
        pair_layout.check_fit(
            pair_layout.plan_rows(np.array([0, 1, 2]), np.array([0, 1, 0]), 2),
            tokens, reads, RowShape(79, 64, 2),
        )  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(groups=st.lists(st.integers(0, 6), min_size=1, max_size=40), seed=st.integers(0, 5))
def test_a_derangement_leads_out_of_every_group(groups, seed):
    groups = np.array(groups)
    found = pair_layout.derangement(groups, seed)
    if 2 * np.bincount(groups).max() > len(groups):
        assert found is None
    else:
        assert sorted(found) == list(range(len(groups))) and (groups[found] != groups).all()
