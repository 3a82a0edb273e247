"""Read Parquet files in batches, within limits: a few bytes of one may unpack to billions of values.

Only the columns that are used are read. A column whose dictionary has long values stays encoded, so that the
size of its rows is known before they are made. Memory is limited by batches, and all rows of a file by
TOTAL_BYTES: see plan_group.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from jaxft.data.rows.invalid_rows import LINE_BYTES

BATCH_ROWS = 1 << 13
RATIO = 500  # bytes in memory for one in the file; text without a dictionary compresses less
# Limits for what exceeds RATIO: of a batch, of all rows of a file, of a group's column that Arrow expands.
ONCE_BYTES = 6 * LINE_BYTES
TOTAL_BYTES = 8 << 30
EXPANDED_BYTES = 1 << 30
VALUE_BYTES = 64  # of a Python object
_LEVEL_BYTES = 16  # of a value's definition, repetition and index


@contextmanager
def open_parquet(source: Any, where: str, remedy: str) -> Iterator[Any]:
    """Open a Parquet file. Raises ValueError with its name and the remedy if it cannot be read.

    source: a path or an open file. where: its name in errors.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{where}: reading Parquet needs pyarrow; run `pip install datasets`") from error
    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            yield file
    except pyarrow.ArrowMemoryError as error:
        raise ValueError(
            f"{where}: no memory to read it ({str(error).splitlines()[0]}); write it with smaller row groups"
        ) from error
    except (OSError, pyarrow.ArrowException) as error:
        problem, first = "not a readable Parquet file", str(error).splitlines()[0]
        if isinstance(error, pyarrow.ArrowNotImplementedError) or "Not yet implemented" in first:
            problem = "a column has a type or an encoding that is not supported"
            remedy = "write it without that column"
        raise ValueError(f"{where}: {problem} ({first}); {remedy}") from error


class GroupPlan(NamedTuple):
    """The plan for reading a row group.

    columns: names of the columns that are read. others: names of the other columns. encoded: paths of columns
    whose dictionaries are not expanded. batch: number of rows that Arrow unpacks at once. chunk: number of
    rows that take about LINE_BYTES as text. size: bytes of all rows.
    """

    columns: tuple[str, ...]
    others: tuple[str, ...]
    encoded: tuple[str, ...]
    batch: int
    chunk: int
    size: int


