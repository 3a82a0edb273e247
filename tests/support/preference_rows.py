"""Pairs as arrays of log-probs, their losses in jaxft and torch, and a table of losses with formulas."""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_losses as T

from jaxft.batch import Pairs
from jaxft.objectives.losses import preference_losses as P
from jaxft.objectives.losses import reference_free_losses as F
from jaxft.objectives.pair import declaration, loss_values, pair_batch

PAIR = ("chosen", "rejected")


@dataclass(frozen=True)
class Rows:
    """Pairs as a test writes them: per answer an array [tokens, 3] of log-probs by policy and reference and
    log sum p^2.
    """

    responses: dict[str, list[np.ndarray]]
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
        return np.stack(
            [policy, policy + scale * rng.normal(0, 0.5, n) / max(n, 1) ** 0.5, -rng.exponential(1.0, n)], -1
        )

    answers = {kind: [answer(kind, i) for i in range(count)] for kind in kinds}
    return Rows(answers, rng.normal(0, 1, count))


@dataclass(frozen=True, eq=False)
class Laid:
    """Rows in a batch: its arrays, and where each token of each answer went."""

    batch: Pairs
    values: np.ndarray  # [B, M, 3]
    at: dict[tuple[str, int], list[tuple[int, int]]]
    cells: list[tuple[int, int]]


def lay(rows, shape=(3, 3), seed=0, dtype="float64"):
    """The pairs in random cells of [B, P], their tokens in random order in the row, padding between them."""
    rng = np.random.default_rng(seed)
    kinds, (B, slots) = tuple(rows.responses), shape
    A = len(kinds)
    cells = [divmod(int(x), slots) for x in rng.permutation(B * slots)[: rows.count]]
    tokens = [[] for _ in range(B)]
    lengths, mean_lengths = np.zeros((B, slots, A), np.int32), np.zeros((B, slots, A), dtype)
    weight, margin = np.zeros(shape, dtype), np.zeros(shape, dtype)
    for a, kind in enumerate(kinds):
        counted = [len(x) for x, w in zip(rows.responses[kind], rows.weight) if w > 0 and len(x) > 0]
        mean_lengths[..., a] = np.mean(counted) if counted else 0
        for i, (b, p) in enumerate(cells):
            lengths[b, p, a] = len(rows.responses[kind][i])
            tokens[b] += [(p * A + a, place, kind, i) for place in range(lengths[b, p, a])]
    for i, cell in enumerate(cells):
        weight[cell], margin[cell] = rows.weight[i], rows.margin[i]
    M = max(
        96, *(len(row) + 3 for row in tokens)
    )  # most tests share one shape, so that nothing is compiled twice
    answer, places = np.full((B, M), slots * A, np.int32), np.zeros((B, M), np.int32)
    values, at = np.zeros((B, M, 3), dtype), defaultdict(dict)
    for b, row in enumerate(tokens):
        for m, (owner, place, kind, i) in zip(rng.permutation(M), row):
            answer[b, m], places[b, m], values[b, m] = owner, place, rows.responses[kind][i][place]
            at[kind, i][place] = (b, int(m))
    none = dict.fromkeys(("ids", "segments", "positions", "read", "targets", "last"))
    batch = Pairs(
        **none, responses=answer, offsets=places, lengths=lengths, mean_lengths=mean_lengths,
        pair_weights=weight, index=np.zeros(shape, np.int32), columns={"margin": margin}, kinds=kinds,
    )  # fmt: skip
    return Laid(batch, values, {key: [x[t] for t in range(len(x))] for key, x in at.items()}, cells)


def seen(laid, logp=None, reference=True):
    return _pair_batch(laid.batch, laid.values, logp, reference)


def _pair_batch(batch, numbers, logp, reference):
    policy, known, square = (jnp.asarray(numbers[..., i]) for i in range(3))
    return pair_batch(batch, policy if logp is None else logp, square, known if reference else None)


def value_of(loss, pair, state=None):
    start = {name: jnp.asarray(x, pair.weight.dtype) for name, x in declaration(loss).init.items()}
    return loss_values(loss, pair, start if state is None else state)


def loss_and_gradient(loss, laid, state=None, reference=True):
    """(total, values [B, P], gradient [B, M]) as the objective takes them."""
    value, values, grad = _with_gradient(loss, laid.batch, laid.values, state, reference)
    return float(value), np.asarray(values), np.asarray(grad)


def _with_gradient(loss, batch, numbers, state, reference):
    def total(logp):
        pair = _pair_batch(batch, numbers, logp, reference)
        values = value_of(loss, pair, state)
        assert values.shape == pair.weight.shape and values.dtype == logp.dtype
        return jnp.sum(jnp.where(pair.weight > 0, pair.weight * values, 0)), values

    (value, values), grad = jax.value_and_grad(total, has_aux=True)(jnp.asarray(numbers[..., 0]))
    return value, values, grad


def one_program(losses, kinds=None):
    """Return loss_and_gradient as a function of (name, laid, reference) for losses {name: loss}, which are
    compiled together.

    kinds: name -> kinds of responses that its loss reads; losses of other kinds than those of `laid` are left
    out of its program. By default all read chosen and rejected.
    """

    @partial(jax.jit, static_argnames="reference")
    def run(batch, numbers, reference):
        found = {}
        for name, loss in losses.items():
            if (kinds(name) if kinds else PAIR) == batch.kinds:
                try:
                    found[name] = _with_gradient(loss, batch, numbers, None, reference)
                except Exception as error:
                    error.add_note(f"loss {name!r}")
                    raise
        return found

    @cache
    def results(laid, reference):
        return jax.device_get(run(laid.batch, laid.values, reference))

    def of(name, laid, reference=True):
        value, values, grad = results(laid, reference)[name]
        return float(value), values, grad

    return of


