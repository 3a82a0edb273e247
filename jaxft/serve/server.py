"""An HTTP server for OpenAI's API over the scheduler, as a Starlette application.

/v1/chat/completions, /v1/completions, /v1/decisions and /v1/models, Jina's and Cohere's /v1/rerank, a chat
page at /, and /health. Starlette is imported where the application is made: it comes with the extra `serve`.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import re
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from jaxft.annotations import at_least, check_bounds
from jaxft.data.rows.example import Decision
from jaxft.data.rows.shipped import own_commands
from jaxft.engine.scheduler import STOPPING, NewTokens, QueueFull, Scheduler, Stopped
from jaxft.serve.constraint import Grammar, call_grammar, compile_grammar, either, json_grammar
from jaxft.serve.decisions_api import (
    answer,
    parse_decisions,
    parse_rerank,
    probabilities_of,
    ranked,
    read_of,
    response,
)
from jaxft.serve.generation import Generation, submit_choices
from jaxft.serve.openai_api import (
    ApiError,
    ChatBody,
    CompletionBody,
    Envelope,
    chunk_choice,
    functions_of,
    joined,
    model_name,
    parse_chat,
    parse_completion,
    parse_json,
    usage_of,
    whole_choice,
)
from jaxft.serve.served_models import ServedModel, chat_prompt, text_prompt, token_prompt

PAGE = Path(__file__).with_name("chat_page.html")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
BODY_SECONDS = 30.0
HEADER_SECONDS = 10.0  # for the header of a request, and between requests
MOST_WAITING = 256  # connections without a request, and bodies that arrive; one more ends the oldest
SPARE_REQUESTS = 512  # at once, in addition to accepted ones: from clients that get status 429
KEY_VARIABLE = "JAXFT_API_KEY"


@dataclass(frozen=True)
class ServerLimits:
    """Limits of requests. key: the API key that clients must send, "" for none. body: the most bytes of a
    request's body. hosts: allowed names in the Host header, () for any.
    """

    key: str = ""
    body: Annotated[int, at_least(1)] = 1 << 20
    hosts: tuple[str, ...] = LOOPBACK

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class Service:
    """The state of the server. models: by name, the default one first; all use one scheduler. created: time
    of the start in Unix seconds. arriving: time-outs of the request bodies that are arriving now.
    """

    scheduler: Scheduler
    models: Mapping[str, ServedModel]
    limits: ServerLimits
    created: int
    arriving: dict[asyncio.Timeout, None] = field(default_factory=dict)  # of bodies, the oldest first

    def model(self, name: str | None) -> ServedModel:
        """Return the model of this name, the default one for None. Raises ApiError if there is none."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            available = ", ".join(self.models)
            raise ApiError(404, f"no model {name!r:.80}; use one of {available}", "model", "model_not_found")
        return self.models[name]


