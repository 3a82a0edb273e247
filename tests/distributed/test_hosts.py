"""Laws of a run over several real processes: as one process, through kills, stalls and signals."""

import json
import os
import random
import shutil
import signal
import time

import dpo_place
import numpy as np
import pytest
import rl_workdir
import tiny_run
from several import Several, free_port
from tiny_run import Place, rows, write_place, write_rows

pytestmark = pytest.mark.alone

PRECISE = "import jax\njax.config.update('jax_enable_x64', True)\n"
BATCHES = """
import hashlib, os
import jax, numpy as np
from jaxft.distributed import sharding
place = sharding.shard_batch
def told(mesh, batch):
    placed = place(mesh, batch)
    whole = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in jax.tree.leaves(batch))).hexdigest()
    parts = {}
    for x in jax.tree.leaves(placed):
        each = {tuple(cut.start or 0 for cut in shard.index[1:]): shard.data for shard in x.addressable_shards}
        for (row, *time), data in each.items():  # several devices may hold the same part
            key = ":".join(map(str, (row, *time[:1]))) if any(time) else str(row)
            parts.setdefault(key, hashlib.sha256()).update(np.ascontiguousarray(data).tobytes())
    line = [whole, {start: digest.hexdigest() for start, digest in parts.items()}]
    with open(os.environ["BATCHES"] + os.environ.get("JAXFT_PROCESS", ""), "a") as file:
        file.write(__import__("json").dumps(line) + chr(10))
    return placed
sharding.shard_batch = told
"""
GRADIENTS = """
import os
import jax, numpy as np
from jaxft.train import meter, programs, step
make, accumulate = step.make_train_step, step.accumulate_gradients
def make_telling(*args):
    train_step = make(*args)
    def telling(*inputs):
        seen = []
        def kept(*args):
            seen.append(accumulate(*args))
            return seen[0]
        step.accumulate_gradients = kept
        state, found = train_step(*inputs)
        step.accumulate_gradients = accumulate
        return state, {**found, "gradients": seen[0][0]}
    return telling
programs.make_train_step = make_telling
add = meter.Meter.add
def told(self, step, batch, found):
    leaves = jax.tree_util.tree_leaves_with_path(found.pop("gradients"))
    known = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves}
    np.savez(os.environ["GRADIENTS"] + os.environ.get("JAXFT_PROCESS", "") + f"-{step}.npz", **known)
    return add(self, step, batch, found)
meter.Meter.add = told
"""
SLOW_STEPS = f"""
{PRECISE}
import time
from jaxft.train import meter
add = meter.Meter.add
def slow(self, *args):
    time.sleep(0.4)
    return add(self, *args)
meter.Meter.add = slow
"""


