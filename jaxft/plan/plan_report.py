"""Plans as text: one in detail, several as a table, the hours and cost of a run, and `jaxft train RECIPE
--dry-run`.
"""

import json
import math
import os
import shlex
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import jax

from jaxft.data.pairs import PairRows, PairSource
from jaxft.data.progress import time_in_words
from jaxft.data.prompts import Prompts
from jaxft.data.rows.dataset_rows import check_rows, list_chunks
from jaxft.data.rows.invalid_rows import InvalidRow, InvalidRows
from jaxft.data.rows.mixture import parse_sources
from jaxft.data.sft import Rows
from jaxft.distributed import sharding, xla_flags
from jaxft.plan import machines
from jaxft.plan.machines import GIB
from jaxft.plan.plan import ASSUMED, PROGRAM_PARTS, Estimate, Flops, Plan, plan
from jaxft.rl.rollout_source import Rollouts
from jaxft.runs.settings.config import Resolved, as_written, recipe_knobs
from jaxft.runs.settings.settings_list import Setting, settings_of
from jaxft.train import programs, trainable_params
from jaxft.train.settings import Run
from jaxft.train.start import open_settings
from jaxft.weights.pretrained import load_tokenizer


def plan_report(p: Plan) -> str:
    """Return the full report of a plan as text."""

    def gib(size: float) -> str:
        return f"{size / GIB:9.3f} GiB"

    lines = [f"{p.program} on {p.machine}, {p.devices} device{'s' * (p.devices > 1)}; per device:"]
    lines += [f"  {name:34s} {gib(size)}" for name, size in p.parts.items()]
    if p.total is not None:
        lines.append(f"  {'total':34s} {gib(p.total)}")
    lines += [f"  {'host memory':34s} {gib(p.host)}"] if p.host else []
    lines += [_verdict(p), *p.notes]
    lines += [] if p.flops is None else [_flops_line(p.flops)]
    for kind, row in p.collectives.items():
        moved = f"{gib(row['within'])} within, {gib(row['across'])} across hosts or slices"
        count = row.get("as_all_reduce")
        twice = f", {count:.0f} as all-reduces, which move twice as much" if count else ""
        lines.append(f"  {kind:19s} {row['runs']:7.0f} runs {moved}{twice}")
    lines += [] if p.estimate is None or p.flops is None else _time_lines(p.flops, p.estimate)
    if p.largest_arrays:
        sizes = (f"{name} {size / GIB:.2f}" for name, size in p.largest_arrays.items())
        lines.append(f"largest arrays, GiB: {', '.join(sizes)}")
    cached = " (from the cache)" if p.from_cache else ""
    lines.append(f"compiled in {time_in_words(p.compile_seconds)}{cached}")
    if p.unknown_loops:
        lines.append(f"{p.unknown_loops} loops of unknown length are counted as one iteration")
    return "\n".join(lines)


def record(step: Plan, plans: Sequence[Plan]) -> dict[str, Any]:
    """Return the plan of a run's train step as plain values, as Plan.json does, and the key `programs`.

    plans: of all programs of the run. `programs` has the memory of each; `fits` is whether all of them fit.
    """
    sizes = {p.program: {"total": p.total, "program_bytes": _program_bytes(p), "fits": p.fits} for p in plans}
    return {**step.json(), "programs": sizes, "fits": all(p.fits for p in plans)}


def programs_report(plans: Sequence[Plan]) -> str:
    """Return the GiB of resident arrays, the further GiB of each program, and whether the largest fits."""
    resident = min(
        p.total - _program_bytes(p) if p.total is not None else sum(p.parts.values()) for p in plans
    )
    sizes = (
        f"{p.program} {_program_bytes(p) / GIB:.3f}" if p.total is not None else f"{p.program} out of memory"
        for p in plans
    )
    most = max(plans, key=lambda p: math.inf if p.total is None else p.total)
    return (
        f"resident in all programs: {resident / GIB:.3f} GiB per device; in addition: {', '.join(sizes)}\n"
        f"the largest is {most.program}: {_verdict(most)}"
    )


def _program_bytes(p: Plan) -> int:
    """Return how many bytes per device a program takes, without the resident arrays."""
    return sum(p.parts.get(name, 0) for name in PROGRAM_PARTS)


