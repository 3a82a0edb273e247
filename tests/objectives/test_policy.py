"""The policy objective against a plain forward pass and torch; additive, linear in its weights."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from pair_batches import assert_same, loss_gradients_metrics, micro
from rollout_batches import PER_TOKEN, alone, laid, random_groups
from tiny_model import assert_close, tiny

from jaxft.batch import TrainState, widened
from jaxft.distributed import sharding
from jaxft.nn import param_spec, tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.param_spec import ParamSpec
from jaxft.objectives import metrics
from jaxft.objectives.logprobs import token_logps
from jaxft.objectives.losses import policy_losses as P
from jaxft.objectives.losses.policy_losses import AdaptiveKL, FixedKL, KLInReward, k1, k2
from jaxft.objectives.policy import Critic, Outputs, echo, policy, value_function, value_loss
from jaxft.optim.optimizer import Optim, freezable, make_optimizer
from jaxft.train.step import make_train_step

LOSS = partial(P.clipped, eps_low=0.3, eps_high=0.2)


pytestmark = pytest.mark.usefixtures("x64")


def setting(dtype=jnp.float64):
    """The tiny Llama with a LoRA adapter that matters and a value head, and which of its parameters are
    trained.
    """
    with jax.numpy_dtype_promotion("standard"):
        model, whole = tiny(dtype, adapter=Adapter(rank=4))
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    whole = {
        **whole,
        "critic": {"w": jnp.asarray(np.random.default_rng(8).normal(0, 0.3, model.config.width), wide)},
    }
    return model, whole, tree.mask_by_path(whole, "adapter/.*/[ab]|critic/.*")


TABLE = {name: np.random.default_rng(i).normal(0, 1, 40) for i, name in enumerate("wv")}
ALL = {"w": True, "v": True}


def table_see(table, batch, key, aux):
    """Look log-probs, entropy and values up by token, because the objective's arithmetic doesn't depend on
    the model.
    """
    table = jax.tree.map(jnp.asarray, table)
    x = table["w"][batch.targets] + 0.3 * table["w"][batch.responses]
    none = dict.fromkeys(("ids", "segments", "positions", "read", "targets", "branches"))
    return Outputs(
        -2.5 - jax.nn.softplus(x), jax.nn.softplus(-x), table["v"][batch.targets], replace(batch, **none)
    )


@cache
def by_table(loss=LOSS, **options):
    """An objective of the table's numbers, with all of its terms unless options say otherwise."""
    terms = {"beta": 0.2, "entropy": 0.1, "critic": Critic(lambda *x: x, coef=0.5)} | options
    return policy(None, loss, **terms)._replace(forward=table_see)


def own_critic(model, **knobs):
    """Values read from the policy's hidden states."""
    head = lambda whole, h: h.astype(whole["critic"]["w"].dtype) @ whole["critic"]["w"]  # noqa: E731
    return Critic(value_function(lambda whole, batch, h: h, head), **knobs)


def rows_of(groups, count=2):
    return [groups[i::count] for i in range(count)]


def plain(model, whole, batch, temperature):
    """Log-probs, entropy and values at the read positions by one product, one log_softmax and autodiff."""
    h = jnp.take_along_axis(model.hidden(whole, batch, None)[0], batch.read[..., None], 1)
    logp = jax.nn.log_softmax(model.logits(model.head(whole), h) / temperature, -1)
    at = jnp.take_along_axis(logp, batch.targets[..., None], -1)[..., 0]
    return at, -jnp.sum(jnp.exp(logp) * logp, -1), h @ whole["critic"]["w"]


def by_hand(model, whole, batch, temperature=1.0, beta=0.2, bonus=0.1, coef=0.5):
    """Every term written out once more, with the padding cut by the weights alone."""
    logp, entropy, values = plain(model, whole, batch, temperature)
    r = jnp.exp(logp - batch.logps)
    worst = jnp.maximum(-batch.advantages * r, -batch.advantages * jnp.clip(r, 0.7, 1.2))
    d = batch.reference - logp
    near = jnp.clip(values, batch.values - 0.2, batch.values + 0.2)
    cost = jnp.maximum((values - batch.returns) ** 2, (near - batch.returns) ** 2) / 2
    weighed = batch.policy_weights * (worst + beta * (jnp.exp(d) - d - 1) - bonus * entropy)
    return jnp.sum(weighed) + coef * jnp.sum(batch.value_weights * cost)


