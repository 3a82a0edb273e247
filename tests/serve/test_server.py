"""The server on loopback: OpenAI's own client, concurrent streams, fuzzed requests, clients that leave."""

import concurrent.futures
import copy
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace

import pytest
import tiny_served as tiny
import tiny_tokenizers
from running_server import CHAT, MESSAGES, Running, openai
from scripts_in_process import SCRIPTS, call
from tiny_llama import tiny_torch, write_folder
from tokenizers import Regex, normalizers

from jaxft.engine.sampling import Sampling
from jaxft.engine.session import RequestSettings
from jaxft.serve import server
from jaxft.serve.served_models import chat_prompt, text_prompt
from jaxft.serve.server import ServerLimits


@pytest.fixture(scope="module")
def running():
    started = Running()
    yield started
    started.close()
    assert not started.lines


def expected_text(scheduler, seed, adapter=0, prompt=None, **options):
    """What the scheduler makes of the messages."""
    ids = prompt or chat_prompt(tiny.models()["base"], MESSAGES)
    choice = RequestSettings(Sampling(**{"max_new": 12, **options}), tiny.STOP, adapter)
    request = tiny.TokenRequest(ids, choice, seed)
    return tiny.text_of(tiny.complete(scheduler, [request])[0].ids)


def test_a_chat_completion_streamed_and_whole_is_that_of_the_seed(running):
    client = running.client()
    asked = dict(model="polite", messages=MESSAGES, max_tokens=12, temperature=0.9, top_p=0.8, seed=5)
    whole = client.chat.completions.create(**asked)
    text = expected_text(running.scheduler, 5, 1, temperature=0.9, top_p=0.8)
    assert whole.choices[0].message.content == text and text
    assert whole.choices[0].finish_reason in ("stop", "length") and whole.model == "polite"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.usage.prompt_tokens == len(chat_prompt(tiny.models()["base"], MESSAGES))
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == text and chunks[-1].usage == whole.usage
    assert [c.choices[0].delta.role for c in chunks if c.choices][0] == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert client.chat.completions.create(**{**asked, "model": "base"}).choices[0].message.content != text


