"""Check and compare preference losses: laws, curves, and a short training run of all.

    python scripts/loss_bench.py --loss my_losses.py:mine [--against dpo ipo simpo] [--claims antisymmetric]
    python scripts/loss_bench.py --loss my.py:mine,beta=0.2 --loss my.py:mine,beta=1.0 --steps 20
    python scripts/loss_bench.py --loss my_losses.py:mine --only-look                 # seconds, no model
    python scripts/loss_bench.py --loss my_losses.py:mine --world noise=0.2      # rows with a known truth
    python scripts/loss_bench.py --loss my_losses.py:mine --world --vary noise=0,0.2,0.4    # and their faults
    python scripts/loss_bench.py --zoo                      # a page of all losses on exact toys, no model

A loss is file.py:name, package.module:name, or the bare name of one in jaxft/objectives/losses/; its knobs
follow after commas. Curves are plotted in <out>/<name>.png. The exit code is 1 if a check of a --loss fails;
then nothing is trained. The run trains one adapter per loss, all together on one base, on the config's pairs
(by default the pairs in configs/data). Its table has the number of held-out pairs, 95 % intervals, losses
relative to step 0, and accuracies at the same KL; differences to the first loss of --against are over the
same pairs, or with --seeds over seeds. Table and picture are in <out>/<losses>-<hash of the settings>; a
finished run with the same settings is not repeated. With --world, <out>/robustness-<hash>/index.html shows
true and annotators' rewards of sampled completions over training, and what the values of --vary cost.
"""

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from rich.text import Text  # noqa: E402

from jaxft.annotations import PREFERENCE_LOSSES  # noqa: E402
from jaxft.cli import cli  # noqa: E402
from jaxft.lab.exact_toys import CLAIMS  # noqa: E402
from jaxft.lab.loss_checks import check_loss  # noqa: E402
from jaxft.lab.loss_evaluation import (  # noqa: E402
    Check,
    Curve,
    NamedLoss,
    Probe,
    loss_beta,
    margin_curve,
    margin_span,
    parse_losses,
    probe,
)
from jaxft.lab.robustness import FAULTS, parse_fault  # noqa: E402
from jaxft.lab.worlds import World, WorldScore, proxy_reward, true_reward  # noqa: E402
from jaxft.lab.zoo import write_zoo  # noqa: E402
from jaxft.report.charts import Panel, draw  # noqa: E402
from jaxft.runs.settings.config import with_fields  # noqa: E402
from jaxft.runs.settings.setting_values import describe, differences, find_file, format_error  # noqa: E402

MARKS = {True: ("ok", "green"), False: ("FAIL", "bold red"), None: ("note", "dim")}
WIDTH = 120  # columns of a table in a file
EVALUATIONS = 5  # of a run in a world, which sample completions
SHORT, LONG = 16, 64  # tokens of the responses in the panel of lengths


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.CommandParser(__doc__)
    parser.add_argument(
        "--loss", action="append", help="a loss to check, with its knobs: file.py:name,beta=0.2"
    )
    parser.add_argument("--against", nargs="*", default=["dpo"], help="losses to compare with (default: dpo)")
    parser.add_argument(
        "--claims", nargs="*", default=[], help=f"properties that each --loss must have: {', '.join(CLAIMS)}"
    )
    parser.add_argument(
        "--columns",
        nargs="*",
        default=[],
        help="additional columns of the rows that a loss reads",
    )
    parser.add_argument("--only-look", action="store_true", help="check and plot, without training")
    parser.add_argument(
        "--config", default="configs/dpo.py", help="the run that trains each loss (default: configs/dpo.py)"
    )
    parser.add_argument("--steps", type=cli.COUNT, default=10, help="optimizer steps of the run (default 10)")
    parser.add_argument(
        "--seeds", type=cli.COUNT, default=1, help="runs of each loss, with seeds 0, 1, ... (default 1)"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KNOB=VALUE", help="settings of that config, such as lr=2e-4"
    )
    parser.add_argument(
        "--world",
        nargs="*",
        metavar="SETTING=VALUE",
        help="train on synthetic pairs whose true reward is known, such as noise=0.2 length_bias=2 pairs=200 "
        "(jaxft/lab/worlds.py), score completions by it during training, and write a page about that",
    )
    parser.add_argument(
        "--vary",
        metavar="SETTING=VALUE,...",
        help=f"train in a world for each value of a setting ({', '.join(FAULTS)}), such as noise=0,0.2,0.4, "
        "and show what it costs each loss",
    )
    parser.add_argument(
        "--zoo", action="store_true", help="write a page of each --loss, by default all, to <out>/zoo.html"
    )
    parser.add_argument(
        "--out", default="runs/loss_bench", type=Path, help="output folder (default: runs/loss_bench)"
    )
    return parser


