"""What a preference loss does: its laws checked, its curves drawn beside those of others, and a short real run of them all.

    python scripts/loss_bench.py --loss my_losses.py:mine [--against dpo ipo simpo] [--claims antisymmetric difference]
    python scripts/loss_bench.py --loss my_losses.py:mine,beta=0.2 --loss my_losses.py:mine,beta=1.0 --steps 20
    python scripts/loss_bench.py --loss my_losses.py:mine --only-look                     # seconds, no model

A loss is file.py:name, package.module:name, or the bare name of one in jaxft.objectives.preference_losses or reference_free; its knobs
follow after commas. Pictures of the curves are <out>/<name>.png. The exit code is 1 where a check of a --loss fails; then nothing
is trained. The run trains an adapter a loss, all together on one base, on the config's pairs (those that ship); its table and
picture lie in <out>/<losses>-<hash of the settings>, so that the same question is answered at once the next time.
"""

import argparse
import hashlib
import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from rich.text import Text  # noqa: E402

from jaxft.objectives import preference_losses, reference_free_losses  # noqa: E402
from jaxft.objectives.check.laws import CLAIMS, check  # noqa: E402
from jaxft.objectives.check.probe import Check, Curve, Probe, curve, probe, span  # noqa: E402
from jaxft.objectives.pair import declaration, loss_signature  # noqa: E402
from jaxft.runs.parse import UNANNOTATED, find_file, format_error, load_callable, parse_value  # noqa: E402
from jaxft.runs.plots import Panel, draw  # noqa: E402
from jaxft.runs.record import describe, differences  # noqa: E402
from jaxft.tree import nearest  # noqa: E402

MARKS = {True: ("ok", "green"), False: ("FAIL", "bold red"), None: ("note", "dim")}
WIDTH = 120  # of a table in a file
BRIEF, LONG = 16, 64  # tokens of the answers in the panel of lengths


@dataclass(frozen=True)
class Loss:
    """A loss of the command line: what it is called in tables, the function, the file that it stands in."""

    label: str
    fn: Callable
    file: Path


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--loss",
        action="append",
        required=True,
        help="a loss to look at, with its knobs: file.py:name,beta=0.2",
    )
    parser.add_argument("--against", nargs="*", default=["dpo"], help="losses to compare with (default: dpo)")
    parser.add_argument(
        "--claims", nargs="*", default=[], help=f"laws that each --loss has to obey: {', '.join(CLAIMS)}"
    )
    parser.add_argument(
        "--columns",
        nargs="*",
        default=[],
        help="further columns of the rows that a loss reads; they are 0 here",
    )
    parser.add_argument("--only-look", action="store_true", help="checks and curves, no run")
    parser.add_argument(
        "--config", default="configs/dpo.py", help="the run to try each loss in (default: configs/dpo.py)"
    )
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of the run")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KNOB=VALUE", help="settings of that config, such as lr=2e-4"
    )
    parser.add_argument("--out", default="runs/loss_bench", type=Path, help="the folder of the pictures")
    return parser.parse_args()


# Losses by their names


def function(name: str) -> tuple[Callable, Path]:
    """The loss that `file.py:name`, `package.module:name` or a bare name means, and its file."""
    if ":" in name:
        fn = load_callable(name)
        where = name.rpartition(":")[0]
        if where.endswith(".py"):
            return fn, find_file(where)
        return fn, Path(inspect.getfile(sys.modules[where]))
    modules = (preference_losses, reference_free_losses)
    known = {n: (m, fn) for m in modules for n, fn in vars(m).items() if takes_pairs(fn, m.__name__)}
    if name not in known:
        near = ", ".join(nearest(name, list(known), 5))
        raise ValueError(f"no loss is called {name!r}; near: {near}; write one of your own as file.py:name")
    return known[name][1], Path(inspect.getfile(known[name][0]))


