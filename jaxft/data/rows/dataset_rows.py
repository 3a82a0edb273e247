"""Read the rows of JSONL, JSON, CSV, TSV, Parquet or text files, of a folder of those, of a folder that
datasets' save_to_disk has written, or of a dataset on the hub.

pyarrow and datasets are imported where they are used: local text files need neither.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from jaxft.data.progress import RowProgress
from jaxft.data.rows import row_files
from jaxft.data.rows.invalid_rows import InvalidRows, attempt, valid
from jaxft.data.rows.remote_files import RemoteFile, file_name, is_remote, remote_batches, remote_files
from jaxft.data.rows.row_files import Chunk, Outcome, Row
from jaxft.data.rows.shipped import ROOT
from jaxft.data.rows.text_files import (
    CSV_SUFFIXES,
    DOCUMENT,
    TEXT_SUFFIXES,
    encoding_note,
    read_csv,
    read_text,
    sniff_csv,
    sniff_encoding,
    text_files,
    wide_encoding,
)

ROW_SUFFIXES = (".jsonl", ".json", *CSV_SUFFIXES, ".parquet")
SUFFIXES = (*ROW_SUFFIXES, *TEXT_SUFFIXES)
SPLITS = "dataset_dict.json"  # of a folder with a dataset for each split, as DatasetDict.save_to_disk writes
SAVED = ("dataset_info.json", "state.json")  # of a folder that Dataset.save_to_disk has written
LEAST_PARTS = 32  # the fewest chunks that a sample is taken from, if there are as many
_EVALUATION_SPLITS = ("validation", "valid", "dev", "test", "eval")


@dataclass(frozen=True)
class Listing:
    """A dataset in chunks, each of which one process can read.

    labels: prefixes of the names of its rows, such as file names. folder: the folder of local files, else "".
    digest: a hash of the contents. size: bytes of the files; of local Parquet files, unpacked. chunks: lists
    the chunks, in order. rows: number of rows, None if only reading them can tell. notes: lines about what is
    not obvious in how the files are read, such as their encoding.
    """

    labels: tuple[str, ...]
    folder: str
    digest: str
    size: int
    chunks: Callable[[], Iterator[Chunk]]
    rows: int | None = None
    notes: tuple[str, ...] = ()

    def first(self, most: int | None) -> "Listing":
        """Return the listing of the first `most` rows, None for all."""
        if most is None:
            return self
        rows = None if self.rows is None else min(self.rows, most)
        return replace(self, chunks=lambda: row_files.first_chunks(self.chunks(), most), rows=rows)

    def only(self, name: str) -> "Listing":
        """Return the listing of the row with this name; an empty listing if there is no such row."""

        def chunks() -> Iterator[Chunk]:
            for chunk in self.chunks():
                rows = [row for row in chunk.rows() if Path(row.name).name == name]  # an error has the folder
                yield from [row_files.loaded(rows, chunk.label)] if rows else []

        return replace(self, digest=f"{self.digest} {name}", chunks=chunks, rows=None)

    @property
    def name(self) -> str:
        """The file's name, or how many files there are."""
        return self.labels[0] if len(self.labels) == 1 else f"{len(self.labels)} files"


def find_data(ref: str) -> Path | None:
    """Return the file or folder `ref` in the working directory, else in ROOT (the clone or the installed
    files), or None if it is in neither.

    FOLDER:SPLIT is the folder of a split that DatasetDict.save_to_disk has written.
    """
    existing = next((path for path in (Path(ref).expanduser(), ROOT / ref) if path.exists()), None)
    folder, _, split = ref.rpartition(":")
    if existing is None and folder and split:
        parent = find_data(folder)
        if parent is not None and split in saved_splits(parent):
            return parent / split
    return existing


def try_find(ref: str) -> Path | None:
    """Return find_data(ref), and None for a text such as a list of files that is too long for a name."""
    try:
        return find_data(ref)
    except OSError:
        return None


