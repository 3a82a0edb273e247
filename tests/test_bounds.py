"""Bounds of settings: what an annotation declares is checked, shown, and the same for every section."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import numpy as np
import pytest
from scripts_in_process import call

from jaxft.annotations import (
    ABOVE_ZERO,
    ABOVE_ZERO_TO_ONE,
    BELOW_ONE,
    INSIDE_ZERO_AND_ONE,
    ZERO_TO_ONE,
    Bounds,
    FiniteFloat,
    Fraction,
    PositiveFloat,
    PositiveInt,
    QuantKind,
    above,
    at_least,
    between,
    check_bounds,
    count_from,
    one_of,
)
from jaxft.data.pairs import PairRows
from jaxft.data.prompts import Prompts
from jaxft.distributed.processes import Hosts
from jaxft.distributed.sharding import MeshShape
from jaxft.engine.sampling import Sampling
from jaxft.lab.worlds import World
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.quant import Quant
from jaxft.nn.quant_formats import FORMATS
from jaxft.optim.optimizer import Optim
from jaxft.rl.rewards import exact
from jaxft.rl.rollout_rules import Rules
from jaxft.runs.settings.config import load_config
from jaxft.runs.settings.setting_values import describe_kind
from jaxft.serve.served_models import ServeFlags
from jaxft.serve.server import ServerLimits
from jaxft.train.evaluate.evaluate_models import EvaluatedModels
from jaxft.train.export.calibrate import Calibration
from jaxft.train.settings import Loop
from jaxft.weights.edit.new_adapters import Combination


@pytest.mark.parametrize(
    ("bounds", "text", "inside", "outside"),
    [
        (at_least(1), "at least 1", (1, 7), (0, -1, float("inf"), float("nan"))),
        (above(0), "above 0", (1e-9, 3), (0, -1, float("inf"))),
        (count_from(1), "at least 1", (1, 2**31 - 1), (0, 2**31)),
        (ABOVE_ZERO, "above 0", (0.1, 2**31 - 1), (0, 2.0**31)),
        (between(2, 4), "from 2 to 4", (2, 4), (1.9, 4.1)),
        (ZERO_TO_ONE, "from 0 to 1", (0, 1), (-0.1, 1.1)),
        (BELOW_ONE, "at least 0 and below 1", (0, 0.9), (1, -0.1)),
        (ABOVE_ZERO_TO_ONE, "above 0 and at most 1", (0.1, 1), (0, 1.1)),
        (INSIDE_ZERO_AND_ONE, "above 0 and below 1", (0.5,), (0, 1)),
        (Bounds(1, also=-1), "-1, or at least 1", (-1, 1, 7), (0, -2, float("inf"))),
    ],
)
def test_bounds_contain_what_their_text_says(bounds, text, inside, outside):
    assert str(bounds) == text
    assert all(map(bounds.contain, inside)) and not any(map(bounds.contain, outside))


@dataclass(frozen=True)
class Section:
    rank: Annotated[int, at_least(1)] = 4
    rate: Annotated[float | None, ZERO_TO_ONE] = None
    every: Annotated[int | float, above(0), "save_every"] = 1
    pair: tuple[Fraction, PositiveInt] | None = None
    weights: tuple[FiniteFloat, ...] = ()
    kind: Literal["a", "b"] | None = "a"
    full: bool | None = None

    def __post_init__(self) -> None:
        check_bounds(self, "section")


def test_a_section_refuses_numbers_out_of_bounds_and_takes_none():
    assert Section(rate=None).rank == 4
    with pytest.raises(ValueError, match=r"^section.rank=0; expected at least 1$"):
        Section(0)
    with pytest.raises(ValueError, match=r"^section.rate=1.5; expected from 0 to 1, or none$"):
        Section(rate=1.5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank", True, "section.rank=True; expected a whole number at least 1"),
        ("rank", 1.5, "section.rank=1.5; expected a whole number at least 1"),
        ("rank", None, "section.rank=None; expected a whole number at least 1"),
        ("rate", "x", "section.rate='x'; expected a number from 0 to 1, or none"),
        ("rate", math.nan, "section.rate=nan; expected a finite number from 0 to 1, or none"),
        ("every", "x", "section.save_every='x'; expected a number above 0"),
        ("pair", (0.5, 0), "section.pair=0.5,0; expected at least 1 as value 2"),
        ("pair", (0.5,), "section.pair=0.5; expected 2 values"),
        ("weights", (1, math.inf), "section.weights=1,inf; expected a finite number as value 2"),
        ("kind", "c", "section.kind='c'; use one of a, b, none"),
        ("full", 1, "section.full=1; use one of true, false, none"),
        ("full", "x", "section.full='x'; use one of true, false, none"),
    ],
)
def test_a_section_refuses_values_of_other_types_and_other_choices(field, value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Section(**{field: value})


def test_numbers_that_are_no_python_numbers_are_not_checked():
    assert Section(rank=np.int64(3), every=np.float32(0.5), rate=1, kind=None).rank == 3


@pytest.mark.parametrize(
    ("section", "name"),
    [
        (Loop, "steps"),
        (Loop, "save_every"),
        (Hosts, "stop_seconds"),
        (Sampling, "top_k"),
        (Adapter, "rank"),
    ],
)
def test_numbers_that_32_bits_do_not_hold_are_refused(section, name):
    with pytest.raises(ValueError, match=rf"{name}=2147483648; expected .*at most 2\^31 - 1"):
        section(**{name: 2**31})
    assert getattr(section(**{name: 2**31 - 1}), name) == 2**31 - 1


def test_the_type_of_a_setting_is_shown_with_its_bounds():
    assert describe_kind(Annotated[int, at_least(1)]) == "int, at least 1"
    assert describe_kind(Annotated[float | None, ZERO_TO_ONE]) == "float or none, from 0 to 1"
    assert describe_kind(Fraction | None) == "float or none, from 0 to 1"
    assert describe_kind(tuple[Fraction, int]) == "a list a,b of float (from 0 to 1) and int"
    assert describe_kind(Annotated[str | None, one_of((None, "gold"))]) == "one of none, gold"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeshShape(data=0), "mesh.data=0; expected -1, or at least 1"),
        (lambda: MeshShape(-2), "mesh.data=-2; expected -1, or at least 1"),
        (lambda: MeshShape(tensor=2.5), "mesh.tensor=2.5; expected a whole number"),
        (lambda: MeshShape(fsdp=-1), "mesh.data and mesh.fsdp are -1"),
        (lambda: EvaluatedModels(batch=0), "batch=0; expected at least 1"),
        (lambda: PairRows("rows", batch=10**12), "data.batch=1000000000000; expected at most 2^31 - 1"),
        (lambda: Quant(block=2**40), "quant.block=1099511627776; expected at most 2^31 - 1, or none"),
        (lambda: Prompts("rows", decode_rows=-5), "data.decode_rows=-5; expected at least 1, or none"),
        (lambda: Rules((exact,), reward_weights=(math.inf,)), "reward_weights=inf; expected a finite number"),
        (lambda: Calibration("rows.jsonl", tokens=-5, max_length=-9), "tokens=-5; expected at least 1"),
        (lambda: Calibration("rows.jsonl", invalid_limit=7), "invalid_limit=7; expected from 0 to 1"),
        (lambda: Calibration("rows.jsonl", invalid="skip"), "invalid='skip'; use one of few, error, drop"),
        (lambda: ServerLimits(body=-1), "body=-1; expected at least 1"),
        (lambda: ServeFlags(prompt=0), "--max-prompt=0; expected at least 1, or none"),
        (lambda: World(length_bias=math.nan), "world.length_bias=nan; expected a finite number"),
        (lambda: Sampling(temperature=1e-5), "temperature=1e-05; expected 0, or at least 0.0001"),
        (lambda: Optim(lr=1e-40), "optim.lr=1e-40; expected 0, or from 1.2e-38"),
        (lambda: Optim(lr_groups=(("q", -1.0),)), "optim.lr_groups=q:-1.0; expected at least 0"),
        (lambda: Adapter(rank_pattern=(("q", 0),)), "_pattern=q:0; expected at least 1 as value 2 in q:0"),
        (lambda: Sampling(temperature=math.nan), "temperature=nan; expected a finite number: 0, or at least"),
        (lambda: Combination("ties", (1.0,), density=0.0), "--density=0.0; expected above 0 and at most 1"),
        (lambda: Combination("cat", (1.0,), rank=2), "--rank 2 needs --method svd"),
    ],
)
def test_settings_refuse_nonsense_from_python(make, message):
    with pytest.raises(ValueError, match=f"^.*{re.escape(message)}"):
        make()


def test_a_recipe_s_default_is_inside_its_own_bounds():
    def config(beta: PositiveFloat = -1.0):
        return Sampling(temperature=beta)

    with pytest.raises(ValueError, match=r"config: the default beta=-1.0; expected above 0$"):
        load_config(config, [])
    assert load_config(config, ["beta=0.5"]).temperature == 0.5


@pytest.mark.parametrize("override", ["sampling.top_p=0", "sampling.temperature=1e-5", "mesh.data=0"])
def test_an_error_has_the_dotted_name_of_the_setting(override):
    with pytest.raises(ValueError, match=f"^{override.partition('=')[0]}=.*; expected "):
        load_config("sft", [override])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("evaluate --run x --samples 3000000000", "--samples: expected at most 2^31 - 1, got 3000000000"),
        ("serve --queue -1", "--queue: expected at least 0, got -1"),
        ("generate --prompt x --batch many", "--batch: expected a whole number at least 1, got many"),
        ("generate --prompt x --temperature 1e-5", "--temperature: expected 0, or at least 0.0001, got 1e-5"),
        ("evaluate --run x --seed -1", "--seed: expected from 0 to 2^63 - 1, got -1"),
        ("influence dpo --keep 1.5", "--keep: expected above 0 and at most 1, got 1.5"),
        ("influence dpo --through 0", "--through: expected at least 1, got 0"),
        ("plan sft --devices h100:1 --price nan", "--price: expected at least 0, got nan"),
        ("loss_bench --loss dpo --seeds 0", "--seeds: expected at least 1, got 0"),
        ("extract BASE TUNED --out x --rank 0", "--rank: expected at least 1, got 0"),
        ("inspect_data sft --step -1", "--step: expected at least 0, got -1"),
    ],
)
def test_options_of_commands_have_bounds(line, message, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, *line.split())
    assert code == 2 and not out and err.startswith(f"error: argument {message}")


def test_help_of_a_command_shows_the_bounds_of_its_options(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "generate", "--help")
    assert code == 0 and "sampling (default 0), from 0 to 2^63 - 1" in " ".join(out.split())


def test_the_kinds_of_quantisation_are_the_formats():
    assert get_args(QuantKind) == ("none", *FORMATS, "checkpoint")
