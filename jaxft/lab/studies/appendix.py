"""A study as the appendix of a paper: one HTML page, and its tables as LaTeX and CSV.

The page has the declaration, the comparisons with their intervals, curves, the sensitivity of each loss, all
trials, settings, versions and hashes. It loads nothing from any network.
"""

import base64
import csv
import io
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxft import __version__
from jaxft.distributed.disk import make_folder, write_durably
from jaxft.lab.studies.study_results import Duel, FinalCurve, LossOutcome, StudyResult, finite_mean
from jaxft.objectives.metrics import HELD_OUT, KL
from jaxft.objectives.pair import ACCURACY, CHOSEN_LOGP, MARGIN
from jaxft.report.charts import Panel, draw
from jaxft.report.document import html_page
from jaxft.report.html_elements import escaped, flat_values, folded, html_table, record_table, sections
from jaxft.report.statistics import paired_difference

REPORT, TABLES = "report.html", "tables"
PICTURE = "curves.png"
WIDE_KL = 10  # ratio of the losses' KLs above which their axis is logarithmic
LATEX = {
    "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "±": r"$\pm$",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
    "<": r"$<$", ">": r"$>$",
}  # fmt: skip


@dataclass(frozen=True)
class PaperTable:
    """A table of the appendix. name: of its files, without suffix. head: column titles."""

    name: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def html(self) -> str:
        """Return the table and its caption as HTML."""
        rows = [[escaped(cell) for cell in row] for row in self.rows]
        return html_table(self.head, rows, numeric=True) + f'<p class="note">{escaped(self.caption)}</p>'

    def csv(self) -> str:
        """Return the table as CSV, without its caption."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.head, *self.rows])
        return text.getvalue()

    def latex(self) -> str:
        r"""Return the table and its caption as LaTeX; it needs the package booktabs."""
        lines = [" & ".join(map(_latex, row)) + r" \\" for row in (self.head, *self.rows)]
        columns = "l" + "r" * (len(self.head) - 1)
        return "\n".join(
            [
                r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{columns}}}", r"\toprule",
                lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}",
                rf"\caption{{{_latex(self.caption)}}}", r"\end{table}", "",
            ]
        )  # fmt: skip


def _latex(text: str) -> str:
    return re.sub(f"[{re.escape(''.join(LATEX))}]", lambda sign: LATEX[sign[0]], text)


def write_appendix(study: StudyResult) -> list[Path]:
    """Write the page and the tables into the study's folder; return their paths."""
    files = appendix_files(study)
    for path, content in files.items():
        make_folder(path.parent)
        write_durably(path, content)
    return [*files]


def appendix_files(study: StudyResult) -> dict[Path, bytes]:
    """Return path -> content of the page and the tables in the study's folder."""
    tables = tables_of(study)
    files = {study.folder / REPORT: study_page(study, tables).encode()}
    for table in tables:
        files[study.folder / TABLES / f"{table.name}.csv"] = table.csv().encode()
        files[study.folder / TABLES / f"{table.name}.tex"] = table.latex().encode()
    return files


# Tables


def tables_of(study: StudyResult) -> list[PaperTable]:
    """Return all tables of a study."""
    return [
        losses_table(study),
        duels_table(study),
        same_kl_table(study),
        same_length_table(study),
        sensitivity_table(study),
        trials_table(study),
    ]


def losses_table(study: StudyResult) -> PaperTable:
    """Return the table of losses with their best settings, the highest mean first."""
    seeds = len(study.losses[0].curves)
    rows = []
    for loss in study.order:
        finite = [curve for curve in loss.curves if not curve.diverged]
        values = np.stack([curve.values[-1] for curve in finite or loss.curves])
        interval = paired_difference(np.zeros_like(values), values).interval.text(4) if finite else ""
        each = [f"{finite_mean(c.values[-1]):.4f}" if not c.diverged else "diverged" for c in loss.curves]
        rows.append(
            (
                loss.label,
                f"{loss.mean:.4f} {interval}" if finite else "diverged",
                ", ".join(each),
                _mean_metric(loss, MARGIN),
                _mean_metric(loss, KL),
                _mean_metric(loss, CHOSEN_LOGP),
                f"{np.mean([curve.per_token[-1] for curve in loss.curves]):+.3f}",
                loss.winner,
            )
        )
    head = (
        "", study.metric, "of each seed", "margin, nats", "KL per token", "chosen log-prob",
        "nats per extra token", "best setting",
    )  # fmt: skip
    return PaperTable(
        "losses",
        f"Means over {study.losses[0].final.shape[1]} held-out prompts that selected nothing and {seeds} "
        "seeds, with 95 % intervals over both; margin, KL and log-prob: over all held-out pairs. Margin: "
        "growth of the log-prob difference of a pair's responses since step 0; nats per extra token: its "
        "slope over the tokens that the chosen response has more than the rejected one, 0 for a policy "
        "that does not prefer length. Setting: the best of the trials on other held-out prompts.",
        head,
        tuple(rows),
    )


