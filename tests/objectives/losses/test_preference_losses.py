"""Preference losses: the papers' formulas in value and gradient, and laws that hold for any of them."""

import math
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_losses as T
from preference_rows import (
    EVERY,
    OF_SCORES,
    PAIR,
    SCORES,
    SINGLE,
    THIRD,
    TOTALS,
    Rows,
    assert_equals_torch,
    by_answer,
    check_against_torch,
    in_torch,
    kinds_of,
    lay,
    loss_and_gradient,
    one_program,
    random_rows,
    seen,
    value_of,
    with_knobs,
)

from jaxft.objectives.losses import preference_losses as P
from jaxft.objectives.losses import reference_free_losses as F
from jaxft.objectives.metrics import Sum
from jaxft.objectives.pair import PairBatch, Response, declaration, loss_values

pytestmark = pytest.mark.usefixtures("x64")
by_knobs = one_program({name: with_knobs(loss, knobs) for name, (loss, _, knobs) in EVERY.items()}, kinds_of)
by_default = one_program({name: loss for name, (loss, *_) in EVERY.items()}, kinds_of)
BY_SCORE = {
    f"{name} {score}": partial(getattr(P, name), score=ours)
    for name in OF_SCORES
    for score, (ours, _) in SCORES.items()
}
by_score = one_program(BY_SCORE)


@cache
def some_rows(kinds, seed, count=5, only_one=False):
    rows = random_rows(count, kinds, seed, only_one=only_one)
    return rows, lay(rows)


@pytest.mark.parametrize("name", EVERY)
def test_a_loss_equals_its_formula_in_value_and_gradient(name):
    _, formula, knobs = EVERY[name]
    for seed in range(3):
        rows, laid = some_rows(kinds_of(name), seed, count=5 + seed)
        each = name not in TOTALS and name not in THIRD
        assert_equals_torch(by_knobs(name, laid), with_knobs(formula, knobs), rows, laid, each=each)


@pytest.mark.parametrize("name", EVERY)
def test_default_parameters_are_those_of_the_formula(name):
    rows, laid = some_rows(kinds_of(name), seed=7)
    each = name not in TOTALS and name not in THIRD
    assert_equals_torch(by_default(name, laid), EVERY[name][1], rows, laid, each=each)


@pytest.mark.parametrize("name", OF_SCORES)
@pytest.mark.parametrize("score", SCORES)
def test_a_divergence_changes_the_score(name, score):
    rows, laid = some_rows(PAIR, seed=3)
    formula = partial(getattr(T, name), score=SCORES[score][1])
    assert_equals_torch(by_score(f"{name} {score}", laid), formula, rows, laid)


@pytest.mark.parametrize("name", SINGLE)
def test_rows_with_one_response_are_scored_alone(name):
    _, formula, knobs = SINGLE[name]
    rows, laid = some_rows(kinds_of(name), seed=5, count=7, only_one=True)
    assert_equals_torch(by_knobs(name, laid), with_knobs(formula, knobs), rows, laid)


def test_a_missing_mismatched_response_is_excluded_from_the_kl():
    rows = random_rows(count=6, kinds=kinds_of("kto"), seed=5)
    rows.responses["mismatched"][2] = np.zeros((0, 3))
    check_against_torch(F.kto, T.kto, rows)


@pytest.mark.parametrize("sign", (-1, 1))
def test_the_kl_of_kto_is_never_negative_and_has_no_gradient(sign):
    rows = random_rows(count=6, kinds=kinds_of("kto"), seed=5)
    for x in rows.responses["mismatched"]:
        x[:, 1] = x[:, 0] - sign * 0.3
    check_against_torch(F.kto, T.kto, rows)
    laid = lay(rows)
    grad = by_answer(laid, loss_and_gradient(F.kto, laid)[2])
    assert not any(g.any() for (kind, _), g in grad.items() if kind == "mismatched")


def summed(kind, laid, beta):
    pair = seen(laid)
    answer = pair.responses[kind]
    where = (pair.weight > 0) * answer.present
    return Sum(jnp.sum(where * beta * answer.ratio), jnp.sum(where))


