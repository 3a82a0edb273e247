"""What a command leaves open follows from its rows and its model, and everything else is as it was."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_experts
from process_group import ProcessGroup
from scripts_in_process import load
from tiny_llama import tiny_torch, write_folder
from tiny_run import ROOT, Place, write_place, write_rows
from two_stacks import two_stacks

from jaxft.data.inspection import RowLengths, measure, micro_tokens
from jaxft.plan.plan_report import planned_pairs
from jaxft.runs.settings import config
from jaxft.train.start.open_settings import (
    Fit,
    _environment_lines,
    _reward_lines,
    activation_bytes,
    fitted,
    fitted_here,
    learning_rate,
    resolve,
)
from jaxft.weights.pretrained import load_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "base"
    write_folder(folder, tiny_torch())
    return folder


@pytest.fixture
def place(base, tmp_path, monkeypatch):
    """A working directory with rows of 100 to 1,090 characters, of which 1 of 100 has 9,000."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    lengths = [9000, *(100 + 10 * i for i in range(99))]
    rows = [{"instruction": "why?", "response": "b" * n} for n in lengths]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"prompt": "a" * (n // 8), "answer": "b" * 90} for n in lengths]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return [f"model={base}", "general=none"]


def settings_of(recipe, *overrides):
    """The settings after the rows are read, without those of a start."""
    return fitted(resolve(recipe, list(overrides)), devices=1)[0]


# ---- lengths and batches


def test_lengths_of_own_rows_cover_99_percent_within_the_models_context(place):
    found, lines = fitted(resolve("sft", [*place, "data=rows.jsonl"]), devices=1)
    context = found.value.model.config.max_positions
    text = "\n".join(lines)
    assert found.chosen["max_length"] == str(found.value.data.max_length) and context < 1090
    assert found.value.data.max_length == context // 64 * 64  # 99 % need more, which the tiny model hasn't
    assert f"max_length={found.value.data.max_length} covers" in text and "covers all" not in text
    assert f"the most that the model's {context:,} positions allow, and needs" in text
    record = found.describe()
    assert record["command"]["chosen"] == found.chosen and record["data"]["max_length"] == context
    assert record["command"]["line"] == ["sft", *place, "data=rows.jsonl"]


def test_rows_that_ship_and_settings_that_are_given_leave_everything_as_it_is(place):
    shipped, lines = fitted(resolve("sft", ["data=configs/data/finetuning.jsonl"]), devices=1)
    assert shipped.chosen == {} and lines == [] and shipped.value.data.max_length == 512
    given = ["max_length=128", "batch=6", "data.micro=2", "lr=0.1"]
    found = settings_of("sft", *place, "data=rows.jsonl", *given)
    assert found.chosen == {} and found.value.data.max_length == 128 and found.value.optim.lr == 0.1


def test_pairs_are_planned_in_the_rows_that_the_run_has(place, base, tmp_path):
    """The line about the microbatch counts padding, as the rows do; the settings alone allow more."""
    pairs = [
        {"prompt": "a" * (9 + n % 7), "chosen": "b" * (n % 90 + 1), "rejected": "c" * (n % 40 + 1)}
        for n in range(64)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    options = ["batch=8", "micro=2", "max_length=256", "held_out=none"]
    settings, lines = fitted(resolve("dpo", [*place, "data=pairs.jsonl", *options]), devices=1)
    run = settings.value
    source, bound = planned_pairs(run, 1)
    planned = source.layout.shapes()
    assert planned == run.data.open(load_tokenizer(str(base))).shapes[-1] and not bound
    length = planned.ids.shape[-1]
    assert length % 64 == 0 and length < run.data.abstract().ids.shape[-1]
    data = replace(run.data, max_length=256)
    assert micro_tokens(data, measure(data, load_tokenizer(str(base))), 256) == length
    away = replace(run, data=replace(run.data, train="not_here.jsonl"))
    none, (line,) = planned_pairs(away, 1)
    assert none is None and "upper bound" in line and "responses have 256 tokens" in line


def test_lengths_of_prompts_and_completions_fit_the_models_context(place):
    data = settings_of("grpo", *place, "data=prompts.jsonl").value.data
    # 99 % of the prompts have up to 1080 // 8 characters; TRL's 256 new tokens leave no room in 256
    assert (data.max_prompt, data.max_new) == (128, 128)


@pytest.mark.parametrize(
    ("answers", "budget", "expected"),
    [
        ([], 4096, {"max_prompt": 192, "max_new": 256, "micro": 8}),  # TRL's max_completion_length
        ([3] * 99 + [500], 4096, {"max_prompt": 192, "max_new": 256, "micro": 8}),
        ([300] * 50, 4096, {"max_prompt": 192, "max_new": 320, "micro": 8}),
        ([900] * 50, 4096, {"max_prompt": 192, "max_new": 488, "micro": 8}),  # 192 + 8 * 488 = 4096
        ([], 5000, {"max_prompt": 192, "max_new": 256, "micro": 4}),  # two rows of 192 + 8 * 256
    ],
)
def test_lengths_of_rollouts_by_hand(answers, budget, expected):
    prompts = np.array([100] * 98 + [190, 900])  # all of them would take a third more memory
    none = np.zeros((100, 0), np.int64)
    lengths = RowLengths(prompts, none, (), none.sum(1), np.array(answers, np.int64))
    run = config.load_config("grpo", [])  # 8 prompts in groups of 8
    assert Fit(run, lengths, budget).choose(["max_prompt", "max_new", "micro"]) == expected


def rollouts(longest, **data):
    """A fit of prompts that all have so many tokens, for a model with a context of 8,192."""
    run, none = config.load_config("grpo", []), np.zeros((100, 0), np.int64)
    lengths = RowLengths(np.full(100, longest), none, (), none.sum(1), none.sum(1)[:0])
    return Fit(replace(run, data=replace(run.data, **data)), lengths, 4096)


@pytest.mark.parametrize(
    ("longest", "group", "max_prompt"),
    [(3034, 8, 2048), (100, 32, 128), (4032, 8, 2048), (1500, 4, 1536), (3034, 4, 3072)],
)
def test_long_prompts_and_large_groups_leave_completions_of_256_tokens(longest, group, max_prompt):
    fit = rollouts(longest, group=group, eval_group=1)
    chosen = fit.choose(["max_prompt", "max_new", "micro"])
    assert (chosen["max_new"], chosen["max_prompt"]) == (256, max_prompt)
    said = "\n".join(fit._with_data(**chosen).lines(chosen))
    assert ("has more than these 4,096 tokens" in said) == (min(longest, max_prompt) + group * 256 > 4096)


def test_own_prompts_without_a_reward_of_their_own_have_a_line_about_the_recipes(place):
    own = [*place, "data=prompts.jsonl"]
    for lines in (
        fitted(resolve("grpo", own), devices=1)[1],
        fitted_here(resolve("grpo", own), devices=1)[1],
    ):
        assert [line[:70] for line in lines if line.startswith("rewards=")] == [
            "rewards= is not set: the recipe's reward, exact, compares a whole comp"
        ]
    for options in ([*own, "rewards=number"], [*place, "data=configs/data/opinions.jsonl"]):
        lines = fitted(resolve("grpo", options), devices=1)[1]
        assert not any(line.startswith("rewards=") for line in lines)
    (line,) = _reward_lines(resolve("online_dpo", own))
    assert line.startswith("reward= is not set: ") and line.endswith("or reward=file.py:function")
    assert not _reward_lines(resolve("online_dpo", [*own, "reward=number"]))


def test_an_episode_of_several_turns_has_what_the_budget_leaves_its_prompt():
    lengths = fit_of([300] * 100, ROWS).lengths
    fit = Fit(config.load_config("grpo_tools", []), lengths, 4096)  # 4 prompts, groups of 8, 3 turns
    chosen = fit.choose(["max_prompt", "max_new", "micro", "max_episode"])
    assert chosen == {"max_prompt": 320, "max_new": 256, "max_episode": 472, "micro": 4}  # (4096 - 320) / 8
    wide = replace(fit, budget=1 << 16).choose(["max_new", "max_episode"])
    assert wide == {"max_new": 256, "max_episode": 3 * 256}
    assert fit.choose(["max_new"]) == {"max_new": 144}  # the recipe's max_episode is set


def test_own_tools_rows_or_rewards_with_the_recipes_environment_have_a_line_that_names_it():
    note = [
        "environment= is not set: the recipe's own, Calculator, is also used, with its tools and its reward; "
        "environment=none leaves it out"
    ]
    own = ["data=prompts.jsonl"]
    for overrides, expected in (
        (own, note),
        (["rewards=exact"], note),
        ([], []),
        ([*own, "environment=calculator"], []),
    ):
        assert _environment_lines(resolve("grpo_tools", overrides)) == expected
    assert _environment_lines(resolve("grpo", own)) == []


def test_documents_that_are_split_have_a_line_with_a_limit_within_the_models_context():
    fit = fit_of([5000] * 40, {**ROWS, "too_long": "split"}, context=1000)
    line = fit.lines({})[1]
    assert line.startswith(
        "longer rows are split (data.too_long), so that no token is lost: max_length=512 splits 100.0 %,"
    )
    assert "max_length=1000 splits 100.0 % and needs 2.0 x the memory" in line
    whole = fit_of([5000] * 40, {**ROWS, "too_long": "split"}).lines({})[1]
    assert "max_length=5056 splits 0.0 % and needs 9.9 x the memory" in whole
    short = fit_of([500] * 40, {**ROWS, "too_long": "split"}).lines({})[1]
    assert short == "longer rows are split (data.too_long), so that no token is lost"


def test_a_run_with_a_checkpoint_keeps_what_it_began_with(place):
    found = settings_of("sft", *place, "data=rows.jsonl", "name=mine")
    (folder := Path("runs/mine/checkpoints/4")).mkdir(parents=True)
    record = json.loads(json.dumps(found.describe()))
    record["command"]["chosen"]["max_length"] = "192"
    (folder.parents[1] / "config.json").write_text(json.dumps(record))
    assert settings_of("sft", *place, "data=rows.jsonl", "name=mine").value.data.max_length == 192
    for more in ("epochs=3", "loop.steps=7"):  # which may change
        kept = settings_of("sft", *place, "data=rows.jsonl", "name=mine", more).value.data
        assert (kept.max_length, kept.batch) == (192, found.value.data.batch)
    other = settings_of("sft", *place, "data=rows.jsonl", "name=mine", "data.max_length=64").value.data
    assert (other.max_length, other.batch) == (64, found.value.data.batch)  # the command has the last word
    folder.rmdir()
    assert settings_of("sft", *place, "data=rows.jsonl", "name=mine").chosen == found.chosen


def test_a_run_of_a_sweep_keeps_what_it_began_with(place):
    settings = resolve("sft", [*place, "data=rows.jsonl"])
    named = replace(settings, value=replace(settings.value, name="grid/lr=0.1"))
    record = fitted(named, devices=1)[0].describe() | {"command": None}
    del record["command"]
    record["data"]["batch"] = 2
    for folder in ("runs/grid/checkpoints/4", "runs/grid/lr=0.1"):  # the runs share the checkpoints
        Path(folder).mkdir(parents=True)
    Path("runs/grid/lr=0.1/config.json").write_text(json.dumps(record))
    assert fitted(named, devices=8)[0].value.data.batch == 2


def test_lines_about_the_runs_of_a_sweep_are_printed_once_if_they_are_equal():
    lines_of_runs = load("sweep").lines_of_runs
    assert lines_of_runs({"a=1": ["x", "y"], "a=2": ["x", "y"]}) == ["x", "y"]
    assert lines_of_runs({"a=1": ["x"], "a=2": ["y"]}) == ["a=1: x", "a=2: y"]


def test_rows_that_cannot_be_read_leave_their_error_to_the_run(place):
    assert settings_of("sft", *place, "data=missing.jsonl", "lr=0.1").chosen == {}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["data=org/rows"], "org/rows is not a file on this machine"),
        (["data=rows.jsonl", "model=none/here"], "the tokenizer of none/here is not on this machine"),
    ],
)
def test_a_plan_says_which_lengths_it_leaves_to_the_run(place, options, reason):
    named = [text for text in options if text.startswith("data=")]
    settings = resolve("sft", [*place, *named])
    if len(options) > len(named):
        settings = replace(settings, value=replace(settings.value, weights="none/here"))
    found, lines = fitted_here(settings, devices=1)
    assert "max_length" not in found.chosen and found.value.data.max_length == 512
    assert lines[-1].startswith("warning: lengths are chosen when the run starts: ") and reason in lines[-1]


