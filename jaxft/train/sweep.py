"""A sweep: runs trained together on one base in memory, with an adapter, an optimizer and a log for each.

Every member has the same results as if it were trained alone: `runs/<sweep>/<label>/` is a run's folder, with
metrics.jsonl, config.json, adapter/ and a model card. The sweep's own folder has the table (README.md,
summary.json), curves.png and the checkpoints of all members.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.objectives.metrics import FloatMetrics
from jaxft.report import compare, ranking
from jaxft.runs import run_record
from jaxft.runs.metrics_log import METRICS, read_entries
from jaxft.runs.settings.setting_values import describe, differences
from jaxft.train.settings import Run

# Settings in which the members of a sweep may differ.
MAY_DIFFER = (
    "name", "objective", "optim", "seed", "data.seed", "adapter.rank", "adapter.alpha", "adapter.rslora",
    "adapter.rank_pattern", "adapter.alpha_pattern",
)  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """Runs that are trained together.

    runs: by label, which is also the name of the member's folder. at_once: how many adapters go through the
    model in one forward pass, a divisor of their number. A greater value takes more memory for activations,
    and is faster if a single adapter does not keep the device busy. Raises ValueError for runs that differ in
    settings outside the list MAY_DIFFER, such as rows or weights, and for settings that a sweep does not
    support, such as full fine-tuning or dropout.
    """

    name: str
    runs: Mapping[str, Run]
    at_once: int = 1

    @property
    def lead(self) -> Run:
        """The first run, whose mesh, intervals and held-out rows are used for all."""
        return next(iter(self.runs.values()))

    def __post_init__(self) -> None:
        count, runs = len(self.runs), list(self.runs.values())
        if not runs:
            raise ValueError("a sweep needs at least one run, got none; add one to runs")
        if self.at_once < 1 or count % self.at_once:
            divisors = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            raise ValueError(
                f"{count} adapters don't divide into blocks of {self.at_once}; use one of {divisors} "
                "(--at-once)"
            )
        for run in runs:
            if run.adapter is None or run.train is not None or run.heads or run.teacher:
                raise ValueError(
                    f"{run.name}: the members of a sweep are adapters on one base: "
                    "leave out full=true, run.train, run.heads and run.teacher"
                )
            if run.adapter.replaces_weights and self.at_once > 1:
                raise ValueError(
                    "adapter.modules_to_save, bias and trainable_token_indices are possible only for one "
                    f"adapter at a time; use --at-once 1, got {self.at_once}"
                )
            layered = adapter_specs(run.model.specs, run.adapter, run.model.weight_names)
            if self.at_once > 1 and {"embed", "head"} & layered.keys():
                raise ValueError(
                    "adapter.targets: LoRA on the embeddings or the head is possible only for one adapter at "
                    f"a time; use --at-once 1, got {self.at_once}"
                )
            if run.adapter.dropout:
                raise ValueError(
                    f"adapter.dropout={run.adapter.dropout} is not possible in a sweep; set adapter.dropout=0"
                )
        first = runs[0].adapter
        if first and first.changes_base and any(run.adapter != first for run in runs):
            raise ValueError(
                f"adapter.init={first.init} changes the base, which the members of a sweep share, "
                "so they need the same adapter settings. Set adapter.init=default."
            )
        self._check_differences()
        held_out = runs[0].data.held_out
        if len({run.data.seed_of_split for run in runs}) > 1 and isinstance(held_out, float) and held_out:
            raise ValueError(
                f"data.held_out={held_out} depends on the seed, and the seeds differ. "
                "Set data.split_seed, name a file, or set held_out=none."
            )

    def _check_differences(self) -> None:
        (label, first), *rest = self.runs.items()
        known = describe(first)
        for other, run in rest:
            for line in differences(known, describe(run)):
                field = line.partition(":")[0]
                if not any(field == name or field.startswith(name + ".") for name in MAY_DIFFER):
                    raise ValueError(
                        f"{other} and {label} differ in {line}. "
                        f"The members of a sweep may differ only in {', '.join(MAY_DIFFER)}."
                    )


def with_one_split(runs: Mapping[str, Run]) -> dict[str, Run]:
    """Return the runs, changed if needed so that all hold out the same rows: if a fraction is held out and
    their seeds differ, each gets data.split_seed from the first run.
    """
    first = next(iter(runs.values())).data.seed_of_split
    divided = [
        run.data for run in runs.values() if isinstance(run.data.held_out, float) and run.data.holds_out
    ]
    if all(data.seed_of_split == first for data in divided):
        return dict(runs)
    return {label: replace(run, data=replace(run.data, split_seed=first)) for label, run in runs.items()}


def reason_to_separate(runs: Mapping[str, Run]) -> str:
    """Return why runs cannot be trained together in one program, "" if they can."""
    lead = next(iter(runs.values()))
    if lead.data.unit == "prompts":
        return "each samples completions of its own"
    try:
        Sweep("", runs)
        facts = [run.objective(run.model).facts for run in runs.values()]
    except ValueError as error:
        return str(error)
    if any(fact.noise for fact in facts):
        return "their losses are random (Facts.noise, as with neftune), and they would share one forward pass"
    kinds = sorted({fact.reference for fact in facts} - {"none"})
    return f"their references are of different kinds ({', '.join(kinds)})" if len(kinds) > 1 else ""


def check_members(folder: Path, labels: list[str]) -> None:
    """Raise ValueError if `folder` has a sweep whose members are not `labels`."""
    path = folder / "config.json"
    known = run_record.read_saved_json(path).get("members", labels) if path.is_file() else labels
    if known != labels:
        raise ValueError(
            f"{folder}: this sweep has the members {', '.join(known)}, not {', '.join(labels)}. "
            "Choose another --name."
        )


def write_table(
    folder: Path,
    name: str,
    steps: int,
    ends: tuple[Mapping[str, FloatMetrics], Mapping[str, FloatMetrics]],
    failed: list[str],
) -> str:
    """Write the members' results side by side: README.md, summary.json, curves.png. Returns the table as
    text, with a line that names the best member.

    ends: metrics of each member before and after training, by label. failed: labels of members that are not
    finished.
    """
    before, after = ends
    curves = {label: read_entries(folder / label / METRICS) for label in before}
    results = [
        replace(
            ranking.read_result(label, folder / label),
            before=before[label],
            after={**after[label], **_of_training(curves[label])},
        )
        for label in before
    ]
    table, text = ranking.table_of(results), "\n\n".join(ranking.texts(results, markdown=True))
    compare.write(folder, name, table, curves, text)
    summary = {"steps": steps, "members": table.as_json(), "failed": failed}
    summary["ranking"] = ranking.ranking_lines(results)
    run_record.sync_results(folder)
    run_record.write_durable_json(folder / run_record.SUMMARY, summary)
    return "\n\n".join(ranking.texts(results))


def _of_training(entries: list[dict]) -> dict[str, float]:
    """Return {training metric: its last value in a run's log entries}; "skipped" is the number of skipped
    steps, summed over all entries.
    """
    last = {name: entry[name] for entry in entries for name in compare.TRAINED if entry.get(name) is not None}
    return {**last, "skipped": sum(entry.get("skipped", 0) for entry in entries)}
