"""Losses trained on synthetic pairs with a planted fault: what the fault costs, and over-optimisation.

    jaxft loss-bench --loss dpo --against ipo --world pairs=200 --vary noise=0,0.1,0.2,0.3,0.4 --seeds 2

The pairs come from a World (lab/worlds.py), whose true reward is known. Each value of its varied setting is a
level: the training pairs differ, the held-out prompts are the same. Every loss is trained on every level, and
completions of the held-out prompts are sampled at each evaluation; their mean true reward is reported. Where
annotators have a bias, the reward that they see can rise over training while the true one falls (Gao,
Schulman & Hilton 2023, arXiv:2210.10760; for preference losses Rafailov et al. 2024, arXiv:2406.02900); both
are shown against the KL to the reference.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxft import __version__
from jaxft.distributed.disk import make_folder, write_durably
from jaxft.lab.studies.appendix import PaperTable, is_wide, picture_html
from jaxft.lab.worlds import World, proxy_reward, true_reward
from jaxft.objectives.intervals import LEVEL
from jaxft.objectives.metrics import HELD_OUT, KL
from jaxft.report.charts import Panel, Points
from jaxft.report.document import html_page
from jaxft.report.html_elements import escaped, record_table, sections
from jaxft.report.ranking import read_held_out
from jaxft.report.statistics import Adjusted, Difference, holm, paired_difference
from jaxft.runs.metrics_log import METRICS, SCORES, read_entries

TRUE, PROXY = (SCORES + fn.__name__ for fn in (true_reward, proxy_reward))  # metrics' names
FAULTS = ("pairs", "temperature", "noise", "length_bias", "circle", "duplicates")  # of a World
ROBUSTNESS_PAGE = "index.html"


@dataclass(frozen=True)
class WorldRun:
    """The E evaluations of a run in a world; the first is before training.

    kl: per token to the reference, on the held-out pairs. true, proxy: the true and the annotators' reward,
    means over completions of the held-out prompts. prompts: name of a prompt -> true reward after training.
    """

    kl: Float[np.ndarray, " E"]
    true: Float[np.ndarray, " E"]
    proxy: Float[np.ndarray, " E"]
    prompts: Mapping[str, float]

    @property
    def diverged(self) -> bool:
        """Whether the run has no finite KL or true reward after training. The KL is needed: a model with
        non-finite logits samples empty texts, which have a reward.
        """
        return not (np.isfinite([self.kl[-1], self.true[-1]]).all() and self.prompts)


@dataclass(frozen=True)
class FaultLevel:
    """The runs with one value of the varied setting. name: such as "noise=0.2", "" if no setting varies.
    value: NaN if no setting varies. runs: by loss, one for each seed.
    """

    name: str
    value: float
    world: World
    runs: Mapping[str, Sequence[WorldRun]]


def parse_fault(text: str) -> tuple[str, tuple[float, ...]]:
    """Return the setting and the distinct values of `--vary SETTING=VALUE,VALUE,...`, in ascending order.

    Raises ValueError for a setting that cannot vary, a value that is not a finite number, or fewer than two
    distinct values.

    >>> parse_fault("noise=0.2,0,0.4")
    ('noise', (0.0, 0.2, 0.4))
    """
    name, _, values = text.partition("=")
    if name not in FAULTS:
        raise ValueError(
            f"--vary {text}: {name!r} cannot vary; use one of {', '.join(FAULTS)}, which leave the held-out "
            "prompts and the true reward as they are"
        )
    try:
        numbers = sorted({float(value) for value in values.split(",")})
    except ValueError:
        numbers = []
    if len(numbers) < 2 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"--vary {text}: expected two or more different numbers, such as noise=0,0.2,0.4")
    return name, tuple(numbers)


def read_world_run(folder: Path) -> WorldRun:
    """Read a run that was trained in a world and scored by both rewards at its evaluations.

    Raises ValueError for a run without scores.
    """
    keys = [HELD_OUT + name for name in (KL, TRUE, PROXY)]
    entries = [entry for entry in read_entries(folder / METRICS) if keys[1] in entry]
    if not entries:
        raise ValueError(
            f"{folder / METRICS} has no {keys[1]}; train it with score functions of its world and "
            "loop.eval_scores=true"
        )
    values = [[entry.get(key) for key in keys] for entry in entries]
    kl, true, proxy = np.array(values, np.float64).T  # NaN for a value that was not finite, null in the log
    rows = read_held_out(folder)
    return WorldRun(kl, true, proxy, {name: row[TRUE] for name, row in rows.items() if TRUE in row})


def rewards(runs: Sequence[WorldRun]) -> Float[np.ndarray, "S P"]:
    """Return the true rewards after training by seed and prompt, for the prompts that all runs have."""
    common = [name for name in runs[0].prompts if all(name in run.prompts for run in runs)]
    return np.array([[run.prompts[name] for name in common] for run in runs])


def compare_runs(one: Sequence[WorldRun], other: Sequence[WorldRun]) -> Difference | None:
    """Return the paired difference of true rewards after training, `other` minus `one`; None if a run
    diverged. The i-th runs of both must have the same seed.
    """
    if any(run.diverged for run in (*one, *other)):
        return None
    both = rewards([*one, *other])
    return paired_difference(both[: len(one)], both[len(one) :])


# Tables


def least_fault(levels: Sequence[FaultLevel]) -> FaultLevel:
    """Return the level with the smallest fault, to which other levels are compared: that of the value nearest
    to 0, or of the most pairs.
    """
    if levels[0].name.startswith("pairs="):
        return max(levels, key=lambda level: level.value)
    return min(levels, key=lambda level: abs(level.value))


def cost_table(levels: Sequence[FaultLevel]) -> PaperTable:
    """Return the table of each loss's true reward on each level and its difference to that on least_fault."""
    losses, first = [*levels[0].runs], least_fault(levels)
    others = [level for level in levels if level is not first]
    costs = {
        (label, level.name): compare_runs(first.runs[label], level.runs[label])
        for label in losses
        for level in others
    }
    adjusted = _adjusted(costs)
    rows = []
    for label in losses:
        for level in levels:
            row = (label, level.name, f"{_last(level.runs[label], 'true'):.3f}", "", "", "")
            if level is not first:
                row = (*row[:3], *_cells(costs[label, level.name], adjusted.get((label, level.name))))
            rows.append(row)
    counts = [len(run.prompts) for level in levels for run in _all_runs(level) if run.prompts]
    seeds = len(first.runs[losses[0]])
    over = f"{min(counts, default=0)} held-out prompts and {seeds} seed{'s' * (seeds > 1)}"
    caption = f"Mean true reward of completions after training, over {over}."
    head = ("", "world", "true reward", "difference", "p (Holm)", "result")
    if not others:
        return PaperTable("costs", caption, (head[0], head[2]), tuple((row[0], row[2]) for row in rows))
    caption += (
        f" Difference: to {first.name}, paired, with its 95 % interval over {_units(seeds)}; p (Holm): "
        "adjusted for all rows. All seeds share the pairs and labels of a world."
    )
    return PaperTable("costs", caption, head, tuple(rows))


