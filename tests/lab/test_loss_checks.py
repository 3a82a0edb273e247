"""Checks of losses: every shipped loss passes, each kind of broken loss fails its own check; the script."""

import math
import re
import runpy
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import stop_gradient
from preference_rows import EVERY, THIRD, with_knobs

from jaxft.lab.loss_checks import (
    check_antisymmetry,
    check_difference,
    check_empty_slots,
    check_independence,
    check_loss,
    check_zero_weight,
)
from jaxft.lab.loss_evaluation import (
    PAIR,
    PER_TOKEN,
    TOKENS,
    evaluate_batch,
    evaluate_each,
    evaluate_pairs,
    loss_at_start,
    margin_curve,
    margin_span,
    pack_rows,
    parse_losses,
    probe,
    synthetic_pairs,
    varied_pairs,
)
from jaxft.objectives.losses import preference_losses as P
from jaxft.objectives.losses import reference_free_losses as F
from jaxft.objectives.pair import coupled
from jaxft.runs import terminal

SCRIPT = str(Path(__file__).resolve().parents[2] / "scripts" / "loss_bench.py")


def failing(checks):
    return {c.name for c in checks if c.ok is False}


def message(checks, name):
    return next(c.message for c in checks if c.name == name)


# Shipped losses


def third_of(name):
    return {"kto": "mismatched", **dict.fromkeys(THIRD, "gold")}.get(name)


DISTINCT = [name for name in EVERY if not name.endswith((" eps", " tau", " below", " ipo"))]


@pytest.mark.quick_cases("dpo", "dpo_margin", "nll", "aot", "wpo", "tpo", "kto")
@pytest.mark.parametrize("name", DISTINCT)
def test_every_shipped_loss_passes_all_checks(name):
    loss, _, knobs = EVERY[name]
    seen = probe(name, with_knobs(loss, knobs))
    checks = check_loss(seen)
    assert not failing(checks), [c for c in checks if c.ok is False]
    assert seen.kinds == (*PAIR, third_of(name))[: 3 if third_of(name) else 2]
    assert ("`margin`" in message(checks, "inputs")) == (name == "dpo_margin")
    assert all(c.message.isascii() and "\n" not in c.message for c in checks)


def test_the_description_of_dpo():
    checks = check_loss(probe("dpo", P.dpo), claims=("antisymmetric", "difference"))
    assert all(c.ok for c in checks if c.name in ("antisymmetric", "difference"))
    assert "0.6931 = log 2 where the policy is the reference, for all log-probs" in message(checks, "start")
    assert "-0.05 on chosen, 0.05 on rejected" in message(checks, "first step")
    assert "= -0.1 times the margin of summed log-ratios" in message(checks, "antisymmetric")
    assert "the value is the same" in message(checks, "length, sums equal")
    assert "the longer response's log-ratio counts for more" in message(checks, "length, means equal")


def test_the_description_of_simpo():
    checks = check_loss(probe("simpo", partial(F.simpo, gamma=0.0)))
    assert message(checks, "reference") == "not read"
    assert "= -2 times the margin of mean log-probs" in message(checks, "antisymmetric")
    assert "lower where the chosen response is the longer one" in message(checks, "length, sums equal")
    assert "the value is the same" in message(checks, "length, means equal")


def test_a_gradient_in_the_other_direction_is_described_and_no_failure():
    checks = check_loss(probe("ipo", P.ipo))
    assert not failing(checks)
    text = message(checks, "direction")
    assert "lowers the margin and lowers chosen and raises rejected at margins" in text and text.endswith(
        "to 100"
    )
    assert (
        80 < float(text.split("margins ")[1].split()[0]) < 83
    )  # its minimum is at 16 tokens times 1 / (2 beta)
    assert "the margin of mean log-ratios" in message(checks, "antisymmetric")


