"""Text from files, rows and servers, made safe to print: no control characters, no secrets in messages."""

import re

from jaxft.data.urls import without_secrets

# Characters that move the cursor, changes colours or reorders text; tabs and new lines are left.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST_LINE = 2000


def printable_text(text: str) -> str:
    """Return a row's or model's text for a terminal: every control character is replaced by U+FFFD."""
    return CONTROL.sub("\ufffd", text)


def printable_message(text: str) -> str:
    """Return a message as printable_text does; URLs lose what urls.without_secrets removes."""
    return without_secrets(printable_text(text))


def printable_line(text: str) -> str:
    """Return text as one line of printable characters, at most LONGEST_LINE; others are written as \\x1b.
    URLs lose what urls.without_secrets removes.
    """
    line = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
        for c in " ".join(text[: 10 * LONGEST_LINE].split())
    )
    line = without_secrets(line)
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 4]} ..."


def short_text(text: str, most: int = 200) -> str:
    """Return text for a message, with its end left out where it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most - 4]} ..."
