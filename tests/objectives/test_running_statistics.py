"""State that the preference objective carries from step to step; evaluation in batches of any size."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from merged_arrays import merged_arrays
from pair_batches import COUPLED, ONLY_W, by_table, laid, micro, pairs_for, random_pairs, start_aux, table_see
from preference_rows import EVERY, THIRD
from tiny_model import tiny

from jaxft.batch import TrainState
from jaxft.data.packing.row_cache import Flat
from jaxft.nn import tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.objectives import metrics
from jaxft.objectives.losses import preference_losses as P
from jaxft.objectives.losses import reference_free_losses as F
from jaxft.objectives.metrics import row_values
from jaxft.objectives.pair import declaration, pair_batch
from jaxft.objectives.preference import EMAReference, preference, reference_params
from jaxft.optim.optimizer import from_optax
from jaxft.train.evaluate import evaluate
from jaxft.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.quick_cases("aot", "kto", "mix*", "bco")
@pytest.mark.parametrize("name", ("dpo", "nll", "orpo", *COUPLED))
def test_evaluation_gives_the_same_numbers_for_any_batch_size(name):
    objective, table = by_table(name)
    whole, aux = laid(pairs_for(name, count=11), rows=8), start_aux(objective)
    if "loss" in aux:
        aux = {"loss": {key: jnp.full_like(x, 3.0) for key, x in aux["loss"].items()}}
    trainable, frozen = tree.partition(table, ONLY_W)
    step, evaluated, found = evaluate.make_eval_step(objective), objective.for_evaluation(), []
    for size in (1, 2, 8):
        batches = [
            jax.tree.map(lambda x, i=i, n=size: jnp.asarray(x[None, i : i + n]), whole)
            for i in range(0, 8, size)
        ]
        see = lambda batch: step(trainable, frozen, batch, aux)  # noqa: E731
        together = lambda seen: evaluated.loss(jax.tree.map(jnp.asarray, seen), aux)[1]  # noqa: E731
        with jax.disable_jit():
            total = (
                evaluate.coupled_metrics(see, together, batches)
                if objective.facts.coupled
                else evaluate.sum_metrics(see, batches, with_rows=True)
            )
        rows = {(at, key): x for at, own in row_values(total).items() for key, x in own.items()}
        assert sum(key == "loss" for _, key in rows) == 11
        found.append({**evaluate.held_out_floats(total), **rows})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, value in other.items():
            np.testing.assert_allclose(value, found[0][key], rtol=1e-10, atol=1e-12, err_msg=str(key))


BAD = 39  # a token without a log-prob, which only bad rows have


def moving_see(params, batch, key, aux):
    seen = table_see(params, batch, key, aux)
    seen = replace(seen, logp=jnp.where(batch.targets == BAD, jnp.nan, seen.logp))
    return replace(
        seen, reference=jax.lax.stop_gradient(table_see(reference_params(params, aux), batch, key, aux).logp)
    )


def test_bcos_shift_and_the_moving_reference_follow_their_equations_and_skip_non_finite_steps():
    _, table = by_table("dpo")
    moving = EMAReference(alpha=0.25, every=2)
    objective = preference(None, F.bco, reference=moving, beta=0.1)._replace(forward=moving_see)
    trainable, frozen = tree.partition(table, ONLY_W)
    optimizer = from_optax(optax.sgd(5.0), optax.constant_schedule(5.0), "sgd")
    aux = start_aux(objective, trainable, False)
    state = TrainState(jnp.int32(0), trainable, optimizer.init(trainable), aux, jnp.zeros(2, jnp.int32))
    step = jax.jit(make_train_step(objective, optimizer, 0))
    rewards, reference, bad = [], np.asarray(table["w"]), []
    for number in range(6):
        pool = random_pairs(7, seed=number)
        ids = np.where(np.asarray(pool.ids) == BAD, 38, pool.ids)
        if number in (2, 5):
            ids[pool.starts[0, 1]] = BAD  # the first token of a response
        pool = replace(pool, ids=Flat([ids]))
        batch = jax.tree.map(jnp.asarray, micro(laid(pool), 2))
        before = state
        state, found = step(state, frozen, batch)
        np.testing.assert_array_equal(before.aux["reference"]["w"], reference)
        if number in (2, 5):
            bad.append(metrics.as_floats(found)["skipped"])
            jax.tree.map(
                np.testing.assert_array_equal, (state.aux, state.trainable), (before.aux, before.trainable)
            )
            continue
        rewards += [0.1 * x for x in ratios(before.trainable["w"], reference, pool)]
        np.testing.assert_allclose(state.aux["loss"]["delta"], np.mean(rewards), rtol=1e-10)
        assert state.aux["loss"]["count"] == len(rewards)
        if (len(rewards) // 14) % 2 == 0:  # every second step that counts
            reference = 0.25 * np.asarray(state.trainable["w"]) + 0.75 * reference
        np.testing.assert_allclose(state.aux["reference"]["w"], reference, rtol=1e-14)
        reference = np.asarray(state.aux["reference"]["w"])
    assert (
        bad == [1, 1]
        and np.abs(np.asarray(table["w"])[:39] - reference[:39]).max() > 1e-3
        and np.mean(rewards) != 0
    )


def ratios(policy, reference, pool):
    """log pi - log pi_ref of every answer of the table's model, pair by pair."""
    found = []
    for i in range(len(pool.names)):
        for kind in (1, 2):
            ids = pool.piece(i, kind)
            logp = [
                -np.log1p(np.exp(np.asarray(w)[ids] + 0.3 * np.asarray(w)[: len(ids)])).sum()
                for w in (policy, reference)
            ]
            found.append(logp[0] - logp[1])
    return found