def saved_splits(path: Path) -> list[str]:
    """Return the names of the splits in a folder that DatasetDict.save_to_disk has written, [] for others."""
    try:
        names = json.loads((path / SPLITS).read_bytes())["splits"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []
    known = (x for x in names if isinstance(x, str) and re.fullmatch(r"\w[\w.-]*", x))
    return [x for x in known if (path / x / SAVED[1]).is_file()]


def evaluation_split(ref: str) -> str | None:
    """Return FOLDER:SPLIT for the evaluation split of a folder that DatasetDict.save_to_disk has written;
    None without such a split.
    """
    path = try_find(ref)
    splits = saved_splits(path) if path is not None else []
    return next((f"{ref}:{name}" for name in _EVALUATION_SPLITS if name in splits), None)


def read_rows(ref: str) -> list[Row]:
    """Return all rows of a file, a folder (its files by name) or `org/name[/config][:split]` on the hub.

    Raises FileNotFoundError if `ref` is none of these, ValueError or OSError if a file cannot be read,
    InvalidRow, which names file and line, for the first invalid row, and ValueError without rows.
    """
    rows = list(map(valid, chain.from_iterable(chunk.rows() for chunk in list_chunks(ref).chunks())))
    check_rows(ref, len(rows), 0, InvalidRows(None))
    return rows


def sampled(ref: str, listing: Listing, count: int, progress: bool = False) -> tuple[Listing, int | None]:
    """Return a dataset of `count` rows at even distances of a larger one, and the number of all rows.

    If only reading the rows can count them, all are read. Of files on the network, the first `count` rows are
    read, and the number of all rows is None. progress: whether to show it.
    """
    if is_remote(ref):
        return listing.first(count), None
    if listing.rows is None:
        with RowProgress(f"reading {listing.name}", None, progress) as shown:
            rows, total = row_files.spread_rows(listing.chunks(), count, shown.add)
        chunks = [*row_files.in_windows(rows, listing.folder or listing.labels[0])]
        size = listing.size * len(rows) // max(1, total)
        return replace(listing, size=size, chunks=lambda: iter(chunks), rows=len(rows)), total
    if listing.rows <= count:
        return listing, listing.rows
    parts = row_files.spread_chunks([*listing.chunks()], count, LEAST_PARTS)
    size = listing.size * count // listing.rows
    return replace(listing, size=size, chunks=lambda: iter(parts), rows=count), listing.rows


def check_rows(ref: str, readable: int, unreadable: int, invalid: InvalidRows) -> None:
    """Raise ValueError if too many rows of a dataset are invalid, or none can be read."""
    invalid.check(ref, readable + unreadable)
    if not readable:
        raise ValueError(f"{ref}: the dataset has no rows; add at least one")


def list_chunks(ref: str, used: tuple[str, ...] | None = None, sample_by: str = DOCUMENT) -> Listing:
    """Divide a dataset into chunks, see `read_rows`, and hash it. Every file is read once.

    used: the columns that are read from Parquet files, None for all; others have the value NOT_READ.
    sample_by: the unit of text that is a row, see text_files.py.
    """
    if not ref.strip():
        raise ValueError("data is empty; name a file, a folder or a hub dataset")
    if is_remote(ref):
        return _list_remote(remote_files(ref), used)
    path = find_data(ref)
    if path is not None:
        return _list_local(path, used, sample_by)
    folder, _, split = ref.rpartition(":")
    parent = find_data(folder) if folder else None
    splits = saved_splits(parent) if parent is not None else []
    if splits:
        raise ValueError(f"{folder}: the folder has no split {split!r}; use {' or '.join(splits)}")
    if Path(ref).suffix not in SUFFIXES and re.fullmatch(r"[\w.-]+(/[\w.-]+){1,2}(:[^/\s]+)?", ref):
        return _list_hub(ref)
    places = " or ".join(map(str, dict.fromkeys([Path.cwd(), ROOT])))
    raise FileNotFoundError(
        f"data {ref!r} not found in {places}; use a file ({', '.join(SUFFIXES)}), a "
        "folder of such files or of save_to_disk, a hub dataset org/name[/config][:split], or https:// or "
        "hf:// (Parquet)"
    )


def _list_remote(files: list[RemoteFile], used: tuple[str, ...] | None) -> Listing:
    names = [file_name(file.url) for file in files]  # of several folders
    labels = tuple(names if len({*names}) == len(names) else map(str, files))
    digest = xxhash.xxh3_128(repr([(file.url, file.size, file.version) for file in files]).encode())

    def rows(file: RemoteFile, label: str) -> Iterator[Outcome]:
        before = 0
        for batch, others in remote_batches(file, used):
            yield from row_files.rows_of_batch(batch, others, str(file), label, before)
            before += batch.num_rows

    def chunks() -> Iterator[Chunk]:
        for file, label in zip(files, labels, strict=True):
            yield from row_files.in_windows(rows(file, label), label)

    return Listing(labels, "", digest.hexdigest(), sum(file.size for file in files), chunks)


def _list_local(path: Path, used: tuple[str, ...] | None, sample_by: str) -> Listing:
    if path.is_dir() and (path / SPLITS).is_file():
        splits = saved_splits(path)
        if "train" not in splits and len(splits) != 1:
            raise ValueError(
                f"{path}: the folder has the splits {', '.join(splits) or 'none'}, and no train; choose one "
                f"with data={path}:SPLIT"
            )
        path = path / ("train" if "train" in splits else splits[0])
    if path.is_dir() and all((path / name).is_file() for name in SAVED):
        return _list_saved(path)
    folder, files, notes = _files(path)
    return _list_files(folder, files, used, sample_by, notes)


def _files(path: Path) -> tuple[Path, list[Path], list[str]]:
    """Return the folder of a dataset, its files, and notes about files that are not read."""
    if not path.is_dir():
        return path.parent, [_regular(path)], []
    files = sorted(
        p for p in path.iterdir() if p.suffix in ROW_SUFFIXES and not p.name.startswith((".", "dataset_info"))
    )
    texts = text_files(path)
    if not files and not texts:
        raise FileNotFoundError(
            f"{path}: the folder has no data files; add {' or '.join('*' + s for s in SUFFIXES)}"
        )
    if not files:
        return path, texts, _split_notes(path, texts)
    about = ("readme", "license", "licence", "notice", "citation", "changelog")
    unread = [text for text in texts if not text.stem.lower().startswith(about)]
    notes = _split_notes(path, files)
    if unread:
        note = f"its {len(unread)} text files, such as {unread[0].name}, are not read"
        notes.insert(0, f"{path.name}: {note}: it has files of rows, such as {files[0].name}")
    return path, [_regular(file) for file in files], notes


def _split_notes(folder: Path, files: list[Path]) -> list[str]:
    """Return a line if files named like training and evaluation splits are all read for training."""
    words = {file.name: set(re.split(r"[^a-z]+", file.stem.lower())) for file in files}
    train = [name for name, parts in words.items() if "train" in parts]
    others = [name for name, parts in words.items() if parts & {*_EVALUATION_SPLITS}]
    if not (train and others):
        return []
    how = f"set data={folder / train[0]} held_out={folder / others[0]}"
    return [
        f"{folder.name}: {others[0]} is read for training as {train[0]} is; if it is for evaluation, {how}"
    ]


def _regular(path: Path) -> Path:
    """Return the path of a file. Raises ValueError for a pipe or a device, which may never end."""
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file; copy the rows into one")
    return path


class _Scanned(NamedTuple):
    """A file that was read once. chunks, rows, size, notes: as in Listing."""

    chunks: Callable[[], Iterable[Chunk]]
    size: int
    rows: int | None = None
    notes: Sequence[str] = ()


def _list_files(
    folder: Path, files: list[Path], used: tuple[str, ...] | None, sample_by: str, notes: list[str]
) -> Listing:
    digest, scans, labels = xxhash.xxh3_128(), list[_Scanned](), list[str]()
    for path in files:
        is_text = path.suffix.lower() in TEXT_SUFFIXES
        labels.append(path.relative_to(folder).as_posix() if is_text else path.name)
        with row_files.named_errors(path):
            scans.append(_scan_file(path, labels[-1], used, sample_by, digest.update))
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        if is_text and sample_by != DOCUMENT:
            digest.update(sample_by.encode())

    def chunks() -> Iterator[Chunk]:
        if all(path.suffix.lower() in TEXT_SUFFIXES for path in files):  # small files share chunks
            rows = (row for scan in scans for chunk in scan.chunks() for row in chunk.rows())
            return row_files.in_windows(rows, str(folder))
        return chain.from_iterable(scan.chunks() for scan in scans)

    known = [scan.rows for scan in scans if scan.rows is not None]
    rows = sum(known) if len(known) == len(scans) else None
    size, notes = sum(scan.size for scan in scans), [*notes, *(note for s in scans for note in s.notes)]
    few = [*notes[:5], *([f"and {len(notes) - 5} files more like that"] if len(notes) > 5 else [])]
    return Listing(tuple(labels), str(folder), digest.hexdigest(), size, chunks, rows, tuple(few))


def _scan_file(
    path: Path, label: str, used: tuple[str, ...] | None, sample_by: str, report: row_files.Blocks
) -> _Scanned:
    """Read a file once and return its chunks. label: prefix of its rows' names. report: gets its bytes."""
    read: _ReadFile
    size = path.stat().st_size
    if path.suffix == ".jsonl" or (path.suffix == ".json" and row_files.has_json_lines(path)):
        encoding = wide_encoding(path)
        if encoding is not None:  # its bytes cannot be divided into lines
            _scan_bytes(path, report)
            read = partial(row_files.read_wide_lines, encoding=encoding)
            return _Scanned(lambda: _windows(path, label, read), size, None, encoding_note(path, encoding))
        lines = row_files.scan_lines(path, report)
        return _Scanned(lambda: lines, size, sum(chunk.size for chunk in lines))
    _scan_bytes(path, report)
    suffix = path.suffix.lower() if path.suffix.lower() in TEXT_SUFFIXES else path.suffix
    if suffix == ".json":
        return _Scanned(lambda: _windows(path, label, row_files.read_json), size)
    if suffix in CSV_SUFFIXES:
        text = sniff_csv(path)
        read = partial(read_csv, text=text)
        return _Scanned(lambda: _windows(path, label, read), size, None, text.notes(path))
    if suffix in TEXT_SUFFIXES:
        encoding = sniff_encoding(path)
        read = partial(read_text, label=label, encoding=encoding, sample_by=sample_by)
        return _Scanned(lambda: _windows(path, label, read), size, None, encoding_note(path, encoding))
    if suffix == ".parquet":
        chunks, unpacked = row_files.scan_groups(path, used)
        return _Scanned(lambda: chunks, max(size, unpacked), sum(chunk.size for chunk in chunks))
    raise ValueError(f"{path}: unknown file type {suffix!r}; use one of {', '.join(SUFFIXES)}")


_ReadFile = Callable[[Path], Iterator[Outcome]]


def _windows(path: Path, label: str, read: _ReadFile) -> Iterator[Chunk]:
    with row_files.named_errors(path):
        yield from row_files.in_windows(read(path), label)


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
    return _list_table(data, f"{dataset}:{split}", f"{name}:{split}")


def _list_saved(path: Path) -> Listing:
    """Return the chunks of a folder that Dataset.save_to_disk has written."""
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # its errors have no common type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path}: not a readable folder of save_to_disk ({reason}); save the dataset again"
        ) from error
    parts = path.parts[-2:] if (path.parent / SPLITS).is_file() else path.parts[-1:]  # FOLDER/SPLIT
    return replace(_list_table(data, str(path), "/".join(parts)), folder=str(path.parent))


