"""Which of several runs is best: repetitions with other seeds are grouped, and differences on the same
held-out rows have intervals and a verdict.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft.data.rows.mixture import parse_sources
from jaxft.objectives.alarms import Entry
from jaxft.objectives.intervals import (
    Interval,
    Paired,
    interval_of,
    mean_interval,
    paired,
    paired_means,
    wilson,
)
from jaxft.objectives.metrics import HELD_OUT, KL, LOSS, PAIR_COUNT, WEIGHT, count_of
from jaxft.objectives.pair import ACCURACY
from jaxft.objectives.reward_model import ACCURACY as REWARD_ACCURACY
from jaxft.report import compare
from jaxft.report.compare import Logged, first_and_last, held_out
from jaxft.report.statistics import paired_difference
from jaxft.runs.metrics_log import HELD_OUT_ROWS, METRICS, REWARD, SCORES, read_entries
from jaxft.runs.run_record import part_of, read_saved_json

ACCURACIES = (ACCURACY, REWARD_ACCURACY)
SEEDS = ("seed", "data.seed")  # settings of which every value is a repetition
# Parts of config.json that follow from other settings, or that do not change a run's computation.
NOT_SETTINGS = ("name", "seed", "command", "data_fingerprint", "loop", "samples", "trackers", "tracking")
MOST_DIFFERENCES = 8  # runs that are compared with the best one


@dataclass(frozen=True)
class RankedRun:
    """A run in a comparison. before, after: metrics at step 0 and at the end. settings: as in config.json, {}
    if unknown. rows: name of a held-out row -> name of a value, such as loss -> value at the end.
    """

    label: str
    before: Logged
    after: Logged
    settings: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, float]]

    @property
    def seed(self) -> tuple[Any, Any]:
        """The seeds of the run and of its data."""
        return self.settings.get("seed"), part_of(self.settings, "data").get("seed")


class Criterion(NamedTuple):
    """The metric by which runs are ranked. title: its column in tables. metric: its name in metrics.jsonl.
    greater: whether a greater value is better. key: its name among a held-out row's values (RankedRun.rows).
    """

    title: str
    metric: str
    greater: bool
    key: str

    @property
    def of_prompts(self) -> bool:
        """Whether a row is a prompt, whose value is the mean over its completions (rewards and scores)."""
        return self.key == REWARD or self.key.startswith(SCORES)


def read_result(label: str, folder: Path) -> RankedRun:
    """Read a run's folder, whose metrics.jsonl must have an entry. label: the run's name in texts."""
    path = folder / "config.json"
    settings = read_saved_json(path) if path.is_file() else {}
    return RankedRun(label, *first_and_last(read_entries(folder / METRICS)), settings, read_held_out(folder))


def read_held_out(folder: Path) -> dict[str, dict[str, float]]:
    """Read the values of a run's held-out rows: name of the row -> name of the value -> value; {} without
    any. Lines that are not as jaxft writes them are left out.
    """
    path, rows = folder / HELD_OUT_ROWS, {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
            name = values.pop("row")
        except (ValueError, KeyError, AttributeError, TypeError):
            continue
        rows[str(name)] = {key: x for key, x in values.items() if isinstance(x, int | float)}
    return rows


def have_same_loss(results: Sequence[RankedRun]) -> bool:
    """Whether the held-out losses of the runs can be compared: all start from the same base model, and all
    have the same loss function with the same arguments, or are SFT runs, whose held-out loss is the
    cross-entropy.
    """
    weights = {str(result.settings.get("weights")) for result in results}
    functions = {_loss_function(result.settings) for result in results}
    return len(weights) == len(functions) == 1


def _loss_function(settings: Mapping[str, Any]) -> str:
    objective = part_of(settings, "objective")
    if objective.get("callable") == "jaxft.objectives.sft:sft":
        return "sft"
    return json.dumps(objective, sort_keys=True)


def criterion(results: Sequence[RankedRun]) -> Criterion | None:
    """Return the metric that ranks the runs: the first of score, reward, loss (if have_same_loss) and
    accuracy that all runs have and that differs between them. If none differs, the last one that all runs
    have; None if they have none in common.
    """
    scores = [(compare.score_title(name), name) for name in compare.score_names(results[0].after)]
    choices = [Criterion(title, name, True, name.removeprefix(HELD_OUT)) for title, name in scores]
    choices.append(Criterion(compare.HELD_OUT_REWARD, held_out(REWARD), True, REWARD))
    if have_same_loss(results):
        choices.append(Criterion(compare.HELD_OUT_LOSS, held_out(LOSS), False, LOSS))
    choices += [Criterion(compare.HELD_OUT_ACCURACY, held_out(name), True, name) for name in ACCURACIES]
    finite = [c for c in choices if all(_is_finite(r.after.get(c.metric)) for r in results)]
    telling = [c for c in finite if len({r.after[c.metric] for r in results}) > 1]
    return next(iter((*telling, *finite[-1:])), None)


def have_last_evaluation(results: Sequence[RankedRun]) -> list[RankedRun]:
    """Return the runs that were evaluated after training or never (they hold out no rows)."""

    def evaluated(metrics: Logged) -> bool:
        return any(name.startswith(HELD_OUT) for name in metrics)

    return [result for result in results if evaluated(result.after) or not evaluated(result.before)]


def share_held_out(results: Sequence[RankedRun], by: Criterion) -> bool:
    """Whether the values of `by` can be compared: for any two settings, a run of the first and a run of the
    second have the same held-out rows. The seeds of a setting may hold out different rows.
    """
    groups = [{_held_out(run, by) for run in group} for group in repetitions(results).values()]
    return all(not one.isdisjoint(other) for one, other in combinations(groups, 2))


def _held_out(run: RankedRun, by: Criterion) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return (the dataset's files, names of the held-out rows with a value of `by`). Two runs with equal
    results have the same held-out rows.
    """
    data = part_of(run.settings, "data")
    held_out = data.get("held_out")
    dataset = held_out if isinstance(held_out, str) else str(data.get("train"))
    files = tuple(sorted(os.path.abspath(source.ref) for source in parse_sources(dataset)))
    return files, frozenset(name for name, values in run.rows.items() if by.key in values)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


