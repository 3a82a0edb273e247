"""Checkpoints of several processes: sharded, verified by all, and without a hang where one fails."""

import os
import re
import shutil
import subprocess
import time

import jax
import numpy as np
import pytest
import sharded_state
from processes import printed_values, start

from jaxft.runs.checkpoint import Checkpoints

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints of steps 1 and 2, saved by two processes with four devices each, of a state that was
    donated at once.
    """
    folder = tmp_path_factory.mktemp("two")
    assert (
        printed_values(start(SAVE, 2, 4, folder))
        == [[{"steps": [1, 2], "best": [1, 0.5], "largest": 2 * 6 * 4 * 4}]] * 2
    )
    return folder


SAVE = """
from pathlib import Path
import numpy as np
import sharded_state as s
from jaxft.runs import manifest
from jaxft.runs.checkpoint import Checkpoints
hashed, largest = manifest.hash_array, []
def noting(array):
    largest.append(array.nbytes)
    return hashed(array)
manifest.hash_array = noting
overwrite = jax.jit(lambda x: jax.tree.map(lambda a: a * 0, x), donate_argnums=0)
saved = Checkpoints(Path(sys.argv[4]), keep_best=1)
for step, score in ((1, 0.5), (2, 1.0)):
    state = s.state(step, 2, 4)
    saved.save(step, state, {"step": step}, [score])
    jax.block_until_ready(overwrite(state))
saved.close()
print_value({"steps": saved.steps(), "best": saved.best(), "largest": max(largest)})
"""

RESTORE = """
from pathlib import Path
import sharded_state as s
from jaxft.runs.checkpoint import Checkpoints
saved = Checkpoints(Path(sys.argv[4]), report=lambda line: print_value(line))
shape = tuple(map(int, sys.argv[5].split("x")))
found, meta, step = saved.restore(s.like(*shape))
print_value({"step": step, "meta": meta, "wrong": s.differs(found, step, *shape)})
"""


def test_what_two_processes_saved_comes_back_on_one_and_on_other_meshes(two):
    if jax.device_count() < 8:
        pytest.skip("needs 8 simulated devices")
    for shape in ((8, 1), (1, 8), (2, 4), (2, 2, 2)):
        found, meta, step = Checkpoints(two, report=pytest.fail).restore(sharded_state.like(*shape))
        assert step == 2 and meta == {"step": 2}
        assert sharded_state.differs(found, 2, *shape) == []
    alone = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), sharded_state.values(0))
    found, _, _ = Checkpoints(two, report=pytest.fail).restore(alone)
    expected = sharded_state.values(2)
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(found)] == [
        x.tobytes() for x in jax.tree.leaves(expected)
    ]


def test_what_one_process_saved_comes_back_on_four(tmp_path):
    if jax.device_count() < 8:
        pytest.skip("needs 8 simulated devices")
    saved = Checkpoints(tmp_path)
    saved.save(3, sharded_state.state(3, 4, 2), {"a": 1})
    saved.close()
    assert (
        printed_values(start(RESTORE, 4, 2, tmp_path, "2x4"))
        == [[{"step": 3, "meta": {"a": 1}, "wrong": []}]] * 4
    )


def files_of(folder, pattern):
    return [p for p in sorted(folder.rglob(pattern)) if p.is_file()]


@pytest.mark.quick_cases("2x4")
@pytest.mark.parametrize("shape", ["2x4", "4x2"])
def test_a_flipped_bit_in_any_process_s_files_sends_all_back(two, tmp_path, shape):
    """On the mesh of the save and on another; the file is one of process 1, and process 0 checks half of the
    files.
    """
    folder = shutil.copytree(two, tmp_path / "c")
    largest = max(files_of(folder / "2" / "state" / "ocdbt.process_1", "*"), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(bytes(data))
    first, second = printed_values(start(RESTORE, 2, 4, folder, shape))
    good = {"step": 1, "meta": {"step": 1}, "wrong": []}
    assert second == [good] and first[1:] == [good] and "going back to step 1" in first[0]
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2.bad"]


def test_a_shard_that_differs_from_memory_is_detected_on_any_mesh(two, tmp_path):
    if jax.device_count() < 8:
        pytest.skip("needs 8 simulated devices")
    from jaxft.runs import manifest

    for number, shape in enumerate(((2, 4), (1, 8), (8, 1))):
        folder = shutil.copytree(two, tmp_path / str(number))
        body = manifest.read_manifest(folder / "2")
        shards = body["leaves"]["w"]["shards"]
        assert len(shards) == 8
        shards["8:16,6:12"] = shards["8:16,6:12"][::-1]
        (folder / "2" / "manifest.json").write_text(manifest.format_manifest(body))
        said: list[str] = []
        found = Checkpoints(folder, report=said.append).restore(sharded_state.like(*shape))
        assert found is not None and found[2] == 1 and "leaf w: xxh3 of [8:16,6:12]" in said[0]


FAIL = """
import os, resource
from pathlib import Path
import jax.numpy as jnp
import sharded_state as s
from jaxft.distributed import sync
from jaxft.runs import checkpoint, manifest
from jaxft.runs.checkpoint import Checkpoints
folder, full = Path(sys.argv[4]), Path(sys.argv[5])
saved = Checkpoints(folder)

def heard(what, act):
    try:
        act()
        print_value([what, "no error"])
    except OSError as error:
        print_value([what, error.errno, error.strerror])

