"""Convert options that have a meaning only together: datasets, columns and chat templates; batch size, length
of a run, schedule and rollouts. Each function reads options of a Draft and records settings in it.
"""

import json
from collections.abc import Mapping
from math import gcd
from pathlib import Path
from typing import Any

from jaxft.cli.convert.draft import LARGEST_FILE, Draft, GivenOption, short_value, table_rows
from jaxft.data.rows.columns import KNOWN_ROLES, ROLES
from jaxft.data.rows.dataset_rows import SUFFIXES
from jaxft.runs.settings.option import AXOLOTL, FACTORY, TRL, UNSLOTH, as_text

INFO = "dataset_info.json"  # LLaMA-Factory's list of datasets
AXOLOTL_TYPES = {  # a dataset's `type`, or its last part -> jaxft's column=the dataset's
    "alpaca": "", "completion": "", "chat_template": "", "sharegpt": "", "input_output": "", "pretrain": "",
    "load_qa": "instruction=question,response=answer", "gpteacher": "", "alpaca_chat": "",
    "alpaca_instruct": "", "alpaca_w_system": "", "load": "", "load_open_orca": "prompt=question",
    "default": "", "intel": "prompt=question", "icr": "prompt=input", "argilla": "prompt=instruction",
    "bradley_terry.chat_template": "prompt=input", "chat_template.argilla": "", "ultra": "",
    "prompt_pairs": "", "argilla_chat": "", "load_concise": "", "stepwise_supervised": "",
}  # fmt: skip
DATASET_FIELDS = {  # an option of an Axolotl dataset -> jaxft's column
    "field_messages": "messages", "field_instruction": "instruction", "field_input": "input",
    "field_output": "response", "field_system": "system", "field_tools": "tools", "field_chosen": "chosen",
    "field_rejected": "rejected", "field_prompt": "prompt", "field_completion": "completion",
    "field_label": "label", "field": "text", "text_column": "text",
}  # fmt: skip
# jaxft's column -> names that it has without data.columns=
SAME_COLUMNS = {"messages": ("messages", "conversations"), "response": ("response", "output")}
FACTORY_COLUMNS = {  # a column in dataset_info.json -> jaxft's
    "prompt": "instruction", "query": "input", "response": "response", "history": "history",
    "messages": "messages", "system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected",
    "kto_tag": "label",
}  # fmt: skip
FACTORY_SAME = {"instruction": "instruction", "input": "input", "response": "output", "label": "kto_tag",
                "messages": "conversations"}  # fmt: skip


def rows(draft: Draft) -> None:
    """Set data=, data.columns= and held_out= from the options about datasets; add a note if there is none."""
    if draft.source.tool == AXOLOTL:
        _axolotl(draft)
    elif draft.source.tool == FACTORY:
        _factory(draft)
    else:
        _trl(draft)
    if draft.values.get("data") is None:
        draft.notes.append("the file names no rows that jaxft can find: add data=rows.jsonl")


def templates(draft: Draft) -> None:
    """Set chat_template= if the file names a template; remark on prompts that differ from the tool's."""
    if str(draft.peek("chat_template_jinja")).endswith((".jinja", ".jinja2")):
        draft.carry("chat_template", "chat_template_jinja")
    jinja = draft.take("chat_template_jinja")
    draft.lose(jinja, "write the template to a file: chat_template=mine.jinja")
    option = draft.take("chat_template", "template")
    if option is None:
        return
    (row,) = table_rows(draft.source.tool, option.name, draft.recipe)
    try:
        named = row.overrides(option.value)
    except ValueError:
        named = ()
    if draft.source.tool == FACTORY:
        example = next(iter(named), "chat_template=chatml")
        draft.express(option, [], f"the model's own chat template; for a base model add {example}")
    elif as_text(option.value).lower() in ("tokenizer_default", "jinja", "default"):
        draft.express(option, [])
    elif named:
        draft.express(option, named)
    else:
        draft.lose(option, "the model's own chat template is used; or write chat_template=mine.jinja")


def _axolotl(draft: Draft) -> None:
    option = draft.take("datasets", "pretraining_dataset")
    if option is None:
        return
    items = option.value if isinstance(option.value, list) else [option.value]
    items = [item if isinstance(item, Mapping) else {"path": item} for item in items]
    columns: list[list[str]] = [[] for _ in items]
    remarks = [line for item, extra in zip(items, columns) for line in _axolotl_type(draft, item, extra)]
    overrides = _with_columns("data", list(map(_reference, items)), columns)
    if option.name == "pretraining_dataset":
        draft.drop("sample_packing", "pretrain_multipack_attn", "pretraining_sample_concatenation")
        remarks.append("documents are joined, split into rows of max_length tokens; attention crosses them")
    draft.express(option, overrides, "; ".join(dict.fromkeys(remarks)))
    tests = draft.take("test_datasets")
    if tests is not None and isinstance(tests.value, list):
        held = ",".join(_reference(item) for item in tests.value if isinstance(item, Mapping))
        draft.express(tests, [f"held_out={held}"])


