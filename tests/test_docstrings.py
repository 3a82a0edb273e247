"""Examples in docstrings run and print what they show."""

import ast
import doctest
import importlib
import inspect
import operator
import re
import textwrap
from pathlib import Path

import pytest

from jaxft.annotations import FUNCTION_TABLES

REPO = Path(__file__).parents[1]
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
    for path in REPO.glob("jaxft/**/*.py")
    if ">>> " in path.read_text()
)
LOAD_WEIGHTS = ("jaxft.train.python_api",)  # of SmolLM2-135M, and compile it
# What READMEs, recipes and notebooks call: each has an example in its docstring.
ENTRY_POINTS = [  # module:name
    "jaxft.annotations:check_bounds",
    "jaxft.data.pairs:PairRows",
    "jaxft.data.sft:Rows",
    "jaxft.engine.session:generate",
    "jaxft.lab.studies.study:Study",
    "jaxft.nn.adapters.lora:attach",
    "jaxft.nn.adapters.lora_specs:adapter_specs",
    "jaxft.nn.param_spec:ParamSpec",
    "jaxft.nn.param_spec:init_params",
    "jaxft.nn.param_spec:kernel",
    "jaxft.nn.quant:quantize",
    "jaxft.objectives.decision:decision",
    "jaxft.objectives.objective:Objective",
    "jaxft.objectives.policy:policy",
    "jaxft.objectives.preference:preference",
    "jaxft.objectives.reward_model:process_reward",
    "jaxft.objectives.reward_model:reward",
    "jaxft.objectives.sft:sft",
    "jaxft.optim.optimizer:make_optimizer",
    "jaxft.optim.rules:adamw",
    "jaxft.report.statistics:holm",
    "jaxft.report.statistics:paired_difference",
    "jaxft.report.statistics:power",
    "jaxft.rl.advantages:grpo",
    "jaxft.rl.environments.environment:Environment",
    "jaxft.rl.environments.environment:environment_of",
    "jaxft.rl.environments.tools:parse_turn",
    "jaxft.rl.estimators:by_group",
    "jaxft.rl.episodes:rollout",
    "jaxft.rl.rewards:reward_of",
    "jaxft.rl.rollout_source:Rollouts",
    "jaxft.rl.rollout_rules:Rules",
    "jaxft.rl.token_weights:sequence_mean",
    "jaxft.runs.trackers:Tracker",
    "jaxft.train:__call__",
    "jaxft.train.programs:abstract",
    "jaxft.train.python_api:evaluate_model",
    "jaxft.train.python_api:load_model",
    "jaxft.train.python_api:prepare_recipe",
    "jaxft.train.recipes:GpuKnobs",
    "jaxft.train.recipes:LoraKnobs",
    "jaxft.train.recipes:RolloutKnobs",
    "jaxft.train.recipes:RowKnobs",
    "jaxft.train.recipes:SftKnobs",
    "jaxft.train.settings:Run",
    "jaxft.nn.tree:mask_by_path",
    "jaxft.nn.tree:partition",
    "jaxft.weights.pretrained:model_for",
    "jaxft.weights.tensors:tensors_of",
]
# Their examples need a run or a model, and are indented code that no test runs.
NEED_A_RUN = [
    "jaxft.engine.session:complete",
    "jaxft.train.export.export:export_model",
    "jaxft.train.python_api:LoadedModel",
    "jaxft.train.python_api:LoadedModel.generate",
    "jaxft.train.python_api:Prepared",
    "jaxft:Result",
]


def object_of(name):
    module, _, member = name.partition(":")
    return operator.attrgetter(member)(importlib.import_module(module))


@pytest.mark.parametrize(
    "module",
    [pytest.param(name, marks=pytest.mark.slow) if name in LOAD_WEIGHTS else name for name in WITH_EXAMPLES],
)
def test_examples_in_docstrings_print_what_they_show(module):
    failed, tried = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert tried and not failed


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_public_entry_point_has_an_example(name):
    assert ">>> " in inspect.getdoc(object_of(name))


@pytest.mark.parametrize("name", NEED_A_RUN)
def test_an_entry_point_that_needs_a_run_has_an_indented_example(name):
    blocks = re.findall(r"(?<=\n\n)(?: {4}.*\n| *\n)+", inspect.getdoc(object_of(name)) + "\n")
    assert ast.parse(textwrap.dedent(blocks[0])).body


def test_a_file_of_functions_with_short_names_has_an_example():
    modules = {name.partition(":")[0] for table in FUNCTION_TABLES.values() for name in table.values()}
    own = [name for name in modules if name.startswith(("jaxft.objectives.", "jaxft.optim."))]
    assert not {*own} - {*WITH_EXAMPLES}