def baseline_table(levels: Sequence[FaultLevel]) -> PaperTable:
    """Return the table of differences in true reward between the first loss and each other one, by level."""
    baseline, *others = levels[0].runs
    duels = {
        (level.name, label): compare_runs(level.runs[baseline], level.runs[label])
        for level in levels
        for label in others
    }
    adjusted = _adjusted(duels)
    rows = [
        (f"{label} - {baseline}", name or "-", *_cells(d, adjusted.get((name, label))))
        for (name, label), d in duels.items()
    ]
    seeds = len(levels[0].runs[baseline])
    return PaperTable(
        "losses",
        f"Paired differences in true reward to {baseline}, with 95 % intervals over {_units(seeds)}; p "
        "(Holm): adjusted for all rows.",
        ("", "world", "difference", "p (Holm)", "result"),
        tuple(rows),
    )


def _units(seeds: int) -> str:
    return "prompts and seeds" if seeds > 1 else "the prompts, of this seed alone"


def _adjusted(
    differences: Mapping[tuple[str, str], Difference | None],
) -> dict[tuple[str, str], float]:
    """Return the p-values of the differences that are not None, adjusted by holm."""
    known = {key: d.p for key, d in differences.items() if d is not None}
    return dict(zip(known, holm([*known.values()]), strict=True))


