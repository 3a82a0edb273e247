"""Training: settings, the loop, the step and everything it compiles. `jaxft.train(...)` trains a recipe.

python_api.py: `jaxft.train`, `prepare`, `load` and `evaluate`, for notebooks and programs
settings.py: Run and Loop
recipes.py: groups of knobs that recipes share
loop.py: the train loop, of a run or the runs of a sweep
sweep.py: a sweep: runs trained together on one base
multi_adapter.py: several adapters on one base, and the programs of a sweep
step.py: the train step; norms by layer
programs.py: the programs of a run as shapes, and checks of its adapters
compiled.py: the compiled programs of a run
trainable_params.py: the trainable mask and the parameter table
start/: before the first step: settings that rows decide, initial weights, reference log-probs
logs/: metrics as they are read and logged
evaluate/: held-out rows, completions, tasks of lm-evaluation-harness
export/: models and adapters written for others
"""

import importlib
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


class _Train(types.ModuleType):
    """The module type of `jaxft.train`, which makes it a function too: `jaxft.train(...)` works even if the
    package `jaxft.train` was imported before.
    """

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

        recipe: a recipe's name such as "sft", a Python file, or a function that returns a Run. rows: a list
        of dicts {column: value}, or any iterable of such dicts, for example a datasets.Dataset, in place of
        the setting `data`. callbacks: functions (step, metrics), or objects with the methods of a Tracker
        (jaxft/runs/trackers.py), called with each entry of the log, on the first of several processes. One
        that returns True ends the run after this step or, with several processes, the next; the model is then
        evaluated and exported. settings: dotted settings, {"optim.clip": 1.0}, which `**{"optim.clip": 1.0}`
        sets too. root: the folder in which the run's folder is. knobs: settings of the recipe, as on the
        command line (`jaxft train sft --help`); values may be functions and lists too.

        The same call resumes a run that was stopped, and returns the result of one that is finished. Raises
        jaxft.Error with one line for a wrong setting, row or file, KeyboardInterrupt after Ctrl-C.

            result = jaxft.train("sft", rows, name="mine", lr=5e-4, loss_on="completion")
            result = jaxft.train("dpo", pairs, loss=my_loss, callbacks=[lambda step, metrics: print(step)])

        >>> import jaxft
        >>> jaxft.train("sft", [{"prompt": "2 + 2?", "completion": "4"}], learning_rate=1e-4)
        Traceback (most recent call last):
            ...
        jaxft.Error: learning_rate=0.0001: learning_rate is lr here; write lr=0.0001
        """
        importlib.import_module("jaxft.runs.terminal").quiet()  # before jax is imported
        api = importlib.import_module("jaxft.train.python_api")
        return api.train_recipe(recipe, rows, callbacks, {**(settings or {})}, root, knobs)


sys.modules[__name__].__class__ = _Train