def test_the_shift_of_bco_is_the_mean_of_all_rewards_so_far():
    beta, before = 0.4, []
    loss, declared = partial(F.bco, beta=beta), F.bco
    state = {name: jnp.asarray(x, jnp.float32) for name, x in declared.init.items()}
    state = {name: x.astype(jnp.float64) for name, x in state.items()}
    for step, count in enumerate((5, 2, 7)):
        rows = random_rows(count, seed=20 + step, only_one=step == 1)
        check_against_torch(loss, partial(T.bco, beta=beta, before=tuple(before)), rows, state)
        laid = lay(rows)
        state = declared.update(state, {f"rewards/{kind}": summed(kind, laid, beta) for kind in PAIR})
        p = in_torch(rows)
        before += [beta * x for x in (*p.c[p.has("chosen")].tolist(), *p.r[p.has("rejected")].tolist())]
    np.testing.assert_allclose(state["delta"], np.mean(before), rtol=1e-12)
    assert state["count"] == len(before) == 26


def test_losses_of_a_mix_have_separate_states():
    betas, rows = (0.1, 0.7), random_rows(6, seed=4)
    laid = lay(rows)
    loss = P.mix((partial(F.bco, beta=betas[0]), 0.25), (P.dpo, 2.0), (partial(F.bco, beta=betas[1]), 0.5))
    state = {name: jnp.asarray(x, jnp.float64) for name, x in loss.init.items()}
    assert len(state) == 4
    metrics = {f"rewards/{kind}": summed(kind, laid, 0.1) for kind in PAIR}
    state = loss.update({**state, "delta.0": jnp.asarray(3.0), "count.0": jnp.asarray(9.0)}, metrics)
    parts = [partial(F.bco, beta=beta) for beta in betas]
    own = [
        {"delta": jnp.asarray(3.0), "count": jnp.asarray(9.0)},
        {"delta": jnp.asarray(0.0), "count": jnp.asarray(0.0)},
    ]
    own = [F.bco.update(x, metrics) for x in own]
    assert own[0]["delta"] != own[1]["delta"]
    expected = 2.0 * P.dpo(seen(laid)) + sum(
        w * loss_values(p, seen(laid), x) for w, p, x in zip((0.25, 0.5), parts, own)
    )
    np.testing.assert_allclose(loss_values(loss, seen(laid), state), expected, rtol=1e-12)


@cache
def with_weightless_pairs(kinds):
    """Rows, and their batches alone and with more pairs without weight."""
    rows, more = random_rows(5, kinds, seed=1), random_rows(4, kinds, seed=2, scale=30.0)
    both = Rows(
        {kind: rows.responses[kind] + more.responses[kind] for kind in kinds},
        np.concatenate([rows.margin, more.margin]),
        np.concatenate([rows.weight, np.zeros(more.count)]),
    )
    return rows, lay(rows, seed=3), lay(both, seed=4)


@pytest.mark.parametrize("name", EVERY)
def test_pairs_without_weight_change_nothing(name):
    """For any tokens: values and gradients of the other pairs are the same, and the gradient on these pairs
    is zero.
    """
    rows, alone, laid = with_weightless_pairs(kinds_of(name))
    value, values, grad = by_knobs(name, alone)
    value_too, values_too, grad_too = by_knobs(name, laid)
    np.testing.assert_allclose(value_too, value, rtol=1e-12)
    for a, b in zip(alone.cells, laid.cells):
        np.testing.assert_allclose(values_too[b], values[a], rtol=1e-12)
    grad, grad_too = by_answer(alone, grad), by_answer(laid, grad_too)
    for (kind, i), g in grad_too.items():
        np.testing.assert_allclose(g, grad[kind, i] if i < rows.count else 0 * g, rtol=1e-12, atol=1e-15)


@cache
def empty_batch(kinds):
    return lay(Rows({kind: [np.zeros((0, 3))] for kind in kinds}, np.zeros(1), np.zeros(1)))


@pytest.mark.parametrize("name", EVERY)
def test_an_empty_batch_has_loss_0_and_gradient_0(name):
    value, values, grad = by_knobs(name, empty_batch(kinds_of(name)))
    assert value == 0 and np.isfinite(values).all() and not grad.any()


