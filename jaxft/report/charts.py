"""The charts of runs: which metrics are drawn together, with titles, units and the curves of metrics.jsonl.

A run's PNG pictures and its report show the same charts.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.distributed.disk import make_folder, write_durably
from jaxft.objectives.alarms import CLIPPED_RATIO, GENERAL_LOSS, REWARD_STD, Entry
from jaxft.objectives.decision import BRIER, ECE
from jaxft.objectives.intervals import Interval, wilson
from jaxft.objectives.metrics import ENTROPY, GRAD_NORM, HELD_OUT, KL, LOSS, SKIPPED, TOKEN_ACCURACY, count_of
from jaxft.objectives.pair import ACCURACY, CHOSEN_LOGP, CHOSEN_REWARD, MARGIN, REJECTED_LOGP, REJECTED_REWARD
from jaxft.objectives.policy import VALUE_LOSS
from jaxft.objectives.reward_model import ACCURACY as REWARD_ACCURACY
from jaxft.objectives.reward_model import MARGIN as REWARD_MARGIN
from jaxft.runs.metrics_log import (
    COMPLETION_KL,
    COMPLETION_LENGTH,
    LEARNING_RATE,
    MEMORY,
    MFU,
    REWARD,
    SCORES,
    SPEED,
    read_entries,
)

Points = tuple[Sequence[float], Sequence[float]]  # x, y
# distinguishable with any colour vision
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#444444",
)  # fmt: skip
STYLES = ("-", (0, (6, 2)), (0, (1, 1.2)))  # after the colours are used up


@dataclass(frozen=True)
class Panel:
    """Axes with curves, such as one per run.

    x, y: labels of the axes. curves: label -> points; the label is in the legend. dashed, faint: label ->
    points of a second curve in the same colour, dashed or pale (as for values before smoothing). level: y of
    a horizontal line. log_x: x is logarithmic from its smallest positive value on, and linear below it.
    """

    title: str
    x: str
    y: str
    curves: Mapping[str, Points]
    dashed: Mapping[str, Points] = field(default_factory=dict)
    level: float | None = None
    faint: Mapping[str, Points] = field(default_factory=dict)
    log_x: bool = False


def draw(path: Path, panels: Sequence[Panel], title: str, columns: int = 3) -> None:
    """Write a PNG with the panels that have a curve, `columns` panels side by side, and one legend below.
    Raises ValueError if no panel has a curve.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # without a display and pyplot's globals
    from matplotlib.figure import Figure

    panels = [p for p in panels if any(len(x) for x, _ in (*p.curves.values(), *p.dashed.values()))]
    if not panels:
        raise ValueError(f"{path}: no curve to draw, since the runs have logged no metric; train them first")
    labels = list(dict.fromkeys(label for panel in panels for label in (*panel.curves, *panel.dashed)))
    wide = min(columns, len(panels))
    high = -(-len(panels) // wide)
    legend_rows = -(-len(labels) // (2 * wide))
    size = (4.2 * wide, 3.1 * high + 0.4 + 0.22 * legend_rows)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(high, wide, squeeze=False).ravel()
    for panel, ax in zip(panels, axes, strict=False):
        _panel(ax, panel, labels)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    handles = [axes[0].plot([], [], label=label, **_look(labels.index(label)))[0] for label in labels]
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": min(len(labels), 2 * wide)}
    figure.legend(handles=handles, **place, fontsize=8, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    make_folder(path.parent)
    write_durably(path, picture.getvalue())


def _look(number: int) -> dict[str, Any]:
    style = STYLES[number // len(COLOURS) % len(STYLES)]
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": style, "linewidth": 1.6 if number else 2.2}


def _panel(ax: Any, panel: Panel, labels: list[str]) -> None:
    if panel.level is not None:
        ax.axhline(panel.level, color="#999999", linewidth=0.8, linestyle=":")
    for label, (x, y) in panel.curves.items():
        marker = {"marker": "o", "markersize": 3.5} if len(x) < 12 else {}
        number = labels.index(label)
        ax.plot(x, y, **_look(number), **marker, zorder=3 + 1 / (1 + number))  # the first one on top
    for label, (x, y) in panel.faint.items():
        ax.plot(x, y, color=_look(labels.index(label))["color"], linewidth=0.7, alpha=0.3, zorder=2)
    for label, (x, y) in panel.dashed.items():
        ax.plot(x, y, **{**_look(labels.index(label)), "linestyle": "--", "linewidth": 1.0, "alpha": 0.7})
    positive = [value for x, _ in panel.curves.values() for value in x if value > 0]
    if panel.log_x and positive:
        ax.set_xscale("symlog", linthresh=min(positive))
    ax.set_title(panel.title, fontsize=9)
    ax.set_xlabel(panel.x, fontsize=8)
    ax.set_ylabel(panel.y, fontsize=8)
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.25, linewidth=0.5)


X_AXIS, LOSS_TITLE = "optimizer step", "Loss"  # titles of an axis and of a chart
FEWEST_TO_SMOOTH = 16  # points of a curve
NOISE, SHORTEST_PART = 0.06, 8  # of smoothing_factor: noise left, over the curve's change; parts
TRAINING, HELD_OUT_ROWS = "training rows", "held-out rows"


@dataclass(frozen=True)
class ChartLine:
    """A metric in a chart. metric: its name in metrics.jsonl. label: its name in the legend, "" if it is the
    chart's only metric."""

    metric: str
    label: str = ""


@dataclass(frozen=True)
class ChartKind:
    """A chart: the metrics that share its axes. unit: the label of the y axis. about: how to read it."""

    title: str
    unit: str
    lines: tuple[ChartLine, ...]
    about: str = ""


@dataclass(frozen=True)
class RunCurve:
    """A metric of a run by step, on training or held-out rows. label: as in ChartLine. values: None where it
    was not finite.

    intervals: the 95 % interval of each value, None for a value that is not a fraction of a known number of
    pairs or prompts; () if all are None.
    """

    label: str
    held_out: bool
    steps: tuple[int, ...]
    values: tuple[float | None, ...]
    intervals: tuple[Interval | None, ...] = ()


@dataclass(frozen=True)
class Chart:
    """A chart with the curves of each run, by the run's name."""

    kind: ChartKind
    curves: Mapping[str, tuple[RunCurve, ...]]


def single_chart(title: str, unit: str, metric: str, about: str = "") -> ChartKind:
    """Return the ChartKind of one metric. unit: label of the y axis. about: how to read the chart."""
    return ChartKind(title, unit, (ChartLine(metric),), about)


MARGINS = {MARGIN, REWARD_MARGIN}
RESPONSES = {CHOSEN_REWARD, REJECTED_REWARD}
PAIR_CHARTS = (
    ChartKind(
        "Accuracy of the rewards",
        "fraction of pairs",
        (ChartLine(ACCURACY), ChartLine(REWARD_ACCURACY)),
        "Pairs whose chosen response has the higher reward; 0.5 is chance. Bars: 95 % intervals on held-out "
        "pairs; nothing is drawn where all pairs are ties.",
    ),
    ChartKind("Margin of the rewards", "chosen minus rejected reward",
              (ChartLine(MARGIN), ChartLine(REWARD_MARGIN))),
    ChartKind("Log-probability of the responses", "nats per response",
              (ChartLine(CHOSEN_LOGP, "chosen"), ChartLine(REJECTED_LOGP, "rejected")),
              "If chosen falls along with rejected, probability moves to responses in no pair."),
    ChartKind("Rewards of the responses", "reward per response",
              (ChartLine(CHOSEN_REWARD, "chosen"), ChartLine(REJECTED_REWARD, "rejected"))),
)  # fmt: skip
DECISION_CHARTS = (
    single_chart("Accuracy of the decisions", "fraction of decisions", REWARD_ACCURACY),
    single_chart(
        "Calibration error (ECE)", "mean difference to the accuracy", ECE,
        "How far confidences are from accuracies, over 15 bins of equal width; of a few decisions, such as "
        "a training step's, it is mostly noise.",
    ),
    single_chart("Brier score", "squared difference of probabilities", BRIER),
    single_chart("Entropy of the choices", "nats per decision", ENTROPY),
)  # fmt: skip
ROLLOUT_CHARTS = (
    single_chart("Reward", "reward per completion", REWARD),
    single_chart("Spread of the rewards", "standard deviation", REWARD_STD),
    single_chart("KL to the reference", "nats per completion", COMPLETION_KL),
    single_chart("Length of completions", "tokens per completion", COMPLETION_LENGTH),
    single_chart("Completions truncated at the limit", "fraction of completions", CLIPPED_RATIO),
    single_chart("Loss of the value function", "squared error per token", VALUE_LOSS),
)
TOKEN_CHARTS = (
    single_chart("Token accuracy", "fraction of tokens", TOKEN_ACCURACY),
    single_chart("Entropy of the next token", "nats per token", ENTROPY),
    single_chart("Loss on general text", "nats per token", GENERAL_LOSS,
                 "On a text about other subjects; it rises where the model forgets."),
)  # fmt: skip
STEP_CHARTS = (
    single_chart("Learning rate", "learning rate", LEARNING_RATE),
    single_chart("Gradient norm", "norm before clipping", GRAD_NORM),
    single_chart("Skipped steps", "steps since the last entry", SKIPPED,
                 "Steps whose loss, gradient or update was not finite; they changed nothing."),
    single_chart("Speed", "tokens per second", SPEED),
    single_chart("Use of the hardware", "fraction of the peak FLOP/s", MFU),
    single_chart("Memory", "GiB, highest so far", MEMORY),
)  # fmt: skip


def loss_unit(known: Set[str]) -> str:
    """Return the unit of a run's loss from the names of its metrics.

    A run with margins compares pairs, also of its own completions (online DPO). Single responses with labels
    (KTO) have rewards and no margin.
    """
    if known & MARGINS:
        return "loss per pair"
    if ECE in known:
        return "loss per decision"
    if known & RESPONSES:
        return "loss per response"
    return "policy loss per token" if REWARD in known else "nats per token"


def learning_kinds(runs: Mapping[str, Sequence[Entry]]) -> list[ChartKind]:
    """Return the kinds of charts that show learning (losses, rewards, accuracies, KL) for these runs.

    runs: entries of metrics.jsonl by the run's name. Some kinds may have no value in these runs.
    """
    entries = [entry for run_entries in runs.values() for entry in run_entries]
    known = _metric_names(entries)
    units = {loss_unit(_metric_names(run_entries)) for run_entries in runs.values() if run_entries}
    unit = units.pop() if len(units) == 1 else "loss (units differ between the runs)"
    has_rollouts = REWARD in known
    kinds = [
        single_chart(f"Score of held-out completions: {name.removeprefix(SCORES)}", "mean score", name)
        for name in known
        if name.startswith(SCORES)
    ]
    kinds.append(single_chart(LOSS_TITLE, unit, LOSS))
    functions = [name for name in known if name.startswith("rewards/") and name.endswith("/mean")]
    rewards = tuple(ChartLine(name, name.split("/", 1)[1].removesuffix("/mean")) for name in functions)
    if has_rollouts:
        kinds += ROLLOUT_CHARTS
        if len(rewards) > 1:
            kinds.insert(2, ChartKind("Reward by function", "score per completion", rewards))
    if ECE in known and not known & MARGINS:
        general = [kind for kind in TOKEN_CHARTS if kind.lines[0].metric == GENERAL_LOSS]
        return [*kinds, *DECISION_CHARTS, *general]
    kinds += PAIR_CHARTS
    if not has_rollouts:
        kinds.append(single_chart("KL to the reference", "nats per token", KL))
    return [*kinds, *TOKEN_CHARTS]


def _metric_names(entries: Iterable[Entry]) -> Set[str]:
    """Return the names of metrics in the order of the entries, without the prefix of held-out rows."""
    return dict.fromkeys(name.removeprefix(HELD_OUT) for entry in entries for name in entry).keys()


def make_charts(runs: Mapping[str, Sequence[Entry]], kinds: Iterable[ChartKind]) -> list[Chart]:
    """Return the charts of these kinds with the curves of the runs. Charts without a value are left out, and
    the one of skipped steps if no step was skipped.

    runs: entries of metrics.jsonl by the run's name.
    """
    has_skipped = any(entry.get(SKIPPED) for entries in runs.values() for entry in entries)
    charts = []
    for kind in kinds:
        curves = {name: run_curves(entries, kind) for name, entries in runs.items()}
        if any(curves.values()) and (has_skipped or kind.lines[0].metric != SKIPPED):
            charts.append(Chart(kind, curves))
    return charts


def run_curves(entries: Sequence[Entry], kind: ChartKind) -> tuple[RunCurve, ...]:
    """Return the curves of a run in a chart, except curves without any finite value."""
    curves = []
    for line in kind.lines:
        for metric, held_out in ((line.metric, False), (HELD_OUT + line.metric, True)):
            points = [
                (entry["step"], value, _interval(entry, metric))
                for entry in entries
                for value in _values(entry, metric)
            ]
            if any(value is not None for _, value, _ in points):
                steps, values, intervals = zip(*points, strict=True)
                is_text = metric == GENERAL_LOSS  # no run trains on the general text
                intervals = intervals if any(intervals) else ()
                curves.append(RunCurve(line.label, held_out or is_text, steps, values, intervals))
    return tuple(curves)


def _interval(entry: Entry, metric: str) -> Interval | None:
    """Return the 95 % interval of a metric that is a fraction of pairs or prompts, if the entry has their
    number; else None.
    """
    value, count = entry.get(metric), count_of(entry, metric)
    if not isinstance(value, int | float) or count is None or not isinstance(count.number, int | float):
        return None
    return wilson(value, count.number) if count.number > 0 and 0 <= value <= 1 else None


def _values(entry: Entry, metric: str) -> list[float | None]:
    """Return [value] of a metric in a log entry or in its `perf`; [None] if the value is not finite, [] if
    the entry lacks the metric.
    """
    perf = entry.get("perf")
    source = entry if metric in entry else perf if isinstance(perf, dict) else {}
    value = source.get(metric, "")
    if isinstance(value, bool) or not (value is None or isinstance(value, int | float)):
        return []
    return [value]


# Noise


def smoothing_factor(curve: RunCurve) -> float:
    """Return the factor f of the exponential moving average that smooths a noisy curve in the report; 0 for a
    curve that is shown as it is.

    The noise s is the standard deviation of differences between neighbours, divided by sqrt(2); a trend
    hardly changes it. The average of white noise has the deviation s sqrt((1 - f) / (1 + f)). f is the
    smallest factor for which this deviation is at most NOISE times the curve's change, but it averages over
    at most an eighth of the curve. The change: the means of eight parts of the curve, the largest minus the
    smallest. Curves of held-out rows are not smoothed: their rows are the same every time.
    """
    known = np.array([x for x in curve.values if x is not None and math.isfinite(x)])
    if curve.held_out or len(known) < FEWEST_TO_SMOOTH:
        return 0.0
    noise = float(np.diff(known).std() / math.sqrt(2))
    means = [part.mean() for part in np.array_split(known, SHORTEST_PART)]
    allowed = NOISE * (max(means) - min(means))
    if noise <= allowed:
        return 0.0
    left = (allowed / noise) ** 2
    return min(1 - SHORTEST_PART / len(known), (1 - left) / (1 + left))


def smoothed(values: Sequence[float | None], factor: float) -> list[float | None]:
    """Return the exponential moving average of a curve, corrected for its start at 0 as in Adam; None stays
    None.
    """
    total = weight = 0.0
    averages: list[float | None] = []
    for value in values:
        if value is None:
            averages.append(None)
            continue
        total, weight = factor * total + (1 - factor) * value, factor * weight + (1 - factor)
        averages.append(total / weight)
    return averages


# Pictures


def draw_pictures(folder: Path, entries: Sequence[Entry], name: str) -> list[str]:
    """Draw curves.png (loss, rewards, accuracy) and training.png (learning rate, gradient, speed, memory)
    into `folder`. Return the names of the written files; a picture without any curve is not written.
    """
    runs = {name: entries}
    files = {"curves.png": learning_kinds(runs), "training.png": STEP_CHARTS}
    drawn = []
    for file, kinds in files.items():
        charts = make_charts(runs, kinds)
        if charts:
            draw(folder / file, [chart_panel(chart, name) for chart in charts], name)
            drawn.append(file)
    return drawn


def comparison_panels(runs: Mapping[str, Sequence[Entry]]) -> list[Panel]:
    """Return the charts of learning, each with a curve per run. The curves are of held-out rows, with those
    of training rows dashed, or of training rows alone if no run holds out rows.

    Losses that begin more than a factor of 3 apart are divided by their first values. runs: entries of
    metrics.jsonl by label.
    """
    panels = []
    for chart in make_charts(runs, learning_kinds(runs)):
        curves = [(run, curve) for run, run_curves in chart.curves.items() for curve in run_curves]
        for label in dict.fromkeys(curve.label for _, curve in curves):
            sides: list[dict[str, Points]] = [
                {run: _known_points(c.steps, smoothed(c.values, smoothing_factor(c)))
                 for run, c in curves if (c.label, c.held_out) == (label, is_held)}
                for is_held in (True, False)
            ]  # fmt: skip
            title, unit = ", ".join(filter(None, (chart.kind.title, label))), chart.kind.unit
            starts = {run: y[0] for run, (_, y) in sides[0].items()}
            is_loss = chart.kind.title == LOSS_TITLE
            if is_loss and starts and max(starts.values()) > 3 * min(starts.values()) > 0:
                title, unit = f"{title} over its value at the start", "ratio"
                sides = [
                    {run: (x, [v / starts[run] for v in y]) for run, (x, y) in side.items() if run in starts}
                    for side in sides
                ]
            held, trained = sides
            of_held = Panel(f"{title}, held out", X_AXIS, unit, held, trained)
            panels.append(of_held if held else Panel(title, X_AXIS, unit, trained))
    return panels


def compared_metrics(runs: Mapping[str, Sequence[Entry]]) -> set[str]:
    """Return the metrics that comparison_panels draws, without the prefix of held-out rows."""
    return {line.metric for kind in learning_kinds(runs) for line in kind.lines}


def chart_panel(chart: Chart, run: str) -> Panel:
    """Return a run's curves of a chart as a panel; a noisy curve is smoothed, with its values faint."""
    curves, faint = {}, {}
    for curve in chart.curves[run]:
        label = ", ".join(part for part in (curve.label, side_label(curve)) if part)
        factor = smoothing_factor(curve)
        if factor:
            faint[label] = _known_points(curve.steps, curve.values)
        curves[label] = _known_points(curve.steps, smoothed(curve.values, factor))
    return Panel(chart.kind.title, X_AXIS, chart.kind.unit, curves, faint=faint)


def _known_points(steps: Sequence[int], values: Sequence[float | None]) -> Points:
    points = [(x, y) for x, y in zip(steps, values, strict=True) if y is not None]
    return [x for x, _ in points], [y for _, y in points]


def side_label(curve: RunCurve) -> str:
    """Return the rows that a curve is about: "held-out rows" or "training rows"."""
    return HELD_OUT_ROWS if curve.held_out else TRAINING


def pictures_section(folder: Path) -> str:
    """Draw a run's pictures, and return Markdown that shows them in its model card; "" if it has none."""
    files = draw_pictures(folder, read_entries(folder / "metrics.jsonl"), folder.name)
    titles = {"curves.png": "Curves", "training.png": "Learning rate, gradient norm, speed and memory"}
    lines = [f"![{titles[file]}]({file})" for file in files]
    note = "Noisy curves are smoothed (exponential moving average); the faint lines are the values."
    return "\n".join(["## Curves", "", *lines, "", note, ""]) if lines else ""
