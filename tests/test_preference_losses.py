"""Preference losses: the papers' formulas in value and gradient, TRL's own code, and laws that hold for any of them."""

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_losses as T

from jaxft.batch import Pairs
from jaxft.metrics import Sum
from jaxft.objectives import preference as P
from jaxft.objectives import reference_free as F
from jaxft.objectives.scored import Coupled, scored, unwrap

PAIR = ("chosen", "rejected")


@pytest.fixture(autouse=True)
def strict():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield


@dataclass(frozen=True)
class Rows:
    """Pairs as a test writes them: per answer an array [tokens, 3] of log-probs by policy and reference and log sum p^2."""

    answers: dict[str, list[np.ndarray]]
    margin: np.ndarray
    weight: np.ndarray = field(default=None)

    def __post_init__(self):
        if self.weight is None:
            object.__setattr__(self, "weight", np.full(self.count, 1 / self.count))

    @property
    def count(self):
        return len(self.margin)


def random_rows(count=5, kinds=PAIR, seed=0, scale=1.0, lengths=(1, 9), only_one=False):
    """Random pairs of unequal lengths; only_one: each has either its chosen or its rejected answer."""
    rng = np.random.default_rng(seed)

    def answer(kind, i):
        missing = only_one and kind in PAIR and (i % 3 == 0) == (kind == "chosen")
        n = 0 if missing else rng.integers(lengths[0], lengths[1] + 1)
        policy = -scale * rng.exponential(1.0, n) - 1e-3
        return np.stack([policy, policy + scale * rng.normal(0, 0.5, n) / max(n, 1) ** 0.5, -rng.exponential(1.0, n)], -1)

    answers = {kind: [answer(kind, i) for i in range(count)] for kind in kinds}
    return Rows(answers, rng.normal(0, 1, count))


@dataclass(frozen=True)
class Laid:
    """Rows in a batch: its arrays, and where each token of each answer went."""

    batch: Pairs
    values: np.ndarray  # [B, M, 3]
    at: dict[tuple[str, int], list[tuple[int, int]]]
    cells: list[tuple[int, int]]


def lay(rows, shape=(3, 3), seed=0, dtype="float64"):
    """The pairs in random cells of [B, P], their tokens in random order in the row, padding between them."""
    rng = np.random.default_rng(seed)
    kinds, (B, slots) = tuple(rows.answers), shape
    A = len(kinds)
    cells = [divmod(int(x), slots) for x in rng.permutation(B * slots)[: rows.count]]
    tokens = [[] for _ in range(B)]
    lengths, mean_lengths = np.zeros((B, slots, A), np.int32), np.zeros((B, slots, A), dtype)
    weight, margin = np.zeros(shape, dtype), np.zeros(shape, dtype)
    for a, kind in enumerate(kinds):
        counted = [len(x) for x, w in zip(rows.answers[kind], rows.weight) if w > 0 and len(x) > 0]
        mean_lengths[..., a] = np.mean(counted) if counted else 0
        for i, (b, p) in enumerate(cells):
            lengths[b, p, a] = len(rows.answers[kind][i])
            tokens[b] += [(p * A + a, place, kind, i) for place in range(lengths[b, p, a])]
    for i, cell in enumerate(cells):
        weight[cell], margin[cell] = rows.weight[i], rows.margin[i]
    M = max(96, *(len(row) + 3 for row in tokens))  # most tests share one shape, so that nothing is compiled twice
    answer, places = np.full((B, M), slots * A, np.int32), np.zeros((B, M), np.int32)
    values, at = np.zeros((B, M, 3), dtype), defaultdict(dict)
    for b, row in enumerate(tokens):
        for m, (owner, place, kind, i) in zip(rng.permutation(M), row):
            answer[b, m], places[b, m], values[b, m] = owner, place, rows.answers[kind][i][place]
            at[kind, i][place] = (b, int(m))
    none = dict.fromkeys(("ids", "segments", "positions", "read", "targets"))
    batch = Pairs(
        **none, answers=answer, places=places, lengths=lengths, mean_lengths=mean_lengths, pair_weights=weight,
        index=np.zeros(shape, np.int32), columns={"margin": margin}, kinds=kinds,
    )  # fmt: skip
    return Laid(batch, values, {key: [x[t] for t in range(len(x))] for key, x in at.items()}, cells)


def seen(laid, logp=None, reference=True):
    policy, known, square = (jnp.asarray(laid.values[..., i]) for i in range(3))
    return scored(laid.batch, policy if logp is None else logp, square, known if reference else None)


def value_of(loss, pair, state=None):
    loss = unwrap(loss)
    if not isinstance(loss, Coupled):
        return loss(pair)
    start = {name: jnp.asarray(x, pair.weight.dtype) for name, x in loss.start.items()}
    return loss.fn(pair, start if state is None else state)