@pytest.mark.parametrize("lengths", [[], ["max_length=64", "batch=2", "micro=1"]], ids=["open", "given"])
def test_rows_that_a_run_would_refuse_are_an_error_of_a_plan_too(place, lengths):
    Path("broken.jsonl").write_text("{")
    with pytest.raises(ValueError, match="broken.jsonl:1: malformed JSON"):
        fitted_here(resolve("sft", [*place, "data=broken.jsonl", *lengths]), devices=1)


def fit_of(longest, data, budget=4096, context=8192):
    """A fit of rows whose prompts have no tokens."""
    run = config.load_config("sft", [])
    run = replace(run, model=replace(run.model, config=replace(run.model.config, max_positions=context)))
    none, responses = np.zeros(len(longest), np.int64), np.array(longest)[:, None]
    lengths = RowLengths(none, responses, ("response",), responses[:, 0], none[:0])
    return Fit(replace(run, data=replace(run.data, **data)), lengths, budget)


NAMES = ["max_length", "batch", "micro"]
ROWS = {"max_length": 512, "batch": 1, "held_out": "none", "epochs": 1.0}


@pytest.mark.parametrize(
    ("longest", "options", "expected"),
    [
        # short rows: the recipe's own length, and 100 * 4 / 512 rows of a step
        ([100] * 512 * 4, {}, {"max_length": 512, "batch": 4, "micro": 1}),
        ([900] * 99 + [5000], {}, {"max_length": 960, "batch": 1, "micro": 1}),
        # 99 % have up to 5000, more than the budget, and more than the context
        ([900] * 90 + [5000] * 10, {}, {"max_length": 4096, "batch": 1, "micro": 1}),
        ([5000] * 3000, {"context": 2000}, {"max_length": 1984, "batch": 8, "micro": 4}),
        ([3000] * 3000, {"budget": 3 * 3008}, {"max_length": 3008, "batch": 8, "micro": 4}),
    ],
)
def test_lengths_batches_and_microbatches_by_hand(longest, options, expected):
    fit = fit_of(longest, ROWS, **options)
    assert fit.choose(NAMES) == expected
    assert expected["batch"] // expected["micro"] * expected["max_length"] <= fit.budget