def make_app(scheduler: Scheduler, models: Mapping[str, ServedModel], limits: ServerLimits) -> Any:
    """Return the ASGI application. When it shuts down, it closes the scheduler."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    service = Service(scheduler, models, limits, int(time.time()))
    for model in models.values():
        model.tokenizer("")  # resets truncation and padding, which no two threads may do at once

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(scheduler.close)

    def route(path: str, handler: Any, method: str) -> Any:
        async def endpoint(request: Any) -> Any:
            return await handler(service, request)

        return Route(path, endpoint, methods=[method])

    handlers: dict[Any, Any] = {ApiError: _api_error, HTTPException: _http_error, Exception: _bug}
    app = Starlette(
        routes=[
            route("/", _page, "GET"),
            route("/health", _health, "GET"),
            route("/v1/models", _models, "GET"),
            route("/v1/models/{name:path}", _model, "GET"),
            route("/v1/chat/completions", partial(_complete, _chat_prompts), "POST"),
            route("/v1/completions", partial(_complete, _text_prompts), "POST"),
            route("/v1/decisions", _decide, "POST"),
            route("/v1/rerank", _rerank, "POST"),
        ],
        lifespan=lifespan,
        exception_handlers=handlers,
    )
    return _guarded(app, limits, scheduler.queue + scheduler.sizes.rows + SPARE_REQUESTS)


def _guarded(app: Any, limits: ServerLimits, most: int) -> Callable[..., Awaitable[None]]:
    """Return the application with checks of Host header and API key, and at most `most` requests at once."""
    running = 0

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        nonlocal running
        if scope["type"] != "http":
            return await app(scope, receive, send)
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        error = _refusal(scope["path"], headers, limits)
        if running >= most:
            busy = f"the server has {most} requests at once; try again later"
            error = ApiError(503, busy, code="overloaded")
        if error is not None:
            return await _json(error.body(), error.status)(scope, receive, send)
        running += 1
        try:
            await _stoppable(app, scope, receive, send)
        finally:
            running -= 1

    return guarded


async def _stoppable(app: Any, scope: Any, receive: Any, send: Any) -> None:
    """Run the application. If uvicorn cancels a request during a shutdown, its client gets an error."""
    started = False

    async def sending(message: Any) -> None:
        nonlocal started
        started = True
        await send(message)

    try:
        await app(scope, receive, sending)
    except asyncio.CancelledError:
        error = ApiError(503, STOPPING)
        if started:  # a stream of events
            await send({"type": "http.response.body", "body": _event(error.body()).encode()})
        else:
            await _json(error.body(), error.status)(scope, receive, send)


def _refusal(path: str, headers: Mapping[bytes, str], limits: ServerLimits) -> ApiError | None:
    """Return the error if a request must be refused before its body is read, or None. The check of the Host
    header keeps out web pages that point a domain at this machine (DNS rebinding).
    """
    host = re.sub(r":\d*$", "", headers.get(b"host", "")).strip("[]").lower()
    if limits.hosts and host not in limits.hosts:
        return ApiError(403, f"the Host header has {host!r:.80}; use the host {limits.hosts[0]}")
    if limits.key and path.startswith("/v1/"):
        given = headers.get(b"authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {limits.key}".encode()):
            problem = "wrong or missing API key; send Authorization: Bearer KEY"
            return ApiError(401, problem, code="invalid_api_key")
    return None


def _json(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Any:
    from starlette.responses import Response

    text = json.dumps(body, allow_nan=False)
    return Response(text, status, dict(headers or {}), "application/json")


async def _api_error(request: Any, error: ApiError) -> Any:
    return _json(error.body(), error.status, {"Retry-After": "1"} if error.status == 429 else None)


async def _http_error(request: Any, error: Any) -> Any:
    known = "use /v1/chat/completions, /v1/completions, /v1/decisions, /v1/rerank or /v1/models"
    text = f"{request.method[:20]} {request.url.path[:100]}: {error.detail}; {known}"
    return _json(ApiError(error.status_code, text).body(), error.status_code, error.headers)


async def _bug(request: Any, error: Exception) -> Any:
    return _json(ApiError(500, "the server has a bug; report the traceback in its log").body(), 500)


async def _page(service: Service, request: Any) -> Any:
    """Return the chat page, which may run its own script only and talk to this server only."""
    from starlette.responses import HTMLResponse

    text = PAGE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256((script[1] if script else "").encode()).digest()).decode()
    policy = (
        f"default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(text, headers={"Content-Security-Policy": policy, "Cache-Control": "no-store"})


async def _health(service: Service, request: Any) -> Any:
    alive, load = service.scheduler.thread.is_alive(), service.scheduler.load()
    return _json({"status": "ok" if alive else "stopped", **load._asdict()}, 200 if alive else 503)


def _described(service: Service, model: ServedModel) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": service.created, "owned_by": "jaxft"}


async def _models(service: Service, request: Any) -> Any:
    return _json({"object": "list", "data": [_described(service, m) for m in service.models.values()]})


async def _model(service: Service, request: Any) -> Any:
    return _json(_described(service, service.model(request.path_params["name"])))


async def _read(service: Service, request: Any) -> dict[str, Any]:
    """Return the JSON object in the body. Raises ApiError, also for a body that is too long or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which pages of other web sites may not send
        raise ApiError(415, f"content-type must be application/json, got {kind!r:.60}")
    from starlette.requests import ClientDisconnect

    parts, size = list[bytes](), 0
    try:
        async with asyncio.timeout(BODY_SECONDS) as limit, _arriving(service.arriving, limit):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > service.limits.body:
                    raise ApiError(
                        413, f"the body is longer than {service.limits.body} bytes; shorten it, or start the "
                        "server with a larger --max-body"
                    )  # fmt: skip
    except ClientDisconnect as error:
        raise ApiError(499, "the client has left") from error
    except TimeoutError as error:
        raise ApiError(
            408, f"the body has not arrived within {BODY_SECONDS:g} s (or more than {MOST_WAITING} bodies "
            "were arriving); send it at once"
        ) from error  # fmt: skip
    return parse_json(b"".join(parts))


