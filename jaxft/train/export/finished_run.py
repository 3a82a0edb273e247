"""Write the results of a finished run: weights of the last and best step, model card, summary, a sweep's
table.
"""

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from jaxft.batch import TrainState
from jaxft.data.decisions import paths_of_decisions
from jaxft.data.rows.mixture import source_names
from jaxft.distributed import devices, processes, sync
from jaxft.distributed.disk import write_durably
from jaxft.distributed.sync import is_first
from jaxft.models import model_types
from jaxft.nn import tree
from jaxft.nn.tree import Params
from jaxft.report import charts
from jaxft.runs import run_record, run_texts
from jaxft.runs.checkpoint import Checkpoints
from jaxft.runs.loaded_weights import decision_prompts
from jaxft.runs.metrics_log import HELD_OUT_ROWS, METRICS, TOKENS, add_files, json_value
from jaxft.runs.run_texts import Evaluation
from jaxft.runs.terminal import printable_line
from jaxft.train import programs
from jaxft.train.compiled import Compiled, HeldOutValues
from jaxft.train.evaluate.evaluate import selection_score
from jaxft.train.export import export
from jaxft.train.export.calibrate import calibrate_base, print_line
from jaxft.train.logs.clock import hardware, time_line
from jaxft.train.logs.logs import Logs
from jaxft.train.start.jobs import EndedBy, Job, Member
from jaxft.train.sweep import write_table
from jaxft.weights.edit.lora_start import read_start
from jaxft.weights.hf import hf_read, hf_write, hub
from jaxft.weights.hf.model_card import Card, base_name, front_matter, write_card
from jaxft.weights.peft.adapter_folders import cached_base_notes


def report_finished(job: Job, steps: int) -> int:
    """Print where the results of a finished run are; return the exit code."""
    calibrate_base(job.calibration, job.folder, print_line)  # commands that use the run need its codes
    failed = processes.from_first_process(lambda: run_record.failed_members(job.folder))
    if not is_first():
        return int(bool(failed))
    card, name = job.folder / run_record.CARD, "name=..." if job.sweep is None else "--name"
    if job.sweep is not None:
        print(card.read_text(encoding="utf-8"))
    kind = "run" if job.sweep is None else "sweep"
    print(f"{job.folder}: this {kind} is finished ({steps} steps); its results are in {card}")
    more = "loop.steps, data.epochs or data.tokens"
    if steps < job.steps:
        more = "loop.patience or set it to none"
        more = more if run_record.early_end(job.folder, "planned") is None else "loop.steps"
    print(f"to continue it, raise {more}; to start again, choose another {name}")
    for member in job.members:
        record, log = member.folder / "config.json", member.folder / METRICS
        if not record.is_file():
            run_record.write_durable_json(record, member.record)
            print(f"{record}: no such file; written again from the settings of this command")
        if not log.is_file():
            print(f"warning: {log}: no such file; the log of this run is lost")
    if failed:
        print(f"{', '.join(failed)}: not finished, the steps or the held-out loss are not finite")
    return int(bool(failed))


def write_held_out(job: Job, values: list[HeldOutValues]) -> None:
    """Write held_out.jsonl of each member: the name and the values of each held-out row after the last step,
    from which `jaxft compare` takes differences on the same rows. A member without any has no such file. If
    two files of one name hold out rows, a repeated row name gets a number: "a.jsonl:1 (2)".
    """
    if not is_first():
        return
    name = job.sources[0].held_out_name  # a sweep's members have the same held-out rows
    for member, (rows, prompts) in zip(job.members, values, strict=True):
        named = [*((name(at), means) for at, means in sorted(rows.items())), *prompts.items()]
        seen, lines = Counter[str](), list[str]()
        for row, means in named:
            seen[row] += 1
            label = row if seen[row] == 1 else f"{row} ({seen[row]})"
            lines.append(json.dumps({"row": label, **json_value(means)}) + "\n")
        if lines:
            write_durably(member.folder / HELD_OUT_ROWS, "".join(lines).encode())


def export_members(
    job: Job, states: tuple[TrainState, ...], frozen: tuple[Params, ...], finished: list[bool]
) -> list[Path | None]:
    """Write the finished members' weights; return their folders, None for others. Every process calls it."""
    return [
        _export(m, tree.combine(state.trainable, fixed), job.tokenizer, m.folder) if is_finished else None
        for m, state, fixed, is_finished in zip(job.members, states, frozen, finished, strict=True)
    ]


