"""Random pairs of token ids in batches, and the preference objective that the train step calls on them."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from preference_rows import EVERY, SINGLE, kinds_of, with_knobs
from tiny_model import CONFIG, assert_close

from jaxft.data.packing.pack import RowShape
from jaxft.data.packing.pair_layout import BatchMeans, PairLayout, assign_rows, fill_pairs, tokens_per_pair
from jaxft.data.packing.row_cache import Flat, RowNames
from jaxft.data.packing.tokenised import NUMBERS, TokenisedRows
from jaxft.nn.tree import partition
from jaxft.objectives import metrics
from jaxft.objectives.pair import declaration
from jaxft.objectives.preference import Outputs, preference
from jaxft.train.step import accumulate_gradients

PAIR = ("chosen", "rejected")
COUPLED = [name for name, (loss, *_) in EVERY.items() if declaration(loss).coupled]
ONLY_W = {"w": True, "known": False, "other": False}  # what is trained of a table


def random_pairs(count=8, kinds=PAIR, seed=0, only_one=False, longest=6):
    """Pairs of unequal lengths; only_one: each has either its chosen or its rejected answer."""
    rng = np.random.default_rng(seed)
    pieces = []
    for i in range(count):
        missing = ("chosen" if i % 3 == 0 else "rejected") if only_one else None
        sizes = [
            rng.integers(1, 5),
            *(0 if kind == missing else rng.integers(1, longest + 1) for kind in kinds),
        ]
        pieces += [rng.integers(0, CONFIG.vocab, size).astype(np.int32) for size in sizes]
    lengths = [len(piece) for piece in pieces]
    learned = [np.full(len(piece), number % (1 + len(kinds)) > 0) for number, piece in enumerate(pieces)]
    none, hashes = np.zeros(count, bool), np.arange(len(lengths), dtype=np.uint64)
    numbers = rng.normal(0, 1, (count, 1))
    responses = np.array(lengths).reshape(count, 1 + len(kinds))[:, 1:].sum(1)
    counts = np.array(lengths).reshape(count, 1 + len(kinds))
    return TokenisedRows(
        kinds=kinds, ids=Flat([np.concatenate(pieces)]), learned=Flat([np.concatenate(learned)]),
        counts=counts, reads=counts[:, 1:], ends=np.zeros_like(counts[:, 1:]),
        hashes=Flat([hashes.reshape(counts.shape)]), content=Flat([hashes[:count]]), truncated=none,
        placeholders=none, pieces=np.zeros(count, int), extras={NUMBERS: numbers}, responses=responses,
        learned_responses=responses,
        weights=rng.integers(1, 4, count).astype(float), order=np.zeros(count),
        names=RowNames(["pair"], Flat([np.zeros(count, np.int32)]), Flat([np.arange(count)])), digest="",
        largest_id=CONFIG.vocab - 1,
    )  # fmt: skip


def swapped(pool):
    """The same pairs with chosen and rejected exchanged."""
    order = np.arange(len(pool.names) * 3).reshape(-1, 3)[:, [0, 2, 1]].ravel()

    def reordered(x):
        return np.concatenate([np.split(x, pool.starts.ravel()[1:])[i] for i in order])

    counts, reads = pool.counts[:, [0, 2, 1]], pool.reads[:, ::-1].copy()
    ids, learned = (Flat([reordered(np.asarray(x))]) for x in (pool.ids, pool.learned))
    return replace(pool, ids=ids, learned=learned, counts=counts, reads=reads)


def laid(pool, members=None, rows=4, branches=True, weights=None, room=None):
    """Return pairs [rows, ...] of some of the pool. weights: of the pool's pairs, by default those of the
    pool; they are normalised to sum to 1.

    room: (length, reads, slots) of a row, by default enough for a third of the pairs and an empty slot.
    """
    members = np.arange(len(pool.names)) if members is None else np.asarray(members, int)
    weights = pool.weights if weights is None else np.asarray(weights, float)
    each = np.zeros(len(pool.names))
    each[members] = weights[members]
    counted = pool.reads[each > 0]
    means = counted.sum(0) / np.maximum((counted > 0).sum(0), 1)
    plan = assign_rows(members[None], tokens_per_pair(pool, branches), rows)
    slots = int(np.diff(plan.offsets).max(initial=0)) + 1
    room = room or (24 * slots, 16 * slots, slots)
    layout = PairLayout(rows, RowShape(*room), branches, ("margin",))
    total = each.sum() or 1.0
    return fill_pairs(pool, plan, layout, BatchMeans(each / total, means))


def micro(batch, count):
    """[rows, ...] -> [count, rows / count, ...]."""
    return jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)


@functools.lru_cache(maxsize=64)
def _program(objective):
    """One for all calls, so that batches of a shape are compiled once."""

    @jax.jit
    def run(trainable, frozen, batch, aux):
        return accumulate_gradients(objective, (trainable, frozen), batch, jax.random.key(0), aux)

    return run


def loss_gradients_metrics(objective, whole, mask, batch, aux):
    """(loss, gradients, every metric's number) of a batch [micro, rows, ...], as the train step has them."""
    grads, found = _program(objective)(*partition(whole, mask), jax.tree.map(jnp.asarray, batch), aux)
    assert np.isfinite(optax.tree.norm(grads))
    return metrics.as_floats(found)["loss"], grads, metrics.as_floats(found)


def assert_same(found, expected, rtol=1e-10):
    """Loss, gradients and metrics of two ways to one result."""
    (loss, grads, numbers), (loss_too, grads_too, numbers_too) = found, expected
    np.testing.assert_allclose(loss, loss_too, rtol=rtol, atol=1e-13)
    assert_close(grads, grads_too, rtol)
    assert numbers.keys() == numbers_too.keys()
    for name, value in numbers.items():
        np.testing.assert_allclose(value, numbers_too[name], rtol=rtol, atol=1e-10, err_msg=name)


def start_aux(objective, trainable=None, at_base=True):
    """aux at step 0 as numbers in float64."""
    wide = lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    return jax.tree.map(wide, objective.init(trainable, at_base))


def table_see(params, batch, key, aux):
    """Look log-probs up by token and position, because a loss doesn't depend on the model."""
    slots = batch.lengths.shape[1] * batch.lengths.shape[2]
    here = lambda w: jnp.where(batch.responses < slots, w[batch.targets] + 0.3 * w[batch.offsets], 0)  # noqa: E731
    logp = -jax.nn.softplus(here(params["w"]))
    known, other = (
        jax.lax.stop_gradient(-jax.nn.softplus(here(params[name]))) for name in ("known", "other")
    )
    none = dict.fromkeys(("ids", "segments", "positions", "read", "targets", "reference", "branches"))
    return Outputs(
        logp, known, other, -other, (other > -1).astype(other.dtype), 2 * other, replace(batch, **none)
    )


def by_table(name):
    """An objective of the table's log-probs with one of the losses, and the table."""
    loss, _, knobs = EVERY[name]
    rng = np.random.default_rng(1)
    table = {key: jnp.asarray(rng.normal(0, 1, CONFIG.vocab)) for key in ("w", "known", "other")}
    objective = preference(None, with_knobs(loss, knobs), beta=knobs.get("beta", 0.1))
    return objective._replace(forward=table_see), table


def pairs_for(name, **options):
    return random_pairs(kinds=kinds_of(name), only_one=name in SINGLE, **options)