def test_all_rows_are_covered_if_that_takes_little_more_memory():
    assert fit_of([900] * 99 + [1000], ROWS).choose(NAMES)["max_length"] == 1024  # 960 for 99 %
    assert fit_of([900] * 99 + [1100], ROWS).choose(NAMES)["max_length"] == 960


def test_documents_that_are_split_keep_the_recipes_length():
    chosen = fit_of([5000] * 40, {**ROWS, "too_long": "split"}).choose(NAMES)
    assert "max_length" not in chosen


def test_bytes_of_activations_by_hand():
    model = config.load_config(
        "sft", []
    ).model  # 30 layers of width 576, mlp 1536, 9 heads and 3 kv heads of 64
    widths = 576 + 192 + 192 + 576 + 576 + 1536 + 1536  # q, k, v, attention, o, gate, up in bfloat16
    assert activation_bytes(model, "projections") == 30 * (2 * widths + 4 * 576)
    assert activation_bytes(model, "full") == 30 * 4 * 576  # the residual stream in float32


def test_bytes_of_activations_count_every_expert_and_attention_where_there_is_some():
    # 3 layers of width 32, 2 experts of 48, 4 and 2 heads of 8
    model = tiny_experts.experts(tiny_experts.CONFIG, np.dtype(np.float32))
    attention, mlps = 32 + 16 + 16 + 32 + 32, 2 * 2 * 48
    assert activation_bytes(model, "projections") == 3 * 4 * (attention + mlps + 32)
    assert activation_bytes(model, "none") == 3 * 4 * (attention + mlps + 2 * 48 + 2 * 32 + 32)
    model = two_stacks(np.dtype(np.float64))  # 3 such layers with one MLP, 2 recurrences of 12 channels
    attention, mlps = 128, 2 * 48
    assert activation_bytes(model, "attention") == 8 * (3 * 32 + 5 * 32)
    assert activation_bytes(model, "projections") == 8 * (3 * (attention + mlps) + 2 * 2 * 12 + 5 * 32)