def takes_pairs(fn: Any, module: str) -> bool:
    """Whether it is a loss of that module."""
    fn = declaration(fn).fn if callable(fn) else fn
    if not inspect.isfunction(fn) or fn.__module__ != module or fn.__name__.startswith("_"):
        return False
    return next(iter(inspect.signature(fn).parameters), "") == "pair"


def knobs(loss: Callable) -> dict[str, tuple[Any, Any]]:
    """Knob -> (annotation, default), without the pair and the state."""
    named = list(loss_signature(loss).parameters.values())[1:]
    try:
        hints = typing.get_type_hints(inspect.unwrap(declaration(loss).fn))
    except (NameError, TypeError):  # an annotation that can't be read says as much as none
        hints = {}
    return {
        p.name: (hints.get(p.name, UNANNOTATED), p.default)
        for p in named
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }


def value(item: str, text: str, kind: Any, default: Any) -> Any:
    """A knob's value from text, of the type of its annotation or else of its default."""
    if kind in (UNANNOTATED, Any):
        if default is UNANNOTATED or default is None:
            raise ValueError(
                f"{item}: neither an annotation nor a default shows its type; annotate it in the loss"
            )
        kind = Callable if callable(default) else type(default)
        kind = int | float if kind is int else kind  # beta=1 by default is no reason to refuse 0.5
    try:
        return parse_value(text, kind)
    except ValueError as error:
        raise ValueError(f"{item}: {error}") from error


def loss_of(text: str) -> Loss:
    """A loss with its knobs set."""
    name, *items = re.split(r",(?=\s*[^\W\d]\w*\s*=)", text)
    fn, file = function(name.strip())
    known, values = knobs(fn), dict[str, Any]()
    for item in items:
        knob, _, given = (x.strip() for x in item.partition("="))
        if knob not in known:
            near = ", ".join(nearest(knob, list(known), 5)) or "none, it has no knobs"
            raise ValueError(f"{name} has no knob {knob!r}; near: {near}")
        values[knob] = value(item.strip(), given, *known[knob])
    label = ",".join([name.rpartition(":")[2], *(item.replace(" ", "") for item in items)])
    return Loss(label, partial(fn, **values) if values else fn, file)


def losses(texts: Sequence[str], taken: Sequence[Loss] = ()) -> list[Loss]:
    """The losses of these texts, each once and with a label of its own, without those that are taken."""
    found = {loss.label: loss for loss in taken}
    known = {(loss.file, loss.label) for loss in taken}
    for text in texts:
        loss = loss_of(text)
        if (loss.file, loss.label) in known:
            continue
        known.add((loss.file, loss.label))
        labels = (loss.label, f"{loss.file.stem}:{loss.label}", f"{loss.file}:{loss.label}")
        label = next(label for label in labels if label not in found)
        found[label] = replace(loss, label=label)
    return list(found.values())[len(taken) :]


# What the bench shows


def line_of(error: ValueError, file: Path) -> str:
    """The error, and the line of the loss's file that it came from."""
    found = (
        re.search(r" \(line \d+\)$", format_error(error.__cause__, file))
        if isinstance(error.__cause__, Exception)
        else None
    )
    return f"{error}{found[0] if found else ''}"


def analyse(loss: Loss, claims: Sequence[str], columns: Sequence[str]) -> tuple[Probe, tuple[Check, ...]]:
    """The loss, ready to be probed, and its checks. Raises ValueError with the line where it fails."""
    try:
        found = probe(loss.label, loss.fn, columns)
        return found, check(found, claims)
    except ValueError as error:
        raise ValueError(line_of(error, loss.file)) from error


def table(checks: Sequence[Check]) -> Table:
    """The checks of a loss, one a row."""
    result = Table(show_header=False, box=None, pad_edge=False)
    for column in range(3):
        result.add_column(no_wrap=column < 2)
    for found in checks:
        mark, style = MARKS[found.ok]
        result.add_row(Text(mark, style), Text(found.name), Text(found.words))
    return result