def export_best(
    job: Job,
    saved: Checkpoints,
    compiled: Compiled,
    frozen: tuple[Params, ...],
    after: list[Evaluation],
    logs: Logs,
) -> None:
    """Write `best/` for each member that has a checkpoint with a better held-out score than its last step."""
    for number, (member, end) in enumerate(zip(job.members, after, strict=True)):
        best, last = saved.best(number), selection_score(end["metrics"], member.run.loop)
        if best is None or last is None or not best[1] < last:
            continue
        restored: Any = saved.restore(job.abstract_states, best[0])
        states = compiled.averaged(restored[0])
        params = tree.combine(states[number].trainable, frozen[number])
        folder = _export(member, params, job.tokenizer, member.folder / "best")
        name = f"{member.label}: " if member.label else ""
        logs.message(
            f"{name}step {best[0]} has a better held-out score than the last step; "
            f"its weights are in {folder}"
        )


def write_reports(
    job: Job, logs: Logs, weights: list[Path | None], before: list[Evaluation], after: list[Evaluation]
) -> None:
    """Write model cards, summaries and a sweep's table; then print the results. Every process calls it.

    weights: the folders that `export_members` returned; without one there is no model card.
    """
    notes = [
        [
            *m.programs.objective.report.summary(log.first, log.last),
            *_averages(m),
            *([end["part_note"]] if "part_note" in end else []),
            *end["score_faults"],
            *(cached_base_notes(folder, m.run.weights) if folder and folder.name == "adapter" else []),
            *log.alarms,
        ]
        for m, folder, log, end in zip(job.members, weights, logs.members, after, strict=True)
    ]
    table, perf = "", [_perf(logs, number) for number in range(len(job.members))]
    if is_first():
        for number, member in enumerate(job.members):
            folder = weights[number]
            if folder is not None:
                lines = [*notes[number], f"Training {time_line(perf[number])}."]
                card = _card(job, number, folder, (before[number], after[number]), lines)
                (member.folder / run_record.CARD).write_text(run_texts.model_card(card), encoding="utf-8")
            summary = {
                "before": before[number],
                "after": after[number],
                "notes": [line for line in notes[number] if line not in logs.members[number].alarms],
                "alarms": logs.members[number].alarms,
                "perf": perf[number],
            }
            summary["files"] = run_record.result_hashes(member.folder)
            early: dict[EndedBy | None, dict[str, int | None]] = {
                "patience": {"patience": member.run.loop.patience},
                "callback": {"planned": job.planned},
            }
            content: dict[str, Any] = {"steps": job.steps, **early.get(job.ended_by, {}), **summary}
            run_record.sync_results(member.folder)
            run_record.write_durable_json(member.folder / run_record.SUMMARY, content)
            add_files(member.folder / METRICS, [member.folder / name for name in run_record.RECORD])
        if job.sweep is not None:
            first, last = (
                {m.label: e["metrics"] for m, e in zip(job.members, end, strict=True)}
                for end in (before, after)
            )
            failed = [m.label for m, folder in zip(job.members, weights, strict=True) if folder is None]
            table = write_table(job.folder, job.sweep.name, job.steps, (first, last), failed)
            add_files(job.folder / METRICS, [job.folder / name for name in run_record.RECORD])
    processes.barrier()  # the run is finished for all processes or for none
    for log, folder in zip(logs.members, weights, strict=True):
        log.mark("failed" if folder is None else "finished")
    took = time_line({**perf[0], "tokens": sum(p["tokens"] for p in perf)})
    notes = [[*lines, took] for lines in notes]
    for line in _result_lines(job, logs, weights, (before, after), notes, table):
        logs.message(line)


def _perf(logs: Logs, number: int) -> dict[str, Any]:
    """Return a member's times, tokens, memory and hardware, for summary.json. number: its index."""
    log = logs.members[number]
    return {
        "seconds": {name: round(seconds, 3) for name, seconds in logs.clock.seconds().items()},
        "tokens": int(log.last.get(TOKENS, 0)),
        "memory_gib": round(devices.memory_gib(jax.local_devices()[0]), 3),
        "hardware": hardware(),
    }


def _averages(member: Member) -> list[str]:
    """Return a line for the card if the weights are averages (optim.ema, schedule-free), else []."""
    if member.programs.optimizer.averaged is None:
        return []
    how = f"optim.ema={member.run.optim.ema}" if member.run.optim.ema else member.programs.optimizer.name
    return [f"evaluated and exported weights are averages over the steps ({how})"]