@contextlib.asynccontextmanager
async def _arriving(bodies: dict[asyncio.Timeout, None], limit: asyncio.Timeout) -> AsyncIterator[None]:
    """Add `limit` to `bodies` while a body arrives. Above MOST_WAITING bodies, the oldest times out now."""
    bodies[limit] = None
    if len(bodies) > MOST_WAITING:
        oldest = next(iter(bodies))
        del bodies[oldest]
        if not oldest.expired():
            oldest.reschedule(0)
    try:
        yield
    finally:
        bodies.pop(limit, None)


ParsedRequest = tuple[ChatBody | CompletionBody, list[tuple[int, ...]], Grammar | None]


def _chat_prompts(service: Service, body: dict[str, Any]) -> ParsedRequest:
    sizes = service.scheduler.sizes
    chat = parse_chat(body, sizes.new)
    model = service.model(chat.model)
    prompt = chat_prompt(model, chat.messages, chat.tools, chat.arguments, sizes.prompt)
    return chat, [prompt], _grammar(model, chat)


def _text_prompts(service: Service, body: dict[str, Any]) -> ParsedRequest:
    sizes = service.scheduler.sizes
    completion = parse_completion(body, sizes.new)
    model = service.model(completion.model)
    prompts = [
        text_prompt(model, prompt, sizes.prompt) if isinstance(prompt, str) else token_prompt(model, prompt)
        for prompt in completion.prompts
    ]
    return completion, prompts, _grammar(model, completion)


def _grammar(model: ServedModel, body: ChatBody | CompletionBody) -> Grammar | None:
    """Return the grammar that the response must match, None for any text. Raises ApiError."""
    tools, required = (body.tools, body.required) if isinstance(body, ChatBody) else (None, None)
    schema, text, field = body.choice.schema, "", "response_format"
    try:
        if required is not None:
            field = "tool_choice"
            text = call_grammar(model.tools, required.tools, model.tokenizer, required.is_single)
            field = "tools"
        elif schema is not None:
            text = json_grammar(schema)
            if tools is not None:  # the model may call them instead
                compile_grammar(text, model.tokenizer, model.stop)  # raises for the response_format's schema
                field = "tools"
                text = either(call_grammar(model.tools, functions_of(tools), model.tokenizer), text)
        return compile_grammar(text, model.tokenizer, model.stop) if text else None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{field}: {error}", field) from error
    except ImportError as error:
        raise ApiError(501, str(error)) from error


async def _complete(prompts_of: Callable[..., ParsedRequest], service: Service, request: Any) -> Any:
    """Respond to a request for completions, streamed or at once. prompts_of: checks the request's fields."""
    from starlette.responses import StreamingResponse

    fields = await _read(service, request)
    with _refusals(fields):
        body, prompts, grammar = await asyncio.to_thread(prompts_of, service, fields)
        model, is_chat = service.model(body.model), isinstance(body, ChatBody)
        has_tools = isinstance(body, ChatBody) and body.tools is not None
        generation = submit_choices(service.scheduler, model, body.choice, prompts, has_tools, grammar)
    name = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"
    envelope = Envelope(name, int(time.time()), model, is_chat, body.choice.top)
    if body.streaming.on:
        events = _events(envelope, generation, body.streaming.usage)
        headers = {"Cache-Control": "no-cache"}
        return _cancelling(StreamingResponse(events, 200, headers, "text/event-stream"), generation)
    return _json(await _whole(envelope, generation, request))