def _flops_line(f: Flops) -> str:
    empty = ""
    if f.slots > f.tokens:
        empty = f", and on the {100 * f.empty_fraction:.0f} % of its {f.slots:,} token slots that are empty"
    return (
        f"FLOPs: {f.model / f.tokens:.3e} per token, {f.model:.3e} per step of {f.tokens:,} tokens (forward "
        f"and backward by the model's formula); the program runs {f.program:.3e}, "
        f"{100 * (f.program / f.model - 1):.0f} % more for recomputation and adapters{empty}"
    )


def _time_lines(f: Flops, e: Estimate) -> list[str]:
    parts = (
        f"seconds of matmuls {e.compute:.3f}, memory {e.memory:.3f}, overlapped collectives "
        f"{e.overlapped:.3f}, exposed collectives {e.exposed:.3f}; without overlap {e.serial:.3f}"
    )
    rate = f"MFU {100 * e.mfu:.0f} %, HFU {100 * e.hfu:.0f} %, {f.tokens / e.step:,.0f} tokens/s"
    lines = [f"step: {e.step:.3f} s, {rate}; limited by {e.bottleneck} ({parts})"]
    if f.fp8:
        lines.append(
            f"FP8: {100 * f.fp8 / f.program:.0f} % of the program's FLOPs; in bfloat16 its matmuls would "
            f"take {e.without_fp8:.3f} s instead of {e.compute:.3f}"
        )
    return [*lines, f"assumed: {ASSUMED}"]


def _verdict(p: Plan) -> str:
    if p.limit is None and p.missing is None:
        return "the device's memory is unknown"
    if not p.fits:
        limit = f" the limit of {p.limit / GIB:.2f} GiB" if p.limit else " the limit"
        error = f" ({p.why})" if p.why else ""
        return f"does not fit: exceeds{limit} by {(p.missing or 0) / GIB:.2f} GiB{error}"
    assert p.limit is not None and p.total is not None
    text = f"fits, {(p.limit - p.total) / GIB:.2f} of {p.limit / GIB:.2f} GiB are free"
    fraction = xla_flags.planned_memory_fraction(os.environ)
    if p.gpu and p.total > fraction * p.limit:
        text += f"; set {xla_flags.FRACTION}=0.99: a run allocates only {fraction:g} of the GPU"
    return text


def scaling_report(plans: Sequence[Plan]) -> str:
    """Return a table with a row for each plan, then the line of scaling_limit for each plan that fits.

    plans: of one run's train step on machines of different size. A device gathers the same weights on any
    number of devices, while its matmuls shrink with its tokens. So overlapped gathers are hidden while a
    device has enough tokens, and exposed gathers take more than half of a step below that number of tokens.
    """
    lines = [
        f"{'machine':14s} {'devices':>7s} {'tokens':>10s} {'GiB':>7s} {'within':>8s} {'across':>8s} "
        f"{'step s':>7s} {'MFU %':>6s} {'tokens/s':>11s} {'/device':>8s}  limited by"
    ]
    for p in plans:
        moves = p.collectives.values()
        within, across = (sum(row[side] for row in moves) / GIB for side in ("within", "across"))
        size = f"{p.total / GIB:7.2f}" if p.total is not None else "      ?"
        tokens = p.flops.tokens if p.flops else 0
        start = f"{p.machine:14s} {p.devices:7d} {tokens:10,d} {size} {within:8.2f} {across:8.2f}"
        e = p.estimate
        if e is None or not p.fits:
            lines.append(f"{start}  does not fit" if not p.fits else start)
            continue
        rate = tokens / e.step
        lines.append(
            f"{start} {e.step:7.3f} {100 * e.mfu:6.1f} {rate:11,.0f} {rate / p.devices:8,.0f}  {e.bottleneck}"
        )
    lines += [scaling_limit(p) for p in plans if p.estimate is not None and p.fits]
    return "\n".join(lines)