def judged(loss, laid, state=None, reference=True):
    """(total, values [B, P], gradient [B, M]) as the objective takes them."""

    def total(logp):
        pair = seen(laid, logp, reference)
        values = value_of(loss, pair, state)
        assert values.shape == pair.weight.shape and values.dtype == logp.dtype
        return jnp.sum(jnp.where(pair.weight > 0, pair.weight * values, 0)), values

    (value, values), grad = jax.value_and_grad(total, has_aux=True)(jnp.asarray(laid.values[..., 0]))
    return float(value), np.asarray(values), np.asarray(grad)


def by_answer(laid, array):
    return {key: np.asarray([array[cell] for cell in cells]) for key, cells in laid.at.items()}


def in_torch(rows):
    part = lambda i: {k: [torch.tensor(x[:, i], requires_grad=i == 0) for x in xs] for k, xs in rows.answers.items()}  # noqa: E731
    return T.Rows(part(0), part(1), part(2), torch.tensor(rows.margin))


def check_against_torch(loss, formula, rows, state=None, rtol=1e-10, each=True):
    laid = lay(rows)
    value, values, grad = judged(loss, laid, state)
    seen_by_torch = in_torch(rows)
    wanted = formula(seen_by_torch)
    wanted.mean().backward()
    np.testing.assert_allclose(value, wanted.mean().item(), rtol=rtol)
    if each:
        np.testing.assert_allclose([values[cell] for cell in laid.cells], wanted.detach().numpy(), rtol=rtol, atol=1e-13)
    found = by_answer(laid, grad)
    for (kind, i), g in found.items():
        known = seen_by_torch.policy[kind][i].grad
        np.testing.assert_allclose(g, 0 * g if known is None else known.numpy(), rtol=rtol, atol=1e-13, err_msg=f"{kind} {i}")
    assert np.abs(grad).max() > 0
    inside = np.zeros_like(grad, bool)
    for cells in laid.at.values():
        for cell in cells:
            inside[cell] = True
    assert not grad[~inside].any(), "padding has a gradient"


SCORES = {
    "reverse": (P.reverse_kl, T.reverse_kl),
    "forward": (P.forward_kl, T.forward_kl),
    "js": (P.js_divergence, T.js_divergence),
    "alpha": (P.alpha_divergence, T.alpha_divergence),
    "alpha=1.3": (partial(P.alpha_divergence, alpha=1.3), partial(T.alpha_divergence, alpha=1.3)),
}
OF_SCORES = ("dpo", "cdpo", "hinge", "squared_hinge", "ipo", "sigmoid_norm", "exo_pair", "robust", "discopop")

# A row a loss: ours, its formula in torch, knobs other than the defaults. `sft` is a scalar in TRL: compared as a total.
PAIRED = {
    **{name: (getattr(P, name), getattr(T, name), {"beta": 0.3}) for name in OF_SCORES},
    "exo_pair eps": (P.exo_pair, T.exo_pair, {"label_smoothing": 0.2}),
    "robust eps": (P.robust, T.robust, {"label_smoothing": 0.4}),
    "discopop tau": (P.discopop, T.discopop, {"tau": 0.7, "beta": 2.0}),
    "dpo_margin": (P.dpo_margin, T.dpo_margin, {"beta": 0.3}),
    "dpop": (P.dpop, T.dpop, {"beta": 0.2, "penalty": 5.0}),
    "rdpo": (P.rdpo, T.rdpo, {"beta": 0.3, "alpha": 0.05}),
    "nca_pair": (P.nca_pair, T.nca_pair, {"beta": 0.4}),
    "bco_pair": (P.bco_pair, T.bco_pair, {"beta": 0.4}),
    "sppo_hard": (P.sppo_hard, T.sppo_hard, {"beta": 0.4}),
    "apo_zero": (P.apo_zero, T.apo_zero, {"beta": 0.4}),
    "apo_down": (P.apo_down, T.apo_down, {"beta": 0.4}),
    "aot": (P.aot, T.aot, {"beta": 0.4, "label_smoothing": 0.1}),
    "aot_unpaired": (P.aot_unpaired, T.aot_unpaired, {"beta": 0.4, "label_smoothing": 0.1}),
    "sft": (P.sft, T.nll, {}),
    "simpo": (F.simpo, T.simpo, {"label_smoothing": 0.1, "gamma": 0.7}),
    "alphapo": (F.alphapo, T.alphapo, {"alpha": 0.4, "label_smoothing": 0.1}),
    "alphapo below": (F.alphapo, T.alphapo, {"alpha": -0.4}),
    "cpo": (F.cpo, T.cpo, {"alpha": 0.7, "label_smoothing": 0.2}),
    "cpo_hinge": (F.cpo_hinge, T.cpo_hinge, {"alpha": 0.7, "beta": 0.3}),
    "cpo_ipo": (F.cpo_ipo, T.cpo_ipo, {"alpha": 0.7, "beta": 0.3}),
    "orpo": (F.orpo, T.orpo, {"beta": 0.5}),
    "wpo": (P.wpo(P.dpo), T.wpo(T.dpo), {"beta": 0.5}),
    "wpo ipo": (P.wpo(P.ipo), T.wpo(T.ipo), {"beta": 0.5}),
    "ld dpo": (P.length_desensitised(P.dpo, alpha=0.3), T.length_desensitised(T.dpo, alpha=0.3), {"beta": 0.5}),
    "ld ipo": (P.length_desensitised(P.ipo, alpha=0.3), T.length_desensitised(T.ipo, alpha=0.3), {"beta": 0.5}),
    "ld aot": (P.length_desensitised(P.aot, alpha=0.3), T.length_desensitised(T.aot, alpha=0.3), {"beta": 0.5}),
    "mpo": (
        P.mix((P.dpo, 0.8), (P.bco_pair, 0.2), (P.sft, 1.0)),
        T.mix((T.dpo, 0.8), (T.bco_pair, 0.2), (T.nll, 1.0)),
        {},
    ),
    "mix of coupled": (P.mix((P.aot, 0.8), (P.dpo, 0.2)), T.mix((T.aot, 0.8), (T.dpo, 0.2)), {}),
}
TOTALS = {"sft", "cpo", "cpo_hinge", "cpo_ipo", "orpo", "mpo"}  # TRL's NLL is one number for the batch

