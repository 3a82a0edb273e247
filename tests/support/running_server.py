"""The server over the tiny model, in a thread of this process, with clients.

Without openai and uvicorn, tests that import it are skipped.
"""

import concurrent.futures
import http.client
import json
import threading
import time

import pytest
import tiny_served as tiny

from jaxft.serve import server
from jaxft.serve.server import ServerLimits

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "what is a rank?"}]


class Running:
    """A server in a thread of this process."""

    def __init__(self, queue=64, limits=ServerLimits(), models=None, grace=5):  # noqa: B008  a frozen dataclass
        self.scheduler, self.lines = tiny.scheduler(queue)
        app = server.make_app(self.scheduler, models or tiny.models(), limits)
        sock = server.bound_socket("127.0.0.1", 0)
        self.port = sock.getsockname()[1]
        self.uvicorn = uvicorn.Server(server.uvicorn_config(app, grace))
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [sock]})
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)

    def client(self, key="none"):
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0)

    def send(self, method, path, body=None, headers=None):
        """(status, object or text, headers) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = response.headers.get("content-type") == "application/json"
        return response.status, json.loads(text) if is_json else text, response.headers

    def idle(self):
        """Wait until no row is in use."""
        deadline = time.monotonic() + 20
        while (load := self.scheduler.load()).running or load.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def streams(self, count, **options):
        """Start `count` streamed completions, each in a thread; return a future of the text of each."""

        def streamed(seed):
            asked = dict(
                model="base", messages=MESSAGES, seed=seed, temperature=1.0, max_tokens=24, stream=True
            )
            stream = self.client().chat.completions.create(**{**asked, **options})
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

        pool = concurrent.futures.ThreadPoolExecutor(count)
        futures = [pool.submit(streamed, seed) for seed in range(count)]
        pool.shutdown(wait=False)
        return futures

    def close(self):
        self.uvicorn.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive() and not self.scheduler.thread.is_alive()
