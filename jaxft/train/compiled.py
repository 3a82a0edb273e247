"""The compiled programs of a run: step, evaluation of held-out rows and general text, sampling of prompts."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxft import tree
from jaxft.batch import TrainState
from jaxft.distributed import sharding
from jaxft.inference.generate import Decoding
from jaxft.runs.report import Evaluation, Sample
from jaxft.train import samples
from jaxft.train.members import Job
from jaxft.train.programs import compile_eval, compile_step
from jaxft.tree import Batch, Metrics, Params

States = tuple[TrainState, ...]  # of the members of a job


@dataclass(frozen=True)
class Compiled:
    """The compiled programs of a job. States, frozen parameters and every list have one entry per member.

    step(states, frozen, batch) -> (states, metrics), the metrics of a sweep with a leading members axis.
    evaluate and general: metrics of the held-out rows and of the general text, {} without any. sample:
    completions of held-out prompts.
    """

    step: Callable[[States, tuple[Params, ...], Batch], tuple[States, Metrics]]
    evaluate: Callable[[States], list[dict[str, float]]]
    general: Callable[[States], list[dict[str, float]]]
    sample: Callable[[States], list[list[Sample]]]

    def held_out_metrics(self, states: States) -> list[dict[str, float]]:
        """Metrics of the held-out rows under their names in the log."""
        return [
            {f"eval_{name}": value for name, value in metrics.items()} for metrics in self.evaluate(states)
        ]

    def evaluation(self, states: States) -> list[Evaluation]:
        """Evaluate held-out rows, general text and sample completions, before the first and after the last
        step.
        """
        general = [{"general_loss": metrics["loss"]} if metrics else {} for metrics in self.general(states)]
        held_out = self.held_out_metrics(states)
        metrics = [{**own, **more} for own, more in zip(held_out, general, strict=True)]
        samples = self.sample(states)
        return [Evaluation(metrics=own, samples=texts) for own, texts in zip(metrics, samples, strict=True)]


def compile_run(job: Job, frozen: tuple[Params, ...]) -> Compiled:
    """Compile the programs of a run alone."""
    p, run, source, (own,) = job.lead.programs, job.lead.run, job.sources[0], frozen
    held_out = compile_eval(p, p.eval_step, own, source.held_out)
    general = compile_eval(p, p.text_step, own, job.general)
    params = tree.combine(p.state.trainable, p.frozen)
    decoding = Decoding(p.partition.model, run.sampling, job.stop)
    complete = samples.compile_sampler(decoding, source.prompts(run.samples), job.tokenizer, params)
    train_step = compile_step(p, *source.shapes)

    def step(states: States, frozen: tuple[Params, ...], batch: Batch) -> tuple[States, Metrics]:
        state, metrics = train_step(states[0], frozen[0], sharding.shard_batch(p.mesh, batch))
        return (state,), metrics

    def evaluate(states: States) -> list[dict[str, float]]:
        metrics = source.evaluate(states[0])
        return [held_out(states[0]) if metrics is None else metrics]

    def sample(states: States) -> list[list[Sample]]:
        return [complete(tree.combine(states[0].trainable, own))]

    return Compiled(step, evaluate, lambda states: [general(states[0])], sample)