THIRD = {
    "tpo": (F.tpo, partial(T.cpo, beta=0.01, imitated="gold"), {"alpha": 0.7, "beta": 0.2, "label_smoothing": 0.1}),
    "tpo_hinge": (F.tpo_hinge, partial(T.cpo_hinge, beta=0.01, imitated="gold"), {"alpha": 0.7, "beta": 0.2}),
    "tpo_ipo": (F.tpo_ipo, partial(T.cpo_ipo, beta=0.01, imitated="gold"), {"alpha": 0.7, "beta": 0.2}),
    "tpo_l": (F.tpo_l, T.tpo_l, {"alpha": 0.7, "beta": 0.2, "label_smoothing": 0.1}),
}
SINGLE = {
    "apo_zero_unpaired": (F.apo_zero_unpaired, T.apo_zero_unpaired, {"desirable_weight": 1.3, "undesirable_weight": 0.8}),
    "kto": (F.kto, T.kto, {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.8}),
    "bco": (F.bco, T.bco, {"beta": 0.4}),
}
EVERY = {**PAIRED, **THIRD, **SINGLE}


def kinds_of(name):
    return PAIR + (("gold",) if name in THIRD else ("mismatched",) if name in SINGLE else ())


def with_knobs(loss, knobs):
    return partial(loss, **knobs) if knobs else loss


@pytest.mark.parametrize("name", EVERY)
def test_a_loss_is_its_formula_in_value_and_gradient(name):
    loss, formula, knobs = EVERY[name]
    for seed in range(3):
        rows = random_rows(count=5 + seed, kinds=kinds_of(name), seed=seed)
        each = name not in TOTALS and name not in THIRD
        check_against_torch(with_knobs(loss, knobs), with_knobs(formula, knobs), rows, each=each)


@pytest.mark.parametrize("name", EVERY)
def test_default_knobs_are_those_of_the_formula(name):
    loss, formula, _ = EVERY[name]
    each = name not in TOTALS and name not in THIRD
    check_against_torch(loss, formula, random_rows(kinds=kinds_of(name), seed=7), each=each)


@pytest.mark.parametrize("name", OF_SCORES)
@pytest.mark.parametrize("score", SCORES)
def test_a_divergence_changes_the_score(name, score):
    ours, formula = SCORES[score]
    check_against_torch(partial(getattr(P, name), score=ours), partial(getattr(T, name), score=formula), random_rows(seed=3))


@pytest.mark.parametrize("name", SINGLE)
def test_rows_with_one_answer_are_judged_alone(name):
    loss, formula, knobs = SINGLE[name]
    rows = random_rows(count=7, kinds=kinds_of(name), seed=5, only_one=True)
    check_against_torch(with_knobs(loss, knobs), with_knobs(formula, knobs), rows)


def test_a_mismatched_answer_that_is_missing_is_left_out_of_the_kl():
    rows = random_rows(count=6, kinds=kinds_of("kto"), seed=5)
    rows.answers["mismatched"][2] = np.zeros((0, 3))
    check_against_torch(F.kto, T.kto, rows)


@pytest.mark.parametrize("sign", (-1, 1))
def test_the_kl_of_kto_is_never_negative_and_has_no_gradient(sign):
    rows = random_rows(count=6, kinds=kinds_of("kto"), seed=5)
    for x in rows.answers["mismatched"]:
        x[:, 1] = x[:, 0] - sign * 0.3
    check_against_torch(F.kto, T.kto, rows)
    laid = lay(rows)
    grad = by_answer(laid, judged(F.kto, laid)[2])
    assert not any(g.any() for (kind, _), g in grad.items() if kind == "mismatched")


