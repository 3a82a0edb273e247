"""The zoo: preference losses side by side on exact toys, as one HTML page.

    jaxft loss-bench --zoo                    # every loss of jaxft; runs/loss_bench/zoo.html
    jaxft loss-bench --zoo --loss my.py:mine --loss dpo

The page shows the policy that each loss reaches with unlimited data on a toy with known rewards: true reward
against KL for values of beta; the cost of flipped labels, of annotators who like length and of circular
preferences; over-optimisation with biased annotators; and whether the chosen response loses log-prob on the
way. It also shows the loss's value and gradients over the margin, and its vector field. No model is needed.

Inputs other than a pair come from the toy: ratings are the true rewards, a third response is sampled
independently of the pair or is the best one, the batch has all pairs of the toy in their frequencies, and a
state is that of step 0.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft import __version__
from jaxft.distributed.disk import make_folder, write_durably
from jaxft.lab.exact_toys import (
    DisplacementPath,
    PushField,
    Quality,
    Toy,
    best_policy,
    bradley_terry_toy,
    displacement,
    find_displacement,
    minimise,
    open_risk,
    quality,
    vector_field,
)
from jaxft.lab.loss_checks import check_loss
from jaxft.lab.loss_evaluation import (
    Check,
    Curve,
    NamedLoss,
    Probe,
    format_number,
    loss_beta,
    margin_curve,
    margin_span,
    probe,
)
from jaxft.objectives.losses.ranking_losses import RATING
from jaxft.objectives.pair import declaration
from jaxft.report.charts import COLOURS
from jaxft.report.document import html_page
from jaxft.report.html_elements import escaped, folded, html_table, sections

BETAS = tuple(10.0 ** (k / 4) for k in range(-6, 7))  # factors of a loss's default beta
FLIPS = (0.0, 0.1, 0.2, 0.3, 0.4)
LENGTH_BIASES = (0.0, 0.5, 1.0, 1.5, 2.0)  # reward that annotators add per 10 tokens
STRONG_BIAS = 1.5  # the length bias in the plots of over-optimisation
CIRCLES = (0.0, 1.0, 2.0, 3.0)  # reward that annotators add to a response against the next one
LEAST_KL, MOST_KL = 0.01, 2.5  # nats, the range of the plot of gains
LABELLED = 97.0  # per cent of the possible gain; losses below it are named in that plot
SAME_KL = 0.3  # nats at which losses are compared
ZOO_REWARD = (0.0, 0.4, 0.9, 1.3, 2.0, 0.7)
ZOO_REFERENCE = (0.5, -0.4, 0.8, 0.0, -1.2, 0.3)
ZOO_LENGTH = (8, 12, 7, 15, 10, 20)


@dataclass(frozen=True)
class Specimen:
    """The results of a loss that the page shows.

    about: its docstring. needs: its inputs in addition to a pair, such as "ratings", or "no reference". own:
    quality of the policy that it reaches with its own beta. by_beta: (beta, quality) in ascending order of
    KL, () for a loss without a numeric beta. same_kl: true reward at the beta that leads to a KL of SAME_KL,
    None if no beta does. by_flips, by_bias, by_circle: true reward for each of FLIPS, LENGTH_BIASES and
    CIRCLES. biased: policies for STRONG_BIAS and values of beta, in ascending order of KL. path: log-probs of
    similar responses during training.
    """

    label: str
    about: str
    needs: tuple[str, ...]
    checks: tuple[Check, ...]
    curve: Curve
    field: PushField
    own: Quality
    by_beta: tuple[tuple[float, Quality], ...]
    same_kl: float | None
    by_flips: tuple[float, ...]
    by_bias: tuple[float, ...]
    by_circle: tuple[float, ...]
    biased: tuple["BiasedPolicy", ...]
    path: DisplacementPath


class BiasedPolicy(NamedTuple):
    """The policy that a loss reaches with biased annotators: its KL, and its gains over the reference in true
    reward and in the annotators' reward.
    """

    kl: float
    true: float
    annotators: float


def zoo_toy() -> Toy:
    """Return the toy of the page: six responses to one prompt."""
    return bradley_terry_toy(ZOO_REWARD, ZOO_REFERENCE, ZOO_LENGTH)


def describe_loss(loss: NamedLoss) -> Specimen:
    """Compute the results of a loss that the page shows. Raises ValueError if the loss fails."""
    seen, toy = probe(loss.label, loss.fn), zoo_toy()
    beta = loss_beta(loss.fn, 0.0)
    betas = [beta * factor for factor in BETAS] if beta > 0 else []
    by_beta = sorted(((x, _quality(seen, toy, beta=x)) for x in betas), key=lambda pair: pair[1].kl)
    reach = margin_span(seen)
    return Specimen(
        loss.label,
        inspect.cleandoc(declaration(loss.fn).fn.__doc__ or ""),
        _needs(seen),
        check_loss(seen),
        margin_curve(seen, reach),
        vector_field(seen, min(reach, 30.0), 7),
        _quality(seen, toy),
        tuple(by_beta),
        reward_at_same_kl(seen, toy, by_beta),
        tuple(_quality(seen, toy.with_noise(flips)).reward for flips in FLIPS),
        tuple(_quality(seen, toy.with_annotators(bias=bias)).reward for bias in LENGTH_BIASES),
        tuple(_quality(seen, toy.with_annotators(circle=circle)).reward for circle in CIRCLES),
        tuple(sorted(_biased_policy(seen, toy, beta=x) for x in betas[::2])),
        find_displacement(seen),
    )


def _needs(seen: Probe) -> tuple[str, ...]:
    """Return the entries of Specimen.needs."""
    ratings = any(name.startswith(RATING) for name in seen.columns)
    inputs = {
        "no reference": not seen.declared.reads_reference,
        "ratings": ratings,
        "a third response": len(seen.kinds) > 2,
        "the batch": seen.declared.coupled,
        "a state": bool(seen.declared.init),
    }
    return tuple(name for name, needed in inputs.items() if needed)


def _quality(seen: Probe, toy: Toy, **knobs: float) -> Quality:
    return quality(toy, minimise(open_risk(seen, toy, **knobs), toy).logp)


def _biased_policy(seen: Probe, toy: Toy, **knobs: float) -> BiasedPolicy:
    biased, liked = toy.with_annotators(bias=STRONG_BIAS), toy.annotators_reward(STRONG_BIAS)
    reached = minimise(open_risk(seen, biased, **knobs), biased).logp
    gained = np.exp(reached) - np.exp(toy.reference)
    return BiasedPolicy(quality(toy, reached).kl, float(gained @ toy.reward), float(gained @ liked))


def reward_at_same_kl(seen: Probe, toy: Toy, by_beta: Sequence[tuple[float, Quality]]) -> float | None:
    """Return the true reward of the policy at the beta that leads to a KL of SAME_KL, found by bisection;
    None if no two values in by_beta have a lower and a higher KL. by_beta: see Specimen.
    """
    near = [pair for pair in by_beta if pair[1].kl <= SAME_KL]
    far = [pair for pair in by_beta if pair[1].kl > SAME_KL]
    if not near or not far:
        return None
    (low, start), (high, end) = near[-1], far[0]
    for _ in range(8):
        middle = math.sqrt(low * high)
        reached = _quality(seen, toy, beta=middle)
        if reached.kl <= SAME_KL:
            low, start = middle, reached
        else:
            high, end = middle, reached
    return float(np.interp(SAME_KL, [start.kl, end.kl], [start.reward, end.reward]))


def best_rewards(toy: Toy) -> list[Quality]:
    """Return the policies of the highest true reward at their KL, reference * exp(reward / beta), by rising
    KL.
    """
    return [quality(toy, best_policy(toy, beta)) for beta in np.geomspace(30.0, 0.05, 400)]


def gain_curve(x: Specimen, start: float, best: Sequence[Quality]) -> tuple[list[float], list[float]]:
    """Return (KLs, gains) for the values of beta with a KL from LEAST_KL to MOST_KL. A gain is in true reward
    over `start`, the reference's, in per cent of the best policy's gain at that KL. best: of best_rewards.
    """
    reached = [q for _, q in x.by_beta if LEAST_KL <= q.kl <= MOST_KL]
    most = np.interp([q.kl for q in reached], [q.kl for q in best], [q.reward for q in best])
    gains = [100 * (q.reward - start) / (top - start) for q, top in zip(reached, most.tolist(), strict=True)]
    return [q.kl for q in reached], gains


# Pictures


class Line(NamedTuple):
    """A curve of a plot. label: text at its end, "" for none. name: its tooltip, "" for the plot's title."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str
    label: str = ""
    name: str = ""