def show(console: Console, label: str, checks: Sequence[Check]) -> None:
    """A heading and the table."""
    failed = sum(found.ok is False for found in checks)
    verdict = f"{failed} of {len(checks)} checks fail" if failed else "nothing fails"
    console.print(Text(f"\n{label}: {verdict}", "bold red" if failed else "bold"))
    with console.capture() as shown:
        console.print(table(checks))
    print("\n".join(line.rstrip() for line in shown.get().splitlines()), file=console.file)


def scaled(curves: dict[str, list[np.ndarray]]) -> tuple[dict[str, list[np.ndarray]], str]:
    """Curves that share an axis, and what was done for it: where sizes differ much, each label's are divided by their largest."""
    most = {
        label: max(float(np.abs(y[np.isfinite(y)]).max(initial=0)) for y in ys)
        for label, ys in curves.items()
    }
    sizes = [x for x in most.values() if x > 0]
    if not sizes or max(sizes) < 10 * min(sizes):
        return curves, ""
    return {
        label: [y / (most[label] or 1) for y in ys] for label, ys in curves.items()
    }, ", each over its largest"


def panel(title: str, y: str, curves: dict[str, tuple[Curve, list[np.ndarray]]]) -> Panel:
    """curves: label -> margins, and the solid curve or also the dashed one."""
    drawn, note = scaled({label: ys for label, (_, ys) in curves.items()})
    x = {label: seen.margin.tolist() for label, (seen, _) in curves.items()}
    solid = {label: (x[label], ys[0].tolist()) for label, ys in drawn.items()}
    dashed = {label: (x[label], ys[1].tolist()) for label, ys in drawn.items() if len(ys) > 1}
    return Panel(title, "margin c - r, nats", y + note, solid, dashed, level=0.0)


def picture(path: Path, probes: Sequence[Probe]) -> None:
    """Values and gradients over the margin, and values where one answer is longer; the first loss says how far margins go."""
    reach = span(probes[0])
    reach = min(3 * reach, max(reach, *(span(p) for p in probes)))
    seen = {p.name: curve(p, reach) for p in probes}
    rest = {p.name: dict.fromkeys(p.kinds[2:], BRIEF) for p in probes}
    long = {
        p.name: curve(p, reach, {"chosen": LONG, "rejected": BRIEF, **rest[p.name]}).value for p in probes
    }
    brief = {
        p.name: curve(p, reach, {"chosen": BRIEF, "rejected": LONG, **rest[p.name]}).value for p in probes
    }
    panels = [
        panel("value", "loss", {k: (c, [c.value]) for k, c in seen.items()}),
        panel(
            "gradient on log pi(chosen), dashed: on log pi(rejected)",
            "d loss / d nat",
            {k: (c, [c.slope["chosen"], c.slope["rejected"]]) for k, c in seen.items()},
        ),
        panel(
            f"value, chosen {LONG // BRIEF} times as long, dashed: rejected",
            "loss",
            {k: (c, [long[k], brief[k]]) for k, c in seen.items()},
        ),
    ]
    draw(
        path,
        panels,
        f"{probes[0].name}: pairs of {BRIEF} tokens, half the margin gained by chosen, half lost by rejected",
    )


def look(
    mine: Sequence[Loss], others: Sequence[Loss], args: argparse.Namespace
) -> tuple[bool, dict[str, Probe]]:
    """Show the checks of all losses and draw a picture of each of mine beside the others.

    Returns whether no check of mine fails, and the losses that give one value a pair.
    """
    console = Console(
        file=sys.stdout, force_terminal=sys.stdout.isatty(), width=None if sys.stdout.isatty() else WIDTH
    )
    probes, failed = dict[str, Probe](), False
    for loss in (*mine, *others):
        probes[loss.label], checks = analyse(loss, args.claims if loss in mine else (), args.columns)
        show(console, loss.label, checks)
        failed |= loss in mine and any(found.ok is False for found in checks)
        if len(checks) == 1:  # not one value a pair: there is no curve
            del probes[loss.label]
    for loss in mine:
        if loss.label in probes:
            path = args.out / f"{file_name(loss.label)}.png"
            picture(path, [probes[x.label] for x in (loss, *others) if x.label in probes])
            console.print(Text(f"\n{path}"))
    return not failed, probes