def _axolotl_type(draft: Draft, item: Mapping, columns: list[str]) -> list[str]:
    """Add a dataset's renamed columns (jaxft's=the dataset's) to `columns`; return remarks about its rows.
    item: an entry of Axolotl's `datasets`, whose `type` names columns and prompt format.
    """
    kind, remarks = item.get("type", ""), list[str]()
    options = {**item, **(kind if isinstance(kind, Mapping) else {})}
    for name, ours in DATASET_FIELDS.items():
        theirs = options.get(name)
        if name == "field_messages" and draft.recipe not in ("sft", "sft_full"):
            ours = "prompt"
        if isinstance(theirs, str) and theirs not in SAME_COLUMNS.get(ours, (ours,)):
            columns.append(f"{ours}={theirs}")
    if isinstance(kind, Mapping):
        if kind.get("system_prompt"):
            remarks.append("its system_prompt is left out; add it to the rows as a column `system`")
        written = kind.get("format") or kind.get("prompt_format")
        if written:
            remarks.append(f"its format {short_value(written)!r} is a chat template here; write it as "
                           "chat_template=mine.jinja")  # fmt: skip
    else:
        words = str(kind).split(":")[0].split(".")
        names = (".".join(words), *reversed(words))
        renamed = next((AXOLOTL_TYPES[name] for name in names if name in AXOLOTL_TYPES), None)
        if kind and renamed is None:
            remarks.append(f"type {kind} is unknown; name its columns by data.columns=")
        columns += renamed.split(",") if renamed else []
        if words[0] in ("alpaca", "alpaca_instruct", "alpaca_chat"):
            remarks.append("prompts are rendered by the chat template (or `### Instruction:` without one), "
                           "without Alpaca's preamble")  # fmt: skip
        if words[0] in ("chatml", "llama3", "zephyr") and "chat_template" not in draft.options:
            draft.put(f"chat_template={words[0]}")
    for name in ("step_separator", "train_on_last_step_only") if draft.recipe == "process_reward" else ():
        (row,) = table_rows(AXOLOTL, name, draft.recipe)
        for override in row.overrides(options[name]) if options.get(name) is not None else ():
            draft.put(override)
    if options.get("max_completion_length") is not None:
        remarks.append("max_completion_length is not a setting; max_length is for prompt and steps together")
    trained = options.get("roles_to_train") or []
    trained = [trained] if isinstance(trained, str) else trained
    if not {*trained} <= {"assistant", "gpt", "model"}:
        remarks.append(f"roles_to_train={as_text(options['roles_to_train'])} has no setting")
    roles = options.get("roles")
    unknown = [] if not isinstance(roles, Mapping) else [
        name for names in roles.values() if isinstance(names, list) for name in names
        if str(name).lower() not in (*ROLES, *KNOWN_ROLES)
    ]  # fmt: skip
    if unknown:
        remarks.append(f"rows with the roles {', '.join(map(str, unknown[:5]))} are invalid; rename these")
    mapping = options.get("message_property_mappings")
    if isinstance(mapping, Mapping):
        pair = (mapping.get("role", "role"), mapping.get("content", "content"))
        if pair not in (("role", "content"), ("from", "value")):
            remarks.append(f"messages need role and content (or from and value), not {pair[0]} and {pair[1]}")
    for name, effect in (("shards", "all of them are read"), ("drop_system_message", "not dropped"),
                         ("train_on_eos", "the token that ends a turn is trained on"),
                         ("message_field_training", "messages need the key train")):  # fmt: skip
        if options.get(name) not in (None, False, "turn"):
            remarks.append(f"{name}={short_value(options[name])}: {effect}")
    return remarks


def _with_columns(setting: str, refs: list[str], columns: list[list[str]]) -> list[str]:
    """Return overrides for datasets and their columns, such as data=a.jsonl:text=story,b.jsonl. setting: data
    or held_out. refs: the datasets. columns: the renamed columns of each, such as text=story.
    """
    if len(refs) == 1 and columns[0] and setting == "data":
        return [f"data={refs[0]}", f"data.columns={','.join(dict.fromkeys(columns[0]))}"]
    parts = [":".join([ref, *dict.fromkeys(extra)]) for ref, extra in zip(refs, columns, strict=True)]
    return [f"{setting}={','.join(parts)}"]


