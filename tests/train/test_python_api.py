"""jaxft from Python: what the command trains, in one process, in a notebook's event loop, with callbacks."""

import asyncio
import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from prepared import finished_run, working_directory
from process_group import ProcessGroup
from tiny_run import rows, write_place, write_rows

import jaxft
from jaxft.data.progress import time_in_words
from jaxft.data.rows.shipped import ROOT
from jaxft.objectives.losses.preference_losses import ipo
from jaxft.report.run_files import read_run
from jaxft.report.sections import effort
from jaxft.rl.rewards import exact
from jaxft.runs.log import Log
from jaxft.runs.settings.config import ObjectText, resolve_config
from jaxft.runs.trackers import Callback
from jaxft.train.python_api import fit_to_rows, resolve_settings, rows_file, setting_text
from jaxft.train.start import open_settings

SETTINGS = {"lr": 0.02, "steps": 3, "optim.clip": 0.5, "loop.eval_every": 2, "samples": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    write_place(folder)
    return folder


@pytest.fixture(scope="module")
def trained(place):
    """A run from Python in a running event loop, as in a notebook, and what its callback was called with."""
    calls = []

    async def cell():
        with working_directory(place):
            callback = lambda step, metrics: calls.append((step, metrics))  # noqa: E731
            return jaxft.train("config.py", rows(), [callback], {"optim.clip": 0.5}, name="api", **settings)

    settings = {name: value for name, value in SETTINGS.items() if name != "optim.clip"}
    return asyncio.run(cell()), calls


def entries(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name != "perf"} for line in lines]


def test_a_run_from_python_has_the_metrics_of_the_command(place, trained):
    result, _ = trained
    write_rows(place / "same.jsonl", rows())
    command = finished_run(place, "config.py", "data=same.jsonl", *(f"{n}={x}" for n, x in SETTINGS.items()))
    assert entries(place / result.folder) == entries(command)
    recorded = json.loads((place / result.folder / "config.json").read_text())["command"]["line"]
    with working_directory(place):  # the same run as a command line
        assert resolve_config(recorded[0], recorded[1:]).value.optim.clip == 0.5


def test_callbacks_get_every_entry_of_the_log_and_the_result_has_them_as_columns(place, trained):
    result, calls = trained
    with working_directory(place):
        assert [step for step, _ in calls] == [0, 1, 2, 2, 3, 3] and "eval_loss" in calls[3][1]
        logged = entries(result.folder)
        assert [{"step": s, **{k: x for k, x in m.items() if "perf/" not in k}} for s, m in calls] == logged
        assert result.metrics["step"].tolist() == [0, 1, 2, 3]
        assert np.isnan(result.metrics["loss"][0]) and np.isnan(result.metrics["eval_loss"][1])
        assert result.metrics["eval_loss"][3] == result.after["eval_loss"] < result.before["eval_loss"]
        assert result.samples[0].keys() == {"prompt", "before", "after", "reference"}
        assert (result.adapter / "adapter_model.safetensors").is_file()


def test_a_finished_run_has_its_time_tokens_and_hardware_in_summary_and_card(place, trained):
    with working_directory(place):
        perf, card = trained[0].summary["perf"], (trained[0].folder / "README.md").read_text()
    seconds = perf["seconds"]
    assert perf["tokens"] == trained[0].metrics["num_tokens"][-1] and perf["hardware"].startswith("1 x cpu (")
    assert {"rows", "loading", "compiling", "training", "evaluation", "sampling", "saving"} <= seconds.keys()
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()), abs=0.01)
    assert f"- Training took {time_in_words(sum(seconds.values()))}" in card
    with working_directory(place):
        facts = effort(read_run("api", trained[0].folder))
    assert (
        facts["time in total"].startswith(time_in_words(sum(seconds.values()))) and facts["tokens"] == "554"
    )
    assert "for 554 tokens on 1 x cpu" in card


