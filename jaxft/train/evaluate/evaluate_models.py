"""The evaluation of a run, a model or adapters by name: on rows, by scores of completions, or on tasks of
lm-evaluation-harness. `jaxft evaluate` and `jaxft.evaluate` call it.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax

from jaxft.annotations import (
    REWARDS,
    ComputeDtype,
    PositiveInt,
    QuantKind,
    Seed,
    check_bounds,
    one_of,
)
from jaxft.data.decision_rows import DecisionRows
from jaxft.data.pairs import PairRows
from jaxft.data.row_settings import RowSettings
from jaxft.data.rows.dataset_rows import read_rows
from jaxft.data.rows.format_choice import task_of
from jaxft.data.rows.formats import DECISIONS, PAIRS, SFT
from jaxft.data.rows.mixture import held_out_sources, parse_sources
from jaxft.data.sft import TOO_LONG, Rows
from jaxft.distributed import sharding
from jaxft.engine.sampling import requested_sampling
from jaxft.models.model import Model
from jaxft.nn.attention.kv_cache import CacheFormat
from jaxft.nn.tree import nearest, regex
from jaxft.rl import rewards
from jaxft.runs.loaded_weights import (
    LoadedWeights,
    NamedWeights,
    any_rows,
    check_recorded_rows,
    held_out_names,
    load_each,
    named_adapters,
    prompt_settings,
    recorded_data,
    template_settings,
)
from jaxft.runs.settings.setting_names import advice
from jaxft.runs.settings.setting_values import load_callable
from jaxft.train.evaluate import harness
from jaxft.train.evaluate.completer import Completer
from jaxft.train.evaluate.evaluate import make_decision_scores, make_pair_preferences, make_row_loss
from jaxft.train.evaluate.harness import TaskEvaluation
from jaxft.train.evaluate.scored_completions import CompletionScorer, scored_prompts

Named = Mapping[str, NamedWeights]
Results = dict[str, Any]  # adapter -> Evaluated, of tasks HarnessResult


@dataclass(frozen=True)
class EvaluatedModels:
    """The models to evaluate, as --run, --model and --adapter name them. batch: rows at a time."""

    run: str | Path | None = None
    model: str | None = None
    adapter: Sequence[str] = ()
    dtype: ComputeDtype | None = None
    quant: QuantKind | None = None
    batch: PositiveInt = 8

    def __post_init__(self):
        check_bounds(self)


@dataclass(frozen=True)
class RowEvaluation:
    """Options of the loss of rows, the accuracy on pairs and the probabilities of decisions. file: the rows;
    None for those that the run holds out.
    """

    file: str | None = None
    columns: str | None = None
    max_length: PositiveInt | None = None
    too_long: Annotated[str | None, one_of((*TOO_LONG, None))] = None
    packing: bool = False

    def __post_init__(self):
        check_bounds(self)


@dataclass(frozen=True)
class CompletionEvaluation:
    """Options of the scores of completions. by: names of score functions, or the functions. regex: scores 1
    for a completion that it matches as a whole. pass_at: numbers k of pass@k, such as "1,10".
    """

    file: str | None = None
    columns: str | None = None
    by: Sequence[str | Callable[..., float]] = ()
    regex: str | None = None
    max_new: PositiveInt = 256
    samples: PositiveInt = 1
    pass_at: str = ""
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: Seed = 0
    limit: PositiveInt | None = None
    kv_cache: CacheFormat = "compute"

    def __post_init__(self):
        check_bounds(self)
        requested_sampling(self)
        if (most := max(self.passes, default=0)) > self.samples:
            raise ValueError(f"--pass-at {most} needs --samples of at least {most}, got {self.samples}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"--samples {self.samples} would be equal at temperature 0; use --temperature 0.8"
            )

    @property
    def passes(self) -> list[int]:
        """The numbers k of pass@k."""
        items = [item.strip() for item in self.pass_at.split(",") if item.strip()]
        if not all(item.isdecimal() and int(item) >= 1 for item in items):
            raise ValueError(f"--pass-at {self.pass_at}: expected numbers of at least 1, such as 1,10")
        return [int(item) for item in items]


Way = RowEvaluation | CompletionEvaluation | TaskEvaluation
# For errors: what each way evaluates, and the options that choose it
WAYS: dict[type[Way], tuple[str, str]] = {
    RowEvaluation: ("loss and preference evaluation", ""),
    CompletionEvaluation: ("scores of completions", "--by or --regex"),
    TaskEvaluation: ("--tasks", "--tasks"),
}


def requested(given: Mapping[str, Any]) -> tuple[EvaluatedModels, Way]:
    """Return the settings of an evaluation. given: options of `jaxft evaluate` by name, only those that were
    given; "tasks", "by" and "regex" choose the way. Raises ValueError for an option that it does not have.
    """
    scored = bool(given.keys() & {"by", "regex"})
    if scored and "tasks" in given:
        raise ValueError("--tasks have their own scores; omit --by and --regex")
    way: type[Way] = TaskEvaluation if "tasks" in given else CompletionEvaluation if scored else RowEvaluation
    names = {kind: {field.name for field in fields(kind)} for kind in (EvaluatedModels, *WAYS)}
    for name in sorted(given.keys() - names[EvaluatedModels] - names[way]):
        ways = [other for other in WAYS if name in names[other]]
        if not ways:
            near = ", ".join(nearest(name, sorted(set().union(*names.values())), 3))
            raise ValueError(f"unknown option {name}: {advice(name) or f'near: {near}'}")
        use = "use " + " or ".join(WAYS[other][1] for other in ways)
        raise ValueError(
            f"--{name.replace('_', '-')} applies only to {' and '.join(WAYS[other][0] for other in ways)}; "
            f"remove it, or {f'omit {WAYS[way][1]}' if RowEvaluation in ways else use}"
        )
    of_models = {name: x for name, x in given.items() if name in names[EvaluatedModels]}
    models = EvaluatedModels(**of_models)
    if not (models.run or models.model or models.adapter):
        raise ValueError("nothing to evaluate; use --run, --model or --adapter")
    if not (models.run or given.keys() & {"file", "tasks"}):
        raise ValueError("no rows; use --file or --tasks")
    return models, way(**{name: x for name, x in given.items() if name not in of_models})


def evaluate_models(models: EvaluatedModels, way: Way, needs_rows: bool = False) -> Results:
    """Load the models and evaluate them; print notes to stderr. Return adapter -> Evaluated, of tasks
    HarnessResult. needs_rows: whether to raise ValueError for rows that only have a loss.
    """
    named = named_adapters(models.run, models.model, models.adapter, "")
    if isinstance(way, TaskEvaluation):
        return evaluate_on_tasks(models, way, named)
    if isinstance(way, CompletionEvaluation):
        return evaluate_completions(models, way, named)
    return evaluate_rows(models, way, named, needs_rows)


@contextmanager
def loaded_models(models: EvaluatedModels, named: Named) -> Iterator[dict[str, LoadedWeights]]:
    """Load the models, print notes about them, and set their mesh within this context."""
    with jax.set_mesh(mesh := sharding.make_mesh(sharding.MeshShape())):
        loaded = load_each(named, mesh, models.dtype, models.quant)
        for line in [line for name, item in loaded.items() for line in (*named[name].notes, *item.notes)]:
            print(line, file=sys.stderr)
        yield loaded


def rows_to_evaluate(
    way: RowEvaluation | CompletionEvaluation, run: str | Path | None, record: dict[str, Any] | None
) -> tuple[str, Any]:
    """Return (dataset, settings). Without settings (None), all rows of the dataset are evaluated: way.file,
    or the run's data.held_out. With settings, the rows that they hold out of the run's training rows.

    record: the run's config.json. Raises ValueError if the run has no held-out rows, and for options that
    would read them in another way.
    """
    if way.file:
        return way.file, None
    held_out = (record or {"data": {}})["data"].get("held_out")
    if isinstance(held_out, str) and held_out != "none":
        return held_out, None
    if not record or not isinstance(held_out, float) or not held_out:
        raise ValueError(f"{run}: it holds out no rows (data.held_out={held_out}); use --file")
    for name in ("columns", "max_length", "packing", "too_long"):
        if vars(way).get(name):
            raise ValueError(
                f"--{name.replace('_', '-')} applies only to --file; the rows that the run held out "
                f"(data.held_out={held_out}) are read as in its training"
            )
    return record["data"]["train"], recorded_data(record)


# ---- Loss of rows, accuracy on pairs, probabilities of decisions


def evaluate_rows(
    models: EvaluatedModels, way: RowEvaluation, named: Named, needs_rows: bool = False
) -> Results:
    """Return adapter -> Evaluated: the loss of SFT rows, accuracy on pairs, or probabilities of decisions."""
    record = next(iter(named.values())).record
    file, split = rows_to_evaluate(way, models.run, record)
    if split is not None and not isinstance(split, Rows | PairRows):
        raise ValueError(
            f"{models.run}: its held-out rows are prompts without responses; score completions by --by"
        )
    for source in held_out_sources(file) if split is None else ():
        next(iter(read_rows(source.ref)))  # raises for what cannot be read, before weights are loaded
    check = any_rows if split is None else partial(check_recorded_rows, record)
    with loaded_models(models, named) as loaded:
        model = next(iter(loaded.values())).model
        rows: dict[str, Any] = dict.fromkeys(loaded, split)
        if split is None:
            rows = file_settings(models, way, named, file, model)
        kind = next(iter(rows.values()))
        if needs_rows and not isinstance(kind, DecisionRows | PairRows):
            raise ValueError(
                "--out writes results of pairs, decisions or completions; these rows only have a loss; omit "
                "--out"
            )
        make: Callable[..., Any] = make_pair_preferences if isinstance(kind, PairRows) else make_row_loss
        scores = (make_decision_scores if isinstance(kind, DecisionRows) else make)(model, check)
        return {name: scores(item, rows[name]) for name, item in loaded.items()}


def file_settings(
    models: EvaluatedModels, way: RowEvaluation, named: Named, file: str, model: Model
) -> dict[str, Any]:
    """Return adapter -> Rows, PairRows or DecisionRows that read a file as the adapter's run would."""
    limit, record = model.config.max_positions, next(iter(named.values())).record
    length = way.max_length or (min(limit, 1024) if way.packing else limit)
    if length > limit:
        raise ValueError(f"--max-length {length} exceeds the model's {limit} positions; use at most {limit}")
    row = next(iter(read_rows(held_out_sources(file)[0].ref)))
    shared: dict[str, Any] = {"batch": models.batch, "max_length": length}
    shared["too_long"] = way.too_long or "error"
    data = {name: prompt_settings(item.record, way.columns) for name, item in named.items()}
    recorded = recorded_data(record) if record else None
    is_decision, best_first = isinstance(recorded, DecisionRows), False
    is_text = recorded is not None and not is_decision and "text" in row.fields  # beside a label
    if isinstance(recorded, PairRows):
        best_first = recorded.best_first
    tasks = (PAIRS, SFT) if is_text else (DECISIONS, PAIRS, SFT)
    columns, settings = next(iter(data.values()))["columns"], RowSettings(best_first=best_first)
    task = DECISIONS if is_decision else task_of(row, columns, tasks, settings)
    if task == PAIRS:
        if way.packing or way.too_long == "split":
            raise ValueError("--packing and --too-long split are for SFT rows, not for pairs; remove them")
        shared |= {"held_out": "none", "unpaired": True, "best_first": best_first}
        return {name: PairRows(file, **x, **shared) for name, x in data.items()}
    shared |= {"held_out": file, "packing": way.packing}
    if task == SFT:
        for name, item in named.items():
            if item.record and "loss_on" in item.record["data"]:
                data[name]["loss_on"] = item.record["data"]["loss_on"]
        return {name: Rows(file, **x, **shared) for name, x in data.items()}
    if way.too_long in ("truncate", "split"):
        raise ValueError(f"--too-long {way.too_long}: decisions cannot be truncated; use drop or error")
    for name, of_adapter in data.items():
        of_adapter.pop("format", None)
        of_adapter |= vars(named[name].decision)
    return {name: DecisionRows(file, **x, **shared, unlabelled=True) for name, x in data.items()}


