"""A server on 127.0.0.1 that takes uploads as the Hugging Face hub does, and serves what was uploaded.

`with serve_uploads() as hub:` has hub.address, hub.repos (name -> Repo), hub.requests, and hub.faults:
"METHOD /path" as a regular expression -> a status to answer with, or DROP to close the connection in the
middle of the request. HF_HUB_DISABLE_XET=1 makes huggingface_hub use the LFS protocol that it speaks.

To try `jaxft push` by hand: `python tests/support/hub_uploads.py` serves until Ctrl-C and prints what to set.
"""

import base64
import fnmatch
import hashlib
import json
import re
import secrets
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote

import yaml
from hub_server import served

DROP = "drop"
LFS = ("*.safetensors", "*.gguf", "*.png")
TOKENS = {"hf_writes": "write", "hf_reads": "read"}
# Of https://huggingface.co/docs/hub/repositories-licenses, those that the tests use.
LICENSES = ("apache-2.0", "mit", "llama3.1", "other", "unknown")
RELATIONS = ("adapter", "finetune", "quantized", "merge")


@dataclass
class Repo:
    """A repository: branches name a commit, and a commit's files are their contents by path."""

    private: bool
    branches: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)
    messages: list = field(default_factory=list)

    def commit(self, branch, files, message):
        """Add a commit to a branch; return its hash."""
        oid = secrets.token_hex(20)
        self.commits[oid], self.branches[branch] = dict(files), oid
        self.messages.append(message)
        return oid

    def files(self, revision="main"):
        """The contents by path, None for an unknown revision."""
        return self.commits.get(self.branches.get(revision, revision))


@dataclass
class Hub:
    """What the server has, and what it was asked for."""

    address: str = ""
    repos: dict = field(default_factory=dict)
    objects: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    faults: dict = field(default_factory=dict)


