"""Laws of checkpoints: a restored state has the bits that were saved, of the newest checkpoint or of an older
intact one.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.nn import tree
from jaxft.runs import checkpoint, manifest
from jaxft.runs.checkpoint import Checkpoints
from jaxft.runs.folder_copies import LOCAL_ONLY

ROOT = Path(__file__).resolve().parents[2]


@tree.struct
class State:
    step: Any
    trainable: Any
    opt_state: Any
    aux: Any


def make_state(seed: int, width: int = 12) -> State:
    keys = jax.random.split(jax.random.key(seed), 4)
    trainable = {
        "base": {"embed": None, "norm": jax.random.normal(keys[0], (width,))},
        "adapter": {
            "layers": {
                "q": {"a": jax.random.normal(keys[1], (2, width, 3), jnp.bfloat16), "b": jnp.zeros((2, 3, 5))}
            }
        },
    }
    opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(trainable)
    pair = (jnp.float32(seed), jnp.zeros((0, 3), jnp.int32))
    aux = {"codes": jax.random.bits(keys[2], (7, 2), jnp.uint16), "none": None, "pair": pair}
    return State(jnp.int32(seed), trainable, opt_state, aux)


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def bits(state: Any) -> dict[str, tuple]:
    return {path: (x.dtype.name, x.shape, np.asarray(x).tobytes()) for path, x in tree.paths(state).items()}


def is_exactly(found: Any, target: Any) -> bool:
    return jax.tree.structure(found) == jax.tree.structure(target) and bits(found) == bits(target)


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def everything(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_of(folder)}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with checkpoints of steps 1 and 2, to be copied."""
    folder = tmp_path_factory.mktemp("two")
    saved = Checkpoints(folder, keep_best=0)
    for step in (1, 2):
        saved.save(step, make_state(step), {"step": step, "third": 1 / 3})
    saved.close()
    return folder


def test_what_is_restored_is_what_was_saved(two):
    state, meta, step = Checkpoints(two).restore(abstract(make_state(0)))
    assert step == 2 and meta == {"step": 2, "third": 1 / 3}
    assert is_exactly(state, make_state(2))
    state, meta, step = Checkpoints(two).restore(abstract(make_state(0)), step=1)
    assert step == 1 and is_exactly(state, make_state(1))


def test_an_empty_or_missing_folder_restores_nothing(tmp_path):
    assert Checkpoints(tmp_path / "none").restore(abstract(make_state(0))) is None
    assert Checkpoints(tmp_path).latest() is None
    assert not (tmp_path / "none").exists()


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1 if x.size else x, s), donate_argnums=0)
    saved = Checkpoints(tmp_path)
    state, target = make_state(5, width=200_000), bits(make_state(5, width=200_000))
    saved.save(5, state, {})
    for _ in range(3):
        state = jax.block_until_ready(overwrite(state))
    found, _, _ = saved.restore(abstract(state))
    assert bits(found) == target
    saved.close()


def test_a_damaged_checkpoint_is_fetched_from_the_store_that_has_it(two, tmp_path):
    folder, limits, said = shutil.copytree(two, tmp_path / "c"), [], []
    for step in (1, 2):
        damage_half(folder / str(step) / "state" / "_METADATA", np.random.default_rng(0))

    def fetch(limit: int) -> int | None:
        limits.append(limit)
        if limit == 2:
            shutil.copytree(folder / "1.bad" if (folder / "1.bad").exists() else two / "2", folder / "2")
            damage_half(
                folder / "2" / "manifest.json", np.random.default_rng(0)
            )  # the store's is damaged too
            return 2
        return shutil.copytree(two / "1", folder / "1") and 1 if limit == 1 and len(limits) > 2 else None

    saved = Checkpoints(folder, report=said.append, copies=LOCAL_ONLY._replace(fetch=fetch))
    state, _, step = saved.restore(abstract(make_state(0)))
    assert step == 1 and is_exactly(state, make_state(1)) and limits == [2, 1, 1]
    assert [line.rpartition(", ")[2] for line in said] == [
        "step 2 is fetched", "going back to step 1", "step 1 is fetched"
    ]  # fmt: skip


