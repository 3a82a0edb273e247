"""A checkpoint's manifest: what its leaves and files must be, and whether they are.

manifest.json holds of every leaf its shape, its dtype and the hash of each distinct shard as it was in memory, under the shard's
place ("0:4,0:8"); of every file its size and hash; and a hash of itself.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
import xxhash

from jaxft import tree

LAYOUT = 2
SLAB_BYTES = 256 << 20  # a shard is read back in slabs of about this size


class Bad(Exception):
    """A checkpoint that is not what its manifest says."""


def hash_array(array: np.ndarray) -> str:
    """xxh3-128 of the bytes in C order."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def hash_file(path: Path) -> str:
    """xxh3-128 of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def place_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """A shard's index as text."""
    ranges = (s.indices(n) for s, n in zip(index, shape, strict=True))
    return ",".join(f"{start}:{stop}" for start, stop, _ in ranges)


def index_of(place: str) -> tuple[slice, ...]:
    """The index that a place names."""
    return tuple(slice(*map(int, part.split(":"))) for part in place.split(",") if part)


def leaves(state: Any) -> dict[str, Any]:
    """Leaf by the name it has on disk: its path with dots, the separator that Orbax uses."""
    flat = tree.paths(state)
    named = {path.replace("/", "."): leaf for path, leaf in flat.items()}
    if len(named) != len(jax.tree.leaves(state)):
        raise ValueError(
            "two leaves of the state have the same path; names in it must not contain '.' or '/'"
        )
    for name, leaf in named.items():
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
            raise ValueError(
                f"{name} is a typed PRNG key, which has no bytes to save; keep jax.random.key_data of it"
            )
    return named


def entry(leaf: jax.Array | np.ndarray, own: bool) -> dict[str, Any]:
    """A leaf's entry, with the shards of this process. own: whether an array that is on the host is this process's to tell."""
    if isinstance(leaf, jax.Array):
        mine = [(shard.index, shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
    else:
        mine = [((slice(None),) * leaf.ndim, leaf)] if own else []
    shards = {place_of(index, leaf.shape): hash_array(np.asarray(data)) for index, data in mine if leaf.size}
    return {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name, "shards": shards}


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The entries of all processes as one."""
    return {
        name: {**one, "shards": {k: v for part in parts for k, v in part[name]["shards"].items()}}
        for name, one in parts[0].items()
    }


def sealed(body: dict[str, Any]) -> str:
    """The manifest's text, with a hash of itself."""
    text = json.dumps(body, sort_keys=True)
    return json.dumps({"xxh3": xxhash.xxh3_128_hexdigest(text.encode()), **body}, indent=1)


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises Bad where it is missing or not whole, ValueError for another layout."""
    try:
        body = json.loads((folder / "manifest.json").read_bytes())
        seal = body.pop("xxh3")
    except FileNotFoundError as error:
        raise Bad("manifest.json is missing") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Bad("manifest.json is damaged") from error
    if seal != xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode()):
        raise Bad("manifest.json is damaged")
    if body.get("layout") != LAYOUT:
        raise ValueError(
            f"{folder} was written by another version of jaxft; go on with that one, or use another name"
        )
    return body


def hashes(folder: Path, names: list[str]) -> dict[str, list[Any]]:
    """[size, hash] of files in a checkpoint."""
    return {name: [(folder / name).stat().st_size, hash_file(folder / name)] for name in names}


def check_files(folder: Path, files: dict[str, Any]) -> None:
    """Raise Bad where a file is not what it was."""
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            raise Bad(f"{name} is missing")
        if path.stat().st_size != size:
            raise Bad(f"{name} has {path.stat().st_size} bytes, the manifest says {size}")
        if hash_file(path) != digest:
            raise Bad(f"{name} is not what was written")


def check_shards(folder: Path, entries: dict[str, Any], wanted: list[tuple[str, str]]) -> None:
    """Read back shards, each by its leaf's name and place, on the host. Raises Bad where one differs."""
    for name, place in wanted:
        digest = xxhash.xxh3_128()
        for slab in _slabs(folder, name, entries[name], place):
            digest.update(np.ascontiguousarray(slab).reshape(-1).view(np.uint8).data)
        check(name, entries[name], place, digest.hexdigest())


def check(name: str, entry: dict[str, Any], place: str, found: str) -> None:
    """Raise Bad where a shard's hash is not the manifest's."""
    if found != entry["shards"][place]:
        raise Bad(f"leaf {name}: xxh3 of [{place}] is {found}, the manifest says {entry['shards'][place]}")


def _slabs(folder: Path, name: str, entry: dict[str, Any], place: str) -> Iterator[np.ndarray]:
    files = {"driver": "file", "path": f"{folder / 'state'}/"}
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": files, "path": f"{name}/"}}
    try:
        array = tensorstore.open(spec, open=True, read=True, context=tensorstore.Context()).result()
        found = {"shape": list(array.shape), "dtype": array.dtype.numpy_dtype.name}
        for key, value in found.items():
            if value != entry[key]:
                raise Bad(f"leaf {name}: {key} is {value}, the manifest says {entry[key]}")
        index = index_of(place)
        if not index:
            yield np.asarray(array.read().result())
            return
        first, rest = index[0], index[1:]
        row = math.prod(s.stop - s.start for s in rest) * array.dtype.numpy_dtype.itemsize
        rows = max(1, SLAB_BYTES // max(1, row))
        for start in range(first.start, first.stop, rows):
            yield np.asarray(array[(slice(start, min(start + rows, first.stop)), *rest)].read().result())
    except (Bad, MemoryError, PermissionError):
        raise
    except Exception as error:
        raise Bad(f"leaf {name} can't be read: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """An error's message, shortened to one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def check_tree(wanted: dict[str, Any], entries: dict[str, Any], folder: Path) -> None:
    """Raise ValueError where leaves (by name) are not of the manifest's names, shapes and dtypes."""
    asked = {n: (list(leaf.shape), np.dtype(leaf.dtype).name) for n, leaf in wanted.items()}
    found = {n: (e["shape"], e["dtype"]) for n, e in entries.items()}
    wrong = [n for n in {**asked, **found} if asked.get(n) != found.get(n)]
    if wrong:
        told = [f"{n}: found {_shown(found.get(n))}, wanted {_shown(asked.get(n))}" for n in wrong[:3]]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{folder} is of other settings: {'; '.join(told)}{more}; go back to them or use another name"
        )


def _shown(entry: tuple[list[int], str] | None) -> str:
    return "nothing" if entry is None else f"{entry[1]}{entry[0]}"
