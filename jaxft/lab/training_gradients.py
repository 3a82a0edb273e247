"""Gradients of a held-out loss through training, with respect to a loss's knobs, such as beta, and to weights
of data sources.

The held-out loss after a few training steps is a differentiable function of such hyper-parameters (Maclaurin,
Duvenaud & Adams 2015, arXiv:1502.03492). Descending its gradient finds weights of sources (Ren et al. 2018,
arXiv:1803.09050). Adam's steps jump where a gradient changes its sign, so at a high learning rate the
gradient only predicts tiny changes: use a low one.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxft.batch import Pairs
from jaxft.lab.studies.trial_arrays import reading_knobs
from jaxft.nn.attention.attention import asked_for
from jaxft.nn.tree import Aux, Metrics, Params, combine
from jaxft.objectives.objective import Objective
from jaxft.optim.update import standard_promotion
from jaxft.train.multi_adapter import LOSS_KNOBS
from jaxft.train.python_api import Prepared


class TrainingNumbers(NamedTuple):
    """The values with respect to which a held-out loss is differentiated.

    knobs: knobs of the training loss, such as beta, by name; {} for none. weights [S]: weights of the S data
    sources, at least 0; only their ratios matter. They are ignored if there is one source.
    """

    knobs: dict[str, Float[Array, ""]]
    weights: Float[Array, " S"]


class ShortTraining(NamedTuple):
    """A few steps of training, and an evaluation.

    objective, held_out_objective: the objectives of training and of evaluation. Their model must have
    attention=reference, as the other kernels have no second derivative. If knobs are differentiated,
    `objective` must read them from aux["knobs"] (see lab/studies/trial_arrays.py). The held-out objective
    uses the knobs in `aux`, so that derivatives are of training alone. batches, held_out: stacked batches,
    with a leading axis of training steps and of held-out batches. rule: the optimizer. Its update must be
    differentiable; Adam's is not where a gradient is 0, unless it has an eps_root.
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
    """Return Adam whose square root is differentiable at a gradient of 0. Parameters with gradients below
    1e-5 move less than with plain Adam.
    """
    return optax.adam(lr, eps_root=1e-10)


def with_source_weights(batch: Pairs, weights: Float[Array, " S"]) -> Pairs:
    """Multiply each pair's weight by its source's weight, and scale the products so that the sum of weights
    is unchanged. If all products are 0, they stay 0.

    Raises ValueError for a batch of one source, or unless there is one weight for each source.
    """
    sources = batch.sources
    if sources is None:
        raise ValueError("the batch has one source; give data= two sources or more")
    if len(weights) != len(batch.source_names):
        names = ", ".join(batch.source_names)
        raise ValueError(
            f"{len(weights)} weights for {len(batch.source_names)} sources ({names}); give one weight each"
        )
    w = batch.pair_weights
    weighted = w * weights.astype(w.dtype)[jnp.maximum(sources, 0)]
    total = weighted.sum()
    scale = jnp.where(total > 0, w.sum() / jnp.where(total > 0, total, 1), 0)
    return replace(batch, pair_weights=weighted * scale)


def make_held_out_loss(training: ShortTraining) -> Callable[[TrainingNumbers], Float[Array, ""]]:
    """Return a function of TrainingNumbers: the loss after training, summed over the held-out batches. It can
    be jitted and differentiated (see held_out_gradient).

    Each step is recomputed in the backward pass, so that it needs the memory of one train state per step.
    """

    def held_out_loss(numbers: TrainingNumbers) -> Float[Array, ""]:
        knobs = {LOSS_KNOBS: numbers.knobs} if numbers.knobs else {}

        @jax.checkpoint
        def step(state: tuple[Params, Any, Aux], batch: Pairs) -> tuple[tuple[Params, Any, Aux], None]:
            trainable, opt_state, aux = state
            if batch.sources is not None:
                batch = with_source_weights(batch, numbers.weights)

            def loss(trainable: Params) -> tuple[Float[Array, ""], Metrics]:
                return training.objective(combine(trainable, training.frozen), batch, None, {**aux, **knobs})

            grads, metrics = jax.grad(loss, has_aux=True)(trainable)
            with standard_promotion():
                updates, opt_state = training.rule.update(grads, opt_state, trainable)
            trainable = optax.apply_updates(trainable, updates)
            return (trainable, opt_state, training.objective.update(aux, trainable, metrics)), None

        start = training.trainable, training.rule.init(training.trainable), training.aux
        (trainable, _, aux), _ = jax.lax.scan(step, start, training.batches)
        params = combine(trainable, training.frozen)

        @jax.checkpoint
        def evaluated(batch: Pairs) -> Float[Array, ""]:
            return training.held_out_objective(params, batch, None, aux)[0]

        return jax.lax.map(evaluated, training.held_out).sum()

    return held_out_loss