# Repetitions


def repetitions(results: Sequence[RankedRun]) -> dict[str, list[RankedRun]]:
    """Group the runs that differ in nothing but seeds: label of the setting -> its runs. A run without
    settings, or with the seed of a run in the group, is a separate group.
    """
    groups: dict[str, list[RankedRun]] = {}
    for result in results:
        key = json.dumps(_without_seeds(result.settings), sort_keys=True) if result.settings else result.label
        if result.seed in [other.seed for other in groups.get(key, ())]:
            key = f"{key} {result.label}"  # the same run again is no repetition
        groups.setdefault(key, []).append(result)
    labelled: dict[str, list[RankedRun]] = {}
    for group in groups.values():
        label = _group_label(group)
        labelled[", ".join(run.label for run in group) if label in labelled else label] = group
    return labelled


def _without_seeds(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in settings.items() if name not in NOT_SETTINGS}
    data = {name: value for name, value in part_of(settings, "data").items() if name != "seed"}
    return {**kept, "data": data}


def _group_label(results: Sequence[RankedRun]) -> str:
    if len(results) == 1:
        return results[0].label
    parts = [part for part in results[0].label.split(",") if part.partition("=")[0] not in SEEDS]
    labels = [result.label for result in results]
    if "=" in results[0].label:
        return ",".join(parts) or "all seeds"
    return ", ".join(labels[:2]) + (f" and {len(labels) - 2} more" if len(labels) > 2 else "")


def table_of(results: Sequence[RankedRun]) -> compare.Table:
    """Return the table that compares the runs at step 0 and at the end."""
    sides = [r.before for r in results], [r.after for r in results]
    intervals = [intervals_of(result) for result in results]
    return compare.Table.of([r.label for r in results], *sides, have_same_loss(results), intervals)


