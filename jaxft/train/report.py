"""What a run tells its user: the opening lines, speed, the exported weights and the model card."""

import collections
import contextlib
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.data.pairs.source import PairRows
from jaxft.data.prompts import Prompts
from jaxft.data.sft import Rows, Source, sft_source
from jaxft.distributed import devices, sharding, sync
from jaxft.nn import param
from jaxft.nn.param import Model
from jaxft.objectives import metrics
from jaxft.runs import compare, log
from jaxft.runs.checkpoint import Checkpoints
from jaxft.train import partition
from jaxft.train.programs import Programs
from jaxft.weights import hf, hub, peft
from jaxft.weights.merge import folded


def stop_tokens(eos: tuple[int, ...], tokenizer: Any) -> tuple[int, ...]:
    """What ends a completion: the config's and the tokenizer's end tokens."""
    return tuple(sorted({*eos, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])}))


def general_rows(data: Any, general: str) -> Rows:
    """The general text as rows of the shape of a run's own, all of them held out."""
    shape = {"max_length": data.max_length, "batch": data.batch, "micro": data.micro}
    shape["packing"] = getattr(data, "packing", True)  # the attention kernel is chosen by it
    return Rows(general, held_out=general, format="text", loss_on="all", too_long="truncate", **shape)


def general_source(data: Any, general: str | None, tokenizer: Any, shards: int = 1) -> Source | None:
    """Batches of the general text; None without one."""
    return None if general is None else sft_source(general_rows(data, general), tokenizer, shards=shards)


