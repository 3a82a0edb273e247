"""An HTTP server for OpenAI's API over the scheduler, as a Starlette application.

/v1/chat/completions, /v1/completions and /v1/models, a chat page at /, and /health. Starlette is imported
where the application is made: it comes with the extra `serve`.
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
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jaxft.inference.api_request import (
    ApiError,
    ChatBody,
    CompletionBody,
    parse_chat,
    parse_completion,
    parse_json,
)
from jaxft.inference.api_response import Envelope, chunk_choice, joined, usage_of, whole_choice
from jaxft.inference.generation import Generation, submit_choices
from jaxft.inference.scheduler import QueueFull, Scheduler, Stopped
from jaxft.inference.served_model import ServedModel, chat_prompt, text_prompt, token_prompt

PAGE = Path(__file__).with_name("chat_page.html")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
BODY_SECONDS = 30.0
SPARE_CONNECTIONS = 512  # in addition to accepted requests: of clients that get status 429, and idle ones
KEY_VARIABLE = "JAXFT_API_KEY"


@dataclass(frozen=True)
class ServerLimits:
    """What clients may do. key: the API key that they need, "" for none. body: bytes of a request. hosts:
    names in the Host header, () for any.
    """

    key: str = ""
    body: int = 1 << 20
    hosts: tuple[str, ...] = LOOPBACK


@dataclass(frozen=True)
class Service:
    """What the server serves: models by name, the first of them by default, over one scheduler."""

    scheduler: Scheduler
    models: Mapping[str, ServedModel]
    limits: ServerLimits
    created: int
    rendering: asyncio.Lock  # tokenizers and limits of templates are used by one thread at a time

    def model(self, name: str | None) -> ServedModel:
        """Return the model of this name. Raises ApiError if there is none."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            available = ", ".join(self.models)
            raise ApiError(404, f"no model {name!r:.80}; use one of {available}", "model", "model_not_found")
        return self.models[name]