# ---- Scores of completions


def evaluate_completions(models: EvaluatedModels, way: CompletionEvaluation, named: Named) -> Results:
    """Complete the prompts of rows, and score the completions; return adapter -> Evaluated."""
    functions, record = score_functions(way), next(iter(named.values())).record
    file, split = rows_to_evaluate(way, models.run, record)
    sources = held_out_sources(file) if split is None else parse_sources(file)
    rows = [row for source in sources for row in read_rows(source.ref)]
    sampling, completer = requested_sampling(way), Completer(models.batch, way.seed, way.kv_cache)
    results = {}
    with loaded_models(models, named) as loaded:
        if split is not None:
            check, tokenizer = partial(check_recorded_rows, record), next(iter(loaded.values())).tokenizer
            names = held_out_names(split, tokenizer, check)
            rows = [row for row in rows if row.name in names]
        for name, item in loaded.items():
            data = prompt_settings(named[name].record, way.columns)
            template = template_settings(data)
            scorer = CompletionScorer(functions, completer, sampling, way.samples, way.passes, template)
            prompts = scored_prompts(rows[: way.limit], data.get("format", "auto"), data["columns"])
            results[name] = scorer.evaluate(item, prompts)
    return results


def score_functions(way: CompletionEvaluation) -> list[Callable[..., float]]:
    """Return the functions that --by and --regex name. Raises ValueError for an unknown name."""
    functions = []
    for name in way.by:
        if not isinstance(name, str):
            functions.append(name)
            continue
        if ":" not in name and name not in REWARDS:
            near = ", ".join(nearest(name, list(REWARDS), 3)) or ", ".join(REWARDS)
            raise ValueError(f"--by {name}: no such score; near: {near}, or a function such as my.py:score")
        fn = load_callable(REWARDS.get(name, name))
        if not callable(fn):
            raise ValueError(f"--by {name}: not a function (prompt, completion, row) -> float; name one")
        functions.append(fn)
    if way.regex is not None:
        regex(way.regex, "--regex")  # raises for an expression that cannot be compiled
        functions.append(partial(rewards.matches, pattern=way.regex))
    return functions


# ---- Tasks


def evaluate_on_tasks(models: EvaluatedModels, way: TaskEvaluation, named: Named) -> Results:
    """Return adapter -> HarnessResult. Raises ImportError without lm-evaluation-harness."""
    harness.require_harness()
    tasks, results = harness.load_tasks(way.names, way.include_path), {}
    with loaded_models(models, named) as loaded:
        for line in harness.generation_config_notes(next(iter(named.values())).ref):  # they share a base
            print(line, file=sys.stderr)
        for name, item in loaded.items():
            template = template_settings(prompt_settings(named[name].record))
            backend = harness.HarnessBackend(item, way, models.batch, template)
            about = {"model": named[name].ref, "adapter": str(named[name].adapter or "") or None}
            about |= {"dtype": str(item.model.dtype.name), "quant": models.quant}
            results[name] = harness.evaluate_tasks(backend, tasks, about)
    return results
