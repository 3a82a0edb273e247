"""Rows of a step, length of a run, learning-rate schedule and rollouts, each of which several options set."""

import json
from math import gcd
from typing import Any

from jaxft.cli.convert.draft import Draft, GivenOption
from jaxft.runs.settings.option_names import AXOLOTL, FACTORY, TRL, UNSLOTH, as_text

BATCH_OPTIONS = (
    "per_device_train_batch_size", "micro_batch_size", "batch_size", "gradient_accumulation_steps",
)  # fmt: skip
PER_DEVICE = {TRL: 8, FACTORY: 8, UNSLOTH: 8, AXOLOTL: 1}  # the tools' default


def length_of_run(draft: Draft) -> None:
    """Optimizer steps, or passes over the rows."""
    steps = draft.number("max_steps")
    if steps is not None and steps > 0:
        draft.express(draft.take("max_steps"), [f"loop.steps={int(steps)}"])
        epochs = draft.take("num_train_epochs", "num_epochs")
        if epochs is not None:
            draft.unneeded.append(epochs)


def schedule(draft: Draft) -> None:
    """The learning rate over the steps; it ends at 0, as in the other tools."""
    kind = draft.take("lr_scheduler_type", "lr_scheduler")
    further = draft.take("lr_scheduler_kwargs")
    kwargs = _mapping(None if further is None else further.value)
    if kind is not None:
        _kind(draft, kind)
    used: list[str] = []
    if "num_cycles" in kwargs and draft.settings.get("optim.schedule") == "cosine_with_restarts":
        used.append(f"optim.schedule_kwargs=cycles:{as_text(kwargs['num_cycles'])}")
    if "min_lr_rate" in kwargs:
        used.append(f"optim.end={as_text(kwargs['min_lr_rate'])}")
    rate = draft.number("learning_rate")
    if "min_lr" in kwargs and rate:
        used.append(f"optim.end={float(kwargs['min_lr']) / rate:g}")
    if used:
        draft.express(further, used)
    else:
        draft.lose(further, "num_cycles, min_lr_rate and min_lr are known; others have no setting")
    smallest = draft.take("cosine_min_lr_ratio")
    if smallest is not None:
        draft.express(smallest, [f"optim.end={as_text(smallest.value)}"])
    ratio, steps = draft.number("warmup_ratio"), draft.number("warmup_steps")
    if steps and ratio is not None:  # the number of steps counts
        draft.drop("warmup_ratio")
    elif ratio is not None:
        draft.drop("warmup_steps")


def _mapping(value: Any) -> dict[str, Any]:
    """Return a dict, also one that a command line has as JSON; {} for anything else."""
    try:
        arguments = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return {}
    return arguments if isinstance(arguments, dict) else {}


def _kind(draft: Draft, kind: GivenOption) -> None:
    text = as_text(kind.value).lower()
    schedules = {
        "cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant",
        "cosine_with_restarts": "cosine_with_restarts", "warmup_stable_decay": "wsd",
        "cosine_with_min_lr": "cosine",
    }  # fmt: skip
    if text not in schedules:
        why = (
            "there are cosine, linear, constant, cosine_with_restarts and wsd; or optim.schedule=file.py:name"
        )
        draft.lose(kind, why)
        return
    end = [] if schedules[text] == "constant" else ["optim.end=0"]
    warmup = ["optim.warmup=0"] if text == "constant" else []
    draft.express(
        kind, [f"optim.schedule={schedules[text]}", *end, *warmup],
        "jaxft's schedules end at 10 % of lr by default, theirs at 0" if end else "",
    )  # fmt: skip


def rows_of_a_step(draft: Draft) -> None:
    """Rows per device x accumulation x devices."""
    if draft.recipe == "grpo":
        return
    per_device, accumulation = _rows_per_device(draft)
    total = per_device * accumulation * draft.devices
    options = [option for name in BATCH_OPTIONS if (option := draft.take(name)) is not None]
    text = f"{per_device} per device x accumulation {accumulation} x {_devices(draft.devices)}"
    overrides = [f"batch={total}", *([f"micro={accumulation}"] if accumulation > 1 else [])]
    for option in options:
        draft.express(option, overrides, f"{text}; --devices sets their number")
    for override in [] if options else overrides:
        draft.default(override)