def test_a_sample_counts_as_all_rows_it_stands_for():
    fit = fit_of([100] * 512, ROWS)  # 100 rows of a step's 512 tokens; four times as many in the dataset
    assert fit.choose(NAMES)["batch"] == 1
    fit = replace(fit, lengths=replace(fit.lengths, read=512, total=4 * 512))
    chosen = fit.choose(NAMES)
    assert chosen["batch"] == 4
    first, second = fit.lines(chosen)[:2]
    assert first.startswith("tokens of a sample of 512 of 2,048 rows: 50 % up to 100")
    assert second == "max_length=512 covers the sample"


def test_the_smallest_batch_has_a_row_of_every_device():
    assert replace(fit_of([100] * 40, ROWS), devices=8).choose(NAMES)["batch"] == 8


@pytest.mark.slow
def test_a_run_prints_and_stores_what_was_chosen_and_has_an_alarm_if_it_cuts_many_rows(tmp_path):
    write_place(tmp_path)
    (tmp_path / "config.py").write_text((ROOT / "configs" / "sft.py").read_text())
    write_rows(
        tmp_path / "own.jsonl", [{"prompt": "why?", "completion": "b" * (5 * i)} for i in range(1, 41)]
    )
    place = Place(tmp_path)
    options = ["model=base", "data=own.jsonl", "general=none", "samples=0", "dtype=float32", "lr=0.01"]
    assert place.run(*options, "name=a", "loop.steps=2") == 0, place.err()
    assert "chosen from the rows: max_length=256 batch=1 micro=1" in place.out()
    assert "alarm" not in place.out()
    record = json.loads((place.runs("a") / "config.json").read_text())
    assert record["command"]["chosen"] == {"max_length": "256", "batch": "1", "micro": "1"}
    assert place.run(*options, "name=a", "loop.steps=3") == 0, place.err()
    assert place.checkpoints("a")[-1] == 3
    assert place.run(*options, "name=b", "loop.steps=1", "max_length=64") == 0, place.err()
    assert "alarm after step 0:" in place.out() and "more tokens than max_length=64" in place.out()
    (alarm,) = json.loads((place.runs("b") / "summary.json").read_text())["alarms"]
    assert "max_length=256 covers 99 %" in alarm


