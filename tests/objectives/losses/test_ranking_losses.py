"""Losses over rankings: the formulas written out for each response, and what they are for two responses."""

import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from preference_rows import Rows, lay, loss_and_gradient, random_rows

from jaxft.objectives.losses import preference_losses as P
from jaxft.objectives.losses import ranking_losses as R
from jaxft.objectives.losses.preference_losses import dpo, ipo, length_desensitised, nca_pair

pytestmark = pytest.mark.usefixtures("x64")

KINDS = ("chosen", "rejected", "rank_2", "rank_3")
BEST_FIRST = ("chosen", "rank_2", "rank_3", "rejected")
BETA = 0.3


def rankings(scores, missing=()):
    """Four random rankings of four responses with these ratings, best first; the kinds `missing` are not
    there.
    """
    rows = random_rows(len(scores), KINDS, seed=3)
    answers = dict(rows.responses)
    for kind in missing:
        answers[kind] = [np.zeros((0, 3))] * len(scores)
    laid = lay(Rows(answers, rows.margin))
    columns = dict(laid.batch.columns)
    for kind, values in zip(BEST_FIRST, np.transpose(scores), strict=True):
        column = np.zeros(laid.batch.pair_weights.shape)
        for cell, value in zip(laid.cells, values, strict=True):
            column[cell] = value
        columns["score_" + kind] = column
    return answers, replace(laid, batch=replace(laid.batch, columns=columns))


SCORES = [[3.0, 2.0, 0.5, -1.0], [1.0, 0.9, 0.8, 0.0], [2.0, 1.0, 1.0, 0.5], [5.0, 4.0, 3.0, 2.0]]


def softplus(x):
    return math.log1p(math.exp(x))


def log_softmax(xs):
    top = max(xs)
    total = math.log(sum(math.exp(x - top) for x in xs)) + top
    return [x - total for x in xs]


def by_hand(name, x, s):
    """A loss of one ranking: x are the beta c_i, s the ratings, in any order."""
    n = range(len(x))
    lp, lt = log_softmax(x), log_softmax(s)
    if name == "plackett_luce":  # draw one after the other from the urn of those that are no better
        return sum(-log_softmax([x[i], *(x[j] for j in n if j != i and s[j] <= s[i])])[0] for i in n)
    if name == "info_nca":
        return -sum(math.exp(lt[i]) * lp[i] for i in n)
    if name == "nca":
        return sum(math.exp(lt[i]) * softplus(-x[i]) + softplus(x[i]) / len(x) for i in n)
    if name == "rpo_bwd_kl":
        return sum(math.exp(lt[i]) * (lt[i] - lp[i]) for i in n)
    if name == "rpo_fwd_kl":
        return sum(math.exp(lp[i]) * (lp[i] - lt[i]) for i in n)
    if name == "rpo_sq":
        return np.mean([(x[i] - x[j] - s[i] + s[j]) ** 2 for i, j in itertools.combinations(n, 2)])
    place = {i: t for t, i in enumerate(sorted(n, key=lambda i: -x[i]), start=1)}
    return sum(
        abs(2 ** s[i] - 2 ** s[j])
        * abs(1 / math.log(1 + place[i]) - 1 / math.log(1 + place[j]))
        * softplus(x[j] - x[i])
        for i in n
        for j in n
        if s[i] > s[j]
    )