def full(model, temperature=1.0, loss=LOSS, beta=0.2, coef=0.5):
    """An objective with all of its terms."""
    return policy(
        model, loss, beta=beta, entropy=0.1, temperature=temperature, critic=own_critic(model, coef=coef)
    )


def graded(fn, whole, mask):
    trainable, frozen = tree.partition(whole, mask)
    return jax.jit(jax.value_and_grad(lambda t: fn(tree.combine(t, frozen))))(trainable)


def test_the_objective_equals_its_formula_in_value_and_gradient():
    temperature = 0.7
    model, whole, mask = setting()
    batch = jax.tree.map(jnp.asarray, laid(rows_of(random_groups())))
    objective = full(model, temperature)
    loss, slope = graded(lambda whole: objective(whole, batch, None, {})[0], whole, mask)
    expected, slope_too = graded(lambda whole: by_hand(model, whole, batch, temperature), whole, mask)
    np.testing.assert_allclose(loss, expected, rtol=1e-10)
    assert_close(slope, slope_too)
    assert optax.tree.norm(slope["adapter"]) > 1e-3 and optax.tree.norm(slope["critic"]) > 1e-3


def test_completions_that_share_a_prompt_equal_completions_in_separate_rows():
    model, whole, mask = setting()
    groups = random_groups(count=5)
    packed = loss_gradients_metrics(
        full(model, loss=P.gspo_token), whole, mask, micro(laid(rows_of(groups)), 1), {}
    )
    single = laid([[one] for one in alone(groups)], length=16, reads=8, places=2, branches=False)
    assert single.branches is None and len(single.ids) > 6
    assert_same(
        packed, loss_gradients_metrics(full(model, loss=P.gspo_token), whole, mask, micro(single, 1), {})
    )


@pytest.mark.quick_cases("sequence")
@pytest.mark.parametrize("loss", [LOSS, P.gspo], ids=["token", "sequence"])
def test_a_batch_is_the_sum_of_its_parts(loss):
    batch = laid(rows_of(random_groups(count=8), 4))
    one = loss_gradients_metrics(by_table(loss), TABLE, ALL, micro(batch, 1), {})
    assert_same(loss_gradients_metrics(by_table(loss), TABLE, ALL, micro(batch, 2), {}), one)


@pytest.mark.quick_cases("token")
@pytest.mark.parametrize("loss", [LOSS, P.gspo], ids=["token", "sequence"])
def test_the_objective_is_linear_in_policy_weights_and_in_value_weights(loss):
    """Also where weights part the tokens of one completion."""
    batch = jax.tree.map(jnp.asarray, laid(rows_of(random_groups())))
    side = jnp.asarray(np.random.default_rng(1).uniform(0, 1, batch.read.shape) < 0.5)

    @jax.jit
    def of_weights(policy_weights, value_weights):
        weights = {"policy_weights": policy_weights, "value_weights": value_weights}
        return jax.value_and_grad(lambda t: by_table(loss)(t, batch.replace(**weights), None, {})[0])(TABLE)

    def part(policy_scale, value_scale):
        return of_weights(batch.policy_weights * policy_scale, batch.value_weights * value_scale)

    s = side.astype(jnp.float64)
    parts = [part(s, 0.0), part(1 - s, 0.0), part(0.0, 2 * s), part(0.0, 1 - 2 * s)]
    assert_close(jax.tree.map(lambda *x: sum(x), *parts), part(1.0, 1.0))
    assert_close(part(3.0, 0.0), jax.tree.map(lambda x: 3 * x, part(1.0, 0.0)))
    assert not any(np.any(x) for x in jax.tree.leaves(part(0.0, 0.0)))


