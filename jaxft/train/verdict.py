"""Whether a run may begin, and whether it is finished: its losses and its steps must be finite.

A run whose loss is not finite before the first step stops there. One that ends with non-finite steps, with a
non-finite held-out loss, or with fewer than half of its steps done is not finished: it raises an alarm,
writes no weights, and its process exits with code 1. Of a sweep, the other members are finished as usual.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np

from jaxft.batch import TrainState
from jaxft.distributed import processes
from jaxft.objectives.metrics import HELD_OUT, LOSS, FloatMetrics
from jaxft.runs.metric_names import GENERAL_LOSS
from jaxft.runs.report import Evaluation
from jaxft.train.compiled import Compiled, States
from jaxft.train.logs import Logs
from jaxft.train.members import Job, Member
from jaxft.train.nonfinite import first_of_model
from jaxft.tree import Params

EVALUATED_LOSSES = {HELD_OUT + LOSS: "loss on held-out rows", GENERAL_LOSS: "loss on general text"}


def evaluate_start(
    job: Job, compiled: Compiled, states: States, frozen: tuple[Params, ...], logs: Logs
) -> list[Evaluation]:
    """Evaluate and log the model before the first step.

    Raises AgreedError that names the first non-finite parameter or layer if a loss is not finite.
    """
    before = compiled.evaluation(states)
    logs.step(0, [end["metrics"] for end in before])
    for number, (member, end) in enumerate(zip(job.members, before, strict=True)):
        for name in nonfinite_losses(end["metrics"]):
            of_text, objective = name == GENERAL_LOSS, member.programs.objective
            batches = job.general if of_text else job.sources[0].held_out
            objective = (objective.text or objective) if of_text else objective
            where = first_of_model(member, states[number], frozen[number], objective, batches)
            raise processes.AgreedError(
                f"{member.folder}: the {EVALUATED_LOSSES[name]} is not finite before the first step: "
                f"{where}. Check the weights, the rows and the settings of the loss"
            )
    return before


def nonfinite_losses(metrics: FloatMetrics) -> list[str]:
    """Return the names of the losses among the metrics of an evaluation that are not finite."""
    return [name for name in EVALUATED_LOSSES if name in metrics and not math.isfinite(metrics[name])]


def faults(state: TrainState, steps: int, metrics: FloatMetrics) -> list[str]:
    """Return why a run is not finished after `steps` steps; nothing if it is.

    metrics: of the evaluation after the last step.
    """
    total, last = np.asarray(jax.device_get(state.bad)).tolist()
    found = []
    if last:
        found.append(
            f"the last {last} of {steps} steps were not finite"
            if last > 1
            else f"the last of {steps} steps was not finite"
        )
    if 2 * (steps - total) < steps:
        found.append(f"only {steps - total} of {steps} steps were finite")
    return found + [f"the {EVALUATED_LOSSES[name]} is not finite" for name in nonfinite_losses(metrics)]


def finished_members(
    job: Job, states: Sequence[TrainState], after: Sequence[Evaluation], logs: Logs
) -> list[bool]:
    """Return which members are finished, and log an alarm for each of the others.

    Raises AgreedError for a run alone that is not finished.
    """
    finished = []
    for number, (member, state, end) in enumerate(zip(job.members, states, after, strict=True)):
        found = faults(state, job.steps, end["metrics"])
        finished.append(not found)
        if found:
            logs.alarm(number, job.steps, f"{'; '.join(found)}. {_advice(member)}")
            if job.sweep is None:
                raise processes.AgreedError(f"{member.folder}: not finished: {'; '.join(found)}")
    return finished


def _advice(member: Member) -> str:
    where = member.folder / "metrics.jsonl"
    return (
        f"The run is not finished and its weights are not written. Look at {where}; lower optim.lr with "
        "another name=, or raise loop.steps to train on from the last checkpoint"
    )
