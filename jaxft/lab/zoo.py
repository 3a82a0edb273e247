"""The zoo: preference losses side by side on exact toys, as one HTML page.

    jaxft loss-bench --zoo                    # every loss of jaxft; runs/loss_bench/zoo.html
    jaxft loss-bench --zoo --loss my.py:mine --loss dpo

On one toy with known rewards it shows where each loss leads with unlimited data: its true reward against its
KL for values of beta, what flipped labels cost, whether the chosen response loses log-prob on the way; and
the loss itself: its value and gradients over the margin, and its vector field. No model is needed.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxft import __version__
from jaxft.distributed.disk import make_folder, write_durably
from jaxft.lab.exact_toys import (
    Displacement,
    PushField,
    Quality,
    Toy,
    best_policy,
    bradley_terry_toy,
    minimise,
    open_risk,
    quality,
    vector_field,
)
from jaxft.lab.loss_claims import find_displacement
from jaxft.lab.loss_laws import check_loss
from jaxft.lab.loss_probe import Check, Curve, Probe, format_number, margin_curve, margin_span, probe
from jaxft.lab.named_losses import NamedLoss, loss_knobs
from jaxft.objectives.pair import declaration
from jaxft.report.charts import COLOURS
from jaxft.report.document import html_page
from jaxft.report.markup import escaped, folded, html_table, section

BETAS = tuple(10.0 ** (k / 2) for k in range(-3, 4))  # times a loss's own beta
FLIPS = (0.0, 0.1, 0.2, 0.3, 0.4)
MOST_KL = 2.0  # nats that the picture of reward against KL shows
SAME_KL = 0.3  # nats at which losses are compared
ZOO_REWARD = (0.0, 0.4, 0.9, 1.3, 2.0, 0.7)
ZOO_REFERENCE = (0.5, -0.4, 0.8, 0.0, -1.2, 0.3)
ZOO_LENGTH = (8, 12, 7, 15, 10, 20)


@dataclass(frozen=True)
class Specimen:
    """The results of a loss that the page shows.

    own: quality of the policy that it would reach with its own beta; by_beta: for other values of beta, in
    ascending order of KL, empty for a loss without one. same_kl: its true reward where beta leads to a KL of
    SAME_KL, None if none does. by_flips: true reward for fractions of flipped labels.
    """

    label: str
    about: str
    checks: tuple[Check, ...]
    curve: Curve
    field: PushField
    own: Quality
    by_beta: tuple[tuple[float, Quality], ...]
    same_kl: float | None
    by_flips: tuple[float, ...]
    displacement: Displacement | None


def zoo_toy() -> Toy:
    """Return the toy of the page: six responses to one prompt."""
    return bradley_terry_toy(ZOO_REWARD, ZOO_REFERENCE, ZOO_LENGTH)


def describe_loss(loss: NamedLoss) -> Specimen:
    """Compute the results of a loss that the page shows. Raises ValueError if the loss fails."""
    seen, toy = probe(loss.label, loss.fn), zoo_toy()
    beta = loss_knobs(loss.fn).get("beta", (None, None))[1]
    betas = [beta * factor for factor in BETAS] if isinstance(beta, float) and beta > 0 else []
    by_beta = sorted(((x, _quality(seen, toy, beta=x)) for x in betas), key=lambda pair: pair[1].kl)
    reach = margin_span(seen)
    return Specimen(
        loss.label,
        inspect.cleandoc(declaration(loss.fn).fn.__doc__ or ""),
        check_loss(seen),
        margin_curve(seen, reach),
        vector_field(seen, min(reach, 30.0), 7),
        _quality(seen, toy),
        tuple(by_beta),
        reward_at_same_kl(seen, toy, by_beta),
        tuple(_quality(seen, toy.with_noise(flips)).reward for flips in FLIPS),
        find_displacement(seen),
    )


def _quality(seen: Probe, toy: Toy, **knobs: float) -> Quality:
    return quality(toy, minimise(open_risk(seen, toy, **knobs), toy).logp)


def reward_at_same_kl(seen: Probe, toy: Toy, by_beta: Sequence[tuple[float, Quality]]) -> float | None:
    """Return the true reward of the loss with the beta that leads to a KL of SAME_KL; None if no beta between
    those given does.
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
    """Return the highest true reward of any policy for rising KL: reference * exp(reward / beta)."""
    return [quality(toy, best_policy(toy, beta)) for beta in np.geomspace(30.0, 0.05, 60)]


# Pictures


@dataclass(frozen=True)
class Plot:
    """Curves in a small picture. curves: (x, y, colour); x_label, y_label: of the axes; dots: further points,
    with no line through them.
    """

    title: str
    x_label: str
    y_label: str
    curves: Sequence[tuple[Sequence[float], Sequence[float], str]]
    dots: Sequence[tuple[Sequence[float], Sequence[float], str]] = ()


WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 300, 190, 58, 34, 8  # of a picture and its margins