def summed(kind, laid, beta):
    pair = seen(laid)
    answer = pair.answers[kind]
    where = (pair.weight > 0) * answer.present
    return Sum(jnp.sum(where * beta * answer.ratio), jnp.sum(where))


def test_the_shift_of_bco_is_the_mean_of_all_rewards_so_far():
    beta, before = 0.4, []
    loss = unwrap(partial(F.bco, beta=beta))
    state = {name: jnp.asarray(x, jnp.float32) for name, x in loss.start.items()}
    state = {name: x.astype(jnp.float64) for name, x in state.items()}
    for step, count in enumerate((5, 2, 7)):
        rows = random_rows(count, seed=20 + step, only_one=step == 1)
        check_against_torch(loss, partial(T.bco, beta=beta, before=tuple(before)), rows, state)
        laid = lay(rows)
        state = loss.update(state, {f"rewards/{kind}": summed(kind, laid, beta) for kind in PAIR})
        p = in_torch(rows)
        before += [beta * x for x in (*p.c[p.has("chosen")].tolist(), *p.r[p.has("rejected")].tolist())]
    np.testing.assert_allclose(state["delta"], np.mean(before), rtol=1e-12)
    assert state["count"] == len(before) == 26


def test_losses_of_a_mix_keep_their_running_numbers_apart():
    betas, rows = (0.1, 0.7), random_rows(6, seed=4)
    laid = lay(rows)
    loss = P.mix((partial(F.bco, beta=betas[0]), 0.25), (P.dpo, 2.0), (partial(F.bco, beta=betas[1]), 0.5))
    state = {name: jnp.asarray(x, jnp.float64) for name, x in loss.start.items()}
    assert len(state) == 4
    metrics = {f"rewards/{kind}": summed(kind, laid, 0.1) for kind in PAIR}
    state = loss.update({**state, "delta.0": jnp.asarray(3.0), "count.0": jnp.asarray(9.0)}, metrics)
    parts = [unwrap(partial(F.bco, beta=beta)) for beta in betas]
    own = [{"delta": jnp.asarray(3.0), "count": jnp.asarray(9.0)}, {"delta": jnp.asarray(0.0), "count": jnp.asarray(0.0)}]
    own = [part.update(x, metrics) for part, x in zip(parts, own)]
    assert own[0]["delta"] != own[1]["delta"]
    wanted = 2.0 * P.dpo(seen(laid)) + sum(w * p.fn(seen(laid), x) for w, p, x in zip((0.25, 0.5), parts, own))
    np.testing.assert_allclose(loss.fn(seen(laid), state), wanted, rtol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_pairs_without_weight_change_nothing(name):
    """Whatever their tokens are: values and gradients of the others stay, and their own gradient is zero."""
    loss, _, knobs = EVERY[name]
    loss, kinds = with_knobs(loss, knobs), kinds_of(name)
    rows, more = random_rows(5, kinds, seed=1), random_rows(4, kinds, seed=2, scale=30.0)
    both = Rows(
        {kind: rows.answers[kind] + more.answers[kind] for kind in kinds},
        np.concatenate([rows.margin, more.margin]),
        np.concatenate([rows.weight, np.zeros(more.count)]),
    )
    alone, laid = lay(rows, seed=3), lay(both, seed=4)
    value, values, grad = judged(loss, alone)
    value_too, values_too, grad_too = judged(loss, laid)
    np.testing.assert_allclose(value_too, value, rtol=1e-12)
    for a, b in zip(alone.cells, laid.cells):
        np.testing.assert_allclose(values_too[b], values[a], rtol=1e-12)
    grad, grad_too = by_answer(alone, grad), by_answer(laid, grad_too)
    for (kind, i), g in grad_too.items():
        np.testing.assert_allclose(g, grad[kind, i] if i < rows.count else 0 * g, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_of_nothing_is_zero_and_has_a_zero_gradient(name):
    loss, _, knobs = EVERY[name]
    kinds = kinds_of(name)
    empty = Rows({kind: [np.zeros((0, 3))] for kind in kinds}, np.zeros(1), np.zeros(1))
    value, values, grad = judged(with_knobs(loss, knobs), lay(empty))
    assert value == 0 and np.isfinite(values).all() and not grad.any()


@pytest.mark.parametrize("name", T.AT_THE_START)
def test_the_value_at_the_start_is_what_theory_says(name):
    rows = random_rows(5, kinds=kinds_of(name), seed=2, lengths=(4, 4))
    for answers in rows.answers.values():
        for x in answers:
            x[:, 1] = x[:, 0]
    _, values, _ = judged(getattr(F if hasattr(F, name) and name in SINGLE else P, name), laid := lay(rows))
    np.testing.assert_allclose([values[cell] for cell in laid.cells], T.AT_THE_START[name], rtol=1e-12)


# apo_down's chosen gradients cancel at the start; discopop isn't convex and points the other way between its two valleys
RISES = [n for n in T.AT_THE_START if n not in ("apo_down", "discopop")]
NO_REFERENCE = ("simpo", "alphapo", "cpo", "cpo_hinge", "cpo_ipo", "orpo")


@pytest.mark.parametrize("name", [*RISES, *NO_REFERENCE])
def test_the_first_step_raises_chosen_and_lowers_rejected(name):
    rows = random_rows(5, kinds=kinds_of(name), seed=2, lengths=(4, 4))
    for answers in rows.answers.values():
        for x in answers:
            x[:, 1] = x[:, 0]
    loss = getattr(P, name, None) or getattr(F, name)
    laid = lay(rows)
    grad = by_answer(laid, judged(loss, laid)[2])
    assert all((g < 0).all() for (kind, _), g in grad.items() if kind == "chosen")
    assert all((g > 0).all() for (kind, _), g in grad.items() if kind == "rejected")


def test_apo_down_lowers_both_and_the_rejected_one_more():
    rows = random_rows(5, seed=2)
    laid = lay(rows)
    grad = by_answer(laid, judged(P.apo_down, laid)[2])
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


@pytest.mark.parametrize("name", SWAPS)
def test_swapping_chosen_and_rejected_turns_the_gradient(name):
    loss, slope, margin = SWAPS[name]
    rows = random_rows(6, seed=8)
    swapped = Rows({"chosen": rows.answers["rejected"], "rejected": rows.answers["chosen"]}, rows.margin)
    laid, other = lay(rows), lay(swapped)
    (_, values, grad), (_, values_too, grad_too) = judged(loss, laid), judged(loss, other)
    if margin is not None:
        wanted = -slope * margin(in_torch(rows)).detach().numpy()
        np.testing.assert_allclose([values[c] - values_too[c] for c in laid.cells], wanted, rtol=1e-10)
    grad, grad_too = by_answer(laid, grad), by_answer(other, grad_too)
    for (kind, i), g in grad.items():
        there = grad_too["rejected" if kind == "chosen" else "chosen", i]
        assert (np.sign(there) == -np.sign(g)).all()


def test_robust_is_dpo_on_average_over_flips():
    pair = seen(lay(random_rows(5, seed=1)))
    flipped = replace(pair, answers={"chosen": pair.rejected, "rejected": pair.chosen})
    eps = 0.3
    loss = partial(P.robust, label_smoothing=eps)
    np.testing.assert_allclose((1 - eps) * loss(pair) + eps * loss(flipped), P.dpo(pair), rtol=1e-12)


def extreme_rows():
    """Log-ratios from -1e4 to 1e4 and answers of 1 and 4096 tokens, in all combinations that matter."""
    cases = [(policy, known) for policy in (0.0, -1e-6, -3.0, -1e4) for known in (0.0, -3.0, -1e4)]
    long = lambda x, n: np.stack([np.full(n, v / n) for v in (*x, -n)], -1)  # noqa: E731
    pairs = [(c, r) for c in cases[::2] for r in cases[1::2]] + [(c, r) for c in cases[1::2] for r in cases[::2]]
    lengths = [(1, 1), (1, 4096), (4096, 1), (4096, 4096), (1, 1)]
    answers = {kind: [] for kind in ("chosen", "rejected", "gold", "mismatched")}
    for i, (c, r) in enumerate(pairs):
        n, m = lengths[i % len(lengths)]
        answers["chosen"].append(long(c, n))
        answers["rejected"].append(long(r, m))
        answers["gold"].append(long(c, 1))
        answers["mismatched"].append(long(r, 1))
    return Rows(answers, np.full(len(pairs), 3.0))


EXTREME = {
    **{name: with_knobs(loss, knobs) for name, (loss, _, knobs) in EVERY.items()},
    **{f"{n} {s}": partial(getattr(P, n), score=SCORES[s][0]) for n in OF_SCORES for s in SCORES if s != "reverse"},
}


@pytest.fixture(scope="module")
def extremes():
    rows = extreme_rows()
    return {dtype: lay(rows, shape=(rows.count, 1), dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32)}


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32))
@pytest.mark.parametrize("name", EXTREME)
def test_values_and_gradients_are_finite_at_extremes(extremes, name, dtype):
    """By each answer's summed and per-token log-probs: what reaches a token is a sum of these."""
    loss = EXTREME[name]
    pair = seen(extremes[dtype])
    assert pair.weight.dtype == dtype

    def total(answers, tokens):
        values = value_of(loss, replace(pair, answers=answers, tokens=replace(pair.tokens, logp=tokens)))
        assert values.dtype == dtype
        return jnp.sum(pair.weight * values), values

    def both(answers, tokens):
        logps = {kind: a.logp for kind, a in answers.items()}
        fill = lambda logps: {kind: replace(a, logp=logps[kind]) for kind, a in answers.items()}  # noqa: E731
        return jax.grad(lambda logps, tokens: total(fill(logps), tokens), (0, 1), has_aux=True)(logps, tokens)

    found = both(pair.answers, pair.tokens.logp)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found))


