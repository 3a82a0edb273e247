"""A server on 127.0.0.1 that answers as the Hugging Face hub does, for one repository with two revisions.

`with serve(folder, repo) as (endpoint, requests):` serves the folder's files as revision "main" and as the
tag "v1"; requests is the list of paths that were asked for.
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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
