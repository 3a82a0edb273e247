"""Objects in stores, gs://bucket/path or s3://bucket/path, through TensorStore.

Credentials come from the clouds' own tools: GOOGLE_APPLICATION_CREDENTIALS or gcloud's for gs://, AWS_*
variables or ~/.aws for s3://. AWS_ENDPOINT_URL is the address of another store with the interface of S3.
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorstore

URL = re.compile(r"(gs|s3)://([a-z0-9][a-z0-9._-]{1,61}[a-z0-9])(?:/([\w.=/-]*))?")
SENT_AT_ONCE = 256 << 20  # of files that are sent at a time; each is in memory
RETRIES = {"max_retries": 6, "initial_delay": "500ms", "max_delay": "8s"}


class StoreError(OSError):
    """A store that does not respond, or refuses a request."""


@dataclass(frozen=True)
class Store:
    """A folder in an object store. Names are paths in it; an object appears as a whole or not at all.

    Every method raises StoreError, with the address and the reason in one line, if the store does not
    respond.
    """

    url: str
    kv: tensorstore.KvStore

    def names(self, folder: str = "") -> list[str]:
        """Return the names of all objects in a folder of the store; "" is all of it."""
        keys = self._call(lambda: self.kv.list(_keys_in(folder)).result())
        return sorted(key.decode() for key in keys)

    def read(self, name: str) -> bytes | None:
        """Return an object's content, None if it does not exist."""
        result = self._call(lambda: self.kv.read(name).result())
        return result.value if result.state == "value" else None

    def write(self, name: str, content: bytes) -> None:
        """Write an object, in place of an earlier one."""
        self._call(lambda: self.kv.write(name, content).result())

    def write_files(self, files: Iterable[tuple[str, Path]]) -> None:
        """Write (name, path) pairs: the content of each path as the object `name`. Up to SENT_AT_ONCE bytes
        are sent at a time.
        """
        writing: list[Any] = []
        size = 0
        for name, path in files:
            content = path.read_bytes()
            if size and size + len(content) > SENT_AT_ONCE:
                self._wait(writing)
                writing, size = [], 0
            writing.append(self.kv.write(name, content))
            size += len(content)
        self._wait(writing)

    def delete(self, name: str) -> None:
        """Delete an object, or all objects in a folder if the name ends in a slash."""
        if name.endswith("/"):
            self._call(lambda: self.kv.delete_range(_keys_in(name)).result())
        else:
            self._call(lambda: self.kv.write(name, None).result())

    def _wait(self, writing: list[Any]) -> None:
        self._call(lambda: [write.result() for write in writing])

    def _call(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # TensorStore's, which have no common type
            reason = " ".join(str(error).split(" [")[0].split())[:300]
            raise StoreError(
                f"{self.url}: {reason or type(error).__name__}; check network, address and credentials"
            ) from error


def _keys_in(folder: str) -> tensorstore.KvStore.KeyRange:
    """Return the range of keys in a folder, whose name ends in a slash; all keys for ""."""
    return tensorstore.KvStore.KeyRange(folder, folder and f"{folder[:-1]}0")  # 0 comes after the slash


def check_store_url(url: str, name: str) -> None:
    """Raise ValueError if `url`, the value of the setting `name`, is not a folder in an object store."""
    match = URL.fullmatch(url)
    if match is None or ".." in url or "//" in (match[3] or ""):
        raise ValueError(f"{name}={url} is not a folder in an object store; use gs://bucket/path or s3://...")


def check_stored_name(name: str, store: str | None) -> None:
    """Raise ValueError if a run called `name` cannot have a folder in loop.store=`store` (None: no store)."""
    if store is not None and URL.fullmatch(f"{store.rstrip('/')}/{name}") is None:
        raise ValueError(
            f"name={name} cannot be a folder in loop.store={store}; use letters, digits, and . _ - = only"
        )


def open_store(url: str) -> Store:
    """Open a folder in an object store; nothing is read yet.

    Raises ValueError for an address of another form, and OSError for credentials that cannot be read.
    """
    check_store_url(url, "store")
    match = URL.fullmatch(url)
    assert match is not None
    path = f"{match[3].strip('/')}/" if match[3] else ""
    spec: dict[str, Any] = {"driver": "gcs" if match[1] == "gs" else "s3", "bucket": match[2], "path": path}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if match[1] == "s3" and endpoint:
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif match[1] == "s3" and region:
        spec |= {"aws_region": region}
    if match[1] == "s3" and os.environ.get("AWS_ACCESS_KEY_ID"):  # else AWS logs that there are no profiles
        spec |= {"aws_credentials": {"type": "environment"}}
    context = tensorstore.Context({"gcs_request_retries": RETRIES, "s3_request_retries": RETRIES})
    try:
        return Store(url.rstrip("/"), tensorstore.KvStore.open(spec, context=context).result())
    except Exception as error:
        reason = " ".join(str(error).split(" [")[0].split())[:300]
        raise OSError(
            f"{url}: {reason}; check the credentials ({'gcloud' if match[1] == 'gs' else 'AWS_*'})"
        ) from error