def _reference(item: Mapping) -> str:
    """Return a dataset in the form that data= accepts: files, or org/name/config:split. item: the dataset's
    keys in Axolotl or TRL, such as path, name, split and data_files.
    """
    path = str(item.get("path") or item.get("dataset_name") or "")
    files = item.get("data_files")
    if files:
        names = files if isinstance(files, list) else [files]
        local = [name if "/" in str(name) or path in ("json", "csv", "parquet", "text", "arrow", "")
                 else f"{path.rstrip('/')}/{name}" for name in map(str, names)]  # fmt: skip
        return ",".join(local)
    if path.startswith((".", "/", "~")) or Path(path).suffix in SUFFIXES:
        return path
    config, split = item.get("name"), item.get("split")
    return path + (f"/{config}" if config else "") + (f":{split}" if split and split != "train" else "")


def _trl(draft: Draft) -> None:
    mixture = draft.take("datasets")
    if mixture is not None and isinstance(mixture.value, list):
        items = [item if isinstance(item, Mapping) else {"path": item} for item in mixture.value]
        remarks = [f"all columns are read, not only {as_text(item['columns'])}"
                   for item in items if item.get("columns")]  # fmt: skip
        draft.express(mixture, [f"data={','.join(map(_reference, items))}"], "; ".join(remarks))
    option = draft.take("dataset_name")
    config, split = draft.take("dataset_config"), draft.take("dataset_train_split")
    test = draft.take("dataset_test_split")
    evaluated = as_text(draft.peek("eval_strategy", "evaluation_strategy") or "no") != "no"
    if option is None:
        for further in (config, split, test):
            draft.lose(further, "the file names no dataset for it; set data=")
    else:
        item = {"path": as_text(option.value)}
        item |= {} if config is None else {"name": config.value}
        named = {**item, "split": as_text(split.value)} if split is not None else item
        draft.express(option, [f"data={_reference(named)}"])
        draft.express(config, [])
        draft.express(split, [])
        held = "" if test is None else _reference({**item, "split": as_text(test.value)})
        if evaluated and test is not None and held == _reference(named):
            draft.lose(test, "the training rows; held_out=0.1 holds out rows that are not trained on")
        elif evaluated and test is not None:
            draft.express(test, [f"held_out={held}"])
        elif test is not None:
            draft.unneeded.append(test)
        elif evaluated and not {"eval_dataset", "test_split_size"} & {
            given.name for given in draft.source.options
        }:  # fmt: skip
            default = _reference({**item, "split": "test"})
            if default != _reference(item):  # a file has no split
                draft.default(f"held_out={default}")
    _rows_of_code(draft)
    text = draft.take("dataset_text_field")
    if text is not None:
        column = as_text(text.value)
        draft.express(text, [f"data.columns=text={column}"] if column != "text" else [])
    names = {"assistant_only_loss", "completion_only_loss", "train_on_responses_only"}
    chosen = names & {option.name for option in draft.all}
    if draft.recipe in ("sft", "sft_full") and not chosen and text is None:
        draft.notes.append(
            "TRL trains on all of a conversation unless assistant_only_loss=True, jaxft on the assistant's "
            "turns: add data.loss_on=all for the same"
        )


def _rows_of_code(draft: Draft) -> None:
    """Convert the options that python_rows.row_options reads: eval_dataset, test_split_seed, dataset.*"""
    held = draft.take("eval_dataset")
    if held is not None and isinstance(held.value, Mapping):
        count = held.value.get("max_samples")
        files = _reference(held.value).split(",")
        held_out = ",".join(files if count is None else [f"{file}:max_samples={count}" for file in files])
        draft.express(held, [f"held_out={held_out}"])
        if "max_samples" in draft.options:  # data.max_samples= would also limit the held-out rows
            first = draft.options.pop("max_samples")
            rows = [f"{file}:max_samples={first.value}" for file in draft.values["data"].split(",")]
            draft.express(first, [f"data={','.join(rows)}"])
    elif held is not None and isinstance(held.value, float):
        draft.express(held, [f"held_out={held.value:g}"], "random rows of the split, not a slice of it")
    elif held is not None:
        draft.lose(held, "set held_out= to a file or a fraction of the rows")
    seed = draft.take("test_split_seed")
    if seed is not None and type(seed.value) is int:
        draft.express(seed, [f"data.split_seed={seed.value}"])
    elif seed is not None:
        draft.lose(seed, "data.split_seed= takes a whole number")
    draft.drop(*[name for name in draft.options if name.startswith("dataset.")])


