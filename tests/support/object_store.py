"""A server on 127.0.0.1 that answers as Amazon S3 and as Google Cloud Storage do, as far as TensorStore asks.

`with serve_objects() as store:` has store.address, store.objects ("bucket/key" -> bytes), store.requests, and
store.faults: "METHOD key" as a regular expression -> a status to answer with. Point AWS_ENDPOINT_URL or
TENSORSTORE_GCS_HTTP_URL to the address. There is one bucket, named "bucket".
"""

import hashlib
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from hub_server import served

BUCKET = "bucket"
PAGE = 100  # keys of a listing, so that longer ones have pages


@dataclass
class Objects:
    """What the server has, and what it was asked for."""

    address: str = ""
    objects: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    faults: dict = field(default_factory=dict)


def etag(content):
    return hashlib.md5(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    store: Objects

    def answer(self, status, content=b"", kind="application/xml", **headers):
        self.send_response(status)
        sent = {"Content-Type": kind, "Content-Length": str(len(content)), **headers}
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_request(self):
        url, body = urlsplit(self.path), self.body()
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        gcs = re.fullmatch(r"(?:/upload)?/storage/v1/b/([^/]+)/o(?:/(.*))?", url.path)
        bucket, _, key = url.path.lstrip("/").partition("/") if gcs is None else (gcs[1], "", gcs[2] or "")
        key = unquote(key) or query.get("name", "")
        line = f"{self.command} {key or query.get('prefix', '')}"
        self.store.requests.append(line)
        for pattern, status in self.store.faults.items():
            if re.fullmatch(pattern, line):
                return self.answer(status, b"<Error><Message>a fault</Message></Error>")
        if bucket != BUCKET:
            return self.answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
        if not key:
            first, last = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
            prefix = query.get("prefix", "")
            found = sorted(k for k in self.store.objects if k.startswith(prefix) and first <= k < last)
            found = [k for k in found if k > query.get("continuation-token", query.get("pageToken", ""))]
            following = found[PAGE - 1] if len(found) > PAGE else None
            return (self.list_s3 if gcs is None else self.list_gcs)(found[:PAGE], following)
        return (self.s3 if gcs is None else self.gcs)(key, body, query)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request

    def list_s3(self, page, following):
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.store.objects[key])}</Size>"
            f"<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag></Contents>"
            for key in page
        )
        token = f"<NextContinuationToken>{escape(following or '')}</NextContinuationToken>"
        text = (
            f'<?xml version="1.0"?><ListBucketResult><Name>{BUCKET}</Name><KeyCount>{len(page)}</KeyCount>'
            f"<IsTruncated>{str(bool(following)).lower()}</IsTruncated>{token}{entries}</ListBucketResult>"
        )
        self.answer(200, text.encode())

    def list_gcs(self, page, following):
        items = [self.described(key) for key in page]
        more = {"nextPageToken": following} if following else {}
        self.answer(
            200, json.dumps({"kind": "storage#objects", "items": items, **more}).encode(), "application/json"
        )

    def described(self, key):
        content = self.store.objects[key]
        number = str(int(etag(content)[:12], 16))
        return {"name": key, "bucket": BUCKET, "size": str(len(content)), "generation": number,
                "metageneration": "1", "updated": "2026-01-01T00:00:00.000Z",
                "timeCreated": "2026-01-01T00:00:00.000Z"}  # fmt: skip

    def content(self, key, headers):
        """Answer with an object, or the range of it that is asked for."""
        content = self.store.objects[key]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.answer(200, content, "application/octet-stream", **headers)
        start, stop = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        span = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        return self.answer(206, content[start:stop], "application/octet-stream", **headers, **span)

    def s3(self, key, body, query):
        expected, content = self.headers.get("If-Match"), self.store.objects.get(key)
        if expected and content is not None and expected != f'"{etag(content)}"':
            return self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        if self.command == "PUT":
            self.store.objects[key] = body
            return self.answer(200, ETag=f'"{etag(body)}"')
        if self.command == "DELETE":
            self.store.objects.pop(key, None)
            return self.answer(204)
        if key not in self.store.objects:
            return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        dated = {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        return self.content(key, {"ETag": f'"{etag(self.store.objects[key])}"', **dated})

    def gcs(self, key, body, query):
        if self.command == "POST":
            number = self.described(key)["generation"] if key in self.store.objects else "0"
            if query.get("ifGenerationMatch", number) != number:
                return self.answer(412, b"{}", "application/json")
            self.store.objects[key] = body
            return self.answer(200, json.dumps(self.described(key)).encode(), "application/json")
        if key not in self.store.objects:
            return self.answer(404, b"{}", "application/json")
        if self.command == "DELETE":
            del self.store.objects[key]
            return self.answer(204)
        number = self.described(key)["generation"]
        if query.get("alt") == "media":
            return self.content(key, {"x-goog-generation": number})
        return self.answer(200, json.dumps(self.described(key)).encode(), "application/json")

    def log_message(self, *args):
        pass


@contextmanager
def serve_objects():
    """Serve until the block ends."""
    store = Objects()
    with served(type("ObjectHandler", (Handler,), {"store": store})) as address:
        store.address = address
        yield store
