"""URLs of rows; removal of passwords and signatures."""

import re
from pathlib import Path

# A user name and password before the host; a query or fragment, which may sign the URL.
# A path ends where another URL begins. A comma is part of a query if parameters follow: spr=https,http&sig=
_SCHEME = r"[a-z][a-z0-9+.-]{1,20}:/{1,2}"
_URL = re.compile(
    rf"(?i)({_SCHEME})([^\s/]+@)?((?:(?!{_SCHEME})[^\s?#\"])*)"
    rf"([?#][^\s,<>]*(?:,(?!{_SCHEME})[^\s,<>?#/.]*[&=][^\s,<>]*)*)?"
)
_AFTER = re.compile(r"""[])}.;:'"`]+$""")  # of the sentence around a URL, or of its quotes
_WEIGHT = re.compile(r":[\d.]+$")
SECRET_MARK = "***"  # in place of what is secret


def is_remote(ref: str) -> bool:
    """Whether `ref` is a URL of rows."""
    return ref.startswith(("https://", "http://", "hf://"))


def file_name(ref: str) -> str:
    """Return the last part of the path of a file, a dataset or a URL.

    >>> file_name("https://host/rows.parquet?sig=1"), file_name("data/rows.jsonl")
    ('rows.parquet', 'rows.jsonl')
    """
    path = re.split("[?#]", ref)[0] if ref.startswith(("https://", "http://")) else ref
    return Path(path).name


def without_secrets(text: str) -> str:
    """Return the text with the user, password, query and fragment of every URL replaced by ***.

    A path of hf:// may have a ?, which stands for any character. The weight of one of several sources stays:

        >>> without_secrets("a.jsonl:0.7,https://me:pw@host/b.parquet?sig=1:0.3")
        'a.jsonl:0.7,https://***@host/b.parquet?***:0.3'
    """
    return _URL.sub(_shown, text)


def has_hidden_query(url: str) -> bool:
    """Whether `without_secrets` has replaced the query or the fragment of a URL."""
    return url.endswith((f"?{SECRET_MARK}", f"#{SECRET_MARK}"))


def _shown(url: re.Match[str]) -> str:
    scheme, user, path, secret = url.groups()
    start = f"{scheme}{f'{SECRET_MARK}@' if user else ''}{path}"
    if not secret or scheme.lower() == "hf://":
        return f"{start}{secret or ''}"
    sentence = _AFTER.search(secret)
    after = sentence[0] if sentence else ""
    before, behind = url.string[: url.start()].rstrip(), url.string[url.end() :].lstrip()
    several = before.endswith(",") or behind.startswith(",")
    weight = _WEIGHT.search(secret.removesuffix(after)) if several else None
    return f"{start}{secret[0]}{SECRET_MARK}{weight[0] if weight else ''}{after}"
