"""`jaxft settings` lists every setting of a run as it can be written; names and files of other tools are
errors that say what to write.
"""

import inspect
import re
from dataclasses import dataclass

import optax
import pytest
from scripts_in_process import call

from jaxft.cli import help_page
from jaxft.data.rows.shipped import ROOT
from jaxft.data.sft import Rows
from jaxft.engine.sampling import Sampling
from jaxft.optim.low_precision import adamw_8bit, adamw_bf16
from jaxft.optim.optimizer import Optim
from jaxft.optim.rules import adamw, schedule_free_adamw
from jaxft.runs.settings import config, settings_list
from jaxft.runs.settings.setting_names import advice, options_as_settings
from jaxft.runs.settings.setting_values import describe, differences
from jaxft.runs.settings.settings_list import descriptions
from jaxft.train.settings import Run

RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@dataclass(frozen=True)
class Base:
    """Settings of a toy. lr: the rate.

    a, b: of both. Not one: text. c: the third (see x): more. It goes on
    in a second line.
    """

    lr: float = 1.0
    a: int = 1
    b: int = 2
    c: int = 3


@dataclass(frozen=True)
class Derived(Base):
    """A toy. b: its own text.

    >>> Derived().b
    2
    """

    d: bool = False


def test_a_field_is_described_by_the_nearest_docstring():
    assert settings_list.descriptions(Derived) == {
        "lr": "the rate.",
        "a": "of both. Not one: text.",
        "b": "its own text.",
        "c": "the third (see x): more. It goes on in a second line.",
    }


@dataclass(frozen=True)
class Paragraphs:
    """A toy.

    a: the first.

    Of both together.

    b: the second. It
    goes on.
    """

    a: int = 1
    b: int = 2


def test_a_fields_description_ends_with_its_paragraph():
    assert descriptions(Paragraphs) == {"a": "the first.", "b": "the second. It goes on."}


def test_a_description_names_no_other_fields_docstring_and_writes_none_as_users_do():
    texts = {s.name: s.text for group in help_page.settings_of_any_run().values() for s in group}
    texts["data.environment"] = texts["data.environment"].replace("is annotated to return None", "")
    assert [name for name, text in texts.items() if re.search(r"\bNone\b|Other fields", text)] == []
    assert "trained in full" in texts["adapter.modules_to_save"]
    assert "trained" not in texts["adapter.layers_to_transform"].lower()


OWN_RECIPE = """
from jaxft.data.sft import Rows
from jaxft.engine.sampling import Sampling
from jaxft.train.settings import Run

def objective(kind): return kind

def config(
    kind: str = "mine", max_new: int = 3, clip: float = 1.0, seed: int = 0, mode: str = "a",
    beta: float = 1.0, warmup: float = 0.1,
    epochs: float = 1.0,  # of the comment
) -> Run:
    '''Train mine. mode: what to do. warmup: optim.warmup; doubled. epochs: of the docstring.

    Not about beta: another paragraph.
    '''
    data = Rows("x", seed=seed)
    return Run("mine", objective=objective(kind=kind), data=data, sampling=Sampling(max_new))
"""


def test_a_knob_has_a_fields_description_only_if_the_recipe_sets_that_field(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN_RECIPE)
    fields = [*settings_list.settings_of(Run), *settings_list.settings_of(Rows, "data.")]
    texts = {knob.name: knob.text for knob in settings_list.knobs_of(str(path), fields)}
    assert texts["max_new"] == descriptions(Sampling)["max_new"]
    assert texts["seed"] == descriptions(Rows)["seed"]  # and not the run's
    assert texts["mode"] == "what to do." and texts["epochs"] == "of the comment"
    assert texts["warmup"].endswith("of all steps; doubled.")
    assert texts["kind"] == texts["clip"] == texts["beta"] == ""  # not those of quant.kind and optim.clip
    assert f"settings.py {path})" in settings_list.help_text(str(path))
    assert "settings.py sft)" in settings_list.help_text("configs/sft.py")


@pytest.fixture(scope="module")
def settings():
    """Recipe -> the settings of its run, and its run."""
    runs = {recipe: config.load_config(recipe, []) for recipe in RECIPES}
    return {recipe: (list(settings_list.settings_of(run)), run) for recipe, run in runs.items()}


