"""Read a checkpoint: compare the files with the manifest, and load the arrays onto the mesh.

The work is divided over the processes, and none has more of a leaf in memory than its own shards or one slab.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxft.runs import manifest
from jaxft.runs.manifest import Corrupt, first_line

GROUP_BYTES = 256 << 20  # leaves are restored in groups of about this size on each process


def _my_part(work: list[Any]) -> list[Any]:
    return work[jax.process_index() :: jax.process_count()]


def verify(folder: Path) -> None:
    """Compare the arrays on disk with those that were in memory, each process a part of the shards. Raises
    Corrupt.
    """
    entries = manifest.read_manifest(folder)["leaves"]
    shards = [(name, index) for name, entry in entries.items() for index in entry["shards"]]
    manifest.check_shards(folder, entries, _my_part(shards))


def read_checkpoint(folder: Path, abstract_state: Any, found: dict[str, Any]) -> str | None:
    """Write a checkpoint's state and meta into `found`. Return why it does not match its manifest, None if it
    does.
    """
    try:
        body, expected = manifest.read_manifest(folder), manifest.named_leaves(abstract_state)
        manifest.check_tree(expected, body["leaves"], folder)
        manifest.check_files(folder, dict(_my_part(list(body["files"].items()))))
        arrays = _read_leaves(folder, expected, body["leaves"])
    except Corrupt as error:
        return str(error)
    leaves = [arrays[name] for name in expected]
    found["state"] = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
    found["meta"] = body["meta"]
    return None


def _read_leaves(folder: Path, expected: dict[str, Any], entries: dict[str, Any]) -> dict[str, jax.Array]:
    """Read this process's shards of all leaves.

    A shard that was saved with the same index is compared with its hash once it is loaded. Other shards are
    read back separately for this check, each by one process.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = {name: leaf.sharding or here for name, leaf in expected.items()}
    arriving = {
        (name, manifest.format_index(index, leaf.shape))
        for name, leaf in expected.items()
        for index in shardings[name].devices_indices_map(leaf.shape).values()
    }
    shards = [(name, index) for name, entry in entries.items() for index in entry["shards"]]
    manifest.check_shards(folder, entries, _my_part([shard for shard in shards if shard not in arriving]))

    def local_bytes(name: str) -> int:
        leaf, sharding = expected[name], shardings[name]
        shard = math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        return shard * len(sharding.addressable_devices)

    arrays: dict[str, jax.Array] = {}
    for names in _groups(list(expected), local_bytes):
        group = _read_group(folder, {n: shardings[n] for n in names if math.prod(expected[n].shape)})
        for name, array in group.items():
            _check_arrived(name, array, entries[name])
        arrays.update(group)
    for name in expected.keys() - arrays.keys():  # empty ones; device_put would be a collective
        zeros = np.zeros(expected[name].shape, expected[name].dtype)
        arrays[name] = jax.make_array_from_callback(zeros.shape, shardings[name], zeros.__getitem__)
    return arrays


def _groups(names: list[str], bytes_of: Callable[[str], int]) -> Iterator[list[str]]:
    group: list[str] = []
    for name in names:
        if group and sum(map(bytes_of, group)) + bytes_of(name) > GROUP_BYTES:
            yield group
            group = []
        group.append(name)
    if group:
        yield group


def _read_group(folder: Path, shardings: dict[str, jax.sharding.Sharding]) -> dict[str, jax.Array]:
    if not shardings:
        return {}
    args = ocp.args.PyTreeRestore(
        item=dict.fromkeys(shardings, 0),
        restore_args={name: ocp.ArrayRestoreArgs(sharding=each) for name, each in shardings.items()},
        partial_restore=True,
    )
    reader = ocp.PyTreeCheckpointHandler()
    try:
        return reader.restore(epath.Path(folder / "state"), args=args)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        raise Corrupt(f"Orbax cannot read it: {first_line(error)}") from error
    finally:
        reader.close()


def _check_arrived(name: str, array: jax.Array, entry: dict[str, Any]) -> None:
    """Compare the shards on this process's devices with their hashes, as far as the manifest has shards of
    that index.
    """
    manifest.check_leaf(name, array.shape, np.dtype(array.dtype), entry)
    shards = {
        manifest.format_index(shard.index, array.shape): shard.data for shard in array.addressable_shards
    }
    for index, data in shards.items():
        if index in entry["shards"]:
            manifest.check_hash(name, entry, index, manifest.hash_array(np.asarray(data)))