def intervals_of(result: RankedRun) -> dict[str, Interval]:
    """Return title of a column -> 95 % interval over prompts, for a run's held-out reward and first score."""
    score = next(iter(compare.score_names(result.after)), None)
    keys = {compare.HELD_OUT_REWARD: REWARD, compare.SCORE: (score or "").removeprefix(HELD_OUT)}
    values = {title: [row[key] for row in result.rows.values() if key in row] for title, key in keys.items()}
    return {title: interval_of(known) for title, known in values.items() if len(known) > 1}


def texts(results: Sequence[RankedRun], markdown: bool = False) -> list[str]:
    """Return the summary of several runs: their table, means over seeds, and sentences on which is best."""
    table = table_of(results)
    lines = ranking_lines(results)
    if markdown:
        lines = [f"- {line.strip()}" for line in lines]
    shown = [table.markdown() if markdown else table.text(), repetition_table(results, markdown)]
    return [text for text in (*shown, "\n".join(lines)) if text]


def repetition_table(results: Sequence[RankedRun], markdown: bool = False) -> str:
    """Return a table of means and standard deviations over seeds, "" if no setting has several seeds."""
    repeated = repetitions_as_cells(results)
    if repeated is None:
        return ""
    titles, cells = repeated
    draw = compare.labelled_table if markdown else compare.text_table
    table = draw(titles, [label for label, *_ in cells], [row for _, *row in cells])
    return f"{table}\n\nmean ± standard deviation over seeds"


def repetitions_as_cells(results: Sequence[RankedRun]) -> tuple[list[str], list[list[str]]] | None:
    """Return (column titles, rows of cells) of repetition_table. A row has the setting's label, its number of
    runs, and mean ± standard deviation of each metric but the number of pairs. The label has no title, so a
    row has one more cell than there are titles. Return None if no setting has several seeds.
    """
    groups = repetitions(results)
    if all(len(group) == 1 for group in groups.values()):
        return None
    table = table_of(results)
    values = table.as_json()
    titles = [title for title in table.titles if title != compare.PAIRS]
    cells = [
        [label, str(len(group)), *(_spread([values[r.label][title] for r in group]) for title in titles)]
        for label, group in groups.items()
    ]
    return ["runs", *titles], cells


def _spread(values: Sequence[float | None]) -> str:
    finite = [x for x in values if x is not None and math.isfinite(x)]
    if not finite:
        return "-"
    mean = compare.short_number(float(np.mean(finite)))
    return mean if len(finite) == 1 else f"{mean} ± {compare.short_number(float(np.std(finite, ddof=1)))}"


# Differences


def ranking_lines(results: Sequence[RankedRun]) -> list[str]:
    """Return sentences: which setting is best, with its interval, and how far the others are behind.

    A setting is a run, or several that differ only in seeds. Settings with different held-out rows are not
    ranked, and runs without an evaluation after training are listed as not finished.
    """
    ended = have_last_evaluation(results)
    missing = (result.label for result in results if result not in ended)
    unfinished = [f"{label}: not finished: no evaluation after training" for label in missing]
    return [*_ranking_lines(ended), *unfinished]


def _ranking_lines(results: Sequence[RankedRun]) -> list[str]:
    by = criterion(results) if len(results) > 1 else None
    if by is None:
        return []
    if not share_held_out(results, by):
        return [f"no best run by {by.title}: the runs have different held-out rows"]
    groups = repetitions(results)
    if len(groups) == 1:
        (label, group), values = next(iter(groups.items())), [r.after[by.metric] for r in results]
        return [f"{by.title} over {len(group)} seeds ({label}): {_mean_text(values, by)}"]
    order = sorted(groups, key=lambda label: _mean(groups[label], by), reverse=by.greater)
    best = groups[order[0]]
    lines = [f"best of {len(groups)}: {order[0]}, by {by.title}: {value_of_setting(best, by)}"]
    shown = order[1 : 1 + MOST_DIFFERENCES]
    lines += [f"  {label} against it: {difference_text(best, groups[label], by)}" for label in shown]
    if len(order) > 1 + len(shown):
        lines.append(f"  {len(order) - 1 - len(shown)} more are further behind")
    if len(groups) > 2:
        lines.append("the best of several is partly best by chance: expect a slightly worse one on new rows")
    return lines