def test_tokens_without_weight_and_padding_change_nothing():
    groups = random_groups(count=6)
    batch = laid(rows_of(groups))
    away = np.asarray(batch.responses) == 1
    muted = batch.replace(
        **{name: np.where(away, 0, getattr(batch, name)) for name in ("policy_weights", "value_weights")}
    )
    expected = loss_gradients_metrics(by_table(), TABLE, ALL, micro(muted, 1), {})
    noise, padding = np.random.default_rng(3).normal(0, 5, away.shape), batch.responses == 9
    other = muted.replace(
        **{name: np.where(away, noise, getattr(muted, name)) for name in ("advantages", "returns", "values")},
        **{name: np.where(padding, np.nan, getattr(muted, name)) for name in ("logps", "reference")},
    )
    assert_same(loss_gradients_metrics(by_table(), TABLE, ALL, micro(other, 1), {}), expected, rtol=1e-12)
    wide = widened(muted, laid(rows_of(groups), length=70, reads=60, places=11))
    assert (wide.responses[:, 54:] == 11).all() and wide.lengths.shape == (2, 11)
    assert_same(loss_gradients_metrics(by_table(), TABLE, ALL, micro(wide, 1), {}), expected)


@pytest.mark.parametrize(
    "dtype", [jnp.float64, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)], ids=["float64", "bfloat16"]
)
def test_before_the_first_step_the_ratio_is_one_within_rounding_and_exactly_one_without_old_log_probs(
    dtype,
):
    """Log-probs at sampling come from a separate program, which may add in another order."""
    model, whole, mask = setting(dtype)
    objective = policy(model, P.clipped, temperature=0.9)
    given = laid(rows_of(random_groups(count=6)))
    batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else x.dtype), given)
    old = jax.jit(lambda whole: objective.score(whole, batch, {}).logps)(whole)
    _, slope, found = loss_gradients_metrics(objective, whole, mask, micro(batch.replace(logps=old), 1), {})
    assert (
        found["val/ratio_var"] ** 0.5 < 8 * np.finfo(old.dtype).eps and found["clip_ratio/region_mean"] == 0
    )
    _, now, exactly = loss_gradients_metrics(objective, whole, mask, micro(batch.replace(logps=None), 1), {})
    assert exactly["val/ratio"] == 1 and exactly["val/ratio_var"] == 0 and exactly["policy/approxkl_avg"] == 0
    assert_close(slope, now, 1e-10 if dtype == jnp.float64 else 1e-3)


def test_the_metrics_equal_their_definitions():
    batch = laid(rows_of(random_groups(count=6)))
    value, _, found = loss_gradients_metrics(by_table(), TABLE, ALL, micro(batch, 2), {})
    played = table_see(TABLE, jax.tree.map(jnp.asarray, batch), None, {})
    logp, entropy, values = (np.asarray(x) for x in (played.logp, played.entropy, played.values))
    real = batch.responses < 9
    r, adv, kl = (
        np.exp(logp - batch.logps),
        batch.advantages,
        np.exp(batch.reference - logp) - 1 - (batch.reference - logp),
    )
    low, high = real & (r < 0.7) & (adv < 0), real & (r > 1.2) & (adv > 0)
    each = [real[b] & (batch.responses[b] == a) for b in range(2) for a in range(9)]
    whose = [(b, m[None]) for b, m in zip([0] * 9 + [1] * 9, each, strict=True) if m.any()]
    near = batch.values + np.clip(values - batch.values, -0.2, 0.2)
    losses = np.maximum((values - batch.returns) ** 2, (near - batch.returns) ** 2) / 2
    expected = {
        "loss": value,
        "loss/policy_avg": (batch.policy_weights * np.maximum(-adv * r, -adv * np.clip(r, 0.7, 1.2))).sum(),
        "loss/value_avg": (batch.value_weights * losses).sum(),
        "kl": kl[real].mean(),
        "kl_per_completion": kl[real].sum() / len(whose),
        "entropy": entropy[real].mean(),
        "policy/approxkl_avg": ((logp - batch.logps)[real] ** 2).mean() / 2,
        "val/ratio": r[real].mean(),
        "val/ratio_var": ((r[real] - 1) ** 2).mean(),
        "val/clipfrac_avg": ((near - batch.returns) ** 2 > (values - batch.returns) ** 2)[real].mean(),
        "val/returns_correlation": np.corrcoef(values[real], batch.returns[real])[0, 1],
        "clip_ratio/low_mean": low[real].mean(),
        "clip_ratio/high_mean": high[real].mean(),
        "clip_ratio/region_mean": (low | high)[real].mean(),
        "policy/clipfrac_avg": (low | high)[real].mean(),
        "policy/entropy_avg": entropy[real].mean(),
        "clip_ratio/low_min": min(low[b][m[0]].mean() for b, m in whose),
        "clip_ratio/high_max": max(high[b][m[0]].mean() for b, m in whose),
    }
    assert found.keys() == expected.keys() and low.any() and high.any()
    for name, number in expected.items():
        np.testing.assert_allclose(found[name], number, rtol=1e-10, atol=1e-13, err_msg=name)