def _list_table(data: Any, where: str, label: str) -> Listing:
    """Return the chunks of a dataset of the package datasets. where, label: see read_table."""
    import datasets

    digest = xxhash.xxh3_128(label.encode())
    stored = data.cache_files if isinstance(data, datasets.Dataset) else []
    if not stored:
        return _list_items(list(data), where, label)
    for file in stored:
        _scan_bytes(Path(file["filename"]), digest.update)
    digest.update(str(len(data)).encode())

    def chunks() -> Iterator[Chunk]:
        for start in range(0, len(data), row_files.CHUNK_ROWS):
            rows = range(start, min(start + row_files.CHUNK_ROWS, len(data)))
            yield Chunk(label, len(rows), partial(row_files.read_table, data, rows, where, label))

    return Listing((label,), "", digest.hexdigest(), data.data.nbytes, chunks, len(data))


def _list_items(items: list[dict[str, Any]], where: str, label: str) -> Listing:
    """Return the chunks of rows in memory. where: their name in errors."""
    texts = [json.dumps(item, default=str) for item in items]
    digest = xxhash.xxh3_128("\n".join([where, *texts]).encode())
    rows = [
        attempt(row_files.row_of, item, f"{where}:{number}", f"{label}:{number}")
        for number, item in enumerate(map(row_files.without_added_nulls, items), 1)
    ]
    folder = where.removesuffix(f"/{label}")
    return Listing(
        (label,), folder, digest.hexdigest(), sum(map(len, texts)), partial(row_files.in_windows, rows, label)
    )


def _scan_bytes(path: Path, report: row_files.Blocks) -> None:
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            report(block)


def hub_dataset(ref: str) -> str | None:
    """Return `org/name` if `ref` names a dataset on the hub, None if it names files."""
    ref = ref.removeprefix("hf://datasets/").replace("@", ":")
    named = re.match(r"[\w-][\w.-]*/[\w.-]+(?=[/:]|$)", ref)
    return named[0] if named and find_data(ref) is None and Path(ref).suffix not in SUFFIXES else None
