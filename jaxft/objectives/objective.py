"""The Objective type: a training objective as one immutable value of pure functions.

An objective is a function `(model, ...) -> Objective` in a file of this folder. The train step, evaluation,
rollouts and sweeps use nothing else. `forward` runs the model over a batch and `loss` turns its outputs into
a loss and metrics; every other member has a neutral default. A loss is a sum of terms times the batch's
weights, never a mean over the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxft.nn.tree import Aux, Batch, Metrics, Params
from jaxft.objectives.alarms import Alarms, training_alarms

Outputs = Any  # of one objective's forward pass: a struct of arrays with leading rows
ReferenceKind = Literal["none", "start", "moving", "precomputed", "teacher"]


class Scores(NamedTuple):
    """Log-probs and values of a batch, computed without gradient before the run trains on it: [B, M] at read
    positions in programs; on the host, for n completions of at most S sampled tokens, [n, S].

    logps: the policy's. reference: the reference policy's log-probs. values: the critic's. A field that the
    objective does not compute is None.
    """

    logps: Float[Any, "B M"] | None = None  # of the policy
    reference: Float[Any, "B M"] | None = None  # log-probs of the reference policy
    values: Float[Any, "B M"] | None = None  # of the critic


@dataclass(frozen=True)
class Facts:
    """Static properties of an objective, read when a run's programs are built.

    coupled: the loss of a row depends on other rows. Accumulation and evaluation then run all forward passes
        first, and the outputs must have a field `logp`, the only field with a gradient.
    reference: the reference policy: "none"; "start", the policy at step 0; "moving", a copy in aux that
        follows the policy; "precomputed", the policy at step 0 with its log-probs in the batch; "teacher",
        the run's teacher.
    teacher: the loss uses the run's teacher (see models/adapted.py), not as a reference.
    starts_tied: rewards compare the policy with the policy at step 0, so that all pairs of the first step are
        ties, apart from rounding.
    dropout: whether the policy may be trained with dropout.
    noise: the training loss is random even without dropout, so that `forward` needs a key.
    temperature: the sampling temperature that the objective's log-probs assume, None for any.
    kl_in_rewards: the KL penalty is subtracted from the rewards, and aux["kl_coef"] is its coefficient.
    critic: `score` returns values, and a batch has returns and value weights.
    freezes_policy: some batches leave the policy unchanged, those for which `frozen_policy` is True.
    observations: a batch has weights for tokens that the policy did not sample (see policy.echo).
    target_kl: approximate KL in nats per token. After a step with a larger KL, the later steps on the same
        rollout do not train the policy (see policy.with_target_kl). None for no limit.
    """

    coupled: bool = False
    reference: ReferenceKind = "none"
    teacher: bool = False
    starts_tied: bool = False
    dropout: bool = True
    noise: bool = False
    temperature: float | None = None
    kl_in_rewards: bool = False
    critic: bool = False
    freezes_policy: bool = False
    observations: bool = False
    target_kl: float | None = None


def no_summary(first: dict[str, Any], last: dict[str, Any]) -> list[str]:
    """Return no lines: the default of Report.summary."""
    return []


class Report(NamedTuple):
    """Functions that report on a run in the log and the model card, on the host and from logged metrics
    alone.

    alarms(memory, entry, last) -> Alarms is called with each entry of metrics.jsonl in order, see alarms.py.
    memory: a dict that keeps state between calls. last: whether the entry is the last one of the run.
    summary(first, last) -> lines about the full run, from each metric's first and newest value.
    """

    alarms: Callable[[dict[str, Any], dict[str, Any], bool], Alarms] = training_alarms
    summary: Callable[[dict[str, Any], dict[str, Any]], list[str]] = no_summary


def no_aux(trainable: Params, at_base: bool) -> Aux:
    """Return an empty aux: the default of Objective.init."""
    return {}


def same_aux(aux: Aux, trainable: Params, metrics: Metrics) -> Aux:
    """Return aux unchanged: the default of Objective.update."""
    return aux


def no_scores(params: Params, batch: Batch, aux: Aux) -> Scores:
    """Return no scores: the default of Objective.score."""
    return Scores()


def never_frozen(batch: Batch) -> Bool[Array, ""]:
    """Return False: the default of Objective.frozen_policy."""
    return jnp.zeros((), bool)


def same_batch(batch: Batch) -> Batch:
    """Return the batch unchanged: the default of Objective.batch_spec."""
    return batch


class Objective(NamedTuple):
    """A training objective; calling it returns (loss, metrics) of a batch.

    forward(params, batch, key, aux) -> outputs of the forward passes, from which loss and metrics are
        computed; key: for dropout, or None. loss(outputs, aux) -> (loss, metrics).
    init(trainable, at_base) -> aux, the objective's state at step 0; at_base: the policy at step 0 is the
        base without its adapter, or with a frozen one, so that a reference needs no copy.
    update(aux, trainable, metrics) -> aux after an optimizer step.
    score(params, batch, aux) -> Scores. frozen_policy(batch) -> whether the step leaves the policy's
        parameters and their optimizer state unchanged (if facts.freezes_policy). batch_spec(batch) -> the
        batch, of arrays or shapes, with every field that a training batch has.
    eval_loss: `loss` for held-out rows, with PerRow metrics; None to use `loss`. one_pass(params, batch, key,
        aux) -> (loss, metrics): the same as loss(forward(...)), but faster; None if there is no faster way.
        eval_one_pass: one_pass with eval_loss. text: the objective that evaluates general text; None for this
        one.

    A forward pass of a linear model and its squared error, summed with the weights of the batch:

    >>> def forward(params, batch, key, aux):
    ...     return params["w"] * batch["x"], batch
    >>> def loss(outputs, aux):
    ...     prediction, batch = outputs
    ...     return jnp.sum(batch["weight"] * (prediction - batch["y"]) ** 2), {}
    >>> batch = {"x": jnp.array([1.0, 2.0]), "y": jnp.array([1.0, 1.0]), "weight": jnp.array([0.5, 0.5])}
    >>> value, metrics = Objective(forward, loss)({"w": jnp.asarray(1.0)}, batch, None, {})
    >>> float(value)
    0.5
    """

    forward: Callable[[Params, Batch, Array | None, Aux], Outputs]
    loss: Callable[[Outputs, Aux], tuple[Array, Metrics]]
    init: Callable[[Params, bool], Aux] = no_aux
    update: Callable[[Aux, Params, Metrics], Aux] = same_aux
    score: Callable[[Params, Batch, Aux], Scores] = no_scores
    frozen_policy: Callable[[Batch], Bool[Array, ""]] = never_frozen
    batch_spec: Callable[[Batch], Batch] = same_batch
    eval_loss: Callable[[Outputs, Aux], tuple[Array, Metrics]] | None = None
    eval_one_pass: Callable[[Params, Batch, Array | None, Aux], tuple[Array, Metrics]] | None = None
    text: "Objective | None" = None
    one_pass: Callable[[Params, Batch, Array | None, Aux], tuple[Array, Metrics]] | None = None
    facts: Facts = Facts()
    report: Report = Report()

    def __call__(
        self, params: Params, batch: Batch, key: Array | None, aux: Aux
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return (loss, metrics) of a batch."""
        if self.one_pass is not None:
            return self.one_pass(params, batch, key, aux)
        return self.loss(self.forward(params, batch, key, aux), aux)

    def for_evaluation(self) -> "Objective":
        """Return the objective with `eval_loss`, if it has one, as its `loss`, to evaluate held-out rows."""
        if self.eval_loss is None:
            return self
        return self._replace(loss=self.eval_loss, one_pass=self.eval_one_pass)
