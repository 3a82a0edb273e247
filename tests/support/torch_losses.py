"""The formulas of the preference losses in torch, straight from the papers: jaxft's must agree with them.

Everything is float64 on small numbers, so the formulas need no stable form. Each function returns a value per
pair. `trl_*` call the losses of TRL's trainers on given log-probs, without a trainer and a model.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import sigmoid
from torch.nn.functional import logsigmoid as LS


@dataclass(frozen=True)
class Rows:
    """Per-token log-probs of each pair's answers by kind; an answer that a pair lacks is an empty tensor."""

    policy: dict[str, list[torch.Tensor]]
    known: dict[str, list[torch.Tensor]]  # of the reference
    squares: dict[str, list[torch.Tensor]]  # log sum_v p_v^2
    margin: torch.Tensor

    def lp(self, kind):
        return torch.stack([x.sum() for x in self.policy[kind]])

    def ref(self, kind):
        return torch.stack([x.sum() for x in self.known[kind]])

    def n(self, kind):
        return torch.tensor([float(len(x)) for x in self.policy[kind]], dtype=torch.float64)

    def has(self, kind):
        return self.n(kind) > 0

    @property
    def c(self):
        return self.lp("chosen") - self.ref("chosen")

    @property
    def r(self):
        return self.lp("rejected") - self.ref("rejected")

    @property
    def means(self):
        """Log-probs per token of chosen and rejected."""
        return self.lp("chosen") / self.n("chosen"), self.lp("rejected") / self.n("rejected")


def reverse_kl(c):
    return c


def forward_kl(c):
    return 1 - torch.exp(-c)


def js_divergence(c):
    t = torch.exp(c)
    return torch.log(2 * t / (1 + t))


def alpha_divergence(c, alpha=0.5):
    t = torch.exp(c)
    return (t ** (alpha - 1) - 1) / (alpha - 1)


def _delta(p, score):
    return score(p.c) - score(p.r)


def _mean_delta(p, score):
    return score(p.c) / p.n("chosen") - score(p.r) / p.n("rejected")


def dpo(p, beta=0.1, score=reverse_kl):
    return -torch.log(sigmoid(beta * _delta(p, score)))


def cdpo(p, beta=0.1, label_smoothing=0.1, score=reverse_kl):
    x = beta * _delta(p, score)
    return -(1 - label_smoothing) * LS(x) - label_smoothing * LS(-x)


def dpo_margin(p, beta=0.1):
    return -LS(beta * (p.c - p.r) - p.margin)


def dpop(p, beta=0.1, penalty=50.0):
    return -LS(beta * (p.c - p.r - penalty * torch.clamp(p.ref("chosen") - p.lp("chosen"), min=0)))


def rdpo(p, beta=0.1, alpha=0.01):
    return -LS(beta * (p.c - p.r) + alpha * (p.n("chosen") - p.n("rejected")))


def hinge(p, beta=0.1, score=reverse_kl):
    return torch.clamp(1 - beta * _delta(p, score), min=0)


def squared_hinge(p, beta=0.1, score=reverse_kl):
    return torch.clamp(1 - beta * _delta(p, score), min=0) ** 2


def ipo(p, beta=0.1, score=reverse_kl):
    return (_mean_delta(p, score) - 1 / (2 * beta)) ** 2


def sigmoid_norm(p, beta=0.1, score=reverse_kl):
    return -LS(beta * _mean_delta(p, score))


def exo_pair(p, beta=0.1, label_smoothing=1e-3, score=reverse_kl):
    """KL from (q, 1 - q) to (1 - eps, eps)."""
    q = sigmoid(beta * _delta(p, score))
    return q * torch.log(q / (1 - label_smoothing)) + (1 - q) * torch.log((1 - q) / label_smoothing)


def robust(p, beta=0.1, label_smoothing=0.1, score=reverse_kl):
    x = beta * _delta(p, score)
    clean, flipped = -LS(x), -LS(-x)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def discopop(p, beta=0.1, tau=0.05, score=reverse_kl):
    x = beta * _delta(p, score)
    m = sigmoid(x / tau)
    return (1 - m) * torch.log(1 + torch.exp(-x)) + m * torch.exp(-x)