def test_the_value_loss_equals_torchs_in_value_and_gradient():
    rng = np.random.default_rng(0)
    v, old, returns = rng.normal(0, 1, (3, 1, 40))
    for clip in (0.2, None):
        t = torch.tensor(v, requires_grad=True)
        o, target = torch.tensor(old), torch.tensor(returns)
        costs = (t - target) ** 2
        if clip is not None:
            costs = torch.maximum(costs, (torch.clamp(t, o - clip, o + clip) - target) ** 2)
        (0.5 * costs).sum().backward()
        of = lambda v, clip=clip: value_loss(v, jnp.asarray(old), jnp.asarray(returns), clip)[0]  # noqa: E731
        np.testing.assert_allclose(of(jnp.asarray(v)), 0.5 * costs.detach().numpy(), rtol=1e-12)
        np.testing.assert_allclose(
            jax.grad(lambda v, of=of: jnp.sum(of(v)))(jnp.asarray(v)), t.grad.numpy(), rtol=1e-12
        )


@pytest.mark.slow
def test_a_critic_on_another_adapter_is_trained_while_the_policy_has_no_weights():
    model, whole, mask = setting()
    other = jax.tree.map(lambda x: x * 1.3, whole["adapter"])
    whole = {**whole, "critic": {**whole["critic"], "adapter": other}}
    mask = tree.mask_by_path(whole, "adapter/.*/[ab]|critic/w|critic/adapter/.*/[ab]")

    def second(whole, batch, h):
        return model.hidden({"base": whole["base"], "adapter": whole["critic"]["adapter"]}, batch)[0]  # noqa: E731

    objective = policy(
        model, LOSS, critic=Critic(value_function(second, lambda whole, h: h @ whole["critic"]["w"]))
    )
    batch = laid(rows_of(random_groups()))
    assert loss_gradients_metrics(objective, whole, mask, micro(batch, 1), {})[2]["loss"] != 0
    waiting = batch.replace(policy_weights=0 * batch.policy_weights)
    value, slope, found = loss_gradients_metrics(objective, whole, mask, micro(waiting, 2), {})
    assert not any(np.any(x) for x in jax.tree.leaves(slope["adapter"]))
    assert all(np.any(x) for x in jax.tree.leaves(slope["critic"]))
    np.testing.assert_allclose(value, 0.1 * found["loss/value_avg"], rtol=1e-12)
    assert "loss/policy_avg" not in found and "entropy" in found