def _mean_metric(loss: LossOutcome, name: str) -> str:
    values = [curve.metrics[-1].get(HELD_OUT + name, math.nan) for curve in loss.curves]
    return f"{float(np.mean(values)):.4g}"


def duels_table(study: StudyResult) -> PaperTable:
    """Return the comparisons of every two losses after the last step."""
    rows = [
        (
            f"{d.other} - {d.one}",
            f"{d.difference.mean:+.4f}",
            d.difference.interval.text(4),
            d.difference.bootstrap.text(4),
            f"{d.difference.p:.2g}",
            f"{d.p:.2g}",
            f"{d.difference.effect:+.2f}",
            f"{d.difference.wins:.2f}",
            f"{d.difference.error / d.difference.unpaired_error:.2f}" if d.difference.unpaired_error else "-",
            d.verdict.partition(";")[0],  # without how much data is missing, which the conclusions have
        )
        for d in study.duels
    ]
    return PaperTable(
        "duels",
        f"Paired differences of {study.metric}: the same prompts, seeds, rows and their order. Interval: "
        "95 %, Student's with Satterthwaite's degrees of freedom over seeds and prompts; bootstrap: by "
        "resampling both. p (Holm): adjusted for all rows. d: mean over the standard deviation of the "
        "prompts. wins: fraction of prompts. error: standard error divided by that of unpaired runs.",
        ("", "difference", "interval", "bootstrap", "p", "p (Holm)", "d", "wins", "error", "result"),
        tuple(rows),
    )


def _result(duel: Duel, winner: int) -> str:
    """Return the result of a comparison as text. winner: see MatchedKL."""
    return {1: f"{duel.other} is better", -1: f"{duel.one} is better", 0: "not distinguishable"}[winner]


def same_kl_table(study: StudyResult) -> PaperTable:
    """Return the comparisons of every two losses at the same KL of their policies to the reference."""
    rows = [
        (
            f"{d.other} - {d.one}",
            f"{point.kl:.4g}",
            f"{point.difference.mean:+.4f}",
            point.difference.interval.text(4),
            f"{point.p:.2g}",
            _result(d, point.winner),
        )
        for d in study.duels
        for point in d.matched
    ]
    return PaperTable(
        "same_kl",
        f"Paired differences of {study.metric} at the same KL per token to the reference, interpolated "
        "between evaluations. The KL is estimated on the tokens of chosen responses.",
        ("", "KL", "difference", "interval", "p (Holm)", "result"),
        tuple(rows),
    )


def same_length_table(study: StudyResult) -> PaperTable:
    """Return the comparisons at the same KL, with prompts weighted as in results.length_weights."""
    rows = [
        (
            f"{d.other} - {d.one}",
            f"{point.kl:.4g}",
            f"{compared.mean:+.4f}",
            compared.interval.text(4),
            f"{point.length_p:.2g}",
            _result(d, point.length_winner),
        )
        for d in study.duels
        for point in d.matched
        if (compared := point.same_length) is not None
    ]
    longer = np.sign(study.pairs.by_prompt(study.pairs.longer, tuning=False))
    counts = f"{(longer > 0).sum()} are longer than the rejected ones and {(longer < 0).sum()} are shorter"
    return PaperTable(
        "same_length",
        f"Paired differences of {study.metric} at the same KL, with prompts weighted so that longer and "
        f"shorter chosen responses count the same: {counts}."
        f"{'' if rows else ' Both kinds are needed for a comparison.'}",
        ("", "KL", "difference", "interval", "p (Holm)", "result"),
        tuple(rows),
    )


