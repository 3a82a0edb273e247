"""Trials of a loss as arrays: a trial's learning rate and knobs (the loss's parameters, such as beta) are
arrays in the train state, so that one compiled program trains any trial.
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
from jaxft.lab.loss_evaluation import loss_beta
from jaxft.lab.studies.study import LossTrial, SearchedLoss, Study
from jaxft.nn.param_spec import Specs
from jaxft.nn.tree import Aux, Metrics, Params
from jaxft.objectives.logprobs import LanguageModel
from jaxft.objectives.objective import Objective, Outputs
from jaxft.objectives.pair import CHOSEN_REWARD, REJECTED_REWARD, declaration
from jaxft.objectives.preference import preference
from jaxft.optim.optimizer import Optim, make_rule
from jaxft.optim.rules import UpdateRule
from jaxft.train.multi_adapter import LOSS_KNOBS
from jaxft.train.settings import Run, Scoring


class TrialRate(NamedTuple):
    """The state of scale_by_trial_rate. factor: a trial's learning rate divided by the recipe's."""

    factor: Float[Array, ""]


def run_of(study: Study, label: str, seed: int) -> Run:
    """Return the run that trains any trial of a loss, so that it is compiled once.

    It is the study's recipe with the loss study.losses[label] and `seed`, without samples, scores and
    general text. Its train state has the recipe's learning rate and the first trial's knobs until
    make_set_trial's function writes another trial's. Logged rewards are log-ratios to the reference, not
    multiplied by beta.
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
    """Return the run of one trial, with its knobs and learning rate as settings instead of arrays.

    Logged rewards are multiplied by beta only if the loss has a state, such as BCO's mean reward.
    """
    run, loss = run_of(study, label, seed), study.losses[label]
    beta = trial.knobs.get("beta", loss_beta(loss.fn, 1.0)) if declaration(loss.fn).init else 1.0
    return replace(
        run,
        objective=partial(preference, loss=partial(loss.fn, **trial.knobs), beta=beta),
        optim=replace(study.recipe.optim, lr=trial.lr),
    )


def searched(model: LanguageModel, loss: SearchedLoss, trial: LossTrial) -> Objective:
    """Return a preference objective whose loss reads its knobs from aux["knobs"] in the train state.

    trial: its knobs are the values at step 0. The state of a loss, such as BCO's mean reward, is updated from
    beta times the logged rewards, as these are logged without beta.
    """

    def with_knobs(knobs: Mapping[str, Any]) -> Objective:
        return preference(model, partial(loss.fn, **knobs), beta=1.0)

    plain = reading_knobs(with_knobs, trial.knobs)

    def update(aux: Aux, trainable: Params, metrics: Metrics) -> Aux:
        beta = aux[LOSS_KNOBS].get("beta", loss_beta(loss.fn, 1.0))
        rewards = {
            name: replace(metrics[name], total=beta * metrics[name].total)
            for name in (CHOSEN_REWARD, REJECTED_REWARD)
            if name in metrics
        }
        return plain.update(aux, trainable, {**metrics, **rewards})

    return plain._replace(update=update)


def reading_knobs(make: Callable[[Mapping[str, Any]], Objective], knobs: Mapping[str, float]) -> Objective:
    """Return the objective `make(knobs)`, but its loss uses the knobs in aux["knobs"], float32 scalars.

    knobs: values that the objective's `init` stores in aux["knobs"].
    """
    plain = make(knobs)

    def loss_of(evaluated: bool, outputs: Outputs, aux: Aux) -> tuple[Array, Metrics]:
        objective = make(aux[LOSS_KNOBS])
        return (objective.for_evaluation() if evaluated else objective).loss(outputs, aux)

    def init(trainable: Params, at_base: bool) -> Aux:
        arrays = {name: jnp.asarray(value, jnp.float32) for name, value in knobs.items()}
        return {**plain.init(trainable, at_base), LOSS_KNOBS: arrays}

    whole = partial(loss_of, False), partial(loss_of, True)
    return plain._replace(loss=whole[0], eval_loss=whole[1], init=init)


def with_rate(schedule: optax.Schedule, specs: Specs, weight_decay: float, *, optim: Optim) -> UpdateRule:
    """Return the update rule of `optim`, with updates multiplied by the TrialRate in the optimizer state."""
    rule = make_rule(optim, schedule, specs)
    return rule._replace(transform=optax.chain(rule.transform, scale_by_trial_rate()))


def scale_by_trial_rate() -> optax.GradientTransformation:
    """Multiply updates by the factor in this transformation's state, a TrialRate; it starts at 1."""

    def init(params: Params) -> TrialRate:
        return TrialRate(jnp.ones((), jnp.float32))

    def update(updates: Params, state: TrialRate, params: Params | None = None) -> tuple[Params, TrialRate]:
        return jax.tree.map(lambda x: x * state.factor.astype(x.dtype), updates), state

    return optax.GradientTransformation(init, update)


def make_set_trial(study: Study) -> Callable[[TrainState, LossTrial], TrainState]:
    """Return `set_trial(state, trial)`, which returns the state with a trial's learning rate and knobs."""
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
