"""Whole sweeps: each member equals its separate run; non-finite members, resuming, user errors."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from dpo_place import CONFIG, write_pair_place
from prepared import working_directory
from safetensors.numpy import load_file
from scripts_in_process import call
from tiny_run import CONFIG as SFT_CONFIG
from tiny_run import COUNT_COMPILES, Place, write_rows

from jaxft.runs.settings.config import load_config
from jaxft.train.sweep import reason_to_separate, with_one_split

KNOBS = (
    ("loss=loss,", "loss=partial(loss, beta=beta),"),
    ("Adapter(rank=4)", "Adapter(rank=rank, alpha=8.0)"),
)
GENERAL = "general.jsonl"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_pair_place(folder)
    text = CONFIG.replace("seed: int = 0,", "seed: int = 0, rank: int = 4,", 1)
    for old, new in KNOBS:
        assert old in text
        text = text.replace(old, new)
    (folder / "config.py").write_text(text.replace("samples=0,", f'samples=0, general="{GENERAL}",'))
    (folder / "sft.py").write_text(
        SFT_CONFIG.replace(
            "Adapter(rank=4",
            "Adapter(rank=rank, alpha=8.0, modules_to_save=('norm',), trainable_token_indices=(32, 7)",
        ).replace("*, ", "", 1)
    )
    (folder / "sft.py").write_text(
        (folder / "sft.py").read_text().replace("seed: int = 0,", "seed: int = 0, rank: int = 4,", 1)
    )
    write_rows(
        folder / "held.jsonl",
        [{"prompt": f"{i} six?", "chosen": "yes two", "rejected": "no one"} for i in range(30, 36)],
    )
    write_rows(
        folder / "held_rows.jsonl",
        [{"prompt": f"what is {i}?", "completion": f"it is {i}"} for i in range(60, 66)],
    )
    return Place(folder)


def sweep(place, *argv, code=0, **options):
    assert place.run(*argv, script="sweep.py", JAXFT_CACHE=str(place.folder / "cache"), **options) == code, (
        place.err()
    )
    return place.out()


def alone(place, *argv):
    assert place.run(*argv, JAXFT_CACHE=str(place.folder / "cache")) == 0, place.err()


def assert_same_run(place, member, other):
    """Check the metrics of every step and the final adapter, in float32: sums differ in the last digits."""
    found, expected = place.metrics(member), place.metrics(other)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, two in zip(found, expected, strict=True):
        chance = (
            ("accurac", "correlation", "label_noise") if one["step"] <= 1 else ()
        )  # signs of rounding errors
        assert one.keys() == two.keys()
        for name, value in two.items():
            if not any(word in name for word in chance):
                assert one[name] == pytest.approx(value, rel=2e-3, abs=2e-4), (member, one["step"], name)
    mine, theirs = (
        load_file(place.runs(name) / "adapter" / "adapter_model.safetensors") for name in (member, other)
    )
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].shape == value.shape
        np.testing.assert_allclose(
            mine[name], value, atol=2e-3 * max(1e-3, float(np.abs(value).max())), err_msg=name
        )


SWEEPS = {
    "knobs": (["steps=4", "loop.eval_every=2", "lr=0.002"], ["beta=0.1,0.5", "rank=2,5"]),
    "seeds": (["steps=4", "held_out=held.jsonl", "lr=0.002", "micro=2"], ["seed=0,3"]),
    "coupled": (
        ["loss=jaxft.objectives.losses.reference_free_losses:bco", "steps=3", "loop.eval_every=1", "micro=2"],
        ["lr=0.001,0.002"],
    ),
    "precomputed": (["reference=precomputed", "steps=3"], ["beta=0.1,0.3"]),
    "moving": (["reference=moving", "steps=5"], ["lr=0.001,0.003", "beta=0.1,0.2"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SWEEPS)
def test_each_member_equals_its_separate_run(place, kind):
    settings, over = SWEEPS[kind]
    flags = ["--at-once", "2"] if kind == "moving" else []
    out = sweep(place, *settings, *[x for knob in over for x in ("--over", knob)], "--name", kind, *flags)
    members = list(json.loads((place.runs(kind) / "config.json").read_text())["members"])
    count = 1
    for knob in over:
        count *= len(knob.split(","))
    assert len(members) == count and all(member in out for member in members)
    for number in (0, count - 1):
        alone(place, *settings, *members[number].split(","), f"name={kind}-{number}")
        assert_same_run(place, f"{kind}/{members[number]}", f"{kind}-{number}")
    table = json.loads((place.runs(kind) / "summary.json").read_text())["members"]
    own = json.loads((place.runs(f"{kind}-0") / "summary.json").read_text())["after"]["metrics"]
    assert table[members[0]]["held-out loss"] == pytest.approx(own["eval_loss"], rel=2e-3)
    assert table[members[0]]["general loss"] == pytest.approx(own["general_loss"], rel=2e-3)


@pytest.mark.slow
def test_supervised_members_of_different_seeds_and_ranks_equal_their_separate_runs(place):
    settings = ["data.held_out=held_rows.jsonl", "lr=0.003", "steps=3", "samples=0"]
    with_config = lambda *argv: ["--config", "sft.py", *argv]  # noqa: E731  # overrides the config of `place`
    sweep(
        place,
        *with_config(*settings, "--over", "seed=0,1", "--over", "rank=2,4", "--together", "--name", "sft"),
    )
    for number, member in enumerate(("seed=0,rank=2", "seed=1,rank=4")):
        alone(place, *with_config(*settings, *member.split(","), f"name=sft-{number}"))
        assert_same_run(place, f"sft/{member}", f"sft-{number}")


@pytest.mark.slow
def test_a_non_finite_member_is_frozen_and_reported_and_the_others_continue(place):
    argv = ["steps=5", "--over", "lr=0.002,1e30", "--name", "wild"]
    sweep(place, *argv, code=1)
    for lr, exists in (("0.002", True), ("1e30", False)):  # only finished members have weights and a card
        folder = place.runs(f"wild/lr={lr}")
        assert (folder / "adapter").exists() == (folder / "README.md").exists() == exists
    fine, wild = (place.metrics(f"wild/lr={lr}") for lr in ("0.002", "1e30"))
    assert sum(line.get("skipped", 0) for line in wild) >= 1 and not sum(
        line.get("skipped", 0) for line in fine
    )
    text = (place.runs("wild") / "summary.json").read_text()
    table = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["members"]
    assert table["lr=1e30"]["skipped steps"] == sum(
        line.get("skipped", 0) for line in wild
    ) and "| skipped steps |" in "".join((place.runs("wild") / "README.md").read_text().splitlines())
    alarms = json.loads((place.runs("wild/lr=1e30") / "summary.json").read_text())["alarms"]
    assert (
        any(
            "non-finite loss, gradient or update and were skipped." in alarm and "optim.lr" in alarm
            for alarm in alarms
        )
        and "not finite" in place.out()
    )
    assert not any("higher optim.lr" in alarm for alarm in alarms)
    assert any("The run is not finished and its weights are not written" in alarm for alarm in alarms)
    assert "lr=1e30: not finished" in sweep(place, *argv, code=1)
    alone(place, "steps=5", "lr=0.002", "name=tame")
    assert_same_run(place, "wild/lr=0.002", "tame")


@pytest.mark.slow
def test_nothing_compiles_after_the_loop_begins(place):
    for number, more in enumerate(
        (["loss=jaxft.objectives.losses.reference_free_losses:bco"], ["reference=moving"])
    ):
        out = sweep(
            place,
            *more,
            "loop.eval_every=1",
            "--over",
            "lr=0.001,0.002",
            "--name",
            f"watch-{number}",
            hook=COUNT_COMPILES,
        )
        assert "compiled before the loop: True" in out and "compiled since: []" in out


MINE = '''"""Losses to try."""

import jax


def mine(pair, beta=0.3):
    return -jax.nn.log_sigmoid(beta * (pair.chosen.ratio - pair.rejected.ratio))


def weighted(pair):
    loss = mine(pair)
    return pair.columns["hardness"].astype(loss.dtype) * loss


def backwards(pair, beta=0.3):
    return -jax.nn.log_sigmoid(beta * (pair.rejected.ratio - pair.chosen.ratio))
'''


@pytest.mark.slow
def test_the_loss_bench_trains_each_loss_as_a_separate_run_would(place):
    (place.folder / "mine.py").write_text(MINE)

    def bench(*argv):
        cache = str(place.folder / "cache")
        return place.run(*argv, script="loss_bench.py", PICTURES="1", JAXFT_CACHE=cache)

    argv = [
        "--loss",
        "mine.py:mine",
        "--against",
        "kto",
        "ipo",
        "--steps",
        "3",
        "--set",
        "lr=0.002",
        "--out",
        "runs/bench",
    ]
    assert bench(*argv) == 0, place.err()
    out = place.out()
    (folder,) = [p for p in (place.folder / "runs" / "bench").iterdir() if p.is_dir()]
    assert (folder / "curves.png").stat().st_size > 1000 and "margin, nats" in out
    assert {p.name for p in folder.iterdir() if (p / "adapter").is_dir()} == {"mine", "kto", "ipo"}
    alone(
        place,
        "lr=0.002",
        "steps=3",
        "third=mismatched",
        "loop.eval_every=1",
        "beta=0.3",
        "loss=mine.py:mine",
        "name=mine",
    )
    assert_same_run(place, f"bench/{folder.name}/mine", "mine")
    assert (
        bench(*argv) == 0
        and "this sweep is finished (3 steps)" in place.out()
        and "margin, nats" in place.out()
    )
    (place.folder / "mine.py").write_text(MINE + "SOMETHING = 1\n")  # a loss may use anything in its file
    assert bench(*argv) == 0 and "this sweep is finished" not in place.out()
    assert bench("--loss", "mine.py:backwards", "--against") == 1
    assert "FAIL" in place.out() and "nothing is trained" in place.out()
    assert (
        bench(
            "--loss",
            "mine.py:mine",
            "--against",
            "--set",
            "loss=jaxft.objectives.losses.preference_losses:ipo",
        )
        == 1
    )
    assert "--set loss=jaxft.objectives.losses.preference_losses:ipo has no effect" in place.err()
    assert bench("--loss", "mine.py:weighted", "--against", "--steps", "1", "--out", "runs/bench") == 1
    assert "hardness" in place.err() and place.err().count("\n") == 1  # the rows have no such column
    assert bench("--loss", "kto", "--against", "tpo") == 1
    assert "the losses need different third responses (gold, mismatched); run them separately" in place.err()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--over", "beta"], "--over beta: expected knob=a,b,... such as beta=0.05,0.1"),
        (["--over", "beta=0.1,high"], "beta=high"),
        (["--over", "beta=0.1,0.10"], "is listed twice"),
        (["--over", "beta=0.1,0.2", "name=mine"], "the sweep has two names, wrong and mine; give one"),
        (
            ["--over", "beta=0.1,0.2", "--at-once", "3"],
            "2 adapters don't divide into blocks of 3; use one of 1, 2",
        ),
        (["--over", "beta=0.1", "--over", "beta=0.2"], "--over beta is given twice"),
        (["--over", "bata=0.1,0.2"], "unknown key 'bata'; near: data, beta, batch"),
        (
            ["--over", "beta=0.1,0.2", "--over", "lr=1,2,3", "--together"],
            "the knobs have 2 (beta), 3 (lr) values",
        ),
        (
            ["--over", "batch=4,8", "--at-once", "2"],
            "differ in data.batch: 4 -> 8. The members of a sweep may differ only in name, objective",
        ),
        (
            ["--over", "lr=1,2", "--at-once", "2", "adapter.modules_to_save=norm,"],
            "possible only for one adapter at a time; use --at-once 1, got 2",
        ),
        (
            ["--over", "lr=1,2", "--at-once", "2", "adapter.targets=q,embed"],
            "LoRA on the embeddings or the head is possible only for one adapter at a time",
        ),
        (["--over", "beta=0.1,0.2,0.3", "--at-once", "2"], "3 adapters don't divide into blocks of 2"),
    ],
)
def test_an_invalid_sweep_is_one_line(place, refused, argv, message):
    assert message in refused(*argv, "--name", "wrong")


@pytest.fixture
def refused(place, monkeypatch, capsys):
    """A function that runs scripts/sweep.py in this process and returns the one line of its error."""
    monkeypatch.setenv("JAXFT_CACHE", str(place.folder / "cache"))

    def run(*argv):
        with working_directory(place.folder):
            code, _, line = call(monkeypatch, capsys, "sweep", "--config", "config.py", *argv)
        assert code == 1 and line.startswith("error: ") and line.count("\n") == 1, line
        return line

    return run


@pytest.mark.slow
def test_a_sweep_resumes_only_with_the_same_members_and_settings(place, refused):
    sweep(place, "steps=2", "--over", "beta=0.1,0.2", "--name", "same")
    line = refused("steps=4", "--over", "beta=0.1,0.3", "--name", "same")
    assert (
        "this sweep has the members beta=0.1, beta=0.2, not beta=0.1, beta=0.3. Choose another --name" in line
    )
    line = refused("steps=4", "lr=0.5", "--over", "beta=0.1,0.2", "--name", "same")
    assert "these settings differ from the original run: optim.lr: 0.01 -> 0.5" in line
    assert "resuming after step 2" in sweep(place, "steps=4", "--over", "beta=0.1,0.2", "--name", "same")


@pytest.mark.slow
def test_a_sweep_over_functions_and_seeds_holds_out_the_same_rows_and_names_the_best_setting(place):
    module = "jaxft.objectives.losses.preference_losses"
    over = ["--over", f"loss={module}:dpo,{module}:ipo", "--over", "seed=0,3"]
    out = sweep(place, "steps=3", "lr=0.002", *over, "--name", "functions")
    members = json.loads((place.runs("functions") / "config.json").read_text())["members"]
    assert members[1] == f"loss={module}-dpo,seed=3" and "one after the other" not in out
    rows = []
    for member in members:
        lines = (place.runs(f"functions/{member}") / "held_out.jsonl").read_text().splitlines()
        rows.append({json.loads(line)["row"] for line in lines})
    assert rows[0] == rows[1] == rows[2] == rows[3] and len(rows[0]) > 1
    steps = [place.metrics(f"functions/{member}")[2]["loss"] for member in members]
    assert steps[0] != steps[1]  # other batches
    assert "mean ± standard deviation over seeds" in out and f"best of 2: loss={module}-" in out
    alone(place, "steps=3", "lr=0.002", f"loss={module}:ipo", "seed=3", "data.split_seed=0", "name=alone")
    assert_same_run(place, f"functions/{members[3]}", "alone")


@pytest.mark.slow
def test_runs_that_cannot_share_a_program_train_one_after_the_other_into_one_table(place):
    argv = ["steps=2", "--over", "batch=4,8", "--name", "batches"]
    out = sweep(place, *argv)
    assert "2 runs, one after the other: batch=8 and batch=4 differ in data.batch" in out
    table = json.loads((place.runs("batches") / "summary.json").read_text())
    assert set(table["members"]) == {"batch=4", "batch=8"} and table["steps"] == 2 and table["failed"] == []
    assert table["ranking"][0].startswith("best of 2: batch=") and table["ranking"][0] in out
    assert (place.runs("batches") / "curves.png").is_file()
    alone(place, "steps=2", "batch=4", "name=batch-4")
    assert_same_run(place, "batches/batch=4", "batch-4")
    assert sweep(place, *argv).count("this run is finished (2 steps)") == 2
    assert sweep(place, "steps=2", "--over", "batch=4,2", "--name", "batches", code=1) is not None
    assert "this sweep has the members batch=4, batch=8, not batch=4, batch=2" in place.err()


def test_runs_that_cannot_share_a_program_say_why(place):
    base = settings_of(place, "lr=1")
    for changes, reason in (
        (["batch=8"], "differ in data.batch: 4 -> 8"),
        (["epochs=2"], "differ in data.epochs"),
        (["full=true"], "leave out full=true"),
        (["adapter.dropout=0.1"], "adapter.dropout=0.1 is not possible in a sweep"),
        (["loop.steps=5"], "differ in loop.steps"),
        (["seed=1"], "data.held_out=0.2 depends on the seed, and the seeds differ. Set data.split_seed"),
    ):
        other = settings_of(place, "lr=1", *changes)
        assert reason in reason_to_separate(
            {"a": base, "b": other} if "full" not in changes[0] else {"b": other}
        )
    assert reason_to_separate({"a": base, "b": settings_of(place, "lr=2")}) == ""
    seeds = with_one_split({"a": base, "b": settings_of(place, "seed=1")})
    assert reason_to_separate(seeds) == "" and [run.data.seed_of_split for run in seeds.values()] == [0, 0]
    noisy = settings_of(place, "lr=1", "neftune=5", config="sft.py")
    assert "losses are random (Facts.noise, as with neftune)" in reason_to_separate({"a": noisy})
    sampled = SimpleNamespace(data=SimpleNamespace(unit="prompts"))
    assert "samples completions" in reason_to_separate({"a": sampled})


def settings_of(place, *overrides, config="config.py"):
    with working_directory(place.folder):
        return load_config(config, list(overrides))


def test_without_held_out_rows_the_table_has_the_metrics_of_the_last_step(place):
    sweep(place, "held_out=none", "steps=2", "--over", "seed=0,1", "--name", "bare")
    table = json.loads((place.runs("bare") / "summary.json").read_text())["members"]["seed=0"]
    last = [line for line in place.metrics("bare/seed=0") if "loss" in line][-1]
    assert last["step"] == 2 and table == {
        "general loss": place.metrics("bare/seed=0")[-1]["general_loss"], "last step's loss": last["loss"],
        "general loss before": place.metrics("bare/seed=0")[0]["general_loss"],
        "last step's accuracy": last["rewards/accuracies"], "last step's margin": last["rewards/margins"],
    }  # fmt: skip


@pytest.mark.slow
def test_the_loss_bench_shows_what_a_planted_fault_costs(place):
    argv = ["--loss", "ipo", "--against", "dpo", "--steps", "5", "--set", "lr=0.002", "--out", "runs/worlds"]
    world = ["source=configs/data/calculator.jsonl", "pairs=12", "held_out=6", "length_bias=5"]
    cache = str(place.folder / "cache")
    code = place.run(
        *argv, "--world", *world, "--vary", "noise=0.5,0", script="loss_bench.py", JAXFT_CACHE=cache
    )
    assert code == 0, place.err()
    (page,) = (place.runs("worlds")).glob("robustness-*/index.html")
    with (page.parent / "costs.csv").open() as file:
        costs = [row[:2] for row in csv.reader(file)][1:]
    assert costs == [[loss, level] for loss in ("dpo", "ipo") for level in ("noise=0", "noise=0.5")]
    logs = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in place.runs("worlds").glob("ipo-dpo-*/*/metrics.jsonl")
    ]
    name = "eval_scores/true_reward"
    assert len(logs) == 4 and all([e["step"] for e in log if name in e] == [*range(6)] for log in logs)
    assert len({log[0][name] for log in logs}) == 1  # the same model, prompts and truth before training
