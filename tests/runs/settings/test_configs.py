"""Every shipped config builds as shapes, without weights, rows or a network."""

import math
import re
import socket
import typing
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from tiny_llama import tiny_torch, write_folder

from jaxft.annotations import bounds_of, types_and_marks
from jaxft.models.adapted import HeadSettings, Teacher
from jaxft.nn import param_spec, tree
from jaxft.objectives.preference import EMAReference
from jaxft.runs.settings import config, setting_values
from jaxft.runs.settings.settings_list import help_text
from jaxft.train import recipes
from jaxft.train.programs import abstract
from jaxft.train.recipes import SMOLLM2

LARGE = "HuggingFaceTB/SmolLM2-1.7B-Instruct"
CONFIGS = sorted((Path(__file__).resolve().parents[3] / "configs").glob("*.py"))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a config reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


# Of each method one, and of the families of models those with something of their own.
@pytest.mark.quick_cases(
    "sft", "sft_full", "pretrain", "dpo", "simpo", "orpo", "kto", "reward", "grpo", "ppo", "online_dpo",
    "qwen3_8b_dpo", "gemma3_4b_sft",
)  # fmt: skip
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_builds_abstractly(path):
    run = config.load_config(str(path), [])
    programs, batch = abstract(run, jax.devices()[:1])
    assert param_spec.count_params(programs.partition.trainable_specs) > 0
    with jax.set_mesh(programs.mesh):
        state, found = jax.eval_shape(programs.train_step, programs.state, programs.frozen, batch)
    assert jax.tree.structure(state) == jax.tree.structure(programs.state)
    assert {"loss", "grad_norm", "skipped"} <= found.keys()
    assert setting_values.describe(run)["model"]["config"]["layers"] == run.model.config.layers


def numbers_of(path):
    """Yield (knob, bounds) of the recipe's numbers; of a list of numbers, those of its first item."""
    for name, knob in config.recipe_knobs(str(path)).items():
        kinds = types_and_marks(knob.kind)[0]
        items = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is tuple]
        if {int, float} & {*(member for kind in (knob.kind, *items) for member in types_and_marks(kind)[0])}:
            yield name, next((b for kind in (knob.kind, *items) if (b := bounds_of(kind))), None)