@cache
def at_the_reference(kinds):
    rows = random_rows(5, kinds=kinds, seed=2, lengths=(4, 4))
    for answers in rows.responses.values():
        for x in answers:
            x[:, 1] = x[:, 0]
    return lay(rows)


@pytest.mark.parametrize("name", T.AT_THE_START)
def test_the_value_at_the_reference_is_the_theoretical_one(name):
    laid = at_the_reference(kinds_of(name))
    _, values, _ = by_default(name, laid)
    np.testing.assert_allclose([values[cell] for cell in laid.cells], T.AT_THE_START[name], rtol=1e-12)


# apo_down's chosen gradients cancel at the start; discopop isn't convex and points the other way between its
# two valleys
RISES = [n for n in T.AT_THE_START if n not in ("apo_down", "discopop")]
NO_REFERENCE = ("simpo", "alphapo", "cpo", "cpo_hinge", "cpo_ipo", "orpo")


@pytest.mark.parametrize("name", [*RISES, *NO_REFERENCE])
def test_the_first_step_raises_chosen_and_lowers_rejected(name):
    laid = at_the_reference(kinds_of(name))
    grad = by_answer(laid, by_default(name, laid)[2])
    assert all((g < 0).all() for (kind, _), g in grad.items() if kind == "chosen")
    assert all((g > 0).all() for (kind, _), g in grad.items() if kind == "rejected")


def test_apo_down_lowers_both_and_the_rejected_one_more():
    _, laid = some_rows(PAIR, seed=2)
    grad = by_answer(laid, by_default("apo_down", laid)[2])
    assert all((g > 0).all() for (kind, _), g in grad.items() if kind == "rejected")


SWAPS = {  # loss(pair) - loss(swapped) = -slope * margin
    "dpo": (P.dpo, 0.1, lambda p: p.c - p.r),
    "cdpo": (P.cdpo, 0.1 * 0.8, lambda p: p.c - p.r),
    "robust": (P.robust, 0.1 / 0.8, lambda p: p.c - p.r),
    "sigmoid_norm": (P.sigmoid_norm, 0.1, lambda p: p.c / p.n("chosen") - p.r / p.n("rejected")),
    "simpo": (partial(F.simpo, gamma=0.0), 2.0, lambda p: p.means[0] - p.means[1]),
    "cpo": (partial(F.cpo, alpha=0.0), 0.1, lambda p: p.lp("chosen") - p.lp("rejected")),
    "wpo": (P.wpo(P.dpo), 0.1, None),
    "ld": (P.length_desensitised(P.dpo), 0.1, None),
}


by_swap = one_program({name: loss for name, (loss, *_) in SWAPS.items()})


@cache
def swapped_rows():
    rows, laid = some_rows(PAIR, seed=8, count=6)
    swapped = Rows({"chosen": rows.responses["rejected"], "rejected": rows.responses["chosen"]}, rows.margin)
    return rows, laid, lay(swapped)


@pytest.mark.parametrize("name", SWAPS)
def test_swapping_chosen_and_rejected_mirrors_the_gradient(name):
    _, slope, margin = SWAPS[name]
    rows, laid, other = swapped_rows()
    (_, values, grad), (_, values_too, grad_too) = by_swap(name, laid), by_swap(name, other)
    if margin is not None:
        expected = -slope * margin(in_torch(rows)).detach().numpy()
        np.testing.assert_allclose([values[c] - values_too[c] for c in laid.cells], expected, rtol=1e-10)
    grad, grad_too = by_answer(laid, grad), by_answer(other, grad_too)
    for (kind, i), g in grad.items():
        there = grad_too["rejected" if kind == "chosen" else "chosen", i]
        assert (np.sign(there) == -np.sign(g)).all()


def test_robust_is_dpo_on_average_over_flips():
    pair = seen(lay(random_rows(5, seed=1)))
    flipped = replace(pair, responses={"chosen": pair.rejected, "rejected": pair.chosen})
    eps = 0.3
    loss = partial(P.robust, label_smoothing=eps)
    np.testing.assert_allclose((1 - eps) * loss(pair) + eps * loss(flipped), P.dpo(pair), rtol=1e-12)


