"""Convert a configuration of Axolotl, LLaMA-Factory, TRL or Unsloth to a recipe with settings."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxft.cli.convert.draft import (
    Draft,
    Expression,
    ForeignConfig,
    GivenOption,
    by_table,
    meant_setting,
    option_parts,
    read_config_text,
    run_name,
    table_rows,
)
from jaxft.cli.convert.python_files import notebook_code, read_python
from jaxft.cli.convert.rows_and_batches import (
    length_of_run,
    rollouts,
    rows,
    rows_of_a_step,
    schedule,
    templates,
)
from jaxft.cli.convert.yaml_and_shell import read_commands, read_yaml
from jaxft.runs.settings.option import AXOLOTL, FACTORY, TRL, UNSLOTH, as_text

RECIPES = {  # training method, as the tools call it -> recipe
    "sft": "sft", "pt": "pretrain", "dpo": "dpo", "ipo": "dpo", "kto": "kto", "orpo": "orpo",
    "simpo": "simpo",
    "cpo": "dpo", "bco": "kto", **dict.fromkeys(("prm", "process_reward_model"), "process_reward"),
    "rm": "reward", "reward": "reward", "grpo": "grpo", "gdpo": "grpo",
    "rloo": "grpo", "ppo": "ppo", "online_dpo": "online_dpo",
}  # fmt: skip
METHOD_SETTINGS = {  # method -> settings in addition to its recipe
    "ipo": ("loss=ipo",),
    "cpo": ("loss=cpo",),
    "gdpo": ("estimate=by_each",),
    "rloo": ("advantage=rloo", "token_weights=sequence_sum"),
}  # fmt: skip
FULL = {  # recipe -> its setting for full fine-tuning
    **dict.fromkeys(("dpo", "reward", "process_reward", "pretrain"), "full=true"),
    **dict.fromkeys(("kto", "orpo", "simpo", "grpo", "ppo", "online_dpo"), "adapter=none"),
}  # fmt: skip
LEARNING_RATES = {  # recipe -> TRL's default
    "sft": "2e-5", "reward": "1e-4", "process_reward": "1e-5", "online_dpo": "5e-7",
    **dict.fromkeys(("dpo", "kto", "orpo", "simpo", "grpo", "ppo"), "1e-6"),
}  # fmt: skip
PROJECTS = {"wandb_project": "wandb", "mlflow_experiment_name": "mlflow", "trackio_project_name": "trackio"}
STEP_INTERVALS = {"eval_steps": "loop.eval_every", "save_steps": "loop.save_every",
             "logging_steps": "loop.log_every"}  # fmt: skip
LORA_SETTINGS = (
    "lora_r", "lora_rank", "r", "lora_alpha", "lora_dropout", "target_modules", "lora_target_modules",
    "lora_target", "lora_target_linear", "modules_to_save", "lora_modules_to_save", "additional_target",
    "use_rslora", "use_dora", "bias", "init_lora_weights", "rank_pattern", "alpha_pattern",
    "peft_use_dora", "peft_use_rslora", "peft_init_lora_weights", "lora_task_type",
)  # fmt: skip
ADAPTER_ONLY = (
    *LORA_SETTINGS, "load_in_4bit",
    "load_in_8bit", "load_in_fp8", "quantization_bit", "quantization_method", "quantization_type",
    "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "use_bnb_nested_quant", "double_quantization",
    "loraplus_lr_ratio",
)  # fmt: skip
EPOCHS = {TRL: 3, FACTORY: 3, UNSLOTH: 3, AXOLOTL: 1}  # tool -> default number


@dataclass(frozen=True)
class Conversion:
    """A recipe, its settings, and the outcome of each option of the file.

    settings: `name=value`, in the order of a command line. same: options whose settings have the same
    meaning. otherwise: (option, its settings and how they differ). lost: (option, why no setting expresses
    it). unneeded: options for which jaxft has nothing to set. empty: options without a value in the file.
    defaults: the settings that stand for defaults of the tool, since the file does not set them. notes: lines
    for the report.
    """

    source: ForeignConfig
    recipe: str
    settings: tuple[str, ...]
    same: tuple[GivenOption, ...]
    otherwise: tuple[tuple[GivenOption, str], ...]
    lost: tuple[tuple[GivenOption, str], ...]
    unneeded: tuple[GivenOption, ...]
    empty: tuple[GivenOption, ...]
    defaults: tuple[str, ...]
    notes: tuple[str, ...]


def read(file: Path) -> ForeignConfig:
    """Return the options of a file: YAML, Python, a notebook or a shell script, by its suffix. Nothing in it
    is executed. Raises ValueError with one line for any other file, OSError if it cannot be read.
    """
    text = read_config_text(file)
    if file.suffix in (".yml", ".yaml"):
        return read_yaml(file, text)
    if file.suffix == ".py":
        return read_python(file, text)
    if file.suffix == ".ipynb":
        return read_python(file, notebook_code(file, text))
    if file.suffix in (".sh", ".bash", ".slurm", ".sbatch", ".txt", ".md", ""):
        return read_commands(file, text)
    raise ValueError(
        f"{file}: {file.suffix} is not a suffix that jaxft convert reads; name a YAML file (.yml, .yaml), "
        "Python file (.py), notebook (.ipynb) or shell script (.sh)"
    )


def convert(source: ForeignConfig, devices: int | None = None) -> Conversion:
    """Return the recipe and settings that train as a configuration of another tool does.

    devices: number of devices that the tool used, which multiplies the rows of a step; None: as in the file,
    or 1. Raises ValueError for a training method without a recipe.
    """
    empty = tuple(option for option in source.options if option.empty)
    given = [each for option in source.options if not option.empty for each in option_parts(option)]
    options = {option.name: option for option in given}
    method = _method(source, options)
    if method not in RECIPES:
        convertible = ", ".join(sorted(RECIPES))
        raise ValueError(f"{source.file}: jaxft has no recipe for {method}; it converts {convertible}")
    count = devices or source.devices or 1
    draft = Draft(source, count, method, RECIPES[method], False, tuple(given), options)
    for option in given:
        if option.remark:
            draft.lose(draft.options.pop(option.name), option.remark)
        elif isinstance(option.value, Expression) and option.name != "reward_funcs":
            by_table(draft, draft.options.pop(option.name))
    _choose_training(draft)
    rules: tuple[Callable[[Draft], None], ...] = (
        rows, templates, length_of_run, schedule, _adapter, _quantisation, _preferences, rollouts,
        rows_of_a_step, _machine, _evaluation, _names,
    )  # fmt: skip
    for rule in rules:
        rule(draft)
    for option in list(draft.options.values()):
        by_table(draft, option)
    for option in draft.missing():
        draft.lose(option, "not converted")
    unknown = {meant_setting(draft, option) for option in given if isinstance(option.value, Expression)}
    for name, text in _defaults(draft).items():
        if name not in draft.settings and name not in unknown:
            draft.default(f"{name}={text}")
    _keep_known(draft)
    if "model" not in draft.settings and "start" not in draft.settings:
        draft.notes.append("the file names no model that jaxft can find: add model=org/name")
    if draft.settings.get("dtype") == "bfloat16":
        del draft.settings["dtype"]  # the default
    if draft.settings.get("data.packing") == "false":
        draft.notes.append("data.packing=false pads every row; data.packing=true is faster, and batch then "
                           "counts packed rows of max_length tokens")  # fmt: skip
    return Conversion(
        source,
        draft.recipe,
        tuple(f"{name}={text}" for name, text in _ordered(draft.settings)),
        tuple(draft.same),
        tuple(sorted(draft.otherwise, key=lambda pair: pair[0].line or 0)),
        tuple(sorted(draft.lost, key=lambda pair: pair[0].line or 0)),
        tuple(draft.unneeded),
        empty,
        tuple(f"{name}={text}" for name, text in draft.defaults.items()),
        (*source.notes, *draft.notes),
    )


def _method(source: ForeignConfig, options: dict[str, GivenOption]) -> str:
    """Return the training method as the tool calls it, such as dpo or rm. options: the file's, by name."""

    def value(name: str) -> str:
        return as_text(options[name].value).lower() if name in options else ""

    if source.tool == AXOLOTL:
        if value("process_reward_model") == "true":
            return "process_reward_model"
        trained = "pt" if "pretraining_dataset" in options else "sft"
        return value("rl") or ("reward" if value("reward_model") == "true" else trained)
    if source.tool == FACTORY:
        stage = value("stage") or "sft"
        return value("pref_loss") if stage == "dpo" and value("pref_loss") in ("orpo", "simpo") else stage
    if source.trainer:
        return source.trainer
    if {"num_generations", "max_completion_length", "reward_funcs"} & options.keys():
        return "grpo"
    if {"desirable_weight", "undesirable_weight"} & options.keys():
        return "kto"
    if {"precompute_ref_log_probs", "beta", "sync_ref_model", "f_divergence_type"} & options.keys():
        return "dpo"
    return "reward" if "center_rewards_coefficient" in options else "sft"