def _result_lines(
    job: Job,
    logs: Logs,
    weights: list[Path | None],
    ends: tuple[list[Evaluation], list[Evaluation]],
    notes: list[list[str]],
    table: str,
) -> list[str]:
    """Return the lines printed at the end. ends: evaluations before and after training. notes: lines about
    each member. table: a sweep's.
    """
    if job.sweep is None:
        (before,), (after,) = ends
        generates = job.lead.programs.partition.model.generates
        assert weights[0] is not None
        script = "evaluate" if _served(job.lead) else "generate" if generates else "score"
        return run_texts.result_lines(job.folder, weights[0], before, after, notes[0], script)
    by_label = {m.label: log.alarms for m, log in zip(job.members, logs.members, strict=True)}
    joint = run_texts.joint_alarms(by_label)
    alarms = [f"{', '.join(labels)}: {alarm}" for alarm, labels in joint]
    where = f"the table is in {job.folder / run_record.CARD}, the curves in {job.folder / 'curves.png'}"
    return [*alarms, f"\n{table}", notes[0][-1], f"{where}, each member's folder next to them"]


def _export(member: Member, params: Params, tokenizer: Any, folder: Path) -> Path:
    """Write a member's weights and their model card into `folder`; return where the weights are."""
    start = read_start(member.folder, member.run.model, member.run.adapter)
    out = export.export_run(member.programs.partition, params, member.run, tokenizer, folder, start)
    card = _weights_card(member, tokenizer, out)

    def describe() -> None:
        write_card(out, card)
        decision_prompts(member.record).write(out)

    sync.exchange_first(sync.gather_texts, describe)
    return out


def _weights_card(member: Member, tokenizer: Any, out: Path) -> Card:
    """Return the card of the folder with a member's weights; the run's card repeats its metadata."""
    run, merged = member.run, out.name == "model"
    kind = "Weights"
    if run.adapter and not merged:
        written = run.adapter.exported
        method = "DoRA" if written.dora else "LoRA"
        kind = f"A {method} adapter (rank {written.rank}, alpha {written.alpha:g})"
    scores, multimodal = not run.model.generates, hf_read.text_part_of(run.weights) is not None
    text = (
        f"{kind}, fine-tuned from `{base_name(run.weights)}` with jaxft on "
        f"`{source_names(run.data.train)}`. The run's README.md has settings and results."
        f"{decision_prompts(member.record).described}"
    )
    return Card(
        title=run.name, base=run.weights, relation="finetune" if merged else "adapter",
        library="transformers" if merged else "peft", description=text, data=run.data.train, scores=scores,
        pad=hf_write.with_distinct_pad_token(tokenizer).pad_token_id if scores else None,
        loads=not scores or model_types.has_classifier(run.model.config),
        multimodal=multimodal and not scores, text_decoder=multimodal and scores and not merged,
    )  # fmt: skip


def _served(member: Member) -> tuple[str, ...]:
    """Return the HTTP endpoints that serve a decision model, () for any other model."""
    return paths_of_decisions(member.record.get("formats", ()))


def _card(
    job: Job, number: int, weights: Path, ends: tuple[Evaluation, Evaluation], notes: list[str]
) -> run_texts.ModelCard:
    member = job.members[number]
    run, model = member.run, programs.model_summary(member.programs)
    card = _weights_card(member, job.tokenizer, weights)
    line = member.record.get("command", {}).get("line", [])  # [] for a member of a sweep
    return run_texts.ModelCard(
        name=run.name, metadata=front_matter(card), data=source_names(run.data.train),
        base=run.weights if hub.hub_name(run.weights) else Path(run.weights).name,
        examples=job.source_of(number).info.stats.examples, steps=job.steps, batch=run.data.batch,
        optimizer=member.programs.optimizer.name, lr=run.optim.lr, seed=run.seed, model=model,
        adapter=run.adapter, merged=weights.name == "model", served=_served(member),
        labels=decision_prompts(member.record).described, before=ends[0], after=ends[1], notes=notes,
        curves=charts.pictures_section(member.folder),
        completions=run_texts.completions_section(member.folder),
        command=printable_line(shlex.join(["jaxft", "train", *line])) if line else "",
        pad=card.pad, text_decoder=card.text_decoder,
    )  # fmt: skip
