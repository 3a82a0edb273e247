"""The sections of a report, each a function of the runs that returns HTML, "" for nothing to show.

For models that choose between options (decisions), reliability_section shows how often choices of each
confidence are right (a reliability diagram).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxft.data.progress import clock_time
from jaxft.objectives.decision import CONFIDENCE, CORRECT, ECE
from jaxft.objectives.intervals import wilson
from jaxft.objectives.metrics import CALIBRATION_BINS, HELD_OUT, CalibrationError, count_of, without_count
from jaxft.report import compare, ranking
from jaxft.report.compare import first_and_last
from jaxft.report.html_elements import (
    MOST_COLUMNS,
    escaped,
    folded,
    histogram_picture,
    html_list,
    html_table,
    number_text,
    record_table,
    section,
    token_view,
    value_text,
)
from jaxft.report.run_files import RunFiles
from jaxft.runs.console import TOTAL, time_by_phase
from jaxft.runs.metrics_log import SECONDS, TOKENS
from jaxft.runs.run_record import part_of
from jaxft.runs.run_texts import joint_alarms, same_prompts
from jaxft.runs.versions_and_devices import device_counts

SAMPLES = 24  # prompts in all
COMPLETION_STEPS, COMPLETIONS = 4, 48  # steps of a run whose completions are shown; completions in all
KINDS_OF_DATA = 4  # datasets that are shown
BEST = ' <span class="best">best</span>'
MOST_FOLDED = 3  # runs whose metrics are folded one by one

Runs = Sequence[RunFiles]


def overview_section(runs: Runs) -> str:
    """Return the overview: model, data, steps and time, metrics before and after, and which run is best."""
    results = [result_of(run) for run in runs]
    parts = [facts_of_runs(runs), end_table(results)]
    details = []
    for run, result in zip(runs, results, strict=True):
        before, after = result.before, result.after
        known = dict.fromkeys(without_count(name) for name in {**before, **after})
        held = [name for name in known if name.startswith("eval_") or name == "general_loss"]
        cells = [[escaped(name), *(_number(end, name) for end in (before, after))] for name in held]
        head = ["held-out metric", "first evaluation", "last evaluation"]
        content = html_list(run.notes) + html_table(head, cells, numeric=True)
        details += [folded(f"All held-out metrics of {escaped(run.name)}", content)] if held else []
    every = "\n".join(details)
    parts.append(folded("All held-out metrics", every) if len(details) > MOST_FOLDED else every)
    return section("overview", "Overview", "\n".join(parts))


def result_of(run: RunFiles) -> ranking.RankedRun:
    """Convert a run to the form that ranking.py compares."""
    return ranking.RankedRun(run.name, *compare.first_and_last(run.entries), run.settings, run.rows)


def facts_of_runs(runs: Runs) -> str:
    """Return a table of run_facts. For several runs: a table of equal facts, then one of the differences."""
    facts = {run.name: run_facts(run) for run in runs}
    if len(runs) == 1:
        return record_table(facts)
    first = next(iter(facts.values()))
    shared = {name for name in first if all(values.get(name) == first[name] for values in facts.values())}
    same = {name: value for name, value in first.items() if name in shared}
    differing = {
        run: {name: value for name, value in values.items() if name not in shared}
        for run, values in facts.items()
    }
    table = record_table(differing, only_differences=True)
    return record_table({f"all {len(runs)} runs": same}) + (table and f"<h3>Differences</h3>{table}")


def end_table(results: Sequence[ranking.RankedRun]) -> str:
    """Return tables of the metrics before and after training (the best run is marked) and of means over
    seeds, and the ranking as sentences; "" without metrics.
    """
    table = ranking.table_of(results)
    if not table.titles:
        return ""
    best, cells = ranking.best_labels(results), table.cells()
    if len(results) == 1:  # a row per metric, which fits a narrow screen
        sides = [cell.rpartition(compare.ARROW) for cell in cells[0]]
        head = ["", "before", "after"]
        rows = [[*map(escaped, (title, x, y))] for title, (x, _, y) in zip(table.titles, sides, strict=True)]
    else:
        head = ["", *map(escaped, table.titles)]
        named = [f"{escaped(label)}{BEST if label in best else ''}" for label in table.labels]
        rows = [[name, *map(escaped, row)] for name, row in zip(named, cells, strict=True)]
    parts = ["<h3>At the end</h3>", html_table(head, rows, numeric=True)]
    spread = ranking.repetitions_as_cells(results)
    if spread:
        titles, cells = spread
        rows = [list(map(escaped, row)) for row in cells]
        parts.append("<h4>Mean ± standard deviation over seeds</h4>")
        parts.append(html_table(["", *map(escaped, titles)], rows, numeric=True))
    parts.append(html_list(line.strip() for line in ranking.ranking_lines(results)))
    parts.append(html_list(table.notes(), "note"))
    return "\n".join(parts)


def _number(metrics: Mapping[str, float], name: str) -> str:
    """Return a metric as text, "-" if it is missing. A fraction has its interval and its count of pairs or
    prompts.
    """
    value, count = metrics.get(name), count_of(metrics, name)
    if value is None:
        return compare.TIES if count else "-"
    if count and 0 <= value <= 1:
        interval = wilson(value, count.number).text()
        return f"{number_text(value)} {interval} of {count.number:,.0f} {count.unit}"
    return number_text(value)


def run_facts(run: RunFiles) -> dict[str, Any]:
    """Return name -> value of the main facts about a run: model, loss, data, batch, learning rate, time."""
    settings, last = run.settings, run.entries[-1]["step"]
    data, optim = (part_of(settings, name) for name in ("data", "optim"))
    loss = part_of(settings, "objective")
    inner = part_of(part_of(loss, "args"), "loss") or loss
    adapter = part_of(settings, "adapter")
    trained = [f"LoRA of rank {adapter['rank']}" if "rank" in adapter else "no adapter"]
    if run.parameters:
        total, trainable = parameter_totals(run.parameters)
        trained.append(f"{trainable:,} of {total:,} parameters")
    return {
        "base model": settings.get("weights"),
        "starts from": settings.get("start"),
        "loss": str(inner.get("callable", "")).rpartition(":")[2] or None,
        "trained": ": ".join(trained),
        "training data": data.get("train"),
        "batch": data.get("batch"),
        "learning rate": optim.get("lr"),
        "seed": settings.get("seed"),
        "steps": f"{last:,}" if run.is_finished else f"{last:,} so far; not finished",
        **effort(run),
        "alarms": len(run.alarms),
    }


def effort(run: RunFiles) -> dict[str, Any]:
    """Return the cost of a run: tokens, time in total and of its steps, speed, hardware."""
    perf = [part_of(entry, "perf").get(SECONDS) for entry in run.entries]
    seconds = sum(x for x in perf if isinstance(x, int | float))
    counts = [entry[TOKENS] for entry in run.entries if TOKENS in entry]
    tokens, devices = (counts or [None])[-1], run.environment.get("devices")
    facts: dict[str, Any] = {}
    if isinstance(tokens, int | float):
        facts["tokens"] = f"{tokens:,.0f}"
    if TOTAL in run.seconds:
        facts["time in total"] = time_by_phase(run.seconds)
    if seconds:
        speed = f", {tokens / seconds:,.0f} tokens per second" if tokens else ""
        facts["time of the steps"] = f"{clock_time(seconds)}{speed}"
    if isinstance(devices, list) and devices:
        count = run.environment.get("processes") or 1
        hosts = f", {count} processes" if count != 1 else ""
        facts["hardware"] = f"{device_counts(devices)}{hosts}"
    return facts


def alarms_section(runs: Runs) -> str:
    """Return the alarms, such as a loss that is not finite, each once with the runs that raised it."""
    alarms = joint_alarms({run.name: run.alarms for run in runs})
    items = []
    for text, names in alarms:
        of_all = f"all {len(runs)} runs" if len(names) == len(runs) > 2 else ", ".join(names)
        by = "" if len(runs) == 1 else f"{of_all}: "
        items.append(f'<li class="alarm"><strong>{escaped(by)}</strong>{escaped(text)}</li>')
    quiet = [escaped(run.name) for run in runs if not run.alarms]
    parts = [f"<ul>{''.join(items)}</ul>" if items else "<p>No alarm was raised.</p>"]
    if items and quiet:
        parts.append(f"<p>No alarm was raised in {', '.join(quiet)}.</p>")
    return section("alarms", "Alarms", "\n".join(parts))


def settings_section(runs: Runs) -> str:
    """Return tables of the settings that differ between the runs, and of all settings."""
    records = {
        run.name: {k: plain_value(v) for k, v in run.settings.items() if k not in ("command", "name")}
        for run in runs
    }
    known = {name: record for name, record in records.items() if record}
    if not known:
        return ""
    parts = []
    if len(known) > 1:
        table = record_table(known, only_differences=True)
        parts.append("<h3>Differences</h3>" + (table or "<p>The settings of all runs are the same.</p>"))
    shown = dict(list(known.items())[:MOST_COLUMNS])
    more = f" of the first {len(shown)} runs" if len(shown) < len(known) else ""
    parts.append(folded(f"All settings{more}", record_table(shown)))
    given = {name: part_of(part_of(run.settings, "command"), "fields") for name, run in zip(records, runs)}
    if any(given.values()):
        parts.append(folded("Settings of the command line other than knobs", record_table(given)))
    return section("settings", "Settings", "\n".join(parts))


def plain_value(value: Any) -> Any:
    """Return a value from a record of settings, without the hashes of functions' source code."""
    if isinstance(value, list):
        return [plain_value(item) for item in value]
    if not isinstance(value, dict):
        return value
    hidden = ("source_sha256",) if value.get("args") else ("source_sha256", "args")
    return {name: plain_value(item) for name, item in value.items() if name not in hidden}


