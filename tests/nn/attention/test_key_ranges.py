"""Key ranges: the visible pairs of the definition, for every layout of rows that a source writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_batches import laid, random_pairs
from rl_completions import LENGTHS, episodes_of, random_completions

from jaxft.data.packing.pack import RowShape
from jaxft.nn.attention.flash_attention import key_ranges, overlaps, pad_queries, visible, within_window
from jaxft.rl.rollout_layout import pack_episodes

# A segment: padding before it, tokens of its prompt, tokens of each response.
SEGMENTS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 12), st.lists(st.integers(1, 9), max_size=4)), max_size=5
)


def row_of(parts, length):
    """Segments and branches of one row as lists, and the position of each token in the text of its branch."""
    segments, branches, positions = [], [], []
    for number, (padding, prompt, responses) in enumerate(parts, 1):
        for branch, count in [(0, prompt), *enumerate(responses, 1)]:
            segments += [number] * count
            branches += [branch] * count
            positions += [*range(prompt, prompt + count)] if branch else [*range(count)]
        at = len(segments) - prompt - sum(responses)
        for x in (segments, branches, positions):
            x[at:at] = [0] * padding
    return tuple((x + [0] * length)[:length] for x in (segments, branches, positions))


def by_the_definition(segments, branches, positions, window=2**31 - 1):
    """Pairs of (query, key), one by one."""
    T = len(segments)
    seen = np.zeros((T, T), bool)
    for q, k in np.ndindex(T, T):
        seen[q, k] = (
            k <= q
            and segments[k] == segments[q] != 0
            and branches[k] in (0, branches[q])
            and positions[k] > positions[q] - window
        )
    return seen


@jax.jit
def ranges_of(segments, branches, window):
    return within_window(key_ranges(segments, branches), window)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SEGMENTS, st.integers(1, 30))
def test_ranges_are_the_visible_pairs_of_the_definition(parts, window):
    row = row_of(parts, 40)
    segments, branches = (jnp.asarray([x], jnp.int32) for x in row[:2])
    ranges = ranges_of(segments, branches, jnp.int32(window))
    seen = np.asarray(visible(ranges, jnp.arange(40, dtype=jnp.int32)))[0]
    np.testing.assert_array_equal(seen, by_the_definition(*row, window))
    blocks = np.asarray(overlaps(ranges, 5, 8))[0]
    np.testing.assert_array_equal(blocks, seen.reshape(40, 5, 8).any(2))
    if not any(row[1]):  # no responses: the same without branches
        plain = ranges_of(segments, None, jnp.int32(window))
        np.testing.assert_array_equal(visible(plain, jnp.arange(40, dtype=jnp.int32))[0], seen)


def test_empty_ranges_have_one_form_which_minima_and_maxima_ignore():
    row = [[[1, 1, 1, 2, 2, 0]], [[0, 1, 2, 1, 1, 0]]]
    segments, branches = (jnp.asarray(x, jnp.int32) for x in row)
    never = 2**30
    for window, prompt in ((None, [never, 0, 0, never, never, never]), (1, [never] * 6)):
        ranges = pad_queries(within_window(key_ranges(segments, branches), window), 1)
        assert ranges.prompt_start.tolist() == [[*prompt, never]]
        assert ranges.prompt_end.tolist() == [[0 if x == never else 1 for x in (*prompt, never)]]
        assert ranges.own_start[0, 5:].tolist() == [never] * 2 and ranges.own_end[0, 5:].tolist() == [0, 0]
        assert ranges.windowed is (window is not None)
    assert key_ranges(segments).prompt_start is None


@pytest.mark.parametrize("branches", [False, True])
def test_a_position_is_the_number_of_visible_keys_before_the_token_in_every_batch_type(branches):
    """So that windows, which count keys, are those of positions."""
    prompts, tokens = random_completions(LENGTHS)
    batches = [laid(random_pairs(only_one=one), branches=branches) for one in (False, True)]
    batches += (
        [pack_episodes(episodes_of(prompts, tokens, LENGTHS), [RowShape(32, 16)]).rows] if branches else []
    )
    for batch in batches:
        ranges = key_ranges(batch.segments, batch.branches)
        keys = jnp.arange(batch.ids.shape[1], dtype=jnp.int32)
        before = np.asarray(visible(ranges, keys)).sum(2) - 1
        np.testing.assert_array_equal(before[batch.segments > 0], batch.positions[batch.segments > 0])
        assert (before[batch.segments == 0] == -1).all()