def extreme_rows():
    """Log-ratios from -1e4 to 1e4 and answers of 1 and 4096 tokens, in all combinations that matter."""
    cases = [(policy, known) for policy in (0.0, -1e-6, -3.0, -1e4) for known in (0.0, -3.0, -1e4)]
    long = lambda x, n: np.stack([np.full(n, v / n) for v in (*x, -n)], -1)  # noqa: E731
    pairs = [(c, r) for c in cases[::2] for r in cases[1::2]] + [
        (c, r) for c in cases[1::2] for r in cases[::2]
    ]
    lengths = [(1, 1), (1, 4096), (4096, 1), (4096, 4096), (1, 1)]
    answers = {kind: [] for kind in ("chosen", "rejected", "gold", "mismatched")}
    for i, (c, r) in enumerate(pairs):
        n, m = lengths[i % len(lengths)]
        answers["chosen"].append(long(c, n))
        answers["rejected"].append(long(r, m))
        answers["gold"].append(long(c, 1))
        answers["mismatched"].append(long(r, 1))
    return Rows(answers, np.full(len(pairs), 3.0))


EXTREME = {  # one program of each table
    "every": {name: with_knobs(loss, knobs) for name, (loss, _, knobs) in EVERY.items()},
    "score of dpo": {name: BY_SCORE[name] for name in BY_SCORE if name.startswith("dpo ")},
    "score of others": {name: BY_SCORE[name] for name in BY_SCORE if not name.startswith("dpo ")},
}
CASES = [
    pytest.param(table, name, dtype, id=f"{table}-{name}-{dtype.__name__}")
    for table, losses in EXTREME.items()
    for name in losses
    for dtype in (jnp.bfloat16, jnp.float32)
]


@cache
def finite_at_extremes(table, dtype):
    """{name: whether a loss's values and gradients are finite}."""
    rows = extreme_rows()
    pair = seen(lay(rows, shape=(rows.count, 1), dtype=dtype))
    assert pair.weight.dtype == dtype

    def finite(loss, pair):
        found = values_and_gradients(loss, pair)
        return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(found)]).all()

    return jax.jit(lambda pair: {name: finite(loss, pair) for name, loss in EXTREME[table].items()})(pair)


def values_and_gradients(loss, pair):
    """Gradients by summed and per-token log-probs; the gradient of a token is a sum of these."""
    dtype = pair.weight.dtype

    def total(answers, tokens):
        values = value_of(loss, replace(pair, responses=answers, tokens=replace(pair.tokens, logp=tokens)))
        assert values.dtype == dtype
        return jnp.sum(pair.weight * values), values

    def both(answers, tokens):
        logps = {kind: a.logp for kind, a in answers.items()}
        fill = lambda logps: {kind: replace(a, logp=logps[kind]) for kind, a in answers.items()}  # noqa: E731
        return jax.grad(lambda logps, tokens: total(fill(logps), tokens), (0, 1), has_aux=True)(logps, tokens)

    return both(pair.responses, pair.tokens.logp)


@pytest.mark.quick_cases("every-*-bfloat16", "score of dpo-*-bfloat16")
@pytest.mark.parametrize("table, name, dtype", CASES)
def test_values_and_gradients_are_finite_at_extremes(table, name, dtype):
    assert finite_at_extremes(table, dtype)[name]


KNOBS = [
    (n, k)
    for n, (loss, *_) in EVERY.items()
    for k in ("beta", "label_smoothing", "alpha", "gamma", "tau", "penalty")
]


def takes(loss, knob):
    code = getattr(declaration(loss).fn, "__code__", None)
    return code is not None and knob in code.co_varnames[: code.co_argcount]


KNOBS = [(n, k) for n, k in KNOBS if takes(EVERY[n][0], k) and " " not in n]