def test_a_result_generates_what_it_was_shown_to_complete_and_evaluates_rows(place, trained):
    result, _ = trained
    with working_directory(place):
        sample = result.samples[0]
        completion = result.generate([sample["prompt"]], max_new=4)
        assert completion == [sample["after"].removesuffix(" [...]")]
        held = [row for row in rows() if row["prompt"] == sample["prompt"]]
        scores = jaxft.evaluate(result, held, by=lambda prompt, completion, row: len(prompt), max_new=4)
        assert scores.metrics["<lambda>"] == len(sample["prompt"])
        with pytest.raises(jaxft.Error, match="a LoadedModel in place of a model's name; give the result"):
            jaxft.evaluate(result.loaded, held)
        for call in (result.generate, partial(jaxft.evaluate, result)):
            with pytest.raises(jaxft.Error, match="option max_new_tokens: max_new_tokens is max_new here"):
                call("a", max_new_tokens=4)
        for options, text in (
            ({"seed": 2**70}, r"seed=1180591620717411303424; expected from 0 to 2\^63 - 1"),
            ({"seed": 1.5}, "seed=1.5; expected a whole number"),
            ({"seed": "a"}, "seed='a'; expected a whole number"),
            ({"seed": -1}, "seed=-1; expected from 0"),
            ({"top_k": 3}, "top_k=3 has no effect on greedy completions; remove it, or use temperature=1"),
            ({"min_p": 2, "temperature": 1}, "min_p=2; expected from 0 to 1"),
        ):
            with pytest.raises(jaxft.Error, match=text):
                result.generate(["a"], **options)
        assert len(result.generate(["a"], max_new=2, temperature=1.0, min_p=0.5)) == 1
        with pytest.raises(jaxft.Error, match=r"one conversation, but .* give \[prompts\]"):
            result.generate([{"role": "user", "content": "a"}])


class Recorder:
    """A callback that is an object."""

    def __init__(self):
        self.calls = []

    def log(self, step, metrics, perf):
        self.calls.append((step, metrics, perf))
        return step == 3

    def close(self, end):
        self.calls.append(end)


def test_a_callback_is_a_tracker_and_its_errors_keep_their_cause(tmp_path):
    recorder = Recorder()
    log = Log(tmp_path, 5, quiet=True, trackers=(Callback(recorder),))
    assert [log.step(step, {"loss": 1.5}, {"seconds": 0.5}) for step in (2, 3)] == [False, True]
    log.mark("finished")
    log.close()
    assert recorder.calls == [(step, {"loss": 1.5}, {"seconds": 0.5}) for step in (2, 3)] + ["finished"]

    def fails(step, metrics):
        raise OSError("full")

    with pytest.raises(RuntimeError, match="^a callback raised OSError after step 1: full") as raised:
        Log(tmp_path / "b", 5, quiet=True, trackers=(Callback(fails),)).step(1, {}, {})
    assert isinstance(raised.value.__cause__, OSError)


def test_a_callback_ends_the_run_and_the_same_call_returns_its_result(place, trained):
    with working_directory(place):
        call = partial(jaxft.train, "config.py", rows(), [lambda step, metrics: step == 2], name="ended")
        settings = {**SETTINGS, "steps": 3, "samples": 0}
        ended = call(**settings)
        assert ended.summary["steps"] == 2 and ended.summary["planned"] == 3
        whole = [entry for entry in entries(trained[0].folder) if entry["step"] <= 2]
        assert [e for e in entries(ended.folder) if "loss" in e] == [e for e in whole if "loss" in e]
        before = (ended.folder / "summary.json").read_bytes()
        assert call(**settings).summary == ended.summary
        assert (ended.folder / "summary.json").read_bytes() == before


def test_own_steps_are_the_steps_of_the_run(place, trained):
    with working_directory(place):
        parts = jaxft.prepare("config.py", rows(), **SETTINGS)
        state, metrics = parts.step(parts.state, parts.batch(0))
        loss = float(metrics["loss"].total / metrics["loss"].weight)
        assert loss == pytest.approx(trained[0].metrics["loss"][1], rel=1e-6) and int(state.step) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (True, "true"),
        (np.float32(0.5), "0.5"),
        (1e-5, "1e-05"),
        (("a", "b"), "a,b"),
        (["a,b", "c"], '["a,b", "c"]'),
        ([(1, 2), (3, 4)], "1:2,3:4"),
        ({"prompt": "question"}, "prompt=question"),
        (ipo, "jaxft.objectives.losses.preference_losses:ipo"),
    ],
)
def test_a_python_value_is_written_as_on_the_command_line(value, text):
    found = setting_text(value)
    assert found == text and not isinstance(found, ObjectText)


def recipe(lr: float = 1.0, loss: object = None, several: tuple[str, ...] = ()):
    """A function as a recipe."""
    return resolve_config("sft", ["name=own"]).value