def test_a_dependence_on_the_sum_of_lengths_favours_neither_response():
    checks = check_loss(
        probe("both", lambda pair: P.dpo(pair) * (pair.chosen.length + pair.rejected.length) / 32)
    )
    assert "not which of the two responses" in message(checks, "length, sums equal")


# Broken losses


def margin_of(pair):
    return pair.chosen.ratio - pair.rejected.ratio


@coupled
def counts_all(pair, state):
    return P.logistic(0.1 * (margin_of(pair) - stop_gradient(margin_of(pair).mean())))


@coupled
def by_order(pair, state):
    x = margin_of(pair)
    before = jnp.cumsum(stop_gradient(x).reshape(x.size)).reshape(x.shape) - stop_gradient(x)
    return P.logistic(0.1 * (x - before))


@coupled
def divides_by_nothing(pair, state):
    total = jnp.sum(pair.weight)
    return P.dpo(pair) + stop_gradient(0 * jnp.sum(pair.weight * margin_of(pair)) / total)


FINITE = {"finite in float32", "finite in bfloat16"}
BROKEN = {
    "a mean": (
        lambda pair: P.dpo(pair).mean(),
        {"shape"},
        r"expected one value per pair, \[3, 2\], got \[\]; drop the mean",
    ),
    "a sum over slots": (lambda pair: P.dpo(pair).sum(1), {"shape"}, r"got \[3\]"),
    "a number": (lambda pair: 0.5, {"shape"}, r"got \[\]"),
    "two arrays": (lambda pair: (P.dpo(pair), P.dpo(pair)), {"shape"}, "got a tuple"),
    "a cast": (lambda pair: P.dpo(pair).astype(jnp.bfloat16), {"shape"}, "got bfloat16; drop the cast"),
    "who won": (lambda pair: margin_of(pair) > 0, {"shape"}, "got bool"),
    "a hidden mean": (
        lambda pair: P.dpo(pair) + P.dpo(pair).mean(),
        {"independence"},
        "alone and .* among six .*@coupled",
    ),
    "wrong sign": (
        lambda pair: P.logistic(-0.1 * margin_of(pair)),
        {"direction", "Bradley-Terry"},
        "change the loss's sign",
    ),
    "overflow": (
        lambda pair: jnp.exp(-0.1 * margin_of(pair)),
        FINITE,
        r"the value is inf at .*1e\+04.* of 72\); use a stable",
    ),
    "gradient at a kink": (
        lambda pair: P.dpo(pair) + 0.001 * jnp.sqrt(jnp.square(margin_of(pair))),
        {*FINITE, "empty slots", "usual pairs"},
        "the gradient on chosen is nan",
    ),
    "no number": (
        lambda pair: jnp.exp(-30.0 * margin_of(pair)),
        {*FINITE, "usual pairs"},
        "the value is inf",
    ),
    "an empty slot": (
        lambda pair: P.dpo(pair) / pair.chosen.present,
        {"empty slots"},
        "a value is not finite where one response",
    ),
    "flat at the start": (
        lambda pair: jnp.square(margin_of(pair)),
        {"first step"},
        "nothing is learned; move",
    ),
    "no gradient": (lambda pair: stop_gradient(P.dpo(pair)), {"first step"}, "no gradient at any margin"),
    "slots of weight 0 counted": (counts_all, {"weight 0"}, "alone and .* with five slots"),
    "the order counted": (by_order, {"order"}, "in one order and .* in another"),
    "a batch of nothing": (divides_by_nothing, {"empty slots"}, "in a batch whose slots all have weight 0"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_loss_fails_its_check_and_no_other(name):
    loss, target, text = BROKEN[name]
    checks = check_loss(probe(name, loss))
    assert failing(checks) == target
    assert re.search(text, next(c.message for c in checks if c.ok is False))


@pytest.mark.parametrize(
    "loss, law, text",
    [
        (lambda pair: P.dpo(pair) / pair.weight.shape[0], check_independence, "drop the mean"),
        (lambda pair: P.dpo(pair) * pair.weight, check_independence, "leave pair.weight to the objective"),
        (
            lambda pair: jnp.where(pair.chosen.present > 0, P.dpo(pair) / pair.chosen.present, 0.0),
            check_empty_slots,
            "the gradient on chosen is not finite where one response",
        ),
        (
            coupled(lambda pair, state: P.dpo(pair) + P.dpo(pair).sum() - P.dpo(pair)),
            check_zero_weight,
            "with five slots of weight 0",
        ),
    ],
)
def test_other_ways_to_break_a_law(loss, law, text):
    check = law(probe("it", loss))
    assert check.ok is False and re.search(text, check.message)


@pytest.mark.parametrize(
    "loss, claim, text",
    [
        (P.hinge, "antisymmetric", "claimed, but .* no multiple of a margin; nearest is"),
        (P.rdpo, "antisymmetric", "claimed, but"),
        (
            lambda pair: jnp.abs(margin_of(pair) - 0.1) + jnp.abs(margin_of(pair) + 0.1),
            "antisymmetric",
            "swapped pair\\) = 0",
        ),
        (P.sppo_hard, "difference", "adding the same to both log-ratios changes it$"),
        (P.ipo, "difference", "changes it, unless their lengths agree"),
        (P.rdpo, "difference", "claimed, but other lengths or log-probs of the reference"),
    ],
)
def test_a_false_claim_fails(loss, claim, text):
    seen, law = (
        probe("it", loss),
        {"antisymmetric": check_antisymmetry, "difference": check_difference}[claim],
    )
    check = law(seen, claimed=True)
    assert check.ok is False and re.search(text, check.message) and law(seen).ok is None


def test_claims_are_checked_with_the_rest():
    assert failing(check_loss(probe("hinge", P.hinge), claims=("antisymmetric", "difference"))) == {
        "antisymmetric"
    }


def test_an_unknown_claim_is_one_line():
    with pytest.raises(ValueError, match="unknown claim 'symmetric'; near: antisymmetric"):
        check_loss(probe("dpo", P.dpo), claims=("symmetric",))


# Inputs of a loss


def test_columns_that_a_loss_reads_are_provided_and_described():
    def by_quality(pair):
        return P.dpo(pair) * (1 + pair.columns["quality"]) + 0 * pair.columns["other"]

    with jax.numpy_dtype_promotion("standard"):  # a user's loss may mix bfloat16 and float32
        seen = probe("mine", by_quality)
        assert seen.columns == ("margin", "quality", "other")
        text = message(check_loss(seen), "inputs")
    assert "`quality`" in text and "`other`" not in text and "`margin`" not in text


def test_columns_that_a_loss_checks_itself_are_set_by_hand():
    def by_quality(pair):
        if "quality" not in pair.columns:
            raise ValueError("I need quality")
        return P.dpo(pair)

    with pytest.raises(ValueError, match="^mine fails: ValueError: I need quality$") as e:
        probe("mine", by_quality)
    assert str(e.value.__cause__) == "I need quality"
    assert probe("mine", by_quality, columns=("quality",)).columns == ("margin", "quality")


def test_a_loss_that_fails_with_all_inputs_reports_each_error():
    def mine(pair):
        return pair.responses["gold"].logp + pair.chosen.rtaio

    with pytest.raises(ValueError) as e:
        probe("mine", mine)
    assert (
        "mine fails: KeyError: 'gold'; with a third response `gold`: AttributeError: 'Response' object has no"
        in str(e.value)
    )


def test_a_coupled_loss_inside_a_plain_function_is_refused():
    with pytest.raises(
        ValueError, match="mine fails: ValueError: aot couples the pairs .* declare its caller with @coupled"
    ):
        probe("mine", lambda pair: 2.0 * P.aot(pair))


def test_a_loss_without_a_gradient_rule_is_reported_in_one_line():
    def mine(pair):
        return jax.lax.while_loop(lambda x: jnp.all(x < 0), lambda x: x + 1, pair.chosen.logp)

    with pytest.raises(
        ValueError, match="mine fails on a batch .* in float32: ValueError: Reverse-mode"
    ) as e:
        check_loss(probe("mine", mine))
    assert "\n" not in str(e.value)


# Pairs, values, gradients


def test_tokens_sum_to_responses_in_any_layout():
    kinds = (*PAIR, "gold")
    given = varied_pairs(kinds, 6)
    given["length"]["rejected"][2] = 0
    one = synthetic_pairs(**given)
    for pair in (one, pack_rows(one, 2), pack_rows(one, 3)):
        for values, name in ((pair.tokens.logp, "logp"), (pair.tokens.reference, "reference")):
            for kind, total in pair.total(values).items():
                np.testing.assert_allclose(total, getattr(pair.responses[kind], name), rtol=1e-5)
    for kind in kinds:
        answer = one.responses[kind]
        there = given["length"][kind] > 0
        np.testing.assert_array_equal(answer.present[:, 0], there)
        np.testing.assert_array_equal(answer.length[:, 0], np.maximum(given["length"][kind], 1))
        np.testing.assert_allclose(answer.ratio[:, 0], np.where(there, given["ratio"][kind], 0), rtol=1e-5)
        assert answer.logp.max() <= 0
        np.testing.assert_allclose(answer.mean_length, given["length"][kind][there].mean(), rtol=1e-6)


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match="a pair of 180 tokens exceeds reads=160. Use synthetic_pairs.reads=180."
    ):
        synthetic_pairs(dict.fromkeys(PAIR, 0.0), 90)
    with pytest.raises(ValueError, match="3 pairs do not fill rows of 2"):
        pack_rows(synthetic_pairs(dict.fromkeys(PAIR, np.zeros(3))), 2)


def test_a_pair_alone_equals_the_pair_in_a_batch():
    seen = probe("ld", P.length_desensitised(P.ipo, alpha=0.3))
    pair = synthetic_pairs(**varied_pairs(PAIR, 6))
    one, many = evaluate_each(seen, pair), evaluate_batch(seen, pack_rows(pair, 3))
    np.testing.assert_allclose(one.value, many.value.reshape(6), rtol=1e-5)
    for kind in PAIR:
        np.testing.assert_allclose(one.gradient[kind], many.gradient[kind].reshape(6), rtol=1e-5)
    np.testing.assert_allclose(one.value, jax.jit(partial(loss_at_start, seen.loss))(pair)[:, 0], rtol=1e-5)


def test_dpo_is_log_2_with_gradients_of_half_beta_where_policy_is_reference():
    beta = 0.3
    result = evaluate_pairs(probe("dpo", partial(P.dpo, beta=beta)), ratio=dict.fromkeys(PAIR, np.zeros(100)))
    assert result.value.shape == (100,)
    np.testing.assert_allclose(result.value, math.log(2), rtol=1e-6)
    np.testing.assert_allclose(result.gradient["chosen"], -beta / 2, rtol=1e-6)
    np.testing.assert_allclose(result.gradient["rejected"], beta / 2, rtol=1e-6)


def test_the_curve_of_dpo_is_its_formula():
    beta = 0.1
    curve = margin_curve(probe("dpo", P.dpo), 30.0)
    x = beta * curve.margin
    assert (
        curve.margin[[0, -1]].tolist() == [-30, 30]
        and 0.0 in curve.margin
        and (np.diff(curve.margin) > 0).all()
    )
    np.testing.assert_allclose(curve.value, np.log1p(np.exp(-x)), rtol=1e-4)
    np.testing.assert_allclose(curve.gradient["chosen"], -beta / (1 + np.exp(x)), rtol=1e-4)
    np.testing.assert_allclose(curve.gradient["rejected"], beta / (1 + np.exp(x)), rtol=1e-4)


def test_an_added_nat_is_spread_over_the_tokens():
    """LD-DPO counts 16 of 64 tokens in full and 48 by alpha."""
    loss = P.length_desensitised(P.dpo, alpha=0.3)
    result = evaluate_pairs(
        probe("ld", loss), ratio=dict.fromkeys(PAIR, np.zeros(1)), length={"chosen": 64, "rejected": 16}
    )
    np.testing.assert_allclose(result.gradient["chosen"], -0.05 * (16 + 0.3 * 48) / 64, rtol=1e-5)
    np.testing.assert_allclose(result.gradient["rejected"], 0.05, rtol=1e-5)


def test_the_default_pair():
    result = evaluate_pairs(probe("simpo", F.simpo), ratio=dict.fromkeys(PAIR, np.array([0.0, 2.0])))
    a = PER_TOKEN + np.array([0.0, 2.0]) / TOKENS
    np.testing.assert_allclose(result.value, np.log1p(np.exp(1.0 - 2.0 * (a - a))), rtol=1e-6)


@pytest.mark.parametrize("beta, reach", [(1.0, 3.0), (0.1, 30.0), (0.01, 300.0)])
def test_the_span_of_dpo_follows_beta(beta, reach):
    assert margin_span(probe("dpo", partial(P.dpo, beta=beta))) == reach


def test_a_straight_line_has_a_span_too():
    assert (
        margin_span(probe("nll", P.nll))
        == margin_span(probe("even", lambda pair: jnp.square(margin_of(pair))))
        == 30.0
    )


# The script

LOSSES = """
import jax
from functools import partial
from jaxft.objectives.losses.preference_losses import dpo
from jaxft.objectives.pair import coupled

def mine(pair, beta=0.1, steps: int = 1, power=1):
    margin = beta * steps * power * (pair.chosen.ratio - pair.rejected.ratio)
    return -jax.nn.log_sigmoid(margin)

def mean(pair):
    return mine(pair).mean()

def wrong(pair):
    return mine(pair, -1.0)

def typo(pair):
    return mine(pair) + pair.chosen.rtaio

@coupled
def both(pair, state, beta=0.1):
    return mine(pair, beta)

bound = partial(dpo, beta=0.5)
number = 3
"""


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Run the script in this process, in another folder than the repository: (exit code, stdout, stderr)."""
    (tmp_path / "my.py").write_text(LOSSES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(terminal, "outlive_console", lambda: None)  # capsys replaces the streams too

    def run(*args):
        monkeypatch.setattr(sys, "argv", [SCRIPT, *args])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as e:
            runpy.run_path(SCRIPT, run_name="__main__")
        return (e.value.code, *capsys.readouterr())

    return run


def is_png(path):
    return path.read_bytes()[:4] == b"\x89PNG"


def test_the_bench_prints_checks_and_writes_a_plot(bench, tmp_path):
    code, out, error = bench("--loss", "my.py:mine", "--claims", "antisymmetric", "difference", "--only-look")
    assert (code, error) == (0, "")
    assert (
        out.index("mine: no check fails")
        < out.index("dpo: no check fails")
        < out.index("runs/loss_bench/mine.png")
    )
    assert re.search(r"^ok    antisymmetric        yes: .* = -0.1 times the margin", out, re.M)
    assert re.search(r"^note  calibrated           the optimum's margins are true", out, re.M)
    assert re.search(
        r"^ok    calibrated           the optimum's margins are true", out, re.M
    )  # dpo claims it
    assert all(len(line) <= 120 and line == line.rstrip() for line in out.splitlines())
    assert is_png(tmp_path / "runs/loss_bench/mine.png")


def test_each_loss_has_a_picture_and_the_losses_compared_with_may_fail(bench, tmp_path):
    first, second = "my.py:mine,beta=0.2,steps=2,power=0.5", "my.py:both,beta=1e-2"
    code, out, _ = bench(
        "--loss", first, "--loss", second, "--against", "my.py:mean", "--out", "here", "--only-look"
    )
    assert (
        code == 0
        and "= -0.2 times" in out
        and "= -0.01 times" in out
        and "it is coupled" in out
        and "FAIL  shape" in out
    )
    for name in ("mine-beta=0.2-steps=2-power=0.5", "both-beta=1e-2"):
        assert is_png(tmp_path / "here" / f"{name}.png")


def test_the_zoo_is_a_page_of_the_losses(bench, tmp_path):
    code, out, error = bench("--zoo", "--loss", "my.py:mine", "--out", "here")
    assert (code, error) == (0, "") and "here/zoo.html" in out
    assert "mine" in (tmp_path / "here/zoo.html").read_text()


def test_a_failed_check_sets_the_exit_code_and_without_a_value_per_pair_there_is_no_picture(bench, tmp_path):
    code, out, _ = bench("--loss", "my.py:wrong", "--loss", "my.py:mean", "--against")
    assert code == 1 and "wrong: 2 of " in out and "FAIL  direction" in out and "FAIL  shape" in out
    assert (
        is_png(tmp_path / "runs/loss_bench/wrong.png")
        and not (tmp_path / "runs/loss_bench/mean.png").exists()
    )


def test_labels_are_unique_and_each_loss_is_listed_once(tmp_path, monkeypatch):
    (tmp_path / "my.py").write_text(LOSSES + "def ipo(pair): return pair.chosen.logp")
    monkeypatch.chdir(tmp_path)
    mine = parse_losses(["dpo", "my.py:bound,beta=0.2", "dpo", "my.py:ipo"])
    assert [x.label for x in mine] == ["dpo", "bound,beta=0.2", "ipo"] and mine[1].fn.keywords == {
        "beta": 0.2
    }
    assert [x.label for x in parse_losses(["dpo", "my.py:ipo", "ipo", "dpo,beta=0.2"], mine)] == [
        "preference_losses:ipo",
        "dpo,beta=0.2",
    ]


@pytest.mark.parametrize(
    "args, text",
    [
        (("my.py:typo",), "typo fails: AttributeError: 'Response' object has no attribute 'rtaio' (line 18)"),
        (("none.py:mine",), "none.py: no such file in"),
        (("my.py:mime",), "my.py has no 'mime'; it has: mine"),
        (("my.py:number",), "my.py:number has type int, not a function"),
        (("dop",), "no loss is called 'dop'; near: dpo"),
        (("logistic",), "no loss is called 'logistic'"),
        (("jaxft.objectives.nothing:dpo",), "No module named 'jaxft.objectives.nothing'"),
        (("my.py:mine,bta=0.2",), "my.py:mine has no knob 'bta'; near: beta"),
        (("my.py:both,state=1",), "my.py:both has no knob 'state'; near: beta"),
        (("nll,beta=0.2",), "nll has no knob 'beta'; near: none, it has no knobs"),
        (("my.py:mine,beta=much",), "beta=much: expected float"),
        (("my.py:mine,steps=0.5",), "steps=0.5: expected int"),
        (
            ("robust,label_smoothing=0.5",),
            "robust,label_smoothing=0.5 fails: ValueError: robust: label_smoothing must be in [0, 0.5)",
        ),
        (("dpo", "--world", "noise=0.7"), "noise=0.7; expected from 0 to 0.5"),
        (("dpo", "--world", "nose=0.1"), "nose"),
        (("dpo", "--claims", "symmetric"), "unknown claim 'symmetric'; near: antisymmetric"),
    ],
)
def test_a_mistake_is_one_line(bench, args, text):
    code, _, error = bench("--loss", *args, "--against")
    assert code == 1 and error.startswith("error: ") and error.count("\n") == 1 and text in error