def sensitivity_table(study: StudyResult) -> PaperTable:
    """Return the best, median and worst metric of each loss's trials: how much its setting matters."""
    rows = []
    for loss in study.losses:
        known = loss.sensitivity
        values = map(_finite_text, (known.best, known.median, known.worst))
        rows.append((loss.label, *values, f"{len(loss.trials)}"))
    return PaperTable(
        "sensitivity",
        f"The trials of each loss at step {study.losses[0].sensitivity.step}, which all of them have "
        f"reached: {study.metric} on the prompts that select settings.",
        ("", "best", "median", "worst", "trials"),
        tuple(rows),
    )


def _finite_text(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def trials_table(study: StudyResult) -> PaperTable:
    """Return the table of all trials, including the ones that were stopped early."""
    rows = [
        (loss.label, setting, f"{step}", _finite_text(-math.inf if value is None else value))
        for loss in study.losses
        for setting, step, value in loss.trials
    ]
    return PaperTable(
        "trials",
        f"All trials: {study.metric} on the prompts that select settings, at the trial's last step.",
        ("", "setting", "last step", study.metric),
        tuple(rows),
    )


# Curves


def curve_panels(study: StudyResult) -> list[Panel]:
    """Return plots of the final runs: the metric over steps and over KL (with each seed as a faint line),
    length preference, margin, and log-probs of chosen responses. The curves are means over seeds.
    """
    steps, against_kl, chosen, margin, length = {}, {}, {}, {}, {}
    of_seeds, of_seeds_by_kl = {}, {}
    for loss in study.losses:
        curves = loss.curves
        x, each = curves[0].steps, [[finite_mean(values) for values in curve.values] for curve in curves]
        mean = np.mean(each, 0)
        steps[loss.label] = (x, mean.tolist())
        kl = np.mean([curve.kl for curve in curves], 0)
        order = np.argsort(kl, kind="stable")
        against_kl[loss.label] = (kl[order].tolist(), mean[order].tolist())
        of_seeds[loss.label] = _joined((curve.steps, y) for curve, y in zip(curves, each, strict=True))
        of_seeds_by_kl[loss.label] = _joined(
            (curve.kl.tolist(), y) for curve, y in zip(curves, each, strict=True)
        )
        slopes = np.mean([curve.per_token for curve in curves], 0)
        length[loss.label] = (kl[order].tolist(), slopes[order].tolist())
        chosen[loss.label] = (x[1:], _means_by_step(curves, CHOSEN_LOGP))
        margin[loss.label] = (x, [0.0, *_means_by_step(curves, MARGIN)])
    log_kl = is_wide([max(kl) for kl, _ in against_kl.values()])
    return [
        Panel(study.metric, "optimizer step", "mean over prompts and seeds", steps, faint=of_seeds),
        Panel(
            f"{study.metric} against KL", "KL per token to the reference", "mean over prompts and seeds",
            against_kl, faint=of_seeds_by_kl, log_x=log_kl,
        ),
        Panel(
            "length preference against KL", "KL per token to the reference", "nats per extra token", length,
            log_x=log_kl,
        ),
        Panel("margin since step 0", "optimizer step", "nats per pair", margin),
        Panel("log-prob of chosen responses", "optimizer step", "nats per response", chosen),
    ]  # fmt: skip


def _joined(curves: Iterable[tuple[Sequence[float], Sequence[float]]]) -> tuple[list[float], list[float]]:
    """Return several curves as one, with a gap (NaN) after each."""
    x, y = list[float](), list[float]()
    for xs, ys in curves:
        x += [*xs, math.nan]
        y += [*ys, math.nan]
    return x, y


def _means_by_step(curves: Sequence[FinalCurve], name: str) -> list[float]:
    values = [[m.get(HELD_OUT + name, math.nan) for m in curve.metrics[1:]] for curve in curves]
    return np.mean(values, 0).tolist()


def is_wide(ends: Sequence[float]) -> bool:
    """Whether an axis of KL must be logarithmic to show all curves. ends: the largest KL of each."""
    return max(ends) > WIDE_KL * min(ends)


def picture_html(panels: Sequence[Panel], about: str) -> str:
    """Return plots as an HTML image. about: its alternative text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PICTURE
        draw(path, panels, "", columns=2)
        encoded = base64.b64encode(path.read_bytes()).decode()
    source = f"data:image/png;base64,{encoded}"
    return f'<img alt="{escaped(about)}" style="max-width:100%" src="{source}">'


# The page


def study_page(study: StudyResult, tables: Sequence[PaperTable]) -> str:
    """Return the HTML page of a study: its declaration, conclusions, `tables` and curves."""
    named = {table.name: table.html() for table in tables}
    better = {table.name: sum(row[-1].endswith("is better") for row in table.rows) for table in tables}
    distinguished = {
        x.name: f"a loss is better in {better[x.name]} of {len(x.rows)} comparisons" for x in tables
    }
    declared = study.declaration
    conclusions = "".join(f"<li>{escaped(line)}</li>" for line in study.lines())
    note = '<p class="note">Means over the seeds; the faint lines are the single seeds.</p>'
    pictures = picture_html(curve_panels(study), "Curves of the losses") + note
    tuning, compared = study.pairs.prompt_counts()
    facts = {
        "declaration": declared["digest"],
        "file": declared["file_sha256"],
        "log, last digest": study.digest,
        "losses": ", ".join(loss.label for loss in study.losses),
        "seeds": declared["study"]["seeds"],
        "metric": study.metric,
        "learning rates": _searched(declared["study"]["lr"]),
        "knobs": {
            name: {knob: _searched(values) for knob, values in loss["knobs"].items()} or "none"
            for name, loss in declared["study"]["losses"].items()
        },
        "trials of each loss": declared["study"]["trials"],
        "stages": _stages(study),
        "prompts": f"{tuning} select settings, {compared} are compared",
        "equivalence margin": declared["study"]["margin"],
        "rows": {f"seed {seed}": digest for seed, digest in declared["facts"]["rows"].items()},
        "weights": {name: x for name, x in declared["facts"].items() if name not in ("rows", "held_out")},
        "loss sources": {name: x["fn"] for name, x in declared["study"]["losses"].items()},
        "versions": declared["versions"],
    }
    recipe = flat_values(declared["study"]["recipe"])
    parts = {
        "Results": f"{_summary(study)}<ul>{conclusions}</ul>{named['losses']}",
        "Comparisons": named["duels"]
        + folded(f"At the same KL to the reference: {distinguished['same_kl']}", named["same_kl"])
        + folded(f"At the same KL and length: {distinguished['same_length']}", named["same_length"]),
        "Curves": pictures,
        "Sensitivity": named["sensitivity"] + folded("All trials", named["trials"]),
        "Declaration": record_table({"": facts}),
        "Settings": folded(
            "The recipe", record_table({"": {name: x for name, x in recipe.items() if x is not None}})
        ),
    }
    note = f"A study declared before training, written by jaxft {__version__}"
    return html_page(study.folder.resolve().name, note, sections(parts))


METRICS = {
    ACCURACY: "the fraction of pairs whose chosen response gains more log-prob over the reference than the "
    "rejected one, 0.5 before training",
    MARGIN: "by how many nats the chosen response's log-prob grows more than the rejected one's",
}


def _summary(study: StudyResult) -> str:
    """Return a paragraph about what the study compared."""
    declared = study.declaration["study"]
    recipe, seeds = declared["recipe"], declared["seeds"]
    text = (
        f"{len(study.losses)} losses train an adapter on {recipe['weights']} with the pairs of "
        f"{recipe['data']['train']}: {recipe['loop']['steps']} steps of {recipe['data']['batch']} pairs. "
        f"Each loss has {declared['trials']} trials of its learning rate and knobs with seed {seeds[0]}, of "
        f"which the best are trained further, and its best setting is trained with {len(seeds)} seeds. "
        f"{study.metric} is {METRICS[study.metric]}. Intervals are at 95 %."
    )
    return f'<p class="text">{escaped(text)}</p>'


def _searched(values: Any) -> str:
    """Return the searched values of a knob or learning rate as text."""
    if isinstance(values, dict):
        return f"{values['low']:g} to {values['high']:g}, evenly by the logarithm"
    return ", ".join(f"{x:g}" for x in values)


def _stages(study: StudyResult) -> list[str]:
    counts = Counter((entry["steps"][1], entry["seed"]) for entry in study.log if "wave" in entry)
    return [f"{count} to step {step} with seed {seed}" for (step, seed), count in counts.items()]
