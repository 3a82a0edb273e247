"""Texts for the user of a run: start-up lines, result lines and the model card."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from jaxft.data.rows.shipped import script_command
from jaxft.nn.adapters.lora import Adapter
from jaxft.objectives.alarms import GENERAL_LOSS
from jaxft.objectives.decision import BRIER, ECE, LOG_LOSS
from jaxft.objectives.intervals import Interval, wilson
from jaxft.objectives.metrics import HELD_OUT, LOSS, count_of, without_count
from jaxft.objectives.pair import ACCURACY
from jaxft.objectives.reward_model import ACCURACY as REWARD_ACCURACY
from jaxft.runs.metrics_log import COMPLETIONS, REWARD, SCORES, read_entries
from jaxft.runs.terminal import markdown_table
from jaxft.weights.hf.model_card import NO_CLASSIFIER, USE_SECTION

HEADLINES = {  # metrics that the result lines show, in this order
    HELD_OUT + LOSS: "loss on held-out rows",
    HELD_OUT + ACCURACY: "accuracy on held-out pairs",
    HELD_OUT + REWARD_ACCURACY: "accuracy on held-out pairs",
    HELD_OUT + LOG_LOSS: "log loss of held-out decisions",
    HELD_OUT + BRIER: "Brier score of held-out decisions",
    HELD_OUT + ECE: "calibration error (ECE) of held-out decisions",
    HELD_OUT + REWARD: "reward of held-out prompts",
    GENERAL_LOSS: "loss on general text",
}
FIRST_ROW = "first row as the model reads it:"
ROW_TEXTS = (FIRST_ROW, "\nprompt: ", "after: ", "expected: ")  # how messages with the text of rows begin
INTERVALS = "In brackets: the 95 % interval for that number of pairs or prompts."
COMPLETIONS_PER_STEP = 5  # in the model card's table
ALL_TIES = "all ties"  # an accuracy where the model prefers neither response of any pair


class Sample(TypedDict):
    """A held-out prompt with the model's completion and the completion of its row ("" where the row has
    none). finish: why the completion ends; "nonfinite" for logits that are not finite.
    """

    prompt: str
    completion: str
    reference: str
    finish: Literal["stop", "length", "nonfinite"]


class Evaluation(TypedDict):
    """The evaluation before the first step or after the last one.

    samples: completions of held-out prompts, to be printed. scored: number of prompts whose completions were
    scored. intervals: 95 % intervals of the means over these prompts, by metric. score_faults: lines about
    completions without a score. nonfinite: number of prompts of which a completion ended because of
    non-finite logits. part, part_note: present only if loop.eval_fraction limits evaluations. part: the rows
    that were evaluated, such as "11 of 50 held-out rows". part_note: the same as a line for the user.
    """

    metrics: dict[str, float]
    samples: list[Sample]
    scored: int
    intervals: Mapping[str, Sequence[float]]
    score_faults: list[str]
    nonfinite: int
    part: NotRequired[str]
    part_note: NotRequired[str]


@dataclass(frozen=True)
class ModelSummary:
    """Parameter counts of a model. quantised: how frozen weights are quantised, as text; "" if none is.
    generates: whether it writes text; a reward model does not. classifier: whether transformers has an
    AutoModelForSequenceClassification of this architecture, to load a reward model with.
    """

    trainable: int
    total: int
    quantised: str = ""
    generates: bool = True
    classifier: bool = True


@dataclass(frozen=True)
class StepRows:
    """How many rows an optimizer step has, and how many row slots its compiled program has.

    unit: what a slot is for: "rows", "pairs" or "prompts". batch, micro, minibatches: data.batch, data.micro
    and data.minibatches; a rollout's batch is divided into `minibatches` optimizer steps. shards: into how
    many parts the mesh divides the rows of a microbatch.
    """

    unit: str
    batch: int
    micro: int
    shards: int
    minibatches: int = 1

    @property
    def filled(self) -> int:
        """Rows of a step that have data."""
        return self.batch // self.minibatches

    @property
    def slots(self) -> int:
        """Row slots of a step: `filled`, rounded up to a multiple of micro x shards."""
        multiple = self.micro * self.shards
        return multiple * -(-self.filled // multiple)


def empty_slot_lines(rows: StepRows) -> list[str]:
    """Return a line with a remedy if a step computes on empty rows, else []."""
    filled, slots, multiple = rows.filled, rows.slots, rows.micro * rows.shards
    if slots == filled:
        return []
    batches = [str(n * rows.minibatches) for n in (slots - multiple, slots) if n]
    micros = [str(m) for m in range(1, rows.micro) if filled % (m * rows.shards) == 0]
    remedy = f"data.batch={' or '.join(batches)}"
    remedy += f", or data.micro={' or '.join(micros)}," if micros else ""
    return [
        f"{slots - filled} of the {slots} slots for {rows.unit} in a step are empty "
        f"({100 * (1 - filled / slots):.0f} %): data.batch={rows.batch} is split into "
        f"data.micro={rows.micro} microbatches, each sharded over {rows.shards} devices "
        f"or groups of devices; {remedy} fills them"
    ]


def parameter_line(model: ModelSummary) -> str:
    """Return a line with the trainable and total parameters, and how the frozen ones are quantised."""
    percent = 100 * model.trainable / model.total
    line = f"{model.trainable:,} of {model.total:,} parameters are trainable ({percent:.2f} %)"
    return line + (f"; frozen: {model.quantised}" if model.quantised else "")


TRIED_WITH = {  # the options of a command that tries the weights of a run
    "generate": '--prompt "..."',
    "score": "--file PAIRS",
    "evaluate": "--file ROWS --out PROBABILITIES",
}


def result_lines(
    folder: Path,
    weights: Path,
    before: Evaluation,
    after: Evaluation,
    notes: list[str],
    script: str = "generate",
) -> list[str]:
    """Return the lines printed at the end: two samples, losses, notes, where the weights are and a command
    that tries them.

    notes: the objective's summary and the alarms. script: the command's script, a key of TRIED_WITH.
    """
    lines = []
    for old, new in same_prompts(before["samples"], after["samples"])[:2]:
        lines.append(f"\nprompt:   {_short(old['prompt'])}\nbefore:   {_short(old['completion'])}")
        lines.append(f"after:    {_short(new['completion'])}")
        lines += [f"expected: {_short(new['reference'])}"] if new["reference"] else []
    lines += ["", *before_and_after(before, after)]
    command = f"{script_command(script)} --run {shlex.quote(str(folder))} {TRIED_WITH[script]}"
    where = f"weights in {weights}, a summary in {folder / 'README.md'}; to try them:"
    return [*lines, *notes, where, command]


def before_and_after(before: Evaluation, after: Evaluation) -> list[str]:
    """Return a table, as lines, of important metrics before and after training; [] without such metrics."""
    rows = [
        (label, metric_cell(before, name), metric_cell(after, name))
        for name, label in headlines(after).items()
    ]
    if not rows:
        return []
    table = [("", "before", "after"), *rows]
    first, second = (2 + max(len(row[column]) for row in table) for column in (0, 1))
    return [f"{label:{first}}{old:{second}}{new}".rstrip() for label, old, new in table]


def metric_cell(evaluation: Evaluation, name: str) -> str:
    """Return a metric of an evaluation as text: "" if it was not measured, ALL_TIES if it has a count but no
    value. An accuracy, a score or a mean of rewards 0 and 1 is followed by its interval and the number of
    pairs or prompts.
    """
    count, value = count_of(evaluation["metrics"], name), evaluation["metrics"].get(name)
    if value is None:
        return ALL_TIES if count else ""
    if count:
        return f"{value:.4f} {wilson(value, count.number).text()} of {count.number:,.0f} {count.unit}"
    if name in evaluation.get("intervals", {}):
        interval = Interval(*evaluation["intervals"][name])
        return f"{value:.4f} {interval.text()} of {evaluation['scored']:,} prompts"
    return f"{value:.4f}"


def joint_alarms(alarms: Mapping[str, Sequence[str]]) -> list[tuple[str, list[str]]]:
    """Return each alarm once, with the runs that raised it. Of alarms that differ in numbers alone the first
    is returned, with a note.

    alarms: the alarms of each run, by its name.
    """
    by_text: dict[str, list[tuple[str, str]]] = {}
    for name, run_alarms in alarms.items():
        for alarm in run_alarms:
            by_text.setdefault(re.sub(r"\d[\d.,e+-]*", "#", alarm), []).append((alarm, name))
    joint = []
    for same in by_text.values():
        text = same[0][0] + (" (with other numbers in other runs)" if len({x for x, _ in same}) > 1 else "")
        joint.append((text, list(dict.fromkeys(name for _, name in same))))
    return joint


def headlines(evaluation: Evaluation) -> dict[str, str]:
    """Return {metric: its label} of the metrics of an evaluation that result lines show, scores first."""
    prefix, metrics = HELD_OUT + SCORES, evaluation["metrics"]
    scores = {
        name: f"{name.removeprefix(prefix)} of the completions of {evaluation['scored']} held-out prompts"
        for name in metrics
        if name.startswith(prefix)
    }
    known = {without_count(name) for name in metrics}  # without a value if all pairs are ties
    labels = {name: label for name, label in HEADLINES.items() if name in known}
    if HELD_OUT + ECE in labels:
        labels[HELD_OUT + REWARD_ACCURACY] = "accuracy of held-out decisions"
    if HELD_OUT + LOSS in labels and "part" in evaluation:
        labels[HELD_OUT + LOSS] = f"loss on {evaluation['part']}"
    return scores | labels


def _short(text: str) -> str:
    """Return text as one line of at most 240 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 240 else line[:234] + " [...]"