# Output


def line_of(error: ValueError, file: Path) -> str:
    """Return an error's message, with the line of the loss's source file that raised it, if that is known."""
    location = (
        re.search(r" \(line \d+\)$", format_error(error.__cause__, file))
        if isinstance(error.__cause__, Exception)
        else None
    )
    return f"{error}{location[0] if location else ''}"


def analyse(
    loss: NamedLoss, claims: Sequence[str], columns: Sequence[str]
) -> tuple[Probe, tuple[Check, ...]]:
    """Evaluate a loss on synthetic pairs, and check it. claims: further laws that it must obey (--claims).
    columns: names of the columns of rows that the loss gets. Raises ValueError with the line that fails.
    """
    try:
        probed = probe(loss.label, loss.fn, columns)
        return probed, check_loss(probed, claims)
    except ValueError as error:
        raise ValueError(line_of(error, loss.file)) from error


def table(checks: Sequence[Check]) -> Table:
    """Return a table of the checks of a loss, one per row."""
    result = Table(show_header=False, box=None, pad_edge=False)
    for column in range(3):
        result.add_column(no_wrap=column < 2)
    for check in checks:
        mark, style = MARKS[check.ok]
        result.add_row(Text(mark, style), Text(check.name), Text(check.message))
    return result


def show(console: Console, label: str, checks: Sequence[Check]) -> None:
    """Print the checks of a loss as a table, below a heading with the count of checks that fail."""
    failed = sum(check.ok is False for check in checks)
    verdict = f"{failed} of {len(checks)} checks fail" if failed else "no check fails"
    console.print(Text(f"\n{label}: {verdict}", "bold red" if failed else "bold"))
    with console.capture() as shown:
        console.print(table(checks))
    print("\n".join(line.rstrip() for line in shown.get().splitlines()), file=console.file)


def scaled(curves: dict[str, list[np.ndarray]]) -> tuple[dict[str, list[np.ndarray]], str]:
    """Scale curves so that they can share an axis: if their largest values differ by a factor of 10 or more,
    divide each label's curves by their largest value. Return (curves, a note for the axis label).
    """
    most = {
        label: max(float(np.abs(y[np.isfinite(y)]).max(initial=0)) for y in ys)
        for label, ys in curves.items()
    }
    sizes = [x for x in most.values() if x > 0]
    if not sizes or max(sizes) < 10 * min(sizes):
        return curves, ""
    return {
        label: [y / (most[label] or 1) for y in ys] for label, ys in curves.items()
    }, ", divided by the maximum of each curve"


def panel(title: str, y: str, curves: dict[str, tuple[Curve, list[np.ndarray]]]) -> Panel:
    """Return axes with a line for each loss over the margin. y: label of the axis. curves: label -> (its
    curve, for the margins; [values of the solid line, and of a dashed one]).
    """
    drawn, note = scaled({label: ys for label, (_, ys) in curves.items()})
    x = {label: curve.margin.tolist() for label, (curve, _) in curves.items()}
    solid = {label: (x[label], ys[0].tolist()) for label, ys in drawn.items()}
    dashed = {label: (x[label], ys[1].tolist()) for label, ys in drawn.items() if len(ys) > 1}
    return Panel(title, "margin c - r, nats", y + note, solid, dashed, level=0.0)