def places(data: Any, shards: int) -> int:
    """Rows, or pairs, that a step's program has room for: data.batch, rounded up to what micro x shards rows hold alike."""
    rows = data.micro * shards
    return rows * -(-in_a_step(data) // rows)


def in_a_step(data: Any) -> int:
    """Rows, pairs or prompts that a step learns from: of a rollout each of its minibatches is one."""
    return data.batch // getattr(data, "minibatches", 1)


def unfilled(data: Any, shards: int) -> list[str]:
    """A line where a step works on empty rows because data.batch doesn't fill the parts that the mesh cuts it into.

    shards: parts of each microbatch's rows.
    """
    room, batch, rows = places(data, shards), in_a_step(data), data.micro * shards
    if room == batch:
        return []
    what = "prompts" if isinstance(data, Prompts) else "pairs" if isinstance(data, PairRows) else "rows"
    batches = [str(n * data.batch // batch) for n in (room - rows, room) if n]
    micros = [str(m) for m in range(1, data.micro) if batch % (m * shards) == 0]
    fills = (
        f"data.batch={' or '.join(batches)}"
        + (f", or data.micro={' or '.join(micros)}," if micros else "")
        + " fills them"
    )
    share = f"{room - batch} of the {room} places for {what} in a step are empty ({100 * (1 - batch / room):.0f} %)"
    cut = f"data.batch={batch} is cut into data.micro={data.micro} microbatches, each over {shards} devices or groups of them"
    return [f"{share}: {cut}; {fills}"]


def opening(p: Programs, run: Any, source: Source, begun: tuple[int, int], changes: list[str]) -> list[str]:
    """What is about to happen, for the start of a run. begun: steps of the whole run, and steps done before."""
    t, (steps, first) = p.trained, begun
    some, total = param.count(t.trainable_specs), param.count(t.specs)
    s = source.stats
    held = partition.quantised(t)
    lines = [
        f"devices: {len(jax.devices())} x {jax.devices()[0].device_kind}, processes: {jax.process_count()}",
        f"{some:,} of {total:,} parameters are trained ({100 * some / total:.2f} %)"
        + (f"; held frozen: {held}" if held else ""),
        (s["told"] if "told" in s else packed(s)) + f"; {steps} steps",
        *unfilled(run.data, sharding.row_shards(p.mesh)),
        f"row 0 as the model sees it:\n{source.preview}",
    ]
    if first:
        lines.append(f"going on after step {first}")
        lines += [f"changed since the start: {line}" for line in changes]
    return lines


def packed(s: dict[str, Any]) -> str:
    """How examples fill rows, from a source's stats."""
    return (
        f"{s['examples']} examples in {s['rows']} rows of {s['row_length']} tokens ({100 * s['fill']:.0f} % full), "
        f"{s['held_out']} held out, {s['dropped']} dropped, {s['truncated']} truncated"
    )


def check_ids(source: Source | None, model: Model, ref: str) -> None:
    """Raise ValueError for a token that the model has no embedding for: a gather would take another row instead."""
    largest = source.stats.get("largest_id", 0) if source else 0
    if largest >= model.config.vocab:
        raise ValueError(
            f"{ref}: the tokenizer gives token {largest} and the model has {model.config.vocab} (0 to {model.config.vocab - 1}); "
            "they don't belong together, take the tokenizer that came with the model"
        )


class Meter:
    """Adds up the steps between two logged ones on the host, one step behind the device, and counts the bad ones.

    counters: what a checkpoint keeps, so that a run that goes on logs the same numbers. A step that was not finite adds
    nothing but its tokens; only a window without another one shows its numbers. A Disagreement wants pairs that the model hasn't
    learned from: it is that of the first epoch so far, in which every pair is scored before its own update.
    """

    def __init__(
        self,
        t: partition.Trained,
        rates: np.ndarray,
        source: Source,
        most_bad: int,
        counters: dict[str, Any] | None,
    ):
        start = {"num_tokens": 0, "bad_in_a_row": 0, "good": 0, "skipped": 0, "window": {}, "epoch": {}}
        self._counters = {**start, **(counters or {})}
        self._rates, self._source, self._model, self._most_bad = rates, source, t.model, most_bad
        self._sums, self._epoch = (
            metrics.loaded(self._counters["window"]),
            metrics.loaded(self._counters["epoch"]),
        )
        trains_base = any(jax.tree.leaves(t.mask["base"]))
        self._passes = 3 if trains_base else 2  # forward, gradient by inputs, gradient by weights
        self._device = jax.local_devices()[0]
        self._peak = devices.peak_flops(self._device) * len(jax.devices())
        self._waiting: collections.deque[tuple[int, int, dict[str, Any]]] = collections.deque()
        self._tokens, self._length, self._last = 0, 0, 0
        self._since = time.perf_counter()

    def add(self, step: int, batch: Any, found: dict[str, Any]) -> None:
        """Note one step and wait for the one before it.

        Raises ValueError, naming the rows, when too many steps in a row had a loss or gradient that is not finite.
        """
        tokens, self._length = int((batch.segments > 0).sum()), batch.segments.shape[-1]
        self._tokens += tokens
        self._waiting.append((step, tokens, found))
        self._take(1)

    def _take(self, leave: int) -> None:
        c = self._counters
        while len(self._waiting) > leave:
            step, tokens, found = self._waiting.popleft()
            now = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(found))
            bad = bool(now.pop("skipped").total > 0)
            fresh = {name: now.pop(name) for name in list(now) if isinstance(now[name], metrics.Disagreement)}
            if not bad and step < self._source.steps_per_epoch:
                self._epoch = metrics.add(self._epoch, fresh) if self._epoch else fresh
            self._last = step
            c["num_tokens"] += tokens
            c["bad_in_a_row"] = c["bad_in_a_row"] + 1 if bad else 0
            c["skipped"] += bad
            if c["good"] == 0:
                self._sums = now
            elif not bad:
                self._sums = metrics.add(self._sums, now)
            c["good"] += not bad
            if c["bad_in_a_row"] >= self._most_bad:
                self._give_up(range(step + 1 - self._most_bad, step + 1))

    def _give_up(self, steps: range) -> None:
        rows = [name for step in steps for row in self._source.names(step) for name in row.split(", ")]
        shown = ", ".join(rows[:12]) + (f" and {len(rows) - 12} more" if len(rows) > 12 else "")
        raise ValueError(
            f"loss or gradient was not finite in {len(steps)} steps in a row (steps {steps[0] + 1} to {steps[-1] + 1}); the "
            f"parameters are as before them; look at the rows {shown}, or lower optim.lr with another name=..."
        )

    def counters(self) -> dict[str, Any]:
        """What a checkpoint after the newest step keeps. Waits for the device."""
        self._take(0)
        good = self._sums if self._counters["good"] else {}
        return {**self._counters, "window": metrics.kept(good), "epoch": metrics.kept(self._epoch)}

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """(metrics, perf) of the steps since the last reading. Waits for the device."""
        self._take(0)
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        out = {
            **metrics.read({name: m for name, m in sorted({**self._sums, **self._epoch}.items())}),
            "skipped": self._counters["skipped"],
            "learning_rate": float(self._rates[self._last]),
            "epoch": (self._last + 1) / self._source.steps_per_epoch,
            "num_tokens": self._counters["num_tokens"],
        }
        perf = {
            "seconds": seconds,
            "tokens_per_second": self._tokens / seconds,
            "mfu": self._passes * self._model.flops(self._tokens, self._length) / seconds / self._peak,
            "memory_gib": devices.memory_gib(self._device),
        }
        self._tokens = 0
        self._counters.update(good=0, skipped=0)
        self._sums = {}
        return out, perf

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Leave out of the next reading the time that is spent inside."""
        self._take(0)
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin


class Trace:
    """A profiler trace of the steps from first to last (as the log counts them, from 1) in `folder`; of none with None."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._steps, self._folder, self._on = steps, folder, False

    def before(self, step: int) -> None:
        """Start before the first of them; a run that goes on inside the range starts where it is."""
        if self._steps and not self._on and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, result: Any) -> None:
        """Stop once the last of them is through."""
        if self._on and self._steps and step >= self._steps[1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Write what there is."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()


def export(t: partition.Trained, whole: Any, run: Any, tokenizer: Any, folder: Path) -> Path:
    """Write adapter/ (PEFT layout) if only an adapter was trained, else model/ (Hugging Face layout, merged).

    Every process calls it, and gathers a layer at a time; process 0 writes.
    """
    if run.adapter and not any(jax.tree.leaves(t.mask["base"])):
        score = whole.get("score")
        peft.save_adapter(folder / "adapter", whole["adapter"], run.adapter, run.model, run.weights, score)
        tokenizer = tokenizer if score is None else hf.padded_apart(tokenizer)
        sync.by_first(sync.gathered, lambda: bool(tokenizer.save_pretrained(folder / "adapter")))
        return folder / "adapter"
    base = folded(whole["base"], whole.get("adapter"), run.model.dtype)
    base |= {"score": whole["score"]} if "score" in whole else {}
    hf.save_folder(folder / "model", run.model, base, tokenizer, run.weights)
    return folder / "model"


def judged(metrics: dict[str, float]) -> float | None:
    """What the best step has least of: the held-out loss, or the held-out reward's negative; None without held-out rows."""
    return (
        metrics["eval_loss"]
        if "eval_loss" in metrics
        else -metrics["eval_reward"]
        if "eval_reward" in metrics
        else None
    )


def better_step(saved: Checkpoints, metrics: dict[str, float]) -> int | None:
    """The step of a kept checkpoint that did better on held-out rows than the end; None where there is none."""
    best, end = saved.best(), judged(metrics)
    return best[0] if best and end is not None and best[1] < end else None


def closing(
    job: Any, out: Path, before: dict[str, Any], after: dict[str, Any], words: list[str]
) -> list[str]:
    """The results in words: samples, losses and what the objective says, alarms, where the weights are and how to try them."""
    lines = []
    for old, new in _pairs(before, after)[:2]:
        lines.append(f"\nasked:  {_short(old['prompt'])}\nbefore: {_short(old['completion'])}")
        lines.append(f"after:  {_short(new['completion'])}")
        lines += [f"wanted: {_short(new['reference'])}"] if new["reference"] else []
    lines.append("")
    told = {"eval_loss": "loss on held-out rows", "eval_reward": "reward of held-out prompts"}
    for name, what in {**told, "general_loss": "loss on general text"}.items():
        if name in after["metrics"]:
            was = f"{before['metrics'][name]:.4f} before, " if name in before["metrics"] else ""
            lines.append(f"{what}: {was}{after['metrics'][name]:.4f} after")
    lines += [*words, *job.log.alarms]
    name, what = ("generate.py", '--prompt "..."') if job.run.model.speaks else ("score.py", "--file PAIRS")
    script = os.path.relpath(Path(__file__).parents[2] / "scripts" / name)
    lines.append(f"weights in {out}, a summary in {job.folder / 'README.md'}; to try them:")
    return [*lines, f"python {shlex.quote(script)} --run {shlex.quote(str(job.folder))} {what}"]


def _short(text: str) -> str:
    """One line of at most 240 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 240 else line[:234] + " [...]"


def _pairs(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[dict[str, str], dict[str, str]]]:
    """Samples of the same prompts (their number may have changed in between)."""
    known = {old["prompt"]: old for old in before["samples"]}
    return [(known[new["prompt"]], new) for new in after["samples"] if new["prompt"] in known]


def _quoted(label: str, text: str) -> str:
    return f"{label}\n" + "\n".join(f"> {line}".rstrip() for line in text.splitlines() or [""]) + "\n"


def drawn(folder: Path, count: int = 5) -> str:
    """Of a run that draws completions: its curves, and a table of some of the first and the last ones with their rewards."""
    entries = log.read(folder / "completions.jsonl")
    if not entries:
        return ""
    compare.draw_one(folder / "curves.png", folder.name, log.read(folder / "metrics.jsonl"))
    ends = [
        [e for e in entries if e["step"] == step][:count]
        for step in (entries[0]["step"], entries[-1]["step"])
    ]
    shown = ends[0] + (ends[1] if entries[0]["step"] != entries[-1]["step"] else [])
    number = lambda x: "none" if x is None else f"{x:.3f}"  # noqa: E731
    cell = lambda text: _short(str(text)).replace("|", "\\|")  # noqa: E731
    said = lambda prompt: prompt if isinstance(prompt, str) else prompt[-1]["content"]  # noqa: E731
    names = list(shown[0]["rewards"])
    rows = [
        f"| {e['step']} | {cell(said(e['prompt']))} | {cell(e['completion'])} |"
        + "".join(f" {number(e['rewards'][name])} |" for name in names)
        + f" {number(e['reward'])} |"
        for e in shown
    ]
    head = [
        f"| step | prompt | completion |{''.join(f' {name} |' for name in names)} reward |",
        "|---" * (4 + len(names)) + "|",
    ]
    text = [
        "## Completions it drew",
        "",
        "![Curves](curves.png)",
        "",
        *head,
        *rows,
        "",
        "More are in `completions.jsonl`.",
        "",
    ]
    return "\n".join(text)


def write_card(
    job: Any, out: Path, before: dict[str, Any], after: dict[str, Any], words: Sequence[str] = ()
) -> None:
    """README.md of the run: what was trained on what, with which results and alarms, and how to use it.

    words: what the objective has to say about the run.
    """
    run, s = job.run, job.source.stats
    located = hub.locate(run.weights, config_only=True)
    hosted = run.weights.partition("@")[0] if located.revision else None
    base = run.weights if hosted or run.weights.startswith("pypi:") else Path(run.weights).name
    some, total = param.count(job.programs.trained.trainable_specs), param.count(job.programs.trained.specs)
    a, o = run.adapter, run.optim
    scaled = ", rsLoRA" if a and a.rslora else ""
    kind = f"LoRA adapter (rank {a.rank}, alpha {a.alpha:g}{scaled})" if out.name == "adapter" else "model"
    kind = (
        kind
        if run.model.speaks
        else f"reward model: a {kind.replace('model', 'language model')} with a scalar head"
    )
    how = (
        ""
        if out.name == "adapter" or not a
        else f" A LoRA adapter (rank {a.rank}) that was trained along is merged."
    )
    held = partition.quantised(job.programs.trained)
    how += f" The frozen weights were quantised: {held}." if held else ""
    names = dict.fromkeys([*before["metrics"], *after["metrics"]])
    number = lambda look, name: f"{look['metrics'][name]:.4f}" if name in look["metrics"] else ""  # noqa: E731
    rows = [f"| {name} | {number(before, name)} | {number(after, name)} |" for name in names]
    answers = [
        "\n".join(
            [f"**{' '.join(old['prompt'].split())}**\n", _quoted("Before:", old["completion"]),
             _quoted("After:", new["completion"]), _quoted("The row's own answer:", new["reference"]) if new["reference"] else ""]
        )
        for old, new in _pairs(before, after)
    ]  # fmt: skip
    told = "".join(f"\n- {line}" for line in [*words, *job.log.alarms]) + "\n" * bool(words or job.log.alarms)
    text = f"""---
library_name: {"peft" if out.name == "adapter" else "transformers"}
{f"base_model: {hosted}" if hosted else ""}
tags: [jaxft]
---
# {run.name}

A {kind}, fine-tuned from `{base}` with jaxft on `{Path(run.data.train).name}` ({s["examples"]} examples): {job.steps} steps of \
{run.data.batch} rows, {some:,} of {total:,} parameters trained, {o.optimizer.__name__} with lr {o.lr:g}, seed {run.seed}.{how}
Every setting is in `config.json`, versions and devices in `env.json`, every step in `metrics.jsonl`.

| held-out metric | before | after |
|---|---|---|
{chr(10).join(rows)}
{told}
## Use
The weights are in `{out.name}/`, in the layout of {"PEFT" if out.name == "adapter" else "Hugging Face transformers"}. \
With a clone of jaxft:

    {_use(run.model)}
{_merging(out, run.model, job.tokenizer)}
{drawn(job.folder)}
{chr(10).join(["## Held-out prompts, greedy", *answers]) if answers else ""}"""
    (job.folder / "README.md").write_text(text.replace("\n\ntags:", "\ntags:"), encoding="utf-8")


def _use(model: Model) -> str:
    if model.speaks:
        return 'python scripts/generate.py --run PATH_OF_THIS_FOLDER --prompt "..."'
    return "python scripts/score.py --run PATH_OF_THIS_FOLDER --file PAIRS    # a reward for each answer, read at its last token"


def _merging(out: Path, model: Model, tokenizer: Any) -> str:
    """How to have base and adapter in one, and how a reward model is loaded elsewhere."""
    pad = hf.padded_apart(tokenizer).pad_token_id
    whole = "transformers.AutoModelForSequenceClassification.from_pretrained(FOLDER)"
    alone = f"peft.AutoPeftModelForSequenceClassification.from_pretrained(FOLDER, num_labels=1, pad_token_id={pad})"
    loads = f"\nIn Python: `{alone if out.name == 'adapter' else whole}`, whose `logits[:, 0]` are rewards. \
They are read at the last token, which is to be the answer's end token: leave out what a chat template adds after it.\n"
    merge = "    python scripts/export.py --run PATH_OF_THIS_FOLDER --out merged    # base and adapter in one, for transformers\n"
    return (merge if out.name == "adapter" else "") + ("" if model.speaks else loads)