def _cells(d: Difference | None, p: float | None) -> tuple[str, str, str]:
    """Return a comparison's difference, adjusted p-value and result as texts."""
    if d is None or p is None:
        return "", "", "a run diverged"
    return f"{d.mean:+.3f} {d.interval.text(3)}", f"{p:.2g}", d.verdict(Adjusted(p)).partition(";")[0]


def optimisation_table(levels: Sequence[FaultLevel]) -> PaperTable:
    """Return the table of both rewards before training, where the true one was highest, and at the end."""
    rows = []
    for level in levels:
        for label, runs in level.runs.items():
            kl, true, proxy = mean_curves(runs)
            best = highest(true)
            rows.append(
                (
                    label, level.name or "-", f"{true[0]:.3f}", f"{true[best]:.3f}", f"{kl[best]:.3g}",
                    f"{true[-1]:.3f}", f"{proxy[0]:.3f}", f"{proxy[-1]:.3f}", f"{kl[-1]:.3g}",
                    course(runs),
                )
            )  # fmt: skip
    return PaperTable(
        "optimisation",
        "Means over prompts and seeds at the evaluations. Annotators' reward: the true one plus their bias "
        "for length. KL: per token to the reference, a rough estimate on the tokens of chosen responses, "
        "very large where these lose log-prob. Over-optimised: the true reward falls from its highest "
        "value and the annotators' rises, both by more than chance.",
        (
            "", "world", "true, before", "true, highest", "at KL", "true, at the end", "annotators', before",
            "annotators', at the end", "KL at the end", "over training",
        ),
        tuple(rows),
    )  # fmt: skip


def highest(values: Float[np.ndarray, " E"]) -> int:
    """Return the index of the evaluation with the highest value; 0 if no value is finite."""
    return int(np.nanargmax(values)) if np.isfinite(values).any() else 0


def course(runs: Sequence[WorldRun]) -> str:
    """Return how the true reward changes over training: "rises", "falls", "over-optimised", "does not
    change" or "diverged".

    A change counts if it exceeds z standard errors. Its variance is twice the variance of a mean over prompts
    (of the rewards after training) plus the variance of the mean change over seeds. z is the two-sided 95 %
    quantile of the normal distribution, with Bonferroni's correction for the choice among E - 1 evaluations.
    """
    if any(run.diverged for run in runs):
        return "diverged"
    _, true, proxy = mean_curves(runs)
    by_prompt, best = rewards(runs).mean(0), highest(true)
    if len(by_prompt) < 2:
        return "does not change"
    error = 2 * by_prompt.var(ddof=1) / len(by_prompt)
    if len(runs) > 1:
        error += np.var([run.true[best] - run.true[-1] for run in runs], ddof=1) / len(runs)
    level = (1 - LEVEL) / 2 / max(1, len(true) - 1)
    least = NormalDist().inv_cdf(1 - level) * math.sqrt(error)
    if true[best] - true[-1] > least:
        return "over-optimised" if proxy[-1] - proxy[best] > least else "falls"
    return "rises" if true[-1] - true[0] > least else "does not change"


def mean_curves(runs: Sequence[WorldRun]) -> Float[np.ndarray, "3 E"]:
    """Return the means over seeds of (KL, true reward, annotators' reward) at each evaluation. A run that
    diverged may end early; the means after that are NaN.

    Raises ValueError if no run diverged, but their numbers of evaluations differ.
    """
    counts = {len(run.true) for run in runs}
    if len(counts) > 1 and not any(run.diverged for run in runs):
        raise ValueError(
            f"runs of one loss have {' and '.join(map(str, sorted(counts)))} evaluations with different "
            "seeds; leave out loop.patience, or train the shorter runs to the end"
        )
    curves = [(x, max(counts) - len(x)) for run in runs for x in (run.kl, run.true, run.proxy)]
    padded = np.stack([np.pad(x, (0, more), constant_values=math.nan) for x, more in curves])
    return np.mean(padded.reshape(len(runs), 3, max(counts)), axis=0)


