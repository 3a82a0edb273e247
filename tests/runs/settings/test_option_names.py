"""Other tools' options: every setting that the table names exists, and takes the values that it gives."""

from collections import defaultdict
from itertools import zip_longest

import pytest

from jaxft.runs.settings.config import resolve_config
from jaxft.runs.settings.option import as_text
from jaxft.runs.settings.option_names import OPTIONS, find_options
from jaxft.weights.edit.extended_model import find_template

NEEDED = {  # overrides that are valid only with another one
    "adapter.init=loftq": "quant=nf4",
    "data.packing=wrapped": "data.too_long=split",
    "reference_quant=": "reference_model=HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "tracking.": "trackers=wandb",
}
LOADS_FILES = (
    "model",
    "start",
    "data",
    "chat_template",
    "add_tokens",
    "add_special_tokens",
    "reference_model",
)


def overrides_of_table():
    """Recipe -> setting -> the overrides that the table gives for it."""
    found = defaultdict(lambda: defaultdict(set))
    for option in OPTIONS:
        examples = () if option.example is None else (option.example,)
        for value in (*option.values, *examples):
            for override in option.overrides(value):
                found[option.recipe][override.partition("=")[0]].add(override)
    return found


def test_every_setting_of_the_table_takes_the_values_that_the_table_gives():
    for recipe, by_setting in overrides_of_table().items():
        rows = [sorted(values) for setting, values in by_setting.items() if setting not in LOADS_FILES]
        for overrides in zip_longest(*rows):
            check([override for override in overrides if override], recipe)


def check(overrides, recipe):
    """Resolve the overrides together, or one by one if they contradict each other."""
    try:
        resolve_config(recipe, overrides)
    except ValueError as error:
        assert "unknown key" not in str(error), error
        for override in overrides:
            needed = [other for start, other in NEEDED.items() if override.startswith(start)]
            resolve_config(recipe, [override, *needed])


def test_chat_templates_of_the_table_exist():
    for override in overrides_of_table()["sft"]["chat_template"]:
        name = override.partition("=")[2]
        assert "messages" in find_template(name).source, name


def test_settings_that_depend_on_other_options_exist():
    named = {(option.recipe, option.setting) for option in OPTIONS if option.kind == "together"}
    for recipe, setting in named - {(recipe, None) for recipe, _ in named} - {("sft", "model")}:
        try:
            resolve_config(recipe, [f"{setting}=?"])
        except ValueError as error:
            assert "unknown key" not in str(error), (recipe, setting)


def test_a_row_for_every_option_says_what_to_do():
    for option in OPTIONS:
        assert option.tools and option.name == option.name.lower()
        assert option.setting or len(option.note) > 10, option.name
        assert "\n" not in option.describe() and len(option.describe()) < 250
    assert len({option.name for option in OPTIONS}) > 500


def test_names_are_found_without_regard_to_case_and_dashes():
    (found,) = find_options("--Learning-Rate")
    assert found.describe() == "learning_rate is lr here: lr=0.0001"
    assert find_options("no_such_option") == ()


def test_a_name_may_mean_different_things_by_tool_and_recipe():
    assert [o.setting for o in find_options("r", "PEFT")] == ["rank"] and not find_options("r", "Axolotl")
    (sft,), (dpo,) = (find_options("loss_type", "TRL", recipe) for recipe in ("sft", "dpo"))
    assert sft.overrides("dft") == ("dft=true",)
    assert dpo.overrides("ipo") == ("loss=ipo",)
    with pytest.raises(ValueError, match="loss_type=xyz has no equivalent"):
        dpo.overrides("xyz")


def test_schedules_end_where_theirs_do():
    (option,) = find_options("lr_scheduler_type", "LLaMA-Factory")
    assert option.overrides("cosine") == ("optim.schedule=cosine", "optim.end=0")


def test_values_are_written_as_on_the_command_line():
    assert as_text([True, None, 1e-4, {"q_proj": 8}]) == "true,none,0.0001,q_proj:8"
    assert as_text(["a,b", "c"]) == '["a,b", "c"]'
