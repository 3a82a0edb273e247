"""The reliability diagram of a decision model: how often choices of each confidence are right."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxft.objectives.metrics import CALIBRATION_BINS, CalibrationError
from jaxft.report.compare import first_and_last
from jaxft.report.markup import escaped, folded, html_table, section
from jaxft.report.run_files import RunFiles
from jaxft.runs.metric_names import CONFIDENCE, CORRECT, ECE, HELD_OUT

SIZE, MARGIN = 240, 34  # pixels of the diagram, and of the space for its labels


class Bin(NamedTuple):
    """The held-out decisions whose confidence is in one range: their number and two means."""

    decisions: int
    confidence: float
    accuracy: float


def bins_of(rows: Mapping[str, Mapping[str, float]]) -> list[Bin | None]:
    """Return the bins of CalibrationError from the values of held-out rows, None for one without rows."""
    values = [(x[CONFIDENCE], x[CORRECT]) for x in rows.values() if CONFIDENCE in x and CORRECT in x]
    confidence, correct = jnp.asarray(values, jnp.float32).reshape(-1, 2).T
    sums = np.asarray(CalibrationError.of(confidence, correct, confidence >= 0).sums)
    return [Bin(int(count), x / count, y / count) if count else None for count, x, y in sums.T.tolist()]


def reliability_section(runs: Sequence[RunFiles]) -> str:
    """Return the diagram of each run with decisions after its last step, "" without any."""
    parts = []
    for run in runs:
        bins = bins_of(run.rows)
        if not any(bins):
            continue
        first, last = first_and_last(run.entries)
        before, after = (entry.get(HELD_OUT + ECE) for entry in (first, last))
        errors = [f"{x:.3f} {when}" for x, when in ((before, "before"), (after, "after")) if x is not None]
        title = f"<h3>{escaped(run.name)}</h3>" if len(runs) > 1 else ""
        rows = [
            [f"{n / CALIBRATION_BINS:.2f} to {(n + 1) / CALIBRATION_BINS:.2f}", f"{b.decisions:,}",
             f"{b.confidence:.3f}", f"{b.accuracy:.3f}"]
            for n, b in enumerate(bins) if b
        ]  # fmt: skip
        table = html_table(["confidence", "decisions", "mean confidence", "right"], rows, numeric=True)
        parts.append(
            f"{title}<p>Calibration error (ECE): {', '.join(errors)} training.</p>{diagram(bins)}"
            + folded("The bins", table)
        )
    note = (
        '<p class="note">Of the held-out decisions after the last step: a bar is how many of the choices '
        "with a confidence are right; of a calibrated model it ends at the diagonal. The darker a bar, the "
        "more decisions it has.</p>"
    )
    return section("reliability", "Reliability", note + "\n".join(parts)) if parts else ""


def diagram(bins: Sequence[Bin | None]) -> str:
    """Return the diagram as an SVG picture."""
    most, width = max(b.decisions for b in bins if b), SIZE / len(bins)
    bars = "".join(
        f'<rect x="{MARGIN + number * width + 1:.1f}" y="{SIZE * (1 - b.accuracy):.1f}" '
        f'width="{width - 2:.1f}" height="{max(SIZE * b.accuracy, 1):.1f}" '
        f'fill-opacity="{0.25 + 0.75 * b.decisions / most:.2f}"><title>{b.decisions} decisions of confidence '
        f"{b.confidence:.3f}, {b.accuracy:.3f} right</title></rect>"
        for number, b in enumerate(bins)
        if b
    )
    ticks = "".join(
        f'<text x="{MARGIN + SIZE * x:.0f}" y="{SIZE + 16}" text-anchor="middle">{x:g}</text>'
        f'<text x="{MARGIN - 6}" y="{SIZE * (1 - x) + 4:.0f}" text-anchor="end">{x:g}</text>'
        for x in (0.0, 0.5, 1.0)
    )
    frame = (
        f'<line x1="{MARGIN}" y1="{SIZE}" x2="{MARGIN + SIZE}" y2="0" stroke-dasharray="4 4"/>'
        f'<path d="M{MARGIN} 0V{SIZE}H{MARGIN + SIZE}" fill="none"/>'
        f'<text x="{MARGIN + SIZE / 2}" y="{SIZE + 32}" text-anchor="middle">confidence</text>'
    )
    box = f"{MARGIN + SIZE + 16} {SIZE + 40}"
    return (
        f'<svg class="reliability" viewBox="0 -8 {box}" width="{MARGIN + SIZE + 16}" height="{SIZE + 48}" '
        f'role="img" aria-label="Fraction of right decisions by confidence">{bars}{frame}{ticks}</svg>'
    )