def plan_group(file: Any, source: Any, group: int, used: Collection[str] | None, where: str) -> GroupPlan:
    """Plan the reading of a row group within limits of memory, from the file's metadata and a pass over long
    columns.

    Raises ValueError if the group takes more than RATIO times its bytes in the file and breaks one of two
    limits: a batch takes ONCE_BYTES at most, however few rows it has; all rows of the group take at most
    TOTAL_BYTES times the group's fraction of the file's rows. A column that cannot stay encoded takes
    EXPANDED_BYTES at most. Honest files that repeat long texts pass; they are read in batches of about
    LINE_BYTES.

    file: from open_parquet, of `source`. used: the names of columns that are read, None for all.
    """
    names, rows = file.schema_arrow.names, file.metadata.row_group(group).num_rows
    if used is not None:  # names of columns may be spelled with other cases, see columns.respelled
        known = {name.strip().lower() for name in used}
        used = {name for name in names if name.strip().lower() in known}
    columns = tuple(name for name in names if used is None or name in used)
    stored = _columns(file, group, used)
    packed = RATIO * sum(c.packed for c in stored)
    if sum(c.at_once for c in stored) > max(ONCE_BYTES, packed):
        raise ValueError(
            f"{where}: row group {group} takes more than {ONCE_BYTES >> 20} MiB in memory at once and more "
            f"than {RATIO} times its size in the file; write the file again with smaller row groups"
        )
    limit = max(packed, TOTAL_BYTES * rows // max(1, file.metadata.num_rows))
    total, batch, encoded = 0, BATCH_ROWS, []
    for column in stored:
        size = column.unpacked
        most = limit if column.has_dictionary else min(limit, max(packed, EXPANDED_BYTES))
        if column.is_delta:
            size, fits = _measure(source, file.metadata, group, column, most)
            batch = min(batch, fits)
        elif _is_long(source, file.metadata, group, column):
            encoded.append(column.path)
            size, _ = _measure(source, file.metadata, group, column, most)
        total += max(size, column.unpacked) + _LEVEL_BYTES * column.values
        if size > most or total > limit:
            passed = most if size > most else limit
            raise ValueError(
                f"{where}: row group {group} takes more than {passed >> 20} MiB and more than {RATIO} times "
                "its size in the file; write the file again without rows that repeat such long values"
            )
    chunk = max(1, min(BATCH_ROWS, LINE_BYTES * rows // max(1, total)))
    others = tuple(name for name in names if name not in columns)
    return GroupPlan(columns, others, tuple(encoded), min(batch, chunk), chunk, total)


def planned_batches(file: Any, source: Any, group: int, plan: GroupPlan) -> Iterator[Any]:
    """Yield record batches of a row group. file: from open_parquet, of `source`."""
    import pyarrow.parquet

    reader = pyarrow.parquet.ParquetFile(source, metadata=file.metadata, read_dictionary=[*plan.encoded])
    return reader.iter_batches(plan.batch, row_groups=[group], columns=[*plan.columns])


class _Column(NamedTuple):
    """A column of a row group. packed: its bytes in the file. unpacked: bytes of its values, each value of a
    dictionary once. at_once: bytes that one batch may take, however few rows it has. values, rows: their
    numbers in the group. has_dictionary: whether it has a dictionary that need not be expanded. is_delta:
    whether it is encoded as DELTA_BYTE_ARRAY.
    """

    path: str
    packed: int
    unpacked: int
    at_once: int
    values: int
    rows: int
    has_dictionary: bool
    is_delta: bool


def _columns(file: Any, group: int, used: Collection[str] | None) -> list[_Column]:
    """Return the columns of a group that are used."""
    group_metadata = file.metadata.row_group(group)
    columns = []
    for i in range(group_metadata.num_columns):
        chunk, described = group_metadata.column(i), file.schema.column(i)
        path = chunk.path_in_schema
        if used is not None and not any(f"{path}.".startswith(f"{name}.") for name in used):
            continue
        is_fixed, stored = chunk.physical_type == "FIXED_LEN_BYTE_ARRAY", chunk.total_uncompressed_size
        unpacked = max(stored, chunk.num_values * described.length) if is_fixed else stored
        at_once = stored
        if described.max_repetition_level:  # one row may have all values
            at_once = max(unpacked, _LEVEL_BYTES * chunk.num_values)
        is_delta = "DELTA_BYTE_ARRAY" in chunk.encodings
        has_dictionary = chunk.has_dictionary_page and chunk.physical_type == "BYTE_ARRAY" and not is_delta
        sizes = chunk.total_compressed_size, unpacked, at_once, chunk.num_values, group_metadata.num_rows
        columns.append(_Column(path, *sizes, has_dictionary, is_delta))
    return columns


def _is_long(source: Any, metadata: Any, group: int, column: _Column) -> bool:
    """Whether a dictionary has such long values that rows may take far more memory than the file says."""
    plain = 4 * (column.unpacked + LINE_BYTES // 2)
    if not column.has_dictionary or column.values * column.unpacked <= plain:
        return False
    first = next(_read_column(source, metadata, group, column, 1), None)
    longest = max((_longest(array) for array in first.columns), default=0) if first is not None else 0
    return column.values * longest > plain


def _measure(source: Any, metadata: Any, group: int, column: _Column, limit: int) -> tuple[int, int]:
    """Return how many bytes a column's values take, counted until they exceed `limit`, and how many rows a
    batch may have to take about LINE_BYTES at most in Arrow's memory.

    In the encoding DELTA_BYTE_ARRAY a value may begin with the value before it, which the file does not
    repeat. So each value may be as long as all stored bytes together: few rows of it are read at a time.
    """
    rows = BATCH_ROWS
    if column.is_delta:
        rows = max(1, min(rows, 2 * LINE_BYTES * column.rows // max(1, column.unpacked * column.values)))
    total = most = 0
    for batch in _read_column(source, metadata, group, column, rows):
        size = batch_bytes(batch)
        total, most = total + size, max(most, size)
        if total > limit:
            break
    return total, max(1, rows * LINE_BYTES // max(1, most))


def _read_column(source: Any, metadata: Any, group: int, column: _Column, rows: int) -> Iterator[Any]:
    """Yield record batches of one column, with its dictionary if it has one."""
    import pyarrow.parquet

    encoded = [column.path] if column.has_dictionary else []
    reader = pyarrow.parquet.ParquetFile(
        source, metadata=metadata, read_dictionary=encoded, buffer_size=1 << 16
    )
    return reader.iter_batches(rows, row_groups=[group], columns=[column.path], use_threads=False)


def _longest(array: Any) -> int:
    """Return how many bytes the longest value in the dictionaries of an Arrow array has."""
    import pyarrow
    import pyarrow.compute as compute

    if pyarrow.types.is_dictionary(array.type):
        return compute.max(compute.binary_length(array.dictionary)).as_py() or 0
    return max((_longest(part) for part in _parts(array)), default=0)


def _parts(array: Any) -> list[Any]:
    """Return the fields, keys and items, or elements of a nested Arrow array, as arrays; [] for others."""
    import pyarrow as pa

    if pa.types.is_struct(array.type):
        return array.flatten()
    if pa.types.is_map(array.type):
        begin, end = (array.offsets[i].as_py() for i in (0, -1))
        return [part.slice(begin, end - begin) for part in (array.keys, array.items)]
    lists = pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray, pa.ListViewArray, pa.LargeListViewArray
    return [array.flatten()] if isinstance(array, lists) else []


def batch_rows(batch: Any) -> list[dict[str, Any]]:
    """Return the rows of a record batch as Python objects. They share the values of a column's dictionary."""
    import pyarrow

    if not any(pyarrow.types.is_dictionary(column.type) for column in batch.columns):
        return batch.to_pylist()
    names, columns = batch.schema.names, map(_values, batch.columns)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(array: Any) -> list[Any]:
    import pyarrow

    if not pyarrow.types.is_dictionary(array.type):
        return array.to_pylist()
    indices, unpacked = array.indices.to_pylist(), dict[int | None, Any]({None: None})
    for index in set(indices) - {None}:
        unpacked[index] = array.dictionary[index].as_py()
    return [unpacked[index] for index in indices]


def batch_bytes(batch: Any) -> int:
    """Return about how many bytes the rows of a record batch take as Python objects."""
    return sum(map(_bytes, batch.columns))


def _bytes(array: Any) -> int:
    import pyarrow

    count = VALUE_BYTES * len(array)
    if parts := _parts(array):
        return count + sum(map(_bytes, parts))
    if not pyarrow.types.is_dictionary(array.type):
        return count + array.nbytes
    import pyarrow.compute as compute  # takes 0.1 s

    try:
        lengths = compute.binary_length(array.dictionary)
    except pyarrow.ArrowNotImplementedError:  # a dictionary of numbers
        return count
    return count + (compute.sum(compute.take(lengths, array.indices)).as_py() or 0)