# The run


def beta_of(loss: Loss) -> float:
    """The loss's own beta, which scales the rewards in its log; 0.1 where it has none."""
    found = knobs(loss.fn).get("beta", (None, None))[1]
    return float(found) if isinstance(found, int | float) else 0.1


def race(chosen: Sequence[Loss], probes: dict[str, Probe], args: argparse.Namespace) -> int:
    """Train an adapter with each loss, all together, and show where they end. Returns the exit code."""
    from jaxft.objectives.preference import preference as objective
    from jaxft.runs import config
    from jaxft.train import sweep

    run = config.load_config(args.config, args.set)
    for text in args.set:
        _check_setting(
            text, describe(run), describe(config.load_config(args.config, [t for t in args.set if t != text]))
        )
    run = replace(run, loop=replace(run.loop, steps=args.steps, eval_every=max(1, args.steps // 2)))
    thirds = {kind for probe in probes.values() for kind in probe.kinds[2:]}
    if len(thirds) > 1:
        raise ValueError(
            f"some losses want a third answer {' and some '.join(sorted(thirds))}; try them in two runs"
        )
    looked_up = (column for probe in probes.values() for column in probe.columns if column != "margin")
    extras = tuple(dict.fromkeys((*run.data.extras, *args.columns, *looked_up)))
    data = replace(run.data, third=thirds.pop() if thirds else run.data.third, extras=extras)
    runs = {}
    for loss in chosen:
        name = file_name(loss.label)
        goal = partial(objective, loss=loss.fn, beta=beta_of(loss), reference=reference_of(run))
        runs[name] = replace(run, name=name, objective=goal, data=data)
    told = [
        {name: describe(r) for name, r in runs.items()},
        content_of(data.train),
        content_of(data.held_out),
    ]
    known = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    print(
        f"\na run of {run.loop.steps} steps with each loss, together on {run.weights}; it takes a few minutes",
        flush=True,
    )
    return sweep.run(runs, f"{'-'.join(runs)[:60]}-{known}", root=args.out)


def _check_setting(text: str, with_it: Any, without: Any) -> None:
    """Raise ValueError for a setting of the config's own loss, which the losses at hand replace."""
    found = differences(without, with_it)
    if text.startswith(("name=", "run.name=")) or (
        found and all(line.startswith("objective") for line in found)
    ):
        raise ValueError(
            f"--set {text} would change nothing here: the losses replace the config's; write a knob behind its loss"
        )


def content_of(place: Any) -> str | None:
    """A hash of a file of rows, None for another place: changed rows are another run."""
    try:
        return hashlib.sha256(find_file(str(place)).read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


def reference_of(run: Any) -> Any:
    """How the config's objective knows its reference; losses that need none are watched by it all the same."""
    known = run.objective.keywords.get("reference") if isinstance(run.objective, partial) else None
    return "start" if known is None else known


def file_name(label: str) -> str:
    """A label as the name of a file."""
    return re.sub(r"[^\w.=+-]+", "-", label)


def main() -> int:
    """Look at the losses on synthetic pairs, then try them on real ones."""
    args = arguments()
    if args.steps < 1:
        raise ValueError(f"--steps is at least 1, found {args.steps}; for no run use --only-look")
    mine = losses(args.loss)
    others = losses(args.against, mine)
    well, probes = look(mine, others, args)
    if not well:
        print("\nnothing is trained: mend what fails first, or look at it with --only-look")
        return 1
    return 0 if args.only_look else race([x for x in (*mine, *others) if x.label in probes], probes, args)


if __name__ == "__main__":
    from jaxft.runs import cli

    cli.quiet()
    sys.exit(cli.one_line_errors(main))
