"""The curves of a report as JSON, for page.js."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.objectives.alarms import Entry
from jaxft.runs.charts import (
    STEP_CHARTS,
    X_AXIS,
    Chart,
    RunCurve,
    learning_kinds,
    make_charts,
    side_label,
    smoothing_factor,
)
from jaxft.runs.plots import COLOURS
from jaxft.runs.terminal import printable_message

POINTS = 48_000  # of all curves together, some 800 kB
FEWEST, MOST = 40, 2000  # points of a curve
# On a dark ground, in the order of COLOURS; distinguishable with any colour vision.
DARK_COLOURS = (
    "#4197ab",
    "#ff8138",
    "#28cb91",
    "#fb90e8",
    "#e0e277",
    "#91fbff",
    "#cc7afa",
    "#f0b6cd",
)


def curves_json(runs: Mapping[str, Sequence[Entry]]) -> dict[str, Any]:
    """Return the runs' names, palettes, and the charts in groups with their curves.

    Curves with more points than the page can hold show the lowest and the highest value of each range of
    steps.
    """
    groups = {
        "Learning": make_charts(runs, learning_kinds(runs)),
        "Optimizer, speed and memory": make_charts(runs, STEP_CHARTS),
    }
    count = sum(len(own) for charts in groups.values() for chart in charts for own in chart.curves.values())
    most = max(FEWEST, min(MOST, POINTS // max(1, count)))
    return {
        "runs": [printable_message(name) for name in runs],
        "x": X_AXIS,
        "palettes": {"light": COLOURS, "dark": DARK_COLOURS},
        "groups": [
            {"title": title, "charts": [chart_json(chart, most) for chart in charts]}
            for title, charts in groups.items()
            if charts
        ],
    }


def chart_json(chart: Chart, most: int) -> dict[str, Any]:
    """Return a chart with curves of at most `most` points."""
    curves = [
        curve_json(number, curve, most) for number, own in enumerate(chart.curves.values()) for curve in own
    ]
    kind = chart.kind
    texts = {"title": kind.title, "unit": kind.unit, "about": kind.about}
    return {**{name: printable_message(text) for name, text in texts.items()}, "curves": curves}


def curve_json(run: int, curve: RunCurve, most: int) -> dict[str, Any]:
    """Return a curve of the run with that number."""
    x, y = thinned(curve.steps, curve.values, most)
    whole = len(x) == len(curve.intervals)
    bars = [[float(f"{end:.4g}") for end in one] if one else None for one in curve.intervals] if whole else []
    return {
        "run": run,
        "label": printable_message(curve.label),
        "rows": side_label(curve),
        "heldOut": curve.held_out,
        "bars": bars,
        "smoothing": round(smoothing_factor(curve), 3),
        "x": x,
        "y": [None if value is None else float(f"{value:.6g}") for value in y],
    }


def thinned(
    steps: Sequence[int], values: Sequence[float | None], most: int
) -> tuple[list[int], list[float | None]]:
    """Return a curve with about `most` points: the lowest and the highest of equal ranges of its points, and
    the first that is not finite.
    """
    if len(steps) <= most:
        return list(steps), list(values)
    size = -(-2 * len(steps) // most)
    kept: list[int] = []
    for begin in range(0, len(steps), size):
        part = range(begin, min(begin + size, len(steps)))
        finite = [(value, i) for i in part if (value := values[i]) is not None]
        gap = [i for i in part if values[i] is None][:1]
        kept += sorted({*gap, *(i for _, i in (min(finite), max(finite)))}) if finite else gap
    return [steps[i] for i in kept], [values[i] for i in kept]
