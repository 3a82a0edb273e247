"""Preference losses against TRL's trainers: the same values and gradients for the same log-probs."""

from functools import partial

import numpy as np
import pytest
import torch
import torch_losses as T
from preference_rows import by_answer, kinds_of, lay, loss_and_gradient, random_rows

from jaxft.objectives.losses import preference_losses as P
from jaxft.objectives.losses import reference_free_losses as F

pytestmark = pytest.mark.usefixtures("x64")


def assert_equals_trl(loss, rows, expected, leaf, order, rtol, dtype="float64"):
    """expected: TRL's scalar; leaf: its per-token log-probs [rows, T], row k of which is the response
    order[k] = (kind, pair).
    """
    laid = lay(rows, dtype=dtype)
    value, _, grad = loss_and_gradient(loss, laid)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=rtol)
    grad = by_answer(laid, grad)
    for k, key in enumerate(order):
        known = leaf.grad[k, : len(grad[key])].numpy()
        np.testing.assert_allclose(
            grad[key], known, rtol=rtol, atol=rtol * np.abs(leaf.grad.numpy()).max(), err_msg=str(key)
        )


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
    "sft": (["sft"], {}, P.nll),
    "sigmoid_norm": (["sigmoid_norm"], {}, P.sigmoid_norm),
    "forward_kl": (["sigmoid"], {"f_divergence_type": "forward_kl"}, partial(P.dpo, score=P.forward_kl)),
    "js": (["ipo"], {"f_divergence_type": "js_divergence"}, partial(P.ipo, score=P.js_divergence)),
    "alpha": (
        ["sigmoid"],
        {"f_divergence_type": "alpha_divergence"},
        partial(P.dpo, score=P.alpha_divergence),
    ),
    "ld": (["sigmoid"], {"ld_alpha": 0.3}, P.length_desensitised(P.dpo, alpha=0.3)),
    "ld aot": (["aot"], {"ld_alpha": 0.3}, P.length_desensitised(P.aot, alpha=0.3)),
    "ld and sft": (
        ["ipo", "sft"],
        {"ld_alpha": 0.3},
        P.mix((P.length_desensitised(P.ipo, alpha=0.3), 1.0), (P.nll, 1.0)),
    ),
    "wpo": (["sigmoid"], {"use_weighting": True}, P.wpo(P.dpo)),
    "mpo": (
        ["sigmoid", "bco_pair", "sft"],
        {"loss_weights": [0.8, 0.2, 1.0]},
        P.mix((P.dpo, 0.8), (P.bco_pair, 0.2), (P.nll, 1.0)),
    ),
    "rpo": (["sigmoid", "sft"], {}, P.mix((P.dpo, 1.0), (P.nll, 1.0))),
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
    expected, leaf, order = T.trl_dpo(rows.responses, getattr(torch, dtype), types, **given)
    assert_equals_trl(loss, rows, expected, leaf, order, rtol, dtype)


@pytest.mark.parametrize("name", ("kto", "apo_zero_unpaired"))
def test_trl_kto_trainer_gives_the_same_loss_and_gradient(name):
    rows = random_rows(8, kinds=kinds_of("kto"), seed=13, only_one=True)
    knobs = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    expected, leaf, order = T.trl_kto(rows.responses, name, **knobs)
    assert_equals_trl(partial(getattr(F, name), **knobs), rows, expected, leaf, order, 1e-10)


TRL_CPO = {  # loss_type, other attributes, ours, the weight of TRL's NLL
    "sigmoid": ("sigmoid", {"label_smoothing": 0.1}, partial(F.cpo, alpha=0.6, label_smoothing=0.1), 0.6),
    "hinge": ("hinge", {}, partial(F.cpo_hinge, alpha=0.6), 0.6),
    "ipo": ("ipo", {}, partial(F.cpo_ipo, alpha=0.6), 0.6),
    "simpo": (
        "simpo",
        {"label_smoothing": 0.1},
        partial(F.simpo, beta=0.1, gamma=0.5, label_smoothing=0.1),
        0.0,
    ),
    "alphapo": ("simpo", {"alpha": 0.3}, partial(F.alphapo, beta=0.1, gamma=0.5, alpha=0.3), 0.0),
    "cpo-simpo": ("simpo", {}, P.mix((partial(F.simpo, beta=0.1, gamma=0.5), 1.0), (P.nll, 0.6)), 0.6),
}


@pytest.mark.parametrize("name", TRL_CPO)
@pytest.mark.filterwarnings("ignore")
def test_trl_cpo_trainer_gives_the_same_loss_and_gradient(name):
    loss_type, given, loss, nll_weight = TRL_CPO[name]
    rows = random_rows(6, seed=12)
    expected, leaf, order = T.trl_cpo(rows.responses, loss_type, nll_weight, **given)
    assert_equals_trl(loss, rows, expected, leaf, order, 1e-10)


@pytest.mark.filterwarnings("ignore")
def test_trl_orpo_trainer_gives_the_same_odds_ratio():
    rows = random_rows(6, seed=12)
    expected, leaf, order = T.trl_orpo(rows.responses, beta=0.1)
    assert_equals_trl(F.orpo, rows, expected, leaf, order, 1e-5, "float32")  # TRL casts to it


TRL_TPO = {"sigmoid": F.tpo, "hinge": F.tpo_hinge, "ipo": F.tpo_ipo, "tpo-l": partial(F.tpo_l, gamma=0.4)}


@pytest.mark.parametrize("name", TRL_TPO)
@pytest.mark.filterwarnings("ignore")
def test_trl_tpo_trainer_gives_the_same_loss_and_gradient(name):
    """It takes logits: our gradient by token log-probs is pulled back to them."""
    rows = random_rows(4, kinds=kinds_of("tpo"), seed=14)
    expected, logits, logps, order = T.trl_tpo(rows.responses, name, beta=0.2, tpo_alpha=0.7, tpo_l_gamma=0.4)
    for k, (kind, i) in enumerate(order):
        rows.responses[kind][i][:, 0] = logps[k, : len(rows.responses[kind][i])].detach().numpy()
    laid = lay(rows)
    value, _, grad = loss_and_gradient(partial(TRL_TPO[name], beta=0.2, alpha=0.7), laid)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-10)
    grad = by_answer(laid, grad)
    cotangent = torch.zeros_like(logps)
    for k, key in enumerate(order):
        cotangent[k, : len(grad[key])] = torch.tensor(grad[key])
    (ours,) = torch.autograd.grad(logps, logits, cotangent, retain_graph=True)
    (known,) = torch.autograd.grad(expected, logits)
    np.testing.assert_allclose(ours.numpy(), known.numpy(), rtol=1e-9, atol=1e-13)