def outside(bounds):
    """Values just outside of bounds, as written."""
    if bounds.least > -math.inf:
        yield bounds.least if bounds.open_least else bounds.least - max(1, abs(bounds.least) / 10)
    if bounds.most < math.inf:
        yield bounds.most if bounds.open_most else bounds.most + 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_number_outside_of_its_bounds_is_refused_by_the_name_of_its_knob_before_loading(path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the recipe was called")

    monkeypatch.setattr(recipes, "model_for", refuse)
    numbers = dict(numbers_of(path))
    assert {"lr", "batch", "seed"} <= numbers.keys()
    for name, bounds in numbers.items():
        assert bounds, f"{name} has no bounds"
        of_list = name in ("moving", "correction_bounds")
        for value in (*outside(bounds), math.inf):
            with pytest.raises(ValueError, match=f"^{name}="):
                config.load_config(str(path), [f"{name}={value:g}" + ",1" * of_list])


@pytest.mark.parametrize(
    ("recipe", "setting", "message"),
    [
        ("dpo", "beta=-1", "beta=-1.0; expected above 0"),
        ("dpo", "beta=inf", "beta=inf; expected a finite number above 0"),
        ("dpo", "moving=2,512", "moving=2.0,512; expected above 0 and at most 1 as value 1"),
        ("grpo", "overlong=-3", "overlong=-3; expected at least 1, or none"),
        ("grpo", "overlong=99", "overlong=99: an episode has at most 8 tokens; use at most so many, or"),
        ("grpo", "beta=-0.1", "beta=-0.1; expected at least 0"),
        ("grpo", "reward_weights=1,inf", "reward_weights=1.0,inf; expected a finite number as value 2"),
        ("ppo", "eps=2", "eps=2.0; expected from 0 to 1, or none"),
        ("sft", "held_out=2", "held_out=2.0; expected at least 0 and below 1, or text, or none"),
        ("sft", "rank=0", "rank=0; expected at least 1, or none"),
    ],
)
def test_an_error_about_a_knob_has_the_name_and_the_bounds_that_its_help_shows(recipe, setting, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        config.load_config(recipe, [setting])


def test_a_knob_s_help_shows_its_bounds_and_not_those_of_a_field_of_the_same_name():
    lines = {line.split("=")[0].strip(): line for line in help_text("ppo").splitlines() if "=" in line}
    assert "from 0 to 1" in lines["eps"] and "1e-37" not in lines["eps"] and "at least 0 " in lines["lr"]


def test_values_that_papers_and_trl_use_are_accepted():
    for recipe, settings in {
        "sft": ["label_smoothing=0.49", "neftune=5"],
        "dpo": ["beta=0.001", "moving=1,1"],
        "simpo": ["gamma=0", "beta=10"],
        "grpo": ["beta=0", "eps_low=0", "eps_high=5", "missing_eos=0", "reward_weights=-1"],
        "ppo": ["gamma=0", "lam=0", "kl_coef=0", "entropy=0", "reward=exact", "warm_up=0"],
        "kto": ["desirable_weight=0"],
    }.items():
        assert config.load_config(recipe, settings)


def test_groups_of_knobs_refuse_wrong_numbers_from_python():
    for make in (lambda: recipes.LoraKnobs(rank=-1), lambda: recipes.SourceKnobs(batch=0)):
        with pytest.raises(ValueError, match=r"^(rank=-1|batch=0); expected at least 1"):
            make()


def test_lora_plus_is_a_knob_of_every_recipe_with_lora():
    paths = [path for path in CONFIGS if "rank" in config.recipe_knobs(str(path))]
    assert len(paths) >= 12
    for path in paths:
        assert config.load_config(str(path), ["lora_plus=16"]).optim.lora_plus == 16, path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_docstring_says_how_to_run_it_and_what_it_takes(path):
    text = path.read_text().split('"""')[1]
    assert f"python scripts/train.py --config configs/{path.name}" in text and "GB" in text


@pytest.mark.parametrize("name", ["sft", "sft_full", "dpo", "kto"])
@pytest.mark.parametrize("text, value", [("0.05", 0.05), ("none", None), ("rows.jsonl", "rows.jsonl")])
def test_held_out_rows_are_a_fraction_a_file_or_none(name, text, value):
    assert config.load_config(f"configs/{name}.py", [f"held_out={text}"]).data.held_out == value


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_an_8b_state_is_sharded_over_fsdp(full):
    run = config.load_config("configs/llama31_8b_sft.py", [f"full={str(full).lower()}", "mesh.fsdp=8"])
    programs, _ = abstract(run)
    leaves = jax.tree.leaves((programs.state.trainable, programs.frozen))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    local = sum(
        leaf.sharding.shard_shape(leaf.shape)[0] * _rest(leaf) * leaf.dtype.itemsize
        for leaf in leaves
        if leaf.ndim
    )
    assert local < whole / 7.9 * 1.05
    ours = tree.paths(programs.state.trainable)
    for path, leaf in tree.paths(programs.state.opt_state).items():
        like = next((ours[p] for p in ours if path.endswith("/" + p) and ours[p].shape == leaf.shape), None)
        assert like is None or like.sharding == leaf.sharding, path


def _rest(leaf):
    size = 1
    for n in leaf.sharding.shard_shape(leaf.shape)[1:]:
        size *= n
    return size


@pytest.mark.parametrize("name", ["sft", "sft_full", "dpo", "simpo", "orpo", "kto"])
def test_the_shipped_held_out_rows_evaluate_the_shipped_rows_only(name):
    assert config.load_config(f"configs/{name}.py", []).data.held_out.startswith("configs/data/")
    assert config.load_config(f"configs/{name}.py", ["data=mine.jsonl"]).data.held_out == 0.05


@pytest.mark.parametrize(
    "argv, message",
    [
        (["rank=4", "start=runs/sft"], "rank=4 is for a fresh adapter"),
        (["rank=4", "full=true"], "rank=4 is for an adapter, and full=true trains none"),
        (["start=runs/none", "full=true"], "start=runs/none: not the folder of a finished run"),
        (["reference=start", "moving=0.6,5"], "contradict each other"),
        (["reference_model=org/name", "moving=0.6,5"], "contradict each other"),
        (["reference_quant=nf4"], "reference_quant=nf4 needs a reference_model"),
        (["reference_model=runs/none"], "runs/none: no such folder"),
        (
            ["reference_model=HuggingFaceTB/SmolLM2-1.7B-Instruct", "loss=simpo"],
            "the loss reads no reference",
        ),
    ],
)
def test_knobs_that_contradict_each_other_are_refused(argv, message):
    with pytest.raises((ValueError, OSError), match=message):
        config.load_config("configs/dpo.py", argv)


def test_every_sft_recipe_starts_from_a_run(tmp_path):
    paths = [path for path in Path("configs").glob("*.py") if "sft" in path.name]
    assert len(paths) >= 4
    for path in paths:
        assert "start" in config.recipe_knobs(str(path)), path


@pytest.mark.parametrize(
    "recipe, argv", [("sft_full", []), ("dpo", ["full=true"]), ("reward", ["full=true"])]
)
def test_full_fine_tuning_starts_from_a_merged_adapter_or_from_a_whole_model(recipe, argv, tmp_path):
    base = str(write_folder(tmp_path / "base", tiny_torch()))
    (tmp_path / "lora" / "adapter").mkdir(parents=True)
    (tmp_path / "lora" / "adapter" / "adapter_config.json").write_text("{}")
    write_folder(tmp_path / "full" / "model", tiny_torch(num_hidden_layers=2))
    knobs = [*argv, f"model={base}"]
    run = config.load_config(f"configs/{recipe}.py", [*knobs, f"start={tmp_path}/lora"])
    assert (run.weights, run.start, run.adapter) == (base, f"{tmp_path}/lora", None)
    run = config.load_config(f"configs/{recipe}.py", [*knobs, f"start={tmp_path}/full"])
    assert (run.weights, run.start, run.model.config.layers) == (f"{tmp_path}/full/model", None, 2)
    if argv:  # sft_full has no quant
        with pytest.raises(ValueError, match="set quant=none"):
            config.load_config(f"configs/{recipe}.py", [*knobs, f"start={tmp_path}/lora", "quant=nf4"])


def dpo(*argv):
    """The arguments of the objective of configs/dpo.py."""
    return config.load_config("configs/dpo.py", list(argv)).objective.keywords


def test_dpo_takes_the_reference_that_is_asked_for():
    assert dpo()["reference"] == "start" and dpo("full=true")["reference"] == "precomputed"
    assert dpo("full=true", "reference=start")["reference"] == "start"
    assert dpo("moving=0.5,20")["reference"] == EMAReference(0.5, 20)


@pytest.mark.parametrize("recipe", ["dpo", "kto", "online_dpo"])
def test_another_reference_is_the_second_model_of_the_run(recipe):
    run = config.load_config(f"configs/{recipe}.py", [f"reference_model={SMOLLM2}"])
    assert run.objective.keywords["reference"] == "teacher" and run.teacher == Teacher()
    given = [f"reference_model={LARGE}", "reference_quant=nf4"]
    own = config.load_config(f"configs/{recipe}.py", given).teacher
    assert (own.weights, own.model.config.layers, own.quant.kind) == (LARGE, 24, "nf4")


@pytest.mark.parametrize("kl_in", ["loss", "rewards"])
def test_grpos_kl_penalty_is_to_the_second_model_that_is_asked_for(kl_in):
    run = config.load_config("configs/grpo.py", ["beta=0.1", f"kl_in={kl_in}", f"reference_model={SMOLLM2}"])
    penalty = run.objective.keywords["beta"]
    assert (penalty.coef, penalty.reference, run.teacher) == (0.1, "teacher", Teacher())
    with pytest.raises(ValueError, match=f"^reference_model={SMOLLM2} needs a KL penalty; set beta=0.05$"):
        config.load_config("configs/grpo.py", [f"reference_model={SMOLLM2}"])


@pytest.mark.parametrize("argv", [[], ["kl_target=6"]])
def test_ppos_kl_penalty_is_to_the_second_model_that_is_asked_for(argv):
    argv = [*argv, "reward=jaxft.rl.rewards:exact", f"reference_model={SMOLLM2}"]
    run = config.load_config("configs/ppo.py", argv)
    penalty = run.objective.keywords["policy"].keywords["beta"]
    assert penalty.reference == "teacher" and run.teacher == Teacher()


@pytest.mark.parametrize("loss", ["simpo", "cpo", "orpo", "alphapo"])
def test_dpo_with_a_reference_free_loss_runs_no_reference(loss):
    knob = f"loss=jaxft.objectives.losses.reference_free_losses:{loss}"
    assert dpo(knob)["reference"] is None and dpo(knob, "full=true")["reference"] is None
    assert dpo(knob, "reference=start")["reference"] == "start"


LOSSES = ["preference_losses:ipo", "reference_free_losses:kto", "reference_free_losses:bco"]


@pytest.mark.parametrize("loss", LOSSES)
def test_dpo_with_a_loss_that_reads_the_reference_runs_one(loss):
    assert dpo(f"loss=jaxft.objectives.losses.{loss}")["reference"] == "start"


def test_the_critic_of_ppo_begins_as_the_reward_model_where_that_shares_the_base():
    def critic(*argv):
        return config.load_config("configs/ppo.py", list(argv)).heads["critic"]

    head = config.load_config("configs/ppo.py", []).heads["reward"]
    assert critic() == critic("critic=reward") == replace(head, trained=True) and head.start
    assert critic("reward=jaxft.rl.rewards:exact") == critic("critic=shared") == HeadSettings()
    assert critic("critic=fresh", "rank=4").adapter.rank == 4 and critic("critic=full").weights
    with pytest.raises(ValueError, match="critic=reward starts from a reward model that shares the base"):
        critic("reward=jaxft.rl.rewards:exact", "critic=reward")


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["advantage=jaxft.rl.advantages:rloo", "estimate=jaxft.rl.estimators:by_each"],
            "estimate replaces advantage",
        ),
        (
            ["loss=jaxft.objectives.losses.policy_losses:policy_gradient", "passes=2"],
            "2 steps change it; use loss=unclipped",
        ),
        (["kl_in=rewards"], "kl_in=rewards needs a beta above 0"),
        (
            ["reward_weights=0.5", "reward_model=runs/reward"],
            r"reward_weights=\[.*\] for the rewards exact, reward. Set one weight",
        ),
    ],
)
def test_knobs_of_grpo_that_contradict_each_other_are_refused(argv, message):
    with pytest.raises(ValueError, match=message):
        config.load_config("configs/grpo.py", argv)


def test_a_knob_that_the_policy_loss_lacks_is_an_error():
    run = config.load_config(
        "configs/grpo.py", ["loss=jaxft.objectives.losses.policy_losses:policy_gradient", "eps_high=0.3"]
    )
    programs, batch = abstract(run, jax.devices()[:1])
    with (
        jax.set_mesh(programs.mesh),
        pytest.raises(ValueError, match="policy loss policy_gradient fails: TypeError: .*eps_high"),
    ):
        jax.eval_shape(programs.train_step, programs.state, programs.frozen, batch)