def picture(path: Path, probes: Sequence[Probe]) -> None:
    """Plot into `path` losses and gradients over the margin, and losses of pairs with one longer response.

    The range of margins fits the first loss, and is at most three times as large for the others.
    """
    reach = margin_span(probes[0])
    reach = min(3 * reach, max(reach, *(margin_span(p) for p in probes)))
    seen = {p.name: margin_curve(p, reach) for p in probes}
    rest = {p.name: dict.fromkeys(p.kinds[2:], SHORT) for p in probes}
    long = {
        p.name: margin_curve(p, reach, {"chosen": LONG, "rejected": SHORT, **rest[p.name]}).value
        for p in probes
    }
    brief = {
        p.name: margin_curve(p, reach, {"chosen": SHORT, "rejected": LONG, **rest[p.name]}).value
        for p in probes
    }
    panels = [
        panel("value", "loss", {k: (c, [c.value]) for k, c in seen.items()}),
        panel(
            "gradient on log pi(chosen), dashed: on log pi(rejected)",
            "d loss / d nat",
            {k: (c, [c.gradient["chosen"], c.gradient["rejected"]]) for k, c in seen.items()},
        ),
        panel(
            f"value, chosen {LONG // SHORT} times as long, dashed: rejected",
            "loss",
            {k: (c, [long[k], brief[k]]) for k, c in seen.items()},
        ),
    ]
    draw(
        path,
        panels,
        f"{probes[0].name}: pairs of {SHORT} tokens, half the margin gained by chosen, half lost by rejected",
    )


def look(
    mine: Sequence[NamedLoss], others: Sequence[NamedLoss], args: argparse.Namespace
) -> tuple[bool, dict[str, Probe]]:
    """Print the checks of all losses and plot each of `mine` with the others.

    Returns whether all checks of `mine` pass, and label -> Probe of the losses that can be plotted: those
    that return one value per pair.
    """
    console = Console(
        file=sys.stdout, force_terminal=sys.stdout.isatty(), width=None if sys.stdout.isatty() else WIDTH
    )
    probes, failed = dict[str, Probe](), False
    for loss in (*mine, *others):
        probes[loss.label], checks = analyse(loss, args.claims if loss in mine else (), args.columns)
        show(console, loss.label, checks)
        failed |= loss in mine and any(check.ok is False for check in checks)
        if len(checks) == 1:  # not one value per pair: there is no curve
            del probes[loss.label]
    for loss in mine:
        if loss.label in probes:
            path = args.out / f"{file_name(loss.label)}.png"
            picture(path, [probes[x.label] for x in (loss, *others) if x.label in probes])
            console.print(Text(f"\n{path}"))
    return not failed, probes


# The run


def race(
    chosen: Sequence[NamedLoss], probes: dict[str, Probe], args: argparse.Namespace, baseline: str
) -> int:
    """Train an adapter per loss and seed, in each world if there are several, and compare the results.
    Returns the exit code.

    baseline: the label of the loss that the others are compared with, "" for none.
    """
    from jaxft.lab.robustness import FaultLevel, read_world_run, write_robustness

    levels, sweeps, failed = [], [], 0
    for name, value, world in worlds_of(args):
        if name:
            print(f"\nworld: {name}")
        code, sweep, labels = train_losses(chosen, probes, args, world, baseline)
        if code and (code != 1 or world is None or not finished(sweep, labels)):
            return code
        failed |= code  # a run diverged; the page shows it
        sweeps.append(sweep)
        if world is not None:
            runs = {loss: [read_world_run(sweep / run) for run in names] for loss, names in labels.items()}
            if baseline:  # the loss that the others are compared with is the first one
                runs = {file_name(baseline): runs.pop(file_name(baseline)), **runs}
            levels.append(FaultLevel(name, value, world, runs))
    if levels:
        folder = args.out / f"robustness-{content_hash([str(sweep) for sweep in sweeps])}"
        settings = {
            "config": args.config, "steps": args.steps, "seeds": args.seeds, "set": args.set,
            "runs": [str(sweep) for sweep in sweeps],
        }  # fmt: skip
        for path in write_robustness(levels, settings, folder):
            print(path)
    return failed


def finished(sweep: Path, labels: Mapping[str, Sequence[str]]) -> bool:
    """Whether all runs of a sweep have trained to the end, finite or not: each has held-out values."""
    from jaxft.runs.metrics_log import HELD_OUT_ROWS

    return all((sweep / run / HELD_OUT_ROWS).is_file() for names in labels.values() for run in names)