def svg_plot(plot: Plot) -> str:
    """Return a plot as an SVG picture with its title."""
    drawn = [*plot.curves, *plot.dots]
    points = [(x, y) for xs, ys, _ in drawn for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    place, axes = _axes(points, plot.x_label, plot.y_label)
    lines = []
    for number, (xs, ys, colour) in enumerate(drawn):
        known = [place(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in known)
        if number < len(plot.curves):
            lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{path}"/>')
        if len(known) < 12:
            lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in known]
    return _figure(plot.title, axes + "".join(lines))


def svg_field(field: PushField) -> str:
    """Return a vector field as arrows over the log-ratios of the chosen and the rejected response."""
    corners = [(a, b) for a in field.chosen[[0, -1]] for b in field.rejected[[0, -1]]]
    place, axes = _axes(corners, "log-ratio of chosen", "log-ratio of rejected")
    size = np.hypot(field.push_chosen, field.push_rejected)
    longest = float(size[np.isfinite(size)].max(initial=0)) or 1.0
    arrows = []
    for i, c in enumerate(field.chosen):
        for j, r in enumerate(field.rejected):
            if not size[i, j] > 0.01 * longest or not np.isfinite(size[i, j]):
                continue
            x, y = place(c, r)
            scale = 17 * (size[i, j] / longest) ** 0.5 / size[i, j]
            dx, dy = scale * field.push_chosen[i, j], -scale * field.push_rejected[i, j]
            arrows.append(
                f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x + dx:.1f}" y2="{y + dy:.1f}" '
                f'stroke="{COLOURS[0]}" stroke-width="1.4"/><circle cx="{x:.1f}" cy="{y:.1f}" r="1.6" '
                f'fill="{COLOURS[0]}"/>'
            )
    return _figure("where a step moves the two (dots are the tails)", axes + "".join(arrows))


def _axes(
    points: Sequence[tuple[float, float]], x_label: str, y_label: str
) -> tuple[Callable[[float, float], tuple[float, float]], str]:
    """A function from values to places in a picture, and the axes with their ends."""
    xs, ys = zip(*points, strict=True) if points else ((0.0, 1.0), (0.0, 1.0))
    (x0, x1), (y0, y1) = ((min(v), max(v) if max(v) > min(v) else min(v) + 1.0) for v in (xs, ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - 10) * (x - x0) / (x1 - x0)
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (y1 - y) / (y1 - y0)

    base, right = HEIGHT - BOTTOM, WIDTH - 10
    ends = [(LEFT, base + 13, "start", x0), (right, base + 13, "end", x1)]
    ends += [(LEFT - 4, base, "end", y0), (LEFT - 4, TOP + 9, "end", y1)]
    texts = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}">{format_number(value)}</text>'
        for x, y, anchor, value in ends
    )
    frame = f'<path d="M{LEFT},{TOP} V{base} H{right}" fill="none" stroke="currentColor" stroke-width="0.7"/>'
    middle = (LEFT + right) / 2
    named = f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escaped(x_label)}</text>'
    turned = f'transform="rotate(-90 11 {(TOP + base) / 2})"'
    named += f'<text x="11" y="{(TOP + base) / 2}" text-anchor="middle" {turned}>{escaped(y_label)}</text>'
    return place, frame + texts + named


def _figure(title: str, content: str) -> str:
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="100%"'
    style = 'font-size="10" fill="currentColor" font-family="sans-serif" role="img"'
    picture = f'<svg {size} {style} aria-label="{escaped(title)}">{content}</svg>'
    return f"<figure><figcaption>{escaped(title)}</figcaption>{picture}</figure>"


# The page


def zoo_page(specimens: Sequence[Specimen]) -> str:
    """Return the page."""
    toy = zoo_toy()
    parts = {
        "Overview": ("overview", section("overview", "Overview", _overview(specimens, toy))),
        "Losses": ("losses", section("losses", "Losses", "\n".join(_loss_html(x) for x in specimens))),
    }
    note = f"{len(specimens)} preference losses on a toy with known rewards, written by jaxft {__version__}"
    return html_page("The zoo of preference losses", note, parts)


def write_zoo(losses: Sequence[NamedLoss], out: Path, report: Callable[[str], None]) -> int:
    """Write the page of some losses to `out`; return its size in bytes. report: called with each label.

    A loss that cannot be evaluated is left out and reported.
    """
    specimens = []
    for loss in losses:
        report(loss.label)
        try:
            specimens.append(describe_loss(loss))
        except ValueError as error:
            report(f"{loss.label} is left out: {error}")
    if not specimens:
        raise ValueError("none of the losses can be evaluated; see the lines above")
    page = zoo_page(specimens).encode()
    make_folder(out.parent)
    write_durably(out, page)
    return len(page)