def _factory(draft: Draft) -> None:
    for name, setting in (("dataset", "data"), ("eval_dataset", "held_out")):
        option = draft.take(name)
        if option is None:
            continue
        value = option.value
        names = [str(item).strip() for item in (value if isinstance(value, list) else str(value).split(","))]
        info, where = _dataset_info(draft)
        refs, columns = list[str](), list[list[str]]()
        missing = [name for name in names if name not in info]
        for each in names:
            entry = info.get(each)
            refs.append(_factory_reference(draft, entry, where) if entry is not None else f"data/{each}.json")
            columns.append(_factory_columns(entry or {}, draft.method))
        shares = draft.take("interleave_probs") if setting == "data" else None
        if shares is not None:
            parts = [text.strip() for text in as_text(shares.value).split(",")]
            if len(parts) == len(refs):
                columns = [[*extra, part] for extra, part in zip(columns, parts, strict=True)]
            draft.express(shares, [])
        overrides = _with_columns(setting, refs, columns)
        if missing:
            draft.lose(option, f"{', '.join(missing)}: not in a {INFO} nearby; {' '.join(overrides)} is a "
                       "guess, write your files instead")  # fmt: skip
            for override in overrides:
                draft.put(override)
        else:
            draft.express(option, overrides)
    draft.drop("dataset_dir", "media_dir")
    if draft.method == "pt":
        draft.drop("packing", "neat_packing")


def _dataset_info(draft: Draft) -> tuple[dict[str, Any], Path]:
    """Return (entries of LLaMA-Factory's dataset_info.json, its folder).

    The file is searched in dataset_dir below the working directory, the configuration's folder and four
    folders above. Without one, the result is ({}, the configuration's folder). Raises ValueError if it is not
    JSON.
    """
    folder = as_text(draft.peek("dataset_dir") or "data")
    near = draft.source.file.resolve().parent
    for base in (Path.cwd(), near, *list(near.parents)[:4]):
        path = base / folder / INFO
        if path.is_file() and path.stat().st_size <= LARGEST_FILE:
            try:
                listed = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: not JSON: {error}; correct the file") from error
            if isinstance(listed, dict):
                return {name: entry for name, entry in listed.items() if isinstance(entry, dict)}, path.parent
    return {}, near


def _factory_reference(draft: Draft, entry: Mapping, folder: Path) -> str:
    if entry.get("file_name"):
        path = folder / str(entry["file_name"])
        try:
            return path.relative_to(Path.cwd()).as_posix()
        except ValueError:
            return str(path)
    name = str(entry.get("hf_hub_url") or entry.get("script_url") or "")
    return _reference({"path": name, "name": entry.get("subset"), "split": entry.get("split")})


def _factory_columns(entry: Mapping, stage: str) -> list[str]:
    """Return `jaxft's=the dataset's` for the columns whose names differ, such as ["instruction=question"].

    entry: a dataset in dataset_info.json. stage: LLaMA-Factory's; in pt (pre-training) `prompt` is `text`.
    """
    columns = entry.get("columns")
    renamed = []
    for theirs, name in columns.items() if isinstance(columns, Mapping) else ():
        ours = "text" if (stage, theirs) == ("pt", "prompt") else FACTORY_COLUMNS.get(theirs)
        if ours and isinstance(name, str) and name not in (ours, FACTORY_SAME.get(ours)):
            renamed.append(f"{ours}={name}")
    return renamed


BATCH_OPTIONS = (
    "per_device_train_batch_size", "micro_batch_size", "batch_size", "gradient_accumulation_steps",
)  # fmt: skip
PER_DEVICE = {TRL: 8, FACTORY: 8, UNSLOTH: 8, AXOLOTL: 1}  # tool -> default batch size per device


def length_of_run(draft: Draft) -> None:
    """Set loop.steps= from max_steps, which overrides the number of epochs in every tool."""
    steps = draft.number("max_steps")
    if steps is not None and steps > 0:
        draft.express(draft.take("max_steps"), [f"loop.steps={int(steps)}"])
        draft.drop("num_train_epochs", "num_epochs")


