"""URLs of rows, and Parquet files behind them, which are read over the network without a copy on disk.

`https://host/rows.parquet` is one file. `hf://datasets/org/name[@revision][/pattern]` is all Parquet files of
a dataset whose paths match the pattern, such as data/train-*. The bytes of one row group are fetched at a
time, by HTTP range requests.
"""

import fnmatch
import io
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jaxft.data.rows.row_parquet import open_parquet, plan_group, planned_batches

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


ATTEMPTS = 4
OTHER_FILES = re.compile(r"\.(jsonl?|csv|tsv|txt|arrow|gz|zst|zip)$")
REQUEST_SECONDS = 60.0  # of a request, and 1 s more for each SLOWEST bytes
SLOWEST = 1 << 16
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL.

    size: bytes. version: its ETag, date or commit, which changes with its content. private: headers that are
    sent to the URL's own host alone, such as the hub's token. tag: the ETag or date of the first response,
    which every later one must have too.
    """

    url: str
    size: int
    version: str
    private: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    tag: str = ""

    def __str__(self) -> str:
        return without_secrets(self.url)

    def open(self) -> io.BufferedReader:
        """Return its bytes as a file that is fetched in ranges."""
        return io.BufferedReader(_Ranges(self), 1 << 16)


class _Ranges(io.RawIOBase):
    """A remote file that is read by HTTP ranges."""

    def __init__(self, file: RemoteFile):
        super().__init__()
        self.file, self.at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.file.size)[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        stop = min(self.at + len(buffer), self.file.size)
        if stop <= self.at:
            return 0
        content = _fetch(self.file, self.at, stop)[1]
        if len(content) != stop - self.at:
            raise ValueError(
                f"{self.file}: the server sent {len(content)} bytes of {stop - self.at}; try again"
            )
        buffer[: len(content)] = content
        self.at = stop
        return len(content)


def _fetch(file: RemoteFile, start: int, stop: int) -> tuple[Any, bytes]:
    """Return the headers of a response and the bytes from `start` to before `stop`."""
    for attempt in range(ATTEMPTS):
        try:
            return _in_time(file, stop - start, partial(_request, file, start, stop))
        except urllib.error.HTTPError as error:
            if error.code < 400:
                raise ValueError(
                    f"{file}: the server's redirect cannot be followed ({error}); download the file"
                ) from error
            if error.code < 500 or attempt == ATTEMPTS - 1:
                raise ValueError(
                    f"{file}: the server refuses it ({error}); check the URL, and that you may read the file"
                ) from error
        except (OSError, HTTPException) as error:
            if attempt == ATTEMPTS - 1:
                raise ValueError(f"{file}: cannot be fetched ({error}); try again") from error
        time.sleep(2**attempt / 2)
    raise AssertionError("unreachable")


def _in_time(file: RemoteFile, count: int, request: Callable[[], tuple[Any, bytes]]) -> tuple[Any, bytes]:
    """Run a request for `count` bytes with a time limit; return its result. Raises its error, or ValueError
    if it is late. (A socket's own limit is for each read: a server may send a byte now and then.)
    """
    response, seconds = Future[tuple[Any, bytes]](), REQUEST_SECONDS + count / SLOWEST

    def work() -> None:
        try:
            response.set_result(request())
        except BaseException as error:
            response.set_exception(error)

    threading.Thread(target=work, name="rows-request", daemon=True).start()
    if not wait([response], seconds).done:
        problem = f"the server did not send {count} bytes in {seconds:.0f} s"
        raise ValueError(f"{file}: {problem}; try again, or download the file")
    return response.result()


def _request(file: RemoteFile, start: int, stop: int) -> tuple[Any, bytes]:
    request = urllib.request.Request(file.url, headers={"Range": f"bytes={start}-{stop - 1}"})
    for name, value in file.private:
        request.add_unredirected_header(name, value)  # a redirect leads to another host
    with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
        if response.status != 206:
            raise ValueError(f"{file}: the server does not support range requests; download the file")
        headers = response.headers
        span = _RANGE.fullmatch(headers.get("Content-Range", ""))
        if span is None:
            raise ValueError(f"{file}: the server sends no size; download the file")
        first, last, size = map(int, span.groups())
        if file.tag and (size != file.size or _tag(headers) != file.tag):
            problem = "the file changed while it was read; start again when it is complete, or download it"
            raise ValueError(f"{file}: {problem}")
        if first != start or last >= stop:
            problem = f"the server sends bytes {first}-{last} for {start}-{stop - 1}"
            raise ValueError(f"{file}: {problem}; download the file")
        content = response.read(stop - start + 1)
    if len(content) > stop - start:
        problem = f"the server sends more than the {stop - start} bytes that were requested"
        raise ValueError(f"{file}: {problem}; download the file")
    return headers, content


def _tag(headers: Any) -> str:
    """Return the ETag or the date of a response, "" without one."""
    return (headers.get("ETag") or headers.get("Last-Modified") or "").removeprefix("W/")


def remote_files(ref: str) -> list[RemoteFile]:
    """Return the Parquet files of a URL or of a hub dataset. Raises ValueError if there are none, or `ref` is
    not such a URL.
    """
    if "@" in ref.split("/")[2]:
        raise ValueError(f"data {ref!r} contains a user name or password, which jaxft never sends; remove it")
    if not ref.startswith("hf://"):
        if ref.endswith((f"?{SECRET_MARK}", f"#{SECRET_MARK}")):
            raise ValueError(f"data {ref!r}: runs store *** for the query of a URL; give the whole URL again")
        if OTHER_FILES.search(ref.partition("?")[0]):
            raise ValueError(f"data {ref!r}: only Parquet files are read behind a URL; download this file")
        return [_described(RemoteFile(ref, 0, ""))]
    match = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?", ref)
    if match is None:
        raise ValueError(f"data must be of the form hf://datasets/org/name[@revision][/pattern], got {ref!r}")
    repo, revision, pattern = match.groups()
    return _hub_files(ref, repo, revision, pattern or "*")


def _hub_files(ref: str, repo: str, revision: str | None, pattern: str) -> list[RemoteFile]:
    import huggingface_hub
    from huggingface_hub import utils

    api = huggingface_hub.HfApi()
    try:
        info = api.dataset_info(repo, revision=revision)
    except Exception as error:  # its errors have no common type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{ref}: not found on the hub ({reason}); check the name and the network") from error
    paths = sorted(file.rfilename for file in info.siblings or ())
    paths = [path for path in paths if path.endswith(".parquet")]
    chosen = [path for path in paths if fnmatch.fnmatch(path, pattern) or path.startswith(f"{pattern}/")]
    if not chosen:
        known = f"it has {', '.join(paths[:5])}" if paths else f"it has none: try data={repo}"
        raise ValueError(f"{ref}: no Parquet file of the dataset matches {pattern!r}; {known}")
    headers = utils.build_hf_headers()
    private = tuple((k, v) for k, v in headers.items() if k.lower() == "authorization")
    folder = f"{api.endpoint}/datasets/{repo}/resolve/{info.sha}"
    return [_described(RemoteFile(f"{folder}/{quote(path)}", 0, str(info.sha), private)) for path in chosen]


def _described(file: RemoteFile) -> RemoteFile:
    """Return the file with its size, its tag and, if it has none yet, its version."""
    headers, _ = _fetch(file, 0, 1)
    tag, size = _tag(headers), int(headers["Content-Range"].rpartition("/")[2])
    if not tag:
        raise ValueError(f"{file}: the server sends neither ETag nor date; download the file")
    return replace(file, size=size, tag=tag, version=file.version or tag)


def remote_batches(
    file: RemoteFile, used: Collection[str] | None = None
) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Yield record batches of a Parquet file, and the names of columns that are not in them. used: the names
    of columns that are read, None for all.
    """
    with file.open() as source, open_parquet(source, str(file), "check the URL") as parquet:
        for group in range(parquet.num_row_groups):  # a reader of several groups fetches all of them
            plan = plan_group(parquet, source, group, used, str(file))
            for batch in planned_batches(parquet, source, group, plan):
                yield batch, plan.others