@cache
def with_knobs_of(kinds):
    """{(name, knob): values} for a traced knob and for a number."""
    pair = seen(some_rows(kinds, seed=1)[1])
    values = lambda x: {  # noqa: E731
        (name, knob): value_of(partial(EVERY[name][0], **{knob: x}), pair)
        for name, knob in KNOBS
        if kinds_of(name) == kinds
    }
    return jax.jit(values)(0.2), jax.jit(lambda: values(0.2))()


@pytest.mark.parametrize("name, knob", KNOBS)
def test_knobs_may_be_traced(name, knob):
    """A sweep's knob is an array of the program: the same value as the number's."""
    found, expected = with_knobs_of(kinds_of(name))
    np.testing.assert_allclose(found[name, knob], expected[name, knob], rtol=1e-12)


def test_alpha_divergence_converges_to_its_limits():
    c = jnp.linspace(-3.0, 3.0, 13)
    for alpha in (1.0, 1 + 1e-7, 1 - 1e-5, 1 + 1e-5):
        np.testing.assert_allclose(P.alpha_divergence(c, alpha), c, atol=1e-4)
    np.testing.assert_allclose(P.alpha_divergence(c, 0.0), P.forward_kl(c), rtol=1e-12)


def test_length_desensitised_equals_the_loss_at_alpha_1_and_for_equal_lengths():
    pair = seen(lay(random_rows(5, seed=1)))
    np.testing.assert_allclose(P.length_desensitised(P.dpo, alpha=1.0)(pair), P.dpo(pair), rtol=1e-12)
    level = seen(lay(random_rows(5, seed=1, lengths=(4, 4))))
    np.testing.assert_allclose(P.length_desensitised(P.dpo, alpha=0.0)(level), P.dpo(level), rtol=1e-12)


@pytest.mark.parametrize(
    "change, loss", [(P.wpo, P.dpo), (P.length_desensitised, P.ipo), (P.length_desensitised, P.aot)]
)
def test_parameters_may_be_set_before_or_after_wrapping_a_loss(change, loss):
    pair = seen(lay(random_rows(5, seed=1)))
    inside, outside = (
        value_of(change(partial(loss, beta=0.7)), pair),
        value_of(partial(change(loss), beta=0.7), pair),
    )
    np.testing.assert_array_equal(inside, outside)
    assert not np.allclose(inside, value_of(change(loss), pair))


def test_a_single_response_keeps_its_length():
    rows = random_rows(5, kinds=kinds_of("kto"), seed=1, only_one=True, lengths=(2, 9))
    pair = seen(lay(rows))
    for loss in (F.apo_zero_unpaired, F.kto):
        np.testing.assert_allclose(
            value_of(P.length_desensitised(loss, alpha=0.0), pair), value_of(loss, pair), rtol=1e-12
        )


def test_log1mexp_is_exact_on_both_sides():
    x = -np.exp(np.linspace(np.log(1e-11), np.log(500.0), 400))
    expected = np.where(x > -1e-3, np.log(-np.expm1(x)), np.log1p(-np.exp(x)))
    np.testing.assert_allclose(F.log1mexp(jnp.asarray(x)), expected, rtol=1e-12, atol=1e-300)
    slope = jax.vmap(jax.grad(F.log1mexp))(jnp.asarray(x))
    np.testing.assert_allclose(slope, -1 / np.expm1(-x), rtol=1e-12)


def test_log1mexp_is_finite_and_monotone_near_0():
    x = jnp.asarray([0.0, -1e-15, -1e-12, -1e-9])
    found = F.log1mexp(x)
    assert math.isclose(float(found[0]), math.log(1e-12), rel_tol=1e-3) and (jnp.diff(found) >= 0).all()


@pytest.mark.parametrize(
    "loss, message",
    [
        (partial(P.exo_pair, label_smoothing=0.0), "in \\(0, 1\\), got 0.0"),
        (partial(P.robust, label_smoothing=0.5), "in \\[0, 0.5\\), got 0.5"),
        (partial(P.robust, label_smoothing=-0.1), "got -0.1"),
        (partial(P.cdpo, label_smoothing=0.7), "got 0.7"),
        (partial(P.discopop, tau=0.0), "tau must be above 0"),
        (partial(F.alphapo, alpha=0.0), "use simpo"),
        (F.tpo, "third response `gold`"),
        (F.kto, "third response `mismatched`"),
    ],
)
def test_a_knob_out_of_range_or_a_missing_response_is_one_clear_line(loss, message):
    with pytest.raises(ValueError, match=message) as e:
        value_of(loss, seen(lay(random_rows())))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("loss", (P.dpo, P.aot, P.aot_unpaired, P.sppo_hard, F.bco))