def schedule(draft: Draft) -> None:
    """Set optim.schedule= and optim.end=, the last learning rate: 0 as in the tools, unless the file sets it.
    If it has warmup_ratio and warmup_steps, drop the one without effect.
    """
    kind = draft.take("lr_scheduler_type", "lr_scheduler")
    further = draft.take("lr_scheduler_kwargs")
    kwargs = _mapping(None if further is None else further.value)
    if kind is not None:
        _kind(draft, kind)
    used: list[str] = []
    if "num_cycles" in kwargs and draft.values.get("optim.schedule") == "cosine_with_restarts":
        used.append(f"optim.schedule_kwargs=cycles:{as_text(kwargs['num_cycles'])}")
    if "min_lr_rate" in kwargs:
        used.append(f"optim.end={as_text(kwargs['min_lr_rate'])}")
    rate = draft.number("learning_rate")
    if "min_lr" in kwargs and rate:
        used.append(f"optim.end={float(kwargs['min_lr']) / rate:g}")
    if used:
        draft.express(further, used)
    else:
        draft.lose(further, "only num_cycles, min_lr_rate and min_lr have settings")
    draft.carry("optim.end", "cosine_min_lr_ratio")
    ratio, steps = draft.number("warmup_ratio"), draft.number("warmup_steps")
    if steps and ratio is not None:  # the number of steps counts
        draft.drop("warmup_ratio")
    elif ratio is not None:
        draft.drop("warmup_steps")


def _mapping(value: Any) -> dict[str, Any]:
    """Return a dict as it is, a string parsed as JSON if that is a dict, and {} for any other value."""
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
        known = "cosine, linear, constant, cosine_with_restarts, wsd, or file.py:name"
        draft.lose(kind, f"optim.schedule= has {known}")
        return
    end = [] if schedules[text] == "constant" else ["optim.end=0"]
    warmup = ["optim.warmup=0"] if text == "constant" else []
    draft.express(
        kind, [f"optim.schedule={schedules[text]}", *end, *warmup],
        "jaxft's schedules end at 10 % of lr by default, the tools' at 0" if end else "",
    )  # fmt: skip


def rows_of_a_step(draft: Draft) -> None:
    """Set batch= and micro=: a step has rows per device x accumulation x devices. GRPO: see `rollouts`."""
    if draft.recipe == "grpo":
        return
    per_device, accumulation = _rows_per_device(draft)
    total = per_device * accumulation * draft.devices
    options = draft.take_all(*BATCH_OPTIONS)
    text = f"{per_device} per device x accumulation {accumulation} x {_devices(draft.devices)}"
    overrides = [f"batch={total}", *([f"micro={accumulation}"] if accumulation > 1 else [])]
    for option in options:
        draft.express(option, overrides, f"{text}; --devices sets the number of devices")
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
    """Set correction= and correction_bounds=, the weights for the difference between the log-probs of the
    sampler and of the training program.
    """
    prefix = "vllm_importance_sampling_"
    bounds = [f"{prefix}{name}" for name in ("clip_min", "clip_max", "cap")]
    if as_text(draft.peek(f"{prefix}correction")).lower() == "false":
        draft.drop(f"{prefix}mode", *bounds)
        return
    least, most = draft.number(bounds[0]), draft.number(*bounds[1:])
    given = draft.take_all(*bounds)
    override = f"correction_bounds={least or 0:g},{3 if most is None else most:g}"
    for option in given:
        draft.express(option, [override])
    if f"{prefix}mode" in draft.options:
        draft.express(draft.take(f"{prefix}correction"), [])
    elif given:
        draft.put("correction=masked_completions")  # TRL's default


def rollouts(draft: Draft) -> None:
    """Convert GRPO's sampling and loss: prompts, completions and optimizer steps per rollout, lengths,
    clipping, and remarks about rewards.
    """
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
    given = draft.take_all(*BATCH_OPTIONS, "steps_per_generation", "generation_batch_size")
    for option in given:
        draft.express(option, overrides, note)
    for override in [] if given else overrides:
        draft.default(override)
    draft.carry("max_prompt", "sequence_len", "max_length", "cutoff_len", note="max_new limits completions")
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
    else:
        draft.express(level, [])
    rewards = draft.take("reward_funcs")
    draft.lose(
        rewards,
        "write rewards=my_rewards.py:name, a function (prompt, completion, row) -> float of one completion; "
        "TRL's functions take lists",
    )
    weights = draft.take("reward_weights")
    if weights is not None:
        numbers = as_text(weights.value).strip("[]").replace(" ", "")
        draft.lose(weights, f"one weight per function of rewards=: reward_weights={numbers}")
    if rewards is None and draft.peek("reward_model_name_or_path", "reward_model") is None:
        draft.notes.append("the file names no reward: add rewards=my_rewards.py:name")