def test_a_checkpoint_that_is_being_copied_stays_until_it_is(tmp_path):
    sending, settled = {1}, []
    copies = LOCAL_ONLY._replace(
        sending=lambda: frozenset(sending), settle=lambda: settled.append(sending.pop())
    )
    saved = Checkpoints(tmp_path, keep_last=1, keep_best=0, copies=copies)
    for step in (1, 2, 3):
        saved.save(step, {"x": jnp.float32(step)}, {})
        saved.wait()
    assert saved.steps() == [1, 3]
    saved.close()
    assert saved.steps() == [3] and settled == [1]


def damage_bit(path: Path, generator: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    data[generator.integers(len(data))] ^= 1 << int(generator.integers(8))
    path.write_bytes(bytes(data))


def damage_half(path: Path, generator: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_gone(path: Path, generator: np.random.Generator) -> None:
    path.unlink()


def damage_empty(path: Path, generator: np.random.Generator) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_bit, damage_half, damage_gone, damage_empty])
def test_damage_to_any_file_is_detected_and_the_older_checkpoint_restored(two, tmp_path, damage):
    generator = np.random.default_rng(0)
    for i, name in enumerate(files_of(two / "2") * (3 if damage is damage_bit else 1)):
        folder = shutil.copytree(two, tmp_path / str(i))
        damage(folder / "2" / name, generator)
        said: list[str] = []
        saved = Checkpoints(folder, report=said.append)
        restored = saved.restore(abstract(make_state(0)))
        assert restored is not None and restored[2] == 1, name
        assert is_exactly(restored[0], make_state(1)), name
        assert (folder / "2.bad").is_dir() and not (folder / "2").exists(), name
        assert len(said) == 1 and "step 2 is corrupt" in said[0] and "going back to step 1" in said[0]