def _rows_per_device(draft: Draft) -> tuple[int, int]:
    default = PER_DEVICE[draft.source.tool]
    rows = draft.number("per_device_train_batch_size", "micro_batch_size")
    accumulation = draft.number("gradient_accumulation_steps")
    total = draft.number("batch_size")
    if accumulation is None and total and rows:
        accumulation = total // rows
    return max(1, int(rows or default)), max(1, int(accumulation or 1))


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"


def importance_weights(draft: Draft) -> None:
    """The correction between the sampler and the training program: its function and its bounds."""
    prefix = "vllm_importance_sampling_"
    bounds = [f"{prefix}{name}" for name in ("clip_min", "clip_max", "cap")]
    if as_text(draft.peek(f"{prefix}correction")).lower() == "false":
        draft.drop(f"{prefix}mode", *bounds)
        return
    least, most = draft.number(bounds[0]), draft.number(*bounds[1:])
    given = [option for name in bounds if (option := draft.take(name)) is not None]
    override = f"correction_bounds={least or 0:g},{3 if most is None else most:g}"
    for option in given:
        draft.express(option, [override])
    if f"{prefix}mode" in draft.options:
        draft.express(draft.take(f"{prefix}correction"), [])
    elif given:
        draft.put("correction=masked_completions")  # TRL's default


def rollouts(draft: Draft) -> None:
    """Prompts of a rollout, completions of each, and the optimizer steps on them."""
    if draft.recipe != "grpo":
        return
    for name in [name for name in draft.options if name.startswith("trl.")]:
        draft.options[name[4:]] = draft.options.pop(name)
    group = int(draft.number("num_generations") or (2 if draft.method == "rloo" else 8))
    per_device, accumulation = _rows_per_device(draft)
    waves = int(draft.number("steps_per_generation") or accumulation)
    completions = int(draft.number("generation_batch_size") or per_device * draft.devices * waves)
    steps = max(1, waves // accumulation)
    prompts = max(1, completions // group)
    prompts = steps * max(1, prompts // steps)
    micro = gcd(prompts // steps, accumulation)
    overrides = [f"batch={prompts}"]
    overrides += [f"minibatches={steps}"] if steps > 1 else []
    overrides += [f"micro={micro}"] if micro > 1 else []
    note = (
        f"batch counts prompts: {completions} completions of a rollout over {_devices(draft.devices)} / "
        f"{group} of each prompt"
    )
    names = (*BATCH_OPTIONS, "steps_per_generation", "generation_batch_size")
    given = [option for name in names if (option := draft.take(name)) is not None]
    for option in given:
        draft.express(option, overrides, note)
    for override in [] if given else overrides:
        draft.default(override)
    length = draft.take("sequence_len", "max_length", "cutoff_len")
    if length is not None:
        draft.express(length, [f"max_prompt={as_text(length.value)}"], "max_new limits completions")
    importance_weights(draft)
    if draft.method == "gdpo" or draft.peek("multi_objective_aggregation") == "normalize_then_sum":
        draft.drop("scale_rewards")  # without effect there, as in TRL
    low, high = draft.number("epsilon"), draft.number("epsilon_high")
    if low is not None and high is None:
        draft.put(f"eps_high={low:g}")
    level, kind = draft.take("importance_sampling_level"), draft.peek("loss_type")
    if level is not None and as_text(level.value).startswith("sequence"):
        draft.express(level, ["loss=gspo"])
        if kind in (None, "grpo"):
            draft.put("token_weights=sequence_mean")
    elif level is not None:
        draft.same.append(level)
    rewards = draft.take("reward_funcs")
    draft.lose(
        rewards,
        "write rewards=my_rewards.py:name, a function (prompt, completion, row) -> float of one completion; "
        "theirs take lists",
    )
    weights = draft.take("reward_weights")
    if weights is not None:
        numbers = as_text(weights.value).strip("[]").replace(" ", "")
        draft.lose(weights, f"one weight per function of rewards=: reward_weights={numbers}")
    if rewards is None and draft.peek("reward_model_name_or_path", "reward_model") is None:
        draft.notes.append("the file names no reward: add rewards=my_rewards.py:name")