def best_labels(results: Sequence[RankedRun]) -> set[str]:
    """Return the labels of the runs of the best setting; one label if it has one seed; none if the runs
    are not ranked.
    """
    results = have_last_evaluation(results)
    by, groups = criterion(results) if len(results) > 1 else None, repetitions(results)
    if by is None or len(groups) == 1 or not share_held_out(results, by):
        return set()
    best = (max if by.greater else min)(groups.values(), key=lambda group: _mean(group, by))
    return {result.label for result in best}


def baseline_lines(results: Sequence[RankedRun], baseline: str) -> list[str]:
    """Return a line for each setting: its accuracy minus the accuracy of the setting with the label
    `baseline`. [] if a run has no accuracy, or no setting has this label.
    """
    name = next((name for name in ACCURACIES if all(held_out(name) in r.after for r in results)), None)
    groups = repetitions(results)
    if name is None or baseline not in groups:
        return []
    by = Criterion(compare.HELD_OUT_ACCURACY, held_out(name), True, name)
    return [
        f"{label} against {baseline}, {by.title}: {difference_text(groups[baseline], group, by)}"
        for label, group in groups.items()
        if label != baseline
    ]


def equal_kl_line(curves: Mapping[str, Sequence[Entry]]) -> str:
    """Return a sentence with each run's accuracy at the same KL to the reference, interpolated between its
    evaluations. The KL is the largest that all runs have reached. "" if a run has no KL or accuracy.

    It compares losses more fairly than the end: a run that is further from the reference is likely to have a
    higher accuracy, whatever its loss. curves: entries of metrics.jsonl by label.
    """
    points = {label: _accuracy_by_kl(entries) for label, entries in curves.items()}
    if len(points) < 2 or any(len(curve) < 2 for curve in points.values()):
        return ""
    kl = min(max(x for x, _ in curve) for curve in points.values())
    if kl <= 0:
        return ""
    texts = [f"{label} {np.interp(kl, *np.array(curve).T):.3f}" for label, curve in points.items()]
    return f"accuracy at the same KL per token, {kl:.3g}, interpolated: {', '.join(texts)}"


def _accuracy_by_kl(entries: Sequence[Entry]) -> list[tuple[float, float]]:
    """Return (KL, accuracy) of each evaluation of a run, sorted. If all pairs are ties, accuracy is 1/2."""
    name, points = held_out(ACCURACY), []
    for entry in entries:
        kl, accuracy = entry.get(held_out(KL)), entry.get(name)
        if name not in entry and entry.get(name + PAIR_COUNT):
            accuracy = 0.5
        if kl is not None and accuracy is not None:  # null stands for a value that was not finite
            points.append((float(kl), float(accuracy)))
    return sorted(points)


def _mean(results: Sequence[RankedRun], by: Criterion) -> float:
    return float(np.mean([result.after[by.metric] for result in results]))


def value_of_setting(results: Sequence[RankedRun], by: Criterion) -> str:
    """Return the value of a setting as text. The interval is over its seeds, or over the held-out rows of its
    only run.
    """
    values = [result.after[by.metric] for result in results]
    if len(values) > 1:
        return _mean_text(values, by)
    (result,), (value,) = results, values
    count = count_of(result.after, by.metric)
    if count:
        return f"{value:.3f} {wilson(value, count.number).text()} of {count.number:,.0f} {count.unit}"
    rows = [row for row in result.rows.values() if by.key in row]
    if by.of_prompts and rows:
        interval = interval_of([row[by.key] for row in rows])
        return f"{value:.3f} {interval.text()} of {len(rows):,} prompts"
    if len(rows) > 1:
        interval = mean_interval([row[by.key] for row in rows], [row.get(WEIGHT, 1.0) for row in rows])
        return f"{value:.3f} {interval.text()} of {len(rows):,} rows"
    return f"{value:.3f}"


