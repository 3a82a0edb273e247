"""Laws of a full run: signals, kills, finished runs, locks, changes, compilation, logs, exports."""

import functools
import hashlib
import html
import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
from prepared import resume
from tiny_run import COUNT_COMPILES, SLOW_STEPS, Place, rows, write_place, write_rows

from jaxft.report import document
from jaxft.report.document import report_page
from jaxft.report.run_files import read_run
from jaxft.report.sections import parameter_count


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_place(folder)
    return Place(folder)


KINDS = {
    "small_lora": ["dropout=0.3", "micro=2", "loop.log_every=3", "loop.eval_every=2", "steps=5"],
    "full": ["full=true", "lr=0.001", "loop.save_every=2", "general=general.jsonl", "steps=5"],
}


@pytest.fixture(scope="module")
def uninterrupted(place):
    """A function that returns the results of an uninterrupted run of a kind."""

    @functools.cache
    def results(kind):
        assert place.run(*KINDS[kind], f"name={kind}") == 0, place.err()
        return place.results(kind, 5)

    return results


def assert_same(one, other):
    for part in one:
        assert one[part] == other[part], part


def kill_and_finish(place, kind, kills, seed):
    """Kill a run with SIGKILL at random moments, then finish it; return its results."""
    name, rng = f"{kind}-{seed}", random.Random(seed)
    for _ in range(kills):
        process = place.start(*KINDS[kind], f"name={name}")
        step = rng.randrange(1, 6)
        moments = [
            lambda: True,  # right after the start
            (place.runs(name) / "checkpoints" / f"{step}.tmp").exists,  # while it saves
            (place.runs(name) / "metrics.jsonl").exists,
            lambda: bool(place.checkpoints(name)),
            (place.runs(name) / "checkpoints" / str(step)).exists,
        ]
        place.wait_for(process, rng.choice(moments))
        time.sleep(rng.choice([0, 0.01, 0.05, 0.3]))
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0), place.err()
    assert place.run(*KINDS[kind], f"name={name}") == 0, place.err()
    return place.results(name, 5)


