"""Runs side by side: a table of where each one ended, and the curves of all in one picture."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from jaxft.runs.plots import Curve, Panel, draw

Numbers = Mapping[str, float]


def _last(*names: str) -> Callable[[Numbers, Numbers], float | None]:
    """The first of the names that is there, at the end."""
    return lambda before, after: next((after[name] for name in names if name in after), None)


def _gained(*names: str) -> Callable[[Numbers, Numbers], float | None]:
    """How much the first of the names, less the second if there are two, has grown."""

    def gained(before: Numbers, after: Numbers) -> float | None:
        if not all(name in side for name in names for side in (before, after)):
            return None
        first, *rest = (after[name] - before[name] for name in names)
        return first - sum(rest)

    return gained


def _deviations(before: Numbers, after: Numbers) -> float | None:
    """How much the reward has grown, over its standard deviation at step 0."""
    return _grown(before, after, "eval_reward", "eval_reward_std")


def _deviations_alone(before: Numbers, after: Numbers) -> float | None:
    """The same of the score of the one reward, without the penalties and bounds that it has in the reward."""
    names = [name for name in after if name.startswith("eval_rewards/") and name.endswith("/mean")]
    if len(names) != 1 or all(side.get(names[0]) == side.get("eval_reward") for side in (before, after)):
        return None
    return _grown(before, after, names[0], names[0].replace("/mean", "/std"))


def _grown(before: Numbers, after: Numbers, name: str, spread: str) -> float | None:
    if not before.get(spread) or name not in before or name not in after:
        return None
    return (after[name] - before[name]) / before[spread]


# Title -> number of (metrics at step 0, metrics at the end). Rows of all members are the same, so sums of log-probs compare.
COLUMNS: dict[str, Callable[[Numbers, Numbers], float | None]] = {
    "held-out reward": _last("eval_reward"),
    "reward gained": _gained("eval_reward"),
    "in deviations": _deviations,
    "scores alone": _deviations_alone,
    "KL a completion": _last("eval_objective/kl"),
    "tokens a completion": _last("eval_completions/mean_length"),
    "held-out loss": _last("eval_loss"),
    "accuracy": _last("eval_rewards/accuracies", "eval_accuracy"),
    "token accuracy": _last("eval_mean_token_accuracy"),
    "margin": _last("eval_margin"),
    "margin, nats": _gained("eval_logps/chosen", "eval_logps/rejected"),
    "chosen, nats": _gained("eval_logps/chosen"),
    "KL a token": _last("eval_kl"),
    "general loss": _last("general_loss"),
    "last step's loss": _last("loss"),
    "last step's accuracy": _last("rewards/accuracies", "accuracy"),
    "last step's margin": _last("rewards/margins", "margin"),
    "skipped steps": _last("skipped"),
}
TRAINED = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "accuracy",
    "margin",
)  # of the last step, without held-out rows
NOTES = {
    "accuracy": "accuracy: held-out pairs whose chosen answer has the higher reward",
    "margin": "margin: by how much the chosen answer's reward is above the other's, a held-out pair's mean",
    "margin, nats": "margin: how much further apart the log-probs of the two answers are than at step 0, a pair's mean",
    "KL a token": "KL: to the reference, estimated at the chosen answers' tokens",
    "skipped steps": "skipped: steps whose loss or gradient was not finite; they changed nothing",
    "held-out reward": "reward: of a completion of each held-out prompt, drawn from the same random numbers every time",
    "in deviations": "in deviations: the reward gained over the standard deviation of rewards at step 0",
    "scores alone": "scores alone: the same of the reward's scores without penalties such as the one for a missing end",
    "KL a completion": "KL a completion: log-prob of what was drawn less the reference's, in nats",
    "chosen, nats": "chosen: how much log-prob the chosen answers have gained since step 0; below 0 they have lost",
    "general loss": "general loss: a token's, of text about other things; above the start's the model forgets",
}


@dataclass(frozen=True)
class Table:
    """A row a run. titles: the columns that at least one run has; rows: None where a run lacks the number."""

    labels: tuple[str, ...]
    titles: tuple[str, ...]
    rows: tuple[tuple[float | None, ...], ...]

    @staticmethod
    def of(labels: Sequence[str], before: Sequence[Numbers], after: Sequence[Numbers]) -> "Table":
        """From the held-out metrics at step 0 and at the end."""
        sides = list(zip(before, after, strict=True))
        found = {title: [fn(*side) for side in sides] for title, fn in COLUMNS.items()}
        if any(x is not None for x in found["accuracy"]):
            del found["token accuracy"]  # pairs are judged by what they prefer
        if any(x is not None for x in found["held-out loss"]):
            found = {title: values for title, values in found.items() if not title.startswith("last step")}
        if not any(found["skipped steps"]):
            del found["skipped steps"]
        shown = {title: values for title, values in found.items() if any(x is not None for x in values)}
        return Table(
            tuple(labels), tuple(shown), tuple(zip(*shown.values(), strict=True)) or ((),) * len(labels)
        )

    def text(self) -> str:
        """For a terminal or a log, with what the columns mean."""
        table = RichTable("", box=box.SIMPLE, pad_edge=False)
        for title in self.titles:
            table.add_column(title, justify="right")
        for label, row in zip(self.labels, self.rows, strict=True):
            table.add_row(label, *map(_short, row))
        console = Console(
            file=io.StringIO(), width=40 + 16 * len(self.titles) + max(map(len, self.labels)), no_color=True
        )
        console.print(table)
        lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
        return "\n".join([*(line for line in lines if line), *self._notes()])

    def markdown(self) -> str:
        """The same as a Markdown table."""
        head = [
            "| |" + "".join(f" {title} |" for title in self.titles),
            "|---" * (1 + len(self.titles)) + "|",
        ]
        each = zip(self.labels, self.rows, strict=True)
        rows = [f"| {label} |" + "".join(f" {_short(x)} |" for x in row) for label, row in each]
        return "\n".join([*head, *rows, "", *(f"- {note}" for note in self._notes())])

    def as_json(self) -> dict[str, dict[str, float | None]]:
        """Numbers in full, by label and title."""
        return {
            label: dict(zip(self.titles, row, strict=True))
            for label, row in zip(self.labels, self.rows, strict=True)
        }

    def _notes(self) -> list[str]:
        return [NOTES[title] for title in self.titles if title in NOTES]


def _short(x: float | None) -> str:
    if x is None or not math.isfinite(x):
        return "-" if x is None else str(x)
    return f"{x:.3g}" if abs(x) < 1e-3 and x else f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"


# Title, unit, metric; the second name is subtracted from the first. Held-out curves, or where there are none a step's own.
CURVES = (
    ("loss", "nats", ("loss",)),
    ("accuracy", "share of pairs", ("rewards/accuracies",)),
    ("accuracy", "share of pairs", ("accuracy",)),
    ("margin of the rewards", "a pair", ("margin",)),
    ("margin since step 0", "nats a pair", ("logps/chosen", "logps/rejected")),
    ("chosen log-prob since step 0", "nats an answer", ("logps/chosen",)),
    ("KL to the reference", "nats a token", ("kl",)),
    ("token accuracy", "share of tokens", ("mean_token_accuracy",)),
)


ROLLOUTS = (  # of runs that draw their own rows; held out, and of what was learned from dashed
    ("reward", "a completion", "reward"),
    ("KL to the reference", "nats a completion", "objective/kl"),
    ("length", "tokens a completion", "completions/mean_length"),
    ("entropy", "nats a token", "entropy"),
)


def _held_out(entries: Sequence[Mapping[str, Any]], names: tuple[str, ...]) -> Curve:
    """Steps and values of a held-out metric; of log-probs the change since the first look, for their level says nothing."""
    full = [f"eval_{name}" for name in names]
    there = [e for e in entries if all(e.get(name) is not None for name in full)]
    values = [e[full[0]] - sum(e[name] for name in full[1:]) for e in there]
    start = values[0] if values and names[0].startswith("logps/") else 0.0
    return [e["step"] for e in there], [v - start for v in values]


def _trained(entries: Sequence[Mapping[str, Any]], name: str) -> Curve:
    there = [e for e in entries if e.get(name) is not None]
    return [e["step"] for e in there], [e[name] for e in there]


def _losses(held: dict[str, Curve], own: dict[str, Curve]) -> Panel:
    """Held-out losses and, dashed, the steps' own; over the value at the start where they are of different kinds."""
    starts = {label: y[0] for label, (_, y) in held.items()}
    if min(starts.values()) > 0 and max(starts.values()) > 3 * min(starts.values()):

        def over(curves):
            return {k: (x, [v / starts[k] for v in y]) for k, (x, y) in curves.items() if k in starts}  # noqa: E731

        return Panel("loss over its value at step 0, held out", "step", "ratio", over(held), over(own))
    return Panel("loss, held out", "step", "nats", held, own)