def by_answer(laid, array):
    return {key: np.asarray([array[cell] for cell in cells]) for key, cells in laid.at.items()}


def in_torch(rows):
    def part(i):
        return {
            k: [torch.tensor(x[:, i], requires_grad=i == 0) for x in xs] for k, xs in rows.responses.items()
        }  # noqa: E731

    return T.Rows(part(0), part(1), part(2), torch.tensor(rows.margin))


def check_against_torch(loss, formula, rows, state=None):
    laid = lay(rows)
    assert_equals_torch(loss_and_gradient(loss, laid, state), formula, rows, laid)


def assert_equals_torch(found, formula, rows, laid, rtol=1e-10, each=True):
    """found: (total, values, gradient) of the loss whose formula it is."""
    value, values, grad = found
    seen_by_torch = in_torch(rows)
    expected = formula(seen_by_torch)
    expected.mean().backward()
    np.testing.assert_allclose(value, expected.mean().item(), rtol=rtol)
    if each:
        np.testing.assert_allclose(
            [values[cell] for cell in laid.cells], expected.detach().numpy(), rtol=rtol, atol=1e-13
        )
    for (kind, i), g in by_answer(laid, grad).items():
        known = seen_by_torch.policy[kind][i].grad
        np.testing.assert_allclose(
            g, 0 * g if known is None else known.numpy(), rtol=rtol, atol=1e-13, err_msg=f"{kind} {i}"
        )
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

# A row a loss: ours, its formula in torch, knobs other than the defaults. `nll` (TRL's sft) is a scalar in
# TRL: compared as a total.
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
    "nll": (P.nll, T.nll, {}),
    "simpo": (F.simpo, T.simpo, {"label_smoothing": 0.1, "gamma": 0.7}),
    "alphapo": (F.alphapo, T.alphapo, {"alpha": 0.4, "label_smoothing": 0.1}),
    "alphapo below": (F.alphapo, T.alphapo, {"alpha": -0.4}),
    "cpo": (F.cpo, T.cpo, {"alpha": 0.7, "label_smoothing": 0.2}),
    "cpo_hinge": (F.cpo_hinge, T.cpo_hinge, {"alpha": 0.7, "beta": 0.3}),
    "cpo_ipo": (F.cpo_ipo, T.cpo_ipo, {"alpha": 0.7, "beta": 0.3}),
    "orpo": (F.orpo, T.orpo, {"beta": 0.5}),
    "wpo": (P.wpo(P.dpo), T.wpo(T.dpo), {"beta": 0.5}),
    "wpo ipo": (P.wpo(P.ipo), T.wpo(T.ipo), {"beta": 0.5}),
    "ld dpo": (
        P.length_desensitised(P.dpo, alpha=0.3),
        T.length_desensitised(T.dpo, alpha=0.3),
        {"beta": 0.5},
    ),
    "ld ipo": (
        P.length_desensitised(P.ipo, alpha=0.3),
        T.length_desensitised(T.ipo, alpha=0.3),
        {"beta": 0.5},
    ),
    "ld aot": (
        P.length_desensitised(P.aot, alpha=0.3),
        T.length_desensitised(T.aot, alpha=0.3),
        {"beta": 0.5},
    ),
    "mpo": (
        P.mix((P.dpo, 0.8), (P.bco_pair, 0.2), (P.nll, 1.0)),
        T.mix((T.dpo, 0.8), (T.bco_pair, 0.2), (T.nll, 1.0)),
        {},
    ),
    "mix of coupled": (P.mix((P.aot, 0.8), (P.dpo, 0.2)), T.mix((T.aot, 0.8), (T.dpo, 0.2)), {}),
}
TOTALS = {"nll", "cpo", "cpo_hinge", "cpo_ipo", "orpo", "mpo"}  # TRL's NLL is one number for the batch

THIRD = {
    "tpo": (
        F.tpo,
        partial(T.cpo, beta=0.01, imitated="gold"),
        {"alpha": 0.7, "beta": 0.2, "label_smoothing": 0.1},
    ),
    "tpo_hinge": (F.tpo_hinge, partial(T.cpo_hinge, beta=0.01, imitated="gold"), {"alpha": 0.7, "beta": 0.2}),
    "tpo_ipo": (F.tpo_ipo, partial(T.cpo_ipo, beta=0.01, imitated="gold"), {"alpha": 0.7, "beta": 0.2}),
    "tpo_l": (F.tpo_l, T.tpo_l, {"alpha": 0.7, "beta": 0.2, "label_smoothing": 0.1}),
}
SINGLE = {
    "apo_zero_unpaired": (
        F.apo_zero_unpaired,
        T.apo_zero_unpaired,
        {"desirable_weight": 1.3, "undesirable_weight": 0.8},
    ),
    "kto": (F.kto, T.kto, {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.8}),
    "bco": (F.bco, T.bco, {"beta": 0.4}),
}
EVERY = {**PAIRED, **THIRD, **SINGLE}


def kinds_of(name):
    return PAIR + (("gold",) if name in THIRD else ("mismatched",) if name in SINGLE else ())


def with_knobs(loss, knobs):
    return partial(loss, **knobs) if knobs else loss