def test_every_bit_of_the_manifest_counts(two, tmp_path):
    whole = (two / "2" / "manifest.json").read_bytes()
    folder = tmp_path / "m"
    folder.mkdir()
    for i in np.random.default_rng(1).choice(len(whole) * 8, 400, replace=False):
        data = bytearray(whole)
        data[i // 8] ^= 1 << int(i % 8)
        (folder / "manifest.json").write_bytes(bytes(data))
        with pytest.raises(manifest.Corrupt, match="damaged"):
            manifest.read_manifest(folder)


def test_a_checkpoint_in_the_folder_of_another_step_is_not_restored_as_that_step(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "copy")
    (folder / "2").rename(folder / "7")
    said: list[str] = []
    state, _, step = Checkpoints(folder, report=said.append).restore(abstract(make_state(0)))
    assert step == 1 and is_exactly(state, make_state(1))
    assert "checkpoint of step 7 is corrupt (manifest.json belongs to step 2)" in said[0]


def test_a_leaf_that_differs_from_memory_is_detected_in_an_intact_file(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "c")
    path = folder / "2" / "manifest.json"
    body = json.loads(path.read_text())
    body.pop("xxh3")
    name = "trainable.adapter.layers.q.a"
    shards = body["leaves"][name]["shards"]
    shards["0:2,0:12,0:3"] = shards["0:2,0:12,0:3"][::-1]
    path.write_text(manifest.format_manifest(body))
    said: list[str] = []
    restored = Checkpoints(folder, report=said.append).restore(abstract(make_state(0)))
    assert restored is not None and restored[2] == 1 and f"leaf {name}: xxh3" in said[0]


def test_where_all_are_bad_none_is_taken_and_each_is_named(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "c")
    for step in "12":
        damage_bit(folder / step / "manifest.json", np.random.default_rng(0))
    said: list[str] = []
    assert Checkpoints(folder, report=said.append).restore(abstract(make_state(0))) is None
    assert len(said) == 2 and "there is no older one" in said[1]
    assert sorted(p.name for p in folder.iterdir()) == ["1.bad", "2.bad"]


def test_restoring_a_given_step_never_falls_back_to_another(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "c")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7; it has 1, 2"):
        Checkpoints(folder).restore(abstract(make_state(0)), step=7)
    damage_half(folder / "2" / "manifest.json", np.random.default_rng(0))
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        Checkpoints(folder, report=lambda text: None).restore(abstract(make_state(0)), step=2)


def test_another_tree_is_refused_by_name_and_nothing_is_renamed(two):
    before = everything(two)
    other = make_state(0)
    other.trainable["adapter"]["layers"]["q"]["a"] = jnp.zeros((2, 12, 8), jnp.bfloat16)
    with pytest.raises(
        ValueError, match=r"adapter.layers.q.a: got bfloat16\[2, 12, 3\], expected bfloat16\[2, 12, 8\]"
    ):
        Checkpoints(two).restore(abstract(other))
    with pytest.raises(ValueError, match="aux.extra: got nothing, expected float32"):
        Checkpoints(two).restore(
            abstract(make_state(0).replace(aux={**make_state(0).aux, "extra": jnp.zeros(3)}))
        )
    assert everything(two) == before


def test_shardings_may_change_between_save_and_restore(tmp_path):
    devices = jax.devices()
    if len(devices) < 8:
        pytest.skip("needs 8 simulated devices")
    values = {"w": np.arange(16 * 24, dtype=np.float32).reshape(16, 24), "n": np.arange(8, dtype=np.int32)}

    def place(shape: tuple[int, int], spec: P) -> Any:
        mesh = Mesh(np.array(devices[: shape[0] * shape[1]]).reshape(shape), ("x", "y"))
        return {
            k: jax.device_put(v, NamedSharding(mesh, spec if v.ndim == 2 else P())) for k, v in values.items()
        }

    saved = Checkpoints(tmp_path)
    saved.save(1, place((4, 2), P("x", "y")), {})
    for shape, spec in [((2, 4), P("y", "x")), ((8, 1), P(None, "x")), ((1, 1), P())]:
        like = place(shape, spec)
        found, _, _ = saved.restore(abstract(like))
        for key in values:
            assert found[key].sharding == like[key].sharding
            np.testing.assert_array_equal(np.asarray(found[key]), values[key])
    saved.close()


def test_a_save_writes_a_few_leaves_at_a_time_and_the_largest_too(tmp_path, monkeypatch):
    """Orbax copies all leaves that it may write at a time, and refuses one that is larger than its limit."""
    gib = SimpleNamespace(nbytes=2**30)
    assert 1.0737 < checkpoint.in_flight_gb([gib] * 100) < 2.2
    assert checkpoint.in_flight_gb([jnp.float32(1)] * 3) == checkpoint.in_flight_gb([]) == 0.256
    monkeypatch.setattr(checkpoint, "IN_FLIGHT_BYTES", 1)
    limits, handler = [], checkpoint.ocp.PyTreeCheckpointHandler

    def spy(**options):
        limits.extend(value for name, value in options.items() if name == "save_concurrent_gb")
        return handler(**options)

    monkeypatch.setattr(checkpoint.ocp, "PyTreeCheckpointHandler", spy)
    state = {"large": jnp.arange(1000.0), "small": jnp.ones(3), "half": jnp.ones(999)}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state, {})
    found, _, _ = checkpoints.restore(abstract(state))
    assert is_exactly(found, state) and limits == [8001 / 1e9]
    checkpoints.close()