def nca_pair(p, beta=0.1):
    c, r = beta * p.c, beta * p.r
    return -LS(c) - 0.5 * (LS(-c) + LS(-r))


def bco_pair(p, beta=0.1):
    return -LS(beta * p.c) - LS(-beta * p.r)


def sppo_hard(p, beta=0.1):
    return (p.c - 1 / (2 * beta)) ** 2 + (p.r + 1 / (2 * beta)) ** 2


def apo_zero(p, beta=0.1):
    return 1 - sigmoid(beta * p.c) + sigmoid(beta * p.r)


def apo_down(p, beta=0.1):
    return sigmoid(beta * p.c) + 1 - sigmoid(beta * (p.c - p.r))


def nll(p, kind="chosen"):
    """The mean over the batch's tokens, at every pair."""
    tokens = torch.cat(p.policy[kind])
    return -tokens.mean().expand(len(p.policy[kind]))


def _smoothed(x, label_smoothing):
    return -(1 - label_smoothing) * LS(x) - label_smoothing * LS(-x)


def _sorted(x, y, beta, label_smoothing):
    """Losses of the ranks, brought back to the places that the ranks of x have."""
    by_rank = _smoothed(beta * (torch.sort(x).values - torch.sort(y).values), label_smoothing)
    out = torch.zeros_like(by_rank)
    out[torch.sort(x).indices] = by_rank
    return out


def aot(p, beta=0.1, label_smoothing=0.0):
    known = p.ref("chosen") - p.ref("rejected")
    return _sorted(p.lp("chosen") - p.lp("rejected"), known, beta, label_smoothing)


def aot_unpaired(p, beta=0.1, label_smoothing=0.0):
    return _sorted(p.c, p.r, beta, label_smoothing)


def wpo(loss):
    def weighted(p, **knobs):
        out = []
        for i, value in enumerate(loss(p, **knobs)):
            weight = 1.0
            for kind in ("chosen", "rejected"):
                with torch.no_grad():
                    weight = weight * torch.exp((p.policy[kind][i] - p.squares[kind][i]).mean())
            out.append(weight * value)
        return torch.stack(out)

    return weighted


def length_desensitised(loss, alpha=0.5):
    """The loss of log-probs that shrink beyond the shorter answer, the lengths as they were."""

    def shrunk(answers):
        out = {kind: list(rows) for kind, rows in answers.items()}
        for i, (c, r) in enumerate(zip(answers["chosen"], answers["rejected"])):
            n = min(len(c), len(r))
            for kind, x in (("chosen", c), ("rejected", r)):
                out[kind][i] = torch.cat([x[:n], alpha * x[n:]])
        return out

    return lambda p, **knobs: loss(Rows(shrunk(p.policy), shrunk(p.known), p.squares, p.margin), **knobs)


def mix(*parts):
    return lambda p, **knobs: sum(weight * loss(p) for loss, weight in parts)


def simpo(p, beta=2.0, gamma=1.0, label_smoothing=0.0):
    a, b = p.means
    return _smoothed(beta * (a - b - gamma / beta), label_smoothing)


def alphapo(p, beta=2.0, gamma=1.0, alpha=0.25, label_smoothing=0.0):
    a, b = ((1 - torch.exp(x) ** -alpha) / alpha for x in p.means)
    return _smoothed(beta * (a - b) - gamma, label_smoothing)


def cpo(p, beta=0.1, alpha=1.0, label_smoothing=0.0, imitated="chosen"):
    return _smoothed(beta * (p.lp("chosen") - p.lp("rejected")), label_smoothing) + alpha * nll(p, imitated)


def cpo_hinge(p, beta=0.1, alpha=1.0, imitated="chosen"):
    return torch.clamp(1 - beta * (p.lp("chosen") - p.lp("rejected")), min=0) + alpha * nll(p, imitated)


def cpo_ipo(p, beta=0.1, alpha=1.0, imitated="chosen"):
    a, b = p.means
    return (a - b - 1 / (2 * beta)) ** 2 + alpha * nll(p, imitated)


