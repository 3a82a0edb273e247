"""Multi-process runs: equal to one process, and correct through kills, stalls and signals."""

import json
import os
import random
import re
import shutil
import signal
import time

import dpo_place
import numpy as np
import pytest
import rl_workdir
import tiny_run
from process_group import ProcessGroup, free_port
from tiny_run import Place, rows, write_place, write_rows

pytestmark = pytest.mark.alone

PRECISE = "import jax\njax.config.update('jax_enable_x64', True)\n"
# Writes hashes of every batch, in full and by local shard, to the file $BATCHES.
BATCHES = """
import hashlib, os
import jax, numpy as np
from jaxft.distributed import sharding
shard_batch = sharding.shard_batch
def recording(mesh, batch):
    sharded = shard_batch(mesh, batch)
    full = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in jax.tree.leaves(batch)))
    shards = {}
    for x in jax.tree.leaves(sharded):
        # by start index, because several devices may store the same shard
        local = {tuple(i.start or 0 for i in shard.index[1:]): shard.data for shard in x.addressable_shards}
        for (row, *time), data in local.items():
            key = ":".join(map(str, (row, *time[:1]))) if any(time) else str(row)
            shards.setdefault(key, hashlib.sha256()).update(np.ascontiguousarray(data).tobytes())
    line = [full.hexdigest(), {start: digest.hexdigest() for start, digest in shards.items()}]
    with open(os.environ["BATCHES"] + os.environ.get("JAXFT_PROCESS", ""), "a") as file:
        file.write(__import__("json").dumps(line) + chr(10))
    return sharded
sharding.shard_batch = recording
"""
# Writes the gradients of every step to $GRADIENTS-<step>.npz.
GRADIENTS = """
import os
import jax, numpy as np
from jaxft.train.logs import meter
from jaxft.train import programs, step
make, accumulate = step.make_train_step, step.accumulate_gradients
def make_recording(*args):
    train_step = make(*args)
    def recording(*inputs):
        results = []
        def record(*args):
            results.append(accumulate(*args))
            return results[0]
        step.accumulate_gradients = record
        state, metrics = train_step(*inputs)
        step.accumulate_gradients = accumulate
        return state, {**metrics, "gradients": results[0][0]}
    return recording
programs.make_train_step = make_recording
add = meter.Meter.add
def writing(self, step, batch, metrics):
    leaves = jax.tree_util.tree_leaves_with_path(metrics.pop("gradients"))
    arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves}
    np.savez(os.environ["GRADIENTS"] + os.environ.get("JAXFT_PROCESS", "") + f"-{step}.npz", **arrays)
    return add(self, step, batch, metrics)
meter.Meter.add = writing
"""
SLOW_STEPS = f"""
{PRECISE}
import time
from jaxft.train.logs import meter
add = meter.Meter.add
def slow(self, *args):
    time.sleep(0.4)
    return add(self, *args)
meter.Meter.add = slow
"""