def same_prompts(before: Sequence[Sample], after: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """Return pairs (sample before, sample after training) of the same prompt. Prompts that only one side has
    are left out; the number of samples may have changed when the run was resumed.
    """
    known = {old["prompt"]: old for old in before}
    return [(known[new["prompt"]], new) for new in after if new["prompt"] in known]


@dataclass(frozen=True)
class ModelCard:
    """The contents of a run's model card, README.md.

    metadata: for the hub, see model_card.front_matter. base: the base model's name for readers. merged: the
    weights are a full model, into which the adapter, if there was one, is merged. pad: the padding token id
    that a reward model is loaded with. text_decoder: whether a reward model's adapter is for the text decoder
    of a multimodal base. curves, completions: sections with pictures and with sampled completions, or "".
    command: the command line that trains the same run, or "". labels: a sentence about a decision model's
    labels, or "". served: the HTTP endpoints of `jaxft serve` for a decision model, () for other models.
    """

    name: str
    metadata: str
    base: str
    data: str
    examples: int
    steps: int
    batch: int
    optimizer: str
    lr: float
    seed: int
    model: ModelSummary
    adapter: Adapter | None
    merged: bool
    before: Evaluation
    after: Evaluation
    notes: list[str]
    curves: str = ""
    completions: str = ""
    command: str = ""
    pad: int | None = None
    text_decoder: bool = False
    labels: str = ""
    served: tuple[str, ...] = ()


def model_card(card: ModelCard) -> str:
    """Return README.md of a run: base, data, settings, results, alarms, and how to use the weights."""
    return "\n".join(
        [
            card.metadata,
            f"# {card.name}\n",
            *_description(card),
            *_results(card),
            *([card.curves] if card.curves else []),
            *_usage(card),
            *([card.completions] if card.completions else []),
            *_held_out_samples(card),
        ]
    )


def _description(card: ModelCard) -> list[str]:
    model, adapter = card.model, card.adapter
    kind = "model"
    if adapter is not None and not card.merged:
        scaling = ", rsLoRA" if adapter.rslora else ""
        kind = f"LoRA adapter (rank {adapter.rank}, alpha {adapter.alpha:g}{scaling})"
    if not model.generates:
        kind = f"reward model: a {'language model' if kind == 'model' else kind} with a scalar head"
    text = (
        f"A {kind}, fine-tuned from `{card.base}` with jaxft on `{card.data}` ({card.examples} examples): "
        f"{card.steps} steps of {card.batch} row{'' if card.batch == 1 else 's'}, {model.trainable:,} of "
        f"{model.total:,} parameters trained, {card.optimizer} with lr {card.lr:g}, seed {card.seed}."
    )
    if card.merged and adapter is not None:
        text += f" A LoRA adapter (rank {adapter.rank}) that was trained along with it is merged."
    if model.quantised:
        text += f" The frozen weights were quantised: {model.quantised}."
    text += card.labels
    return [text, *(["\nTrained by:\n", f"    {card.command}"] if card.command else []), ""]


def _results(card: ModelCard) -> list[str]:
    known = {**card.before["metrics"], **card.after["metrics"]}
    rows = [
        (name, metric_cell(card.before, name), metric_cell(card.after, name))
        for name in dict.fromkeys(without_count(name) for name in known)
    ]
    notes = [f"- {line}" for line in card.notes]
    return [
        markdown_table(("held-out metric", "before", "after"), rows),
        "",
        *([INTERVALS, ""] if any("[" in cell for row in rows for cell in row) else []),
        *notes,
        *([""] if notes else []),
    ]


def _usage(card: ModelCard) -> list[str]:
    """Return the section on use of the weights, with jaxft and other libraries; `jaxft push` replaces it."""
    folder, layout = ("model", "Hugging Face transformers") if card.merged else ("adapter", "PEFT")
    lines = [
        f"{USE_SECTION}\n",
        "All settings are in `config.json`, versions and devices in `env.json`, steps in `metrics.jsonl`; "
        "`jaxft report PATH_OF_THIS_FOLDER` writes a page with these and the curves. "
        f"The weights are in `{folder}/`, in the layout of {layout}. With jaxft:",
        "",
    ]
    if card.served:
        lines.append("    jaxft evaluate --run PATH_OF_THIS_FOLDER --file ROWS --out PROBABILITIES")
        lines += [f"    jaxft serve --run PATH_OF_THIS_FOLDER    # POST {path}" for path in card.served]
    elif card.model.generates:
        lines.append('    jaxft generate --run PATH_OF_THIS_FOLDER --prompt "..."')
    else:
        lines.append("    jaxft score --run PATH_OF_THIS_FOLDER --file PAIRS    # rewards of the responses")
    if not card.merged:
        lines.append("    jaxft export --run PATH_OF_THIS_FOLDER --out merged    # for transformers")
    if not card.model.generates and not card.model.classifier:
        lines += ["", NO_CLASSIFIER]
    elif not card.model.generates:
        whole = "transformers.AutoModelForSequenceClassification.from_pretrained(FOLDER)"
        peft = "peft.AutoPeftModelForSequenceClassification.from_pretrained"
        load = f"`{whole if card.merged else f'{peft}(FOLDER, num_labels=1, pad_token_id={card.pad})'}`"
        if card.text_decoder:
            load = f"a model that is loaded as in `{folder}/README.md`"
        lines += [
            "",
            f"In Python: {load}, whose `logits[:, 0]` are rewards. They are read at the last token, which "
            "has to be the response's end token: leave out what a chat template adds after it.",
        ]
    return [*lines, ""]


def _held_out_samples(card: ModelCard) -> list[str]:
    pairs = same_prompts(card.before["samples"], card.after["samples"])
    lines = ["## Held-out prompts"] if pairs else []
    for old, new in pairs:
        lines += [f"**{' '.join(old['prompt'].split())}**\n", _quoted("Before:", old["completion"])]
        lines += [_quoted("After:", new["completion"])]
        lines += [_quoted("The row's own completion:", new["reference"])] if new["reference"] else []
    return lines


def _quoted(label: str, text: str) -> str:
    return f"{label}\n" + "\n".join(f"> {line}".rstrip() for line in text.splitlines() or [""]) + "\n"


def completions_section(folder: Path) -> str:
    """Return the model card's table of the first and the last sampled completions of a run, with rewards.

    Reads completions.jsonl in `folder`; "" if it has no entry.
    """
    entries = read_entries(folder / COMPLETIONS)
    if not entries:
        return ""
    steps = dict.fromkeys((entries[0]["step"], entries[-1]["step"]))
    shown = [e for step in steps for e in [x for x in entries if x["step"] == step][:COMPLETIONS_PER_STEP]]
    by_function = list(shown[0]["rewards"])
    rows = []
    for entry in shown:
        prompt = entry["prompt"] if isinstance(entry["prompt"], str) else entry["prompt"][-1]["content"]
        rewards = [*(entry["rewards"][name] for name in by_function), entry["reward"]]
        numbers = ["none" if x is None else f"{x:.3f}" for x in rewards]
        rows.append([str(entry["step"]), _short(str(prompt)), _short(str(entry["completion"])), *numbers])
    table = markdown_table(["step", "prompt", "completion", *by_function, "reward"], rows)
    return f"## Sampled completions\n\n{table}\n\nMore are in the run's `completions.jsonl`.\n"