@pytest.mark.parametrize(
    ("scores", "keep_last", "keep_best", "target"),
    [
        ([None] * 5, 2, 1, [4, 5]),
        ([3.0, 1.0, 2.0, 4.0, 5.0], 1, 1, [2, 5]),
        ([3.0, 1.0, 2.0, 4.0, 5.0], 2, 2, [2, 3, 4, 5]),
        ([1.0, float("nan"), 2.0, float("inf"), None], 1, 1, [1, 5]),
        ([2.0, 1.0, 1.0, 3.0, 3.0], 1, 1, [3, 5]),  # of equals the newer
        ([1.0, 2.0, 3.0, 4.0, 5.0], 1, 0, [5]),
    ],
)
def test_the_last_and_the_best_checkpoints_are_retained(tmp_path, scores, keep_last, keep_best, target):
    saved = Checkpoints(tmp_path, keep_last, keep_best)
    for step, score in enumerate(scores, 1):
        saved.save(step, {"x": jnp.float32(step)}, {}, [score])
    saved.close()
    assert saved.steps() == target
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(map(str, target))
    finite = [s for s in target if scores[s - 1] is not None and np.isfinite(scores[s - 1])]
    best = saved.best()
    assert (best[0] in finite and best[1] == scores[best[0] - 1]) if finite else best is None