def _choose_training(draft: Draft) -> None:
    """Decide between an adapter and full fine-tuning; set draft.full, draft.recipe and their settings."""
    source = draft.source
    for name in (
        "stage",
        "rl",
        "reward_model",
        "process_reward_model",
        "pref_loss",
        "do_train",
        "num_labels",
    ):
        if source.tool in (AXOLOTL, FACTORY) and name in draft.options and (
            name != "pref_loss" or draft.recipe != "dpo"
        ):  # fmt: skip
            draft.same.append(draft.options.pop(name))
    if source.tool == AXOLOTL:
        adapter = draft.take("adapter")
        kind = "" if adapter is None else as_text(adapter.value).lower()
        if kind not in ("", "lora", "qlora"):
            draft.lose(adapter, "jaxft's adapters are LoRA, which is used")
        elif adapter is not None:
            draft.express(adapter, ["quant=nf4"] if kind == "qlora" else [])
        lora = adapter is not None
    elif source.tool == FACTORY:
        chosen = draft.take("finetuning_type")
        kind = "lora" if chosen is None else as_text(chosen.value).lower()
        lora = kind != "full" and kind != "freeze"
        if kind in ("lora", "full"):
            draft.express(chosen, [])
        else:
            draft.lose(chosen, "jaxft has lora and full; sft_full train=base/layers/.* freezes embeddings")
    elif source.tool == UNSLOTH:
        full = draft.take("full_finetuning")
        lora = full is None or full.value is not True
        draft.express(full, [])
    else:
        used = draft.take("use_peft")
        lora = bool(source.lora) if used is None else used.value is True
        draft.express(used, [])
    draft.full = not lora
    if draft.full and draft.recipe == "sft":
        draft.recipe = "sft_full"
    elif draft.full:
        draft.put(FULL[draft.recipe])
    for override in METHOD_SETTINGS.get(draft.method, ()):
        draft.put(override)


