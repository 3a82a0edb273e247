"""Policy losses against torch formulas and TRL, their bounds, padding, and the KL estimators."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxft.objectives.losses import policy_losses
from jaxft.objectives.losses import policy_losses as P

A, SHAPE = 4, (3, 11)


pytestmark = pytest.mark.usefixtures("x64")


def random_batch(seed=0, spread=0.6, **given):
    """Completions of 1 to 6 tokens in three rows, their tokens in any order; the last place of each row is
    empty.
    """
    rng = np.random.default_rng(seed)
    answer = np.stack([rng.permutation([0] * 4 + [1] * 1 + [2] * 3 + [A] * 3) for _ in range(SHAPE[0])])
    real = (answer < A).astype(float)
    normal = lambda scale, loc=0.0: real * rng.normal(loc, scale, SHAPE)  # noqa: E731
    old = normal(0.7, -2.0)
    sequence = np.pad(rng.normal(0, 1, (SHAPE[0], A)), ((0, 0), (0, 1)))
    numbers = {
        "logp": old + normal(spread),
        "old_logp": old,
        "advantages": real * np.take_along_axis(sequence, answer, 1),
        "entropy": np.abs(normal(1.0)),
        "reference": old + normal(0.5),
    } | given
    tokens = np.maximum([[(row == a).sum() for a in range(A)] for row in answer], 1.0)
    arrays = {name: jnp.asarray(x) for name, x in numbers.items()}
    return P.PolicyBatch(
        **arrays,
        completion=jnp.asarray(answer, jnp.int32),
        mask=jnp.asarray(real),
        lengths=jnp.asarray(tokens),
    )


def dense(d, *names):
    """A row a completion, padded, as TRL has them: (mask, arrays) in torch, and the index of each element
    in [B, M].
    """
    at = [[np.flatnonzero(row == a) for a in range(A)] for row in np.asarray(d.completion)]
    rows = [(b, places) for b, each in enumerate(at) for places in each if len(places)]
    width = max(len(places) for _, places in rows)
    index = np.array(
        [[b * SHAPE[1] + m for m in places] + [-1] * (width - len(places)) for b, places in rows]
    )
    mask = torch.tensor(index >= 0, dtype=torch.float64)
    flat = [torch.tensor(np.asarray(getattr(d, name)).ravel(), dtype=torch.float64) for name in names]
    return mask, [x[torch.tensor(index)] * mask for x in flat], index


def ratios(p, old, mask, level):
    x = p - old
    if level == "sequence":
        x = (x * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    return torch.exp(x)


def t_clipped(p, old, adv, mask, low=0.2, high=0.2, level="token", delta=None):
    """TRL 1.16's grpo_trainer.py, loss types grpo to luspo."""
    one = ratios(p, old, mask, level)
    two = torch.clamp(one, 1 - low, 1 + high)
    if delta is not None:
        one = torch.clamp(one, max=delta)
    return -torch.min(one * adv, two * adv)


def t_dual(p, old, adv, mask, low, high, c):
    """verl's vanilla loss."""
    r = torch.exp(p - old)
    first = torch.maximum(-adv * r, -adv * torch.clamp(r, 1 - low, 1 + high))
    return torch.where(adv < 0, torch.min(-adv * c, first), first)


def t_gspo_token(p, old, adv, mask, low, high):
    """verl's gspo loss."""
    level = ((p - old) * mask).sum(-1) / mask.sum(-1)
    r = torch.exp(p - p.detach() + level.detach().unsqueeze(-1))
    return torch.maximum(-adv * r, -adv * torch.clamp(r, 1 - low, 1 + high))


def t_cispo(p, old, adv, mask, most):
    return -torch.clamp(torch.exp(p - old), max=most).detach() * adv * p


def t_dppo(p, old, adv, mask, divergence, low, high):
    """arXiv:2602.04879: M_t r_t A_t, M_t = 0 if the divergence exceeds delta where A_t > 0 and
    r_t > 1, or where A_t < 0 and r_t < 1. The paper's code has sg(r) log pi in place of r.
    """
    r = torch.exp(p - old)
    d = divergence(torch.exp(p.detach()).clamp(max=1 - 1e-9), torch.exp(old).clamp(max=1 - 1e-9))
    masked = ((adv > 0) & (r > 1) & (d > high)) | ((adv < 0) & (r < 1) & (d > low))
    return -torch.where(masked, torch.zeros_like(r), r) * adv


