"""Compare runs: a table of their final metrics, and the curves of all of them in one picture."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from jaxft.objectives.alarms import GENERAL_LOSS, REWARD_STD, Entry
from jaxft.objectives.intervals import Interval, wilson
from jaxft.objectives.metrics import HELD_OUT, KL, LOSS, PAIR_COUNT, SKIPPED, TOKEN_ACCURACY
from jaxft.objectives.pair import ACCURACY, CHOSEN_LOGP, MARGIN, REJECTED_LOGP
from jaxft.objectives.reward_model import ACCURACY as REWARD_ACCURACY
from jaxft.objectives.reward_model import MARGIN as REWARD_MARGIN
from jaxft.report.charts import comparison_panels, draw
from jaxft.runs.metrics_log import COMPLETION_KL, COMPLETION_LENGTH, REWARD, SCORES
from jaxft.runs.run_record import CARD
from jaxft.runs.terminal import markdown_table

Logged = Mapping[str, float]  # metrics by name
# (metrics at step 0, metrics at the end) -> a cell's value; None: no value
Column = Callable[[Logged, Logged], float | None]


def held_out(name: str) -> str:
    """Return the name of a metric on held-out rows: "eval_loss" for "loss"."""
    return HELD_OUT + name


def first_and_last(entries: Sequence[Entry]) -> tuple[Logged, Logged]:
    """Return (metrics of a run's first evaluation, metrics at its end). entries: lines of metrics.jsonl.

    The metrics at the end are the metrics of the last training step and of the last evaluation; an evaluation
    before the first step does not count as the last.
    """
    evaluations: list[Logged] = [{}]
    step: Logged = {}
    evaluated: int | None = None
    for entry in entries:
        numbers = {k: x for k, x in entry.items() if isinstance(x, int | float) and k != "step"}
        if any(name.startswith(HELD_OUT) for name in entry):
            evaluations.append(numbers)
            evaluated = entry["step"]
        elif LOSS in entry:
            step = numbers
    return evaluations[:2][-1], {**step, **({} if evaluated == 0 else evaluations[-1])}


# The table


def _over_start(name: str) -> Column:
    """Return the column of a metric divided by its value at step 0; None if that is not positive."""

    def column(before: Logged, after: Logged) -> float | None:
        return after[name] / before[name] if name in after and before.get(name, 0) > 0 else None

    return column


def _last(*choices: str) -> Column:
    """Return the column of the final value of the first metric in `choices` that a run has."""

    def column(before: Logged, after: Logged) -> float | None:
        return next((after[name] for name in choices if name in after), None)

    return column


def _gained(name: str, minus: str | None = None) -> Column:
    """Return the column of the growth of the metric `name`, minus the growth of `minus` if it is given."""
    needed = [name] if minus is None else [name, minus]

    def column(before: Logged, after: Logged) -> float | None:
        if not all(each in side for each in needed for side in (before, after)):
            return None
        first, *rest = (after[each] - before[each] for each in needed)
        return first - sum(rest)

    return column


def _scores_in_deviations(before: Logged, after: Logged) -> float | None:
    """Return the growth of the mean score, before penalties and bounds, divided by the scores' standard
    deviation at step 0. None for several reward functions, and if the score is the reward itself.
    """
    prefix, suffix = held_out("rewards/"), "/mean"
    means = [name for name in after if name.startswith(prefix) and name.endswith(suffix)]
    reward = held_out(REWARD)
    if len(means) != 1 or all(side.get(means[0]) == side.get(reward) for side in (before, after)):
        return None
    return _growth(before, after, means[0], means[0].removesuffix(suffix) + "/std")


def _growth(before: Logged, after: Logged, name: str, deviation: str) -> float | None:
    if not before.get(deviation) or name not in before or name not in after:
        return None
    return (after[name] - before[name]) / before[deviation]


def score_names(metrics: Logged) -> list[str]:
    """Return the names of the metrics that are mean scores of held-out completions."""
    return [name for name in metrics if name.startswith(held_out(SCORES))]


def score_title(name: str) -> str:
    """Return the title of a metric that score_names returns, such as "score json_match"."""
    return f"score {name.removeprefix(held_out(SCORES))}"


def _score(before: Logged, after: Logged) -> float | None:
    """Return the final value of the first metric that score_names returns, None if there is none."""
    return next((after[name] for name in score_names(after)), None)


ARROW = " → "  # from the value before training to that after it
TIES = "ties"  # an accuracy where all pairs are ties
HELD_OUT_REWARD, HELD_OUT_LOSS, HELD_OUT_ACCURACY = "held-out reward", "held-out loss", "accuracy"
SCORE, RELATIVE_LOSS, PAIRS = "score", "loss over step 0", "pairs"
# Title -> column. The held-out rows of all runs of a sweep are the same, so that sums of log-probs compare.
COLUMNS: dict[str, Column] = {
    HELD_OUT_REWARD: _last(held_out(REWARD)),
    "reward gained": _gained(held_out(REWARD)),
    "in deviations": partial(_growth, name=held_out(REWARD), deviation=held_out(REWARD_STD)),
    "scores alone": _scores_in_deviations,
    SCORE: _score,
    "KL per completion": _last(held_out(COMPLETION_KL)),
    "tokens per completion": _last(held_out(COMPLETION_LENGTH)),
    HELD_OUT_LOSS: _last(held_out(LOSS)),
    RELATIVE_LOSS: _over_start(held_out(LOSS)),
    HELD_OUT_ACCURACY: _last(held_out(ACCURACY), held_out(REWARD_ACCURACY)),
    PAIRS: _last(*(held_out(name) + PAIR_COUNT for name in (ACCURACY, REWARD_ACCURACY))),
    "token accuracy": _last(held_out(TOKEN_ACCURACY)),
    "margin": _last(held_out(REWARD_MARGIN)),
    "margin, nats": _gained(held_out(CHOSEN_LOGP), held_out(REJECTED_LOGP)),
    "chosen, nats": _gained(held_out(CHOSEN_LOGP)),
    "KL per token": _last(held_out(KL)),
    "general loss": _last(GENERAL_LOSS),
    "last step's loss": _last(LOSS),
    "last step's accuracy": _last(ACCURACY, REWARD_ACCURACY),
    "last step's margin": _last(MARGIN, REWARD_MARGIN),
    "skipped steps": _last(SKIPPED),
}
# Columns whose cells have the value at step 0 too.
WITH_START = (HELD_OUT_LOSS, HELD_OUT_ACCURACY, HELD_OUT_REWARD, SCORE, "token accuracy", "margin",
              "general loss")  # fmt: skip
# Metrics of the last training step, which the table shows if no run holds out rows.
TRAINED = (LOSS, ACCURACY, MARGIN, REWARD_ACCURACY, REWARD_MARGIN)
NOTES = {
    HELD_OUT_ACCURACY: "accuracy: fraction of held-out pairs whose chosen completion has the higher reward; "
    "a tie counts 1/2; in brackets its 95 % interval",
    RELATIVE_LOSS: "loss over step 0: losses of different functions, held-out rows or tokenizers "
    "don't compare with one another",
    "margin": "margin: chosen reward minus rejected reward, mean over held-out pairs",
    "margin, nats": "margin: growth of the log-prob difference of a pair's completions since step 0, mean",
    "KL per token": "KL per token: to the reference, estimated on the tokens of chosen completions",
    "skipped steps": "skipped steps: loss, gradient or update was not finite, so the step changed nothing",
    HELD_OUT_REWARD: "held-out reward: of completions that are sampled with the same keys every time; "
    "in brackets the 95 % interval over the prompts",
    "in deviations": "in deviations: reward gained over the standard deviation of rewards at step 0",
    "scores alone": "scores alone: as in deviations, for the scores before penalties such as missing_eos",
    SCORE: "score: mean over completions of held-out prompts, by the first function of scoring.by; in "
    "brackets its 95 % interval over the prompts",
    "KL per completion": "KL per completion: log-prob of sampled completions minus the reference's, in nats",
    "chosen, nats": "chosen: growth of the log-prob of chosen completions since step 0",
    "general loss": "general loss: per token, on text about other subjects; it rises where the model forgets",
}


@dataclass(frozen=True)
class Table:
    """A table with one row per run. titles: of the columns in which at least one run has a value. rows,
    starts: values at the end and at step 0, None where a run has none. intervals: for each run title -> 95 %
    interval of the value at the end; () for none.
    """

    labels: tuple[str, ...]
    titles: tuple[str, ...]
    rows: tuple[tuple[float | None, ...], ...]
    starts: tuple[tuple[float | None, ...], ...]
    intervals: tuple[Mapping[str, Interval], ...] = ()

    @staticmethod
    def of(
        labels: Sequence[str],
        before: Sequence[Logged],
        after: Sequence[Logged],
        same_loss: bool = True,
        intervals: Sequence[Mapping[str, Interval]] = (),
    ) -> "Table":
        """Build the table from each run's metrics at step 0 (before) and at the end (after).

        same_loss: the runs have the same loss function, so that the losses compare as they are; otherwise the
        table also has each loss divided by its value at step 0.
        """
        sides = list(zip(before, after, strict=True))
        columns = {title: [column(*side) for side in sides] for title, column in COLUMNS.items()}
        if any(x is not None for x in columns[HELD_OUT_ACCURACY]):
            del columns["token accuracy"]
        if any(x is not None for x in columns[HELD_OUT_LOSS]):
            columns = {t: values for t, values in columns.items() if not t.startswith("last step")}
        if not any(columns["skipped steps"]):
            del columns["skipped steps"]
        if same_loss:
            del columns[RELATIVE_LOSS]
        known = {t: values for t, values in columns.items() if any(x is not None for x in values)}
        starts = {title: [COLUMNS[title](first, first) for first in before] for title in known}
        rows, first = (tuple(zip(*x.values(), strict=True)) or ((),) * len(labels) for x in (known, starts))
        return Table(tuple(labels), tuple(known), rows, first, tuple(intervals))

    def cells(self) -> list[list[str]]:
        """Return a row of texts for each run: the value at the end, or `start → end`, with its interval."""
        cells = []
        intervals = self.intervals or ({},) * len(self.rows)
        for *both, known in zip(self.starts, self.rows, intervals, strict=True):
            start, row = (dict(zip(self.titles, side, strict=True)) for side in both)
            after = {title: f" {interval.text(2)}" for title, interval in known.items()}
            cells.append([_cell(title, start, row) + after.get(title, "") for title in self.titles])
        return cells

    def text(self) -> str:
        """Return the table for a terminal or a log, with explanations of its columns."""
        return "\n".join([text_table(self.titles, self.labels, self.cells()), *self.notes()])

    def markdown(self) -> str:
        """Return the table in Markdown, with explanations of its columns."""
        notes = "\n".join(f"- {note}" for note in self.notes())
        return f"{labelled_table(self.titles, self.labels, self.cells())}\n\n{notes}"

    def as_json(self) -> dict[str, dict[str, float | None]]:
        """Return label -> title -> unrounded value at the end; also "TITLE before" for WITH_START."""
        values = {}
        for label, row, start in zip(self.labels, self.rows, self.starts, strict=True):
            before = {f"{t} before": x for t, x in zip(self.titles, start, strict=True) if t in WITH_START}
            values[label] = {**dict(zip(self.titles, row, strict=True)), **before}
        return values

    def notes(self) -> list[str]:
        """Return an explanation for each column that needs one."""
        arrow = ["before → after training"] if any(title in WITH_START for title in self.titles) else []
        return [*arrow, *(NOTES[title] for title in self.titles if title in NOTES)]


def _cell(title: str, start: Mapping[str, float | None], row: Mapping[str, float | None]) -> str:
    """Return the text of a run's cell in a column: its value at the end, "before → after" for a column of
    WITH_START, "-" for no value. start, row: the values at step 0 and at the end, by title.
    """
    first, value, pairs = start[title], row[title], row.get(PAIRS)
    if title == PAIRS:
        return "-" if value is None else f"{value:,.0f}"
    if title == HELD_OUT_ACCURACY and pairs:
        after = TIES if value is None else f"{short_number(value)} {wilson(value, pairs).text(2)}"
        return f"{TIES if first is None else short_number(first)}{ARROW}{after}"
    before = f"{short_number(first)}{ARROW}" if title in WITH_START and first is not None else ""
    return before + short_number(value)


def text_table(titles: Sequence[str], labels: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a table for a terminal or a log. titles: of the columns. labels, cells: of each row."""
    table = RichTable("", box=box.SIMPLE, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for label, row in zip(labels, cells, strict=True):
        table.add_row(label, *row)
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    file, width = io.StringIO(), 40 + sum(widths) + 4 * len(titles) + max(map(len, labels))
    Console(file=file, width=width, no_color=True).print(table)
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    return "\n".join(line for line in lines if line)


def labelled_table(titles: Sequence[str], labels: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown whose first column has no title. labels, cells: of each row."""
    return markdown_table(["", *titles], [[label, *row] for label, row in zip(labels, cells, strict=True)])


def short_number(x: float | None) -> str:
    """Return a number with three or four significant digits, "-" for None."""
    if x is None or not math.isfinite(x):
        return "-" if x is None else str(x)
    return f"{x:.3g}" if abs(x) < 1e-3 and x else f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"


# Files


def write(
    folder: Path, name: str, table: Table, curves: Mapping[str, Sequence[Entry]], text: str | None = None
) -> None:
    """Write a comparison of runs into `folder`: README.md with the table, and curves.png.

    name: the title. curves: entries of metrics.jsonl by label. text: Markdown in place of the table.
    """
    draw(folder / "curves.png", comparison_panels(curves), name)
    links = "\n".join(f"- [{label}](<{label}/README.md>)" for label in table.labels)
    picture = "![Curves of all runs](curves.png)"
    content = table.markdown() if text is None else text
    page = f"# {name}\n\n{content}\n\n{picture}\n\nThe runs, each with its adapter:\n{links}\n"
    (folder / CARD).write_text(page, encoding="utf-8")