def _adapter(draft: Draft) -> None:
    """Convert the adapter's rank, alpha, dropout, target modules and initialisation."""
    if draft.full:
        for name in ADAPTER_ONLY:
            option = draft.take(name)
            if option is not None and option.value is False:
                draft.unneeded.append(option)
            else:
                draft.lose(option, "is for adapters, but the file trains all weights")
        return
    start = draft.take("adapter_name_or_path", "lora_model_dir")
    if start is not None:
        draft.express(start, [f"start={as_text(start.value)}"], "rank, alpha and modules come from its files")
        draft.drop(*LORA_SETTINGS)
        return
    rank = draft.number("lora_r", "lora_rank", "r")
    alpha = draft.number("lora_alpha")
    factory, default = draft.source.tool == FACTORY, {TRL: 16, FACTORY: 8, UNSLOTH: 16, AXOLOTL: 8}
    if draft.source.tool == TRL and draft.source.lora:
        default[TRL] = 8  # peft.LoraConfig's
    if rank is None:
        rank = default[draft.source.tool]
        draft.default(f"rank={rank:g}")
    if alpha is None:
        alpha = 2 * rank if factory else 8 if draft.source.lora else 32 if draft.source.tool == TRL else 16
        draft.default(f"adapter.alpha={alpha:g}")
    samples = draft.recipe in ("grpo", "ppo", "online_dpo")
    dropout = draft.take("lora_dropout") if samples else None
    if dropout is not None and as_text(dropout.value) in ("0", "0.0"):
        draft.unneeded.append(dropout)
    else:
        draft.lose(dropout, "0 is used: completions are sampled without dropout, and log-probs must agree")
    if draft.source.tool == TRL and not (draft.source.lora or samples or "lora_dropout" in draft.options):
        draft.default("adapter.dropout=0.05")
    linear = draft.take("lora_target_linear")
    if linear is not None and linear.value is True:
        modules = draft.take("lora_target_modules")
        draft.express(linear, ["adapter.targets=all-linear"])
        draft.express(modules, ["adapter.targets=all-linear"], "lora_target_linear adapts all linear layers")
    elif linear is not None:
        draft.unneeded.append(linear)
    named = draft.peek("target_modules", "lora_target_modules", "lora_target")
    if linear is None and named is None and draft.source.tool == TRL:
        draft.default("adapter.targets=q_proj,v_proj")
        draft.notes.append("peft's default targets are q_proj,v_proj for most models; all-linear learns more")
    for name in ("loftq_config", "peft.loftq_config.loftq_bits"):
        loftq = draft.take(name)
        if loftq is not None:
            draft.express(loftq, ["adapter.init=loftq", "quant=nf4"], "the base is stored in 4 bits")