KNOBS = [(n, k) for n, (loss, *_) in EVERY.items() for k in ("beta", "label_smoothing", "alpha", "gamma", "tau", "penalty")]


def takes(loss, knob):
    fn = unwrap(loss)
    code = getattr(fn.fn if isinstance(fn, Coupled) else fn, "__code__", None)
    return code is not None and knob in code.co_varnames[: code.co_argcount]


@pytest.mark.parametrize("name, knob", [(n, k) for n, k in KNOBS if takes(EVERY[n][0], k) and " " not in n])
def test_knobs_may_be_traced(name, knob):
    """A sweep's knob is an array of the program: the same value as the number's."""
    loss = EVERY[name][0]
    pair = seen(lay(random_rows(5, kinds=kinds_of(name), seed=1)))
    found = jax.jit(lambda x: value_of(partial(loss, **{knob: x}), pair))(0.2)
    np.testing.assert_allclose(found, value_of(partial(loss, **{knob: 0.2}), pair), rtol=1e-12)


def test_alpha_divergence_goes_over_into_its_limits():
    c = jnp.linspace(-3.0, 3.0, 13)
    for alpha in (1.0, 1 + 1e-7, 1 - 1e-5, 1 + 1e-5):
        np.testing.assert_allclose(P.alpha_divergence(c, alpha), c, atol=1e-4)
    np.testing.assert_allclose(P.alpha_divergence(c, 0.0), P.forward_kl(c), rtol=1e-12)


