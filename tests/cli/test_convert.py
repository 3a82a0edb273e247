"""`jaxft convert`: what configurations of other tools become, that none of their options is lost without a
word, and that the recipe and the command train the same.
"""

import json
import shlex
import sys

import numpy as np
import pytest
from foreign_configs import COMMAND, DPO, FACTORY, FACTORY_INFO, GRPO_SCRIPT, QLORA, SFT_SCRIPT
from scripts_in_process import load

from jaxft.cli.convert import conversion_text, to_recipe
from jaxft.optim.optimizer import Optim, make_schedule
from jaxft.runs.settings.config import load_config
from jaxft.runs.settings.setting_values import describe, differences

FILES = {
    "qlora.yml": QLORA, "dpo.yaml": DPO, "factory.yaml": FACTORY, "run.sh": COMMAND, "sft.py": SFT_SCRIPT,
    "grpo.py": GRPO_SCRIPT,
}  # fmt: skip


@pytest.fixture
def converted(tmp_path, monkeypatch):
    """Write one of FILES, or another text, into the working directory, and convert it."""
    monkeypatch.chdir(tmp_path)

    def convert(name, text=None, devices=None):
        (tmp_path / name).write_text(FILES[name] if text is None else text)
        return to_recipe.convert(to_recipe.read(tmp_path / name), devices)

    return convert


def remarks(pairs):
    """Option -> remark."""
    return {option.name: remark for option, remark in pairs}


def test_axolotl_qlora(converted):
    c = converted("qlora.yml")
    assert c.recipe == "sft" and set(c.settings) == {
        "model=my-org/base-7b", "quant=nf4", "data=rows/answers.jsonl", "held_out=0.05", "name=first-try",
        "max_length=2048", "data.packing=true", "rank=32", "adapter.alpha=16", "adapter.dropout=0.05",
        "adapter.targets=all-linear", "batch=8", "micro=4", "epochs=3", "optim.optimizer=adamw",
        "optim.schedule=cosine", "optim.end=0", "lr=2e-4", "remat=full", "optim.warmup=10",
        "optim.weight_decay=0.0", "data.too_long=drop",
        "loop.eval_every=0.08333",  # 4 per epoch in 3 epochs
    }  # fmt: skip
    assert set(remarks(c.lost)) == {"my_own_key"}
    assert "Alpaca's preamble" in remarks(c.otherwise)["datasets"]
    assert [option.name for option in c.empty] == ["dataset_prepared_path", "wandb_project"]
    assert c.defaults == ["data.too_long=drop"]


def test_axolotl_dpo_with_columns_of_its_own(converted):
    c = converted("dpo.yaml")
    expected = {
        "data=my-org/pairs", "data.columns=prompt=conversation,chosen=better", "chat_template=llama3",
        "quant=int8", "beta=0.2", "reference=precomputed", "mesh.data=1", "mesh.fsdp=-1", "held_out=none",
        "adapter.targets=q_proj,v_proj", "max_length=512", "epochs=1", "optim.warmup=0.03", "batch=2",
    }  # fmt: skip
    assert c.recipe == "dpo" and expected <= set(c.settings)
    assert "narrator" in remarks(c.otherwise)["datasets"]
    assert set(remarks(c.lost)) == {"fsdp_config.fsdp_offload_params"}


PRM = """base_model: org/base
process_reward_model: true
datasets:
  - path: steps.jsonl
    type: stepwise_supervised
    step_separator: "\\n\\n"
    max_completion_length: 99
    train_on_last_step_only: true
"""
PRM_SCRIPT = """from trl.experimental.prm import PRMConfig, PRMTrainer
config = PRMConfig(step_separator="\\n", train_on_last_step_only=True, max_length=99, learning_rate=1e-5)
PRMTrainer(model="org/base", args=config)
"""


def test_a_process_reward_model_keeps_its_separator_and_the_steps_that_are_trained_on(converted):
    c = converted("prm.yml", PRM)
    assert c.recipe == "process_reward" and {
        "full=true", "data=steps.jsonl", r"data.separator=\n\n", "data.last_step_only=true",
    } <= {*c.settings}  # fmt: skip
    assert "max_length is for prompt and steps together" in remarks(c.otherwise)["datasets"]
    c = converted("prm.py", PRM_SCRIPT)
    assert c.recipe == "process_reward" and {"data.last_step_only=true", "max_length=99"} <= {*c.settings}
    assert not any("separator" in setting for setting in c.settings)
    assert "a process reward model of TRL" in conversion_text.conversion_lines(c)[0]