def binary_kl(p, old):
    return old * torch.log(old / p) + (1 - old) * torch.log((1 - old) / (1 - p))


def t_sapo(p, old, adv, mask, pos, neg):
    tau = torch.where(adv > 0, pos, torch.full_like(adv, neg))  # of two Python numbers it would be float32
    return -torch.sigmoid(tau * (torch.exp(p - old) - 1)) * 4 / tau * adv


def t_geo_mean(p, old, adv, mask, low, high):
    """verl's geo_mean: the sign times the smaller of the signed log-ratios."""
    x, sign = p - old, torch.sign(adv)
    worse = sign * torch.min(sign * x, sign * torch.clamp(x, -low, high))
    return -adv * torch.exp((worse * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True))


def t_vespo(p, old, adv, mask, k_pos, lam_pos, k_neg, lam_neg):
    w = torch.exp(((p - old) * mask).sum(-1, keepdim=True)).detach()
    up = adv >= 0
    phi = torch.where(
        up, torch.exp(lam_pos - lam_pos * w) * w**k_pos, torch.exp(lam_neg - lam_neg * w) * w**k_neg
    )
    return -phi * adv * p


def t_near(p, old, adv, mask, most):
    away = ((old - p.detach()) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    return t_clipped(p, old, adv, mask) * ((adv >= 0) | (away <= most))


LOSSES = {
    "plain": (P.policy_gradient, lambda p, old, adv, mask: -adv * p),
    "unclipped": (P.unclipped, lambda p, old, adv, mask: -adv * torch.exp(p - old)),
    "clipped": (P.clipped, t_clipped),
    "clip-higher": (partial(P.clipped, eps_low=0.1, eps_high=0.5), partial(t_clipped, low=0.1, high=0.5)),
    "dual": (
        partial(P.dual_clip, eps_low=0.3, eps_high=0.1, max_ratio=1.4),
        partial(t_dual, low=0.3, high=0.1, c=1.4),
    ),
    "two-sided": (partial(P.dual_clip, max_ratio=1.3), partial(t_clipped, delta=1.3)),
    "dppo-tv": (
        partial(P.dppo_tv, eps_low=0.03, eps_high=0.06),
        partial(t_dppo, divergence=lambda p, old: abs(p - old), low=0.03, high=0.06),
    ),
    "dppo-kl": (
        partial(P.dppo_kl, eps_low=0.01, eps_high=0.02),
        partial(t_dppo, divergence=binary_kl, low=0.01, high=0.02),
    ),
    "gspo": (
        partial(P.gspo, eps_low=0.1, eps_high=0.2), partial(t_clipped, low=0.1, high=0.2, level="sequence"),
    ),
    "gspo-narrow": (P.gspo, partial(t_clipped, low=3e-4, high=4e-4, level="sequence")),
    "gspo-token": (
        partial(P.gspo_token, eps_low=0.1, eps_high=0.2), partial(t_gspo_token, low=0.1, high=0.2),
    ),
    "cispo": (partial(P.cispo, max_ratio=1.2), partial(t_cispo, most=1.2)),
    "sapo": (P.sapo, partial(t_sapo, pos=1.0, neg=1.05)),
    "geo-mean": (partial(P.geo_mean, eps_low=0.3), partial(t_geo_mean, low=0.3, high=0.4)),
    "vespo": (P.vespo, partial(t_vespo, k_pos=2.0, lam_pos=3.0, k_neg=3.0, lam_neg=2.0)),
    "near": (partial(P.near_policy, max_nats=0.1), partial(t_near, most=0.1)),
}  # fmt: skip
losses = pytest.mark.parametrize("name", LOSSES)
SEQUENCE = (
    "gspo",
    "gspo-narrow",
    "gspo-token",
    "geo-mean",
    "vespo",
    "near",
)  # what one token says changes the others
AT_ONE = [name for name in LOSSES if name not in ("vespo",)]


def both(loss, d, weights):
    """(per-token losses, the gradient of their weighted sum by the log-probs)."""
    slope = jax.grad(lambda logp: jnp.sum(weights * loss(d.replace(logp=logp))))(d.logp)
    return loss(d), slope


@jax.jit
def every_loss(d, weights):
    return {name: both(loss, d, weights) for name, (loss, _) in LOSSES.items()}


def of_name(name, d, weights):
    """`both` of a loss of LOSSES, which are one compiled program."""
    return jax.device_get(every_loss(d, weights)[name])


def cotangents(seed=9):
    return jnp.asarray(np.random.default_rng(seed).uniform(0.5, 2, SHAPE))


@losses
def test_a_loss_equals_its_torch_formula_in_value_and_gradient(name):
    other = LOSSES[name][1]
    d, weights = random_batch(), cotangents()
    mask, (p, old, adv), index = dense(d, "logp", "old_logp", "advantages")
    p.requires_grad_()
    values = other(p, old, adv, mask).expand_as(mask)
    w = torch.tensor(np.asarray(weights).ravel())[torch.tensor(index)] * mask
    (w * values).sum().backward()
    found, slope = of_name(name, d, weights * d.mask)
    there = index >= 0
    np.testing.assert_allclose(
        found.ravel()[index[there]], values.detach().numpy()[there], rtol=1e-10, atol=1e-13
    )
    np.testing.assert_allclose(slope.ravel()[index[there]], p.grad.numpy()[there], rtol=1e-10, atol=1e-13)
    assert np.abs(slope).max() > 1e-3 and not slope[np.asarray(d.mask) == 0].any()


def test_the_examples_reach_every_bound():
    d = random_batch()
    r, adv = np.asarray(d.ratio), np.asarray(d.advantages)
    for sign in (adv > 0, adv < 0):
        assert (sign & (r < 0.6)).any() and (sign & (r > 1.5)).any() and (sign & (abs(r - 1) < 0.2)).any()
    s = np.asarray(jnp.exp(d.mean(d.log_ratio)))[:, :3]
    assert (s < 0.9).any() and (s > 1.2).any()


@pytest.mark.parametrize("name", AT_ONE)
def test_at_ratio_one_the_gradient_is_the_plain_policy_gradient(name):
    """Of a completion's tokens together where the ratio is the completion's."""
    d = random_batch(spread=0.0)
    level = d.spread(d.mean(cotangents()))  # the same weight for all tokens of a completion
    slope = of_name(name, d, level * d.mask)[1]
    np.testing.assert_allclose(slope, -d.advantages * level, rtol=1e-10, atol=1e-13)


@losses
def test_a_loss_is_proportional_to_the_weights_that_multiply_its_advantages(name):
    """TRL 1.16 multiplies the loss of a token by its importance weight; 0 is that of a masked token."""
    d, weights = random_batch(), cotangents()
    w = jnp.asarray(np.random.default_rng(4).choice([0.0, 0.3, 1.0, 2.5], SHAPE))
    values, slope = of_name(name, d.replace(advantages=w * d.advantages), weights * d.mask)
    expected, _ = of_name(name, d, weights * d.mask)
    np.testing.assert_allclose(values, w * expected, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(slope, of_name(name, d, weights * d.mask * w)[1], rtol=1e-10, atol=1e-13)


@losses
def test_padding_and_empty_slots_change_nothing(name):
    d, weights = random_batch(), cotangents()
    pad = lambda x, fill=0: jnp.pad(x, ((0, 0), (0, 5)), constant_values=fill)  # noqa: E731
    numbers = {
        n: pad(getattr(d, n)) for n in ("logp", "old_logp", "advantages", "entropy", "reference", "mask")
    }
    answer = pad(jnp.where(d.completion == A, A + 2, d.completion), A + 2)
    wide = P.PolicyBatch(
        **numbers, completion=answer, lengths=jnp.pad(d.lengths, ((0, 0), (0, 2)), constant_values=1)
    )
    for found, expected in zip(of_name(name, wide, pad(weights)), of_name(name, d, weights), strict=True):
        real = np.asarray(d.mask) > 0
        np.testing.assert_allclose(found[:, :11][real], expected[real], rtol=1e-12)
        assert np.isfinite(found).all()


@losses
def test_a_token_loss_depends_on_its_token_and_a_sequence_loss_on_its_completion(name):
    d = random_batch()
    moved = d.replace(logp=d.logp.at[0, int(np.flatnonzero(d.completion[0] == 0)[0])].add(-0.8))
    changed = of_name(name, moved, cotangents())[0] != of_name(name, d, cotangents())[0]
    assert not changed[1:].any() and not changed[0][np.asarray(d.completion[0]) != 0].any()
    assert changed.sum() <= (4 if name in SEQUENCE else 1)


@losses
def test_distant_policies_give_finite_losses_and_gradients(name):
    for away in (-500.0, 500.0):
        d = random_batch()
        d = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, d)
        d = d.replace(logp=d.old_logp + d.mask * jnp.float32(away))
        for x in of_name(name, d, cotangents().astype(jnp.float32)):
            assert np.isfinite(x).all() and x.dtype == np.float32


def one_token_each(old, new, advantages):
    """Completions of one token with these probabilities before and after, in one row."""
    count, row = len(old), lambda x: jnp.asarray([x], float)
    return P.PolicyBatch(
        logp=jnp.log(row(new)),
        old_logp=jnp.log(row(old)),
        advantages=row(advantages),
        entropy=row([0.0] * count),
        reference=None,
        completion=jnp.arange(count)[None],
        mask=jnp.ones((1, count)),
        lengths=jnp.ones((1, count)),
    )


def test_dppo_masks_by_probability_mass_and_not_by_the_ratio():
    """Examples of arXiv:2602.04879: a rare token whose ratio is 100 moves 0.001 of the mass; a
    likely one whose ratio is 0.8 moves 0.19 of it. PPO's clip at 0.2 and 0.28 does the opposite.
    """
    d = one_token_each([1e-5, 0.99, 0.99, 0.5], [1e-3, 0.8, 0.8, 0.7], [1.0, -1.0, 1.0, 1.0])
    np.testing.assert_allclose(P.dppo_tv(d)[0], [-100, 0, -0.8 / 0.99, 0], rtol=1e-12)
    clipped = jax.grad(lambda x: P.clipped(d.replace(logp=x), eps_high=0.28).sum())(d.logp)[0]
    assert clipped[0] == 0 and clipped[1] != 0
    # Divergences by hand: 0.5 ln(0.5 / 0.8) + 0.5 ln(0.5 / 0.2) = 0.2231, and 0.0204 for 0.6.
    d = one_token_each([0.5, 0.5, 0.5], [0.8, 0.8, 0.6], [1.0, -1.0, 1.0])
    np.testing.assert_allclose(P.dppo_kl(d)[0], [0, 1.6, -1.2], rtol=1e-12)
    np.testing.assert_allclose(P.dppo_kl(d, eps_high=0.0203)[0], [0, 1.6, 0], rtol=1e-12)
    np.testing.assert_allclose(P.dppo_kl(d, eps_high=0.2232)[0], [-1.6, 1.6, -1.2], rtol=1e-12)


def test_the_kl_estimators_equal_their_formulas():
    d = random_batch()
    mask, (p, ref), index = dense(d, "logp", "reference")
    weights = cotangents()
    w = torch.tensor(np.asarray(weights).ravel())[torch.tensor(index)] * mask
    forms = {
        policy_losses.k1: lambda p: p - ref,
        policy_losses.k2: lambda p: (p - ref) ** 2 / 2,
        policy_losses.k3: lambda p: torch.exp(ref - p) - (ref - p) - 1,
    }
    for estimate, form in forms.items():
        q = p.clone().requires_grad_()
        (w * form(q)).sum().backward()
        slope = jax.grad(lambda x, estimate=estimate: jnp.sum(weights * d.mask * estimate(x, d.reference)))(
            d.logp
        )
        there = index >= 0
        found = np.asarray(estimate(d.logp, d.reference)).ravel()[index[there]]
        np.testing.assert_allclose(found, form(p).numpy()[there], rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(
            np.asarray(slope).ravel()[index[there]], q.grad.numpy()[there], rtol=1e-10, atol=1e-13
        )


def test_k1_and_k3_are_unbiased_and_only_k2_has_the_gradient_of_the_kl():
    """Over a whole vocabulary: sum_v p_v estimate_v against KL(p || q), and the slope of sampled tokens'
    estimates.
    """
    logits, other = (jnp.asarray(np.random.default_rng(i).normal(0, 1, 7)) for i in range(2))
    log_q = jax.nn.log_softmax(other)

    def exact(z):
        log_p = jax.nn.log_softmax(z)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q))

    def slope(estimate):
        p = jax.lax.stop_gradient(jax.nn.softmax(logits))
        return jax.grad(lambda z: jnp.sum(p * estimate(jax.nn.log_softmax(z), log_q)))(logits)

    p, log_p = jax.nn.softmax(logits), jax.nn.log_softmax(logits)
    for estimate in (policy_losses.k1, policy_losses.k3):
        np.testing.assert_allclose(jnp.sum(p * estimate(log_p, log_q)), exact(logits), rtol=1e-12)
    np.testing.assert_allclose(slope(policy_losses.k2), jax.grad(exact)(logits), rtol=1e-10)
    np.testing.assert_allclose(slope(policy_losses.k1), np.zeros(7), atol=1e-14)
    forward = jax.grad(lambda z: -jnp.sum(jnp.exp(log_q) * jax.nn.log_softmax(z)))(logits)
    np.testing.assert_allclose(slope(policy_losses.k3), forward, rtol=1e-10)


