"""Trials as arrays: the learning rate and the knobs of a loss are part of a train state, so that one compiled
program trains any trial of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxft.batch import TrainState
from jaxft.lab.study import LossTrial, SearchedLoss, Study
from jaxft.nn.param import Specs
from jaxft.objectives.logprobs import LanguageModel
from jaxft.objectives.objective import Objective, Outputs
from jaxft.objectives.preference import preference
from jaxft.optim.optimizer import Optim, make_rule
from jaxft.optim.rules import UpdateRule
from jaxft.train.multi_adapter import LOSS_KNOBS
from jaxft.train.settings import Run, Scoring
from jaxft.tree import Aux, Metrics, Params


class TrialRate(NamedTuple):
    """A trial's learning rate divided by the recipe's."""

    factor: Float[Array, ""]


def run_of(study: Study, label: str, seed: int) -> Run:
    """Return the run of a loss: the study's recipe with this loss and seed, whose trial is set in its state.

    Rewards are in nats: log-prob ratios to the reference, for any beta of the loss.
    """
    recipe, first = study.recipe, study.trials_of(label)[0]
    return replace(
        recipe,
        name=study.name,
        objective=partial(searched, loss=study.losses[label], trial=first),
        optim=replace(
            recipe.optim, optimizer=partial(with_rate, optim=recipe.optim), b1=None, b2=None, eps=None,
            optimizer_kwargs=(),
        ),
        loop=replace(recipe.loop, eval_fraction=None, store=None),
        samples=0,
        scoring=Scoring(),
        general=None,
        data=replace(recipe.data, seed=seed, split_seed=recipe.data.seed_of_split),
        seed=seed,
    )  # fmt: skip


def plain_run(study: Study, label: str, trial: LossTrial, seed: int) -> Run:
    """Return the run that a trial equals: the recipe with the loss, its knobs, the learning rate and the seed
    as settings.
    """
    run, loss = run_of(study, label, seed), study.losses[label]
    return replace(
        run,
        objective=partial(preference, loss=partial(loss.fn, **trial.knobs), beta=1.0),
        optim=replace(study.recipe.optim, lr=trial.lr),
    )


def searched(model: LanguageModel, loss: SearchedLoss, trial: LossTrial) -> Objective:
    """The preference objective of a loss whose searched knobs are scalars in aux["knobs"]. trial: the values
    that they start with.
    """

    def with_knobs(knobs: Mapping[str, Any]) -> Objective:
        return preference(model, partial(loss.fn, **knobs), beta=1.0)

    plain = with_knobs(trial.knobs)

    def loss_of(evaluated: bool, outputs: Outputs, aux: Aux) -> tuple[Array, Metrics]:
        objective = with_knobs(aux[LOSS_KNOBS])
        return (objective.for_evaluation() if evaluated else objective).loss(outputs, aux)

    def init(trainable: Params, at_base: bool) -> Aux:
        return {**plain.init(trainable, at_base), LOSS_KNOBS: _arrays(trial.knobs)}

    return plain._replace(loss=partial(loss_of, False), eval_loss=partial(loss_of, True), init=init)


def _arrays(knobs: Mapping[str, float]) -> dict[str, Array]:
    return {name: jnp.asarray(value, jnp.float32) for name, value in knobs.items()}


def with_rate(schedule: optax.Schedule, specs: Specs, weight_decay: float, *, optim: Optim) -> UpdateRule:
    """Return the update rule of a recipe, whose updates are multiplied by the state's TrialRate."""
    rule = make_rule(optim, schedule, specs)
    return rule._replace(transform=optax.chain(rule.transform, scale_by_trial_rate()))


def scale_by_trial_rate() -> optax.GradientTransformation:
    """Multiply updates by the factor in the state."""

    def init(params: Params) -> TrialRate:
        return TrialRate(jnp.ones((), jnp.float32))

    def update(updates: Params, state: TrialRate, params: Params | None = None) -> tuple[Params, TrialRate]:
        return jax.tree.map(lambda x: x * state.factor.astype(x.dtype), updates), state

    return optax.GradientTransformation(init, update)


def make_set_trial(study: Study) -> Callable[[TrainState, LossTrial], TrainState]:
    """Return `set_trial(state, trial)`, which puts a trial's numbers into a state; nothing is compiled."""
    lr = study.recipe.optim.lr

    def put(value: float, like: Array) -> Array:
        return jax.device_put(jnp.asarray(value, like.dtype), like.sharding)

    def is_rate(x: Any) -> bool:
        return isinstance(x, TrialRate)

    def set_trial(state: TrainState, trial: LossTrial) -> TrainState:
        def rate(x: Any) -> Any:
            return TrialRate(put(trial.lr / lr, x.factor)) if is_rate(x) else x

        knobs = {name: put(trial.knobs[name], like) for name, like in state.aux[LOSS_KNOBS].items()}
        opt_state = jax.tree.map(rate, state.opt_state, is_leaf=is_rate)
        return replace(state, opt_state=opt_state, aux={**state.aux, LOSS_KNOBS: knobs})

    return set_trial