NAMES = ("plackett_luce", "info_nca", "nca", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq", "lipo")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("missing", [(), ("rank_3",)])
def test_a_loss_of_rankings_is_its_formula_written_out(name, missing):
    answers, laid = rankings(SCORES, missing)
    _, values, _ = loss_and_gradient(partial(getattr(R, name), beta=BETA), laid)
    for i, cell in enumerate(laid.cells):
        pairs = [(k, s) for k, s in zip(BEST_FIRST, SCORES[i], strict=True) if k not in missing]
        x = [BETA * (answers[k][i][:, 0] - answers[k][i][:, 1]).sum() for k, _ in pairs]
        assert values[cell] == pytest.approx(by_hand(name, x, [s for _, s in pairs]), rel=1e-9)


def test_gradients_of_losses_of_rankings_are_their_slopes():
    _, laid = rankings(SCORES)
    losses = [partial(getattr(R, name), beta=BETA) for name in NAMES]
    mixed = P.mix(*((loss, 1.0) for loss in losses))
    _, _, grad = loss_and_gradient(mixed, laid)
    (row, column) = laid.at["rank_2", 1][0]
    around = []
    for step in (-1e-5, 1e-5):
        values = laid.values.copy()
        values[row, column, 0] += step
        around.append(loss_and_gradient(mixed, replace(laid, values=values))[0])
    assert grad[row, column] == pytest.approx((around[1] - around[0]) / 2e-5, rel=1e-6)


def test_pairs_are_rankings_of_two():
    laid = lay(random_rows(5))
    cells = tuple(np.transpose(laid.cells))
    plain = loss_and_gradient(partial(dpo, beta=BETA), laid)
    for loss in (R.plackett_luce, R.all_pairs(dpo)):
        total, values, grad = loss_and_gradient(partial(loss, beta=BETA), laid)
        assert total == pytest.approx(plain[0], rel=1e-12)
        np.testing.assert_allclose(values[cells], plain[1][cells], rtol=1e-12)
        np.testing.assert_allclose(grad, plain[2], rtol=1e-10)
    rated = dict.fromkeys(("score_chosen", "score_rejected"), laid.batch.columns["margin"])
    rated["score_chosen"] = rated["score_rejected"] + 1
    laid = replace(laid, batch=replace(laid.batch, columns=rated))
    certain = loss_and_gradient(partial(R.nca, beta=BETA, alpha=1e-4), laid)
    known = loss_and_gradient(partial(nca_pair, beta=BETA), laid)
    np.testing.assert_allclose(certain[1][cells], known[1][cells], rtol=1e-9)


def test_all_pairs_is_the_mean_over_the_pairs_of_different_ratings():
    answers, laid = rankings(SCORES)
    for loss in (ipo, length_desensitised(dpo, alpha=0.4)):  # of lengths, and of tokens
        _, values, _ = loss_and_gradient(partial(R.all_pairs(loss), beta=BETA), laid)
        expected = np.zeros(len(SCORES))
        for i, scores in enumerate(SCORES):
            parts = []
            for a, b in itertools.combinations(range(4), 2):
                if scores[a] != scores[b]:
                    two = {"chosen": [answers[BEST_FIRST[a]][i]], "rejected": [answers[BEST_FIRST[b]][i]]}
                    one = lay(Rows(two, np.zeros(1)))
                    parts.append(loss_and_gradient(partial(loss, beta=BETA), one)[1][one.cells[0]])
            expected[i] = np.mean(parts)
        np.testing.assert_allclose([values[cell] for cell in laid.cells], expected, rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_rankings_are_finite_at_extremes(name):
    _, laid = rankings(SCORES)
    for scale in (0.0, 1e4):
        total, _, grad = loss_and_gradient(getattr(R, name), replace(laid, values=laid.values * scale))
        assert np.isfinite(total) and np.isfinite(grad).all()


def test_losses_of_ratings_say_which_column_is_missing():
    laid = lay(random_rows(2))
    with pytest.raises(ValueError, match=r"info_nca: the rows have no column score_chosen .*data\.extras"):
        loss_and_gradient(R.info_nca, laid)
    columns = {**laid.batch.columns, "score_chosen": laid.batch.columns["margin"]}
    with pytest.raises(ValueError, match="no column score_rejected"):
        loss_and_gradient(R.plackett_luce, replace(laid, batch=replace(laid.batch, columns=columns)))
    with pytest.raises(ValueError, match="couples rows"):
        R.all_pairs(P.aot)