def test_length_desensitised_is_the_loss_at_alpha_1_and_where_lengths_agree():
    pair = seen(lay(random_rows(5, seed=1)))
    np.testing.assert_allclose(P.length_desensitised(P.dpo, alpha=1.0)(pair), P.dpo(pair), rtol=1e-12)
    level = seen(lay(random_rows(5, seed=1, lengths=(4, 4))))
    np.testing.assert_allclose(P.length_desensitised(P.dpo, alpha=0.0)(level), P.dpo(level), rtol=1e-12)


@pytest.mark.parametrize("change, loss", [(P.wpo, P.dpo), (P.length_desensitised, P.ipo), (P.length_desensitised, P.aot)])
def test_knobs_are_set_before_or_after_a_loss_is_changed(change, loss):
    pair = seen(lay(random_rows(5, seed=1)))
    inside, outside = value_of(change(partial(loss, beta=0.7)), pair), value_of(partial(change(loss), beta=0.7), pair)
    np.testing.assert_array_equal(inside, outside)
    assert not np.allclose(inside, value_of(change(loss), pair))


def test_an_answer_without_a_partner_keeps_its_length():
    rows = random_rows(5, kinds=kinds_of("kto"), seed=1, only_one=True, lengths=(2, 9))
    pair = seen(lay(rows))
    for loss in (F.apo_zero_unpaired, F.kto):
        np.testing.assert_allclose(value_of(P.length_desensitised(loss, alpha=0.0), pair), value_of(loss, pair), rtol=1e-12)


def test_log1mexp_is_exact_on_both_sides():
    x = -np.exp(np.linspace(np.log(1e-11), np.log(500.0), 400))
    wanted = np.where(x > -1e-3, np.log(-np.expm1(x)), np.log1p(-np.exp(x)))
    np.testing.assert_allclose(F.log1mexp(jnp.asarray(x)), wanted, rtol=1e-12, atol=1e-300)
    slope = jax.vmap(jax.grad(F.log1mexp))(jnp.asarray(x))
    np.testing.assert_allclose(slope, -1 / np.expm1(-x), rtol=1e-12)


def test_the_smallest_number_that_orpo_sees_is_finite_and_monotone():
    x = jnp.asarray([0.0, -1e-15, -1e-12, -1e-9])
    found = F.log1mexp(x)
    assert math.isclose(float(found[0]), math.log(1e-12), rel_tol=1e-3) and (jnp.diff(found) >= 0).all()


@pytest.mark.parametrize(
    "loss, words",
    [
        (partial(P.exo_pair, label_smoothing=0.0), "in \\(0, 1\\), found 0.0"),
        (partial(P.robust, label_smoothing=0.5), "in \\[0, 0.5\\), found 0.5"),
        (partial(P.robust, label_smoothing=-0.1), "found -0.1"),
        (partial(P.cdpo, label_smoothing=0.7), "found 0.7"),
        (partial(P.discopop, tau=0.0), "tau is positive"),
        (partial(F.alphapo, alpha=0.0), "use simpo"),
        (F.tpo, "third answer `gold`"),
        (F.kto, "third answer `mismatched`"),
    ],
)
def test_a_bad_knob_or_a_missing_answer_is_one_clear_line(loss, words):
    with pytest.raises(ValueError, match=words) as e:
        value_of(loss, seen(lay(random_rows())))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("loss", (P.dpo, P.aot, P.aot_unpaired, P.sppo_hard, F.bco))