def _of_rollouts(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Panel]:
    out = []
    for title, unit, name in ROLLOUTS:
        held = {label: _held_out(entries, (name,)) for label, entries in curves.items()}
        own = {label: _trained(entries, name) for label, entries in curves.items()}
        both = any(x for x, _ in held.values())
        out.append(
            Panel(
                f"{title}, held out" if both else title,
                "step",
                unit,
                held if both else own,
                own if both else {},
            )
        )
    return out


def panels(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Panel]:
    """A panel a metric that the runs have. curves: lines of metrics.jsonl by label. Dashed: of the steps' own rows."""
    if any("reward" in entry for entries in curves.values() for entry in entries):
        return _of_rollouts(curves)
    out = []
    for title, unit, names in CURVES:
        held = {label: _held_out(entries, names) for label, entries in curves.items()}
        own = {label: _trained(entries, names[0]) for label, entries in curves.items()}
        held = {label: curve for label, curve in held.items() if curve[0]}
        if held and names == ("loss",):
            out.append(_losses(held, own))
        elif held:
            out.append(Panel(f"{title}, held out", "step", unit, held))
        elif names[0].startswith(("logps/", "mean_token")):
            continue
        elif any(x for x, _ in own.values()):
            out.append(Panel(title, "step", unit, own))
    if any(panel.title.startswith("accuracy") for panel in out):
        out = [panel for panel in out if not panel.title.startswith("token accuracy")]
    return out


def write(folder: Path, name: str, table: Table, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """README.md with the table, and curves.png."""
    draw(folder / "curves.png", panels(curves), name)
    links = "\n".join(f"- [{label}](<{label}/README.md>)" for label in table.labels)
    text = f"# {name}\n\n{table.markdown()}\n\n![Curves of all runs](curves.png)\n\nThe runs, each with its adapter:\n{links}\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def draw_one(path: Path, name: str, entries: Sequence[Mapping[str, Any]]) -> None:
    """The curves of one run, from the lines of its metrics.jsonl."""
    draw(path, panels({name: entries}), name, columns=2)