def _last(runs: Sequence[WorldRun], name: str) -> float:
    return float(np.mean([math.nan if run.diverged else getattr(run, name)[-1] for run in runs]))


# The page


def robustness_panels(levels: Sequence[FaultLevel]) -> list[Panel]:
    """Return plots of both rewards after training against the varied setting; [] for a single level."""
    if len(levels) < 2:
        return []
    x, setting = [level.value for level in levels], levels[0].name.partition("=")[0]
    panels = []
    for title, name in (("true reward", "true"), ("annotators' reward", "proxy")):
        curves, faint = dict[str, Points](), dict[str, Points]()
        for label, runs in levels[0].runs.items():
            curves[label] = x, [_last(level.runs[label], name) for level in levels]
            each = [[float(getattr(run, name)[-1]) for run in level.runs[label]] for level in levels]
            faint[label] = (
                [*x, math.nan] * len(runs),
                [y for seed in zip(*each, strict=True) for y in (*seed, math.nan)],
            )
        before = None
        if name == "true":
            before = float(np.mean([run.true[0] for level in levels for run in _all_runs(level)]))
        panels.append(Panel(f"{title} after training", setting, "mean", curves, faint=faint, level=before))
    return panels


def _all_runs(level: FaultLevel) -> list[WorldRun]:
    return [run for runs in level.runs.values() for run in runs]


def optimisation_panels(levels: Sequence[FaultLevel]) -> list[Panel]:
    """Return a plot of each level: the true reward, and dashed the annotators' reward, against KL."""
    panels = []
    for level in levels:
        true, proxy = dict[str, Points](), dict[str, Points]()
        for label, runs in level.runs.items():
            kl, of_world, of_annotators = mean_curves(runs)
            true[label] = kl.tolist(), of_world.tolist()
            proxy[label] = kl.tolist(), of_annotators.tolist()
        log_kl = is_wide([float(np.nanmax(x)) for x, _ in true.values()])
        title = f"true reward, dashed: annotators'{f'; {level.name}' * bool(level.name)}"
        panels.append(Panel(title, "KL per token to the reference", "mean reward", true, proxy, log_x=log_kl))
    return panels


def robustness_page(levels: Sequence[FaultLevel], settings: Mapping[str, Any]) -> str:
    """Return the HTML page of a comparison. settings: of the runs, except their losses."""
    losses = ", ".join(levels[0].runs)
    text = f"Trained on synthetic pairs whose true reward is known: {losses}"
    pictures = ""
    if len(levels) > 1:
        setting = levels[0].name.partition("=")[0]
        text += f"; in {len(levels)} worlds that differ in {setting}"
        pictures = picture_html(robustness_panels(levels), f"Rewards by {setting}")
        note = "Dotted: the true reward before training. Faint lines: single seeds."
        pictures += f'<p class="note">{note}</p>'
    duels = baseline_table(levels).html() if len(levels[0].runs) > 1 else ""
    over_training = picture_html(optimisation_panels(levels), "Rewards against KL")
    worlds = record_table({level.name or "world": asdict(level.world) for level in levels})
    parts = {
        "Robustness": f'<p class="text">{escaped(text)}.</p>{pictures}{cost_table(levels).html()}{duels}',
        "Over-optimisation": over_training + optimisation_table(levels).html(),
        "Settings": worlds + record_table({"": settings}),
    }
    note = f"Written by jaxft {__version__}"
    return html_page("Losses in worlds with a planted fault", note, sections(parts))


def write_robustness(levels: Sequence[FaultLevel], settings: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the page and its tables as CSV and LaTeX into `folder`; return their paths."""
    tables = [cost_table(levels), optimisation_table(levels)]
    tables += [baseline_table(levels)] * (len(levels[0].runs) > 1)
    files = {folder / ROBUSTNESS_PAGE: robustness_page(levels, settings)}
    for table in tables:
        files |= {folder / f"{table.name}.csv": table.csv(), folder / f"{table.name}.tex": table.latex()}
    make_folder(folder)
    for path, content in files.items():
        write_durably(path, content.encode())
    return [*files]