def test_a_loss_that_reads_a_missing_reference_is_refused(loss):
    with pytest.raises(ValueError, match="Set preference.reference='start'."):
        value_of(loss, seen(lay(random_rows()), reference=False))


without_reference = one_program({name: EVERY[name][0] for name in (*NO_REFERENCE, *THIRD)}, kinds_of)


@pytest.mark.parametrize("name", (*NO_REFERENCE, *THIRD))
def test_reference_free_losses_do_not_read_the_reference(name):
    _, laid = some_rows(kinds_of(name), seed=0)
    assert without_reference(name, laid, reference=False)[0] == without_reference(name, laid)[0]


def test_dpo_margin_without_the_column_is_the_difference_of_the_ratings():
    pair = seen(lay(random_rows()))
    known = P.dpo_margin(pair)
    rated = {"score_chosen": pair.columns["margin"] + 3, "score_rejected": 0 * pair.columns["margin"] + 3}
    np.testing.assert_allclose(P.dpo_margin(replace(pair, columns=rated)), known, rtol=1e-6)


def test_dpo_margin_requires_the_column():
    pair = seen(lay(random_rows()))
    with pytest.raises(ValueError, match="`margin` .available: none."):
        P.dpo_margin(replace(pair, columns={}))


def test_wpo_refuses_losses_that_couple_pairs_and_mix_refuses_nothing_to_mix():
    for loss in (P.aot, partial(F.kto, beta=0.2), P.mix((P.dpo, 1.0), (F.bco, 1.0))):
        with pytest.raises(ValueError, match="couples"):
            P.wpo(loss)
    with pytest.raises(ValueError, match="no losses"):
        P.mix()


def best_implicit_reward(loss, lengths, chosen_first):
    """beta (x_1 - x_2) that minimises the expected loss of two responses with log-ratios x_1, x_2, beta 0.1.

    lengths: of the two. chosen_first: probability that the first is preferred. Found by bisection.
    """

    def response(x, length):
        one = jnp.ones((1, 1))
        return Response(logp=x * one, reference=0 * one, length=length * one, mean_length=one, present=one)

    def expected_loss(x):
        first, second = response(x, lengths[0]), response(0.0, lengths[1])
        orders = ((first, second), chosen_first), ((second, first), 1 - chosen_first)
        total = 0.0
        for (chosen, rejected), probability in orders:
            pair = PairBatch({"chosen": chosen, "rejected": rejected}, None, {}, jnp.ones((1, 1)))
            total += probability * loss(pair, beta=0.1)[0, 0]
        return total

    slope, (low, high) = jax.jit(jax.grad(expected_loss)), (-100.0, 100.0)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 0.1 * middle


def test_rdpo_learns_nothing_from_preferences_that_length_alone_decides():
    """Park et al. (arXiv:2403.19159): the policy maximises r - alpha |y| with a KL penalty beta, whose best
    policy has r = beta log(pi / pi_ref) + alpha |y| + const. Preferences of a judge with r = alpha |y|
    (Bradley & Terry) are those of pi = pi_ref.
    """
    lengths, alpha = (7.0, 5.0), 0.5
    chosen_first = 1 / (1 + math.exp(-alpha * (lengths[0] - lengths[1])))
    assert best_implicit_reward(P.dpo, lengths, chosen_first) == pytest.approx(1.0, abs=1e-6)
    half = partial(P.rdpo, alpha=alpha / 2)
    assert best_implicit_reward(half, lengths, chosen_first) == pytest.approx(0.5, abs=1e-6)
    matched = partial(P.rdpo, alpha=alpha)
    assert best_implicit_reward(matched, lengths, chosen_first) == pytest.approx(0.0, abs=1e-6)
