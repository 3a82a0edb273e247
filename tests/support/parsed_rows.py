"""Rows as their formats read them."""

from jaxft.data.row_settings import RowSettings
from jaxft.data.rows.dataset_rows import list_chunks
from jaxft.data.rows.example import RESPONSE
from jaxft.data.rows.format_choice import parse_dataset
from jaxft.data.rows.formats import PAIRS, SFT
from jaxft.data.rows.invalid_rows import InvalidRow, valid


def outcomes(rows, format="auto", columns=()):
    """The example of each SFT row, or its error."""
    found = parse_dataset(rows, SFT, RowSettings(format=format, columns=tuple(columns)))
    return [row if isinstance(row, InvalidRow) else row.examples[RESPONSE] for row in found]


def examples(rows, format="auto", columns=()):
    """The example of each SFT row; raises the first error."""
    return list(map(valid, outcomes(rows, format, columns)))


def pair_settings(**options):
    return RowSettings(kinds=("chosen", "rejected"), **options)


def pairs(rows, settings=None):
    """What each preference row contains; raises the first error."""
    return list(map(valid, parse_dataset(rows, PAIRS, settings or pair_settings())))


def readable_rows(ref, invalid):
    """The rows of a dataset that can be read; `invalid` receives the others."""
    rows = [row for chunk in list_chunks(str(ref)).chunks() for row in chunk.rows()]
    for row in rows:
        if isinstance(row, InvalidRow):
            invalid.add(row)
    return [row for row in rows if not isinstance(row, InvalidRow)]