def scaling_limit(p: Plan) -> str:
    """Return a line with the tokens per device at which matmuls take as long as weight gathers. The plan
    must have an estimate.
    """
    e = p.estimate
    assert e is not None and p.flops is not None
    per_device = p.flops.tokens / p.devices
    if not e.weights:
        return f"{p.machine}: {per_device:,.0f} tokens per device; the program gathers no weights"
    enough = per_device * e.weights / e.compute
    times = f"weight gathers take {e.weights:.3f} s and matmuls {e.compute:.3f} s"
    if e.overlapped > e.weights / 2:
        effect = f"Below {enough:,.0f} tokens per device gathers limit a step: B tokens are not faster"
    else:
        effect = (
            f"Gathers are exposed: below {enough:,.0f} tokens per device they take more than half of a step, "
            "and B tokens are at most twice as fast"
        )
    return (
        f"{p.machine}: {per_device:,.0f} tokens per device; {times}. {effect} on more than "
        f"B / {enough:,.0f} devices with fsdp alone (mesh.tensor or mesh.context shard rows further and "
        "communicate activations; mesh.data gathers over fewer devices)"
    )


CHARACTERS = 4  # assumed per token if the tokenizer is missing


@dataclass(frozen=True)
class RunSteps:
    """Number of optimizer steps of a run. source: text on what determines it, such as "loop.steps" or
    "1 epoch of 800 rows". samples: whether the run trains on completions that it samples.
    """

    count: int
    source: str
    samples: bool = False


def steps_of(run: Run, tokenizer: Callable[[], Any]) -> RunSteps:
    """Return a run's number of steps. tokenizer() loads the model's tokenizer, for the lengths of the rows.

    If it raises OSError, as without the model's files, tokens are estimated from characters. Raises
    ValueError or OSError if there are no rows.
    """
    data, samples = run.data, isinstance(run.data, Prompts)
    if run.loop.steps is not None:
        return RunSteps(run.loop.steps, "loop.steps", samples)
    if not isinstance(data, Rows | PairRows | Prompts):
        return RunSteps(data.open(tokenizer()).info.steps, "the run's data")
    length = f"{data.tokens or 0:,} tokens"
    if data.epochs is not None:
        length = f"{data.epochs:g} epoch{'s' * (data.epochs != 1)}"
    try:
        loaded = tokenizer()
    except OSError:  # the model's files are not here
        return _estimated(data, length)
    info = data.open(loaded).info
    return RunSteps(info.steps, f"{length} of {info.stats.examples:,} {data.unit}", samples)


@dataclass(frozen=True)
class Cost:
    """Hours and money of a run.

    seconds: estimated seconds of a step. price: of one device for an hour, in any currency; None if unknown.
    """

    steps: RunSteps
    seconds: float
    devices: int
    price: float | None = None

    @property
    def hours(self) -> float:
        """Hours of all steps."""
        return self.steps.count * self.seconds / 3600

    @property
    def money(self) -> float | None:
        """The price of the run on all devices, None if the price of an hour is unknown."""
        return None if self.price is None else self.hours * self.devices * self.price

    def lines(self) -> list[str]:
        """Return the lines about hours and cost in a plan's report."""
        lines = [
            f"time: {self.steps.count:,} steps ({self.steps.source}) x {self.seconds:.3f} s = "
            f"{time_in_words(3600 * self.hours)}, without loading, compiling, evaluation and sampling"
        ]
        if self.steps.samples:
            lines.append("the rollouts are sampled in addition, which often takes longer than the steps")
        if self.money is not None:
            each = f"{self.devices} device{'s' * (self.devices > 1)} x {self.price:g} an hour"
            lines.append(f"cost: {self.money:.2f} ({time_in_words(3600 * self.hours)} x {each})")
        return lines

    def json(self) -> dict[str, Any]:
        """Return steps, hours and cost as plain values."""
        steps = {"steps": self.steps.count, "steps_from": self.steps.source}
        return {**steps, "hours": self.hours, "cost": self.money}


def unknown_lines(step: Plan) -> list[str]:
    """Return the lines that replace Cost.lines if the plan of the train step has no estimate of its time."""
    why = f"the speed of {step.machine} is not known" if step.fits else "the train step does not fit"
    return [f"time and cost: unknown, because {why}"]