def test_the_report_has_a_title_for_every_recipe_that_a_file_is_converted_to():
    assert {*to_recipe.RECIPES.values(), "sft_full"} == conversion_text.METHOD.keys()


def test_a_mix_of_losses_has_the_files_weights(converted):
    mix = "loss_type=['ipo', 'sft'], loss_weights=[1.0, 0.2]"
    c = converted("mix.py", f"from trl import DPOConfig\nDPOConfig(output_dir='o', {mix})")
    assert "mix((ipo, 1.0), (nll, 0.2))" in remarks(c.lost)["loss_type"]
    assert "the file names no model that jaxft can find: add model=org/name" in c.notes


def test_a_template_of_llama_factory_names_ours_for_base_models(converted):
    c = converted("a.yaml", "stage: sft\nmodel_name_or_path: a/b\ndataset: alpaca\ntemplate: llama3\n")
    assert remarks(c.otherwise)["template"].endswith("for a base model add chat_template=llama3")


def test_llama_factory_reads_its_list_of_datasets(converted, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(FACTORY_INFO)
    c = converted("factory.yaml")
    expected = {
        "data=data/mine.json:instruction=question:response=answer,my-org/other:test", "data.max_samples=1000",
        "rank=8", "adapter.alpha=16", "adapter.targets=all-linear", "batch=8", "micro=8", "name=one",
        "data.packing=false", "optim.warmup=0.1", "mesh.fsdp=-1", "loop.save_every=500",
    }  # fmt: skip
    assert expected <= set(c.settings) and not c.lost


def test_llama_factory_without_its_list_says_that_the_files_are_guessed(converted):
    c = converted("factory.yaml")
    assert "data=data/mine.json,data/other.json" in c.settings
    assert "guess" in remarks(c.lost)["dataset"]


def test_a_command_with_variables_and_devices(converted):
    c = converted("run.sh")
    expected = {
        "model=my-org/base-1b", "data=my-org/pairs/plain", "held_out=my-org/pairs/plain:test", "batch=32",
        "micro=4", "loop.steps=100", "optim.warmup=7", "loss=ipo",
        "beta=0.3", "rank=4", "adapter.targets=q_proj,v_proj", "name=run-a", "loop.eval_every=20", "lr=1e-6",
        "optim.schedule=linear", "mesh.fsdp=-1",
    }  # fmt: skip
    assert c.recipe == "dpo" and expected <= set(c.settings)
    assert remarks(c.lost) == {"seed": "an expression, which is not run; set seed= yourself"}


def test_a_python_file_is_read_and_never_executed(converted, tmp_path):
    c = converted("sft.py")
    expected = {
        "model=my-org/base-1b", "data=rows.jsonl", "quant=fp4", "lr=0.0001", "epochs=2", "batch=4",
        "max_length=512", "data.packing=true", "data.loss_on=assistant", "optim.schedule=constant",
        "optim.warmup=0.05", "optim.optimizer=adamw_8bit", "rank=8", "adapter.alpha=16", "name=mine",
        "adapter.targets=all-linear", "adapter.rslora=true", "quant.double=false",
    }  # fmt: skip
    assert c.recipe == "sft" and expected <= set(c.settings)
    assert set(remarks(c.lost)) == {"run_name", "**further", "formatting_func"}
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("value", "kind"), [("lr", "a variable"), ("float(lr)", "an expression, which is not run")]
)
def test_a_learning_rate_that_is_not_known_is_not_replaced_by_a_default(tmp_path, value, kind):
    (tmp_path / "mine.py").write_text(
        "from trl import SFTConfig, SFTTrainer\n"
        f"def train(lr):\n    args = SFTConfig(learning_rate={value}, num_train_epochs=2)\n"
    )
    c = to_recipe.convert(to_recipe.read(tmp_path / "mine.py"))
    assert remarks(c.lost) == {"learning_rate": f"{kind}; set lr= yourself"}
    assert not [x for x in c.settings if x.startswith("lr=")] and "epochs=2" in c.settings