def _quantisation(draft: Draft) -> None:
    """Convert the quantisation of the base model: quant= and quant.double=."""
    kind = draft.take("quantization_type", "bnb_4bit_quant_type")
    bits = as_text(draft.peek("quantization_bit"))
    four = draft.peek("load_in_4bit") is True or bits == "4" or draft.settings.get("quant") == "nf4"
    if kind is not None:
        stored = as_text(kind.value).lower()
        if not four:
            draft.unneeded.append(kind)
        elif stored in ("nf4", "fp4"):
            names = ("load_in_4bit", "quantization_bit")
            draft.same += [option for name in names if (option := draft.take(name)) is not None]
            draft.express(kind, [f"quant={stored}"])
        else:
            draft.lose(kind, "4-bit bases are nf4 or fp4")
    double = draft.take("bnb_4bit_use_double_quant", "use_bnb_nested_quant", "double_quantization")
    if double is not None and double.value is False and four:
        draft.express(double, ["quant.double=false"])
    elif double is not None:
        draft.same.append(double)
    elif four and draft.source.tool == TRL:
        draft.default("quant.double=false")


def _mixed(draft: Draft, name: str, kinds: list) -> str:
    """Return losses with their weights as Python source, such as "(dpo, 1.0), (nll, 0.5)". name: the option
    that lists the losses. kinds: its items, as the tool calls them. Each weight is 1.0 unless the option
    loss_weights (dpo_loss_weights) has one for each loss.
    """
    given = draft.peek("loss_weights", "dpo_loss_weights")
    weights = given if isinstance(given, list) and len(given) == len(kinds) else [1.0] * len(kinds)
    (row,) = table_rows(draft.source.tool, name, draft.recipe)
    parts = []
    for kind, weight in zip(kinds, weights, strict=True):
        try:
            ours = dict(text.split("=", 1) for text in row.overrides(kind)).get("loss", "dpo")
        except ValueError:
            ours = str(kind)
        parts.append(f"({'nll' if kind == 'sft' else ours}, {weight})")
    return ", ".join(parts)