def test_the_corrected_kl_is_weighted_by_the_ratio():
    d, weights = random_batch(), cotangents()
    mask, (p, old, adv, ref), index = dense(d, "logp", "old_logp", "advantages", "reference")
    p.requires_grad_()
    k3 = torch.exp(ref - p) - (ref - p) - 1
    values = t_clipped(p, old, adv, mask) + 0.3 * k3 * torch.exp(p - old)
    w = torch.tensor(np.asarray(weights).ravel())[torch.tensor(index)] * mask
    (w * values).sum().backward()
    found, slope = both(partial(P.with_corrected_kl, coef=0.3), d, weights * d.mask)
    there = index >= 0
    np.testing.assert_allclose(found.ravel()[index[there]], values.detach().numpy()[there], rtol=1e-10)
    np.testing.assert_allclose(slope.ravel()[index[there]], p.grad.numpy()[there], rtol=1e-10, atol=1e-13)
    with pytest.raises(ValueError, match="needs the reference's log-probs"):
        P.with_corrected_kl(d.replace(reference=None))


def test_vespo_weights_and_the_off_policy_mask_equal_trls():
    trainer = pytest.importorskip("trl").GRPOTrainer
    d = random_batch(seed=3)
    mask, (p, old, adv), index = dense(d, "logp", "old_logp", "advantages")
    phi = trainer.get_gamma_weights(adv[:, :1], p - old, mask, None)
    near = trainer.get_off_policy_mask(adv[:, :1], p, old, mask, 0.1)
    assert 0 < near.sum() < len(near)
    there = index >= 0
    for loss, expected in (
        (P.vespo, -phi * adv * p),
        (partial(P.near_policy, max_nats=0.1), near * t_clipped(p, old, adv, mask)),
    ):
        found = np.asarray(loss(d)).ravel()[index[there]]
        np.testing.assert_allclose(found, expected.numpy()[there], rtol=1e-10, atol=1e-13)


