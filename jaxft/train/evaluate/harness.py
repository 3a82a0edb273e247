"""lm-evaluation-harness (EleutherAI, `lm_eval`) through its Python API: tasks by name, results, files."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.runs.loaded_weights import LoadedWeights
from jaxft.train.evaluate.harness_model import HarnessBackend, HarnessSettings, make_harness_model
from jaxft.tree import nearest


@dataclass(frozen=True)
class HarnessFlags:
    """Options that replace the settings of tasks.

    fewshot: examples in front of each question; None as the task says. limit: the first rows of each task;
    None for all. system: a system message. generation: arguments of generation, such as {"max_gen_toks": 64}.
    unsafe: whether tasks may execute code that the model writes.
    """

    fewshot: int | None = None
    limit: int | None = None
    system: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    unsafe: bool = False


class HarnessResult(NamedTuple):
    """metrics: by "task/metric". table: lm-evaluation-harness's own. report: its results as a JSON object,
    with the responses to each row under "samples". notes: lines for the user. values: none; the table has
    standard errors.
    """

    metrics: dict[str, float]
    table: str
    report: dict[str, Any]
    notes: list[str]
    values: Mapping[str, Sequence[float]] = {}


def require_harness() -> None:
    """Raise ImportError with what to install, if the extra `lm-eval` is missing."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{error}; install what --tasks needs: pip install 'jaxft[lm-eval]' (from a clone: pip install "
            "-e '.[lm-eval]')"
        ) from error


def load_tasks(names: Sequence[str], folder: str | None = None) -> list[Any]:
    """Return tasks and groups with their rows. names: of lm-evaluation-harness, patterns such as "arc_*", or
    YAML files. folder: where further tasks are.

    Raises ValueError for an unknown name, and for a task whose configuration or rows cannot be read.
    """
    from lm_eval.tasks import TaskManager

    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    # Its own tasks are thousands of files, which take seconds to list.
    manager = TaskManager(include_path=folder, include_defaults=len(files) < len(names))
    found: list[Any] = []
    for name in names:
        is_file = name in files
        if is_file and not Path(name).is_file():
            raise ValueError(f"--tasks {name}: no such file (relative to {Path.cwd()})")
        matching = [name] if is_file else manager.match_tasks([name])
        if not matching:
            near = ", ".join(nearest(name, manager.all_tasks, 3)) or "none"
            raise ValueError(
                f"--tasks {name}: no such task; near: {near}. Tasks of your own are in the folder of "
                "--include-path, or a .yaml file"
            )
        for one in matching:
            try:
                loaded = manager.load([one])
            except Exception as error:  # files, data and code of others
                problem = f"{type(error).__name__}: {error}"
                raise ValueError(f"--tasks {one}: the task cannot be loaded: {problem}") from error
            groups = list(loaded.get("groups", {}).values())  # the first one contains the others
            found += groups[:1] or list(loaded["tasks"].values())
    return found


def evaluate_tasks(
    loaded: LoadedWeights,
    tasks: Sequence[Any],
    flags: HarnessFlags,
    settings: HarnessSettings,
    about: dict[str, Any],
) -> HarnessResult:
    """Evaluate what load_tasks returned. about: facts about the model, for the report.

    Raises ValueError for requests that the model cannot read or generate.
    """
    from lm_eval import simple_evaluate
    from lm_eval.api.group import Group
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table

    backend = HarnessBackend(loaded, settings)
    for one in tasks:
        for task in one.get_all_tasks() if isinstance(one, Group) else [one]:
            if task.get_config("output_type") == "generate_until":  # refused before the hours of other tasks
                backend.check_generation({**(task.get_config("generation_kwargs") or {}), **flags.generation})
    report = simple_evaluate(
        make_harness_model(backend), tasks=list(tasks), num_fewshot=flags.fewshot, limit=flags.limit,
        batch_size=settings.batch, system_instruction=flags.system, apply_chat_template=settings.chat,
        gen_kwargs=flags.generation or None, confirm_run_unsafe_code=flags.unsafe,
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    kinds = ["results", *(["groups"] if report.get("groups") else [])]
    table = "\n".join(make_table(report, kind) for kind in kinds)
    report["config"] |= {"model": "jaxft", "model_args": about}
    plain = json.loads(json.dumps(report, default=handle_non_serializable))
    return HarnessResult(task_metrics(plain), table, plain, backend.notes())


def task_metrics(report: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a report by "task/metric", with the name of a filter behind a comma."""
    found = {}
    for task, values in report["results"].items():
        for name, value in values.items():
            metric, _, filter = name.partition(",")
            if filter and isinstance(value, int | float):
                found[f"{task}/{metric}" + ("" if filter == "none" else f",{filter}")] = value
    return found


def report_name() -> str:
    """Return a file name with the time, such as results_2026-01-31T12-00-00.json."""
    return time.strftime("results_%Y-%m-%dT%H-%M-%S.json")


def write_results(result: HarnessResult, path: Path) -> None:
    """Write the report as JSON, and in its folder the responses to each task's rows, as
    samples_TASK_NAME.jsonl. The formats are lm-evaluation-harness's own.
    """
    report = {name: value for name, value in result.report.items() if name != "samples"}
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for task, rows in result.report.get("samples", {}).items():
        plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in task)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.with_name(f"samples_{plain}_{path.stem}.jsonl").write_text(lines, "utf-8")