def make_app(scheduler: Scheduler, models: Mapping[str, ServedModel], limits: ServerLimits) -> Any:
    """Return the ASGI application. It stops the scheduler when it ends."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    service = Service(scheduler, models, limits, int(time.time()), asyncio.Lock())

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
        ],
        lifespan=lifespan,
        exception_handlers=handlers,
    )
    return _guarded(app, limits)


def _guarded(app: Any, limits: ServerLimits) -> Callable[..., Awaitable[None]]:
    """Return the application behind the checks of the Host header and of the API key."""

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
            error = _refusal(scope["path"], headers, limits)
            if error is not None:
                return await _json(error.body(), error.status)(scope, receive, send)
        await app(scope, receive, send)

    return guarded


def _refusal(path: str, headers: Mapping[bytes, str], limits: ServerLimits) -> ApiError | None:
    """Return why a request is refused before it is read. The check of Host keeps web pages out that point a
    name of theirs at this machine (DNS rebinding).
    """
    host = re.sub(r":\d*$", "", headers.get(b"host", "")).strip("[]").lower()
    if limits.hosts and host not in limits.hosts:
        return ApiError(403, f"the Host header has {host!r:.80}; this server is {limits.hosts[0]}")
    if limits.key and path.startswith("/v1/"):
        given = headers.get(b"authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {limits.key}".encode()):
            return ApiError(
                401, "wrong or missing API key; send Authorization: Bearer KEY", code="invalid_api_key"
            )
    return None


def _json(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Any:
    """Return a JSON response of ASCII characters."""
    from starlette.responses import Response

    text = json.dumps(body, allow_nan=False)
    return Response(text, status, dict(headers or {}), "application/json")


async def _api_error(request: Any, error: ApiError) -> Any:
    return _json(error.body(), error.status, {"Retry-After": "1"} if error.status == 429 else None)


async def _http_error(request: Any, error: Any) -> Any:
    known = "use /v1/chat/completions, /v1/completions or /v1/models"
    text = f"{request.method[:20]} {request.url.path[:100]}: {error.detail}; {known}"
    return _json(ApiError(error.status_code, text).body(), error.status_code, error.headers)


async def _bug(request: Any, error: Exception) -> Any:
    return _json(ApiError(500, "the server has a bug; its log has the traceback").body(), 500)


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
    if kind != "application/json":  # which web pages of others may not send
        raise ApiError(415, f"content-type must be application/json, got {kind!r:.60}")
    from starlette.requests import ClientDisconnect

    parts, size = list[bytes](), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
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
        raise ApiError(408, f"the body has not arrived within {BODY_SECONDS:g} s") from error
    return parse_json(b"".join(parts))


ParsedRequest = tuple[ChatBody | CompletionBody, list[tuple[int, ...]]]


def _chat_prompts(service: Service, body: dict[str, Any]) -> ParsedRequest:
    found = parse_chat(body, service.scheduler.programs.serving.sizes.new)
    model = service.model(found.model)
    return found, [chat_prompt(model, found.messages, found.tools, found.arguments)]


def _text_prompts(service: Service, body: dict[str, Any]) -> ParsedRequest:
    found = parse_completion(body, service.scheduler.programs.serving.sizes.new)
    model = service.model(found.model)
    return found, [
        text_prompt(model, prompt) if isinstance(prompt, str) else token_prompt(model, prompt)
        for prompt in found.prompts
    ]


async def _complete(prompts_of: Callable[..., ParsedRequest], service: Service, request: Any) -> Any:
    """Complete the prompts of a request, streamed or in one response."""
    from starlette.responses import StreamingResponse

    fields = await _read(service, request)
    try:
        async with service.rendering:
            body, prompts = await asyncio.to_thread(prompts_of, service, fields)
        model, is_chat = service.model(body.model), isinstance(body, ChatBody)
        has_tools = isinstance(body, ChatBody) and body.tools is not None
        generation = submit_choices(service.scheduler, model, body.choice, prompts, has_tools)
    except ValueError as error:
        raise ApiError(400, str(error)) from error
    except QueueFull as error:
        raise ApiError(429, str(error), code="queue_full") from error
    except Stopped as error:
        raise ApiError(503, str(error)) from error
    name = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"
    envelope = Envelope(name, int(time.time()), model, is_chat, body.choice.top)
    if body.streaming.on:
        events = _events(envelope, generation, body.streaming.usage)
        headers = {"Cache-Control": "no-cache"}
        return _cancelling(StreamingResponse(events, 200, headers, "text/event-stream"), generation)
    return _json(await _whole(envelope, generation, request))


def _cancelling(response: Any, generation: Generation) -> Callable[..., Awaitable[None]]:
    """Return a response that cancels its generation however it ends, also before its first event."""

    async def respond(scope: Any, receive: Any, send: Any) -> None:
        try:
            await response(scope, receive, send)
        finally:
            generation.cancel()

    return respond


async def _whole(e: Envelope, generation: Generation, request: Any) -> dict[str, Any]:
    """Return the response to a request that is not streamed. If its client leaves, it is cancelled."""

    async def pieces() -> list[Any]:
        return [piece async for piece in generation.pieces()]

    task = asyncio.ensure_future(pieces())
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=0.5)
            if not task.done() and await request.is_disconnected():
                raise ApiError(499, "the client has left")
        found = task.result()
    finally:
        task.cancel()
        generation.cancel()
    choices = [
        whole_choice(e, joined([piece for piece in found if piece.index == index]))
        for index in range(generation.count)
    ]
    return e.response(choices, usage_of(generation.prompt_tokens, generation.completion_tokens))


async def _events(e: Envelope, generation: Generation, usage: bool) -> AsyncIterator[str]:
    """Yield the server-sent events of a streamed response. An error is an event, since the status is sent."""
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


def uvicorn_config(app: Any, grace: int, requests: int) -> Any:
    """Return the settings of uvicorn.

    requests: the most that the scheduler accepts. Uvicorn allows more connections, because the response to
    one above its limit is a plain status 503 instead of a JSON error.
    """
    import uvicorn

    return uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, lifespan="on", server_header=False,
        timeout_graceful_shutdown=grace, timeout_keep_alive=10,
        limit_concurrency=requests + SPARE_CONNECTIONS,
    )  # fmt: skip


def serve_forever(app: Any, sock: socket.socket, grace: int, requests: int) -> None:
    """Serve until SIGINT or SIGTERM, then finish running requests for up to `grace` seconds. requests: see
    uvicorn_config.
    """
    import uvicorn

    config = uvicorn_config(app, grace, requests)
    before = signal.signal(signal.SIGTERM, lambda signum, frame: None)  # uvicorn raises it again at the end
    try:
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[sock])
    finally:
        signal.signal(signal.SIGTERM, before)
