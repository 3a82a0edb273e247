"""Rows as their formats read them."""

from jaxft.data.row_settings import RowSettings
from jaxft.data.rows.example import RESPONSE
from jaxft.data.rows.format_choice import parse_dataset
from jaxft.data.rows.formats import PAIRS, SFT
from jaxft.data.rows.invalid import InvalidRow, valid


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
