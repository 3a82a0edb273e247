"""The compiled programs of a run: step, evaluation of held-out rows and general text, sampling of prompts."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxft.batch import TrainState, widened
from jaxft.data.source import HeldOutMetrics, Source
from jaxft.distributed import sharding
from jaxft.engine.state import Decoding
from jaxft.nn import tree
from jaxft.nn.tree import Batch, Metrics, Params
from jaxft.objectives.metrics import HELD_OUT, LOSS, FloatMetrics, as_floats, row_values
from jaxft.runs.run_texts import Evaluation, Sample
from jaxft.train.evaluate.evaluate import held_out_floats
from jaxft.train.evaluate.scored_completions import (
    compile_sampler,
    held_out_prompts,
    make_scorer,
    prompt_texts,
)
from jaxft.train.logs.clock import Clock
from jaxft.train.programs import compile_averaged, compile_metrics, compile_step
from jaxft.train.start.jobs import Job

States = tuple[TrainState, ...]  # of the members of a job
RowMetrics = Callable[[States, Iterable[Batch], bool], list[Metrics]]  # see programs.compile_metrics
CompileRows = Callable[[Batch, int], RowMetrics]  # of the shape of a batch, and the number of batches
RowValues = dict[int, FloatMetrics]  # of held-out rows by index
ScoredSamples = tuple[Evaluation, dict[str, FloatMetrics]]  # see make_scorer
LAST_LOSS = "last_loss"
EVALUATING, EVALUATING_TEXT = "batches of held-out rows evaluated", "batches of general text evaluated"


class HeldOutValues(NamedTuple):
    """Metrics of single held-out rows and prompts.

    rows: {index of the row among the held-out rows: {metric: value}}. prompts: {name of the prompt: {metric:
    value}}.
    """

    rows: RowValues
    prompts: dict[str, FloatMetrics]


def divided(total: Metrics) -> HeldOutMetrics:
    """Return held-out metrics that are summed over all batches, each divided by its weight."""
    return HeldOutMetrics(held_out_floats(total), row_values(total))


def _as_logged(rows: HeldOutMetrics) -> FloatMetrics:
    return {HELD_OUT + name: value for name, value in rows.metrics.items()}


@dataclass(frozen=True)
class Compiled:
    """The compiled programs of a run, or of a sweep's members together. States, frozen parameters and every
    list have one entry per member.

    step(states, frozen, batch) -> (states, metrics), the metrics of a sweep with a leading members axis.
    averaged(states) -> the states with the weights that are evaluated and exported: with optim.ema or a
    schedule-free optimizer the averaged weights, else the same. evaluate, general and sample take averaged
    states. evaluate(states, with_rows), general(states): metrics of the held-out rows and of the general
    text, {} if the run has none; with_rows=True adds the metrics of single rows. sample(states):
    completions of held-out prompts and their scores. last_loss(states, batch): the loss of a training batch
    in a forward pass without dropout; {} with held-out rows, whose loss is computed after the last step
    anyway.
    """

    step: Callable[[States, tuple[Params, ...], Batch], tuple[States, Metrics]]
    evaluate: Callable[[States, bool], list[HeldOutMetrics]]
    general: Callable[[States], list[dict[str, float]]]
    sample: Callable[[States], list[ScoredSamples]]
    last_loss: Callable[[States, Batch], list[FloatMetrics]]
    averaged: Callable[[States], States]

    def timed(self, clock: Clock) -> "Compiled":
        """Return the same programs with their time counted by `clock` as evaluation or sampling. The first
        train step, which is slow, is shown as progress.
        """

        def step(states: States, frozen: tuple[Params, ...], batch: Batch) -> tuple[States, Metrics]:
            with clock.first("first step") as is_first:
                result = self.step(states, frozen, batch)
                return jax.block_until_ready(result) if is_first else result

        return replace(
            self,
            step=step,
            evaluate=clock.timed("evaluation", "held-out rows", self.evaluate),
            general=clock.timed("evaluation", "general text", self.general),
            sample=clock.timed("sampling", "held-out prompts", self.sample),
        )

    def held_out_metrics(self, states: States, scores: bool) -> list[FloatMetrics]:
        """Return each member's metrics of the held-out rows, named as in the log, with averaged weights.
        scores: also complete held-out prompts and add the mean scores.
        """
        states = self.averaged(states)
        of_rows = [_as_logged(rows) for rows in self.evaluate(states, False)]
        if not scores:
            return of_rows
        scored = [evaluation["metrics"] for evaluation, _ in self.sample(states)]
        return [{**rows, **more} for rows, more in zip(of_rows, scored, strict=True)]

    def evaluation(self, states: States) -> tuple[list[Evaluation], list[HeldOutValues]]:
        """Evaluate held-out rows, general text and completions of held-out prompts with averaged weights.

        `run` calls it before the first and after the last step. Returns for each member the evaluation, and
        the metrics of single held-out rows and prompts.
        """
        states = self.averaged(states)
        general = [{"general_loss": metrics["loss"]} if metrics else {} for metrics in self.general(states)]
        held_out, sampled = self.evaluate(states, True), self.sample(states)
        evaluations, values = list[Evaluation](), list[HeldOutValues]()
        for rows, more, (scored, of_prompts) in zip(held_out, general, sampled, strict=True):
            evaluations.append({**scored, "metrics": {**_as_logged(rows), **more, **scored["metrics"]}})
            values.append(HeldOutValues(rows.rows, of_prompts))
        return evaluations, values


def compile_run(job: Job, frozen: tuple[Params, ...], clock: Clock) -> Compiled:
    """Compile the programs of a run that is not in a sweep. clock: shows progress."""
    p, source, (fixed,) = job.lead.programs, job.sources[0], frozen

    def compile_rows(step: jax.stages.Wrapped, shape: Batch, count: int) -> RowMetrics:
        metrics = compile_metrics(p, step, fixed, shape, count)
        return lambda states, batches, with_rows: [metrics(states[0], batches, with_rows)]

    of_rows = partial(compile_rows, p.eval_step)
    with clock.part("evaluation"):
        held_out = compile_eval(of_rows, job.held_out, partial(clock.over, EVALUATING))
        of_texts = partial(compile_rows, p.text_step)
        general = compile_eval(of_texts, job.general, partial(clock.over, EVALUATING_TEXT))
    with clock.part("samples"):
        sample = compile_samples(job, frozen, clock)
    with clock.part("train step"):
        train_step = compile_step(p, *source.shapes)

    def step(states: States, frozen: tuple[Params, ...], batch: Batch) -> tuple[States, Metrics]:
        state, metrics = train_step(states[0], frozen[0], sharding.shard_batch(p.mesh, batch))
        return (state,), metrics

    def evaluate(states: States, with_rows: bool) -> list[HeldOutMetrics]:
        evaluated = source.evaluate(states[0])
        return [divided(held_out(states, with_rows)[0]) if evaluated is None else evaluated]

    def general_text(states: States) -> list[FloatMetrics]:
        return [as_floats(total) for total in general(states, False)]

    last_loss = compile_last_loss(source, of_rows)
    return Compiled(step, evaluate, general_text, sample, last_loss, compile_averages(job))


def compile_averages(job: Job) -> Callable[[States], States]:
    """Return `averaged(states)`, which replaces trained weights by their averages; see Compiled."""
    averages = [compile_averaged(member.programs) for member in job.members]
    return lambda states: tuple(average(state) for average, state in zip(averages, states, strict=True))


def compile_samples(
    job: Job, frozen: tuple[Params, ...], clock: Clock
) -> Callable[[States], list[ScoredSamples]]:
    """Return `sample(states)`: each member's completions of the held-out prompts, with scores.

    Members whose adapters have the same shapes share one compiled program. clock: shows the progress.
    """
    run, prompts = job.lead.run, held_out_prompts(job.lead.run, job.sources[0])
    texts = prompt_texts(prompts, job.tokenizer, job.stop)
    score = make_scorer(run.scoring, run.samples, texts)
    by_shape: dict[str, Callable[[Params], list[Sample]]] = {}
    complete = []
    for member in job.members:
        p = member.programs
        params = tree.combine(p.state.trainable, p.frozen)
        key = str({path: x.shape for path, x in tree.paths(p.state.trainable).items()})
        if key not in by_shape:
            decoding = Decoding(p.partition.model, run.sampling, job.stop, run.scoring.samples)
            by_shape[key] = compile_sampler(decoding, prompts, job.tokenizer, params, p.mesh, clock)
        complete.append(by_shape[key])

    def sample(states: States) -> list[ScoredSamples]:
        return [
            score(call(tree.combine(state.trainable, fixed)))
            for call, state, fixed in zip(complete, states, frozen, strict=True)
        ]

    return sample


def compile_eval(
    compile_rows: CompileRows,
    batches: tuple[Batch, ...],
    over: Callable[[Sequence[Batch]], Iterable[Batch]] = iter,
) -> Callable[[States, bool], list[Metrics]]:
    """Return `metrics(states, with_rows)`: for each member the metrics summed over `batches`, which have one
    shape, and not yet divided by their weights; {} without batches. with_rows: add the metrics of single
    rows.

    compile_rows(batch, count): compiles the metrics of `count` batches. over(batches): yields them, perhaps
    with a progress display.
    """
    if not batches:
        return lambda states, with_rows: [{} for _ in states]
    metrics = compile_rows(batches[0], len(batches))
    return lambda states, with_rows: metrics(states, over(batches), with_rows)


def compile_last_loss(
    source: Source[Any], compile_rows: CompileRows
) -> Callable[[States, Batch], list[FloatMetrics]]:
    """Return `last_loss(states, batch)`: the last training batch's loss after the last step, see Compiled."""
    if source.held_out:
        return lambda states, batch: [{} for _ in states]
    largest: Any = source.shapes[-1]
    microbatch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), largest)
    metrics = compile_rows(microbatch, largest.ids.shape[0])

    def last_loss(states: States, batch: Batch) -> list[FloatMetrics]:
        wide = widened(batch, largest)
        rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], wide) for i in range(wide.ids.shape[0])]
        losses = map(as_floats, metrics(states, rows, False))
        return [{LAST_LOSS: row[LOSS]} if LOSS in row else {} for row in losses]

    return last_loss
