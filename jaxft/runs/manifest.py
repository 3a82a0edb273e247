"""The manifest of a checkpoint: expected shapes, dtypes and hashes of its leaves and files, and their checks.

manifest.json has the shape and dtype of each leaf, and by index ("0:4,0:8") a hash of each distinct shard as
it was in memory. It also has the size and hash of each file, and a hash of itself.
"""

import collections
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
import xxhash

from jaxft.nn import tree

NAME = "manifest.json"
LAYOUT = 2
SET_ASIDE = ".bad"  # the suffix of damaged folders, see set_aside
SLAB_BYTES = 256 << 20  # a shard is read back in slabs of about this size


class Corrupt(Exception):
    """A checkpoint that does not match its manifest."""


# Leaves and their shards


def named_leaves(state: Any) -> dict[str, Any]:
    """Return the leaves of a state by their names on disk: their paths with dots, Orbax's separator. Raises
    ValueError if two names are equal, or for a typed PRNG key.
    """
    leaves = {path.replace("/", "."): leaf for path, leaf in tree.paths(state).items()}
    if len(leaves) != len(jax.tree.leaves(state)):
        keys = [keys for keys, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
        counts = collections.Counter(tree.path_of(k).replace("/", ".") for k in keys)
        shared = ", ".join(name for name, count in counts.items() if count > 1)
        raise ValueError(
            f"several leaves of the state have the same path: {shared}; use no '.' or '/' in the names of "
            "parameters"
        )
    for name, leaf in leaves.items():
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"{name} is a typed PRNG key, which cannot be saved; store its jax.random.key_data"
            )
    return leaves