def _preferences(draft: Draft) -> None:
    """Convert the losses of preference pairs and the options of the reference model."""
    if draft.recipe not in ("dpo", "kto", "orpo", "simpo"):
        return
    for name in ("loss_type", "dpo_loss_type"):
        kinds = draft.peek(name)
        if isinstance(kinds, list) and len(kinds) == 1:
            draft.options[name] = draft.options[name]._replace(value=kinds[0])
        elif isinstance(kinds, list):
            mixed = f"preference_losses.mix({_mixed(draft, name, kinds)})"
            draft.lose(
                draft.take(name),
                f"write loss = jaxft.objectives.losses.{mixed} in mine.py; set loss=mine.py:loss",
            )
    if "dpo_loss_type" in draft.options:
        option = draft.options.pop("dpo_loss_type")
        by_table(draft, option._replace(name="loss_type"))
    sync = draft.take("sync_ref_model")
    alpha, steps = draft.take("ref_model_mixup_alpha"), draft.take("ref_model_sync_steps")
    if sync is not None and sync.value is True and draft.recipe == "dpo":
        moving = f"moving={as_text(alpha.value if alpha else 0.6)},{as_text(steps.value if steps else 512)}"
        for each in (sync, alpha, steps):
            draft.express(each, [moving])
    else:
        draft.unneeded += [each for each in (sync, alpha, steps) if each is not None]
    gamma = draft.take("simpo_gamma")
    if gamma is not None and draft.recipe == "simpo":
        draft.express(gamma, [f"gamma={as_text(gamma.value)}"])
    elif gamma is not None:
        draft.unneeded.append(gamma)
    for name in ("label_smoothing", "dpo_label_smoothing", "pref_ftx", "rpo_alpha", "ld_alpha",
                 "pref_bco_weight"):  # fmt: skip
        variant = draft.take(name)
        if variant is not None and as_text(variant.value) in ("0", "0.0"):
            draft.unneeded.append(variant)
        else:
            draft.lose(variant, "write the variant as a function: loss=mine.py:loss, see configs/README.md")


def _machine(draft: Draft) -> None:
    """Convert sharding over devices, plugins, and options of the machine."""
    draft.drop("dataset_num_proc", "preprocessing_num_workers", "dataset_processes")
    plugins = draft.take("plugins")
    if plugins is not None and re.fullmatch("((.*[Ll]iger.*|.*[Cc]ut_?[Cc]ross_?[Ee]ntropy.*),?)+",
                                            as_text(plugins.value)):  # fmt: skip
        draft.unneeded.append(plugins)
    else:
        draft.lose(plugins, "Axolotl's plugins are not run")
    sharded = None
    for name in [name for name in draft.options if name.partition(".")[0] in ("fsdp", "deepspeed")]:
        option = draft.options.pop(name)
        text = as_text(option.value).lower()
        if name == "deepspeed" and ("z0" in text or "zero0" in text):
            draft.express(option, [], "data parallel over all devices, the default")
            continue
        sharded = option
        offload = "; nothing is offloaded to the CPU" if "offload" in text else ""
        draft.express(
            option, ["mesh.data=1", "mesh.fsdp=-1"],
            f"weights, gradients and optimizer state are sharded over all devices{offload}",
        )  # fmt: skip
    for name in [name for name in draft.options if name.startswith("fsdp_config") or name == "fsdp_version"]:
        option = draft.options.pop(name)
        if "offload_params" in name and option.value is True:
            draft.lose(option, "weights stay on the devices; quant=nf4 and remat=full need less memory")
        else:
            draft.unneeded.append(option)
            sharded = sharded or option
    if sharded is not None and "mesh.fsdp" not in draft.settings:
        draft.put("mesh.data=1")
        draft.put("mesh.fsdp=-1")