def card_errors(text):
    """What the hub would refuse in a card's metadata."""
    found = re.match(r"\A---\n(.*?)\n---\n", text, re.DOTALL)
    if found is None:
        return []
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [str(error)]
    names = data.get("base_model") or []
    names = [names] if isinstance(names, str) else names
    repos = [*names, *(data.get("datasets") or [])]
    errors = [f'"{name}" is not a repository' for name in repos if not re.fullmatch(r"[\w.-]+/[\w.-]+", name)]
    if data.get("license") not in LICENSES:
        errors.append(f'"license" must be one of {LICENSES}')
    if data.get("base_model_relation", "merge") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {RELATIONS}')
    tags = data.get("tags", [])
    return errors + ([] if all(isinstance(tag, str) for tag in tags) else ['"tags" must be strings'])


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(parts)

    def answer(self, status, value=None, code=None, headers=()):
        content = value if isinstance(value, bytes) else json.dumps({} if value is None else value).encode()
        self.send_response(status)
        sent = {"Content-Type": "application/json", "Content-Length": str(len(content)), **dict(headers)}
        for name, text in {**sent, **({"X-Error-Code": code} if code else {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_request(self):
        path = self.path.split("?")[0]
        line = f"{self.command} {path}"
        self.hub.requests.append(line)
        for pattern, fault in self.hub.faults.items():
            if re.fullmatch(pattern, line):
                if fault == DROP:
                    self.rfile.read(min(100, int(self.headers.get("Content-Length", 0))))
                    self.close_connection = True
                    return self.connection.shutdown(2)
                self.body()
                return self.answer(fault, {"error": f"fault {fault}"})
        body = self.body()
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            message = "Invalid credentials in Authorization header"
            return self.answer(401, {"error": message}, headers={"X-Error-Message": message})
        may = TOKENS.get(token, "")
        if path.startswith("/lfs/"):
            return self.store(path.removeprefix("/lfs/"), body)
        if self.command == "POST" and may != "write":
            return self.answer(403 if may else 401, {"error": "you may not write here"})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            errors = card_errors(json.loads(body)["content"])
            listed = [{"message": error} for error in errors]
            return self.answer(400 if errors else 200, {"errors": listed, "warnings": []})
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": "org", "auth": {"accessToken": {"role": may}}})
        named = re.match(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(\.git/info/lfs/objects/batch|/.*|)$", path)
        repo = self.hub.repos.get(named[1]) if named else None
        if repo is None or (repo.private and not may):
            return self.answer(404 if may else 401, code="RepoNotFound")
        return self.repository(named[1], repo, named[2], body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def store(self, oid, body):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "the content has another hash"})
        self.hub.objects[oid] = body
        return self.answer(200)

    def create(self, asked):
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            return self.answer(409, {"error": "You already created this model repo"})
        if asked["organization"] == "others":
            return self.answer(403, {"error": "no rights to create a model under this namespace"})
        self.hub.repos[name] = Repo(asked.get("private") is True or asked.get("visibility") == "private")
        self.hub.repos[name].commit("main", {".gitattributes": b""}, "initial commit")
        return self.answer(200, {"url": f"{self.hub.address}/{name}"})

    def repository(self, name, repo, rest, body):
        if rest.endswith("objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                if one["oid"] not in self.hub.objects:
                    one["actions"] = {"upload": {"href": f"{self.hub.address}/lfs/{one['oid']}"}}
            return self.answer(200, {"transfer": "basic", "objects": objects})
        word, revision, path = [unquote(part) for part in [*rest.strip("/").split("/", 2), "", ""][:3]]
        revision = revision or "main"
        if word == "branch":
            if revision in repo.branches:
                return self.answer(409, {"error": "Reference already exists"})
            repo.branches[revision] = repo.branches["main"]
            return self.answer(200)
        files = repo.files(revision)
        if files is None:
            return self.answer(404, code="RevisionNotFound")
        oid = repo.branches.get(revision, revision)
        if word in ("", "revision"):
            listed = [{"rfilename": path} for path in files]
            info = {"id": name, "modelId": name, "sha": oid, "private": repo.private, "siblings": listed}
            return self.answer(200, info | {"disabled": False, "gated": False, "tags": [], "downloads": 0})
        if word == "tree":
            listed = [{"path": path, "size": len(x), "oid": git_hash(x)} for path, x in files.items()]
            return self.answer(200, [{"type": "file", **one} for one in listed])
        if word == "resolve":
            if path not in files:
                return self.answer(404, code="EntryNotFound", headers={"X-Repo-Commit": oid})
            headers = {"ETag": f'"{git_hash(files[path])}"', "X-Repo-Commit": oid}
            return self.answer(200, files[path], headers=headers)
        if word == "preupload":
            modes = [self.mode(one["path"], files) for one in json.loads(body)["files"]]
            return self.answer(200, {"files": modes})
        if word == "commit":
            return self.commit(name, repo, revision, [json.loads(line) for line in body.splitlines()])
        return self.answer(404, {"error": f"no endpoint {word}"})

    def mode(self, path, files):
        lfs = any(fnmatch.fnmatch(path, pattern) for pattern in LFS)
        found = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        if path in files:
            found["oid"] = hashlib.sha256(files[path]).hexdigest() if lfs else git_hash(files[path])
        return found

    def commit(self, name, repo, branch, lines):
        header = lines[0]["value"]
        if header.get("parentCommit", repo.branches[branch]) != repo.branches[branch]:
            return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(repo.files(branch))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.answer(400, {"error": f"{value['path']}: its content was not uploaded"})
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                del files[value["path"]]
        oid = repo.commit(branch, files, header["summary"])
        url = f"{self.hub.address}/{name}/commit/{oid}"
        return self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def log_message(self, *args):
        pass


@contextmanager
def serve_uploads():
    """Serve until the block ends."""
    hub = Hub()
    with served(type("UploadHandler", (Handler,), {"hub": hub})) as address:
        hub.address = address
        yield hub


if __name__ == "__main__":
    with serve_uploads() as running, suppress(KeyboardInterrupt):
        print(f"export HF_ENDPOINT={running.address} HF_TOKEN=hf_writes HF_HUB_DISABLE_XET=1", flush=True)
        while True:
            time.sleep(1)