def _overview(specimens: Sequence[Specimen], toy: Toy) -> str:
    start, best = quality(toy, toy.reference), best_rewards(toy)
    at_kl = float(np.interp(SAME_KL, [q.kl for q in best], [q.reward for q in best]))
    head = (
        "loss", "orders by reward", "calibrated", "finite optimum", "sign at start", "reward", "KL",
        "gain at the same KL", "reward, 20 % flipped", "chosen moves", "rejected moves",
    )  # fmt: skip
    rows = [[_link(x.label), *_cells(x, start.reward, at_kl)] for x in specimens]
    text = (
        "<p>Six responses to one prompt have known rewards, from "
        f"{min(toy.reward):g} to {max(toy.reward):g}; the reference's expected reward is {start.reward:.3f}. "
        "Each loss is minimised exactly, with unlimited data whose labels follow Bradley and Terry. "
        "<b>Reward</b> and <b>KL</b> are those of the policy that it reaches with its own knobs. "
        "<b>Gain at the same KL</b> is that over the reference with the beta that leads to a KL of "
        f"{SAME_KL:g} nats, in per cent of the most that any policy can gain there; a loss has none if no "
        "beta leads to that KL. "
        "<b>Moves</b> are the changes of the log-probs of two similar responses while their margin grows by "
        "1 nat.</p>"
    )
    dots = []
    for n, x in enumerate(specimens):
        near = [q for _, q in x.by_beta if q.kl <= MOST_KL]
        dots.append(([q.kl for q in near], [q.reward for q in near], COLOURS[n % len(COLOURS)]))
    frontier = [q for q in best if q.kl <= MOST_KL]
    line = ([q.kl for q in frontier], [q.reward for q in frontier], "currentColor")
    title = "true reward against KL: losses with several betas, and the most possible"
    picture = svg_plot(Plot(title, "KL, nats", "true reward", [line], dots))
    return text + f'<div class="charts">{picture}</div>' + html_table(head, rows, numeric=True)


def _cells(x: Specimen, start: float, at_kl: float) -> list[str]:
    said = {check.name: check for check in x.checks}

    def mark(name: str, bad: Sequence[str]) -> str:
        check = said.get(name)
        if check is None:
            return "-"
        holds = check.ok is not False and not any(text in check.message for text in bad)
        return "yes" if holds else '<span class="differs">no</span>'

    gain = "-" if x.same_kl is None else f"{100 * (x.same_kl - start) / (at_kl - start):.0f} %"
    moved = ["-", "-"] if x.displacement is None else [
        f"{v:+.2f}" if v > 0 else f'<span class="differs">{v:+.2f}</span>' for v in (x.displacement.chosen,)
    ] + [f"{x.displacement.rejected:+.2f}"]  # fmt: skip
    return [
        mark("Bradley-Terry", ("no order", "reverse", "lowest at the reference")),
        mark("calibrated", ("no multiple",)),
        mark("optimum", ("infinite", "without bound")),
        mark("sign", ("lowers", "leaves")),
        f"{x.own.reward:.3f}",
        f"{x.own.kl:.2f}",
        gain,
        f"{x.by_flips[FLIPS.index(0.2)]:.3f}",
        *moved,
    ]


def _link(label: str) -> str:
    return f'<a href="#loss-{_anchor(label)}">{escaped(label)}</a>'


def _anchor(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label)


def _loss_html(x: Specimen) -> str:
    margin = x.curve.margin.tolist()
    betas = sorted((beta, q.reward) for beta, q in x.by_beta)
    plots = [
        Plot("loss", "margin c - r, nats", "loss", [(margin, x.curve.value.tolist(), COLOURS[0])]),
        Plot(
            "gradient on chosen (blue) and rejected (red)",
            "margin c - r, nats",
            "d loss / d nat",
            [
                (margin, x.curve.gradient[kind].tolist(), COLOURS[n])
                for n, kind in enumerate(("chosen", "rejected"))
            ],
        ),
        Plot(
            "true reward by fraction of flipped labels",
            "fraction flipped",
            "true reward",
            [(FLIPS, x.by_flips, COLOURS[2])],
        ),  # fmt: skip
    ]
    if len(betas) > 1:
        plots.insert(
            2,
            Plot(
                "true reward by beta",
                "log10 of beta",
                "true reward",
                [([math.log10(b) for b, _ in betas], [r for _, r in betas], COLOURS[3])],
            ),  # fmt: skip
        )
    pictures = "".join(map(svg_plot, plots)) + svg_field(x.field)
    marks = {True: "ok", False: '<span class="differs">FAIL</span>', None: "note"}
    table = html_table(
        ("check", "", "what it says"),
        [(escaped(c.name), marks[c.ok], escaped(c.message)) for c in x.checks],
    )
    about = f'<p class="text">{escaped(x.about)}</p>'
    return (
        f'<h3 id="loss-{_anchor(x.label)}">{escaped(x.label)}</h3>{about}'
        f'<div class="charts">{pictures}</div>{folded("Checks", table)}'
    )