def test_the_adaptive_coefficient_follows_its_target():
    control = policy_losses.AdaptiveKL(coef=0.2, target=6.0, horizon=1000)
    for nats, clip in ((6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (5.4, -0.1), (0.0, -0.2)):
        for number in (float, jnp.asarray):
            found = control.update(number(0.3), number(nats), number(256.0))
            np.testing.assert_allclose(found, 0.3 * (1 + clip * 256 / 1000), rtol=1e-12)
    assert policy_losses.FixedKL(0.3).update(0.3, 100.0, 256) == 0.3


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d: P.clipped(d, eps_low=1.5), r"eps_low must be in \[0, 1\], got 1.5"),
        (lambda d: P.gspo(d, eps_high=-1), "eps_high must be at least 0, got -1"),
        (
            lambda d: P.dual_clip(d, eps_high=2.5, max_ratio=3.0),
            "max_ratio must be above 1 . eps_high, got 3.0 and 2.5",
        ),
        (lambda d: P.dppo_tv(d, eps_high=-1), "eps_low=0.15 and eps_high=-1 must be at least 0"),
        (lambda d: P.sapo(d, tau_neg=0), "tau_neg must be above 0, got 1.0 and 0"),
        (lambda d: policy_losses.FixedKL(-0.1), "FixedKL.coef=-0.1; expected at least 0"),
        (lambda d: policy_losses.AdaptiveKL(0.0), "AdaptiveKL.coef=0.0; expected above 0"),
        (lambda d: policy_losses.AdaptiveKL(target=0), "AdaptiveKL.target=0; expected above 0"),
    ],
)
def test_parameters_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_batch())
