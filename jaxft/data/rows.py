"""Read the rows of JSONL, JSON, CSV or Parquet files, of a folder of those, or of a dataset on the hub.

pyarrow and datasets are imported where they are used: local text files need neither.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import xxhash

from jaxft.data.invalid import InvalidRows, attempt
from jaxft.data.remote import RemoteFile, remote_batches, remote_files
from jaxft.data.row_csv import read_csv
from jaxft.data.row_files import (
    CHUNK_ROWS,
    Chunk,
    Outcome,
    Row,
    TableRows,
    has_json_lines,
    in_windows,
    named_errors,
    read_json,
    row_of,
    rows_of_batch,
    scan_groups,
    scan_lines,
    without_added_nulls,
)
from jaxft.data.shipped import ROOT
from jaxft.data.urls import is_remote

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Listing:
    """A dataset in chunks, each of which one process can read.

    labels: what the names of its rows begin with, such as file names. folder: of the files, "" without any.
    digest: a hash of the contents. size: bytes of the files, of local Parquet files as they are unpacked.
    chunks: lists the chunks, in order. rows: their number, None if the rows must be read for it.
    """

    labels: tuple[str, ...]
    folder: str
    digest: str
    size: int
    chunks: Callable[[], Iterator[Chunk]]
    rows: int | None = None


def find_data(ref: str) -> Path | None:
    """Return the file or folder `ref` in the working directory, else in ROOT, or None if it is in neither."""
    candidates = [Path(ref).expanduser()]
    if not candidates[0].is_absolute():
        candidates.append(ROOT / ref)
    return next((path for path in candidates if path.exists()), None)


def read_rows(ref: str, invalid: InvalidRows | None = None) -> list[Row]:
    """Return all rows of a file, a folder (its files by name) or `org/name[/config][:split]` on the hub.

    invalid: receives the rows that cannot be read; without it the first of them is raised as InvalidRow,
    which names file and line. Raises FileNotFoundError if `ref` is none of these, and ValueError if a file
    cannot be read, too many rows are invalid, or there are none.
    """
    rows: list[Row] = []
    for row in chain.from_iterable(chunk.rows() for chunk in list_chunks(ref).chunks()):
        if isinstance(row, Row):
            rows.append(row)
        elif invalid is None:
            raise row
        else:
            invalid.add(row)
    unreadable = invalid.total if invalid else 0
    check_rows(ref, len(rows), unreadable, invalid or InvalidRows(None))
    return rows


def check_rows(ref: str, readable: int, unreadable: int, invalid: InvalidRows) -> None:
    """Raise ValueError if too many rows of a dataset are invalid, or none can be read."""
    invalid.check(ref, readable + unreadable)
    if not readable:
        raise ValueError(f"{ref}: the dataset has no rows; add at least one")


def list_chunks(ref: str, used: tuple[str, ...] | None = None) -> Listing:
    """Divide a dataset into chunks, see `read_rows`, and hash it. Every file is read once.

    used: the columns that are read from Parquet files, None for all; others have the value NOT_READ.
    """
    if not ref.strip():
        raise ValueError("data is empty; name a file, a folder or a hub dataset")
    if is_remote(ref):
        return _list_remote(remote_files(ref), used)
    path = find_data(ref)
    if path is not None:
        return _list_files(_files(path), used)
    if Path(ref).suffix not in SUFFIXES and re.fullmatch(r"[\w.-]+(/[\w.-]+){1,2}(:[^/\s]+)?", ref):
        return _list_hub(ref)
    places = " or ".join(map(str, dict.fromkeys([Path.cwd(), ROOT])))
    raise FileNotFoundError(
        f"data {ref!r} not found in {places}; use a file ({', '.join(SUFFIXES)}), a "
        "folder of such files, a hub dataset org/name[/config][:split], or https:// or hf:// (Parquet)"
    )


def _list_remote(files: list[RemoteFile], used: tuple[str, ...] | None) -> Listing:
    names = [file.name for file in files]  # of several folders
    labels = tuple(names if len({*names}) == len(names) else map(str, files))
    digest = xxhash.xxh3_128(repr([(file.url, file.size, file.version) for file in files]).encode())

    def rows(file: RemoteFile, label: str) -> Iterator[Outcome]:
        before = 0
        for batch, others in remote_batches(file, used):
            yield from rows_of_batch(batch, others, str(file), label, before)
            before += batch.num_rows

    def chunks() -> Iterator[Chunk]:
        for file, label in zip(files, labels, strict=True):
            yield from in_windows(rows(file, label), label)

    return Listing(labels, "", digest.hexdigest(), sum(file.size for file in files), chunks)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [_regular(path)]
    files = sorted(
        p for p in path.iterdir() if p.suffix in SUFFIXES and not p.name.startswith((".", "dataset_info"))
    )
    if not files:
        raise FileNotFoundError(
            f"{path}: the folder has no data files; add {' or '.join('*' + s for s in SUFFIXES)}"
        )
    return [_regular(file) for file in files]


def _regular(path: Path) -> Path:
    """Return the path of a file. Raises ValueError for a pipe or a device, which may never end."""
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file; copy the rows into one")
    return path


def _list_files(files: list[Path], used: tuple[str, ...] | None) -> Listing:
    digest, readers, counts, size = xxhash.xxh3_128(), [], list[int | None](), 0
    for path in files:
        with named_errors(path):
            reader, count, unpacked = _scan_file(path, used, digest.update)
            readers.append(reader)
            counts.append(count)
            size += unpacked
        digest.update(path.stat().st_size.to_bytes(8, "little"))

    def chunks() -> Iterator[Chunk]:
        return chain.from_iterable(reader() for reader in readers)

    known = [count for count in counts if count is not None]
    labels, rows = tuple(path.name for path in files), sum(known) if len(known) == len(counts) else None
    return Listing(labels, str(files[0].parent), digest.hexdigest(), size, chunks, rows)


def _scan_file(
    path: Path, used: tuple[str, ...] | None, report: Callable[[bytes], object]
) -> tuple[Callable[[], Iterable[Chunk]], int | None, int]:
    """Read a file once; return a function that lists its chunks, the number of rows and the size (see
    Listing).

    used: see list_chunks. report: receives the file's bytes.
    """
    if path.suffix == ".jsonl" or (path.suffix == ".json" and has_json_lines(path)):
        lines = scan_lines(path, report)
        return lambda: lines, sum(chunk.count for chunk in lines), path.stat().st_size
    _scan_bytes(path, report)
    match path.suffix:
        case ".json":
            return lambda: _windows(path, read_json), None, path.stat().st_size
        case ".csv":
            return lambda: _windows(path, read_csv), None, path.stat().st_size
        case ".parquet":
            chunks = tuple(scan_groups(path, used))
            plans = {chunk.group: chunk.plan for chunk in chunks}
            return lambda: chunks, None, max(path.stat().st_size, sum(plan.size for plan in plans.values()))
        case suffix:
            raise ValueError(f"{path}: unknown file type {suffix!r}; use one of {', '.join(SUFFIXES)}")


def _windows(path: Path, read: Callable[[Path], Iterator[Outcome]]) -> Iterator[Chunk]:
    with named_errors(path):
        yield from in_windows(read(path), path.name)


def _list_hub(ref: str) -> Listing:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"data {ref!r} is not a local file, and hub datasets need the package datasets; run `pip install "
            "datasets`"
        ) from error
    dataset, _, split = ref.partition(":")
    org, name, *config = dataset.split("/")
    split = split or "train"
    try:
        data = datasets.load_dataset(f"{org}/{name}", *config, split=split)
    except Exception as error:  # its errors have no common type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"data {ref!r} is not a local file and cannot be loaded from the hub ({reason}); use "
            "org/name[/config][:split]"
        ) from error
    label, where = f"{name}:{split}", f"{dataset}:{split}"
    digest = xxhash.xxh3_128(where.encode())
    stored = data.cache_files if isinstance(data, datasets.Dataset) else []
    if not stored:
        return _list_items(list(data), where, label)
    for file in stored:
        _scan_bytes(Path(file["filename"]), digest.update)
    digest.update(str(len(data)).encode())

    def chunks() -> Iterator[Chunk]:
        for start in range(0, len(data), CHUNK_ROWS):
            yield TableRows(data, start, min(start + CHUNK_ROWS, len(data)), where, label)

    return Listing((label,), "", digest.hexdigest(), data.data.nbytes, chunks, len(data))


def _list_items(items: list[dict[str, Any]], where: str, label: str) -> Listing:
    """Return the chunks of rows in memory. where: their name in errors."""
    texts = [json.dumps(item, default=str) for item in items]
    digest = xxhash.xxh3_128("\n".join([where, *texts]).encode())
    rows = [
        attempt(row_of, item, f"{where}:{number}", f"{label}:{number}")
        for number, item in enumerate(map(without_added_nulls, items), 1)
    ]
    folder = where.removesuffix(f"/{label}")
    return Listing(
        (label,), folder, digest.hexdigest(), sum(map(len, texts)), partial(in_windows, rows, label)
    )


def _scan_bytes(path: Path, report: Callable[[bytes], object]) -> None:
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            report(block)


def hub_dataset(ref: str) -> str | None:
    """Return `org/name` if `ref` names a dataset on the hub, None if it names files."""
    ref = ref.removeprefix("hf://datasets/").replace("@", ":")
    named = re.match(r"[\w-][\w.-]*/[\w.-]+(?=[/:]|$)", ref)
    return named[0] if named and find_data(ref) is None and Path(ref).suffix not in SUFFIXES else None
