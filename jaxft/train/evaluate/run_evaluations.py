"""Evaluations before, during and after training, early ends, and faults that keep a run from finishing.

A run whose loss or logits are not finite before the first step stops there. A run is not finished if its last
steps or more than half of all steps were not finite. It is not finished either if a loss after the last step
(on held-out rows or, if there are none, on that step's rows) or the logits of a completion are not finite. It
then raises an alarm, writes no weights, and its process exits with code 1. In a sweep, the others finish.
"""

import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxft.batch import TrainState
from jaxft.distributed import processes
from jaxft.nn import tree
from jaxft.nn.tree import Batch, Params
from jaxft.objectives.alarms import GENERAL_LOSS
from jaxft.objectives.metrics import HELD_OUT, LOSS, PAIR_COUNT, FloatMetrics, without_count
from jaxft.runs.metrics_log import METRICS
from jaxft.runs.run_texts import Evaluation
from jaxft.train.compiled import Compiled, States
from jaxft.train.evaluate.evaluate import EvaluationLimit, is_stalled, selection_score
from jaxft.train.export.finished_run import write_held_out
from jaxft.train.logs.logs import Logs, early_end_lines, first_evaluation_lines, with_part
from jaxft.train.logs.meter import Meters
from jaxft.train.logs.nonfinite import first_of_model, first_parameter
from jaxft.train.start.jobs import Job

EVALUATED_LOSSES = {HELD_OUT + LOSS: "loss on held-out rows", GENERAL_LOSS: "loss on general text"}


def evaluate_start(
    job: Job, compiled: Compiled, states: States, frozen: tuple[Params, ...], logs: Logs
) -> dict[str, Any]:
    """Evaluate and log the model before the first step.

    Returns the first values of the JSON that checkpoints store: {"before": each member's evaluation,
    "counters": None, "last_faults": None}. Raises AgreedError that names the first non-finite parameter or
    layer if a loss or the logits of a completion are not finite.
    """
    for line in first_evaluation_lines(job):
        logs.message(line)
    evaluations, _ = compiled.evaluation(states)
    before = [
        without_accuracies(end) if member.programs.objective.facts.starts_tied else end
        for member, end in zip(job.members, evaluations, strict=True)
    ]
    check_selection(job, before)
    logs.step(0, [end["metrics"] for end in before])
    for number, (member, end) in enumerate(zip(job.members, before, strict=True)):
        for name in nonfinite_losses(end["metrics"]):
            of_text = name == GENERAL_LOSS
            batches = job.general if of_text else job.held_out
            where = first_of_model(member, states[number], frozen[number], of_text, batches)
            raise processes.AgreedError(
                f"{member.folder}: the {EVALUATED_LOSSES[name]} is not finite before the first step: "
                f"{where}. Check the weights, the rows and the settings of the loss"
            )
        wrong = nonfinite_samples(end)
        if wrong:
            p = member.programs
            params = tree.combine(states[number].trainable, frozen[number])
            where = first_parameter(params, p.partition.specs, p.mesh)
            raise processes.AgreedError(
                f"{member.folder}: {wrong} before the first step: {where or 'all parameters are finite'}. "
                "Check the weights, or set dtype=float32"
            )
    return {"before": before, "counters": None, "last_faults": None}


def without_accuracies(end: Evaluation) -> Evaluation:
    """Return an evaluation without accuracies. At step 0 a policy may equal its reference; the margin of
    every pair is then a rounding error, and an accuracy would be random.
    """
    metrics = end["metrics"]
    kept = {name: value for name, value in metrics.items() if name + PAIR_COUNT not in metrics}
    return {**end, "metrics": kept}


def check_selection(job: Job, before: list[Evaluation]) -> None:
    """Raise AgreedError if loop.best_metric is not a metric of the evaluations, if neither its name nor
    loop.greater_is_better says which value is better, or if loop.patience is set without held-out metrics.

    before: each member's evaluation before the first step.
    """
    for member, end in zip(job.members, before, strict=True):
        # if all pairs are ties, an accuracy has no value yet, only the number of its pairs
        loop, known = member.run.loop, [name for name in end["metrics"] if name.startswith(HELD_OUT)]
        metrics = list(dict.fromkeys(without_count(name) for name in known))
        if loop.best_metric and loop.best_metric not in metrics:
            near = ", ".join(tree.nearest(loop.best_metric, metrics, 5) or metrics)
            remedy = f"near: {near}" if near else "set data.held_out, without which there are none"
            raise processes.AgreedError(
                f"loop.best_metric={loop.best_metric} is not a metric of the evaluations; {remedy}"
            )
        if selection_score(end["metrics"], loop) is None and loop.patience and not metrics:
            raise processes.AgreedError(
                f"loop.patience={loop.patience} needs held-out rows; set data.held_out, or loop.patience=none"
            )


def evaluate_during(
    job: Job, compiled: Compiled, states: States, done: int, saved: dict[str, Any], logs: Logs
) -> list[float | None]:
    """Evaluate and log the members after `done` steps; return each member's score.

    The score selects the best checkpoint, the lower the better; None if loop.best_metric was not computed.
    The scores are appended to saved["scores"], with None in place of a score that is not finite.
    """
    loop = job.lead.run.loop
    held_out = compiled.held_out_metrics(states, loop.eval_scores)
    logs.step(done, held_out)
    scores = [selection_score(metrics, loop) for metrics in held_out]
    finite = [None if score is None or not math.isfinite(score) else score for score in scores]
    saved["scores"] = [*saved.get("scores", []), finite]
    return scores


