"""A server on 127.0.0.1 that answers as the Hugging Face hub does, for one repository with two revisions.

`with serve(folder, repo) as (endpoint, requests):` serves the folder's files as revision "main" and as the
tag "v1"; requests is the list of paths that were asked for.

`with serve_dataset(folder, repo) as (endpoint, sent):` serves a dataset whose files are redirected to another
path, as to a content network, and sent in ranges; sent is the list of (path, authorization, bytes).
"""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REVISIONS = {"main": "a" * 40, "v1": "b" * 40}


def _answer(folder: Path, repo: str, path: str):
    """(status, headers, body) of a request path."""
    commits = {**REVISIONS, **{commit: commit for commit in REVISIONS.values()}}
    path = path.split("?")[0]
    if path.startswith(f"/api/models/{repo}"):
        rest = path.removeprefix(f"/api/models/{repo}").strip("/").split("/")
        revision = rest[1] if rest[0] == "revision" else "main"
        if revision not in commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = sorted(p.name for p in folder.iterdir())
        if rest[0] == "tree" or (len(rest) > 2 and rest[2] == "tree"):
            listing = [
                {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": _etag(folder / f)}
                for f in files
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(listing).encode()
        info = {
            "id": repo,
            "modelId": repo,
            "sha": commits[revision],
            "siblings": [{"rfilename": f} for f in files],
        }
        info |= {"private": False, "disabled": False, "gated": False, "downloads": 0, "likes": 0, "tags": []}
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
    if path.startswith(f"/{repo}/resolve/"):
        revision, name = path.removeprefix(f"/{repo}/resolve/").split("/", 1)
        if revision not in commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if not (folder / name).is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commits[revision]}, b""
        headers = {"ETag": f'"{_etag(folder / name)}"', "X-Repo-Commit": commits[revision]}
        return 200, headers, (folder / name).read_bytes()
    return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def served(handler):
    """Serve a request handler on a free port of this machine; yields the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serve(folder: Path, repo: str):
    """Serve until the block ends."""
    requests: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            status, headers, body = _answer(folder, repo, self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with served(Hub) as address:
        yield address, requests


@contextmanager
def serve_dataset(folder: Path, repo: str):
    """Serve until the block ends."""
    sent: list[tuple[str, str | None, int]] = []
    sha = REVISIONS["main"]
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    info = {"id": repo, "sha": sha, "siblings": [{"rfilename": name} for name in files]}
    info |= {"private": False, "disabled": False, "gated": False, "downloads": 0, "likes": 0, "tags": []}

    class Hub(BaseHTTPRequestHandler):
        def answer(self, status, headers, body=b""):
            sent.append((self.path, self.headers["Authorization"], len(body)))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            resolve = f"/datasets/{repo}/resolve/{sha}/"
            file = folder / self.path.split("?")[0].removeprefix("/content/")
            if self.path.split("?")[0] == f"/api/datasets/{repo}":
                self.answer(200, {"Content-Type": "application/json"}, json.dumps(info).encode())
            elif self.path.startswith(resolve):
                self.answer(302, {"Location": f"/content/{self.path.removeprefix(resolve)}"})
            elif self.path.startswith("/content/") and file.is_file():
                body = file.read_bytes()
                start, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
                part = body[int(start) : int(end) + 1]
                span = f"bytes {start}-{int(start) + len(part) - 1}/{len(body)}"
                self.answer(206, {"Content-Range": span, "ETag": '"x"'}, part)
            else:
                self.answer(404, {"X-Error-Code": "RepoNotFound"})

        def log_message(self, *args):
            pass

    with served(Hub) as address:
        yield address, sent