def save(step, of=None):
    (of or saved).save(step, s.state(step, 2, 4), {})
    (of or saved).wait()

def with_one_failing(what, where, name, error, process=1):
    real = getattr(where, name)
    def failing(*args, **kwargs):
        if me == process:
            raise error
        return real(*args, **kwargs)
    setattr(where, name, failing)
    heard(what, lambda: save(3))
    setattr(where, name, real)

place = s.places(2, 4)["w"]
large = jax.jit(lambda: jax.random.normal(jax.random.key(0), (512, 2048)), out_shardings=place)()
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
if me == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
heard("file", lambda: (saved.save(3, {"w": large}, {}), saved.wait()))
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
with_one_failing("begin", checkpoint.Checkpoints, "_begin", PermissionError(13, "Permission denied"), process=0)
full_disk = OSError(28, "No space left on device")
with_one_failing("hand over", checkpoint.Checkpoints, "_start_writing", full_disk)
with_one_failing("hash", manifest, "file_hashes", OSError(5, "Input/output error"))
with_one_failing("manifest", checkpoint, "write_durably", full_disk, process=0)
with_one_failing("compare", checkpoint, "verify", manifest.Corrupt("leaf w is other"))
read_only = OSError(30, "Read-only file system")
with_one_failing("rename", checkpoint.Checkpoints, "_publish", read_only, process=0)
with_one_failing("report", sync, "write_durably", full_disk)  # not even its report can be written
other = Checkpoints(folder.parent / f"own{me}")
heard("not shared", lambda: save(1, other))
other.close()
if full.is_dir():
    small = Checkpoints(full)
    heard("space", lambda: save(1, small))
    heard("full", lambda: (small.save(2, {"w": large}, {}), small.wait()))
    heard("space again", lambda: save(2, small))
    small.close()
heard("good", lambda: save(4))
saved.close()
found, _, step = saved.restore(s.like(2, 4))
print_value({"step": step, "wrong": s.differs(found, step, 2, 4)})
"""  # noqa: E501


def test_an_error_of_one_process_reaches_all_and_no_checkpoint_suffers(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "c")
    full = tmp_path / "full"
    full.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", full], capture_output=True
    ).returncode
    try:
        first, second = printed_values(start(FAIL, 2, 4, folder, full if mounted else tmp_path / "none"))
    finally:
        if mounted:
            subprocess.run(["umount", "-l", full], check=True)
    assert first == second
    *lines, good = first
    found = {what: rest for what, *rest in lines}
    assert good == {"step": 4, "wrong": []} and found.pop("good") == ["no error"]
    if mounted:
        assert found.pop("space") == found.pop("space again") == ["no error"]
        assert (
            "step 2 was not written: no space left on the disk; checkpoints of steps 1 are"
            in found.pop("full")[1]
        )
    assert found.pop("not shared")[1].startswith("checkpoint of step 1 was not written: process 1: ")
    space, nothing = "no space left on the disk", "the folder cannot be written"
    expected = {
        "begin": nothing,
        "hand over": space,
        "hash": "Input/output error",
        "manifest": space,
        "compare": "leaf w is other",
    }
    expected |= {"rename": nothing, "report": space, "file": ""}
    assert found.keys() == expected.keys()
    for what, text in expected.items():
        line = found[what][1]
        assert line.startswith("checkpoint of step 3 was not written: ") and line.endswith(
            "; checkpoints of steps 1, 2 are intact"
        )
        assert text in line, line
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2", "4"]  # 1 has the best score


DIE = """
import os, signal
from pathlib import Path
import sharded_state as s
from jaxft.distributed import sync
from jaxft.runs.checkpoint import Checkpoints
victim, stage = int(sys.argv[5]), int(sys.argv[6])
real = sync.FileExchange.__call__
def dying(self, mine):
    if me == victim and self._count == stage:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, mine)
sync.FileExchange.__call__ = dying
saved = Checkpoints(Path(sys.argv[4]))
saved.save(3, s.state(3, 2, 4), {})
try:
    saved.wait()
except OSError as error:
    print(type(error).__name__, error, flush=True)
    os._exit(7)
"""


@pytest.mark.parametrize(("victim", "stage"), [(1, 0), (0, 4)])
def test_kill_9_of_one_process_while_saving_ends_the_other_and_leaves_the_earlier_checkpoints(
    two, tmp_path, victim, stage
):
    """Process 1 before its shards are known to be written, or process 0 with everything but the last look
    done.
    """
    folder = shutil.copytree(two, tmp_path / "c")
    processes = start(DIE, 2, 4, folder, victim, stage)
    begin = time.monotonic()
    texts = [p.communicate(timeout=90) for p in processes]
    assert time.monotonic() - begin < 60  # heartbeats of these processes count as lost after 10 s
    assert processes[victim].returncode == -9
    left = processes[1 - victim]
    said = "".join(texts[1 - victim])
    assert left.returncode != 0
    is_known = re.search("PeerLostError.*a process is gone", said)  # after which a run exits for a restart
    assert is_known or "another task died" in said, said[-2000:]
    state = Checkpoints(folder, report=pytest.fail).restore(sharded_state.like(2, 4))
    assert state is not None and state[2] == 2 and sharded_state.differs(state[0], 2, 2, 4) == []
    saved = Checkpoints(folder, keep_last=1, keep_best=0)
    saved.save(4, sharded_state.state(4, 2, 4), {})
    saved.close()
    assert [name for name in os.listdir(folder)] == ["4"]  # nothing of the killed save is left