def leaf_entry(leaf: jax.Array | np.ndarray, owns_host_arrays: bool) -> dict[str, Any]:
    """Return the manifest's entry of a leaf, with the hashes of this process's shards. owns_host_arrays:
    whether this process also hashes arrays that are not on devices; one process does.
    """
    if isinstance(leaf, jax.Array):
        shards = [(shard.index, shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
    else:
        shards = [((slice(None),) * leaf.ndim, leaf)] if owns_host_arrays else []
    hashes = {format_index(i, leaf.shape): hash_array(np.asarray(data)) for i, data in shards if leaf.size}
    return {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name, "shards": hashes}


def join_entries(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the entries that the processes have made: the union of their shards."""
    return {
        name: {**entry, "shards": {k: v for part in parts for k, v in part[name]["shards"].items()}}
        for name, entry in parts[0].items()
    }


def format_index(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """Return a shard's index as text, "0:4,0:8"."""
    ranges = (s.indices(n) for s, n in zip(index, shape, strict=True))
    return ",".join(f"{start}:{stop}" for start, stop, _ in ranges)


def parse_index(text: str) -> tuple[slice, ...]:
    """Return the index that `format_index` wrote as text."""
    return tuple(slice(*map(int, part.split(":"))) for part in text.split(",") if part)


def hash_array(array: np.ndarray) -> str:
    """Return the xxh3-128 of an array's bytes in C order, in hex."""
    return xxhash.xxh3_128_hexdigest(_bytes_of(array))


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


# The file


def format_manifest(body: dict[str, Any]) -> str:
    """Return the text of manifest.json, with a hash of itself. body: its other entries."""
    text = json.dumps(body, sort_keys=True)
    return json.dumps({"xxh3": xxhash.xxh3_128_hexdigest(text.encode()), **body}, indent=1)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint's manifest.json without the hash of itself. Raises Corrupt if the
    file is missing, does not match this hash or belongs to another step, and ValueError if another version of
    jaxft wrote it in another layout.
    """
    try:
        body = json.loads((folder / NAME).read_bytes())
        digest = body.pop("xxh3")
    except FileNotFoundError as error:
        raise Corrupt(f"{NAME} is missing") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Corrupt(f"{NAME} is damaged") from error
    if digest != xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode()):
        raise Corrupt(f"{NAME} is damaged")
    if folder.name.removesuffix(".tmp") != str(body.get("step")):
        raise Corrupt(f"{NAME} belongs to step {body.get('step')}")
    if body.get("layout") != LAYOUT:
        raise ValueError(
            f"{folder} was written by another version of jaxft; use that version, or another name=..."
        )
    return body


def file_hashes(folder: Path, names: list[str]) -> dict[str, list[Any]]:
    """Return [size in bytes, hash] of files in a checkpoint, by name."""
    return {name: [(folder / name).stat().st_size, hash_file(folder / name)] for name in names}


def hash_file(path: Path) -> str:
    """Return the xxh3-128 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def set_aside(folder: Path) -> Path:
    """Rename a damaged folder, e.g. adapter to adapter.bad (or .bad2, ...); return its new path."""
    target, count = folder.with_suffix(SET_ASIDE), 1
    while target.exists():
        count += 1
        target = folder.with_suffix(f"{SET_ASIDE}{count}")
    return folder.rename(target)


# Checks


def check_tree(expected: dict[str, Any], entries: dict[str, Any], folder: Path) -> None:
    """Raise ValueError if a state's leaves differ from the manifest's entries in name, shape or dtype."""
    required = {n: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for n, leaf in expected.items()}
    stored = {n: f"{entry['dtype']}{entry['shape']}" for n, entry in entries.items()}
    wrong = [n for n in {**required, **stored} if required.get(n) != stored.get(n)]
    if wrong:
        each = [(n, *(x.get(n, "nothing") for x in (stored, required))) for n in wrong[:3]]
        lines = [f"{n}: got {got}, expected {expected}" for n, got, expected in each]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{folder} does not fit the parameters of these settings ({'; '.join(lines)}{more}); restore the "
            "settings, or use another name=..."
        )


def check_files(folder: Path, files: dict[str, Any]) -> None:
    """Raise Corrupt if a file is missing or differs. files: {name in `folder`: [size in bytes, hash]}."""
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            raise Corrupt(f"{name} is missing")
        if path.stat().st_size != size:
            raise Corrupt(f"{name} has {path.stat().st_size} bytes, expected {size}")
        if hash_file(path) != digest:
            raise Corrupt(f"{name} has changed since it was written")


def check_leaf(name: str, shape: tuple[int, ...], dtype: np.dtype, entry: dict[str, Any]) -> None:
    """Raise Corrupt if a stored array has another shape or dtype than its entry."""
    for key, value in (("shape", list(shape)), ("dtype", dtype.name)):
        if value != entry[key]:
            raise Corrupt(f"leaf {name}: {key} is {value}, expected {entry[key]}")


def check_hash(name: str, entry: dict[str, Any], index: str, digest: str) -> None:
    """Raise Corrupt if a shard's hash is not the manifest's."""
    if digest != entry["shards"][index]:
        raise Corrupt(f"leaf {name}: xxh3 of [{index}] is {digest}, expected {entry['shards'][index]}")


def check_shards(folder: Path, entries: dict[str, Any], shards: list[tuple[str, str]]) -> None:
    """Read back shards, given by leaf and index, on the host. Raises Corrupt if one differs."""
    for name, index in shards:
        digest = xxhash.xxh3_128()
        for slab in _read_slabs(folder, name, entries[name], parse_index(index)):
            digest.update(_bytes_of(slab))
        check_hash(name, entries[name], index, digest.hexdigest())


def _read_slabs(
    folder: Path, name: str, entry: dict[str, Any], index: tuple[slice, ...]
) -> Iterator[np.ndarray]:
    files = {"driver": "file", "path": f"{folder / 'state'}/"}
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": files, "path": f"{name}/"}}
    try:
        array = tensorstore.open(spec, open=True, read=True, context=tensorstore.Context()).result()
        check_leaf(name, array.shape, array.dtype.numpy_dtype, entry)
        if not index:
            yield np.asarray(array.read().result())
            return
        first, rest = index[0], index[1:]
        row_bytes = math.prod(s.stop - s.start for s in rest) * array.dtype.numpy_dtype.itemsize
        rows = max(1, SLAB_BYTES // max(1, row_bytes))
        for start in range(first.start, first.stop, rows):
            slab = (slice(start, min(start + rows, first.stop)), *rest)
            yield np.asarray(array[slab].read().result())
    except (Corrupt, MemoryError, PermissionError):
        raise
    except Exception as error:
        raise Corrupt(f"leaf {name} cannot be read: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
