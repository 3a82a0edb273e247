"""Laws of the preference objective for every loss: accumulation, padding, meshes, layouts, swapped pairs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meters import five_tokens, make_meter
from pair_batches import (
    ONLY_W,
    assert_same,
    by_table,
    laid,
    loss_gradients_metrics,
    micro,
    pairs_for,
    random_pairs,
    start_aux,
    swapped,
)
from preference_rows import EVERY
from tiny_model import assert_close, tiny

from jaxft.batch import widened
from jaxft.distributed import sharding
from jaxft.nn import param_spec, tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.objectives import metrics
from jaxft.objectives.losses import preference_losses as P
from jaxft.objectives.losses import reference_free_losses as F
from jaxft.objectives.pair import PairBatch, PairTokens, Response, pair_metrics
from jaxft.objectives.preference import implicit_reward, mean_logp, preference

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.quick_cases("aot", "mpo", "tpo_l", "kto")
@pytest.mark.parametrize("name", EVERY)
def test_accumulation_equals_the_large_batch_for_every_loss(name):
    objective, table = by_table(name)
    batch, aux = laid(pairs_for(name, count=9)), start_aux(objective)
    one = loss_gradients_metrics(objective, table, ONLY_W, micro(batch, 1), aux)
    assert np.abs(one[1]["w"]).max() > 1e-4
    assert_same(loss_gradients_metrics(objective, table, ONLY_W, micro(batch, 4), aux), one)


@pytest.mark.quick_cases("bco", "wpo ipo")
@pytest.mark.parametrize("name", EVERY)
def test_padding_and_pairs_of_weight_zero_change_nothing(name):
    objective, table = by_table(name)
    pool, aux = pairs_for(name, count=12), start_aux(objective)
    used = np.arange(12) % 3 > 0
    expected = loss_gradients_metrics(
        objective, table, ONLY_W, micro(laid(pool, np.flatnonzero(used)), 2), aux
    )
    muted = laid(pool, weights=pool.weights * used)
    assert (muted.pair_weights[muted.index >= 0] == 0).sum() == 4
    assert_same(loss_gradients_metrics(objective, table, ONLY_W, micro(muted, 2), aux), expected)
    some, nothing = (laid(pool, who, room=(96, 80, 6)) for who in (np.flatnonzero(used), []))
    nothing = nothing.replace(mean_lengths=some.mean_lengths)
    padded = jax.tree.map(lambda *x: np.concatenate(x), some, nothing)
    assert_same(loss_gradients_metrics(objective, table, ONLY_W, micro(padded, 4), aux), expected)


def with_model(loss, **options):
    """An objective of the tiny Llama with a LoRA adapter that matters, its parameters, and which of them are
    trained.
    """
    with jax.numpy_dtype_promotion("standard"):
        model, whole = tiny(adapter=Adapter(rank=4))
    return preference(model, loss, **options), whole, tree.mask_by_path(whole, "adapter/.*/[ab]"), model


@pytest.mark.slow
def test_a_mesh_gives_the_values_of_one_device_for_coupled_losses():
    objective, whole, mask, model = with_model(P.aot)
    batch = micro(laid(random_pairs(20), rows=16), 2)
    one = jax.device_get(loss_gradients_metrics(objective, whole, mask, batch, {}))
    for shape in ((2, 2, 2), (8, 1, 1)):
        mesh = sharding.make_mesh(sharding.MeshShape(*shape))
        with jax.set_mesh(mesh):
            placed = jax.tree.map(jax.device_put, whole, param_spec.shardings(model.specs, mesh))
            many = loss_gradients_metrics(objective, placed, mask, sharding.shard_batch(mesh, batch), {})
        assert_same(jax.device_get(many), one)


@pytest.mark.quick_cases("dpo")
@pytest.mark.parametrize("loss", (P.dpo, F.orpo), ids=("dpo", "orpo"))
def test_a_shared_prompt_equals_the_prompt_before_each_response(loss):
    options = {} if loss is P.dpo else {"reference": None, "reward": mean_logp}
    objective, whole, mask, _ = with_model(loss, **options)
    pool = random_pairs(9)
    plain = laid(pool, branches=False)
    assert plain.branches is None
    found = loss_gradients_metrics(objective, whole, mask, micro(laid(pool), 1), {})
    assert_same(found, loss_gradients_metrics(objective, whole, mask, micro(plain, 1), {}))


def accuracy_of(gained):
    """The accuracy and its number of pairs, where log-probs of chosen responses gain `gained` over those of
    the reference.
    """
    known = jnp.asarray(np.random.default_rng(3).normal(-90, 30, (1, len(gained))))
    ones = jnp.ones_like(known)
    chosen = Response(known + jnp.asarray(gained)[None] * jnp.abs(known), known, 5 * ones, 5 * ones, ones)
    rejected = Response(known - 1, known - 1, 5 * ones, 5 * ones, ones)
    empty = {name: jnp.zeros((1, 0)) for name in ("logp", "reference", "log_sum_p2")}
    tokens = PairTokens(**empty, response=jnp.zeros((1, 0), int), position=jnp.zeros((1, 0), int))
    pair = PairBatch({"chosen": chosen, "rejected": rejected}, tokens, {}, ones)
    found = pair_metrics(pair, implicit_reward)
    counts = {name: n for name, n in metrics.pair_counts(found).items() if name == "rewards/accuracies_pairs"}
    return metrics.as_floats(found).get("rewards/accuracies"), counts


def test_accuracy_is_absent_where_the_policy_is_the_reference_up_to_rounding():
    """TRL counts ties as lost, so that its accuracy starts at 0."""
    six = {"rewards/accuracies_pairs": 6}
    assert accuracy_of([0.0] * 6) == (None, six)
    assert accuracy_of([1e-6, -1e-6, 0.0, 2e-6, -3e-6, 1e-6]) == (None, six)
    assert accuracy_of([0.1, 0.2, -0.1, 0.0, 1e-6, -1e-6]) == (pytest.approx((2 + 3 / 2) / 6), six)


def accuracies_of_steps(facts, won, steps=2):
    """The logged accuracy of each step, of which `won` of six pairs seem to be won."""
    meter, one, found = make_meter(5, facts=facts), np.float64(1), []
    metric = metrics.WinRate(np.array([won, 0.0, 6.0]))
    for step in range(steps):
        sums = {name: metrics.Sum(one, one) for name in ("loss", "skipped", "learning_rate")}
        sums["skipped"] = metrics.Sum(np.float64(0), one)
        meter.add(step, five_tokens(), {**sums, "rewards/accuracies": metric})
        found.append(meter.read()[0].get("rewards/accuracies"))
    return found


def test_the_first_step_has_no_accuracy_where_policy_and_reference_are_one_model():
    """However large the rounding between the two programs that compute its log-probs."""
    with_reference = preference(None, P.dpo, reward=implicit_reward)
    without = preference(None, F.simpo, reference=None, reward=mean_logp)
    assert accuracies_of_steps(with_reference.facts, 4.0) == [None, pytest.approx(4 / 6)]
    assert accuracies_of_steps(without.facts, 4.0) == [pytest.approx(4 / 6)] * 2


def test_swapping_chosen_and_rejected_negates_the_margin_and_mirrors_the_gradient():
    """-LS(m) and -LS(-m) differ by m, so the gradients of a pair and its mirror image differ by that of the
    margin.
    """
    objective, whole, mask, _ = with_model(partial(P.dpo, beta=0.3), beta=0.3)
    pool = random_pairs(9, seed=2)
    here, there = (
        loss_gradients_metrics(objective, whole, mask, micro(laid(p, rows=4), 1), {})
        for p in (pool, swapped(pool))
    )
    for one, other in (("chosen", "rejected"), ("rejected", "chosen")):
        for what in ("rewards", "logps", "logits"):
            np.testing.assert_allclose(here[2][f"{what}/{one}"], there[2][f"{what}/{other}"], rtol=1e-10)
    np.testing.assert_allclose(here[2]["rewards/margins"], -there[2]["rewards/margins"], rtol=1e-10)
    np.testing.assert_allclose(here[2]["rewards/accuracies"], 1 - there[2]["rewards/accuracies"], rtol=1e-10)

    minus_margin = lambda pair: -0.3 * (pair.chosen.ratio - pair.rejected.ratio)  # noqa: E731
    slope = loss_gradients_metrics(
        preference(with_model(P.dpo)[3], minus_margin, beta=0.3),
        whole,
        mask,
        micro(laid(pool, rows=4), 1),
        {},
    )
    np.testing.assert_allclose(here[0] - there[0], slope[0], rtol=1e-10)
    assert_close(jax.tree.map(jnp.subtract, here[1], there[1]), slope[1])


@pytest.mark.quick_cases("kto", "aot")
@pytest.mark.parametrize("name", ("dpo", "kto", "aot"))
def test_a_widened_batch_gives_the_same_results(name):
    objective, table = by_table(name)
    batch, aux = laid(pairs_for(name, count=7)), start_aux(objective)
    more = lambda x, axis: np.empty([n + 3 * (i == axis) for i, n in enumerate(x.shape)], x.dtype)  # noqa: E731
    slots, last = (
        ("lengths", "mean_lengths"),
        {n: more(getattr(batch, n), 1) for n in ("pair_weights", "index")},
    )
    by_token = ("ids", "segments", "positions", "branches", "read", "targets", "responses", "offsets")
    wide = {n: more(getattr(batch, n), 1) for n in by_token}
    like = batch.replace(**wide, **last, **{n: more(getattr(batch, n), 1) for n in slots})
    like = like.replace(columns={n: more(x, 1) for n, x in batch.columns.items()})
    found = widened(batch, like)
    assert (
        found.responses.shape[-1] == batch.responses.shape[-1] + 3
        and found.lengths.shape[1] == batch.lengths.shape[1] + 3
    )
    assert (found.index[:, -3:] == -1).all() and (found.responses[:, -3:] == found.lengths[0].size).all()
    expected = loss_gradients_metrics(objective, table, ONLY_W, micro(batch, 1), aux)
    assert_same(loss_gradients_metrics(objective, table, ONLY_W, micro(found, 1), aux), expected)


@pytest.mark.parametrize(
    "loss, message",
    [
        (
            partial(P.nll, beta=0.1),
            "loss nll: got an unexpected keyword argument 'beta'. Its parameters: none",
        ),
        (
            partial(F.kto, betta=0.1),
            "loss kto: got an unexpected keyword argument 'betta'. Its parameters: beta, desirable_weight, "
            "undesirable_weight",
        ),
        (
            lambda pair, scale: pair.chosen.ratio,
            "loss <lambda>: missing a required argument: 'scale'. Its parameters: scale",
        ),
    ],
)
def test_a_loss_that_cannot_be_called_is_refused_by_preference(loss, message):
    with pytest.raises(ValueError, match=message):
        preference(None, loss)