def precise_place(folder, write=write_place, config=tiny_run.CONFIG):
    """A working directory of runs in float64, which begin with the hook PRECISE."""
    write(folder)
    (folder / "config.py").write_text(config.replace("jnp.float32", "jnp.float64"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = precise_place(tmp_path_factory.mktemp("hosts"))
    write_rows(made / "other.jsonl", rows(39))
    return made


@pytest.fixture(scope="module")
def precise(tmp_path_factory):
    """Working directories for SFT and for DPO."""
    made = {name: tmp_path_factory.mktemp(f"precise-{name}") for name in ("sft", "dpo")}
    return {
        "sft": precise_place(made["sft"]),
        "dpo": precise_place(made["dpo"], dpo_place.write_pair_place, dpo_place.CONFIG),
    }


KINDS = {
    "lora": ("sft", ["quant=int8", "mesh.data=4", "mesh.tensor=2"]),
    "full": ("sft", ["full=true", "lr=0.001", "mesh.data=2", "mesh.fsdp=4"]),
    "dpo": ("dpo", ["mesh.data=8"]),
    "dpo-full": ("dpo", ["full=true", "lr=0.001", "mesh.data=1", "mesh.fsdp=8"]),
    "nf4": ("sft", ["quant=nf4", "quant.block=16", "mesh.data=2", "mesh.fsdp=4"]),
    "dpo-nf4": ("dpo", ["quant=nf4", "quant.block=16", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]),
    "context": ("sft", ["full=true", "lr=0.001", "mesh.data=1", "mesh.context=8"]),  # a row's time over both
    "slices": ("dpo", ["mesh.slices=2", "mesh.data=1", "mesh.fsdp=4"]),
}
QUICK = ("lora", "full", "dpo")


def batches(place, name):
    """What the processes of a run said of their batches: [(hash of the whole, {first row: hash of the part})] by process."""
    files = sorted(p for p in place.folder.iterdir() if p.name.startswith(f"{name}-batches"))
    return [[json.loads(line) for line in p.read_text().splitlines()] for p in files]


def gradients(place, name):
    """What the processes of a run had as gradients of its steps: [{parameter: array}] by step and process."""
    return [
        dict(np.load(p))
        for p in sorted(place.folder.glob(f"{name}-gradients*.npz"), key=lambda p: p.stem.split("-")[::-1])
    ]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
def test_two_processes_train_as_one_does_in_float64(precise, kind):
    where, argv = KINDS[kind]
    argv = [*argv, "batch=8", "steps=2", "loop.save_every=100", "samples=0", "micro=1"]
    two, one = Several(precise[where]), Place(precise[where])
    hook = PRECISE + BATCHES + GRADIENTS
    told = lambda name: {what: f"{name}-{what.lower()}" for what in ("BATCHES", "GRADIENTS")}  # noqa: E731
    assert two.run(*argv, f"name={kind}-two", hook=hook, **told(f"{kind}-two")) == [0, 0], two.told()
    assert one.run(*argv, f"name={kind}-one", hook=hook, devices=8, **told(f"{kind}-one")) == 0, one.err()
    assert "8 devices on 2 processes (4 each), coordinator 127.0.0.1:" in two.first.out()
    assert two.places[1].err().startswith("process 1 of 2: 4 of 8 devices")

    alone, together = one.metrics(f"{kind}-one"), one.metrics(f"{kind}-two")
    assert [m["step"] for m in alone] == [m["step"] for m in together]
    for a, b in zip(alone, together, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & {"loss", "eval_loss", "grad_norm", "logps/chosen", "rewards/margins"}:
            assert b[name] == pytest.approx(a[name], rel=1e-10, abs=1e-10), (a["step"], name)

    alone, together = gradients(one, f"{kind}-one"), gradients(two.first, f"{kind}-two")
    assert (len(alone), len(together)) == (2, 4)
    for known, *found in zip(alone, together[::2], together[1::2], strict=True):
        assert any(np.abs(g).max() > 1e-3 for g in known.values())
        for other in found:
            assert other.keys() == known.keys()
            for path, g in known.items():
                assert g.dtype == np.float64
                assert np.abs(other[path] - g).max() <= 1e-10 * max(
                    np.abs(x).max() for x in known.values()
                ), path

    (whole,), halves = batches(one, f"{kind}-one"), batches(one, f"{kind}-two")
    assert len(halves) == 2 and len(whole) > 2
    for known, *parts in zip(
        whole, *halves, strict=True
    ):  # bit-equal, and no process moves another one's rows
        assert [part[0] for part in parts] == [known[0]] * 2
        assert all(known[1][start] == digest for _, found in parts for start, digest in found.items())
    if "mesh.data=8" in argv:
        assert [sorted(map(int, found)) for _, found in (half[-1] for half in halves)] == [
            [0, 1, 2, 3],
            [4, 5, 6, 7],
        ]


def test_two_processes_draw_and_learn_as_one_does_in_float64(tmp_path):
    """PPO, greedy, with a critic and a function as its reward: process 0 scores, and all learn from the same completions."""
    precise_place(tmp_path, rl_workdir.write_workdir, rl_workdir.CONFIG)
    two, one = Several(tmp_path), Place(tmp_path)
    argv = [
        "steps=4",
        "passes=2",
        "batch=8",
        "group=2",
        "ppo=true",
        "save=2",
        "data.top_k=1",
        "rewards=config.py:ascii",
    ]
    argv += ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "samples=0", "max_new=12"]
    assert two.run(*argv, "name=two", hook=PRECISE) == [0, 0], two.told()
    assert one.run(*argv, "name=one", hook=PRECISE, devices=8) == 0, one.err()
    tables = [(one.runs(name) / "completions.jsonl").read_text() for name in ("one", "two")]
    assert tables[0] == tables[1] and tables[0].count("\n") == 2 * 8
    for a, b in zip(one.metrics("one"), one.metrics("two"), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & {
            "loss",
            "loss/value_avg",
            "grad_norm",
            "objective/kl",
            "eval_reward",
            "reward",
        }:
            assert b[name] == pytest.approx(a[name], rel=1e-8, abs=1e-8), (a["step"], name)


STEPS = 10
COMMON = ["batch=8", "dropout=0.2", "loop.eval_every=2", "samples=0", "mesh.data=2", "mesh.fsdp=4"]
TRAINED = [
    *COMMON,
    "epochs=9",
    f"steps={STEPS}",
    "hosts.heartbeat_seconds=30",
]  # the bound within which a loss is noticed


@pytest.fixture(scope="module")
def alone(folder):
    """A run over two processes that nothing happened to."""
    two = Several(folder)
    assert two.run(*TRAINED, "name=alone", hook=PRECISE) == [0, 0], two.told()
    return two.first.results("alone", STEPS)


def after_a_step(two, name, rng):
    """Until a checkpoint of a random step is there, and a random moment more."""
    step = rng.randrange(1, 3) + max(two.first.checkpoints(name), default=0)
    two.wait_for(lambda: max(two.first.checkpoints(name), default=0) >= step)
    time.sleep(rng.choice([0, 0.05, 0.3]))


def ends(two, other, seconds):
    """Process `other` must end within so many seconds, with a code that isn't 0 and a line that says what to do."""
    begin = time.monotonic()
    two.processes[other].join(seconds + 5)
    took, code = time.monotonic() - begin, two.processes[other].exitcode
    assert code in (75, -signal.SIGABRT) and took < seconds, (code, took, two.told())
    line = two.last_line(other)
    assert line.startswith(f"process {other} of 2") and line.endswith(
        "it goes on from the newest checkpoint"
    ), line
    return line


def kill(two, victim, rng):
    """Begin the run `killed`, or go on with it, and kill a process after a random step."""
    two.start(*TRAINED, "name=killed", hook=SLOW_STEPS)
    after_a_step(two, "killed", rng)
    two.processes[victim].kill()
    ends(two, 1 - victim, 90)
    two.codes()


@pytest.fixture(scope="module")
def elsewhere(folder, tmp_path_factory):
    """Another working directory, with what the run `killed` has left there when process 1 was killed."""
    made = tmp_path_factory.mktemp("elsewhere")
    kill(Several(folder), 1, random.Random(5))
    shutil.copytree(folder / "runs" / "killed", made / "runs" / "killed")
    for name in ("base", "rows.jsonl", "general.jsonl", "config.py"):
        (made / name).symlink_to(folder / name)
    return made


def test_kills_of_either_process_and_a_signal_to_one_change_nothing(folder, alone, elsewhere):
    two, argv = Several(folder), [*TRAINED, "name=killed"]
    kill(two, 0, random.Random(6))

    before = two.first.checkpoints("killed")
    two.start(*argv, "loop.save_every=100", hook=SLOW_STEPS)
    two.wait_for(two.first.loops)
    os.kill(two.processes[1].pid, signal.SIGTERM)
    assert two.codes() == [143, 143], two.told()
    assert (
        two.places[1]
        .err()
        .strip()
        .endswith("SIGTERM: finishing this step and saving; a second signal stops at once")
    )
    saved = two.first.checkpoints("killed")[-1]
    assert saved not in before and f"stopped by SIGTERM after step {saved}, saved" in two.first.out()

    assert two.run(*argv, hook=PRECISE) == [0, 0], two.told()
    found = two.first.results("killed", STEPS)
    for what in alone:
        assert found[what] == alone[what], what


def test_the_run_goes_on_with_another_number_of_processes(elsewhere, alone):
    one = Place(elsewhere)
    assert one.run(*TRAINED, "name=killed", hook=PRECISE, devices=8) == 0, one.err()
    assert "resuming after step" in one.out()
    found = one.metrics("killed")
    assert [m["step"] for m in found] == [m["step"] for m in alone["metrics"]]
    for a, b in zip(found, alone["metrics"], strict=True):
        assert a.get("num_tokens") == b.get("num_tokens") and a.get("epoch") == b.get("epoch")
        for key in a.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert a[key] == pytest.approx(b[key], rel=1e-10), (a["step"], key)


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        ("hosts.step_seconds=12", "nothing moved for"),
        ("hosts.heartbeat_seconds=10", "no sign of life for 10 s"),
    ],
)
def test_where_one_process_stalls_the_other_ends_within_the_bound(folder, bound, said):
    two = Several(folder)
    name = bound.split("=")[0].rpartition(".")[2]
    two.start(*COMMON, "epochs=90", "steps=60", f"name={name}", bound, hook=SLOW_STEPS)
    two.wait_for(lambda: bool(two.first.checkpoints(name)))
    os.kill(two.processes[1].pid, signal.SIGSTOP)
    try:
        line = ends(two, 0, 60)
    finally:
        two.processes[1].kill()
    two.codes()
    assert said in line
    if "step_seconds" in bound:
        assert two.processes[0].exitcode == 75 and "hosts.step_seconds" in line
        assert 'File "' in two.first.err() and "in _go" in two.first.err()  # where it waits


@pytest.mark.slow
def test_a_refusal_ends_all_processes_with_the_same_line(folder, alone):
    two = Several(folder)
    assert two.run(*TRAINED, "name=alone", hook=PRECISE) == [0, 0], two.told()
    assert f"this run is finished ({STEPS} steps)" in two.first.out() and not two.first.err()
    cases = (
        (["name=alone", "lr=0.5"], {}, "optim.lr: 0.01 -> 0.5"),
        (
            ["name=wrong"],
            {1: ["data=other.jsonl"]},
            "process 1 of 2 has other settings, rows or libraries than process 0",
        ),
    )
    for argv, own, wanted in cases:
        assert two.run(*TRAINED, *argv, own=own, hook=PRECISE) == [1, 1], two.told()
        lines = [place.err().strip().splitlines()[-1] for place in two.places]
        assert lines[0] == lines[1] and lines[0].startswith("error: ") and wanted in lines[0], lines
    assert not two.first.runs("wrong").exists() or not (two.first.runs("wrong") / "config.json").exists()


@pytest.mark.parametrize(
    ("claim", "found"),
    [("hosts.processes=3", "found 2; "), ("hosts.devices=16", "found 8 (4 on process 0, 4 on process 1); ")],
)
def test_a_claim_that_is_not_met_is_all_that_each_process_says(folder, claim, found):
    two = Several(folder)
    assert two.run("name=claims", claim) == [1, 1], two.told()
    for place in two.places:
        said = [line for line in place.err().strip().splitlines() if "4 of 8 devices" not in line]
        assert len(said) == 1 and said[0].startswith(f"error: {claim}, {found}"), said
    assert not two.first.runs("claims").exists()


JOINS = """
import jax
join = jax.distributed.initialize
def told(*args, **known):
    print("joins", flush=True)
    join(*args, **known)
jax.distributed.initialize = told
"""


def begin_alone(folder, me, *argv):
    """Process `me` of two, of which the other one never comes: (where it is, the process, the coordinator)."""
    one, coordinator = Place(folder, f"waits{me}"), f"127.0.0.1:{free_port()}"
    environment = {"JAXFT_COORDINATOR": coordinator, "JAXFT_PROCESSES": "2", "JAXFT_PROCESS": str(me)}
    return one, one.start("name=waits", *argv, hook=JOINS, devices=4, **environment), coordinator


@pytest.mark.parametrize("there", [0, 1])
def test_a_process_that_never_comes_is_told_of_within_the_bound(folder, there):
    one, process, coordinator = begin_alone(folder, there, "hosts.start_seconds=4")
    one.wait_for(process, lambda: "joins" in one.out())
    begin = time.monotonic()
    process.join(60)
    assert process.exitcode == 75 and 2 < time.monotonic() - begin < 30, one.err()
    (line,) = one.err().strip().splitlines()  # and no stack of jax's
    assert line.startswith(
        f"process {there} of 2: the coordinator {coordinator} (explicit) was not reached by all 2 within 4 s"
    )


def test_a_process_killed_while_it_waits_for_the_others_has_a_last_line(folder):
    one, process, _ = begin_alone(folder, 0)
    one.wait_for(process, lambda: "joins" in one.out())
    time.sleep(0.5)
    process.kill()
    process.join()
    until = time.monotonic() + 10
    while not one.err() and time.monotonic() < until:
        time.sleep(0.05)
    assert one.err().startswith("process 0 of 2 was ended from outside while it joined the others"), one.err()


HANGS = f"""
{PRECISE}
import threading
from jaxft.train import meter
meter.Meter.add = lambda *_: threading.Event().wait()
"""


@pytest.mark.slow
def test_a_run_of_one_process_that_hangs_is_ended_with_its_stacks(folder):
    one = Place(folder)
    begin = time.monotonic()
    assert one.run("name=hangs", "hosts.step_seconds=3", "samples=0", hook=HANGS) == 75
    assert time.monotonic() - begin < 300
    *stacks, line = one.err().strip().splitlines()
    assert line.startswith("the run: nothing moved for 3 s in step 1 (bound 3 s: hosts.step_seconds)")
    assert any("in _go" in text for text in stacks)