def precise_place(folder, write=write_place, config=tiny_run.CONFIG):
    """Create a working directory for runs in float64, which also need the hook PRECISE."""
    write(folder)
    (folder / "config.py").write_text(config.replace("jnp.float32", "jnp.float64"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = precise_place(tmp_path_factory.mktemp("hosts"))
    write_rows(path / "other.jsonl", rows(39))
    return path


@pytest.fixture(scope="module")
def precise(tmp_path_factory):
    """Working directories for SFT and for DPO."""
    paths = {name: tmp_path_factory.mktemp(f"precise-{name}") for name in ("sft", "dpo")}
    return {
        "sft": precise_place(paths["sft"]),
        "dpo": precise_place(paths["dpo"], dpo_place.write_pair_place, dpo_place.CONFIG),
    }


KINDS = {
    "lora": ("sft", ["quant=int8", "mesh.data=4", "mesh.tensor=2"]),
    "full": ("sft", ["full=true", "lr=0.001", "mesh.data=2", "mesh.fsdp=4"]),
    "dpo": ("dpo", ["mesh.data=8"]),
    "dpo-full": ("dpo", ["full=true", "lr=0.001", "mesh.data=1", "mesh.fsdp=8"]),
    "nf4": ("sft", ["quant=nf4", "quant.block=16", "mesh.data=2", "mesh.fsdp=4"]),
    "dpo-nf4": ("dpo", ["quant=nf4", "quant.block=16", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]),
    "context": (
        "sft",
        ["full=true", "lr=0.001", "mesh.data=1", "mesh.context=8"],
    ),  # the time axis is sharded over both processes
    "slices": ("dpo", ["mesh.slices=2", "mesh.data=1", "mesh.fsdp=4"]),
}
QUICK = ("lora", "dpo")
LOOP_FRAME = r'loop\.py", line \d+ in run'  # in a stack trace: where the main thread waits


def batches(place, name):
    """Return the records of BATCHES: [(hash of the batch, {start index: hash of the shard})] by process."""
    files = sorted(p for p in place.folder.iterdir() if p.name.startswith(f"{name}-batches"))
    return [[json.loads(line) for line in p.read_text().splitlines()] for p in files]


def gradients(place, name):
    """Return the gradients that GRADIENTS wrote: [{path: array}] by step and process."""
    return [
        dict(np.load(p))
        for p in sorted(place.folder.glob(f"{name}-gradients*.npz"), key=lambda p: p.stem.split("-")[::-1])
    ]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
def test_two_processes_train_exactly_like_one_in_float64(precise, kind):
    where, argv = KINDS[kind]
    argv = [*argv, "batch=8", "steps=2", "loop.save_every=100", "samples=0", "micro=1"]
    two, one = ProcessGroup(precise[where]), Place(precise[where])
    hook = PRECISE + BATCHES + GRADIENTS
    files = lambda name: {kind: f"{name}-{kind.lower()}" for kind in ("BATCHES", "GRADIENTS")}  # noqa: E731
    assert two.run(*argv, f"name={kind}-two", hook=hook, **files(f"{kind}-two")) == [0, 0], two.output()
    assert one.run(*argv, f"name={kind}-one", hook=hook, devices=8, **files(f"{kind}-one")) == 0, one.err()
    assert "8 devices on 2 processes (4 each), coordinator 127.0.0.1:" in two.first.out()
    assert two.workdirs[1].err().startswith("process 1 of 2: 4 of 8 devices")

    single, multi = one.metrics(f"{kind}-one"), one.metrics(f"{kind}-two")
    assert [m["step"] for m in single] == [m["step"] for m in multi]
    for a, b in zip(single, multi, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & {"loss", "eval_loss", "grad_norm", "logps/chosen", "rewards/margins"}:
            assert b[name] == pytest.approx(a[name], rel=1e-10, abs=1e-10), (a["step"], name)

    single, multi = gradients(one, f"{kind}-one"), gradients(two.first, f"{kind}-two")
    assert (len(single), len(multi)) == (2, 4)
    for expected, *results in zip(single, multi[::2], multi[1::2], strict=True):
        largest = max(np.abs(g).max() for g in expected.values())
        assert largest > 1e-3
        for result in results:
            assert result.keys() == expected.keys()
            for path, g in expected.items():
                assert g.dtype == np.float64
                assert np.abs(result[path] - g).max() <= 1e-10 * largest, path

    # batches are bit-equal, and each process transfers only its own rows
    (single,), multi = batches(one, f"{kind}-one"), batches(one, f"{kind}-two")
    assert len(multi) == 2 and len(single) > 2
    for (full, shards), *records in zip(single, *multi, strict=True):
        assert [record[0] for record in records] == [full] * 2
        assert all(shards[start] == digest for _, local in records for start, digest in local.items())
    if "mesh.data=8" in argv:
        rows_of = [sorted(map(int, local)) for _, local in (records[-1] for records in multi)]
        assert rows_of == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.slow
def test_two_processes_run_ppo_exactly_like_one_in_float64(tmp_path):
    """PPO with greedy sampling, a critic and a reward function, which runs on process 0 only."""
    precise_place(tmp_path, rl_workdir.write_workdir, rl_workdir.CONFIG)
    two, one = ProcessGroup(tmp_path), Place(tmp_path)
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
    assert two.run(*argv, "name=two", hook=PRECISE) == [0, 0], two.output()
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
    "hosts.heartbeat_seconds=30",  # time limit for noticing a lost process
]


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """Results of an uninterrupted run of two processes."""
    two = ProcessGroup(folder)
    assert two.run(*TRAINED, "name=uninterrupted", hook=PRECISE) == [0, 0], two.output()
    return two.first.results("uninterrupted", STEPS)


def after_a_step(two, name, rng):
    """Wait for the checkpoint of a random step, and for a random time after it."""
    step = rng.randrange(1, 3) + max(two.first.checkpoints(name), default=0)
    two.wait_for(lambda: max(two.first.checkpoints(name), default=0) >= step)
    time.sleep(rng.choice([0, 0.05, 0.3]))


def ends(two, other, seconds):
    """Check that a process exits within `seconds` with an error and a last line that says what to do."""
    begin = time.monotonic()
    two.processes[other].join(seconds + 5)
    took, code = time.monotonic() - begin, two.processes[other].exitcode
    assert code in (75, -signal.SIGABRT) and took < seconds, f"{code} {took} {two.output()}"
    line = two.last_line(other)
    assert line.startswith(f"process {other} of 2"), line
    assert line.endswith("to resume from the newest checkpoint"), line
    return line


def kill(two, victim, rng):
    """Start or resume the run `killed`, and kill a process after a random step."""
    two.start(*TRAINED, "name=killed", hook=SLOW_STEPS)
    after_a_step(two, "killed", rng)
    two.processes[victim].kill()
    ends(two, 1 - victim, 90)
    two.codes()


@pytest.fixture(scope="module")
def copied(folder, tmp_path_factory):
    """A copy of the working directory after process 1 of the run `killed` was killed."""
    made = tmp_path_factory.mktemp("copied")
    kill(ProcessGroup(folder), 1, random.Random(5))
    shutil.copytree(folder / "runs" / "killed", made / "runs" / "killed")
    for name in ("base", "rows.jsonl", "general.jsonl", "config.py"):
        (made / name).symlink_to(folder / name)
    return made


def test_kills_and_signals_do_not_change_the_results(folder, uninterrupted, copied):
    two, argv = ProcessGroup(folder), [*TRAINED, "name=killed"]
    kill(two, 0, random.Random(6))

    before = two.first.checkpoints("killed")
    two.start(*argv, "loop.save_every=100", hook=SLOW_STEPS)
    two.wait_for(two.first.loops)
    os.kill(two.processes[1].pid, signal.SIGTERM)
    assert two.codes() == [143, 143], two.output()
    lines = two.workdirs[1].err().splitlines()
    last = [line for line in lines if line and not re.match(r"[IWE]\d{4} ", line)][-1]  # gRPC has its own log
    assert last.endswith("SIGTERM: finishing this step and saving; a second signal stops at once")
    saved = two.first.checkpoints("killed")[-1]
    assert saved not in before and f"stopped by SIGTERM after step {saved}, saved" in two.first.out()

    assert two.run(*argv, hook=PRECISE) == [0, 0], two.output()
    results = two.first.results("killed", STEPS)
    for name in uninterrupted:
        assert results[name] == uninterrupted[name], name


def test_run_resumes_with_another_number_of_processes(copied, uninterrupted):
    one = Place(copied)
    assert one.run(*TRAINED, "name=killed", hook=PRECISE, devices=8) == 0, one.err()
    assert "resuming after step" in one.out()
    resumed, expected = one.metrics("killed"), uninterrupted["metrics"]
    assert [m["step"] for m in resumed] == [m["step"] for m in expected]
    for a, b in zip(resumed, expected, strict=True):
        assert a.get("num_tokens") == b.get("num_tokens") and a.get("epoch") == b.get("epoch")
        for key in a.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert a[key] == pytest.approx(b[key], rel=1e-10), (a["step"], key)


@pytest.mark.quick_cases("hosts.heartbeat*")
@pytest.mark.parametrize(
    ("limit", "text"),
    [
        ("hosts.step_seconds=12", "no progress for"),
        ("hosts.heartbeat_seconds=10", "no heartbeat for 10 s"),
    ],
)
def test_stalled_process_ends_the_other_within_the_time_limit(folder, limit, text):
    two = ProcessGroup(folder)
    name = limit.split("=")[0].rpartition(".")[2]
    two.start(*COMMON, "epochs=90", "steps=60", f"name={name}", limit, hook=SLOW_STEPS)
    two.wait_for(lambda: bool(two.first.checkpoints(name)))
    os.kill(two.processes[1].pid, signal.SIGSTOP)
    try:
        line = ends(two, 0, 60)
    finally:
        two.processes[1].kill()
    two.codes()
    assert text in line
    if "step_seconds" in limit:
        assert two.processes[0].exitcode == 75 and "hosts.step_seconds" in line
        assert re.search(LOOP_FRAME, two.first.err())


@pytest.mark.slow
def test_user_error_ends_all_processes_with_the_same_message(folder, uninterrupted):
    two = ProcessGroup(folder)
    assert two.run(*TRAINED, "name=uninterrupted", hook=PRECISE) == [0, 0], two.output()
    assert f"this run is finished ({STEPS} steps)" in two.first.out() and not two.first.err()
    cases = (
        (["name=uninterrupted", "lr=0.5"], {}, "optim.lr: 0.01 -> 0.5"),
        (
            ["name=wrong"],
            {1: ["data=other.jsonl"]},
            "process 1 of 2 differs from process 0 in settings, rows or libraries",
        ),
    )
    for argv, own, expected in cases:
        assert two.run(*TRAINED, *argv, own=own, hook=PRECISE) == [1, 1], two.output()
        lines = [place.err().strip().splitlines()[-1] for place in two.workdirs]
        assert lines[0] == lines[1] and lines[0].startswith("error: ") and expected in lines[0], lines
    assert not two.first.runs("wrong").exists() or not (two.first.runs("wrong") / "config.json").exists()


@pytest.mark.parametrize(
    ("setting", "actual"),
    [
        ("hosts.processes=3", "but 2 are running; "),
        ("hosts.devices=16", "but there are 8 (4 on process 0, 4 on process 1); "),
    ],
)
def test_wrong_count_is_the_only_message_of_each_process(folder, setting, actual):
    two = ProcessGroup(folder)
    assert two.run("name=counts", setting) == [1, 1], two.output()
    for place in two.workdirs:
        lines = [line for line in place.err().strip().splitlines() if "4 of 8 devices" not in line]
        assert len(lines) == 1 and lines[0].startswith(f"error: {setting}, {actual}"), lines
    assert not two.first.runs("counts").exists()


JOINS = """
import jax
join = jax.distributed.initialize
def printing(*args, **settings):
    print("joins", flush=True)
    join(*args, **settings)
jax.distributed.initialize = printing
"""


def start_without_peer(folder, process, *argv):
    """Start one of two processes without the other: (its Place, the process, the coordinator's address)."""
    one, coordinator = Place(folder, f"waits{process}"), f"127.0.0.1:{free_port()}"
    environment = {"JAXFT_COORDINATOR": coordinator, "JAXFT_PROCESSES": "2", "JAXFT_PROCESS": str(process)}
    return one, one.start("name=waits", *argv, hook=JOINS, devices=4, **environment), coordinator


@pytest.mark.quick_cases("0")
@pytest.mark.parametrize("started", [0, 1])
def test_missing_process_is_reported_within_the_time_limit(folder, started):
    one, process, coordinator = start_without_peer(folder, started, "hosts.start_seconds=4")
    one.wait_for(process, lambda: "joins" in one.out())
    begin = time.monotonic()
    process.join(60)
    assert process.exitcode == 75 and 2 < time.monotonic() - begin < 30, one.err()
    (line,) = one.err().strip().splitlines()  # no stack trace of JAX
    assert line.startswith(
        f"process {started} of 2: not all 2 processes reached the coordinator {coordinator} (explicit) "
    )


def test_process_killed_while_joining_has_a_last_line(folder):
    one, process, _ = start_without_peer(folder, 0)
    one.wait_for(process, lambda: "joins" in one.out())
    time.sleep(0.5)
    process.kill()
    process.join()
    until = time.monotonic() + 10
    while not one.err() and time.monotonic() < until:
        time.sleep(0.05)
    assert one.err().startswith("process 0 of 2 was killed while it joined the others"), one.err()


HANGS = f"""
{PRECISE}
import threading
from jaxft.train.logs import meter
meter.Meter.add = lambda *_: threading.Event().wait()
"""


@pytest.mark.slow
def test_stalled_single_process_run_ends_with_stack_traces(folder):
    one = Place(folder)
    begin = time.monotonic()
    assert one.run("name=hangs", "hosts.step_seconds=3", "samples=0", hook=HANGS) == 75
    assert time.monotonic() - begin < 300
    *stacks, line = one.err().strip().splitlines()
    assert line.startswith("the run: no progress for 3 s in step 1 (limit 3 s: hosts.step_seconds)")
    assert any(re.search(LOOP_FRAME, text) for text in stacks)