def _mean_text(values: Sequence[float], by: Criterion) -> str:
    mean, interval = float(np.mean(values)), mean_interval(values)
    if by.title == compare.HELD_OUT_ACCURACY:
        interval = Interval(max(0.0, interval.low), min(1.0, interval.high))
    spread = float(np.std(values, ddof=1))
    return f"{mean:.3f} {interval.text()}, standard deviation {spread:.3f} over {len(values)} seeds"


def difference_text(best: Sequence[RankedRun], other: Sequence[RankedRun], by: Criterion) -> str:
    """Return the difference `other` - `best` of two settings as text, with its interval and a verdict whether
    it may be chance. It is paired by held-out rows, and by seeds if a setting has several.
    """
    unit = "pairs" if by.title == compare.HELD_OUT_ACCURACY else "prompts" if by.of_prompts else "rows"
    if max(len(best), len(other)) > 1:
        return _difference_over_seeds(best, other, by, unit)
    over_rows = paired_rows(best, other, by)
    if over_rows is None:
        difference = _mean(other, by) - _mean(best, by)
        return f"{difference:+.3f}; without values of the same held-out rows there is no interval"
    return over_rows.text(unit)


def _difference_over_seeds(
    best: Sequence[RankedRun], other: Sequence[RankedRun], by: Criterion, unit: str
) -> str:
    """Return difference_text for settings with several seeds: paired by common seeds and rows
    (statistics.py), or by seeds alone if they have fewer than two common rows. unit: plural noun for rows,
    such as "pairs".
    """
    runs = [{result.seed: result for result in group} for group in (best, other)]
    common = [seed for seed in runs[0] if seed in runs[1]]
    if len(common) < 2:
        return f"{_mean(other, by) - _mean(best, by):+.3f}; run both with the same seeds for an interval"
    first, second = ([group[seed] for seed in common] for group in runs)
    rows = _common_rows([*first, *second], by)
    if len(rows) < 2:
        over_seeds = paired_means(*([r.after[by.metric] for r in group] for group in (first, second)))
        verdict = "different" if over_seeds.distinguishable else "not distinguishable"
        interval = over_seeds.interval.text()
        return f"{over_seeds.difference:+.3f} {interval} over {len(common)} seeds: {verdict}"
    one, two = (np.array([[run.rows[row][by.key] for row in rows] for run in x]) for x in (first, second))
    d = paired_difference(one, two, np.array([first[0].rows[row].get(WEIGHT, 1.0) for row in rows]))
    over = f"over {len(common)} seeds and the same {len(rows):,} {unit}"
    return f"{d.mean:+.3f} {d.interval.text()} {over}: {d.verdict(unit=unit)}"


def _common_rows(runs: Sequence[RankedRun], by: Criterion) -> list[str]:
    """Return the names of the held-out rows that have a value of `by` in all runs."""
    return [row for row in runs[0].rows if all(by.key in run.rows.get(row, {}) for run in runs)]


def paired_rows(one: Sequence[RankedRun], other: Sequence[RankedRun], by: Criterion) -> Paired | None:
    """Compare two settings on the held-out rows that all of their runs have. A row's value is the mean over
    the setting's runs. None: fewer than two such rows.
    """
    every, key = [*one, *other], by.key
    common = _common_rows(every, by)
    if len(common) < 2:
        return None
    first, second = (
        [float(np.mean([run.rows[row][key] for run in group])) for row in common] for group in (one, other)
    )
    if len(every) == 2 and (key in ACCURACIES or by.of_prompts):
        return paired(first, second)  # by paired_fractions if all values are 0, 1/2 or 1
    return paired_means(first, second, [one[0].rows[row].get(WEIGHT, 1.0) for row in common])
