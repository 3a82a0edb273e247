"""A checkpoint read: what is on the disk compared with its manifest, and the arrays put where they belong.

Every process has a part of it, and none holds more of a leaf than its own shards or one slab.
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
from jaxft.runs.manifest import Bad, first_line

GROUP_BYTES = 256 << 20  # leaves are restored in groups of about this size on each process


def _divided(work: list[Any]) -> list[Any]:
    """This process's part of some work."""
    return work[jax.process_index() :: jax.process_count()]


def compare(folder: Path) -> None:
    """Compare what is on the disk with what was in memory, each process a part of the shards."""
    entries = manifest.read(folder)["leaves"]
    manifest.check_shards(
        folder, entries, _divided([(n, place) for n, e in entries.items() for place in e["shards"]])
    )


def take(folder: Path, abstract_state: Any, found: dict[str, Any]) -> str | None:
    """Put a checkpoint's state and meta into `found`. Returns what is wrong with it where it isn't what its manifest says."""
    try:
        body, wanted = manifest.read(folder), manifest.leaves(abstract_state)
        manifest.check_tree(wanted, body["leaves"], folder)
        manifest.check_files(folder, dict(_divided(list(body["files"].items()))))
        placed = _restored(folder, wanted, body["leaves"])
    except Bad as error:
        return str(error)
    found["state"] = jax.tree.unflatten(jax.tree.structure(abstract_state), [placed[name] for name in wanted])
    found["meta"] = body["meta"]
    return None


def _restored(folder: Path, wanted: dict[str, Any], entries: dict[str, Any]) -> dict[str, jax.Array]:
    """This process's shards of all leaves, where they belong.

    A shard is compared with its hash as it arrives; those that were cut otherwise when they were saved are read back for that,
    each by one of the processes.
    """
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = {name: getattr(leaf, "sharding", None) or alone for name, leaf in wanted.items()}
    cuts = {
        n: {manifest.place_of(i, leaf.shape) for i in places[n].devices_indices_map(leaf.shape).values()}
        for n, leaf in wanted.items()
    }
    others = [
        (name, place)
        for name, entry in entries.items()
        for place in entry["shards"]
        if place not in cuts[name]
    ]
    manifest.check_shards(folder, entries, _divided(others))
    sizes = {
        n: math.prod(places[n].shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for n, leaf in wanted.items()
    }
    here = {name: len(place.addressable_devices) for name, place in places.items()}
    placed = {}
    for names in _groups(list(wanted), lambda n: sizes[n] * here[n]):
        group = _read_group(folder, {n: places[n] for n in names if math.prod(wanted[n].shape)})
        for name, array in group.items():
            _check_arrived(name, array, entries[name])
        placed.update(group)
    for name in wanted.keys() - placed.keys():
        zeros = np.zeros(wanted[name].shape, wanted[name].dtype)
        placed[name] = jax.make_array_from_callback(
            zeros.shape, places[name], zeros.__getitem__
        )  # device_put is a collective
    return placed


def _groups(names: list[str], bytes_of: Callable[[str], int]) -> Iterator[list[str]]:
    group: list[str] = []
    for name in names:
        if group and sum(map(bytes_of, group)) + bytes_of(name) > GROUP_BYTES:
            yield group
            group = []
        group.append(name)
    if group:
        yield group


def _read_group(folder: Path, places: dict[str, jax.sharding.Sharding]) -> dict[str, jax.Array]:
    if not places:
        return {}
    args = ocp.args.PyTreeRestore(
        item=dict.fromkeys(places, 0),
        restore_args={name: ocp.ArrayRestoreArgs(sharding=place) for name, place in places.items()},
        partial_restore=True,
    )
    reader = ocp.PyTreeCheckpointHandler()
    try:
        return reader.restore(epath.Path(folder / "state"), args=args)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        raise Bad(f"Orbax can't read it: {first_line(error)}") from error
    finally:
        reader.close()


def _check_arrived(name: str, array: jax.Array, entry: dict[str, Any]) -> None:
    """Compare the shards on this process's devices with their hashes, as far as they were saved as they are now."""
    found = {"shape": list(array.shape), "dtype": np.dtype(array.dtype).name}
    for key, value in found.items():
        if value != entry[key]:
            raise Bad(f"leaf {name}: {key} is {value}, the manifest says {entry[key]}")
    distinct = {manifest.place_of(shard.index, array.shape): shard.data for shard in array.addressable_shards}
    for place, data in distinct.items():
        if place in entry["shards"]:
            manifest.check(name, entry, place, manifest.hash_array(np.asarray(data)))