def test_a_recipe_may_be_a_function_and_a_setting_any_object():
    loss = lambda *args: 0.0  # noqa: E731
    resolved = resolve_settings(recipe, None, {"loss": loss, "lr": 2, "several": ["a", "b"]})
    assert resolved.knobs == {"lr": 2.0, "loss": loss, "several": ("a", "b")}
    assert resolved.describe()["command"]["line"] == []  # no command line says this
    resolved = resolve_settings("grpo", None, {"rewards": [loss, "jaxft.rl.rewards:exact"]})
    assert resolved.knobs["rewards"] == (loss, exact)
    record = resolve_settings("dpo", None, {"loss": partial(ipo, beta=0.3)}).describe()
    assert record["command"]["knobs"]["loss"]["args"]["beta"] == 0.3


def test_lengths_follow_from_rows_in_memory_as_from_those_of_a_command(place):
    with working_directory(place):
        found = fit_to_rows(resolve_settings("sft", rows(), {"model": "base"}))
        command = ["model=base", f"data={found.value.data.train}"]
        expected, _ = open_settings.fitted(open_settings.resolve("sft", command))
    assert found.chosen.keys() >= {"max_length", "lr"} and found.describe() == expected.describe()


def test_rows_in_memory_are_a_file_that_is_named_by_their_content(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    given = [{"prompt": "a", "n": np.int64(3)}, {"prompt": "é", "n": np.arange(2)}]
    path = rows_file(given)
    assert rows_file(iter(given)) == path != rows_file(given[:1])
    with open(path, encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == [{"prompt": "a", "n": 3}, {"prompt": "é", "n": [0, 1]}]
    assert len([*(tmp_path / "rows_in_memory").iterdir()]) == 2


WRONG = [
    (dict(recipe="sfft"), "sfft: no recipe has this name"),
    (dict(recipe=3), "a recipe is a name, a Python file or a function, not int"),
    (dict(lr={"a": 1}), "lr=a=1: expected float"),
    (dict(lr=len), "lr=len: expected float"),
    (dict(recipe="dpo", beta=-1), "beta=-1.0; expected above 0"),
    (dict(recipe="dpo", moving=(0.6, 0)), "moving=0.6,0; expected at least 1 as value 2"),
    (dict(rank=0), "rank=0; expected at least 1, or none"),
    (dict(rows=["a"]), "rows[0] is str, not a dict of columns"),
    (dict(rows=[]), "rows is empty; give at least one row"),
    (dict(rows={"train": []}), "rows is dict, not a list of dicts; give one split"),
    (dict(rows=[{"text": "a"}], data="a.jsonl"), "rows and data= are both the training rows"),
    (dict(settings={"lr": 1}, lr=2), "lr is given twice"),
    (dict(callbacks=print), "callbacks=<built-in function print> is not a list of callbacks; write"),
    (dict(dataset=[{"text": "a"}]), "this recipe takes no dataset=; pass the rows as the second argument"),
    (dict(train_dataset=[{"text": "a"}]), "this recipe takes no train_dataset=; pass the rows"),
    (dict(lr=["x" * 3000]), "lr=" + "x" * 196 + " ...: expected float"),
    (dict(callbacks=[3]), "a callback is a function (step, metrics)"),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_call_is_an_error_of_one_line(tmp_path, monkeypatch, call, message):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(jaxft.Error) as raised:
        jaxft.train(**{"recipe": "sft", "model": "none", **call})
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "runs" / "sft" / "metrics.jsonl").exists()


def test_a_run_that_does_not_exist_is_an_error_with_those_that_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(jaxft.Error, match=r"runs/mien: no such folder in .*; near: runs/mine$"):
        jaxft.load("runs/mien")


def test_importing_jaxft_imports_neither_jax_nor_any_other_part():
    code = (
        "import sys, jaxft; assert {'train', 'load', 'evaluate'} <= {*dir(jaxft)}; "
        "print([m for m in sys.modules if m.startswith('jax')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['jaxft']"


CALLBACK = """
from jaxft.runs.trackers import Callback
from jaxft.train import loop
run = loop.run
callbacks = [Callback(lambda step, metrics: step == 2)]
loop.run = lambda *args, **more: run(*args, callbacks=callbacks, **more)
"""


@pytest.mark.slow
def test_a_callback_ends_all_processes_after_the_same_step(tmp_path):
    """It is called on the first process alone, whose vote the others learn of with the next step."""
    write_place(tmp_path)
    two = ProcessGroup(tmp_path)
    assert two.run("steps=6", "name=two", "mesh.data=-1", hook=CALLBACK) == [0, 0], two.output()
    assert json.loads((tmp_path / "runs/two/summary.json").read_text())["steps"] == 3
    assert "ended after step 3 of 6 by a callback" in two.first.out()