@pytest.mark.slow
def test_two_processes_choose_the_same_and_print_it_once(tmp_path):
    write_place(tmp_path)
    (tmp_path / "config.py").write_text((ROOT / "configs" / "sft.py").read_text())
    write_rows(tmp_path / "own.jsonl", [{"prompt": "why?", "completion": "b" * n} for n in range(5, 205, 5)])
    group = ProcessGroup(tmp_path)
    options = ["model=base", "data=own.jsonl", "general=none", "samples=0", "dtype=float32", "lr=0.01"]
    assert group.run(*options, "name=a", "loop.steps=1") == [0, 0], group.output()
    assert "chosen from the rows: max_length=256 batch=8 micro=1" in group.first.out()
    assert "chosen" not in group.workdirs[1].out()


# ---- the learning rate


@pytest.mark.parametrize(
    ("command", "rate"),
    [
        # 5e-5 * (2000 / 576) ** 0.781 = 1.3e-4 for cross-entropy and all weights of SmolLM2-135M
        (["sft"], 1.3e-3),
        (["sft", "rank=64"], 1.3e-3),
        (["sft_full"], 1.3e-4),
        (["dpo"], 1.3e-4),
        (["dpo", "full=true"], 1.3e-5),
        (["reward"], 2.6e-4),
        (["grpo"], 6.6e-5),
        (["llama31_8b_sft"], 2.9e-4),  # 5e-4 * (2000 / 4096) ** 0.781
    ],
)
def test_lr_auto_is_a_table_by_width_adapter_and_objective(command, rate):
    recipe, *overrides = command
    found = resolve(recipe, [*overrides, "lr=auto"])
    assert found.value.optim.lr == rate and found.chosen == {"lr": str(rate)}
    assert found.describe()["optim"]["lr"] == rate and found.line == (recipe, *overrides, "lr=auto")


def test_another_model_than_the_recipes_has_the_rate_of_its_width(base):
    found = resolve("sft", [f"model={base}"])
    assert found.value.optim.lr == learning_rate(found.value) == float(found.chosen["lr"])
    assert resolve("sft", []).value.optim.lr == 1.5e-3 and resolve("sft", []).chosen == {}
    for given in ("lr=0.1", "optim.lr=0.1"):
        assert resolve("sft", [f"model={base}", given]).value.optim.lr == 0.1
    assert resolve("sft", ["optim.lr=auto"]).value.optim.lr == 1.3e-3


def test_full_fine_tuning_has_a_rate_of_its_own():
    assert resolve("dpo", ["full=true"]).value.optim.lr == 1.3e-5  # the recipe's 5e-5 is for LoRA
    assert resolve("llama31_8b_sft", ["full=true"]).value.optim.lr == 1e-5  # it has rates for both


def test_alpha_does_not_depend_on_the_rank(base):
    adapters = [resolve("sft", [f"rank={rank}"]).value.adapter for rank in (8, 64)]
    assert [(a.rank, a.alpha, a.scale) for a in adapters] == [(8, 32, 4), (64, 32, 0.5)]