def test_a_moving_reference_starts_as_the_model_and_may_follow_at_once():
    objective = preference(None, P.dpo, reference=EMAReference(alpha=1.0, every=1))
    start = {"w": jnp.arange(3.0)}
    aux = objective.init(start, True)
    np.testing.assert_array_equal(aux["reference"]["w"], start["w"])
    moved = objective.update(aux, {"w": jnp.ones(3)}, {})
    np.testing.assert_array_equal(moved["reference"]["w"], np.ones(3))
    for wrong in ({"alpha": 0.0}, {"alpha": 1.5}, {"every": 0}):
        with pytest.raises(ValueError, match=r"^EMAReference\.(alpha|every)=.*; expected"):
            EMAReference(**wrong)


def test_every_loss_declares_its_facts():
    assert {"aot", "aot_unpaired", "ld aot", "mix of coupled", "kto", "bco"} == set(COUPLED)
    assert all(by_table(name)[0].facts.coupled == (name in COUPLED) for name in EVERY)
    free = {name for name, (loss, *_) in EVERY.items() if not declaration(loss).reads_reference}
    assert free == {"nll", "simpo", "alphapo", "alphapo below", "cpo", "cpo_hinge", "cpo_ipo", "orpo", *THIRD}


@pytest.mark.slow
def test_a_moving_reference_of_adapters_is_tr_dpo_on_full_weights():
    """After two updates the reference's log-probs are those of a base whose full weights were blended."""
    model, whole = tiny(adapter=Adapter(rank=2))
    plain, _ = tiny()
    moving = EMAReference(alpha=0.6, every=1)
    objective = preference(model, P.dpo, reference=moving)
    trainable, frozen = tree.partition(whole, tree.mask_by_path(whole, "adapter/.*/[ab]"))
    fresh = tree.map_with_path(lambda path, x: 0 * x if path.endswith("/b") else x, trainable)
    aux = start_aux(objective, fresh, True)
    blended = merged_arrays(whole["base"], tree.combine(fresh, frozen)["adapter"], jnp.float64)
    for number in (1, 2):
        noise = jax.tree.map(lambda x, n=number: jnp.sin(n + jnp.arange(x.size).reshape(x.shape)), fresh)
        policy = jax.tree.map(lambda x, change: x + 0.1 * change, fresh, noise)
        aux = objective.update(aux, policy, {})
        merged = merged_arrays(whole["base"], tree.combine(policy, frozen)["adapter"], jnp.float64)
        blended = jax.tree.map(lambda p, r: 0.6 * p + 0.4 * r, merged, blended)
    batch = jax.tree.map(jnp.asarray, laid(random_pairs(4)))
    reference = objective.score(tree.combine(policy, frozen), batch, aux).reference
    expected = preference(plain, P.dpo).score({"base": blended}, batch, {}).logps
    np.testing.assert_allclose(reference, expected, atol=1e-9)
    assert aux["rank_error"] < 1e-6
    assert np.abs(expected - preference(plain, P.dpo).score({"base": merged}, batch, {}).logps).max() > 1e-3


@pytest.mark.slow
def test_held_out_pairs_get_bcos_shift_as_training_left_it():
    """TRL's BCOTrainer: `running.update` only where the model is trained."""
    objective, table = by_table("bco")
    batch = jax.tree.map(jnp.asarray, laid(pairs_for("bco", count=5)))
    outputs, delta = objective.forward(table, batch, None, {}), 0.7
    aux = {"loss": {"delta": jnp.float64(delta), "count": jnp.float64(4)}}
    pair = pair_batch(batch, outputs.logp, outputs.log_sum_p2, outputs.reference)
    beta, used = EVERY["bco"][2].get("beta", 0.1), pair.weight > 0
    each = [
        np.where(x.present, np.log1p(np.exp(-sign * (beta * np.asarray(x.ratio) - delta))), 0)
        for x, sign in ((pair.chosen, 1), (pair.rejected, -1))
    ]
    count = np.asarray(pair.chosen.present + pair.rejected.present)
    expected = np.sum(np.where(used, pair.weight * sum(each) / np.maximum(count, 1), 0))
    value, _ = objective.for_evaluation().loss(outputs, aux)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert abs(objective.loss(outputs, aux)[0] - expected) > 1e-4  # in training this batch's rewards count