@pytest.mark.slow
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_frozen_policy_is_unchanged_while_its_critic_is_trained(layerwise):
    """For any momentum of the optimizer, and although the critic reads the policy's hidden states."""
    model, whole, mask = setting()
    objective = policy(model, LOSS, critic=own_critic(model))
    trainable, frozen = tree.partition(whole, mask)
    head = {"w": ParamSpec((model.config.width,), (None,), param_spec.normal(1.0))}
    specs = {**jax.tree.map(lambda _: None, whole), "adapter": model.specs["adapter"], "critic": head}
    specs = tree.map_with_path(
        lambda path, x: None if path.endswith("scale") else x, specs, is_leaf=param_spec.is_spec
    )
    make = partial(make_optimizer, Optim(lr=1e-2, layerwise=layerwise, warmup=0.0), steps=10)
    optimizer = freezable(make, specs)
    step = make_train_step(objective, optimizer, 0)
    batch = micro(laid(rows_of(random_groups())), 1)
    state = TrainState(jnp.int32(0), trainable, optimizer.init(trainable), {}, jnp.zeros(2, jnp.int32))
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules
        for _ in range(3):
            state, _ = step(state, frozen, batch)
        rested, at_rest = step(state, frozen, batch.replace(policy_weights=0 * batch.policy_weights))
        moved, at_move = step(rested, frozen, batch)
        rates = [float(optimizer.schedule(k)) for k in range(4)]
    same = lambda a, b, name: all(map(np.array_equal, jax.tree.leaves(a[name]), jax.tree.leaves(b[name])))  # noqa: E731
    assert same(rested.trainable, state.trainable, "adapter") and not same(
        rested.trainable, state.trainable, "critic"
    )
    assert not same(moved.trainable, state.trainable, "adapter")
    jax.tree.map(np.testing.assert_array_equal, rested.opt_state.policy, state.opt_state.policy)
    counts = [int(x) for x in jax.tree.leaves(rested.opt_state.heads) if x.ndim == 0]
    assert counts and set(counts) == {4} and rested.opt_state.policy_updates == 3
    assert metrics.as_floats(at_rest)["learning_rate"] == 0
    assert metrics.as_floats(at_move)["learning_rate"] == pytest.approx(rates[3], rel=1e-12)


def test_the_reference_copy_contains_only_the_policy():
    model, whole, mask = setting()
    kept = policy(model, LOSS, beta=0.1).init(tree.partition(whole, mask)[0], False)["reference"]
    assert jax.tree.leaves(kept["adapter"]) and not jax.tree.leaves(kept["critic"])


@pytest.mark.slow
def test_the_reference_is_the_base_or_the_copy_of_step_0():
    model, whole, mask = setting()
    batch = jax.tree.map(jnp.asarray, laid(rows_of(random_groups())))
    objective = policy(model, LOSS, beta=0.1, temperature=0.6)
    base = objective.score(whole, batch, objective.init(None, True)).reference
    np.testing.assert_allclose(base, objective.score({"base": whole["base"]}, batch, {}).logps, rtol=1e-12)
    at_0 = objective.init(tree.partition(whole, mask)[0], False)
    moved = jax.tree.map(lambda m, x: x + 0.1 if m else x, mask, whole)
    kept = objective.score(moved, batch, at_0).reference
    np.testing.assert_array_equal(kept, objective.score(whole, batch, at_0).reference)
    found = loss_gradients_metrics(objective, whole, mask, micro(batch.replace(reference=kept), 1), at_0)[2]
    assert abs(found["kl"]) < 1e-14
    assert policy(model, LOSS).init(whole, False) == {}  # nothing asks for a reference


def test_an_adaptive_penalty_follows_the_kl_of_its_step():
    penalty = AdaptiveKL(coef=0.3, target=0.5, horizon=10, estimate=k2)
    objective, fixed = (by_table(beta=beta) for beta in (penalty, FixedKL(0.3, k2)))
    batch = micro(laid(rows_of(random_groups())), 2)
    aux = objective.init(None, True)
    value, slope, found = loss_gradients_metrics(objective, TABLE, ALL, batch, aux)
    value_too, slope_too, _ = loss_gradients_metrics(fixed, TABLE, ALL, batch, {})
    np.testing.assert_allclose(value, value_too, rtol=1e-6)  # the coefficient is float32 in aux
    assert_close(slope, slope_too, 1e-6)
    assert found["kl_coef"] == np.float32(0.3)
    moved = metrics.Sum(jnp.asarray(0.1), jnp.asarray(1.0))
    sums = {"kl_per_completion": metrics.Sum(jnp.asarray(14.0), jnp.asarray(20.0)), "loss/policy_avg": moved}
    after = objective.update(aux, None, sums)
    np.testing.assert_allclose(after["kl_coef"], 0.3 * (1 + 0.2 * 20 / 10), rtol=1e-6)
    nothing = {**sums, "kl_per_completion": metrics.Sum(jnp.asarray(0.0), jnp.asarray(0.0))}
    resting = {**sums, "loss/policy_avg": metrics.Sum(jnp.asarray(0.0), jnp.asarray(0.0))}
    assert all(
        objective.update(aux, None, found)["kl_coef"] == aux["kl_coef"] for found in (nothing, resting)
    )
    assert fixed.update({"a": 1}, None, sums) == {"a": 1}