def tpo_l(p, beta=0.01, gamma=0.5, alpha=1.0, label_smoothing=0.0):
    return simpo(p, beta, gamma, label_smoothing) + alpha * nll(p, "gold")


def orpo(p, beta=0.1):
    odds = [x.exp() / (1 - x.exp()) for x in p.means]
    return nll(p) - beta * LS(torch.log(odds[0] / odds[1]))


def _single(p, chosen, rejected):
    """Mean of a pair's values over the answers that it has."""
    count = p.has("chosen").double() + p.has("rejected").double()
    return (torch.where(p.has("chosen"), chosen, 0) + torch.where(p.has("rejected"), rejected, 0)) / count


def apo_zero_unpaired(p, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    return _single(p, desirable_weight * (1 - sigmoid(beta * p.c)), undesirable_weight * sigmoid(beta * p.r))


def kto(p, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    other = (p.lp("mismatched") - p.ref("mismatched"))[p.has("mismatched")]
    kl = max(other.mean().item(), 0.0)
    chosen, rejected = 1 - sigmoid(beta * (p.c - kl)), 1 - sigmoid(beta * (kl - p.r))
    return _single(p, desirable_weight * chosen, undesirable_weight * rejected)


def bco(p, beta=0.1, before=()):
    """before: all rewards of earlier steps."""
    rewards = torch.cat(
        [
            beta * p.c[p.has("chosen")],
            beta * p.r[p.has("rejected")],
            torch.tensor(before, dtype=torch.float64),
        ]
    )
    delta = rewards.mean().item()
    return _single(p, -LS(beta * p.c - delta), -LS(-(beta * p.r - delta)))


AT_THE_START = {  # values where the policy is the reference, beta = 0.1 and lengths are equal
    "dpo": math.log(2),
    "cdpo": math.log(2),
    "dpop": math.log(2),
    "rdpo": math.log(2),
    "hinge": 1.0,
    "squared_hinge": 1.0,
    "ipo": 25.0,
    "sigmoid_norm": math.log(2),
    "exo_pair": -math.log(2) - 0.5 * math.log(0.999) - 0.5 * math.log(0.001),
    "robust": math.log(2),
    "discopop": 0.5 * math.log(2) + 0.5,
    "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 50.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "apo_zero_unpaired": 0.5,
    "kto": 0.5,
    "bco": math.log(2),
}


class Stub(torch.nn.Module):
    """A model that answers with given outputs, chosen by the number that its input_ids are made of."""

    is_gradient_checkpointing = False

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, input_ids=None, **_):
        return self.outputs[int(input_ids[0, 0])]


def _owner(**fields):
    """What TRL's loss methods read of their trainer."""
    same = lambda x: x  # noqa: E731
    return SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=same, gather=same),
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **fields,
    )


def _padded(arrays, dtype=torch.float64):
    """[rows, T - 1] log-probs, zeros behind each, and a completion mask [rows, T] after one prompt token."""
    longest = max(len(x) for x in arrays)
    values = torch.zeros(len(arrays), longest, dtype=dtype)
    mask = torch.zeros(len(arrays), longest + 1, dtype=torch.long)
    for i, x in enumerate(arrays):
        values[i, : len(x)] = torch.as_tensor(x, dtype=dtype)
        mask[i, 1 : len(x) + 1] = 1
    return values, mask


def _columns(answers, order, dtype=torch.float64):
    """Log-probs of policy (to be differentiated) and reference, log sum p^2 of answers `order`, mask."""
    policy, known, square = (
        _padded([answers[kind][i][:, j] for kind, i in order], dtype)[0] for j in range(3)
    )
    mask = _padded([answers[kind][i][:, 0] for kind, i in order])[1]
    return policy.requires_grad_(True), known, square, mask


def _outputs(logp, square=None):
    zero = torch.zeros_like(logp)
    return SimpleNamespace(
        log_probs=logp, log_sum_sq_probs=square, entropy=zero, mean_logits=zero, is_top1=zero.bool()
    )


def _inputs(mask, prefix="", number=0):
    return {
        f"{prefix}input_ids": torch.full_like(mask, number),
        f"{prefix}attention_mask": torch.ones_like(mask),
        f"{prefix}completion_mask": mask,
    }


