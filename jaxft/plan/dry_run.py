"""`jaxft train RECIPE --dry-run`: settings, parameters and planned memory of a run that does not start."""

import json
import os
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax

from jaxft.data.pairs import PairRows, PairSource
from jaxft.distributed import sharding, xla_flags
from jaxft.plan import machines
from jaxft.plan.machines import GIB
from jaxft.plan.plan import Plan, plan
from jaxft.plan.text import plan_report
from jaxft.rl.rollout import Rollouts
from jaxft.runs.settings.config import Resolved, as_written, recipe_knobs
from jaxft.runs.settings.settings_list import Setting, settings_of
from jaxft.train import partition, programs
from jaxft.train.settings import Run
from jaxft.train.start import open_settings
from jaxft.weights.pretrained import load_tokenizer

WIDTH = 110
EXPLAINED = "Settings (* differs from the default of its section; `jaxft settings NAME` explains one)"

Change = tuple[str, str | None, str | None]


@dataclass(frozen=True)
class DryRun:
    """A run that is not started: its settings and their record, parameters, settings of XLA, and plan.

    changed: settings that differ from the recipe's own defaults, as (name, default, value). notes: lines
    about settings that follow from the rows.
    """

    name: str
    record: dict[str, Any]
    settings: list[Setting]
    defaults: dict[str, str | None]
    changed: list[Change]
    parameters: list[partition.ParameterRow]
    table: str
    xla: Sequence[str]
    plan: Plan
    notes: Sequence[str] = ()


def dry_run(settings: Resolved, recipe: Run | None, notes: Sequence[str] = ()) -> DryRun:
    """Plan a run for the devices of this machine. recipe: the same recipe without any setting, None if it
    cannot be called so.
    """
    run: Run = settings.value
    mesh = sharding.make_mesh(run.mesh)
    pairs, bound = planned_pairs(run, sharding.row_shards(mesh))
    with jax.set_mesh(mesh):
        parts = programs.abstract(run)[0].partition
        table, rows = partition.parameter_table(parts, mesh), partition.parameter_rows(parts, mesh)
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
    """Return the source of a run's preference rows, and no lines; or else None, and a line that says that the
    plan is an upper bound. Other rows need neither: their plan has the shape of the run's batches. Of prompts
    there are the warnings of the run's first lines. Raises ValueError for rows that a run would refuse.
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
    """Return the settings of a run; of a section that is none, only that."""
    none = {field.name for field in fields(run) if getattr(run, field.name) is None}
    found = [setting for setting in settings_of(run) if setting.name.partition(".")[0] not in none]
    return [*found, *(Setting(name, "", "none", "") for name in sorted(none))]


def changes(old: Sequence[Setting], new: Sequence[Setting]) -> list[Change]:
    """Return (name, old value, new value) of the settings that differ; None where a run lacks one. Of a
    section that is none in the new ones, only that.
    """
    before, after = ({s.name: s.default for s in settings} for settings in (old, new))
    sections = {name.partition(".")[0] for name in after if "." in name}
    names = [n for n in dict.fromkeys([*after, *before]) if n in after or n.partition(".")[0] in sections]
    return [(n, before.get(n), after.get(n)) for n in names if before.get(n) != after.get(n)]


def changed_knobs(settings: Resolved) -> list[Change]:
    """Return the changes of the recipe's knobs, some of which, such as loss=ipo, are no field of the run."""
    return [
        (name, as_written(knob.default, knob.kind), as_written(settings.knobs[name], knob.kind))
        for name, knob in recipe_knobs(settings.line[0]).items()
        if settings.knobs[name] != knob.default
    ]


def dry_run_text(d: DryRun) -> str:
    """Return a page: counts and bytes, what the command changes, all settings by section, the parameter
    table and the plan.
    """
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
        marked = [setting for setting in settings if d.defaults.get(setting.name) != setting.default]
        rest = [setting for setting in settings if setting not in marked]
        items = [f"*{s.name.rpartition('.')[2]}={s.default}" for s in marked]
        items += [f"{s.name.rpartition('.')[2]}={s.default}" for s in rest]
        lines += [section, *wrapped(items)]
    return "\n".join([*lines, "", d.table, *d.xla, "", plan_report(d.plan)])


def wrapped(items: Sequence[str]) -> list[str]:
    """Return items as indented lines with two spaces between them; none is broken."""
    text = "  ".join(item.replace(" ", "\0") for item in items)
    lines = textwrap.wrap(text, WIDTH - 2, break_long_words=False, break_on_hyphens=False)
    return [f"  {line}".replace("\0", " ") for line in lines]


def dry_run_json(d: DryRun) -> str:
    """Return the record of the settings with the parameter table and the plan, as one JSON object."""
    parameters = [row._asdict() for row in d.parameters]
    facts = {"parameters": parameters, "plan": d.plan.json(), "notes": [*d.notes]}
    return json.dumps({**d.record, **facts}, indent=2)