# Functions with arguments, and a list or text that is empty: what is written has another type.
NOT_WRITTEN = ("objective", "data.rules.estimate", "data.rules.shape", "adapter.exclude_modules")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_has_a_description_and_its_default_is_read_back(recipe, settings):
    found, run = settings[recipe]
    assert len(found) > 90 and [s.name for s in found if not s.text or not s.kind] == []
    none = [name for name in ("adapter", "quant") if getattr(run, name) is None]
    lines = [
        f"{s.name}={s.default}"
        for s in found
        if s.name not in NOT_WRITTEN and s.name.partition(".")[0] not in none
    ]
    assert differences(describe(run), describe(config.load_config(recipe, lines))) == []


def test_settings_are_found_by_name_by_description_and_by_other_tools_names(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "settings", "--config", "sft", "warmup")
    names = [line.split("=")[0].strip() for line in out.splitlines() if line.startswith("  ") and "=" in line]
    assert code == 0 and {"optim.warmup", "optim.lr"} <= set(names) and "loop.steps" not in names
    code, out, _ = call(monkeypatch, capsys, "settings", "learning_rate")
    assert code == 0 and out.startswith("learning_rate is lr here") and "  optim.lr=" in out
    code, out, _ = call(monkeypatch, capsys, "settings", "dpo", "loss")
    assert code == 0 and "  loss=dpo " in out and "sppo_hard" in out
    code, out, _ = call(monkeypatch, capsys, "settings", "sft", "optim.clip=0.5", "clip")
    assert code == 0 and "  optim.clip=0.5 " in out
    code, out, _ = call(monkeypatch, capsys, "settings", "neftune")  # of some recipes alone
    assert code == 0 and out.startswith("in recipes such as sft:") and "\n  neftune=0.0 " in out
    code, out, _ = call(monkeypatch, capsys, "settings", "loss_type")
    assert "loss=hinge (recipes such as dpo)" in out.split("\n")[0]
    code, out, err = call(monkeypatch, capsys, "settings", "wramup")
    assert code == 1 and not out and "'wramup'" in err and "near: optim.warmup" in err


def test_without_a_recipe_the_settings_of_all_kinds_of_data_are_listed(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "settings")
    assert code == 0
    for name in ("loop.steps", "data.invalid", "data.packing", "data.layout", "data.passes", "quant.kind"):
        assert out.count(f"\n  {name}=") == 1, name


def test_without_a_recipe_other_defaults_of_recipes_are_named(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "settings", "optim")
    rates = {recipe: config.load_config(recipe, []).optim.lr for recipe in ("sft", "dpo", "grpo")}
    expected = "; ".join(f"{recipe}: {rate}" for recipe, rate in rates.items())
    assert code == 0 and f"  optim.lr={Optim().lr} " in out and f"({expected})" in " ".join(out.split())
    assert out.startswith("optim: ")  # and not with what to write for TRL's option of that name


def test_the_defaults_of_b1_b2_and_eps_are_those_of_the_optimizers():
    texts = descriptions(Optim)
    of_adamw, of_lion = (inspect.signature(f).parameters for f in (adamw, optax.lion))
    assert f"{of_lion['b2'].default} of Lion" in texts["b2"] and of_lion["b1"].default == 0.9
    for name in ("b1", "b2", "eps"):
        number = f"{of_adamw[name].default:g}".replace("e-0", "e-")
        assert re.search(rf"\b{number} of AdamW", texts[name]), name
        for rule in (adamw_8bit, adamw_bf16, schedule_free_adamw):
            assert inspect.signature(rule).parameters[name].default == of_adamw[name].default


# Names of other tools


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("sft", "learning_rate=1e-4", "learning_rate is lr here; write lr=1e-4"),
        ("sft", "lora_r=8", "lora_r is rank here; write rank=8"),
        ("sft", "load_in_4bit=true", "write quant=nf4"),
        ("dpo", "loss_type=ipo", "loss_type is loss here; write loss=ipo"),
        ("sft", "num_generations=4", "group here, in recipes such as grpo; write group=4"),
        ("sft", "optim=adamw_8bit", "write optim.optimizer=adamw_8bit"),
        ("sft", "torch_compile=true", "nothing to set"),
        ("sft", "deepspeed=zero3.json", "mesh.fsdp=-1"),
        ("sft", "weight_decay=0.1", "write optim.weight_decay=0.1 "),
        ("sft", "packing=false", "packing is data.packing here; write data.packing=false"),
        ("sft", "fsdp=full_shard", "fsdp is mesh.fsdp here; mesh.fsdp=-1 shards"),
        ("sft", "liger_kernel=true", "use_liger_kernel: nothing to set; XLA fuses these"),
        ("sft", "dora=true", "use_dora is adapter.dora here; write adapter.dora=true"),
        ("sft", "full=true", "full=true: the recipe sft_full trains all weights$"),
        ("sft", "full_finetuning=true", "full_finetuning=true: the recipe sft_full trains all weights$"),
        ("grpo", "full=true", "adapter=none trains all weights$"),
        ("grpo_tools", "full_finetuning=true", "adapter=none trains all weights$"),
        ("sft", "top_k=4", "unknown key 'top_k'; near: .*sampling.top_k"),
        ("sft", "no_such_name=4", "unknown key 'no_such_name'; near: "),
    ],
)
def test_a_name_of_another_tool_is_an_error_that_says_what_to_write(recipe, override, message):
    with pytest.raises(ValueError, match=message) as error:
        config.load_config(recipe, [override])
    assert "\n" not in str(error.value)


