"""Training: settings, the loop, the step and everything it compiles. `jaxft.train(...)` trains a recipe.

python_api.py: `jaxft.train`, `prepare`, `load` and `evaluate`, for notebooks and programs
settings.py: Run and Loop
recipes.py: groups of knobs that recipes share
open_settings.py: what a command leaves open: lengths and batches from its rows, a learning rate from its
    model
loop.py: the train loop
step.py: the train step
attention_kernels.py: which attention kernel a run has, why, and whether it is right on its device
jobs.py: a run (or the members of a sweep) before weights are loaded
programs.py: the programs of a run as shapes, and checks of its adapters
compiled.py: the compiled programs of a run
teacher.py: the second, frozen model of a run: its name, checks, storage, weights
eva.py: EVA: statistics of layers' inputs on the run's first batches, ranks and first directions from them;
    the adapter with these ranks
partition.py: the trainable mask and the parameter table
evaluate.py: held-out loss
reference.py: precomputed reference
samples.py: completions of held-out prompts, and by loaded weights
scores.py: scores of completions, pass@k
likelihood.py: loss and perplexity, preferences, for `jaxft evaluate`
harness.py: lm-evaluation-harness: its tasks and results
harness_model.py: a model as lm-evaluation-harness uses one, with log-probabilities of continuations
meter.py: metrics between log entries
clock.py: how long each phase takes
logs.py: the logs of a run; parameters and data as JSON for its report
results.py: results of a finished run
help_page.py: the reference that `jaxft settings` and `jaxft help` print
watch.py: norms per layer
nonfinite.py: a record of the first non-finite step
start_and_end.py: whether a run may begin, and whether it is finished
export.py: write a model as a Hugging Face folder
export_gguf.py: write a model as a GGUF file
calibrate.py: which rows calibrate a base, and its codes; second moments of layers' inputs
multi_adapter.py: several adapters on one base
sweep.py: a sweep: runs trained together on one base
sweep_programs.py: the programs of a sweep
sweep_runs.py: the runs of a sweep: together, or else one after the other
"""

import importlib
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


class _Train(types.ModuleType):
    """This package as a function: `jaxft.train` is both, whichever is imported first."""

    def __call__(
        self,
        recipe: str | Callable[..., Any],
        rows: Iterable[Mapping[str, Any]] | None = None,
        callbacks: Sequence[Any] = (),
        settings: Mapping[str, Any] | None = None,
        root: str = "runs",
        **knobs: Any,
    ) -> Any:
        """Train a recipe as `jaxft train` does, or resume it, and return its Result.

        recipe: the name of one such as "sft", a Python file, or a function that returns a Run. rows: a list
        of dicts, or any iterable of them such as a datasets.Dataset, in place of `data`. callbacks: functions
        (step, metrics), or objects with the methods of a Tracker (jaxft/runs/trackers/tracker.py), called
        with each entry of the log, on the first of several processes. One that returns True ends the run
        after this step or, with several processes, the next; the model is then evaluated and exported.
        settings: dotted settings, {"optim.clip": 1.0}, which `**{"optim.clip": 1.0}` sets too. root: the
        folder of the run's folder. knobs: as on the command line (`jaxft train sft --help`); functions and
        lists are values too.

        The same call resumes a run that was stopped, and returns the result of one that is finished. Raises
        jaxft.Error with one line for a wrong setting, row or file, KeyboardInterrupt after Ctrl-C.

            result = jaxft.train("sft", rows, name="mine", lr=5e-4, loss_on="completion")
            result = jaxft.train("dpo", pairs, loss=my_loss, callbacks=[lambda step, metrics: print(step)])
        """
        importlib.import_module("jaxft.runs.cli").quiet()  # before jax is imported
        api = importlib.import_module("jaxft.train.python_api")
        return api.train_recipe(recipe, rows, callbacks, {**(settings or {})}, root, knobs)


sys.modules[__name__].__class__ = _Train