@contextlib.contextmanager
def _refusals(fields: Mapping[str, Any]) -> Iterator[None]:
    """Turn errors of the scheduler and of prompts into ApiErrors. If a message begins with the name of one of
    the request's `fields`, the ApiError has it as `param`.
    """
    try:
        yield
    except ValueError as error:
        field = re.split(r"\W", str(error), maxsplit=1)[0]
        raise ApiError(400, own_commands(str(error)), field if field in fields else None) from error
    except QueueFull as error:
        raise ApiError(429, str(error), code="queue_full") from error
    except Stopped as error:
        raise ApiError(503, str(error)) from error


async def _decide(service: Service, request: Any) -> Any:
    """Answer the questions of a request by the probabilities of their choices."""
    fields = await _read(service, request)
    model = service.model(model_name(fields))
    questions = parse_decisions(fields, model.decision)
    probabilities, tokens = await _probabilities(service, request, model, [x.decision for x in questions])
    answers = [answer(x, p, confidence) for x, (p, confidence) in zip(questions, probabilities, strict=True)]
    return _json(response(model.name, answers, tokens))


async def _rerank(service: Service, request: Any) -> Any:
    """Order the documents of a request by the probability that they are relevant."""
    fields = await _read(service, request)
    model = service.model(model_name(fields))
    body = parse_rerank(fields, model.decision)
    probabilities, tokens = await _probabilities(service, request, model, body.decisions)
    return _json(ranked(model.name, body, [p[-1] for p, _ in probabilities], tokens))


async def _probabilities(
    service: Service, request: Any, model: ServedModel, decisions: Sequence[Decision]
) -> tuple[list[tuple[list[float], float]], int]:
    """Return ([(probabilities of the choices, confidence) for each decision], number of tokens of all
    prompts). One token is sampled for each decision.
    """
    most = service.scheduler.sizes.prompt
    loop = asyncio.get_running_loop()
    futures: list[asyncio.Future[NewTokens]] = [loop.create_future() for _ in decisions]

    def deliver(future: asyncio.Future[NewTokens], progress: NewTokens) -> None:
        def set_result() -> None:
            if not future.done():
                future.set_result(progress)

        loop.call_soon_threadsafe(set_result)

    with _refusals({}):
        reads = await asyncio.to_thread(lambda: [read_of(model, decision, most) for decision in decisions])
        tickets = service.scheduler.submit(
            [(read.request, partial(deliver, future)) for read, future in zip(reads, futures, strict=True)]
        )
    task = asyncio.ensure_future(asyncio.gather(*futures))
    try:
        ended = await _unless_left(task, request)
    finally:
        for ticket in tickets:
            ticket.cancel()
    for progress in ended:
        if not progress.tokens:
            raise ApiError(503 if progress.finish == "cancelled" else 500, progress.error or "cancelled")
    pairs = zip(reads, ended, strict=True)
    tokens = sum(len(read.request.prompt) for read in reads)
    return [probabilities_of(read, progress.tokens[0]) for read, progress in pairs], tokens


async def _unless_left(task: "asyncio.Future[Any]", request: Any) -> Any:
    """Return the result of a task. If the client disconnects, cancel the task and raise ApiError (499)."""
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=0.5)
            if not task.done() and await request.is_disconnected():
                raise ApiError(499, "the client has left")
        return task.result()
    finally:
        task.cancel()


def _cancelling(response: Any, generation: Generation) -> Callable[..., Awaitable[None]]:
    """Wrap a streamed response so that it cancels its generation at the end, also if nothing was sent."""

    async def respond(scope: Any, receive: Any, send: Any) -> None:
        try:
            await response(scope, receive, send)
        finally:
            generation.cancel()

    return respond


