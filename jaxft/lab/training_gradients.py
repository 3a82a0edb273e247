"""Gradients of a held-out loss through training: by the knobs of a loss, and by the weights of sources.

A few steps of training are one differentiable function of the numbers that govern them. Its gradient says
how each of them would change the held-out loss (Maclaurin, Duvenaud & Adams 2015, arXiv:1502.03492), and
following it finds weights of sources (Ren et al. 2018, arXiv:1803.09050).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxft.batch import Pairs
from jaxft.objectives.objective import Objective
from jaxft.optim.update import standard_promotion
from jaxft.train.multi_adapter import LOSS_KNOBS
from jaxft.train.python_api import Prepared
from jaxft.tree import Aux, Params, combine


class TrainingNumbers(NamedTuple):
    """The values with respect to which a held-out loss is differentiated.

    knobs: the loss's knobs, such as beta, by name; {} for none. weights [S]: weights of the sources, at least
    0; only their ratios matter.
    """

    knobs: dict[str, Float[Array, ""]]
    weights: Float[Array, " S"]


class ShortTraining(NamedTuple):
    """A few steps of training, and their evaluation.

    objective, held_out_objective: of training and of evaluation, of a model with attention=reference, since
    other kernels have no second derivative; the first reads its knobs in
    aux["knobs"] if it has any (see lab/halving.py). batches: with leading axes [steps]; held_out: one batch.
    rule: the optimizer; its update must be differentiable, which Adam's is not where a gradient is 0, unless
    it has an eps_root.
    """

    objective: Objective
    held_out_objective: Objective
    trainable: Params
    frozen: Params
    aux: Aux
    batches: Pairs
    held_out: Pairs
    rule: optax.GradientTransformation


def differentiable_adam(lr: float) -> optax.GradientTransformation:
    """Return Adam whose square root is differentiable at a gradient of 0."""
    return optax.adam(lr, eps_root=1e-10)


def with_source_weights(batch: Pairs, weights: Float[Array, " S"]) -> Pairs:
    """Multiply the weights of pairs by the weight of their source; their sum stays as it is.

    A step without any pair of positive weight has a loss of 0.
    """
    sources = batch.sources
    if sources is None:
        raise ValueError("the batch has one source; give data= two sources or more")
    w = batch.pair_weights
    own = w * weights.astype(w.dtype)[jnp.maximum(sources, 0)]
    total = own.sum()
    scale = jnp.where(total > 0, w.sum() / jnp.where(total > 0, total, 1), 0)
    return replace(batch, pair_weights=own * scale)


def make_held_out_loss(training: ShortTraining) -> Callable[[TrainingNumbers], Float[Array, ""]]:
    """Return the held-out loss after the steps as a function of TrainingNumbers, to be jitted and
    differentiated. Each step is recomputed in the backward pass, so memory grows by a state per step.
    """

    def held_out_loss(numbers: TrainingNumbers) -> Float[Array, ""]:
        aux = {**training.aux, LOSS_KNOBS: numbers.knobs} if numbers.knobs else training.aux

        @jax.checkpoint
        def step(state: tuple[Params, Any], batch: Pairs) -> tuple[tuple[Params, Any], None]:
            trainable, opt_state = state
            if batch.sources is not None:
                batch = with_source_weights(batch, numbers.weights)

            def loss(trainable: Params) -> Float[Array, ""]:
                return training.objective(combine(trainable, training.frozen), batch, None, aux)[0]

            grads = jax.grad(loss)(trainable)
            with standard_promotion():
                updates, opt_state = training.rule.update(grads, opt_state, trainable)
            return (optax.apply_updates(trainable, updates), opt_state), None

        start = training.trainable, training.rule.init(training.trainable)
        (trainable, _), _ = jax.lax.scan(step, start, training.batches)
        params = combine(trainable, training.frozen)
        return training.held_out_objective(params, training.held_out, None, aux)[0]

    return held_out_loss


def fit_source_weights(
    training: ShortTraining, sources: int, rounds: int = 20, rate: float = 0.5
) -> list[list[float]]:
    """Return the weights of the sources after each round of following the gradient, each summing to 1.

    The weights are a softmax of logits, which start equal; a round trains the steps once and moves the logits
    by Adam with this learning rate. A source whose rows worsen the held-out loss loses its weight.
    """
    held_out_loss = make_held_out_loss(training)
    dtype = training.batches.pair_weights.dtype

    @jax.jit
    def gradient(logits: Float[Array, " S"]) -> Float[Array, " S"]:
        return jax.grad(lambda logits: held_out_loss(TrainingNumbers({}, jax.nn.softmax(logits))))(logits)

    rule, logits = optax.adam(rate), jnp.zeros(sources, dtype)
    state, weights = rule.init(logits), []
    for _ in range(rounds):
        with standard_promotion():
            updates, state = rule.update(gradient(logits), state)
        logits = logits + updates
        weights.append(jax.nn.softmax(logits).tolist())
    return weights


def short_training(parts: Prepared, steps: int, lr: float) -> ShortTraining:
    """Return the first steps of a prepared recipe of pairs, evaluated on its first held-out batch.

    parts: from jaxft.prepare, with attention="reference". lr: of differentiable_adam, which replaces the
    recipe's optimizer. Raises ValueError for a recipe without held-out rows, or one of rollouts.

        rows = {"data": ("good.jsonl", "bad.jsonl"), "held_out": "held_out.jsonl"}
        parts = jaxft.prepare("dpo", attention="reference", **rows)
        fit_source_weights(short_training(parts, steps=8, lr=1e-3), sources=2)[-1]
    """
    if parts.source.info.samples:
        raise ValueError("rollouts are sampled, which has no gradient; use a recipe of pairs")
    first = next(iter(parts.source.held_out), None)
    if first is None:
        raise ValueError("the recipe holds out no rows; set held_out=")

    def flat(batch: Pairs) -> Pairs:
        """Join the microbatches: [micro, rows, ...] becomes [micro * rows, ...]."""
        return jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, *x.shape[2:]), batch)

    batches = [flat(parts.source.batch(step, parts.state)[0]) for step in range(steps)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    return ShortTraining(
        parts.objective, parts.objective.for_evaluation(), parts.state.trainable, parts.frozen,
        parts.state.aux, stacked, flat(first), differentiable_adam(lr),
    )  # fmt: skip
