"""Plots of curves: a few panels side by side, with the same colour for the same label in all of them."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxft.distributed.disk import make_folder, write_durably

Points = tuple[Sequence[float], Sequence[float]]  # x, y
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f3c8d",
    "#444444",
)  # distinguishable with any colour vision
STYLES = ("-", (0, (6, 2)), (0, (1, 1.2)))  # after the colours are used up


@dataclass(frozen=True)
class Panel:
    """Axes with a curve a label. dashed: further curves in the label's colour; level: a horizontal line to
    compare with. faint: values behind a smoothed curve.
    """

    title: str
    x: str
    y: str
    curves: Mapping[str, Points]
    dashed: Mapping[str, Points] = field(default_factory=dict)
    level: float | None = None
    faint: Mapping[str, Points] = field(default_factory=dict)


def draw(path: Path, panels: Sequence[Panel], title: str, columns: int = 3) -> None:
    """Write a PNG with the panels that have a curve, `columns` in a row, and one legend below. Raises
    ValueError without any.
    """
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,
    )  # drawn without a display and without pyplot's globals
    from matplotlib.figure import Figure

    panels = [
        panel for panel in panels if any(len(x) for x, _ in (*panel.curves.values(), *panel.dashed.values()))
    ]
    if not panels:
        raise ValueError(f"{path}: no curve to draw")
    labels = list(dict.fromkeys(label for panel in panels for label in (*panel.curves, *panel.dashed)))
    wide = min(columns, len(panels))
    high = -(-len(panels) // wide)
    legend_rows = -(-len(labels) // (2 * wide))
    figure = Figure(
        figsize=(4.2 * wide, 3.1 * high + 0.4 + 0.22 * legend_rows), dpi=130, layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(high, wide, squeeze=False).ravel()
    for panel, ax in zip(panels, axes, strict=False):
        _panel(ax, panel, labels)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    handles = [axes[0].plot([], [], label=label, **_look(labels.index(label)))[0] for label in labels]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(labels), 2 * wide),
        fontsize=8,
        frameon=False,
    )
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
    ax.set_title(panel.title, fontsize=9)
    ax.set_xlabel(panel.x, fontsize=8)
    ax.set_ylabel(panel.y, fontsize=8)
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.25, linewidth=0.5)