async def _whole(e: Envelope, generation: Generation, request: Any) -> dict[str, Any]:
    """Return a response that is not streamed. If the client disconnects, the generation is cancelled."""

    async def pieces() -> list[Any]:
        return [piece async for piece in generation.pieces()]

    try:
        all_pieces = await _unless_left(asyncio.ensure_future(pieces()), request)
    finally:
        generation.cancel()
    choices = [
        whole_choice(e, joined([piece for piece in all_pieces if piece.index == index]))
        for index in range(generation.count)
    ]
    return e.response(choices, usage_of(generation.prompt_tokens, generation.completion_tokens))


async def _events(e: Envelope, generation: Generation, usage: bool) -> AsyncIterator[str]:
    """Yield the server-sent events of a streamed response. An error becomes an event, because the status has
    been sent. usage: whether an event with the token counts comes before the final [DONE].
    """
    begun = set[int]()
    try:
        async for piece in generation.pieces():
            if not (piece.text or piece.calls or piece.finish or e.top is not None):
                continue
            yield _event(e.response([chunk_choice(e, piece, piece.index not in begun)], chunk=True))
            begun.add(piece.index)
    except ApiError as error:
        yield _event(error.body())
        return
    if usage:
        tokens = usage_of(generation.prompt_tokens, generation.completion_tokens)
        yield _event(e.response([], tokens, chunk=True))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, allow_nan=False)}\n\n"


def _late() -> bytes:
    error = ApiError(
        408, f"no complete header within {HEADER_SECONDS:g} s (or more than {MOST_WAITING} connections were "
        "waiting); send the request at once"
    )  # fmt: skip
    body = json.dumps(error.body()).encode()
    head = "HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address. Raises OSError, for example if the address is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        detail = error.strerror if isinstance(error, OSError) else error
        raise OSError(f"cannot listen on {host}:{port} ({detail}); use another --port or --host") from error
    return sock


def uvicorn_config(app: Any, grace: int) -> Any:
    """Return uvicorn's settings. grace: seconds that running requests get at shutdown. Uvicorn's limits of
    connections, requests and idle time are off or out of reach: this file has its own, because uvicorn's
    refusals are not JSON.
    """
    import uvicorn

    return uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, lifespan="on", server_header=False,
        timeout_graceful_shutdown=grace, timeout_keep_alive=86400, http=_connection_class(), ws="none",
    )  # fmt: skip


def _connection_class() -> Any:
    """Return uvicorn's connection protocol with limits for connections without a complete request header:
    HEADER_SECONDS for each, and MOST_WAITING at once.
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    waiting: dict[Any, asyncio.TimerHandle] = {}  # the one that has waited longest is the first

    class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.header_begun = False
            self.watch()

        def data_received(self, data: bytes) -> None:
            self.header_begun = True
            super().data_received(data)
            self.watch()

        def on_response_complete(self) -> None:
            self.header_begun = False
            super().on_response_complete()
            self.watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self.unwatch()
            super().connection_lost(exc)

        def watch(self) -> None:
            """Start the time-out of the next request's header, or end it while a response is sent."""
            if self.transport.is_closing() or (self.cycle and not self.cycle.response_complete):
                return self.unwatch()
            if self not in waiting:
                waiting[self] = self.loop.call_later(HEADER_SECONDS, self.expire)
                if len(waiting) > MOST_WAITING:
                    next(iter(waiting)).expire()

        def unwatch(self) -> None:
            if self in waiting:
                waiting.pop(self).cancel()

        def expire(self) -> None:
            self.unwatch()
            if self.header_begun and not self.transport.is_closing():
                self.transport.write(_late())
            self.transport.close()

    return Connection


def serve_forever(app: Any, sock: socket.socket, grace: int) -> None:
    """Serve until SIGINT or SIGTERM, then finish running requests for up to `grace` seconds."""
    import uvicorn

    config = uvicorn_config(app, grace)
    before = signal.signal(signal.SIGTERM, lambda signum, frame: None)  # uvicorn raises it again at the end
    try:
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[sock])
    finally:
        signal.signal(signal.SIGTERM, before)