def _count(data: Rows | PairRows | Prompts, ref: str) -> tuple[int, int]:
    """Return how many valid rows a run with the settings `data` reads from the dataset `ref`, and how many
    characters their fields have. Raises ValueError if more rows are invalid than data.allowed_invalid.
    """
    invalid = InvalidRows(data.allowed_invalid, names_first=True)
    rows = characters = 0
    listing = list_chunks(ref).first(data.max_samples)
    for row in chain.from_iterable(chunk.rows() for chunk in listing.chunks()):
        if isinstance(row, InvalidRow):
            invalid.add(row)
        else:
            rows, characters = rows + 1, characters + sum(len(str(x)) for x in row.fields.values())
    check_rows(ref, rows, invalid.total, invalid)
    return rows, characters


def _estimated(data: Rows | PairRows | Prompts, length: str) -> RunSteps:
    """Estimate steps from the characters of a run's rows. length: epochs or tokens to train, as text."""
    parts = [_count(source.adapt(data), source.ref) for source in parse_sources(data.train)]
    rows, characters = (sum(values) for values in zip(*parts, strict=True))
    is_fraction = isinstance(data.held_out, int | float) and data.held_out > 0
    trained = rows - (data.held_out_count(rows) if is_fraction else 0)
    source = f"{length} of {trained:,} {data.unit}, at {CHARACTERS} characters per token"
    source += f", including rows that data.drop={','.join(data.drop)} removes" if data.drop else ""
    tokens, epochs = characters / CHARACTERS * trained / rows, data.epochs or 1.0
    if data.tokens is not None:
        steps = math.ceil(data.tokens / (data.batch * data.max_length))
    elif isinstance(data, Rows) and data.packing:
        steps = math.ceil(epochs * tokens / (data.batch * data.max_length))
    else:
        steps = math.ceil(epochs * trained / data.batch)
    each = data.passes * data.minibatches if isinstance(data, Prompts) else 1
    return RunSteps(max(1, steps) * each, source, isinstance(data, Prompts))


WIDTH = 110
EXPLAINED = "Settings (* differs from the default of its section; `jaxft settings NAME` explains one)"

Change = tuple[str, str | None, str | None]


@dataclass(frozen=True)
class DryRun:
    """Facts about a run that is not started.

    record: the settings as config.json of the run would have them. settings: their names and values.
    defaults: the default that each setting's class declares, by the setting's name. changed: (name, recipe's
    default, value) of settings that the command line changes. parameters: rows of the parameter table. table:
    that table as text. xla: lines about the XLA flags in effect. plan: of the train step. notes: further
    lines for the user, such as that the plan is an upper bound.
    """

    name: str
    record: dict[str, Any]
    settings: list[Setting]
    defaults: dict[str, str | None]
    changed: list[Change]
    parameters: list[trainable_params.ParameterRow]
    table: str
    xla: Sequence[str]
    plan: Plan
    notes: Sequence[str] = ()


def dry_run(settings: Resolved, recipe: Run | None, notes: Sequence[str] = ()) -> DryRun:
    """Plan a run for the devices of this machine.

    settings: of the run. recipe: the Run of the same recipe without the command line's overrides, None if the
    recipe requires some. notes: first lines of DryRun.notes.
    """
    run: Run = settings.value
    mesh = sharding.make_mesh(run.mesh)
    pairs, bound = planned_pairs(run, sharding.row_shards(mesh))
    with jax.set_mesh(mesh):
        parts = programs.abstract(run)[0].partition
        table, rows = (
            trainable_params.parameter_table(parts, mesh),
            trainable_params.parameter_rows(parts, mesh),
        )
    kinds = [*settings_of(Run), *settings_of(type(run.data), "data.")]
    listed = current_settings(run)
    changed = [] if recipe is None else changes(current_settings(recipe), listed)
    values = {(old, new) for _, old, new in changed}  # a knob that is a field too is listed as the field
    changed += [knob for knob in changed_knobs(settings) if recipe is not None and knob[1:] not in values]
    return DryRun(
        name=run.name,
        record=settings.describe(),
        settings=listed,
        defaults={setting.name: setting.default for setting in kinds},
        changed=changed,
        parameters=rows,
        table=table,
        xla=xla_flags.settings_lines(os.environ),
        plan=plan(run, machines.local(), pairs),
        notes=(*notes, *bound),
    )