def _order(answers, *kinds):
    return [(kind, i) for kind in kinds for i in range(len(answers["chosen"]))]


def trl_dpo(answers, dtype, loss_types, loss_weights=None, **given):
    """(DPOTrainer's loss, log-probs [rows, T] that it depends on, the (kind, pair) of each row)."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    order = _order(answers, "chosen", "rejected")
    policy, known, square, mask = _columns(answers, order, dtype)
    model = Stub(_outputs(policy, square))
    usual = {
        "f_divergence_type": "reverse_kl",
        "ld_alpha": None,
        "use_weighting": False,
        "label_smoothing": 0.0,
    }
    owner = _owner(
        model=model,
        ref_model=Stub(_outputs(known)),
        beta=0.1,
        loss_types=loss_types,
        loss_weights=loss_weights or [1.0] * len(loss_types),
        f_alpha_divergence_coef=0.5,
        **usual | given,
    )
    return trainer._compute_loss(owner, model, _inputs(mask), False), policy, order


def trl_kto(answers, loss_type, **knobs):
    """As trl_dpo, of KTOTrainer and rows with one answer and a mismatched one."""
    trainer = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer
    order = [("chosen" if len(x) else "rejected", i) for i, x in enumerate(answers["chosen"])]
    policy, known, _, mask = _columns(answers, order)
    other, other_known, _, other_mask = _columns(answers, _order(answers, "mismatched"))
    model = Stub(_outputs(policy), _outputs(other))
    reference = Stub(_outputs(known), _outputs(other_known))
    owner = _owner(
        model=model, ref_model=reference, loss_type=loss_type, calculate_KL=loss_type == "kto", **knobs
    )
    owner._compute_kl_logps = partial(trainer._compute_kl_logps, owner)
    labels = {"label": torch.tensor([kind == "chosen" for kind, _ in order])}
    inputs = _inputs(mask) | _inputs(other_mask, "KL_", 1) | labels
    return trainer._compute_loss(owner, model, inputs, False), policy, order


def trl_cpo(answers, loss_type, nll_weight, **given):
    """As trl_dpo, of CPOTrainer's preference term plus its weighted NLL of the batch's chosen tokens."""
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    order = _order(answers, "chosen", "rejected")
    policy, _, _, mask = _columns(answers, order)
    sums, n = policy.sum(1), mask.sum(1)
    logps = (sums / n if loss_type in ("ipo", "simpo") else sums).chunk(2)
    owner = _owner(
        beta=0.1, loss_type=loss_type, simpo_gamma=0.5, **{"alpha": 0.0, "label_smoothing": 0.0} | given
    )
    preferred = trainer.cpo_loss(owner, *logps)[0].mean()
    return preferred - nll_weight * sums.chunk(2)[0].sum() / n.chunk(2)[0].sum(), policy, order


def trl_orpo(answers, beta):
    """As trl_dpo, of ORPOTrainer's odds ratio plus the NLL of the batch's chosen tokens."""
    trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    order = _order(answers, "chosen", "rejected")
    policy, _, _, mask = _columns(answers, order, torch.float32)
    sums, n = policy.sum(1), mask.sum(1)
    ratio = trainer.odds_ratio_loss(_owner(beta=beta), *(sums / n).chunk(2))[0]
    return -sums.chunk(2)[0].sum() / n.chunk(2)[0].sum() - ratio.mean(), policy, order


def trl_tpo(answers, loss_type, **knobs):
    """(TPOTrainer's loss, random logits that it depends on, their log-probs of answers, the rows' order)."""
    trainer = pytest.importorskip("trl.experimental.tpo").TPOTrainer
    order = _order(answers, "chosen", "rejected", "gold")
    mask = _columns(answers, order)[-1]
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(0, 1, (*mask.shape, 11)), requires_grad=True)
    inputs = _inputs(mask) | {"input_ids": torch.tensor(rng.integers(0, 11, mask.shape))}
    owner = _owner(model=Stub(), loss_type=loss_type, label_smoothing=0.0, **knobs)
    loss = trainer._compute_loss(owner, lambda **_: SimpleNamespace(logits=logits), inputs, False)
    logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    return loss, logits, logps, order