def test_a_loss_that_compares_with_a_reference_says_that_there_is_none(loss):
    with pytest.raises(ValueError, match="give preference\\(...\\) a reference"):
        value_of(loss, seen(lay(random_rows()), reference=False))


@pytest.mark.parametrize("name", (*NO_REFERENCE, *THIRD))
def test_losses_without_a_reference_never_look_at_one(name):
    laid = lay(random_rows(kinds=kinds_of(name)))
    assert judged(EVERY[name][0], laid, reference=False)[0] == judged(EVERY[name][0], laid)[0]


def test_margins_must_be_there():
    pair = seen(lay(random_rows()))
    with pytest.raises(ValueError, match="`margin`.*found the columns: none"):
        P.dpo_margin(replace(pair, columns={}))


def test_wpo_refuses_losses_that_couple_pairs_and_mix_refuses_nothing_to_mix():
    for loss in (P.aot, partial(F.kto, beta=0.2), P.mix((P.dpo, 1.0), (F.bco, 1.0))):
        with pytest.raises(ValueError, match="couples"):
            P.wpo(loss)
    with pytest.raises(ValueError, match="no losses"):
        P.mix()


# TRL's own code, called without a trainer: torch_losses.trl_* give its scalar and the log-probs that it depends on.


def compare_with_trl(loss, rows, wanted, leaf, order, rtol, dtype="float64"):
    """wanted: TRL's scalar; leaf: its per-token log-probs [rows, T], row k of which is the answer order[k] = (kind, pair)."""
    laid = lay(rows, dtype=dtype)
    value, _, grad = judged(loss, laid)
    wanted.backward()
    np.testing.assert_allclose(value, wanted.item(), rtol=rtol)
    grad = by_answer(laid, grad)
    for k, key in enumerate(order):
        known = leaf.grad[k, : len(grad[key])].numpy()
        np.testing.assert_allclose(grad[key], known, rtol=rtol, atol=rtol * np.abs(leaf.grad.numpy()).max(), err_msg=str(key))


TRL_DPO = {  # TRL's attributes, ours; a third entry where TRL computes in float32 by itself
    "sigmoid": (["sigmoid"], {}, P.dpo),
    "hinge": (["hinge"], {}, P.hinge),
    "ipo": (["ipo"], {}, P.ipo),
    "exo_pair": (["exo_pair"], {"label_smoothing": 0.25}, partial(P.exo_pair, label_smoothing=0.25)),
    "nca_pair": (["nca_pair"], {}, P.nca_pair),
    "robust": (["robust"], {"label_smoothing": 0.2}, partial(P.robust, label_smoothing=0.2)),
    "bco_pair": (["bco_pair"], {}, P.bco_pair),
    "sppo_hard": (["sppo_hard"], {}, P.sppo_hard),
    "aot": (["aot"], {"label_smoothing": 0.2}, partial(P.aot, label_smoothing=0.2)),
    "aot_unpaired": (["aot_unpaired"], {}, P.aot_unpaired),
    "apo_zero": (["apo_zero"], {}, P.apo_zero),
    "apo_down": (["apo_down"], {}, P.apo_down),
    "discopop": (["discopop"], {}, P.discopop),
    "sft": (["sft"], {}, P.sft),
    "sigmoid_norm": (["sigmoid_norm"], {}, P.sigmoid_norm),
    "forward_kl": (["sigmoid"], {"f_divergence_type": "forward_kl"}, partial(P.dpo, score=P.forward_kl)),
    "js": (["ipo"], {"f_divergence_type": "js_divergence"}, partial(P.ipo, score=P.js_divergence)),
    "alpha": (["sigmoid"], {"f_divergence_type": "alpha_divergence"}, partial(P.dpo, score=P.alpha_divergence)),
    "ld": (["sigmoid"], {"ld_alpha": 0.3}, P.length_desensitised(P.dpo, alpha=0.3)),
    "ld aot": (["aot"], {"ld_alpha": 0.3}, P.length_desensitised(P.aot, alpha=0.3)),
    "ld and sft": (["ipo", "sft"], {"ld_alpha": 0.3}, P.mix((P.length_desensitised(P.ipo, alpha=0.3), 1.0), (P.sft, 1.0))),
    "wpo": (["sigmoid"], {"use_weighting": True}, P.wpo(P.dpo)),
    "mpo": (
        ["sigmoid", "bco_pair", "sft"],
        {"loss_weights": [0.8, 0.2, 1.0]},
        P.mix((P.dpo, 0.8), (P.bco_pair, 0.2), (P.sft, 1.0)),
    ),
    "rpo": (["sigmoid", "sft"], {}, P.mix((P.dpo, 1.0), (P.sft, 1.0))),
    "wpo of a mix": (
        ["sigmoid", "ipo"],
        {"loss_weights": [0.5, 2.0], "use_weighting": True},
        P.wpo(P.mix((P.dpo, 0.5), (P.ipo, 2.0))),
    ),
}
IN_FLOAT32 = ("exo_pair", "alpha")  # TRL holds eps, and computes alpha's exponential, in float32