@dataclass(frozen=True)
class Plot:
    """A plot of curves. levels: (y, name) of horizontal lines. x_ticks: (x, text) of the horizontal axis's
    ticks, None for round numbers. y_range: limits of the vertical axis, None to fit the curves. wide: about
    twice as wide.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    levels: Sequence[tuple[float, str]] = ()
    x_ticks: Sequence[tuple[float, str]] | None = None
    y_range: tuple[float, float] | None = None
    wide: bool = False


@dataclass(frozen=True)
class Frame:
    """The axes of a plot, which map data coordinates to pixels of a picture of `width` x `height`.

    x, y: (lowest, highest) value of the data. right: margin in pixels for labels right of the curves.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    width: float = 300.0
    height: float = 190.0
    right: float = 10.0

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixel coordinates of a point in data coordinates."""
        (x0, x1), (y0, y1) = self.x, self.y
        across = LEFT + (self.width - LEFT - self.right) * (x - x0) / (x1 - x0)
        return across, TOP + (self.height - TOP - BOTTOM) * (y1 - y) / (y1 - y0)


LEFT, BOTTOM, TOP = 46.0, 34.0, 8.0  # margins of a picture
LABEL, LABEL_WIDTH = 11.0, 70.0  # height and width of a label
GRID = 'stroke="currentColor" stroke-opacity="0.15"'


def round_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return at most `most` + 1 round numbers from low to high: multiples of 1, 2 or 5 times a power of 10.

    >>> round_ticks(-3.0, 3.2)
    [-2.0, 0.0, 2.0]
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(k * power for k in (1, 2, 5, 10) if (high - low) / (k * power) <= most)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def svg_plot(plot: Plot) -> str:
    """Return a plot as an HTML figure: an SVG picture with its title."""
    points = [(x, y) for line in plot.lines for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    levels = [y for y, _ in plot.levels]
    xs = [x for x, _ in plot.x_ticks or ()] or [x for x, _ in points]
    ys = plot.y_range or (*levels, *(y for _, y in points))
    longest = max((len(line.label) for line in plot.lines), default=0)
    size = (620.0, 300.0) if plot.wide else (300.0, 190.0)
    frame = Frame(_span(xs), _span(ys), *size, 10.0 + 5.6 * longest)
    drawn = [_level(frame, y, name) for y, name in plot.levels]
    ends = dict[str, tuple[float, float]]()
    for line in plot.lines:
        known = [frame.at(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        if not known:
            continue
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in known)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in known)
        drawn.append(
            f'<g fill="{line.colour}" stroke="{line.colour}">'
            f"<title>{escaped(line.name or plot.title)}</title>"
            f'<polyline fill="none" stroke-width="1.7" points="{path}"/>{dots if len(known) < 12 else ""}</g>'
        )
        if line.label:
            ends[f'<tspan fill="{line.colour}">{escaped(line.label)}</tspan>'] = max(known)
    ticks = plot.x_ticks or [(x, format_number(x)) for x in round_ticks(*frame.x)]
    return _figure(plot, frame, _axes(frame, ticks, plot) + "".join(drawn) + _labels(ends), plot.wide)


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _level(frame: Frame, y: float, name: str) -> str:
    (x0, place), (x1, _) = frame.at(frame.x[0], y), frame.at(frame.x[1], y)
    dashed = 'stroke="currentColor" stroke-dasharray="4 3" opacity="0.6"'
    line = f'<path d="M{x0:.1f},{place:.1f} H{x1:.1f}" {dashed}/>'
    return (
        f'{line}<text x="{x1:.1f}" y="{place - 3:.1f}" text-anchor="end" opacity="0.7">{escaped(name)}</text>'
    )


def _labels(ends: Mapping[str, tuple[float, float]]) -> str:
    """Return SVG texts right of points, moved down where they would overlap. ends: text -> point."""
    texts, placed = [], list[tuple[float, float]]()
    for text, (x, y) in sorted(ends.items(), key=lambda item: item[1][1]):
        while any(abs(x - u) < LABEL_WIDTH and abs(y - v) < LABEL for u, v in placed):
            y += 1
        placed.append((x, y))
        texts.append(f'<text x="{x + 5:.1f}" y="{y + 3:.1f}">{text}</text>')
    return "".join(texts)


def svg_field(field: PushField) -> str:
    """Return a figure of a vector field: arrows over the log-ratios of the chosen and rejected response."""
    half = (field.chosen[1] - field.chosen[0]) / 2
    reach = float(field.chosen[-1]) + half
    frame = Frame((-reach, reach), (-reach, reach))
    size = np.hypot(field.push_chosen, field.push_rejected)
    longest = float(size[np.isfinite(size)].max(initial=0)) or 1.0
    arrows = []
    for i, c in enumerate(field.chosen):
        for j, r in enumerate(field.rejected):
            if not size[i, j] > 0.01 * longest or not np.isfinite(size[i, j]):
                continue
            x, y = frame.at(c, r)
            scale = 18 * (size[i, j] / longest) ** 0.5 / size[i, j]
            dx, dy = scale * field.push_chosen[i, j] / 2, -scale * field.push_rejected[i, j] / 2
            arrows.append(
                f'<line x1="{x - dx:.1f}" y1="{y - dy:.1f}" x2="{x + dx:.1f}" y2="{y + dy:.1f}" '
                'marker-end="url(#head)"/>'
            )
    marked = f'<g stroke="{COLOURS[0]}" stroke-width="1.3">{"".join(arrows)}</g>'
    title = "direction in which a step moves the two log-ratios"
    plot = Plot(title, "log-ratio of chosen, nats", "log-ratio of rejected, nats", ())
    ticks = [(x, format_number(x)) for x in round_ticks(*frame.x)]
    return _figure(plot, frame, _axes(frame, ticks, plot) + marked)


ARROW_HEAD = (
    '<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs><marker id="head" '
    'viewBox="0 0 6 6" refX="4.5" refY="3" markerWidth="4" markerHeight="4" orient="auto">'
    f'<path d="M0,0 L6,3 L0,6 z" fill="{COLOURS[0]}"/></marker></defs></svg>'
)


def _axes(frame: Frame, x_ticks: Sequence[tuple[float, str]], plot: Plot) -> str:
    """Return the grid with its numbers, the axes and their names as SVG."""
    (left, bottom), (right, top) = frame.at(frame.x[0], frame.y[0]), frame.at(frame.x[1], frame.y[1])
    parts = [
        f'<path d="M{left},{top} V{bottom} H{right}" fill="none" stroke="currentColor" stroke-width="0.7"/>'
    ]
    for value, text in x_ticks:
        x = frame.at(value, frame.y[0])[0]
        parts.append(f'<path d="M{x:.1f},{top} V{bottom}" {GRID}/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 12}" text-anchor="middle">{escaped(text)}</text>')
    for value in round_ticks(*frame.y):
        y = frame.at(frame.x[0], value)[1]
        parts.append(f'<path d="M{left},{y:.1f} H{right:.1f}" {GRID}/>')
        parts.append(f'<text x="{left - 4}" y="{y + 3:.1f}" text-anchor="end">{format_number(value)}</text>')
    across, down = (left + right) / 2, (top + bottom) / 2
    named = (
        f'<text x="{across:.1f}" y="{frame.height - 6}" text-anchor="middle">{escaped(plot.x_label)}</text>'
    )
    turned = f'transform="rotate(-90 10 {down:.1f})"'
    named += f'<text x="10" y="{down:.1f}" text-anchor="middle" {turned}>{escaped(plot.y_label)}</text>'
    return "".join(parts) + named


def _figure(plot: Plot, frame: Frame, content: str, wide: bool = False) -> str:
    size = f'viewBox="0 0 {frame.width:g} {frame.height:g}" width="100%"'
    style = 'font-size="10" fill="currentColor" font-family="sans-serif" role="img"'
    picture = f'<svg {size} {style} aria-label="{escaped(plot.title)}">{content}</svg>'
    across = ' style="max-width: 60rem"' if wide else ""
    return f"<figure{across}><figcaption>{escaped(plot.title)}</figcaption>{picture}</figure>"


# The page


def zoo_page(specimens: Sequence[Specimen]) -> str:
    """Return the HTML page: an overview table and plot, then plots and checks of each loss."""
    toy = zoo_toy()
    losses = ARROW_HEAD + "\n".join(_loss_html(x, toy) for x in specimens)
    note = f"{len(specimens)} preference losses on a toy with known rewards, written by jaxft {__version__}"
    parts = {"Overview": _overview(specimens, toy), "Losses": losses}
    return html_page("The zoo of preference losses", note, sections(parts))


def write_zoo(losses: Sequence[NamedLoss], out: Path, report: Callable[[str], None]) -> int:
    """Write the page of losses to `out`; return its size in bytes.

    report: called with each label, and with a line about each loss that is left out because it fails. Raises
    ValueError if all do.
    """
    specimens = []
    for loss in losses:
        report(loss.label)
        try:
            specimens.append(describe_loss(loss))
        except ValueError as error:
            report(f"{loss.label} is left out: {error}")
    if not specimens:
        raise ValueError("none of the losses can be evaluated; correct the errors above")
    page = zoo_page(specimens).encode()
    make_folder(out.parent)
    write_durably(out, page)
    return len(page)


def _overview(specimens: Sequence[Specimen], toy: Toy) -> str:
    start, best = quality(toy, toy.reference), best_rewards(toy)
    at_kl = float(np.interp(SAME_KL, [q.kl for q in best], [q.reward for q in best]))
    head = (
        "loss", "needs", "orders by reward", "calibrated", "finite optimum", "sign at start", "reward", "KL",
        "gain at the same KL", "reward, 20 % flipped", "reward, length bias", "moves",
    )  # fmt: skip
    rows = [[_link(x.label), *_cells(x, start.reward, at_kl)] for x in specimens]
    text = (
        "<p>Six responses to one prompt have known rewards, from "
        f"{min(toy.reward):g} to {max(toy.reward):g}; the reference's expected reward is {start.reward:.3f}. "
        "Each loss is minimised exactly, with unlimited data whose labels follow Bradley and Terry.</p><ul>"
        "<li><b>Needs</b>: inputs of the loss in addition to a pair and the reference. Ratings are the true "
        "rewards, the batch has all pairs of the toy in their frequencies, a state is that of step 0. Losses "
        "of rankings get two responses here.</li>"
        "<li><b>Orders by reward</b>, <b>calibrated</b>, <b>finite optimum</b>: on a second toy, of five "
        "responses, the policy of the lowest expected loss orders the responses by true reward; its margins "
        "are the true log-odds times a constant; its log-ratios are finite. <b>Sign at start</b>: at the "
        "reference the gradient raises the margin.</li>"
        "<li><b>Reward</b> and <b>KL</b>: true reward of the policy that the loss reaches with its default "
        f"knobs, and its KL to the reference in nats. Always giving the best response has reward "
        f"{max(toy.reward):g}. <b>Reward, 20 % flipped</b>: if a fifth of the labels is wrong. <b>Reward, "
        f"length bias</b>: if annotators add {LENGTH_BIASES[2]:g} to the reward per 10 tokens.</li>"
        "<li><b>Gain at the same KL</b>: in true reward over the reference, at the beta that leads to a KL "
        f"of {SAME_KL:g} nats, in per cent of the largest gain at that KL; - if no beta leads to it.</li>"
        "<li><b>Moves</b>: changes of the log-probs of a chosen and a rejected response that share 90 % of "
        "their features, while their margin grows by 1 nat; - if it does not. A chosen response that loses "
        "log-prob is marked.</li></ul>"
        "<p>On real data, with few labels and early stopping, a loss may be the better one although it is "
        "not calibrated or has no finite optimum.</p>"
    )
    lines = []
    for n, x in enumerate(specimens):
        kl, gains = gain_curve(x, start.reward, best)
        if not kl:
            continue
        poor = min(gains) < LABELLED
        colour = COLOURS[n % len(COLOURS)] if poor else "#888888"
        lines.append(Line(kl, gains, colour, x.label if poor else "", x.label))
    ticks = [(x, f"{x:g}") for x in (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)]
    title = (
        "gain in true reward against KL, for values of beta. Grey: losses with at least "
        f"{LABELLED:g} % of the largest possible gain everywhere"
    )
    plot = Plot(title, "KL, nats", "% of the largest gain", lines, x_ticks=ticks, wide=True)
    return text + html_table(head, rows, numeric=True) + (svg_plot(plot) if lines else "")


def _cells(x: Specimen, start: float, at_kl: float) -> list[str]:
    results = {check.name: check for check in x.checks}

    def mark(name: str, bad: Sequence[str]) -> str:
        check = results.get(name)
        if check is None:
            return "-"
        holds = check.ok is not False and not any(text in check.message for text in bad)
        return "yes" if holds else _marked("no")

    moved = displacement(x.path)
    changes = "-"
    if moved is not None:
        chosen = f"{moved[0]:+.2f}"
        changes = f"{_marked(chosen) if moved[0] < 0 else chosen} {moved[1]:+.2f}"
    return [
        ",<br>".join(x.needs),
        mark("Bradley-Terry", ("no order", "reverse", "lowest at the reference")),
        mark("calibrated", ("no multiple",)),
        mark("optimum", ("infinite", "without bound")),
        mark("sign", ("lowers", "leaves")),
        f"{x.own.reward:.3f}",
        f"{x.own.kl:.2f}",
        "-" if x.same_kl is None else f"{100 * (x.same_kl - start) / (at_kl - start):.0f} %",
        f"{x.by_flips[FLIPS.index(0.2)]:.3f}",
        f"{x.by_bias[2]:.3f}",
        changes,
    ]


def _marked(text: str) -> str:
    return f'<span class="differs">{text}</span>'


def _link(label: str) -> str:
    return f'<a href="#loss-{_anchor(label)}">{escaped(label)}</a>'


def _anchor(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label)


def _loss_html(x: Specimen, toy: Toy) -> str:
    pictures = "".join(map(svg_plot, _plots(x, toy))) + svg_field(x.field)
    marks = {True: "ok", False: _marked("FAIL"), None: "note"}
    table = html_table(
        ("check", "", "result"),
        [(escaped(c.name), marks[c.ok], escaped(c.message)) for c in x.checks],
    )
    about = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped(x.about))
    needs = f'<p class="note">Needs {escaped(", ".join(x.needs))}.</p>' if x.needs else ""
    return (
        f'<h3 id="loss-{_anchor(x.label)}">{escaped(x.label)}</h3><p class="text">{about}</p>{needs}'
        f'<div class="charts">{pictures}</div>{folded("Checks", table)}'
    )


def _plots(x: Specimen, toy: Toy) -> list[Plot]:
    """Return the plots of a loss. Plots of the true reward have the same vertical axis for all losses, except
    that of over-optimisation.
    """
    margin, blue, red = x.curve.margin.tolist(), COLOURS[0], COLOURS[1]
    slopes = {kind: y.tolist() for kind, y in x.curve.gradient.items()}
    start, most = quality(toy, toy.reference).reward, float(toy.reward.max())
    rewards: dict[str, Any] = {"levels": ((start, "reference"),), "y_range": (min(toy.reward), 1.05 * most)}
    plots = [
        Plot("loss", "margin c - r, nats", "loss", [Line(margin, x.curve.value.tolist(), blue)]),
        Plot(
            "gradient",
            "margin c - r, nats",
            "d loss / d nat",
            [
                Line(margin, slopes[kind], colour, kind)
                for kind, colour in zip(("chosen", "rejected"), (blue, red), strict=True)
            ],
        ),
        Plot(
            "log-probs of two similar responses",
            "margin, nats",
            "change, nats",
            [
                Line((x.path.chosen - x.path.rejected).tolist(), moved.tolist(), colour, kind)
                for kind, moved, colour in (
                    ("chosen", x.path.chosen, blue),
                    ("rejected", x.path.rejected, red),
                )
            ],
            levels=((0.0, ""),),
        ),
        Plot(
            "true reward if labels are flipped",
            "fraction of flipped labels",
            "true reward",
            [Line(FLIPS, x.by_flips, COLOURS[2])],
            **rewards,
        ),
        Plot(
            "true reward if annotators like length",
            "reward that they add per 10 tokens",
            "true reward",
            [Line(LENGTH_BIASES, x.by_bias, COLOURS[2])],
            **rewards,
        ),
        Plot(
            "true reward if preferences are circular",
            "reward added against the next response",
            "true reward",
            [Line(CIRCLES, x.by_circle, COLOURS[2])],
            **rewards,
        ),
    ]
    betas = sorted((math.log10(beta), q.reward) for beta, q in x.by_beta)
    near = [policy for policy in x.biased if policy.kl <= MOST_KL]
    if len(near) > 1:
        kl, of_world, liked = (list(values) for values in zip(*near, strict=True))
        title = f"over-optimisation: annotators add {STRONG_BIAS:g} per 10 tokens, values of beta"
        lines = [Line(kl, of_world, blue, "true"), Line(kl, liked, red, "annotators'")]
        plots.append(Plot(title, "KL, nats", "reward over the reference's", lines, levels=((0.0, ""),)))
    if len(betas) > 1:
        ticks = [(b, f"{10**b:.2g}") for b, _ in betas[::4]]
        line = Line([b for b, _ in betas], [r for _, r in betas], COLOURS[3])
        plots.append(Plot("true reward by beta", "beta", "true reward", [line], x_ticks=ticks, **rewards))
    return plots