def test_rollouts_count_prompts(converted):
    c = converted("grpo.py", devices=2)
    # 8 completions x 2 devices x 4 = 64 of a rollout, 4 of each prompt; 4 / 2 = 2 steps of 2 microbatches
    expected = {
        "batch=16", "minibatches=2", "micro=2", "group=4", "max_new=256", "passes=2", "eps_low=0.1",
        "eps_high=0.1", "adapter=none", "token_weights=constant_length",
        "advantage=centred",
    }  # fmt: skip
    assert c.recipe == "grpo" and expected <= set(c.settings)
    assert set(remarks(c.lost)) == {"reward_funcs"}


def test_importance_weights_keep_their_kind_and_bounds(converted):
    command = "trl grpo --model_name_or_path org/name --dataset_name org/rows --use_vllm "

    def correction(options):
        prefix = "--vllm_importance_sampling_"
        c = converted("a.sh", command + options.replace("--", prefix))
        assert not {name for name in remarks(c.lost) if "sampling" in name}
        return {text for text in c.settings if text.startswith("correction")}

    masked = "correction=masked_completions"
    assert correction("") == correction("--correction false --mode token_mask --clip_max 2") == set()
    assert correction("--correction true") == {masked}
    assert correction("--correction true --mode token_truncate") == {"correction=truncated_tokens"}
    assert correction("--clip_max 2") == correction("--cap 2") == {masked, "correction_bounds=0,2"}
    both = correction("--mode token_mask --clip_min 0.5 --clip_max 5")
    assert both == {"correction=masked_tokens", "correction_bounds=0.5,5"}


def test_gdpo_standardises_each_reward_and_ignores_the_scale(converted):
    command = "trl grpo --model_name_or_path org/name --dataset_name org/rows "
    c = converted("a.sh", command + "--multi_objective_aggregation normalize_then_sum --scale_rewards batch")
    assert "estimate=by_each" in c.settings and not any(text.startswith("advantage=") for text in c.settings)


def test_rollouts_have_no_dropout(converted):
    command = "trl grpo --model_name_or_path org/name --dataset_name org/rows --use_peft"
    assert not any("dropout" in text for text in converted("a.sh", command).settings)
    c = converted("a.sh", f"{command} --lora_dropout 0.1")
    assert "without dropout" in remarks(c.lost)["lora_dropout"] and "rank=16" in c.settings


@pytest.mark.parametrize("name", FILES)
def test_every_option_is_in_one_of_the_lists(converted, name):
    c = converted(name)
    listed = {option.name for option in (*c.same, *c.unneeded, *c.empty)}
    listed |= {option.name for option, _ in (*c.otherwise, *c.lost)}
    assert {option.name.partition(".")[0] for option in c.source.options} == {
        name.partition(".")[0] for name in listed
    }
    assert not any(remark == "not converted" for _, remark in c.lost)


@pytest.mark.parametrize("file", ["answers.tsv", "notes.md", "answers.jsonl"])
def test_every_kind_of_file_that_is_read_is_a_file_and_has_no_split(converted, file):
    text = QLORA.replace("rows/answers.jsonl", f"{file}\n    split: validation")
    assert f"data={file}" in converted("qlora.yml", text).settings


@pytest.mark.parametrize("name", FILES)
def test_the_recipe_and_the_command_are_the_same_run(converted, name, tmp_path):
    c = converted(name)
    for name in ("model", "chat_template"):  # files
        c.values.pop(name, None)
    command = shlex.split(conversion_text.command(c).replace("\\\n", " "))
    assert command[:3] == ["jaxft", "train", c.recipe]
    conversion_text.write_recipe(tmp_path / "mine.py", c, conversion_text.conversion_lines(c))
    text = (tmp_path / "mine.py").read_text()
    assert "longest response" not in text  # of the recipe's own rows
    assert text.endswith("\n") and max(map(len, text.splitlines())) <= 110
    of_file, of_command = load_config(str(tmp_path / "mine.py"), []), load_config(c.recipe, command[3:])
    assert differences(describe(of_command), describe(of_file)) == []