@pytest.mark.parametrize("name", TRL_DPO)
def test_trl_dpo_trainer_gives_the_same_loss_and_gradient(name):
    types, given, loss = TRL_DPO[name]
    dtype, rtol = ("float32", 1e-5) if name in IN_FLOAT32 else ("float64", 1e-10)
    rows = random_rows(6, seed=11)
    wanted, leaf, order = T.trl_dpo(rows.answers, getattr(torch, dtype), types, **given)
    compare_with_trl(loss, rows, wanted, leaf, order, rtol, dtype)


@pytest.mark.parametrize("name", ("kto", "apo_zero_unpaired"))
def test_trl_kto_trainer_gives_the_same_loss_and_gradient(name):
    rows = random_rows(8, kinds=kinds_of("kto"), seed=13, only_one=True)
    knobs = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    wanted, leaf, order = T.trl_kto(rows.answers, name, **knobs)
    compare_with_trl(partial(getattr(F, name), **knobs), rows, wanted, leaf, order, 1e-10)


TRL_CPO = {  # loss_type, other attributes, ours, the weight of TRL's NLL
    "sigmoid": ("sigmoid", {"label_smoothing": 0.1}, partial(F.cpo, alpha=0.6, label_smoothing=0.1), 0.6),
    "hinge": ("hinge", {}, partial(F.cpo_hinge, alpha=0.6), 0.6),
    "ipo": ("ipo", {}, partial(F.cpo_ipo, alpha=0.6), 0.6),
    "simpo": ("simpo", {"label_smoothing": 0.1}, partial(F.simpo, beta=0.1, gamma=0.5, label_smoothing=0.1), 0.0),
    "alphapo": ("simpo", {"alpha": 0.3}, partial(F.alphapo, beta=0.1, gamma=0.5, alpha=0.3), 0.0),
    "cpo-simpo": ("simpo", {}, P.mix((partial(F.simpo, beta=0.1, gamma=0.5), 1.0), (P.sft, 0.6)), 0.6),
}


@pytest.mark.parametrize("name", TRL_CPO)
@pytest.mark.filterwarnings("ignore")
def test_trl_cpo_trainer_gives_the_same_loss_and_gradient(name):
    loss_type, given, loss, nll_weight = TRL_CPO[name]
    rows = random_rows(6, seed=12)
    wanted, leaf, order = T.trl_cpo(rows.answers, loss_type, nll_weight, **given)
    compare_with_trl(loss, rows, wanted, leaf, order, 1e-10)


@pytest.mark.filterwarnings("ignore")
def test_trl_orpo_trainer_gives_the_same_odds_ratio():
    rows = random_rows(6, seed=12)
    wanted, leaf, order = T.trl_orpo(rows.answers, beta=0.1)
    compare_with_trl(F.orpo, rows, wanted, leaf, order, 1e-5, "float32")  # TRL casts to it


TRL_TPO = {"sigmoid": F.tpo, "hinge": F.tpo_hinge, "ipo": F.tpo_ipo, "tpo-l": partial(F.tpo_l, gamma=0.4)}


@pytest.mark.parametrize("name", TRL_TPO)
@pytest.mark.filterwarnings("ignore")
def test_trl_tpo_trainer_gives_the_same_loss_and_gradient(name):
    """It takes logits: our gradient by token log-probs is pulled back to them."""
    rows = random_rows(4, kinds=kinds_of("tpo"), seed=14)
    wanted, logits, logps, order = T.trl_tpo(rows.answers, name, beta=0.2, tpo_alpha=0.7, tpo_l_gamma=0.4)
    for k, (kind, i) in enumerate(order):
        rows.answers[kind][i][:, 0] = logps[k, : len(rows.answers[kind][i])].detach().numpy()
    laid = lay(rows)
    value, _, grad = judged(partial(TRL_TPO[name], beta=0.2, alpha=0.7), laid)
    np.testing.assert_allclose(value, wanted.item(), rtol=1e-10)
    grad = by_answer(laid, grad)
    cotangent = torch.zeros_like(logps)
    for k, key in enumerate(order):
        cotangent[k, : len(grad[key])] = torch.tensor(grad[key])
    (ours,) = torch.autograd.grad(logps, logits, cotangent, retain_graph=True)
    (known,) = torch.autograd.grad(wanted, logits)
    np.testing.assert_allclose(ours.numpy(), known.numpy(), rtol=1e-9, atol=1e-13)
