"""Read Parquet files behind a URL, or of a dataset on the hub, over the network, without a copy on disk.

`https://host/rows.parquet` is one file. `hf://datasets/org/name[@revision][/pattern]` is all Parquet files of
a dataset whose paths match the pattern, such as data/train-*. The bytes of one row group are fetched at a
time, by HTTP range requests.
"""

import fnmatch
import io
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.parse import quote

ATTEMPTS = 4
OTHER_FILES = re.compile(r"\.(jsonl?|csv|tsv|txt|arrow|gz|zst|zip)$")
_TIMEOUT = 60  # seconds


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL.

    size: bytes. version: its ETag, date or commit, which changes with its content. private: headers that are
    sent to the URL's own host alone, such as the hub's token.
    """

    url: str
    size: int
    version: str
    private: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.url.split("?")[0].rpartition("/")[2]

    def __str__(self) -> str:
        return self.url

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
        found = _fetch(self.file, self.at, stop)[1]
        if len(found) != stop - self.at:
            raise OSError(f"{self.file}: the server sent {len(found)} bytes of {stop - self.at}; try again")
        buffer[: len(found)] = found
        self.at = stop
        return len(found)


def _fetch(file: RemoteFile, start: int, stop: int) -> tuple[Any, bytes]:
    """Return the headers of a response and the bytes from `start` to before `stop`."""
    for attempt in range(ATTEMPTS):
        request = urllib.request.Request(file.url, headers={"Range": f"bytes={start}-{stop - 1}"})
        for name, value in file.private:
            request.add_unredirected_header(name, value)  # a redirect leads to another host
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                if response.status != 206:
                    raise ValueError(f"{file}: the server does not support range requests; download the file")
                return response.headers, response.read()
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == ATTEMPTS - 1:
                raise ValueError(
                    f"{file}: the server refuses it ({error}); check the URL and your access"
                ) from error
        except (OSError, HTTPException) as error:
            if attempt == ATTEMPTS - 1:
                raise ValueError(f"{file}: cannot be fetched ({error}); try again") from error
        time.sleep(2**attempt / 2)
    raise AssertionError("unreachable")


def is_remote(ref: str) -> bool:
    """Whether `ref` is a URL of rows."""
    return ref.startswith(("https://", "http://", "hf://"))


def remote_files(ref: str) -> list[RemoteFile]:
    """Return the Parquet files of a URL or of a hub dataset. Raises ValueError if there are none."""
    if "@" in ref.split("/")[2]:
        raise ValueError(f"data {ref!r} contains a user name or password, which jaxft never sends; remove it")
    if not ref.startswith("hf://"):
        if OTHER_FILES.search(ref.partition("?")[0]):
            raise ValueError(f"data {ref!r}: only Parquet files are read behind a URL; download this file")
        return [_described(RemoteFile(ref, 0, ""))]
    found = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?", ref)
    if found is None:
        raise ValueError(f"data {ref!r} is not of the form hf://datasets/org/name[@revision][/pattern]")
    repo, revision, pattern = found.groups()
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
        known = f"it has {', '.join(paths[:5])}" if paths else "it has none"
        raise ValueError(f"{ref}: no Parquet file of the dataset matches {pattern!r}; {known}")
    headers = utils.build_hf_headers()
    private = tuple((k, v) for k, v in headers.items() if k.lower() == "authorization")
    folder = f"{api.endpoint}/datasets/{repo}/resolve/{info.sha}"
    return [_described(RemoteFile(f"{folder}/{quote(path)}", 0, str(info.sha), private)) for path in chosen]


def _described(file: RemoteFile) -> RemoteFile:
    """Return the file with its size and, if it has none yet, its version."""
    headers, _ = _fetch(file, 0, 1)
    version = file.version or headers.get("ETag") or headers.get("Last-Modified")
    size = headers.get("Content-Range", "").rpartition("/")[2]
    if not size.isdigit() or not version:
        raise ValueError(f"{file}: the server sends no size, or neither ETag nor date; download the file")
    return RemoteFile(file.url, int(size), version, file.private)


def remote_batches(file: RemoteFile, window: int) -> Iterator[Any]:
    """Yield the record batches of a Parquet file, of at most `window` rows each."""
    import pyarrow.parquet

    try:
        with file.open() as source, pyarrow.parquet.ParquetFile(source) as parquet:
            for group in range(
                parquet.num_row_groups
            ):  # one by one, because a reader of several groups fetches all of them
                yield from parquet.iter_batches(window, row_groups=[group])
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file}: not a readable Parquet file ({reason}); check the URL") from error