def _evaluation(draft: Draft) -> None:
    """Convert the intervals of evaluation, checkpoints and logs, early stopping and the best metric."""
    strategy = draft.take("eval_strategy", "evaluation_strategy")
    off = strategy is not None and as_text(strategy.value) == "no"
    if draft.source.tool in (TRL, UNSLOTH, FACTORY) and (strategy is None or off):
        off = True
        draft.unneeded += [option for name in ("eval_steps", "per_device_eval_batch_size")
                           if (option := draft.take(name)) is not None]  # fmt: skip
    if strategy is not None and as_text(strategy.value) == "epoch":
        _per_epoch(draft, strategy, "loop.eval_every", 1)
    else:
        draft.express(strategy, [])
    saving = draft.take("save_strategy")
    if saving is not None and as_text(saving.value) == "epoch":
        _per_epoch(draft, saving, "loop.save_every", 1)
    elif saving is not None and as_text(saving.value) in ("no", "best"):
        draft.lose(saving, "loop.save_every= is an interval; the last step is always saved")
    else:
        draft.express(saving, [])
    for name, setting in STEP_INTERVALS.items():
        steps, option = draft.number(name), draft.take(name)
        if option is None:
            continue
        if steps is not None and (steps == int(steps) >= 1 or (0 < steps < 1 and name != "logging_steps")):
            draft.express(option, [f"{setting}={as_text(option.value)}"])
        else:
            draft.lose(option, f"{setting}= takes a whole number of steps, at least 1")
    for name in ("evals_per_epoch", "saves_per_epoch"):
        times, option = draft.number(name), draft.take(name)
        if option is not None:
            _per_epoch(draft, option, "loop.eval_every" if name[0] == "e" else "loop.save_every", times)
    patience = draft.take("early_stopping_patience", "early_stopping_steps")
    if patience is not None and "loop.eval_every" in draft.settings:
        draft.express(patience, [f"loop.patience={as_text(patience.value)}"])
    else:
        draft.lose(patience, "loop.patience= needs loop.eval_every=")
    metric, greater = draft.take("metric_for_best_model"), draft.take("greater_is_better")
    if metric is not None:
        named = as_text(metric.value)
        named = named if named.startswith("eval_") else f"eval_{named}"
        best = [] if named == "eval_loss" else [f"loop.best_metric={named}"]
        if best and greater is not None:
            best.append(f"loop.greater_is_better={as_text(greater.value)}")
        draft.express(metric, best)
    if greater is not None:
        draft.same.append(greater)


def _per_epoch(draft: Draft, option: GivenOption, setting: str, times: float | None) -> None:
    """Convert an option that counts events per epoch to an interval as a fraction of the run, in `draft`.

    setting: the interval, such as loop.eval_every. times: events per epoch. The option is recorded as lost
    if the interval would be the whole run, if loop.steps= is set, or if `times` is None or 0.
    """
    given = draft.number("num_train_epochs") or draft.number("num_epochs")
    epochs = given or EPOCHS[draft.source.tool]
    if not times or times * epochs <= 1 or "loop.steps" in draft.settings:
        draft.lose(option, f"{setting}= takes steps, or below 1 a fraction of the run")
    else:
        default = "" if given else f" of {epochs} epochs, the tool's default"
        draft.express(option, [f"{setting}={1 / (times * epochs):.4g}"], f"a fraction of the run{default}")