def planned_pairs(run: Run, shards: int) -> tuple[PairSource | None, list[str]]:
    """Return (source, lines): the opened preference rows for `plan`, else None; and lines for the user.

    Preference rows: the source, which knows the shape of their batches. If the rows or the tokenizer are not
    on this machine, None and a line that the plan is an upper bound. Prompts: None and the warnings of a
    run's start. Other rows: None and no line, as their batches have one shape. shards: row shards of the
    run's mesh. Raises ValueError for rows that a run would refuse.
    """
    if not isinstance(run.data, PairRows | Rollouts):
        return None, []
    reason = open_settings.not_here(run)
    try:
        if not reason:
            source = run.data.open(load_tokenizer(run.weights), shards)
            return (source, []) if isinstance(source, PairSource) else (None, list(source.info.warnings))
    except OSError as error:
        reason = str(error)
    if not isinstance(run.data, PairRows):
        return None, []
    bound = f"all responses have {run.data.max_length} tokens"
    return None, [f"the planned memory is an upper bound, as if {bound}: {reason}"]


def current_settings(run: Run) -> list[Setting]:
    """Return the settings of a run. A section that is None, such as adapter=none, is one setting."""
    none = {field.name for field in fields(run) if getattr(run, field.name) is None}
    listed = [setting for setting in settings_of(run) if setting.name.partition(".")[0] not in none]
    return [*listed, *(Setting(name, "", "none", "") for name in sorted(none))]


def changes(old: Sequence[Setting], new: Sequence[Setting]) -> list[Change]:
    """Return (name, old value, new value) of the settings that differ; a value is None if its list lacks the
    setting. A section that is None in `new`, such as adapter=none, is one change.
    """
    before, after = ({s.name: s.default for s in settings} for settings in (old, new))
    sections = {name.partition(".")[0] for name in after if "." in name}
    names = [n for n in dict.fromkeys([*after, *before]) if n in after or n.partition(".")[0] in sections]
    return [(n, before.get(n), after.get(n)) for n in names if before.get(n) != after.get(n)]


def changed_knobs(settings: Resolved) -> list[Change]:
    """Return (name, default, value) of the knobs, parameters of the recipe's function, that are changed."""
    return [
        (name, as_written(knob.default, knob.kind), as_written(settings.knobs[name], knob.kind))
        for name, knob in recipe_knobs(settings.line[0]).items()
        if settings.knobs[name] != knob.default
    ]


def dry_run_text(d: DryRun) -> str:
    """Return a page of text: totals, changed settings, settings by section, parameter table and plan."""
    fits = "" if d.plan.fits else ", which does NOT fit"
    size = "more than the device has" if d.plan.total is None else f"{d.plan.total / GIB:.2f} GiB"
    lines = [f"{d.name}: {d.table.splitlines()[-1]}", f"planned: {size} per device on {d.plan.machine}{fits}"]
    lines.append(f"command: {shlex.join(d.record['command']['line'])}")
    lines += d.notes
    if d.changed:
        lines += ["", "Changed from the recipe's defaults"]
        lines += [f"  {name}: {old or 'unset'} -> {new or 'unset'}" for name, old, new in d.changed]
    lines += ["", EXPLAINED]
    sections: dict[str, list[Setting]] = {}
    for setting in d.settings:
        sections.setdefault(setting.name.rpartition(".")[0] or "run", []).append(setting)
    for section, settings in sections.items():
        marks = {s.name: "*" if d.defaults.get(s.name) != s.default else "" for s in settings}
        items = [f"{marks[s.name]}{s.name.rpartition('.')[2]}={s.default}" for s in settings]
        lines += [section, *wrapped(sorted(items, key=lambda item: item[0] != "*"))]
    return "\n".join([*lines, "", d.table, *d.xla, "", plan_report(d.plan)])


def wrapped(items: Sequence[str]) -> list[str]:
    """Return items joined by two spaces and wrapped into indented lines; no item is broken."""
    text = "  ".join(item.replace(" ", "\0") for item in items)
    lines = textwrap.wrap(text, WIDTH - 2, break_long_words=False, break_on_hyphens=False)
    return [f"  {line}".replace("\0", " ") for line in lines]


def dry_run_json(d: DryRun) -> str:
    """Return DryRun.record as the text of a JSON object, with `parameters`, `plan` and `notes` added."""
    parameters = [row._asdict() for row in d.parameters]
    facts = {"parameters": parameters, "plan": d.plan.json(), "notes": [*d.notes]}
    return json.dumps({**d.record, **facts}, indent=2)
