"""What a run tells its user: the opening lines, speed, samples, the exported weights and the model card."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft import devices, lora, metrics, params, prepare
from jaxft.data.source import Rows, Source, sft_source
from jaxft.generate import generate
from jaxft.weights import hf, peft


def stop_tokens(eos: tuple[int, ...], tokenizer: Any) -> tuple[int, ...]:
    """What ends a completion: the config's and the tokenizer's end tokens."""
    return tuple(sorted({*eos, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])}))


def general_rows(data: Rows, general: str | None, tokenizer: Any) -> tuple[Any, ...]:
    """Batches of the general text, all of it held out; empty without one."""
    if general is None:
        return ()
    rows = replace(data, train=general, held_out=general, columns=(), format="text", loss_on="all", packing=True, epochs=1.0)
    return sft_source(rows, tokenizer).held_out


def opening(t: prepare.Trained, source: Source, steps: int, first: int, changes: list[str]) -> list[str]:
    """What is about to happen, for the start of a run."""
    some, total = params.count(t.trainable_specs), params.count(t.specs)
    s = source.stats
    lines = [
        f"devices: {len(jax.devices())} x {jax.devices()[0].device_kind}, processes: {jax.process_count()}",
        f"{some:,} of {total:,} parameters are trained ({100 * some / total:.2f} %)",
        f"{s['examples']} examples in {s['rows']} rows of {s['row_length']} tokens ({100 * s['fill']:.0f} % full), "
        f"{s['held_out']} held out, {s['dropped']} dropped, {s['truncated']} truncated; {steps} steps",
        f"row 0 as the model sees it:\n{source.preview}",
    ]
    if first:
        lines.append(f"going on after step {first}")
        lines += [f"changed since the start: {line}" for line in changes]
    return lines


def held_out_prompts(source: Source, count: int) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) of the first `count` held-out examples: the answer begins at the first token with a loss."""
    found: list[tuple[list[int], list[int]]] = []
    for batch in source.held_out:
        for row in range(batch.ids.shape[1]):
            ids, segments = batch.ids[0, row], batch.segments[0, row]
            reads = batch.read[0, row][batch.token_weights[0, row] > 0]
            for segment in range(1, int(segments.max(initial=0)) + 1):
                inside = np.flatnonzero(segments == segment)
                first = reads[segments[reads] == segment].min() + 1
                if len(found) < count and first > inside[0]:
                    found.append((ids[inside[0] : first].tolist(), ids[first : inside[-1] + 1].tolist()))
    return found


def samples(run: Callable, whole: Any, source: Source, tokenizer: Any, count: int) -> list[dict[str, str]]:
    """Held-out prompts with the model's completion and the row's own answer, as text."""
    pairs = held_out_prompts(source, count)
    if not pairs:
        return []
    answers = generate(run, whole, [p for p, _ in pairs], jax.random.key(0), batch=len(pairs))
    text = lambda ids: tokenizer.decode(ids, skip_special_tokens=True).strip()  # noqa: E731
    return [
        {"prompt": text(prompt), "completion": text(answer), "reference": text(wanted)}
        for (prompt, wanted), answer in zip(pairs, answers, strict=True)
    ]