def _names(draft: Draft) -> None:
    """Convert the run's name, its trackers and the upload to the hub."""
    folder = draft.take("output_dir")
    if folder is not None:
        name = run_name(as_text(folder.value))
        draft.express(folder, [f"name={name}"], f"results are in runs/{name}/")
    for names in (("run_name",), ("wandb_name", "mlflow_run_name")):
        option = draft.take(*names)
        if option is not None and folder is None:
            draft.express(option, [f"name={run_name(as_text(option.value))}"], "the name of the run's folder")
        else:
            draft.express(option, [], "trackers show the name of the run's folder")
    for name, tracker in PROJECTS.items():
        project = draft.take(name)
        if project is not None:
            draft.express(project, [f"trackers={tracker}", f"tracking.project={as_text(project.value)}"])
    report = draft.peek("report_to")
    if isinstance(report, list):
        trackers = [name for name in report if name in ("wandb", "mlflow", "trackio")]
        rest = [name for name in report if name not in ("wandb", "mlflow", "trackio", "tensorboard")]
        option = draft.take("report_to")
        draft.express(option, [f"trackers={','.join(trackers)}"] if trackers else [])
        if rest:
            draft.lose(option, f"jaxft has no tracker {', '.join(map(as_text, rest))}")
    target = as_text(draft.peek("hub_model_id") or "org/name")
    for name in ("push_to_hub", "hub_model_id"):
        option = draft.take(name)
        if option is not None and option.value is False:
            draft.unneeded.append(option)
        elif option is not None:
            run = draft.settings.get("name", draft.recipe)
            draft.express(option, [], f"after the run: jaxft push runs/{run} {target}")


def _defaults(draft: Draft) -> dict[str, str]:
    """Return setting -> the tool's default, where the recipe's differs, also for settings of the file."""
    tool, recipe = draft.source.tool, draft.recipe
    packs = recipe in ("sft", "sft_full")
    defaults = {"optim.warmup": "0", "held_out": "none", "epochs": str(EPOCHS[tool])}
    if tool == AXOLOTL:
        defaults |= {"optim.schedule": "cosine", "optim.end": "0", "optim.warmup": "0.03"}
        defaults |= {"data.too_long": "drop", "max_length": "512"}
    elif tool == FACTORY:
        defaults |= {"optim.schedule": "linear", "optim.end": "0", "lr": "5e-5"}
        defaults |= {"max_length": "2048"}
    else:
        defaults |= {"optim.schedule": "linear", "optim.end": "0", "max_length": "1024"}
        defaults["lr"] = LEARNING_RATES[recipe.removesuffix("_full")]
    if draft.settings.get("optim.schedule") == "constant":
        del defaults["optim.end"]
    if "loop.steps" in draft.settings:
        del defaults["epochs"]
    if recipe == "sft_full":
        defaults["optim.weight_decay"] = "0"
    if packs:
        defaults["data.packing"] = "false"
    if recipe == "pretrain":
        defaults.pop("data.too_long", None)
    if recipe in ("grpo", "online_dpo", "ppo"):
        del defaults["max_length"]
        defaults.pop("data.too_long", None)
        defaults |= {"max_new": "512", "max_prompt": "1024"} if recipe == "grpo" else {}
        defaults |= {"group": "2" if draft.method == "rloo" else "8"} if recipe == "grpo" else {}
    if recipe == "simpo":
        defaults |= {"beta": "0.1", "gamma": "0.5"}
    return defaults


def _keep_known(draft: Draft) -> None:
    """Remove settings that the recipe lacks, such as data.packing of dpo; note those that have an effect."""
    if "trackers" not in draft.settings:
        for name in ("tracking.project", "tracking.artifact"):
            if draft.settings.pop(name, None) is not None:
                draft.notes.append(f"{name} is left out; it needs trackers=wandb, mlflow or trackio")
    if draft.recipe in ("sft", "sft_full"):
        return
    if draft.recipe == "pretrain":
        draft.settings.pop("data.too_long", None)
    for name in ("data.packing", "data.loss_on", "label_smoothing", "neftune", "dft"):
        text = draft.settings.pop(name, None)
        if text is not None and text not in ("false", "0", "0.0"):
            draft.notes.append(f"{name}={text} is left out, since only SFT has this setting")


def _ordered(settings: dict[str, str]) -> list[tuple[str, str]]:
    """Return (name, value) in the order of a command line: model and rows, then knobs, then dotted fields."""
    first = ("model", "data", "held_out", "start", "name")
    ordered = [(name, settings[name]) for name in first if name in settings]
    rest = [(name, text) for name, text in settings.items() if name not in first]
    return ordered + sorted(rest, key=lambda pair: "." in pair[0])