@pytest.mark.parametrize(("kind", "warmup"), [("cosine", 10), ("linear", 0)])
def test_the_learning_rate_ends_where_theirs_does(converted, kind, warmup):
    text = FACTORY.replace("cosine", kind).replace("warmup_ratio: 0.1", f"warmup_steps: {warmup}")
    run = load_config("sft", [s for s in converted("factory.yaml", text).settings if s.startswith("optim.")])
    steps = np.arange(100)
    done = np.clip((steps - warmup) / (100 - warmup), 0, 1)  # transformers' get_scheduler
    falling = (1 + np.cos(np.pi * done)) / 2 if kind == "cosine" else 1 - done
    theirs = np.where(steps < warmup, steps / max(1, warmup), falling)
    ours = make_schedule(Optim(**{**vars(run.optim), "lr": 1.0}), 100)
    # the peak is the last step of our warm-up, and one step later in theirs
    np.testing.assert_allclose([float(ours(i)) for i in steps], theirs, atol=0.11 if warmup else 0.011)
    assert float(ours(99)) < 1e-6


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yml", "base_model: [", "a.yml:1: not YAML"),
        ("a.yml", "base_model: !!python/object/apply:os.system [touch executed]", "not YAML: could not"),
        ("a.yml", "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
                                            for a, b in zip("abcdefgh", "bcdefghi")), "20,000 values"),
        ("a.yml", "a: &a [*a]", "more than 20,000 values"),
        ("a.yml", "[" * 3000, "nested too deeply|not YAML"),
        ("a.yml", "", "the file is empty"),
        ("a.yml", "- 1\n- 2", "expected options as"),
        ("a.yml", "name: x", "not a configuration of Axolotl"),
        ("a.yml", "model: {_component_: torchtune.models.x}\n", "torchtune's"),
        ("a.yml", "base_model: x\nrl: ebft", "no recipe for ebft"),
        ("a.yml", "x: " + "a" * 2**20, "larger than 1 MiB"),
        ("a.py", "def f(:", "a.py:1: syntax error"),
        ("a.py", "print(1)", "calls none of"),
        ("a.py", "x = " + "(" * 300 + ")" * 300, "a.py"),
        ("a.py", "f(SFTConfig(lr=" + "-" * 5000 + "1))", "a.py"),
        ("a.ipynb", "{}", "not a notebook"),
        ("a.sh", "echo hello", "no command that starts a trainer"),
        ("a.sh", "axolotl train missing.yml", "missing.yml, which is neither in the working directory"),
        ("a.toml", "x = 1", ".toml is not a suffix that jaxft convert reads"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_one_line(converted, tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message) as error:
        converted(name, text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "value", ["1e999", "-1", "[1, 2]", "{a: b}", ".nan", "9" * 40, "true", "x y", "2024-01-01"]
)
def test_any_value_of_any_option_converts_or_is_one_line(converted, value):
    for name in ("qlora.yml", "factory.yaml"):
        lines = FILES[name].splitlines()
        for number, line in enumerate(lines):
            if line[:1] not in (" ", "-"):
                changed = [*lines[:number], f"{line.partition(':')[0]}: {value}", *lines[number + 1 :]]
                try:
                    conversion_text.conversion_lines(converted(name, "\n".join(changed)))
                except ValueError as error:
                    assert "\n" not in str(error) and name in str(error), error


TRAINER = (
    "DPOTrainer(args=DPOConfig('out', eval_strategy='steps', eval_steps=5), train_dataset={}, "
    "eval_dataset={})"
)


def code(rows, train, held):
    """A script whose trainer has rows and held-out rows."""
    return f"{rows}\n{TRAINER.format(train, held)}\n"


def of_rows(conversion):
    """The settings about rows."""
    return {text for text in conversion.settings if text.startswith(("data", "held_out="))}


@pytest.mark.parametrize(
    ("rows", "train", "held", "expected"),
    [
        ("ds = load_dataset('json', data_files='a.jsonl', split='train').train_test_split(test_size=0.1, "
         "seed=42)", "ds['train']", "ds['test']", "data=a.jsonl held_out=0.1 data.split_seed=42"),
        ("ds = load_dataset('org/name')\nds = ds['train'].train_test_split(0.2)", "ds['train']", "ds['test']",
         "data=org/name held_out=0.2"),
        ("ds = load_dataset('org/name', split='train').train_test_split(train_size=0.9)\n"
         "train, test = ds['train'], ds['test']", "train", "test", "data=org/name held_out=0.1"),
        ("f = {'train': 'a.jsonl', 'test': 'b.jsonl'}\n"
         "train = load_dataset('json', data_files=f, split='train')\n"
         "test = load_dataset('json', data_files=f, split='test')", "train", "test",
         "data=a.jsonl held_out=b.jsonl"),
        ("ds = load_dataset('json', data_files={'train': 'a.jsonl', 'test': ['b.jsonl', 'c.jsonl']})",
         "ds['train']", "ds['test']", "data=a.jsonl held_out=b.jsonl,c.jsonl"),
        ("a, b = load_dataset('org/name', 'plain', split=['train', 'validation'])", "a", "b",
         "data=org/name/plain held_out=org/name/plain:validation"),
        ("ds = load_dataset('org/name', split='train').select(range(1000))", "ds", "None",
         "data=org/name data.max_samples=1000 held_out=none"),
        ("ds = load_dataset('org/name', split='train[:50]')", "ds", "None",
         "data=org/name data.max_samples=50 held_out=none"),
        ("ds = load_dataset('org/name')", "ds['train']", "ds['test'].select(range(100))",
         "data=org/name held_out=org/name:test:max_samples=100"),
        ("a = load_dataset('org/name', split='train[:90%]')\n"
         "b = load_dataset('org/name', split='train[90%:]')",
         "a", "b", "data=org/name held_out=0.1"),
        ("a = load_dataset('org/name', split='train[20%:]')\n"
         "b = load_dataset('org/name', split='train[:20%]')",
         "a", "b", "data=org/name held_out=0.2"),
        ("ds = load_dataset('org/name')", "ds['train'].select(range(9))", "ds['test']",
         "data=org/name:max_samples=9 held_out=org/name:test"),
    ],
)  # fmt: skip
def test_rows_are_followed_to_the_trainer(converted, rows, train, held, expected):
    c = converted("a.py", code(rows, train, held))
    assert of_rows(c) == set(expected.split()) and not c.lost
    assert not any(text.startswith("held_out") for text in c.defaults if text != "held_out=none")


@pytest.mark.parametrize(
    ("train", "held"),
    [
        ("ds", "ds"), ("ds", "ds.select(range(10))"), ("ds.select(range(10, 99))", "ds.select(range(10))"),
        ("ds", "ds.train_test_split(0.1)['test']"),
        ("ds", "load_dataset('json', data_files='a.jsonl')['train']"),
        ("ds", "load_dataset('json', data_files=['./a.jsonl', 'b.jsonl'], split='train')"),
        ("ds", "made_elsewhere()"),
    ],
)  # fmt: skip
def test_held_out_is_never_the_training_file(converted, train, held):
    c = converted("a.py", code("ds = load_dataset('json', data_files='a.jsonl', split='train')", train, held))
    assert "data=a.jsonl" in c.settings and "held_out=none" in c.settings
    (line,) = [option.line for option, _ in c.lost if option.name == "eval_dataset"]
    assert line == 2


def test_held_out_of_a_command_is_never_the_training_file(converted):
    c = converted("a.sh", "trl sft --model_name_or_path a/b --dataset_name rows.jsonl --eval_strategy steps")
    assert "held_out=none" in c.settings


def test_each_change_of_rows_is_reported_with_its_line(converted):
    rows = (
        "ds = load_dataset('org/name', split='train')\nds = ds.filter(good)\nds = ds.map(first)\n"
        "ds = (\n    ds.map(second, batched=True)\n    .shuffle(seed=1)\n)\n"
        "other = load_dataset('org/other')\n"
        "ds = ds.rename_column('better', 'chosen')"
    )
    c = converted("a.py", code(rows, "ds", "None"))
    lines = {(option.line, str(option.value)) for option, _ in c.lost}
    assert lines == {
        (2, "filter(good)"), (3, "map(first)"), (5, "map(second, batched=True)"),
        (8, "load_dataset('org/other')"), (9, "rename_column('better', 'chosen')"),
    }  # fmt: skip
    assert "data.columns=chosen=better" in " ".join(remark for _, remark in c.lost)
    assert "dataset.shuffle" in [option.name for option in c.unneeded]


def test_the_first_rows_of_shuffled_ones_are_reported(converted):
    rows = "ds = load_dataset('org/name', split='train').shuffle(seed=1).select(range(8))"
    c = converted("a.py", code(rows, "ds", "None"))
    assert "data.max_samples=8" in c.settings and "first rows" in remarks(c.lost)["dataset.shuffle"]


def test_intervals_in_epochs_use_the_tools_default_number_of_epochs(converted):
    text = (
        "from trl import SFTConfig\nSFTTrainer(callbacks=[EarlyStoppingCallback(early_stopping_patience=3, "
        "early_stopping_threshold={threshold})], args=SFTConfig('out', eval_strategy='epoch'))"
    )
    c = converted("a.py", text.format(threshold="0.0"))
    assert {"loop.eval_every=0.3333", "epochs=3", "loop.patience=3"} <= {*c.settings, *c.defaults}
    assert "3 epochs, the tool's default" in remarks(c.otherwise)["eval_strategy"] and not c.lost
    c = converted("a.py", text.format(threshold="0.1"))
    assert "however small" in remarks(c.lost)["early_stopping_threshold"]


def test_early_stopping_and_the_folder_of_a_python_file(converted):
    text = (
        "from trl import DPOConfig\nDPOTrainer(callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],"
        "\nargs=DPOConfig('dpo-out', beta=0.2, eval_strategy='steps', eval_steps=5))"
    )
    c = converted("a.py", text)
    assert {"loop.patience=3", "name=dpo-out", "beta=0.2"} <= set(c.settings) and not c.lost
    named = text.replace("EarlyStoppingCallback(early_stopping_patience=3)", "stop")
    c = converted("a.py", f"stop = EarlyStoppingCallback(3)\n{named}")
    assert "loop.patience=3" in c.settings and not c.lost
    c = converted("a.py", text.replace("[Early", "[mine, Early"))
    assert "loop.patience=3" in c.settings and set(remarks(c.lost)) == {"callbacks"}


def test_numbers_are_computed_and_nothing_else_is(converted):
    text = (
        "from trl import SFTConfig\nN = 4\nN += 1\nSFTConfig(learning_rate=2 * 1e-4, max_length=N, seed=9**9)"
    )
    c = converted("a.py", text)
    assert "lr=0.0002" in c.settings
    assert set(remarks(c.lost)) == {"max_length", "seed"}


def test_calls_of_a_notebook_without_an_option_are_listed_with_what_to_do(converted):
    code = [
        "from unsloth import FastLanguageModel",
        "trainer = SFTTrainer(model=model, args=SFTConfig(learning_rate=2e-4, max_stepz=3))",
        "trainer = train_on_responses_only(trainer, instruction_part='<user>')",
        "tokenizer = get_chat_template(tokenizer, chat_template='llama-3')",
        "model.save_pretrained_gguf('model', tokenizer)",
    ]
    cells = [{"cell_type": "code", "source": [line]} for line in code]
    c = converted("a.ipynb", json.dumps({"cells": cells}))
    lost = remarks(c.lost)
    assert set(lost) == {"train_on_responses_only", "save_pretrained_gguf", "max_stepz"}
    assert "by default" in lost["train_on_responses_only"] and "--gguf" in lost["save_pretrained_gguf"]
    assert lost["max_stepz"].endswith("nothing is set for it; did you mean max_steps?")
    assert not any("data.loss_on=all" in note for note in c.notes)
    assert "chat_template=llama3" in c.settings


def test_the_command_prints_the_command_and_the_report(converted, capsys, monkeypatch, tmp_path):
    converted("qlora.yml")
    main = load("convert").main
    monkeypatch.setattr(sys, "argv", ["convert", "qlora.yml"])
    assert main() == 0
    out, err = capsys.readouterr()
    assert out.startswith("jaxft train sft model=my-org/base-7b") and "my_own_key" not in out
    line = QLORA.splitlines().index("my_own_key: 3") + 1
    assert f"line {line} my_own_key: 3 -> not an option of Axolotl" in err
    monkeypatch.setattr(sys, "argv", ["convert", "qlora.yml", "--out", "mine.py"])
    assert main() == 0 and (tmp_path / "mine.py").is_file()
    with pytest.raises(ValueError, match="the file exists"):
        main()
    for out, better in (("recipes/x.txt", "recipes/x.py"), (".", "mine.py")):
        monkeypatch.setattr(sys, "argv", ["convert", "qlora.yml", "--out", out])
        with pytest.raises(ValueError, match=f"a recipe is a Python file; write --out {better}$"):
            main()
