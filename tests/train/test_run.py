"""Laws of a whole run: stopped and gone on with is uninterrupted, a finished one stays, nothing compiles once it steps."""

import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
from tiny_run import COUNT_COMPILES, SLOW_STEPS, Place, rows, write_place, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_place(folder)
    return Place(folder)


KINDS = {
    "lora": ["dropout=0.3", "micro=2", "loop.log_every=3", "loop.eval_every=2", "steps=5"],
    "full": ["full=true", "lr=0.001", "loop.save_every=2", "general=general.jsonl", "steps=5"],
}


@pytest.fixture(scope="module")
def alone(place):
    """Results of each kind of run, left alone."""
    for kind, argv in KINDS.items():
        assert place.run(*argv, f"name={kind}") == 0, place.err()
    return {kind: place.results(kind, 5) for kind in KINDS}


def same(one, other):
    for what in one:
        assert one[what] == other[what], what


def survives(place, alone, kind, kills, seed):
    """Kill -9 at random moments; the results must be those of a run that was left alone."""
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
    same(alone[kind], place.results(name, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_ends_as_the_one_that_was_left_alone(place, alone, kind):
    survives(place, alone, kind, kills=3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_survives_many_kills(place, alone, kind, seed):
    survives(place, alone, kind, kills=8, seed=seed)


def test_a_signal_saves_and_the_same_command_goes_on(place, alone):
    argv = [*KINDS["lora"], "name=signals", "loop.save_every=100"]
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
    same(alone["lora"], place.results("signals", 5))


def test_a_second_signal_ends_the_process_at_once(place):
    process = place.start("name=twice", hook=SLOW_STEPS.replace("0.3", "60"))
    place.wait_for(process, place.loops)
    os.kill(process.pid, signal.SIGINT)
    place.wait_for(process, lambda: "SIGINT" in place.err())
    begin = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == -signal.SIGTERM and time.monotonic() - begin < 20


def test_before_the_loop_an_interrupt_ends_cleanly(place):
    process = place.start(
        "name=early",
        hook="import jaxft.weights.pretrained, time; jaxft.weights.pretrained.open_params = lambda *_: time.sleep(60)",
    )
    place.wait_for(process, lambda: "devices:" in place.out())
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130 and place.err() == "interrupted\n"


def files(folder):
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_a_finished_run_stays_as_it_is_and_goes_on_with_more_steps(place, alone):
    before = files(place.runs("lora"))
    argv = [*KINDS["lora"], "name=lora"]
    assert place.run(*argv) == 0 and "this run is finished (5 steps)" in place.out() and not place.err()
    assert (
        place.run(*argv[:-2], "steps=3", "name=lora") == 0 and "this run is finished (5 steps)" in place.out()
    )
    assert files(place.runs("lora")) == before
    shutil.copytree(place.runs("lora"), place.runs("longer"))
    for old in (
        "config.json",
        "checkpoints",
    ):  # the name is a setting too: this is the run that was called so
        assert (place.runs("longer") / old).exists()
    assert place.run(*argv[:-2], "steps=7", "name=lora") == 0, place.err()
    assert "loop.steps: 5 -> 7" in place.out()
    shown = place.metrics("lora")
    assert shown[: len(alone["lora"]["metrics"])] == alone["lora"]["metrics"]
    assert [m["step"] for m in shown if "loss" in m] == [3, 5, 6, 7] and place.checkpoints("lora")[-1] == 7
    assert json.loads((place.runs("lora") / "summary.json").read_text())["steps"] == 7
    shutil.rmtree(place.runs("lora"))
    shutil.move(place.runs("longer"), place.runs("lora"))


def test_a_lock_keeps_a_second_launch_out_and_a_dead_process_holds_nothing(place):
    process = place.start("name=half", hook=SLOW_STEPS)
    place.wait_for(process, place.loops)
    second = Place(place.folder, streams="second")
    assert second.run("name=half") == 1
    assert second.err().startswith("error: runs/half: another process is running this run")
    place.wait_for(process, lambda: 2 in place.checkpoints("half"))
    process.kill()
    process.join()

    assert place.run("name=half", "steps=1") == 1  # more steps are done than are wanted
    assert "after step" in place.err() and "loop.steps=1" in place.err()

    cadences = [
        "loop.save_every=3",
        "loop.keep_last=3",
        "loop.log_every=2",
        "samples=1",
        "general=general.jsonl",
    ]
    assert place.run("name=half", *cadences) == 0, place.err()
    for text in ("loop.save_every: 1 -> 3", "samples: 2 -> 1", "general: None -> 'general.jsonl'"):
        assert f"changed since the start: {text}" in place.out()


def test_settings_that_would_make_another_run_are_refused_each_by_name(place, alone):
    write_rows(place.folder / "other.jsonl", rows(30))
    shutil.copytree(place.folder / "base", place.folder / "other", dirs_exist_ok=True)
    argv = [*KINDS["lora"], "name=lora"]
    before = files(place.runs("lora"))
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
    told = place.err()
    wanted = (
        "adapter.dropout: 0.3 -> 0.2",
        "optim.lr: 0.01 -> 0.5",
        "data.batch: 4 -> 8",
        "data.micro: 2 -> 1",
        "seed: 0 -> 3",
    )
    for text in (*wanted, "weights: 'base' -> 'other'", "data.train: 'rows.jsonl' -> 'other.jsonl'"):
        assert text in told
    assert told.count("\n") == 1 and "choose another name=..." in told

    kept = (place.folder / "rows.jsonl").read_text()
    write_rows(place.folder / "rows.jsonl", [*rows(39), {"prompt": "new?", "completion": "yes"}])
    assert place.run(*argv) == 1 and "data_fingerprint" in place.err() and place.err().count("->") == 1
    (place.folder / "rows.jsonl").write_text(kept)

    path = place.folder / "base" / "model.safetensors"
    kept = path.read_bytes()
    path.write_bytes(kept[:-4000] + bytes(a ^ 1 for a in kept[-4000:]))
    assert place.run(*argv) == 1 and "weights_fingerprint" in place.err() and place.err().count("->") == 1
    path.write_bytes(kept)
    assert files(place.runs("lora")) == before


def test_nothing_is_traced_or_compiled_once_the_loop_has_begun(place):
    argv = [
        "name=watch",
        "loop.eval_every=1",
        "general=general.jsonl",
        "micro=2",
        "batch=8",
        "loop.profile=2,3",
    ]
    for steps in (3, 5):  # a fresh run, and one that goes on
        assert place.run(*argv, f"steps={steps}", hook=COUNT_COMPILES, devices=2) == 0, place.err()
        assert "compiled before the loop: True" in place.out() and "compiled since: []" in place.out()
        assert not place.err()
        traces = list(place.runs("watch").rglob("*.xplane.pb"))
        assert len(traces) == 1 and traces[0].stat().st_size > 1000


def test_a_logged_line_is_the_mean_of_its_steps(place):
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


def test_a_run_without_held_out_rows_ends_well(place):
    assert place.run("name=none", "data.held_out=none", "steps=1", "loop.eval_every=1") == 0, place.err()
    assert [m["step"] for m in place.metrics("none")] == [1]
    assert (place.runs("none") / "adapter" / "adapter_model.safetensors").exists()


def test_where_the_end_is_worse_the_best_checkpoint_is_exported_too(place):
    (place.folder / "rising.py").write_text(
        "def rising(lr, end, warmup, steps):\n    return lambda step: lr * 40.0**step\n"
    )
    argv = ["steps=6", "loop.eval_every=1", "lr=1e-4", "optim.schedule=rising.py:rising"]
    assert place.run("name=worse", *argv) == 0, place.err()
    found = {m["step"]: m["eval_loss"] for m in place.metrics("worse") if "eval_loss" in m}
    kept = {step: loss for step, loss in found.items() if 0 < step < 6 and step in place.checkpoints("worse")}
    best = min(kept, key=kept.get)
    assert kept[best] < found[6]
    assert f"step {best} has a better held-out score than the last step" in place.out()
    one, other = (
        place.runs("worse") / part / "adapter_model.safetensors" for part in ("best/adapter", "adapter")
    )
    assert one.read_bytes() != other.read_bytes()
    assert place.run("name=better", "steps=2", "loop.eval_every=1", "lr=1e-3") == 0, place.err()
    assert not (place.runs("better") / "best").exists()