def test_a_run_killed_at_random_moments_has_the_results_of_an_uninterrupted_one(place, uninterrupted):
    """Also while a checkpoint is written; tests/train/test_resume.py has every kind of state."""
    assert_same(uninterrupted("small_lora"), kill_and_finish(place, "small_lora", kills=2, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_eight_times_has_the_results_of_an_uninterrupted_one(place, uninterrupted, kind, seed):
    assert_same(uninterrupted(kind), kill_and_finish(place, kind, kills=8, seed=seed))


@pytest.mark.slow
def test_sigterm_and_sigint_save_and_the_same_command_resumes(place, uninterrupted):
    argv = [*KINDS["small_lora"], "name=signals", "loop.save_every=100"]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        before = place.checkpoints("signals")
        process = place.start(*argv, hook=SLOW_STEPS)
        place.wait_for(process, place.loops)
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == code, place.err()
        name, saved = signal.Signals(number).name, place.checkpoints("signals")
        assert saved[-1] not in before and f"stopped by {name} after step {saved[-1]}, saved" in place.out()
        assert place.err().strip() == f"{name}: finishing this step and saving; a second signal stops at once"
    assert place.run(*argv) == 0, place.err()
    assert_same(uninterrupted("small_lora"), place.results("signals", 5))


def test_a_second_signal_ends_the_process_at_once(place):
    process = place.start("name=twice", hook=SLOW_STEPS.replace("0.3", "60"))
    place.wait_for(process, place.loops)
    os.kill(process.pid, signal.SIGINT)
    place.wait_for(process, lambda: "SIGINT" in place.err())
    begin = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == -signal.SIGTERM and time.monotonic() - begin < 20


def test_sigint_before_the_loop_is_one_line_and_exit_code_130(place):
    """Also where a script has started the run in the background, which ignores SIGINT."""
    hook = (
        "import jaxft.train.loop as loop, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "loop.compile_run = lambda *args: print('compiling', flush=True) or time.sleep(60)"
    )
    process = place.start("name=early", hook=hook)
    place.wait_for(process, lambda: "compiling" in place.out())
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130 and place.err() == "interrupted\n"


def files(folder):
    """Modification time and content of every file."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_a_finished_run_is_not_changed_unless_steps_are_added(place, uninterrupted):
    finished = uninterrupted("small_lora")
    before = files(place.runs("small_lora"))
    written = {
        p.relative_to(place.runs("small_lora")).as_posix(): p
        for p in place.runs("small_lora").rglob("adapter/*")
    }
    recorded = json.loads((place.runs("small_lora") / "summary.json").read_text())["files"]
    hashes = {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in written.items()}
    assert recorded == {name: known for name, known in hashes.items() if not name.endswith(".md")}
    argv = [*KINDS["small_lora"], "name=small_lora"]
    assert place.run(*argv) == 0 and "this run is finished (5 steps)" in place.out() and not place.err()
    assert (
        place.run(*argv[:-2], "steps=3", "name=small_lora") == 0
        and "this run is finished (5 steps)" in place.out()
    )
    assert files(place.runs("small_lora")) == before
    shutil.copytree(place.runs("small_lora"), place.runs("longer"))
    for old in ("config.json", "checkpoints"):
        assert (place.runs("longer") / old).exists()
    assert place.run(*argv[:-2], "steps=7", "name=small_lora") == 0, place.err()
    assert "loop.steps: 5 -> 7" in place.out()
    logged = place.metrics("small_lora")
    assert logged[: len(finished["metrics"])] == finished["metrics"]
    assert [m["step"] for m in logged if "loss" in m] == [3, 5, 6, 7] and place.checkpoints("small_lora")[
        -1
    ] == 7
    assert json.loads((place.runs("small_lora") / "summary.json").read_text())["steps"] == 7
    shutil.rmtree(place.runs("small_lora"))
    shutil.move(place.runs("longer"), place.runs("small_lora"))


@pytest.mark.slow
def test_a_running_run_is_locked_and_a_killed_process_releases_the_lock(place):
    process = place.start("name=half", hook=SLOW_STEPS)
    place.wait_for(process, place.loops)
    second = Place(place.folder, streams="second")
    assert second.run("name=half") == 1
    assert second.err().startswith("error: runs/half: another process is running this run")
    place.wait_for(process, lambda: 2 in place.checkpoints("half"))
    process.kill()
    process.join()

    assert place.run("name=half", "steps=1") == 1  # fewer steps than are done
    assert "2 steps are done already, but loop.steps=1" in place.err()

    cadences = [
        "loop.save_every=3",
        "loop.keep_last=3",
        "loop.log_every=2",
        "samples=1",
        "general=general.jsonl",
    ]
    assert place.run("name=half", *cadences, NVIDIA_TF32_OVERRIDE="0") == 0, place.err()
    assert "changed since the last start: NVIDIA_TF32_OVERRIDE: none -> 0" in place.out()
    starts = json.loads((place.runs("half") / "env.json").read_text())
    assert [start["step"] for start in starts["earlier"]] == [0] and starts["step"] >= 2
    for text in ("loop.save_every: 1 -> 3", "samples: 2 -> 1", "general: None -> 'general.jsonl'"):
        assert f"changed since the start: {text}" in place.out()


def test_changed_settings_data_or_weights_are_refused_by_name(place, uninterrupted):
    uninterrupted("small_lora")
    write_rows(place.folder / "other.jsonl", rows(30))
    shutil.copytree(place.folder / "base", place.folder / "other", dirs_exist_ok=True)
    argv = [*KINDS["small_lora"], "name=small_lora"]
    before = files(place.runs("small_lora"))
    changed = [a for a in argv if not a.startswith(("micro", "dropout"))]
    assert (
        place.run(
            *changed,
            "micro=1",
            "dropout=0.2",
            "lr=0.5",
            "batch=8",
            "seed=3",
            "data=other.jsonl",
            "model=other",
        )
        == 1
    )
    line = place.err()
    changes = (
        "adapter.dropout: 0.3 -> 0.2",
        "optim.lr: 0.01 -> 0.5",
        "data.batch: 4 -> 8",
        "data.micro: 2 -> 1",
        "seed: 0 -> 3",
    )
    for text in (*changes, "weights: 'base' -> 'other'", "data.train: 'rows.jsonl' -> 'other.jsonl'"):
        assert text in line
    assert line.count("\n") == 1 and "choose another name=..." in line and "fingerprint" not in line

    stored = (place.folder / "rows.jsonl").read_text()
    write_rows(place.folder / "rows.jsonl", [*rows(39), {"prompt": "new?", "completion": "yes"}])
    with pytest.raises(
        ValueError, match="run: the rows of data=rows.jsonl, .*, have changed since the run started. Restore"
    ):
        resume(place.folder, *argv)
    (place.folder / "rows.jsonl").write_text(stored)

    path = place.folder / "base" / "model.safetensors"
    stored = path.read_bytes()
    path.write_bytes(stored[:-4000] + bytes(a ^ 1 for a in stored[-4000:]))
    with pytest.raises(
        ValueError, match="run: the files of model=base have changed since the run started. Restore"
    ):
        resume(place.folder, *argv)
    path.write_bytes(stored)
    assert files(place.runs("small_lora")) == before


def test_nothing_is_traced_or_compiled_after_the_loop_begins(place):
    argv = [
        "name=watch",
        "loop.eval_every=1",
        "general=general.jsonl",
        "micro=2",
        "batch=8",
        "loop.profile=2,3",
    ]
    for steps in (3, 5):  # a new run, and a resumed one
        assert place.run(*argv, f"steps={steps}", hook=COUNT_COMPILES, devices=2) == 0, place.err()
        assert "compiled before the loop: True" in place.out() and "compiled since: []" in place.out()
        assert not place.err()
        traces = list(place.runs("watch").rglob("*.xplane.pb"))
        assert len(traces) == 1 and traces[0].stat().st_size > 1000


@pytest.mark.slow
def test_a_log_line_is_the_mean_over_its_steps(place):
    for every in (1, 3):
        assert (
            place.run(f"name=every{every}", f"loop.log_every={every}", "steps=6", "loop.save_every=100") == 0
        ), place.err()
    ones = [m for m in place.metrics("every1") if "loss" in m]
    threes = [m for m in place.metrics("every3") if "loss" in m]
    assert [m["step"] for m in threes] == [3, 6]
    for i, mean in enumerate(threes):
        part = ones[3 * i : 3 * i + 3]
        for name in ("loss", "grad_norm"):
            assert mean[name] == pytest.approx(np.mean([m[name] for m in part]), rel=1e-6)
        for name in ("learning_rate", "num_tokens", "epoch"):
            assert mean[name] == part[-1][name]


@pytest.mark.slow
def test_a_run_without_held_out_rows_finishes(place):
    assert place.run("name=none", "data.held_out=none", "steps=1", "loop.eval_every=1") == 0, place.err()
    assert [m["step"] for m in place.metrics("none")] == [1]
    assert (place.runs("none") / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_best_checkpoint_is_also_exported_if_it_is_better_than_the_last(place):
    (place.folder / "rising.py").write_text(
        "def rising(lr, end, warmup, steps):\n    return lambda step: lr * 40.0**step\n"
    )
    argv = ["steps=6", "loop.eval_every=1", "lr=1e-4", "optim.schedule=rising.py:rising"]
    assert place.run("name=worse", *argv) == 0, place.err()
    found = {m["step"]: m["eval_loss"] for m in place.metrics("worse") if "eval_loss" in m}
    saved = place.checkpoints("worse")
    stored = {step: loss for step, loss in found.items() if 0 < step < 6 and step in saved}
    best = min(stored, key=stored.get)
    assert stored[best] < found[6]
    assert f"step {best} has a better held-out score than the last step" in place.out()
    one, other = (
        place.runs("worse") / part / "adapter_model.safetensors" for part in ("best/adapter", "adapter")
    )
    assert one.read_bytes() != other.read_bytes()
    assert place.run("name=better", "steps=2", "loop.eval_every=1", "lr=1e-3") == 0, place.err()
    assert not (place.runs("better") / "best").exists()


@pytest.mark.slow
def test_patience_ends_a_run_after_evaluations_without_a_better_score(place):
    # called with the row's own response, before training, and after steps 1 (-1), 2 (0), 3 (-1) and 4 (-2)
    (place.folder / "peak.py").write_text(
        "calls = 0\n\n\ndef peak(prompt, completion, row):\n"
        "    global calls\n    calls += 1\n    return -abs(calls - 4)\n"
    )
    argv = ["name=patient", "steps=9", "loop.eval_every=1", "loop.eval_scores=true", "loop.patience=2"]
    argv += ["loop.best_metric=eval_scores/peak", "scoring.by=peak.py:peak", "scoring.prompts=1"]
    argv += ["loop.log_every=3"]
    assert place.run(*argv) == 0, place.err()
    scores = {m["step"]: m["eval_scores/peak"] for m in place.metrics("patient")[:-1] if "eval_loss" in m}
    assert [scores[step] for step in range(5)] == [-2, -1, 0, -1, -2]
    assert "ended after step 4 of 9: 2 evaluations without" in place.out() and "step 4/4" in place.out()
    assert [m["step"] for m in place.metrics("patient") if "loss" in m] == [3, 4]  # step 4 is logged too
    folder = place.runs("patient")
    assert json.loads((folder / "summary.json").read_text())["steps"] == 4
    assert "step 2 has a better held-out score" in place.out() and (folder / "best" / "adapter").is_dir()
    assert place.run(*argv) == 0, place.err()  # it does not train on
    assert "this run is finished (4 steps)" in place.out() and "compiled in" not in place.out()
    assert "to continue it, raise loop.patience" in place.out()
    assert max(m["step"] for m in place.metrics("patient")) == 4
    assert place.run(*argv, "loop.greater_is_better=false") == 1 and "loop.greater_is_better" in place.err()
    argv[4] = "loop.patience=none"
    assert place.run(*argv) == 0, place.err()
    assert max(m["step"] for m in place.metrics("patient")) == 9


def test_a_full_run_starts_from_an_adapter_with_the_loss_that_it_ended_with(place, uninterrupted):
    uninterrupted("small_lora")
    assert place.run("full=true", "start=runs/small_lora", "steps=1", "lr=0.001", "name=after") == 0, (
        place.err()
    )
    ended, begun = (
        json.loads((place.runs(name) / "summary.json").read_text()) for name in ("small_lora", "after")
    )
    base = ended["before"]["metrics"]["eval_loss"]
    assert abs(ended["after"]["metrics"]["eval_loss"] - base) > 1e-2
    assert abs(begun["before"]["metrics"]["eval_loss"] - ended["after"]["metrics"]["eval_loss"]) < 1e-4


@pytest.mark.slow
def test_the_folders_of_weights_have_cards_and_portable_tokenizers(place, uninterrupted):
    for kind, folder, library in (("small_lora", "adapter", "peft"), ("full", "model", "transformers")):
        uninterrupted(kind)
        weights = place.runs(kind) / folder
        run_card, card = (
            path.read_text() for path in (place.runs(kind) / "README.md", weights / "README.md")
        )
        metadata = card.split("---\n")[1]
        assert f"library_name: {library}\n" in metadata and "pipeline_tag: text-generation\n" in metadata
        assert run_card.split("---\n")[1] == metadata and "license: unknown\n" in metadata
        config = json.loads((weights / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_run_leaves_pictures_and_what_its_report_shows(place, uninterrupted, monkeypatch):
    uninterrupted("small_lora")
    folder = place.runs("small_lora")
    card = (folder / "README.md").read_text()
    for picture in ("curves.png", "training.png"):
        assert f"]({picture})" in card and (folder / picture).is_file()
    record = read_run("small_lora", folder)
    trained = sum(parameter_count(row) for row in record.parameters if row["trained"])
    assert f"{trained:,} of " in card
    (example, *_), statistics = record.data["examples"], record.data["statistics"]
    texts = ["".join(text for text, _ in part["pieces"]) for part in example["parts"]]
    assert (
        "what is " in texts[0] and statistics["examples"] == 36 and example["name"].startswith("rows.jsonl:")
    )
    monkeypatch.setattr(document, "packed_plotly", lambda: "")
    page = report_page([record], "a run")
    for part in (f"{trained:,} of ", example["name"], record.before[0]["completion"], "float32", "optim.lr"):
        assert html.escape(part) in page, part
