"""The page of losses on exact toys."""

import re

import numpy as np
import pytest
from scipy.optimize import brentq
from scripts_in_process import call

from jaxft.lab.loss_evaluation import parse_losses
from jaxft.lab.zoo import (
    SAME_KL,
    STRONG_BIAS,
    ZOO_LENGTH,
    ZOO_REWARD,
    best_rewards,
    describe_loss,
    write_zoo,
    zoo_toy,
)


@pytest.fixture(scope="module")
def dpo():
    (loss,) = parse_losses(["dpo"])
    return describe_loss(loss)


def test_dpo_gains_as_much_as_any_policy_of_the_same_kl(dpo):
    best = best_rewards(zoo_toy())
    near = min(best, key=lambda q: abs(q.kl - SAME_KL))
    assert dpo.same_kl == pytest.approx(near.reward, abs=0.05)
    for _, found in dpo.by_beta:
        assert found.reward <= max(q.reward for q in best if q.kl <= found.kl + 0.2) + 1e-4


def test_flipped_labels_cost_dpo_reward_and_never_help(dpo):
    assert list(dpo.by_flips) == sorted(dpo.by_flips, reverse=True) and dpo.by_flips[-1] < dpo.by_flips[0]


def test_a_bias_for_length_costs_reward_and_none_is_the_plain_toy(dpo):
    assert dpo.by_bias[0] == dpo.by_circle[0] == dpo.own.reward == dpo.by_flips[0]
    assert list(dpo.by_bias) == sorted(dpo.by_bias, reverse=True) and dpo.by_bias[-1] < 0.5 * dpo.by_bias[0]


def test_over_optimisation_follows_the_policy_that_is_best_for_the_annotators(dpo):
    """DPO leads to reference * exp(annotators' reward / beta): here by a search for the beta of each KL."""
    toy = zoo_toy()
    liked = np.array(ZOO_REWARD) + STRONG_BIAS * np.array(ZOO_LENGTH) / 10
    reference = np.exp(toy.reference)

    def policy(beta):
        weights = reference * np.exp((liked - liked.max()) / beta)
        return weights / weights.sum()

    def kl_above(beta, least):
        p = policy(beta)
        return np.sum(p * np.log(np.maximum(p, 1e-300) / reference)) - least

    for reached in dpo.biased:
        if 0.02 < reached.kl < 1.6:
            p = policy(brentq(kl_above, 0.02, 100.0, args=(reached.kl,)))
            assert reached.true == pytest.approx(p @ toy.reward - reference @ toy.reward, abs=1e-3)
            assert reached.annotators == pytest.approx((p - reference) @ liked, abs=1e-3)
    true, annotators = ([getattr(x, name) for x in dpo.biased] for name in ("true", "annotators"))
    assert annotators == sorted(annotators)
    assert true[0] < max(true) > true[-1] + 0.2


def test_the_page_has_each_loss_that_works_and_reports_the_others(tmp_path):
    (tmp_path / "my.py").write_text(
        "def mine(pair):\n    '''Mine <b>.'''\n    return -pair.chosen.ratio + pair.rejected.ratio\n"
        "def broken(pair):\n    return pair.nothing\n"
        "def branching(pair, beta=0.1):\n"
        "    return -beta * pair.chosen.ratio if beta > 0 else pair.chosen.ratio\n"
    )
    said = []
    names = [f"{tmp_path}/my.py:{name}" for name in ("mine", "broken", "branching")]
    size = write_zoo(parse_losses(names), tmp_path / "out" / "zoo.html", said.append)
    page = (tmp_path / "out" / "zoo.html").read_text()
    assert size == len(page.encode()) and page.count("<h3") == 1 and "Mine &lt;b&gt;." in page
    assert "falls without bound" in page and page.count("<figure") == 7
    assert not re.search(r"(src|href)=\"(?!#|data:)", page)
    assert any(line.startswith("broken is left out: broken fails: AttributeError") for line in said)
    assert any(
        line.startswith("branching is left out: branching fails in float64 with the knobs") for line in said
    )
    with pytest.raises(ValueError, match="none of the losses can be evaluated"):
        write_zoo(parse_losses(names[1:]), tmp_path / "zoo.html", said.append)


def test_a_beta_that_is_an_integer_is_varied_too():
    found = describe_loss(parse_losses(["dpo,beta=1"])[0])
    assert len(found.by_beta) == 13 and found.same_kl is not None


def test_options_that_the_zoo_does_not_read_are_refused(monkeypatch, capsys):
    code, _, error = call(monkeypatch, capsys, "loss_bench", "--zoo", "--steps", "3", "--world", "noise=0.1")
    assert code == 1 and error.count("\n") == 1 and "leave out --steps, --world" in error