class Meter:
    """Collects each step's metrics on the device, and what the host knows beside them, until they are read."""

    def __init__(self, t: prepare.Trained, schedule: Callable, source: Source, counters: dict[str, int]):
        self.counters = dict(counters)
        self._schedule, self._source = schedule, source
        self._model = t.model
        trains_base = any(jax.tree.leaves(t.mask["base"]))
        self._passes = 3 if trains_base else 2  # forward, gradient by inputs, gradient by weights
        self._device = jax.devices()[0]
        self._peak = devices.peak_flops(self._device) * len(jax.devices())
        self._pending: list[tuple[int, int, int, dict[str, Any]]] = []
        self._skipped: list[int] = []
        self._since = time.perf_counter()

    def add(self, step: int, batch: Any, found: dict[str, Any]) -> None:
        """Note one step; nothing waits for the device here."""
        self._pending.append((step, int((batch.segments > 0).sum()), batch.segments.shape[-1], found))

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """(metrics of the last step, perf since the last reading). Waits for the device."""
        numbers = [metrics.read(found) for *_, found in self._pending]
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        tokens = sum(count for _, count, _, _ in self._pending)
        self.counters["num_tokens"] += tokens
        self._skipped += [step for (step, *_), n in zip(self._pending, numbers, strict=True) if n["skipped"]]
        step, _, length, _ = self._pending[-1]
        out = {
            **numbers[-1],
            "learning_rate": float(self._schedule(step)),
            "epoch": (step + 1) / self._source.steps_per_epoch,
            "num_tokens": self.counters["num_tokens"],
        }
        perf = {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": self._passes * self._model.flops(tokens, length) / seconds / self._peak,
            "memory_gib": devices.memory_gib(self._device),
        }
        self._pending.clear()
        return out, perf

    def restart(self) -> None:
        """Leave out of the next reading what was spent on something else."""
        self._since = time.perf_counter()

    def stop_if_bad(self, bad: Any, most: int) -> None:
        """Raise ValueError, naming the rows, when the last `most` steps all had a non-finite loss or gradient."""
        if int(bad[1]) >= most:
            rows = [name for step in self._skipped[-most:] for name in self._source.names(step)]
            shown = ", ".join(rows[:12]) + (" ..." if len(rows) > 12 else "")
            raise ValueError(
                f"loss or gradient was not finite in {most} steps in a row (steps {self._skipped[-most:]}); parameters are as "
                f"before them; look at rows {shown}, or lower optim.lr"
            )


@contextlib.contextmanager
def trace(steps: tuple[int, int] | None, step: int, folder: Path) -> Iterator[None]:
    """Write a profiler trace of the steps from first to last."""
    if steps and step == steps[0]:
        jax.profiler.start_trace(str(folder))
    yield
    if steps and step == steps[1]:
        jax.profiler.stop_trace()


def export(t: prepare.Trained, whole: Any, run: Any, tokenizer: Any, folder: Path) -> Path:
    """Write adapter/ (PEFT layout) if only an adapter was trained, else model/ (Hugging Face layout, merged)."""
    if run.adapter and not any(jax.tree.leaves(t.mask["base"])):
        peft.save_adapter(folder / "adapter", whole["adapter"], run.adapter, run.model, run.weights)
        tokenizer.save_pretrained(folder / "adapter")
        return folder / "adapter"
    dtype = run.model.dtype
    base = lora.merge(whole["base"], whole.get("adapter"), dtype)
    hf.save_folder(folder / "model", run.model, base, tokenizer, run.weights)
    return folder / "model"


def closing(out: Path, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The results in words: losses before and after, one sample, where the weights are."""
    lines = [
        f"{name}: {before['metrics'][name]:.4f} before, {after['metrics'][name]:.4f} after"
        for name in ("eval_loss", "general_loss")
        if name in after["metrics"]
    ]
    for old, new in list(zip(before["samples"], after["samples"], strict=False))[:2]:
        lines.append(f"prompt: {old['prompt']}\n  before: {old['completion']}\n  after:  {new['completion']}")
    return [*lines, f"weights written to {out}"]


def write_card(run: Any, folder: Path, out: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    """README.md of the run: what was trained on what, with which results, and how to use it."""
    kind = f"LoRA adapter (rank {run.adapter.rank}, alpha {run.adapter.alpha:g})" if run.adapter else "fully fine-tuned model"
    rows = [
        f"| {name} | {before['metrics'].get(name, float('nan')):.4f} | {value:.4f} |" for name, value in after["metrics"].items()
    ]
    answers = [
        f"**{old['prompt']}**\n\n- before: {old['completion']}\n- after: {new['completion']}\n"
        for old, new in zip(before["samples"], after["samples"], strict=False)
    ]
    base = f"base_model: {run.weights}\n" if "://" not in run.weights and ":" not in run.weights else ""
    text = f"""---
library_name: {"peft" if run.adapter else "transformers"}
{base}tags: [jaxft]
---
# {run.name}

A {kind} of `{run.weights}`, trained with jaxft on `{Path(run.data.train).name}`. All settings: `config.json`.

| metric | before | after |
|---|---|---|
{chr(10).join(rows)}

Weights: `{out.name}/`. To try it: `python scripts/generate.py --run {folder} --prompt "..."`.

## Held-out prompts
{chr(10).join(answers)}"""
    (folder / "README.md").write_text(text)