def worlds_of(args: argparse.Namespace) -> list[tuple[str, float, World | None]]:
    """Return (name, value, world) for each world of --world and --vary. name, value: of the varied setting,
    "" and NaN without --vary. The only world is None without --world.
    """
    if args.world is None:
        if args.vary:
            raise ValueError(f"--vary {args.vary} varies a setting of a world; add --world")
        return [("", math.nan, None)]
    texts = [""]
    values: tuple[float, ...] = (math.nan,)
    if args.vary:
        setting, values = parse_fault(args.vary)
        texts = [f"{setting}={int(x) if x.is_integer() else x}" for x in values]
    worlds = [world_of([*args.world, text] if text else args.world) for text in texts]
    if worlds[0].held_out < 2:
        raise ValueError(
            f"--world held_out={worlds[0].held_out}: rewards are compared on at least 2 held-out prompts"
        )
    made = [world.rows() for world in worlds]  # raises before anything is trained
    if any(one == other for one, other in pairwise(made)):
        raise ValueError(f"--vary {args.vary}: two worlds have the same rows; use values further apart")
    return [*zip(texts, values, worlds, strict=True)]


def train_losses(
    chosen: Sequence[NamedLoss],
    probes: dict[str, Probe],
    args: argparse.Namespace,
    world: World | None,
    baseline: str,
) -> tuple[int, Path, dict[str, list[str]]]:
    """Train an adapter per loss and seed in a sweep, and print how they compare.

    world: makes the rows; None for the config's rows. Returns (exit code, the sweep's folder, names of the
    runs by the file name of their loss).
    """
    from jaxft.report import ranking
    from jaxft.runs.metrics_log import METRICS, read_entries
    from jaxft.train.loop import train_sweep
    from jaxft.train.settings import Scoring
    from jaxft.train.start import open_settings

    rows: list[str] = []
    scores: tuple[WorldScore, ...] = ()
    if world is not None:
        train, held_out = world.write(args.out / f"world-{content_hash(describe(world))}")
        rows, scores = (
            [f"data={train}", f"held_out={held_out}"],
            (WorldScore(world, true_reward), WorldScore(world, proxy_reward)),
        )
    resolved = open_settings.resolve(args.config, [*rows, *args.set])
    for text in args.set:
        others = open_settings.resolve(args.config, [*rows, *(t for t in args.set if t != text)])
        _check_setting(text, describe(resolved.value), describe(others.value))
    resolved, lines = open_settings.fitted(resolved)
    print("\n".join(lines), end="\n" * bool(lines), flush=True)
    run: Any = resolved.value
    evaluations = 2 if world is None else EVALUATIONS
    loop = replace(
        run.loop,
        steps=args.steps,
        eval_every=max(1, args.steps // evaluations),
        eval_scores=world is not None,
    )
    if rows and [f"data={run.data.train}", f"held_out={run.data.held_out}"] != rows:
        raise ValueError("--set replaces the rows of --world; leave out its data settings")
    run = replace(run, scoring=replace(run.scoring, by=scores, regex=None) if rows else Scoring(), loop=loop)
    thirds = {kind for probe in probes.values() for kind in probe.kinds[2:]}
    if len(thirds) > 1:
        raise ValueError(
            f"the losses need different third responses ({', '.join(sorted(thirds))}); run them separately"
        )
    looked_up = (column for probe in probes.values() for column in probe.columns if column != "margin")
    extras = tuple(dict.fromkeys((*run.data.extras, *args.columns, *looked_up)))
    data = replace(run.data, third=thirds.pop() if thirds else run.data.third, extras=extras)
    runs: dict[str, Any] = {}
    labels = dict[str, list[str]]()
    for loss in chosen:
        name = file_name(loss.label)
        named_run = replace(run, name=name, objective=objective_of(run, loss), data=data)
        of_loss = {name: named_run} if args.seeds == 1 else with_seeds(named_run, args.seeds)
        labels[name] = [*of_loss]
        runs |= of_loss
    settings = [
        {name: describe(r) for name, r in runs.items()},
        content_of(data.train),
        content_of(data.held_out),
    ]
    digest = content_hash(settings)
    print(
        f"\ntraining {run.loop.steps} steps with each loss on {run.weights}; this takes a few minutes",
        flush=True,
    )
    sweep = f"{'-'.join(file_name(loss.label) for loss in chosen)[:60]}-{digest}"
    named = {label: replace(member, name=f"{sweep}/{label}") for label, member in runs.items()}
    code = train_sweep(sweep, named, root=args.out)
    if baseline and code == 0:
        results = [ranking.read_result(label, args.out / sweep / label) for label in runs]
        curves = {label: read_entries(args.out / sweep / label / METRICS) for label in runs}
        lines = [*ranking.baseline_lines(results, file_name(baseline)), ranking.equal_kl_line(curves)]
        print("\n".join(["", *filter(None, lines)]))
    return code, args.out / sweep, labels


def world_of(settings: Sequence[str]) -> World:
    """Return the World of --world SETTING=VALUE ..., which makes rows whose true rewards are known. Raises
    ValueError for a setting that it does not have.
    """
    return with_fields(World(), *settings)


def content_hash(value: Any) -> str:
    """Return the first eight characters of the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def with_seeds(run: Any, count: int) -> dict[str, Any]:
    """Return label -> a copy of the run with seed 0, 1, ..., count - 1."""
    return {
        f"{run.name},seed={seed}": replace(run, seed=seed, data=replace(run.data, seed=seed))
        for seed in range(count)
    }


def _check_setting(text: str, with_it: Any, without: Any) -> None:
    """Raise ValueError if --set `text` changes only the run's name or its loss, which the bench replaces.

    with_it, without: descriptions of the Run with this setting and without it.
    """
    changed = differences(without, with_it)
    if text.startswith(("name=", "run.name=")):
        raise ValueError(f"--set {text} has no effect: the bench names its runs itself; leave it out")
    if changed and all(line.startswith(("loop.steps", "loop.eval_")) for line in changed):
        raise ValueError(f"--set {text} has no effect: the bench sets steps and evaluations; use --steps")
    if changed and all(line.startswith("objective") for line in changed):
        raise ValueError(
            f"--set {text} has no effect: the bench replaces the config's loss. Use --loss name,knob=value"
        )


def content_of(place: Any) -> str | None:
    """Return the hash of a file of rows, None if `place` is not a file. It is in the run's name, so that
    changed rows make a new run.
    """
    try:
        return hashlib.sha256(find_file(str(place)).read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


def objective_of(run: Any, loss: NamedLoss) -> Any:
    """Return the run's objective with another loss. If it has no reference model, return DPO's objective,
    whose reference is the initial policy.
    """
    from jaxft.objectives.preference import implicit_reward, no_extra_metrics, preference

    beta = loss_beta(loss.fn, 0.1)
    if run.objective(run.model).facts.reference == "none":
        return partial(preference, loss=loss.fn, beta=beta)
    return partial(run.objective, loss=loss.fn, beta=beta, reward=implicit_reward, extra=no_extra_metrics)


def file_name(label: str) -> str:
    """Return a label as a file name."""
    return re.sub(r"[^\w.=+-]+", "-", label)


def main() -> int:
    """Check the losses on synthetic pairs, then train with them."""
    parser = make_parser()
    args = parser.parse_args()
    if args.zoo:
        given = [name for name, x in vars(args).items() if x != parser.get_default(name)]
        unread = [f"--{name.replace('_', '-')}" for name in given if name not in ("zoo", "loss", "out")]
        if unread:
            raise ValueError(
                f"--zoo trains nothing and reads --loss and --out; leave out {', '.join(unread)}"
            )
        losses = parse_losses(args.loss or [*PREFERENCE_LOSSES])
        size = write_zoo(losses, args.out / "zoo.html", partial(print, flush=True))
        print(f"\n{args.out / 'zoo.html'} ({size / 1e6:.1f} MB)")
        return 0
    if not args.loss:
        raise ValueError("name a loss with --loss, or use --zoo for a page of all")
    worlds_of(args)  # raises before anything is computed
    mine = parse_losses(args.loss)
    others = parse_losses(args.against, mine)
    well, probes = look(mine, others, args)
    if not well:
        print("\nnothing is trained: fix the failing checks first, or use --only-look")
        return 1
    if args.only_look:
        return 0
    baseline = next((loss.label for loss in others if loss.label in probes), "")
    return race([x for x in (*mine, *others) if x.label in probes], probes, args, baseline)


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    terminal.outlive_console()
    sys.exit(terminal.one_line_errors(main))