def held_out_gradient(training: ShortTraining, numbers: TrainingNumbers) -> TrainingNumbers:
    """Return the gradient of make_held_out_loss(training) at `numbers`. It is compiled once for the same
    objectives, rule and shapes.
    """
    names = ("trainable", "frozen", "aux", "batches", "held_out")
    arrays = {name: x for name, x in training._asdict().items() if name in names}
    absent: dict[str, Any] = dict.fromkeys(names)
    return _gradient(training._replace(**absent), arrays, numbers)


@partial(jax.jit, static_argnums=0)
def _gradient(functions: ShortTraining, arrays: dict[str, Any], numbers: TrainingNumbers) -> TrainingNumbers:
    """See held_out_gradient. The base is an argument: as a constant it would take minutes to compile."""
    return jax.grad(make_held_out_loss(functions._replace(**arrays)))(numbers)


def fit_source_weights(training: ShortTraining, rounds: int = 20, rate: float = 0.5) -> list[list[float]]:
    """Minimise the held-out loss over the weights of the sources. Return the weights after each round; they
    sum to 1.

    The weights are a softmax of logits, which start at 0. A round repeats the training steps from the start
    and updates the logits by Adam with learning rate `rate`. A source whose rows worsen the held-out loss
    loses weight. Raises ValueError for one source, and if a gradient is not finite.
    """
    if training.batches.sources is None:
        raise ValueError("the batches have one source; give data= two sources or more")
    dtype = training.batches.pair_weights.dtype
    rule, logits = optax.adam(rate), jnp.zeros(len(training.batches.source_names), dtype)
    state, weights = rule.init(logits), []
    for _ in range(rounds):
        source_weights, pull = jax.vjp(jax.nn.softmax, logits)
        (slope,) = pull(held_out_gradient(training, TrainingNumbers({}, source_weights)).weights)
        if not jnp.isfinite(slope).all():
            raise ValueError("the gradients through training are not finite; lower lr, or train fewer steps")
        with standard_promotion():
            updates, state = rule.update(slope, state)
        logits = logits + updates
        weights.append(jax.nn.softmax(logits).tolist())
    return weights


def short_training(
    parts: Prepared,
    steps: int,
    lr: float,
    loss: Callable[..., Array] | None = None,
    knobs: Mapping[str, float] | None = None,
) -> ShortTraining:
    """Return the ShortTraining of a prepared recipe: its first steps, evaluated on all held-out pairs.

    parts: from jaxft.prepare on one device, with attention="reference". lr: of differentiable_adam, which
    replaces the recipe's optimizer. loss: a loss for training in place of the recipe's, which stays the
    held-out loss. knobs: values of those knobs of `loss` that are differentiated. Raises ValueError for
    rollouts, without held-out rows, on several devices, for other attention kernels, and for `knobs` without
    `loss`.

        rows = {"data": ("good.jsonl", "bad.jsonl"), "held_out": "held_out.jsonl"}
        parts = jaxft.prepare("dpo", attention="reference", **rows)
        fit_source_weights(short_training(parts, steps=8, lr=1e-3))[-1]

        training = short_training(parts, 8, 1e-3, loss=dpo, knobs={"beta": 0.1})
        at = TrainingNumbers({"beta": jnp.asarray(0.1)}, jnp.ones(2))
        held_out_gradient(training, at).knobs["beta"]
    """
    if knobs and loss is None:
        raise ValueError(f"knobs={dict(knobs)} are parameters of loss=, which is None; set loss, such as dpo")
    if parts.source.info.samples:
        raise ValueError("rollouts are sampled, which has no gradient; use a recipe of pairs, such as dpo")
    if not len(parts.source.held_out):
        raise ValueError("the recipe holds out no rows; set held_out=")
    if parts.mesh.size > 1:
        raise ValueError(
            f"gradients through training run on one device, not {parts.mesh.size}; make only one visible, "
            "such as by CUDA_VISIBLE_DEVICES=0"
        )
    if not asked_for(parts.model.attention.settings).endswith("=reference"):
        raise ValueError("fast attention kernels have no second derivative; set attention=reference")

    def flat(batch: Pairs) -> Pairs:
        """Join the microbatches: [micro, rows, ...] becomes [micro * rows, ...]."""
        return jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, *x.shape[2:]), batch)

    def stacked(batches: Iterable[Pairs]) -> Pairs:
        return jax.tree.map(lambda *x: jnp.stack(x), *map(flat, batches))

    objective, aux = parts.objective, parts.state.aux
    if loss is not None:
        make: Callable[..., Objective] = parts.run.objective
        objective = reading_knobs(lambda x: make(parts.model, loss=partial(loss, **x)), knobs or {})
        aux = {**objective.init(parts.state.trainable, False), **aux}
    return ShortTraining(
        objective, parts.objective.for_evaluation(), parts.state.trainable, parts.frozen, aux,
        stacked(parts.source.batch(step, parts.state)[0] for step in range(steps)),
        stacked(parts.source.held_out), differentiable_adam(lr),
    )  # fmt: skip
