"""Read Parquet files in batches, within limits: a few bytes of one may unpack to billions of values.

Only the columns that are used are read. A column whose dictionary has long values stays encoded, so that the
size of its rows is known before they are made.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from jaxft.data.limits import LINE_BYTES

BATCH_ROWS = 1 << 13
RATIO = 500  # more than text ever compresses
VALUE_BYTES = 64  # of a Python object
_LEVEL_BYTES = 16  # of a value's definition, repetition and index


@contextmanager
def open_parquet(source: Any, where: str, remedy: str) -> Iterator[Any]:
    """Open a Parquet file. Raises ValueError that names it and ends with the remedy if it cannot be read.

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
        raise ValueError(
            f"{where}: not a readable Parquet file ({str(error).splitlines()[0]}); {remedy}"
        ) from error


def rows_per_batch(file: Any, group: int, used: Collection[str] | None) -> int:
    """Return a number of rows of a group that take about LINE_BYTES, at most BATCH_ROWS. used: see
    limited_batches.
    """
    rows = file.metadata.row_group(group).num_rows
    return max(1, min(BATCH_ROWS, LINE_BYTES * rows // max(1, _unpacked_bytes(_chunks(file, group, used)))))


def limited_batches(
    file: Any, source: Any, group: int, used: Collection[str] | None, where: str
) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Yield record batches of a row group with the columns that are used, and the names of the others.

    file: from open_parquet, of `source`. used: the names of columns that are read, None for all. Raises
    ValueError for a group that takes more than RATIO times its bytes in the file, and its part of
    LINE_BYTES.
    """
    import pyarrow.parquet

    chunks, names = _chunks(file, group, used), file.schema_arrow.names
    columns = [name for name in names if used is None or name in used]
    others = tuple(name for name in names if name not in columns)
    limit = RATIO * sum(c.total_compressed_size for c in chunks) + LINE_BYTES // file.num_row_groups
    _check(_unpacked_bytes(chunks), limit, group, where)
    encoded = [c.path_in_schema for c in chunks if _is_long(source, file.metadata, group, c)]
    reader = pyarrow.parquet.ParquetFile(source, metadata=file.metadata, read_dictionary=encoded)
    total = 0
    for batch in reader.iter_batches(rows_per_batch(file, group, used), row_groups=[group], columns=columns):
        total += batch_bytes(batch)
        _check(total, limit, group, where)
        yield batch, others


def _check(count: int, limit: int, group: int, where: str) -> None:
    if count > limit:
        raise ValueError(
            f"{where}: row group {group} takes more than {limit >> 20} MiB in memory, {RATIO} times its size "
            "in the file; write the file again without rows that repeat so many values"
        )


def _chunks(file: Any, group: int, used: Collection[str] | None) -> list[Any]:
    """Return the metadata of the columns of a group that are used."""
    found = file.metadata.row_group(group)
    chunks = [found.column(i) for i in range(found.num_columns)]
    if used is None:
        return chunks
    return [c for c in chunks if any(f"{c.path_in_schema}.".startswith(f"{name}.") for name in used)]


def _unpacked_bytes(chunks: list[Any]) -> int:
    """Return the memory of columns whose dictionaries are not expanded, from what the file says."""
    return sum(c.total_uncompressed_size + _LEVEL_BYTES * c.num_values for c in chunks)


def _is_long(source: Any, metadata: Any, group: int, chunk: Any) -> bool:
    """Whether a column's dictionary has values so long that its rows may take far more memory than the file
    says.
    """
    import pyarrow
    import pyarrow.parquet

    plain = 4 * (chunk.total_uncompressed_size + LINE_BYTES // 2)
    has_dictionary = chunk.has_dictionary_page and chunk.physical_type == "BYTE_ARRAY"
    if not has_dictionary or chunk.num_values * chunk.total_uncompressed_size <= plain:
        return False
    path = chunk.path_in_schema
    reader = pyarrow.parquet.ParquetFile(
        source, metadata=metadata, read_dictionary=[path], buffer_size=1 << 16
    )
    first = next(reader.iter_batches(1, row_groups=[group], columns=[path], use_threads=False), None)
    longest = max((_longest(column) for column in first.columns), default=0) if first is not None else 0
    return chunk.num_values * longest > plain


def _longest(array: Any) -> int:
    """Return the bytes of the longest value in the dictionaries of an Arrow array."""
    import pyarrow
    import pyarrow.compute as compute

    if pyarrow.types.is_dictionary(array.type):
        return compute.max(compute.binary_length(array.dictionary)).as_py() or 0
    return max((_longest(part) for part in _parts(array)), default=0)


def _parts(array: Any) -> list[Any]:
    """Return the arrays of a nested Arrow array's values."""
    import pyarrow

    if pyarrow.types.is_struct(array.type):
        return array.flatten()
    return [array.flatten()] if pyarrow.types.is_nested(array.type) else []


def batch_bytes(batch: Any) -> int:
    """Return about how many bytes the rows of a record batch take as Python objects."""
    return sum(map(_bytes, batch.columns))


def _bytes(array: Any) -> int:
    import pyarrow
    import pyarrow.compute as compute

    count = VALUE_BYTES * len(array)
    if pyarrow.types.is_nested(array.type):
        return count + sum(map(_bytes, _parts(array)))
    if not pyarrow.types.is_dictionary(array.type):
        return count + array.nbytes
    try:
        lengths = compute.binary_length(array.dictionary)
    except pyarrow.ArrowNotImplementedError:  # a dictionary of numbers
        return count
    return count + (compute.sum(compute.take(lengths, array.indices)).as_py() or 0)