def test_a_step_saved_again_replaces_itself(tmp_path):
    saved = Checkpoints(tmp_path)
    saved.save(3, {"x": jnp.float32(1)}, {"n": 1})
    saved.save(3, {"x": jnp.float32(2)}, {"n": 2})
    state, meta, _ = saved.restore({"x": jax.ShapeDtypeStruct((), jnp.float32)})
    assert float(state["x"]) == 2 and meta == {"n": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["3"]
    saved.close()


def test_bad_arguments_are_refused_before_anything_is_written(tmp_path):
    saved = Checkpoints(tmp_path)
    with pytest.raises(TypeError):
        saved.save(1, {"x": jnp.ones(2)}, {"not json": object()})
    with pytest.raises(ValueError, match="key_data"):
        saved.save(1, {"key": jax.random.key(0)}, {})
    with pytest.raises(ValueError, match=r"the same path: a\.b;"):
        saved.save(1, {"a.b": jnp.ones(2), "a": {"b": jnp.ones(2)}, "c": jnp.ones(2)}, {})
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def largest_file(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_leaves_no_partial_checkpoint_and_raises_once(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "c")
    before = everything(folder)
    saved = Checkpoints(folder)
    with largest_file(100_000):
        saved.save(3, {"x": jax.random.normal(jax.random.key(0), (1 << 18,))}, {})
        with pytest.raises(OSError, match=r"step 3 was not written.*steps 1, 2 are intact"):
            saved.wait()
    saved.wait()  # raised before
    assert everything(folder) == before
    saved.save(4, make_state(4), {})  # space again
    saved.close()
    assert saved.steps() == [2, 4]


def test_what_the_disk_garbled_while_writing_never_becomes_a_checkpoint(two, tmp_path, monkeypatch):
    folder = shutil.copytree(two, tmp_path / "c")
    before, write = everything(folder), checkpoint.write_durably

    def garble(path: Path, content: bytes) -> None:
        largest = max((path.parent / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
        damage_half(largest, np.random.default_rng(0))
        write(path, content)

    monkeypatch.setattr(checkpoint, "write_durably", garble)
    saved = Checkpoints(folder)
    saved.save(3, {"x": jax.random.normal(jax.random.key(0), (1 << 14,))}, {})
    with pytest.raises(OSError, match="step 3 was not written"):
        saved.close()
    assert everything(folder) == before


@pytest.mark.parametrize("when", ["save", "close", "restore"])
def test_the_error_of_a_save_surfaces_at_the_next_call(two, tmp_path, when):
    folder = shutil.copytree(two, tmp_path / "c")
    saved = Checkpoints(folder)
    with largest_file(100_000):
        saved.save(3, {"x": jax.random.normal(jax.random.key(0), (1 << 18,))}, {})
        assert saved._thread is not None
        saved._thread.join()
    with pytest.raises(OSError, match="step 3 was not written"):
        {"save": lambda: saved.save(4, {}, {}), "close": saved.close, "restore": lambda: saved.restore({})}[
            when
        ]()
    saved.close()


def test_a_full_disk_is_reported_as_full(tmp_path):
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], capture_output=True)
    if made.returncode:
        pytest.skip("no right to mount a small tmpfs")
    try:
        saved = Checkpoints(tmp_path)
        saved.save(1, make_state(1), {})
        saved.wait()
        before = everything(tmp_path)
        with pytest.raises(
            OSError,
            match="step 2 was not written: no space left on the disk; checkpoints of steps 1 are intact",
        ):
            saved.save(2, {"x": jax.random.normal(jax.random.key(0), (1 << 20,))}, {})
            saved.wait()
        assert everything(tmp_path) == before
        saved.save(2, make_state(2), {})
        saved.close()
        state, _, step = saved.restore(abstract(make_state(0)))
        assert step == 2 and is_exactly(state, make_state(2))
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_read_only_folder_is_reported_and_can_be_restored_from(two):
    with tempfile.TemporaryDirectory() as name:
        folder = shutil.copytree(two, Path(name) / "c")
        Path(name).chmod(0o755)
        before, user = everything(folder), os.geteuid()
        folder.chmod(0o555)
        saved = Checkpoints(folder)
        saved.restore(abstract(make_state(0)))  # imports what it needs while it may
        try:
            if user == 0:
                os.seteuid(65534)  # root may write anywhere
            with pytest.raises(
                OSError, match=r"step 3 was not written: the folder cannot be written.*steps 1, 2 are intact"
            ):
                saved.save(3, make_state(3), {})
            restored = saved.restore(abstract(make_state(0)))
        finally:
            os.seteuid(user)
            folder.chmod(0o755)
        assert restored is not None and restored[2] == 2 and everything(folder) == before
        saved.close()


KILLED = textwrap.dedent("""
    import sys
    from pathlib import Path
    import jax.numpy as jnp
    from jaxft.runs.checkpoint import Checkpoints
    saved = Checkpoints(Path(sys.argv[1]))
    found = saved.restore({"x": jnp.zeros((300, 1000)), "n": jnp.int32(0)})
    step = found[2] if found else 0
    print("start", step, flush=True)
    while True:
        step += 1
        x = jnp.full((300, 1000), step, jnp.float32) * jnp.arange(1000, dtype=jnp.float32)[None]
        saved.save(step, {"x": x, "n": jnp.int32(step)}, {"step": step})
        print(step, flush=True)
""")


def test_kill_9_while_saving_leaves_the_last_complete_checkpoint(tmp_path):
    folder, generator, reached = tmp_path / "c", np.random.default_rng(0), 0
    for _ in range(3):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, folder], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines[0] == f"start {reached}\n"
        time.sleep(generator.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        reported = [int(text) for text in [*lines[1:], *process.stdout.read().splitlines()]]
        process.wait()
        like = {"x": jax.ShapeDtypeStruct((300, 1000), jnp.float32), "n": jax.ShapeDtypeStruct((), jnp.int32)}
        found = Checkpoints(folder, report=pytest.fail).restore(like)
        assert found is not None
        state, meta, reached = found
        assert reached >= reported[-1] - 1 and meta == {"step": reached} and int(state["n"]) == reached
        np.testing.assert_array_equal(
            np.asarray(state["x"])[7], np.float32(reached) * np.arange(1000, dtype=np.float32)
        )
    saved = Checkpoints(folder)
    saved.save(reached + 1, {"x": jnp.zeros((300, 1000)), "n": jnp.int32(0)}, {})
    saved.close()
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        map(str, saved.steps())
    )  # nothing of the killed saves is left