def test_completions_of_several_prompts_and_choices_with_log_probs(running):
    response = running.client().completions.create(
        model="base", prompt=["the rank", [5, 6, 7]], n=2, max_tokens=4, temperature=0.0, logprobs=3, seed=0
    )
    assert [choice.index for choice in response.choices] == [0, 1, 2, 3]
    assert response.choices[0].text == response.choices[1].text
    assert response.choices[2].text == expected_text(running.scheduler, 0, 0, (5, 6, 7), max_new=4)
    logprobs = response.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) >= 2
    assert all(max(top.values()) == logp for top, logp in zip(logprobs.top_logprobs, logprobs.token_logprobs))
    random = running.client().completions.create(
        model="base", prompt="the rank", max_tokens=12, temperature=2.0, logprobs=2, seed=1
    )
    logprobs = random.choices[0].logprobs
    assert all(
        top[t] >= p for t, top, p in zip(logprobs.tokens, logprobs.top_logprobs, logprobs.token_logprobs)
    )
    assert {len(top) for top in logprobs.top_logprobs} >= {3}  # the sampled one is among them too
    assert response.usage.completion_tokens == sum(len(choice.logprobs.tokens) for choice in response.choices)
    assert response.usage.prompt_tokens == 3 + len(text_prompt(tiny.models()["base"], "the rank"))
    chat = running.client().chat.completions.create(
        model="base", messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2, temperature=0
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == chat.usage.completion_tokens
    assert all(
        t.top_logprobs[0].token == t.token and t.logprob <= 0 and len(t.top_logprobs) == 2 for t in content
    )


def test_a_stop_string_ends_the_text_before_it(running):
    text = expected_text(running.scheduler, 1, temperature=1.0, max_new=24)
    stop = text[len(text) // 2 :][:3]
    asked = dict(model="base", messages=MESSAGES, max_tokens=24, temperature=1.0, seed=1, stop=[stop])
    response = running.client().chat.completions.create(**asked)
    assert response.choices[0].message.content == text.partition(stop)[0]
    assert response.choices[0].finish_reason == "stop" and response.usage.completion_tokens <= 24
    pieces = [
        c.choices[0].delta.content or ""
        for c in running.client().chat.completions.create(**asked, stream=True)
    ]
    assert "".join(pieces) == text.partition(stop)[0]
    running.idle()


def test_tokens_have_the_bytes_and_the_places_of_the_text(running):
    """Also parts of characters, and while text is held back that may begin a stop string."""
    client, asked = running.client(), dict(model="base", max_tokens=24, temperature=1.5, seed=3)
    chat = client.chat.completions.create(**asked, messages=MESSAGES, logprobs=True, top_logprobs=2)
    content = chat.choices[0].logprobs.content
    added = b"".join(bytes(token.bytes) for token in content if token.bytes is not None)
    assert "\ufffd" in "".join(token.token for token in content)
    assert added.decode(errors="replace") == chat.choices[0].message.content
    whole = client.completions.create(**asked, prompt="the rank", logprobs=0)
    text, places = whole.choices[0].text, whole.choices[0].logprobs
    stop = text[len(text) // 2 :][:2] + "never"
    chunks = client.completions.create(**asked, prompt="the rank", logprobs=0, stop=[stop], stream=True)
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(part.text for part in parts) == text
    assert sum((part.logprobs.text_offset for part in parts), []) == places.text_offset
    assert all(
        text.startswith(token, at)
        for token, at in zip(places.tokens, places.text_offset, strict=True)
        if "\ufffd" not in token and token not in tiny.TOKENIZER.all_special_tokens
    )


def test_32_concurrent_streams_have_their_own_text(running):
    def streamed(i):
        stream = running.client().chat.completions.create(
            model=("base", "polite", "terse")[i % 3], messages=[{"role": "user", "content": f"question {i}"}],
            max_tokens=20, temperature=(0.0, 1.0)[i % 2], seed=i, stream=True,
        )  # fmt: skip
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        together = list(pool.map(streamed, range(32)))
    assert together == [streamed(i) for i in range(32)] and len(set(together)) > 25


def test_models_page_and_health(running):
    client = running.client()
    assert [model.id for model in client.models.list()] == ["base", "polite", "terse"]
    assert client.models.retrieve("terse").id == "terse"
    status, page, headers = running.send("GET", "/")
    assert status == 200 and "<title>jaxft chat</title>" in page and "src=" not in page
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert running.send("GET", "/health")[1]["status"] == "ok"


REFUSED = [  # method, path, body, headers, status, word
    ("POST", CHAT, {"messages": MESSAGES, "model": "nobody"}, {}, 404, "polite"),
    ("POST", CHAT, {"messages": [*MESSAGES, {"role": "assistant", "content": "a"}]}, {}, 400, "last message"),
    ("POST", CHAT, {"messages": [{"role": "wizard", "content": "a"}]}, {}, 400, "wizard"),
    ("POST", CHAT, {"messages": [{"role": "user", "content": ""}]}, {}, 400, "empty"),
    ("POST", CHAT, {"messages": [{"role": "user", "content": "a b " * 200}]}, {}, 400, "128"),
    ("POST", CHAT, {"messages": MESSAGES, "max_tokens": 25}, {}, 400, "24"),
    ("POST", CHAT, {"messages": []}, {}, 400, "messages is empty; give"),
    ("POST", CHAT, {}, {}, 400, "messages is missing; give"),
    ("POST", CHAT, b"{", {}, 400, "JSON"),
    ("POST", CHAT, {"messages": MESSAGES}, {"Content-Type": "text/plain"}, 415, "application/json"),
    ("POST", CHAT, b"[" + b"1," * 600_000 + b"1]", {}, 413, "--max-body"),
    ("POST", "/v1/completions", {"prompt": [9999]}, {}, 400, "9999"),
    ("POST", "/v1/completions", {"prompt": ""}, {}, 400, "empty"),
    ("POST", "/v1/embeddings", {"input": "a"}, {}, 404, "/v1/completions"),
    ("GET", CHAT, None, {}, 405, "/v1/completions"),
    ("GET", "/v1/models/nobody", None, {}, 404, "polite"),
    ("GET", "/v1/models", None, {"Host": "evil.example"}, 403, "evil.example"),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "word"), REFUSED, ids=lambda x: str(x)[:20]
)
def test_a_wrong_request_is_refused_in_one_line(running, method, path, body, headers, status, word):
    got, reply, _ = running.send(method, path, body, headers)
    message = reply["error"]["message"]
    assert got == status and word in message and "\n" not in message and len(message) <= 500
    assert reply["error"]["param"] == ("max_tokens" if word == "24" else reply["error"]["param"])


def test_fuzzed_requests_get_a_status_and_one_line(running):
    rng, valid = (
        random.Random(0),
        {"model": "base", "messages": MESSAGES, "max_tokens": 1, "temperature": 0.5},
    )
    values = [
        None,
        True,
        -1,
        0,
        1,
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
        MESSAGES,
    ]
    names = [
        *valid,
        "stop",
        "n",
        "seed",
        "tools",
        "stream",
        "logprobs",
        "prompt",
        "role",
        "top_p",
        "zzz",
        "chat_template_kwargs",
    ]
    for _ in range(500):
        body = json.dumps(
            {**valid, **{rng.choice(names): rng.choice(values) for _ in range(rng.randint(1, 3))}}
        ).encode()
        if rng.random() < 0.3:
            at = rng.randrange(len(body))
            body = body[:at] + rng.randbytes(rng.randint(0, 3)) + body[at + rng.randint(0, 3) :]
        status, reply, _ = running.send("POST", rng.choice([CHAT, "/v1/completions"]), body)
        assert status in (200, 400, 404), (status, body)
        if status != 200:
            assert "\n" not in reply["error"]["message"] and len(reply["error"]["message"]) <= 500
    running.idle()
    assert running.send("GET", "/health")[1]["failures"] == 0


def test_tools_and_arguments_reach_the_template(running):
    template = (
        "{% if tools %}{{ tools | length }} tools {{ mood }}{% endif %}"
        "{% for m in messages %}{{ m['role'] + ':' + (m['content'] or '') + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = tiny_tokenizers.tiny.__wrapped__("chatml")
    tokenizer.chat_template = template
    model = tiny.models(tokenizer)["base"]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages.append({"role": "tool", "tool_call_id": "1", "content": "5"})
    ids = chat_prompt(model, messages, [tool, tool], {"mood": "calm"})
    assert tokenizer.decode(ids) == "2 tools calmuser:what is a rank?\nassistant:\ntool:5\nassistant:"


def test_a_client_that_leaves_frees_its_row(running):
    gate = tiny.Gate()
    body = json.dumps(
        {"messages": MESSAGES, "max_tokens": 24, "temperature": 0, "stream": True, "n": 4}
    ).encode()
    plain = body.replace(b"true", b"false")
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    before = running.scheduler.load().finished
    blocked = tiny.Collected()
    running.scheduler.submit([(tiny.request([1], max_new=2), gate(blocked))])  # holds the device
    for data in (body, plain):
        assert gate.holds.wait(60)
        with socket.create_connection(("127.0.0.1", running.port)) as sock:
            sock.sendall(f"{head}{len(data)}\r\n\r\n".encode() + data)
            deadline = time.monotonic() + 60
            while running.scheduler.load().waiting < 4:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        while not all(t.cancelled.is_set() for t in running.scheduler.waiting):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        gate.open.set()
        running.idle()
        gate.open.clear()
        gate.holds.clear()
        running.scheduler.submit([(tiny.request([1], max_new=2), gate(tiny.Collected()))])
    gate.open.set()
    running.idle()
    assert running.scheduler.load().finished - before <= 3  # none of the eight choices began


def test_a_full_queue_is_status_429_and_a_key_is_needed_where_there_is_one():
    started, gate = Running(queue=1, limits=ServerLimits(key="secret")), tiny.Gate()
    try:
        started.scheduler.submit([(tiny.request([1], max_new=2), gate(tiny.Collected())) for _ in range(5)])
        with pytest.raises(openai.RateLimitError, match="queue of 1 requests"):
            started.client("secret").chat.completions.create(model="base", messages=MESSAGES)
        key = {"Authorization": "Bearer secret"}
        assert started.send("POST", CHAT, {"messages": MESSAGES}, key)[2]["Retry-After"] == "1"
        for wrong in ("other", "secret "):
            with pytest.raises(openai.AuthenticationError, match="API key"):
                started.client(wrong.strip() + "x").models.list()
        assert started.send("GET", "/health")[0] == started.send("GET", "/")[0] == 200
    finally:
        gate.open.set()
        started.close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", started.port), timeout=2)


def is_lost(error):
    """Whether a client's error is one of its connection or of the server."""
    return error is not None and type(error).__module__.partition(".")[0] in ("openai", "httpx", "httpx2")


@pytest.mark.parametrize("grace", [5, 1])
def test_a_stop_finishes_the_requests_in_flight_within_the_grace(grace):
    """Six streams for four rows: two of them have not begun when the server is stopped."""
    started, gate = Running(grace=grace), tiny.Gate()
    expected = [expected_text(started.scheduler, seed, temperature=1.0, max_new=24) for seed in range(6)]
    started.scheduler.submit([(tiny.request([1], max_new=2), gate(tiny.Collected()))])  # holds the device
    assert gate.holds.wait(60)
    texts, deadline = started.streams(6), time.monotonic() + 60
    while started.scheduler.load().waiting < 6:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.uvicorn.should_exit = True
    if grace > 1:
        time.sleep(0.2)
        gate.open.set()
        assert [text.result(30) for text in texts] == expected
    else:
        for text in texts:  # every client gets to know, within the grace
            assert is_lost(text.exception(10))
        gate.open.set()
    started.close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", started.port), timeout=2)


def half(running, text=b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "):
    """A connection with half a request."""
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=20)
    connection.sendall(text)
    return connection


def received(connection):
    """(status, error message) of the response after which the server closes a connection."""
    data = b""
    with connection:
        while part := connection.recv(65536):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


def test_700_half_open_connections_keep_no_client_out(running):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 3000:
        pytest.skip(f"1,400 sockets need more files than the hard limit of {before[1]}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 3000), before[1]))
    try:
        idle = [half(running) for _ in range(700)]
        begin = time.monotonic()
        assert running.send("GET", "/v1/models")[0] == 200 and time.monotonic() - begin < 60
        status, message = received(idle[0])
        assert status == 408 and "no complete header within" in message
        for connection in idle:
            connection.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_header_has_a_time_limit_also_after_a_response(running, monkeypatch):
    monkeypatch.setattr(server, "HEADER_SECONDS", 1.0)
    assert received(half(running))[0] == 408
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        response = b""
        while not response.endswith(b"}"):  # head and body may come one after the other
            response += connection.recv(65536)
        assert response.startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /health HT")
        assert b"408" in connection.recv(65536).splitlines()[0]
    silent = half(running, b"")
    assert not silent.recv(10)  # nothing was asked, so nothing is answered
    silent.close()


SLOW_BODY = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: 500\r\n\r\n{"
)


def test_requests_above_the_limit_get_json_and_a_stop_ends_slow_ones_without_a_traceback(monkeypatch, caplog):
    monkeypatch.setattr(server, "SPARE_REQUESTS", -2 - tiny.SIZES.rows)  # two at once, with queue=4
    started = Running(queue=4, grace=1)
    slow = [half(started, SLOW_BODY) for _ in range(2)]
    deadline = time.monotonic() + 60
    while (reply := started.send("GET", "/health"))[0] == 200 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert reply[0] == 503 and "2 requests at once" in reply[1]["error"]["message"]
    started.close()
    assert [received(connection) for connection in slow] == [(503, "the server is stopping")] * 2
    assert not any(record.exc_info for record in caplog.records)


def test_slow_bodies_keep_no_client_out(running, monkeypatch):
    monkeypatch.setattr(server, "MOST_WAITING", 3)
    monkeypatch.setattr(server, "HEADER_SECONDS", 1.0)  # after which a connection with an error is closed
    slow = [half(running, SLOW_BODY) for _ in range(5)]
    for connection in slow[:2]:
        status, message = received(connection)
        assert status == 408 and "more than 3 bodies" in message
    assert running.send("GET", "/health")[0] == 200
    for connection in slow[2:]:
        connection.close()


def test_of_a_text_that_is_too_long_only_the_beginning_is_tokenised(running, monkeypatch):
    text, lengths = "a" * 100_000, []
    tokenised = type(tiny.TOKENIZER).__call__

    def measured(self, texts, **options):
        lengths.append(max(map(len, texts)))
        return tokenised(self, texts, **options)

    monkeypatch.setattr(type(tiny.TOKENIZER), "__call__", measured)
    for path, body in (
        ("/v1/completions", {"prompt": text}),
        (CHAT, {"messages": [{"role": "user", "content": text}]}),
    ):
        status, reply, _ = running.send("POST", path, body)
        assert status == 400 and "longer than the 128 tokens of this server" in reply["error"]["message"]
    assert 0 < max(lengths) < 10_000


def test_a_long_text_that_the_tokenizer_shortens_is_a_prompt():
    """Its normalizer makes one space of many."""
    tokenizer = copy.deepcopy(tiny.TOKENIZER)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(" +"), " ")
    model = replace(tiny.models()["base"], tokenizer=tokenizer)
    assert text_prompt(model, f"a{' ' * 100_000}b", most=8) == text_prompt(model, "a b")


def test_an_address_in_use_is_one_line():
    sock = server.bound_socket("127.0.0.1", 0)
    sock.listen()
    port = sock.getsockname()[1]
    with pytest.raises(OSError, match=f"127.0.0.1:{port} .*another --port"):
        server.bound_socket("127.0.0.1", port)
    sock.close()


# The script


BAD_LINES = {
    "--host 0.0.0.0": (2, "JAXFT_API_KEY"),
    "--port 70000": (2, "argument --port: expected from 0 to 2^16 - 1, got 70000"),
    "--rows 0": (2, "--rows"),
    "--max-prompt 0 --port 0": (2, "--max-prompt"),
    "--run nowhere --port 0": (1, "nowhere"),
    "--model nowhere/at/all --port 0": (1, "nowhere"),
    "--adapter nowhere --port 0": (1, "nowhere"),
    "--run a --run a --port 0": (1, "a"),
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_wrong_command_line_is_one_line(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(server.KEY_VARIABLE, raising=False)
    code, out, err = call(monkeypatch, capsys, "serve", *line.split())
    expected, word = BAD_LINES[line]
    *notes, last = err.splitlines()
    assert code == expected and not out and word in last and last.startswith("error: ")
    assert all(note.startswith("loading") for note in notes)


@pytest.mark.slow
def test_the_command_serves_stops_on_sigterm_and_starts_again_after_a_kill(tmp_path):
    write_folder(tmp_path / "base", tiny_torch())
    port = server.bound_socket("127.0.0.1", 0).getsockname()[1]
    command = [sys.executable, str(SCRIPTS / "serve.py"), "--model", "base", "--port", str(port)]
    command += ["--dtype", "float32"]
    command += ["--max-prompt", "64", "--max-new", "160", "--rows", "2"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    texts = []
    for ending, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0), (signal.SIGINT, 0)):
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        line = ""
        while "serving base at http://127.0.0.1:" not in line:
            line = process.stderr.readline()
            assert line, process.wait()
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        asked = dict(model="base", prompt="what is a rank?", seed=3, max_tokens=160, temperature=1.0)
        texts.append(client.completions.create(**asked).choices[0].text)

        def streamed(asked, client):
            chunks = client.completions.create(**asked, stream=True)
            return "".join(chunk.choices[0].text for chunk in chunks)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:  # four times as many as rows
            streams = [pool.submit(streamed, asked, client) for _ in range(8)]
            deadline, busy = time.monotonic() + 60, 0
            while busy < 5:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as response:
                    load = json.load(response)
                busy = load["running"] + load["waiting"]
                assert time.monotonic() < deadline
            process.send_signal(ending)
            for stream in streams:
                if code == 0:  # all requests in flight are finished
                    assert stream.result(60) == texts[0]
                else:
                    assert stream.exception(60) is None or is_lost(stream.exception())
            assert code == 0 or any(stream.exception() for stream in streams)
        assert process.wait(60) == code
    assert len(set(texts)) == 1