def with_observations(batch, share=0.4):
    """The batch with a part of its padding as read positions of given tokens, and which those are."""
    rng = np.random.default_rng(5)
    given = (batch.responses == batch.lengths.shape[1]) & (rng.random(batch.responses.shape) < share)
    targets = np.where(given, rng.integers(0, 40, given.shape), batch.targets)
    return replace(batch, targets=targets, observation_weights=given / given.sum()), given


def test_echo_adds_the_cross_entropy_of_given_tokens():
    """arXiv:2605.24517: L_GRPO of sampled tokens + lambda L_env, L_env = -sum log p / |O| of given tokens O,
    which the policy's metrics do not see.
    """
    batch, given = with_observations(laid(rows_of(random_groups())))
    objective = by_table()
    value, plain_metrics = objective(TABLE, batch, None, {})
    total, metrics_ = echo(None, lambda model: objective, 0.1)(TABLE, batch, None, {})
    logp = np.asarray(table_see(TABLE, batch, None, {}).logp)
    cost = -logp[given].mean()
    assert_close(total, value + 0.1 * cost)
    assert_close(metrics_["loss/observation_avg"].total, cost)
    assert_close(metrics_["loss"].total, total)
    assert {name for name in metrics_ if name not in plain_metrics} == {"loss/observation_avg"}
    for name, x in plain_metrics.items():
        if name != "loss":
            jax.tree.map(np.testing.assert_array_equal, metrics_[name], x)
    slope, plain_slope = (
        jax.grad(lambda w, f=f: f({**TABLE, "w": w}, batch, None, {})[0])(jnp.asarray(TABLE["w"]))
        for f in (echo(None, lambda model: objective, 0.1), objective)
    )
    by_token = jax.grad(lambda w: -jnp.mean(table_see({**TABLE, "w": w}, batch, None, {}).logp[given]))
    assert_close(slope - plain_slope, 0.1 * by_token(jnp.asarray(TABLE["w"])))


def test_echo_trains_the_policy_where_no_completion_has_a_weight():
    batch, _ = with_observations(laid(rows_of(random_groups())))
    with_echo = echo(None, lambda model: by_table())
    idle = replace(batch, policy_weights=np.zeros_like(batch.policy_weights))
    assert not with_echo.frozen_policy(idle) and not with_echo.frozen_policy(batch)
    assert with_echo.frozen_policy(replace(idle, observation_weights=np.zeros_like(batch.policy_weights)))
    assert with_echo.batch_spec(batch).observation_weights is batch.policy_weights
    with pytest.raises(ValueError, match="ECHO needs observation_weights in the batch"):
        with_echo(TABLE, replace(batch, observation_weights=None), None, {})
    with pytest.raises(ValueError, match="echo=0 must be above 0"):
        echo(None, lambda model: by_table(), 0)


def test_a_penalty_of_zero_logs_the_kl_and_changes_nothing():
    batch = micro(laid(rows_of(random_groups())), 1)
    value, slope, found = loss_gradients_metrics(by_table(beta=FixedKL(0.0, k1)), TABLE, ALL, batch, {})
    expected, slope_too, _ = loss_gradients_metrics(by_table(beta=0.0), TABLE, ALL, batch, {})
    assert value == expected and found["kl"] != 0
    assert_close(slope, slope_too, 1e-15)


def test_kl_in_reward_is_logged_and_updates_its_coefficient_only():
    """And the loss has none of it."""
    batch = micro(laid(rows_of(random_groups())), 1)
    inner = AdaptiveKL(coef=0.3, target=0.5, horizon=10, estimate=k2)
    objective, plain = by_table(beta=KLInReward(inner)), by_table(beta=0.0)
    aux = objective.init({}, True)
    assert float(aux["kl_coef"]) == pytest.approx(0.3)
    value, slope, found = loss_gradients_metrics(objective, TABLE, ALL, batch, aux)
    expected, slope_too, _ = loss_gradients_metrics(plain, TABLE, ALL, batch, {})
    assert value == expected
    assert_close(slope, slope_too, 1e-15)
    assert (
        0.3 != float(by_table(beta=KLInReward(FixedKL(0.1))).init({}, True)["kl_coef"]) == pytest.approx(0.1)
    )