def ended_early(job: Job, saved: dict[str, Any] | None, done: int) -> Job:
    """Return the job, with `done` as its last step if a callback has ended it there, or if the last
    loop.patience evaluations of every member were no better than an earlier one. saved: the JSON of the
    checkpoint at that step, None for a fresh run.
    """
    patience, history = job.lead.run.loop.patience, (saved or {}).get("scores", [])
    by_callback = saved is not None and saved.get("ended_by") == "callback"
    if saved is not None and by_callback and done < job.steps and job.planned <= saved["planned"]:
        return replace(job, steps=done, ended_by="callback")
    if not patience or done >= job.steps or not history:
        return job
    stalled = all(is_stalled(member_scores, patience) for member_scores in zip(*history, strict=True))
    return replace(job, steps=done, ended_by="patience") if stalled else job


def continued(job: Job, saved: dict[str, Any] | None, done: int) -> Job:
    """Return the job as it continues after `done` steps; see ended_early.

    Its evaluations read the same rows as before, although their limit depends on loop.steps and
    loop.eval_every, which may have changed. saved: the JSON of the checkpoint at that step, None for a fresh
    run.
    """
    if saved is not None:
        job = job.limit_evaluation(EvaluationLimit(*saved.get("evaluation_limit", ())))
    return ended_early(job, saved, done)


def end_by_callback(job: Job, saved: dict[str, Any], done: int, logs: Logs, meters: Meters) -> Job:
    """Return the job with `done` as its last step, because a callback has ended it; see end_if_due."""
    if done == job.steps:
        return job
    saved.update(ended_by="callback", planned=job.planned)
    return end_if_due(job, saved, done, logs, meters)


def end_if_due(job: Job, saved: dict[str, Any], done: int, logs: Logs, meters: Meters) -> Job:
    """Return the job with `done` as its last step if it ends there, see ended_early; then log the metrics
    since the last log entry and the reason. Return any other job unchanged.
    """
    job = ended_early(job, saved, done)
    if done == job.steps:
        if done % job.lead.run.loop.log_every:
            logs.step(done, *meters.read())
        logs.ends_at(done)
        for line in early_end_lines(job):
            logs.message(line)
    return job


def last_faults(compiled: Compiled, states: States, batch: Batch) -> list[list[str]]:
    """Return for each member a list of problems: one if the last training batch's loss, computed again after
    the last step, is not finite, else [].

    Without held-out rows, no other forward pass of the run uses the parameters of the last update.
    """
    return [
        [
            f"the loss on the rows of the last step is {value} after that step"
            for value in losses.values()
            if not math.isfinite(value)
        ]
        for losses in compiled.last_loss(compiled.averaged(states), batch)
    ]


def nonfinite_samples(end: Evaluation) -> str:
    """Return a message about an evaluation's completions whose logits were not finite, "" for none."""
    count, total = end["nonfinite"], max(len(end["samples"]), end["scored"])
    return f"the logits of {count} of {total} sampled completions are not finite" if count else ""


def nonfinite_losses(metrics: FloatMetrics) -> list[str]:
    """Return the names of the losses among the metrics of an evaluation that are not finite."""
    return [name for name in EVALUATED_LOSSES if name in metrics and not math.isfinite(metrics[name])]


def faults(state: TrainState, steps: int, end: Evaluation) -> list[str]:
    """Return the reasons why a run is not finished after `steps` steps, [] if it is.

    end: the evaluation after the last step.
    """
    total, last = np.asarray(jax.device_get(state.bad)).tolist()
    problems = []
    if last:
        which = f"the last {last} of {steps} steps were" if last > 1 else f"the last of {steps} steps was"
        problems.append(f"{which} not finite")
    if 2 * (steps - total) < steps:
        problems.append(f"only {steps - total} of {steps} steps were finite")
    problems += [f"the {EVALUATED_LOSSES[name]} is not finite" for name in nonfinite_losses(end["metrics"])]
    wrong = nonfinite_samples(end)
    return [*problems, wrong] if wrong else problems


def evaluate_end(
    job: Job, compiled: Compiled, states: States, last: list[list[str]] | None, logs: Logs
) -> tuple[list[Evaluation], list[bool]]:
    """Evaluate and log the model after the last step, and write the values of single held-out rows; return
    the evaluations and which members are finished.

    last: the result of last_faults. Logs an alarm for each member that is not finished. Without a sweep,
    raises AgreedError if the run is not finished.
    """
    after, values = compiled.evaluation(states)
    after = [with_part(job, end, held_out.rows) for end, held_out in zip(after, values, strict=True)]
    write_held_out(job, values)
    logs.step(job.steps, [evaluation["metrics"] for evaluation in after])
    finished = []
    for number, (member, state, end) in enumerate(zip(job.members, states, after, strict=True)):
        problems = faults(state, job.steps, end) + (last[number] if last else [])
        finished.append(not problems)
        if problems:
            logs.alarm(
                number,
                job.steps,
                f"{'; '.join(problems)}. The run is not finished and its weights are not written. Look at "
                f"{member.folder / METRICS}; lower optim.lr with another name=, or raise loop.steps to train "
                "on from the last checkpoint",
            )
            if job.sweep is None:
                raise processes.AgreedError(f"{member.folder}: not finished: {'; '.join(problems)}")
    return after, finished