def test_all_names_of_other_tools_are_answered_at_once_and_a_note_once():
    overrides = ["per_device_train_batch_size=4", "gradient_accumulation_steps=2", "max_steps=3", "lora_r=8"]
    with pytest.raises(
        ValueError, match=r"_size is batch here, .*_steps is batch here; .*steps=3; .*rank=8$"
    ):
        config.load_config("sft", overrides)
    line = options_as_settings(["sft", "--per_device_train_batch_size", "4", "--batch_size", "2"], [])
    assert line is not None and line.count("microbatches") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sft", "--lr", "1e-4"], "--lr 1e-4: .* write lr=1e-4;"),
        (["sft", "--data", "f.jsonl"], "write data=f.jsonl;"),
        (["sft", "--optim.clip=1", "lr=2"], "write optim.clip=1;"),
        (["--config", "sft", "--learning_rate", "1e-4"], "learning_rate is lr here; write lr=1e-4"),
        (["sft", "--bf16", "--lr", "3"], "write dtype=bfloat16 .*; .* write lr=3;"),
        (["sft", "--data", "f", "--lr", "3"], "--data f --lr 3: .* write data=f lr=3;"),
        (["dpo", "--loss_type", "ipo"], "--loss_type ipo: loss_type is loss here; write loss=ipo;"),
        (["sft", "--dry_run"], "write --dry-run;"),
    ],
)
def test_an_option_of_another_tool_is_an_error_that_says_what_to_write(monkeypatch, capsys, argv, message):
    code, out, err = call(monkeypatch, capsys, "train", *argv)
    assert code == 2 and not out and err.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(err)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect_data", "--limit", "1"], "unrecognized argument --limit; near: .*data.invalid_limit"),
        (["train", "sft", "--limit=1"], "unrecognized argument --limit; near: .*data.invalid_limit"),
        (["train", "dpo", "--bet", "2"], "unrecognized argument --bet; near: beta"),
        (["train", "sft", "--bacth", "2"], "unrecognized argument --bacth; near: batch"),
        (["inspect_data", "--max_length", "3"], "write max_length=3;"),
        (["train", "sft", "--eval_every", "3"], "write loop.eval_every=3;"),
    ],
)
def test_only_options_that_are_settings_are_written_as_settings(monkeypatch, capsys, argv, message):
    code, out, err = call(monkeypatch, capsys, *argv)
    assert code == 2 and not out and err.count("\n") == 1 and re.search(message, err)
    assert "limit=1" not in err and "bet=2" not in err


def test_an_option_that_a_command_lacks_is_answered_with_the_nearest(monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "generate", "--prompt", "a", "--max-nwe", "3")
    assert code == 2 and "--max-nwe; near: --max-new" in err


@pytest.mark.parametrize("name", ["lora.yml", "qlora.yaml", "args.json"])
def test_a_file_of_settings_is_not_run_as_a_recipe(monkeypatch, capsys, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("adapter: lora\n")
    code, out, err = call(monkeypatch, capsys, "train", name)
    assert code == 1 and not out and re.search(rf"convert(\.py)? {name}`", err) and err.count("\n") == 1
    code, out, err = call(monkeypatch, capsys, "train", name, "--lr", "1e-4")
    assert code == 2 and re.search(rf"convert(\.py)? {name}`", err) and err.count("\n") == 1


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_file_of_rows_is_not_run_as_a_recipe(monkeypatch, capsys, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text('[{"text": "a"}]')
    code, out, err = call(monkeypatch, capsys, "train", name)
    assert code == 1 and not out and f"name a recipe first, such as `sft data={name}`" in err


def test_advice_knows_a_setting_of_the_same_name():
    assert advice("max_length", "5") is None
    assert advice("beta", "1", "sft").startswith("beta is a setting of recipes such as dpo")
    assert options_as_settings(["sft", "lr=1"], ["--help"]) is None