@pytest.mark.slow
def test_a_mesh_gives_the_values_of_one_device():
    model, whole, mask = setting()
    whole, mask = ({name: x[name] for name in ("base", "adapter")} for x in (whole, mask))
    objective = policy(model, P.gspo, beta=0.1, entropy=0.05)
    batch = micro(laid(rows_of(random_groups(count=16), 16)), 2)
    one = jax.device_get(loss_gradients_metrics(objective, whole, mask, batch, {}))
    mesh = sharding.make_mesh(sharding.MeshShape(2, 2, 2))
    with jax.set_mesh(mesh):
        placed = jax.tree.map(jax.device_put, whole, param_spec.shardings(model.specs, mesh))
        many = loss_gradients_metrics(objective, placed, mask, sharding.shard_batch(mesh, batch), {})
    assert_same(jax.device_get(many), one)


def test_the_gradient_of_the_entropy_equals_autodiffs_for_any_chunk(monkeypatch):
    monkeypatch.setattr("jaxft.objectives.logprobs.CHUNK_LOGITS", 2 * 40 * 5)
    model, whole, _ = setting()
    rng = np.random.default_rng(0)
    h, a, b = (jnp.asarray(rng.normal(0, 1, shape)) for shape in ((2, 13, 32), (2, 13), (2, 13)))
    targets = jnp.asarray(rng.integers(0, 40, (2, 13)))
    with_head = lambda head: {"base": {**whole["base"], "head": head}}  # noqa: E731

    def chunked(head, h):
        found = token_logps(model, with_head(head), h, targets, ("logp", "entropy"))
        return jnp.sum(a * found.logp + b * found.entropy)

    def whole_at_once(head, h):
        logp = jax.nn.log_softmax(model.logits(model.head(with_head(head)), h), -1)
        at = jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
        return jnp.sum(a * at - b * jnp.sum(jnp.exp(logp) * logp, -1))

    found, expected = (
        jax.jit(jax.grad(fn, (0, 1)))(whole["base"]["head"], h) for fn in (chunked, whole_at_once)
    )
    assert_close(found, expected)


@pytest.mark.parametrize(
    "given, batch, message",
    [
        ({"beta": 0.1}, {"reference": None}, "a KL penalty needs the reference's log-probs in the batch"),
        (
            {"critic": Critic(lambda *x: x[1].values)},
            {"returns": None},
            "a critic needs values, returns and value_weights in the batch",
        ),
        (
            {"loss": lambda d: d.mean(d.logp)},
            {},
            r"policy loss <lambda> must return one value per token, \(2, 54\); got \(2, 9\)",
        ),
        ({"temperature": 0.0}, {}, "the sampling temperature must be above 0, got 0.0"),
        ({"critic": None}, {"coef": -1.0}, "Critic.coef=-1.0; expected above 0"),
    ],
)
def test_invalid_inputs_are_refused_in_one_line(given, batch, message):
    batch_of_arrays = jax.tree.map(jnp.asarray, laid(rows_of(random_groups())))
    with pytest.raises(ValueError, match=message):
        if "coef" in batch:
            Critic(lambda *x: x, **batch)
        by_table(**({"beta": 0.0, "critic": None} | given))(TABLE, batch_of_arrays.replace(**batch), None, {})


@pytest.mark.slow
def test_every_field_of_a_rollout_influences_the_loss():
    """A change of any of them changes the loss: none is carried in vain."""
    batch = jax.tree.map(jnp.asarray, laid(rows_of(random_groups())))
    run = jax.jit(lambda b: by_table(partial(P.clipped, eps_high=9.0, eps_low=1.0))(TABLE, b, None, {})[0])
    level = run(batch)
    for name in PER_TOKEN:
        assert run(batch.replace(**{name: getattr(batch, name) * 1.01})) != level, name