def samples_section(runs: Runs) -> str:
    """Return completions of held-out prompts before and after training, grouped by prompt."""
    texts: dict[str, list[tuple[str, str]]] = {}
    for run in runs:
        of = f" ({run.name})" if len(runs) > 1 else ""
        for old, new in same_prompts(run.before, run.after):
            shown = texts.setdefault(new["prompt"], [])
            lines = [(f"before{of}", old["completion"]), (f"after{of}", new["completion"])]
            if shown and shown[0][1] == old["completion"]:  # the runs have the same base
                shown[0] = ("before", old["completion"])
                lines = lines[1:]
            expected = ("the row's own completion", new["reference"])
            shown[:] = [line for line in shown if line != expected] + lines
            shown += [expected] if new["reference"] else []
    blocks = []
    for prompt, lines in list(texts.items())[:SAMPLES]:
        rows = [[escaped(label), f'<div class="text">{escaped(text)}</div>'] for label, text in lines]
        blocks.append(f'<h3 class="prompt">{escaped(prompt, 600)}</h3>' + html_table(["", ""], rows))
    return section("samples", "Held-out prompts, before and after", "\n".join(blocks))


def rewards_section(runs: Runs) -> str:
    """Return completions of the first, the last and some rollouts in between, with their rewards."""
    sampled = [run for run in runs if run.completions]
    if not sampled:
        return ""
    each = max(2, COMPLETIONS // (len(sampled) * COMPLETION_STEPS))
    parts = []
    for run in sampled[: COMPLETIONS // (2 * COMPLETION_STEPS)]:
        title = f"<h3>{escaped(run.name)}</h3>" if len(runs) > 1 else ""
        parts.append(title + completions_table(run.completions, each))
    note = '<p class="note">All of them are in completions.jsonl of the run\'s folder.</p>'
    return section("completions", "Sampled completions with their rewards", "\n".join([*parts, note]))


def completions_table(entries: Sequence[Mapping[str, Any]], each: int) -> str:
    """Return a table of completions with their rewards, from COMPLETION_STEPS steps spread evenly over the
    run.

    entries: lines of completions.jsonl. each: how many completions of a step the table has, from the first
    on.
    """
    steps = list(dict.fromkeys(entry["step"] for entry in entries))
    count = min(COMPLETION_STEPS, len(steps))
    chosen = [steps[round(number * (len(steps) - 1) / max(1, count - 1))] for number in range(count)]
    shown = [e for step in chosen for e in [e for e in entries if e["step"] == step][:each]]
    names = list(dict.fromkeys(name for entry in shown for name in part_of(entry, "rewards")))
    rows = [
        [
            number_text(entry["step"]),
            f'<div class="text">{escaped(last_message(entry.get("prompt")), 1000)}</div>',
            turns_html(entry.get("turns"), entry.get("sampled_turns"))
            or f'<div class="text">{escaped(entry.get("completion", ""), 1500)}</div>',
            *(number_text(part_of(entry, "rewards").get(name)) for name in names),
            f"<strong>{number_text(entry.get('reward'))}</strong>",
        ]
        for entry in shown
    ]
    return html_table(["step", "prompt", "completion", *map(escaped, names), "reward in training"], rows)


def turns_html(turns: Any, sampled: Any = None) -> str:
    """Return an episode's messages after its prompt, each up to 1500 characters, coloured by who wrote them;
    "" without a message of the assistant.

    turns: the episode's chat messages, beginning with the prompt's. sampled: how many turns the model
    sampled, which are the last messages of the assistant; None or 0 if it is unknown: then they begin with
    the assistant's first message, which may be the prompt's.
    """
    messages = [turn for turn in turns or () if isinstance(turn, dict)]
    begins = [number for number, turn in enumerate(messages) if turn.get("role") == "assistant"]
    begins = begins[-sampled:] if isinstance(sampled, int) and sampled > 0 else begins
    shown = []
    for turn in messages[begins[0] :] if begins else ():
        role = str(turn.get("role"))
        calls = [
            f"{call.get('name')}({json.dumps(call.get('arguments'), ensure_ascii=False)})"
            for call in (called.get("function") or {} for called in turn.get("tool_calls") or ())
        ]
        text = "\n".join(filter(None, (str(turn.get("content") or ""), *calls)))
        writer = role if role in ("assistant", "tool", "user") else "user"
        shown.append(f'<div class="text turn {writer}" title="{escaped(role)}">{escaped(text, 1500)}</div>')
    return "\n".join(shown)


def last_message(prompt: Any) -> str:
    """Return the text of a prompt's last message; a prompt that is a string is returned as it is."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        return str(prompt[-1].get("content", ""))
    return str(prompt)


# Descriptions of statistics whose names are unclear.
STATISTICS = {
    "chosen_longer": "fraction of pairs whose chosen response is longer",
    "fill": "fraction of the slots in rows that have a token",
    "largest_id": "largest token id",
    "learned": "loss",
    "learned_tokens": "tokens with a loss",
    "pairs_per_row": "most pairs in a row",
    "prompt_end_moved": "pairs with a token across the end of the prompt",
    "read_length": "slots in a row for tokens with a loss",
    "row_length": "slots in a row for tokens",
    "shared_prompts_save": "fraction of tokens saved by shared prompts",
    "steps": "steps of all epochs; loop.steps may end a run earlier",
    "tokens_with_a_loss": "fraction of tokens with a loss",
}
EXAMPLES_NOTE = "Examples of the first batch; every second token has a fainter line below it. "
LOSS_NOTE = "Tokens with a loss are coloured, deeper for a larger weight; the others are context."
PROMPTS_NOTE = "They are prompts, from which completions are sampled, and have no loss."


def data_section(runs: Runs) -> str:
    """Return statistics of the training rows and examples by token; runs with equal data share them."""
    parts = []
    groups = grouped((run.name, run.data) for run in runs)
    for names, data in groups[:KINDS_OF_DATA]:
        title = f"<h3>{escaped(', '.join(names), 300)}</h3>" if len(groups) > 1 else ""
        parts.append(title + data_of_runs(data))
    more = len(groups) - KINDS_OF_DATA
    parts += [f'<p class="note">{more} more datasets are not shown.</p>'] if more > 0 else []
    return section("data", "Training data", "\n".join(parts)) if groups else ""


def data_of_runs(data: Mapping[str, Any]) -> str:
    """Return the statistics, lengths, invalid rows and examples of a dataset."""
    statistics = [
        [escaped(STATISTICS.get(name, name.replace("_", " "))), number_text(value)]
        for name, value in part_of(data, "statistics").items()
    ]
    parts = [html_table(["", ""], statistics) if statistics else ""]
    lengths = []
    columns = ("min", "p10", "p50", "p90", "p99", "max", "mean")
    for label, counted in part_of(data, "lengths").items():
        cells = [number_text(part_of(counted, "percentiles").get(name)) for name in columns]
        counts = [float(x) for x in counted.get("histogram", []) if isinstance(x, int | float)]
        lengths.append([escaped(label), *cells, histogram_picture(counts)])
    if lengths:
        head = ["length in tokens", *columns, "rows by length, from min to max"]
        parts.append(html_table(head, lengths, numeric=True))
    invalid = [
        [escaped(row.get("reason")), number_text(row.get("rows")), escaped(row.get("first"), 500)]
        for row in data.get("invalid") or []
        if isinstance(row, dict)
    ]
    if invalid:
        parts.append(html_table(["invalid rows that were left out", "rows", "the first one"], invalid))
    examples = [x for x in data.get("examples") or [] if isinstance(x, dict)]
    if examples:
        parts_of = [part for x in examples for part in x.get("parts") or []]
        has_loss = any(weight for part in parts_of for _, weight in part.get("pieces") or [])
        parts.append(f'<p class="note">{EXAMPLES_NOTE}{LOSS_NOTE if has_loss else PROMPTS_NOTE}</p>')
    parts += [example_view(example) for example in examples]
    return "\n".join(parts)


def example_view(example: Mapping[str, Any]) -> str:
    """Return an example of the first batch token by token; the responses of a pair are side by side."""
    views = []
    for part in example.get("parts") or []:
        label = f"<h4>{escaped(part.get('label'))}</h4>" if part.get("label") else ""
        view = token_view(part.get("pieces") or [], int(part.get("more") or 0))
        views.append((part.get("label"), f"<div>{label}{view}</div>"))
    first = [view for label, view in views if label in ("", "prompt")]
    others = [view for label, view in views if label not in ("", "prompt")]
    body = "".join(first) + (f'<div class="columns">{"".join(others)}</div>' if others else "")
    title = f"{escaped(example.get('name'))}: {escaped(example.get('facts'))}"
    return f'<div class="example"><p class="name">{title}</p>{body}</div>'


def parameters_section(runs: Runs) -> str:
    """Return the parameter tables; runs with equal tables share one."""
    parts = []
    groups = grouped((run.name, run.parameters) for run in runs)
    for names, rows in groups:
        title = f"Parameters of {escaped(', '.join(names), 300)}" if len(groups) > 1 else "Parameter table"
        parts.append(folded(title, parameter_table_of(rows), is_open=len(groups) == 1))
    return section("parameters", "Parameters", "\n".join(parts[:KINDS_OF_DATA]))


def parameter_table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of parameters, and how many of them are trained."""
    total, trainable = parameter_totals(rows)
    sharded = any(row.get("sharding") is not None for row in rows)
    head = ["parameter", "shape", "axes", "number", "stored as", *(["sharding"] if sharded else []), ""]
    cells = [
        [
            escaped(row.get("path")),
            escaped(" × ".join(map(str, row.get("shape") or []))) or "1",
            value_text(row.get("axes")),
            f'<span class="count">{number_text(parameter_count(row))}</span>',
            escaped(row.get("storage")),
            *([value_text(row.get("sharding"))] if sharded else []),
            '<span class="trained">trained</span>' if row.get("trained") else "frozen",
        ]
        for row in rows
    ]
    percent = 100 * trainable / max(1, total)
    trained = f"{trainable:,} of {total:,} parameters are trained ({percent:.2f} %)."
    return f"<p>{trained}</p>{html_table(head, cells)}"


def parameter_totals(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Return the number of all parameters and of the trained ones."""
    counts = [(parameter_count(row), bool(row.get("trained"))) for row in rows]
    return sum(count for count, _ in counts), sum(count for count, is_trained in counts if is_trained)


def parameter_count(row: Mapping[str, Any]) -> int:
    """Return the number of elements of a parameter."""
    return math.prod(map(int, row.get("shape") or []))


def environment_section(runs: Runs) -> str:
    """Return versions, flags and devices of each run's last start, with differences between runs marked, and
    a list of all starts.
    """
    known = {run.name: run.environment for run in runs if run.environment}
    if not known:
        return ""
    hidden = ("earlier", "time", "step")
    records = {name: {k: v for k, v in env.items() if k not in hidden} for name, env in known.items()}
    shown = dict(list(records.items())[:MOST_COLUMNS])
    rows = [
        [escaped(name), value_text(start.get("time")), number_text(start.get("step"))]
        for name, env in known.items()
        for start in [*(env.get("earlier") or []), env]
        if isinstance(start, dict) and "time" in start
    ]
    parts = [record_table(shown)]
    if rows:
        parts.append(folded("Starts", html_table(["run", "time (UTC)", "after step"], rows[:200])))
    return section("environment", "Environment", "\n".join(parts))


def grouped(named: Iterable[tuple[str, Any]]) -> list[tuple[list[str], Any]]:
    """Return [(names, value), ...]: names with equal values are together, and names with an empty
    value such as {} or "" are left out.
    """
    groups: dict[str, tuple[list[str], Any]] = {}
    for name, value in named:
        if value:
            groups.setdefault(json.dumps(value, sort_keys=True), ([], value))[0].append(name)
    return list(groups.values())


SIZE, MARGIN = 240, 34  # pixels of the diagram, and of the space for its labels


class Bin(NamedTuple):
    """Held-out decisions whose confidence is in one range: how many, their mean confidence and accuracy."""

    decisions: int
    confidence: float
    accuracy: float


def bins_of(rows: Mapping[str, Mapping[str, float]]) -> list[Bin | None]:
    """Sort held-out decisions into CALIBRATION_BINS equal ranges of confidence; None: a range without any.

    rows: name of a held-out row -> name of a value -> value.
    """
    values = [(x[CONFIDENCE], x[CORRECT]) for x in rows.values() if CONFIDENCE in x and CORRECT in x]
    confidence, correct = jnp.asarray(values, jnp.float32).reshape(-1, 2).T
    sums = np.asarray(CalibrationError.of(confidence, correct, confidence >= 0).sums)
    return [Bin(int(count), x / count, y / count) if count else None for count, x, y in sums.T.tolist()]


def reliability_section(runs: Sequence[RunFiles]) -> str:
    """Return a reliability diagram for each run that has held-out decisions, "" if none has."""
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
        text = f"<p>Calibration error (ECE): {', '.join(errors)} training.</p>"
        parts.append(f"{title}{text}{diagram(bins)}{folded('The bins', table)}")
    note = (
        '<p class="note">Held-out decisions after the last step: a bar is the fraction of right choices in a '
        "range of confidences; for a calibrated model it ends at the diagonal. The darker a bar, the more "
        "decisions it has.</p>"
    )
    return section("reliability", "Reliability", note + "\n".join(parts)) if parts else ""


def diagram(bins: Sequence[Bin | None]) -> str:
    """Return a reliability diagram as an SVG picture: a bar for each bin, as high as its accuracy."""
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
