"""OpenAI's API: requests as checked dataclasses, responses and chunks as JSON objects.

A wrong request raises an ApiError, whose message is one line.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from jaxft.data.chat.tool_calls import ToolCall
from jaxft.data.rows.invalid_rows import json_type, similar_names
from jaxft.engine.sampling import Sampling
from jaxft.engine.scheduler import SampledToken
from jaxft.engine.state import MOST_TOP
from jaxft.engine.text_stream import token_decoder
from jaxft.serve.served_models import ServedModel, token_text

MOST_CHOICES = 64  # choices of a request, over all of its prompts
MOST_STOPS = 4
LONGEST_STOP = 256
LONGEST_MESSAGE = 500

ALL_FIELDS = (
    "model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "n", "stream",
    "stream_options", "logprobs", "response_format",
)  # fmt: skip
CHAT_FIELDS = (
    *ALL_FIELDS, "messages", "tools", "tool_choice", "parallel_tool_calls", "max_completion_tokens",
    "top_logprobs", "chat_template_kwargs",
)  # fmt: skip
COMPLETION_FIELDS = (*ALL_FIELDS, "prompt")
# Fields that do not change the completion.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Fields that would change the completion, with the values that do not.
ONLY: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "function_call": ("auto", "none"),
}


class ApiError(Exception):
    """A request's error: HTTP status, a message of one line, the wrong field, and OpenAI's error code."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        line = " ".join(message.split())
        self.message = line if len(line) <= LONGEST_MESSAGE else f"{line[: LONGEST_MESSAGE - 4]} ..."

    def body(self) -> dict[str, Any]:
        """Return the error as the body of a response, {"error": {"message", "type", "param", "code"}}."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ChoiceSettings(NamedTuple):
    """Settings of a request that its completions ("choices") depend on.

    seed: None for a random one. stop: stop strings. n: choices per prompt. top: the number of most likely
    tokens that are listed for each token; None for a response without log-probs. schema: the JSON schema that
    the text must fit; None for any text.
    """

    sampling: Sampling
    seed: int | None
    stop: tuple[str, ...]
    n: int
    top: int | None
    schema: Mapping[str, Any] | None = None


class RequiredCall(NamedTuple):
    """A response that must consist of tool calls. tools: the tools that it may call, as {"name",
    "parameters"}. is_single: whether it must be exactly one call.
    """

    tools: tuple[Mapping[str, Any], ...]
    is_single: bool


class Streaming(NamedTuple):
    """on: whether to stream the response. usage: whether to end the stream with a chunk of token counts."""

    on: bool
    usage: bool


@dataclass(frozen=True)
class ChatBody:
    """A request of /v1/chat/completions. model: None for the default one. arguments: chat_template_kwargs.
    required: the tool calls that the response must consist of; None if the model chooses.
    """

    model: str | None
    choice: ChoiceSettings
    streaming: Streaming
    messages: list[Any]
    tools: list[Any] | None
    arguments: dict[str, Any]
    required: RequiredCall | None = None


@dataclass(frozen=True)
class CompletionBody:
    """A request of /v1/completions. model: None for the default one. prompts: texts, or token ids."""

    model: str | None
    choice: ChoiceSettings
    streaming: Streaming
    prompts: tuple[str | tuple[int, ...], ...]


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse the body of a request as a JSON object. Raises ApiError."""

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        parsed = json.loads(body.decode("utf-8"), parse_constant=no_constant)
        json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:  # no tokenizer accepts half a surrogate pair
        raise ApiError(400, "the body is not JSON in UTF-8: a string has an unpaired surrogate") from error
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
        detail = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not JSON in UTF-8: {detail}") from error
    if not isinstance(parsed, dict):
        raise ApiError(400, f"the body must be a JSON object, got {json_type(parsed)}")
    return parsed


def parse_chat(body: Mapping[str, Any], most_new: int) -> ChatBody:
    """Check a request of /v1/chat/completions. most_new: max_tokens if it has none. Raises ApiError."""
    _check_names(body, CHAT_FIELDS)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        known = {type(None): "missing", list: "empty"}
        problem = known.get(type(messages), json_type(messages))
        raise ApiError(400, f"messages is {problem}; give a list with at least one message", "messages")
    tools = body.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise ApiError(400, f"tools must be a list of objects with a function, got {tools!r:.60}", "tools")
    arguments = body.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        shown = f"chat_template_kwargs must be an object, got {json_type(arguments)}"
        raise ApiError(400, shown, "chat_template_kwargs")
    limits = [_integer(body, name, 1, 2**31 - 1) for name in ("max_completion_tokens", "max_tokens")]
    top = None
    if _boolean(body, "logprobs"):
        top = _integer(body, "top_logprobs", 0, MOST_TOP) or 0
    elif body.get("top_logprobs"):
        raise ApiError(400, "top_logprobs needs logprobs=true; add it, or omit top_logprobs", "top_logprobs")
    new = next((limit for limit in limits if limit is not None), most_new)
    return ChatBody(
        model_name(body), _choice(body, new, 1, top), _streaming(body), messages,
        None if body.get("tool_choice") == "none" or not tools else tools, arguments,
        _required_call(body, tools or []),
    )  # fmt: skip


def parse_completion(body: Mapping[str, Any], most_new: int) -> CompletionBody:
    """Check a request of /v1/completions. most_new: max_tokens if it has none. Raises ApiError."""
    _check_names(body, COMPLETION_FIELDS)
    prompts = _prompts(body.get("prompt"))
    new = _integer(body, "max_tokens", 1, 2**31 - 1)
    top = _integer(body, "logprobs", 0, MOST_TOP)
    choice = _choice(body, most_new if new is None else new, len(prompts), top)
    return CompletionBody(model_name(body), choice, _streaming(body), prompts)


def _required_call(body: Mapping[str, Any], tools: Sequence[Any]) -> RequiredCall | None:
    """Return the tool calls that `tool_choice` requires, None for "auto" and "none". Raises ApiError."""
    _boolean(body, "parallel_tool_calls")
    choice, is_single = body.get("tool_choice") or "auto", body.get("parallel_tool_calls") is False
    if choice in ("auto", "none"):
        return None
    if choice == "required":
        if not tools:
            raise ApiError(400, "tool_choice is required, but there are no tools; add some", "tool_choice")
        return RequiredCall(functions_of(tools), is_single)
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise ApiError(
            400, 'tool_choice must be auto, none, required or {"type": "function", "function": '
            f'{{"name": ...}}}}, got {choice!r:.60}', "tool_choice",
        )  # fmt: skip
    chosen = tuple(tool for tool in functions_of(tools) if tool["name"] == name)
    if not chosen:
        unknown = f"tool_choice names {name!r:.60}, which is none of the tools; name one of them"
        raise ApiError(400, unknown, "tool_choice")
    return RequiredCall(chosen[:1], True)


def functions_of(tools: Sequence[Any]) -> tuple[Mapping[str, Any], ...]:
    """Return tools as {"name", "parameters"}; without parameters, any object is allowed. Raises ApiError."""
    functions = []
    for number, tool in enumerate(tools):
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise ApiError(400, f"tools[{number}] must be a function with a name, got {tool!r:.60}", "tools")
        parameters = function.get("parameters") or {"type": "object"}
        if not isinstance(parameters, dict):
            shown = f"tools[{number}]: parameters must be a JSON schema, got {json_type(parameters)}"
            raise ApiError(400, shown, "tools")
        functions.append({"name": name, "parameters": {"type": "object", **parameters}})
    return tuple(functions)


def _schema(value: Any) -> Mapping[str, Any] | None:
    """Return the JSON schema of a response_format, None if it allows any text. Raises ApiError."""
    kind = value.get("type") if isinstance(value, dict) else value
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise ApiError(
            400, 'response_format must be {"type": "text"}, {"type": "json_object"} or '
            f'{{"type": "json_schema", "json_schema": {{"name": ..., "schema": ...}}}}, got {kind!r:.60}',
            "response_format",
        )  # fmt: skip
    named = value.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        shown = f"response_format.json_schema.schema must be a JSON schema, got {json_type(schema)}"
        raise ApiError(400, shown, "response_format")
    return schema


def _check_names(body: Mapping[str, Any], names: Sequence[str]) -> None:
    for name, value in body.items():
        if value is None or name in names or name in IGNORED:
            continue
        if name not in ONLY:
            known = [*names, *IGNORED, *ONLY]
            near = ", ".join(similar_names(name, known))
            raise ApiError(400, f"unknown field {name!r:.60}; near: {near}", name[:60])
        if not any(
            value == only and isinstance(value, bool) == isinstance(only, bool) for only in ONLY[name]
        ):
            shown = " or ".join(json.dumps(only) for only in ONLY[name])
            raise ApiError(400, f"{name} is not supported; omit it or use {shown}", name)


def _choice(body: Mapping[str, Any], new: int, prompts: int, top: int | None) -> ChoiceSettings:
    temperature = _number(body, "temperature", 0.0, 2.0)
    top_p, min_p = _number(body, "top_p", 0.0, 1.0), _number(body, "min_p", 0.0, 1.0)
    n = _integer(body, "n", 1, MOST_CHOICES) or 1
    if n * prompts > MOST_CHOICES:
        raise ApiError(
            400, f"{prompts} prompts with n={n} are more than {MOST_CHOICES} choices; request fewer", "n"
        )
    top_k = _integer(body, "top_k", -1, 2**31 - 1)
    try:
        temperature = 1.0 if temperature is None else temperature
        sampling = Sampling(new, temperature, top_k if top_k and top_k > 0 else None, top_p, min_p)
    except ValueError as error:
        name = str(error).partition(" ")[0].partition("=")[0]
        raise ApiError(400, str(error), name) from error
    seed, schema = _integer(body, "seed", 0, 2**63 - 1), _schema(body.get("response_format"))
    return ChoiceSettings(sampling, seed, _stops(body.get("stop")), n, top, schema)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise ApiError(400, f"stop must be at most {MOST_STOPS} strings, got {value!r:.60}", "stop")
    if not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops):
        raise ApiError(400, f"stop={value!r:.60}; use strings of 1 to {LONGEST_STOP} characters", "stop")
    return tuple(stops)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    def is_ids(x: Any) -> bool:
        return isinstance(x, list) and bool(x) and all(type(token) is int for token in x)

    items = [value] if isinstance(value, str) or is_ids(value) else value
    if not isinstance(items, list) or not items or not all(isinstance(x, str) or is_ids(x) for x in items):
        raise ApiError(
            400, f"prompt must be a string, token ids, or a list of these, got {value!r:.60}", "prompt"
        )
    return tuple(x if isinstance(x, str) else tuple(x) for x in items)


def _streaming(body: Mapping[str, Any]) -> Streaming:
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise ApiError(400, f"stream_options must be an object, got {json_type(options)}", "stream_options")
    usage = (options or {}).get("include_usage")
    if usage is not None and not isinstance(usage, bool):
        shown = f"stream_options.include_usage must be true or false, got {json_type(usage)}"
        raise ApiError(400, shown, "stream_options")
    return Streaming(_boolean(body, "stream"), bool(usage))


def model_name(body: Mapping[str, Any]) -> str | None:
    """Return the field `model` of a request, None if it is missing. Raises ApiError if it is no string."""
    model = body.get("model")
    if not isinstance(model, str | None):
        raise ApiError(400, f"model must be a string, got {json_type(model)}", "model")
    return model


def _boolean(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false, got {json_type(value)}", name)
    return bool(value)


def _integer(body: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        shown = json_type(value) if type(value) is not int else f"{value}"[:40]
        raise ApiError(400, f"{name} must be a whole number from {least} to {most}, got {shown}", name)
    return value


def _number(body: Mapping[str, Any], name: str, least: float, most: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:  # also NaN
        shown = f"{value}"[:40] if is_number else json_type(value)
        raise ApiError(400, f"{name} must be a number from {least:g} to {most:g}, got {shown}", name)
    return float(value)


LEAST_LOGP = -9999.0  # in place of -inf, which JSON does not have


@dataclass(frozen=True)
class PlacedToken:
    """A sampled token and its position in the text. first: whether no earlier token has added text. offset:
    index of the character in which the token begins.
    """

    sampled: SampledToken
    first: bool
    offset: int


@dataclass(frozen=True)
class Piece:
    """The next piece of text of choice `index`. tokens: its tokens, () if the request has no logprobs.
    finish: the finish_reason, None while the choice goes on. calls: tool calls that end in this piece.
    """

    index: int
    text: str
    tokens: tuple[PlacedToken, ...] = ()
    finish: str | None = None
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Envelope:
    """The fields that all chunks of a response have in common. chat: whether the request was for a chat
    completion, not a text completion. top: see ChoiceSettings.
    """

    id: str
    created: int
    model: ServedModel
    chat: bool
    top: int | None

    def response(self, choices: list[dict[str, Any]], usage: Any = None, chunk: bool = False) -> dict:
        """Return a complete response (chunk=False) or a chunk of a stream. usage: the result of usage_of."""
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model.name}
        return {**head, "choices": choices, "usage": usage}


def usage_of(prompt: int, completion: int) -> dict[str, int]:
    """Return the field `usage` of a response. prompt, completion: numbers of tokens."""
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


def chunk_choice(e: Envelope, piece: Piece, first: bool) -> dict[str, Any]:
    """Return a piece as an entry of `choices` of a chunk. first: whether it is its choice's first piece."""
    choice = {"index": piece.index, "logprobs": _logprobs(e, piece), "finish_reason": piece.finish}
    if not e.chat:
        return {**choice, "text": piece.text}
    delta: dict[str, Any] = {"role": "assistant"} if first else {}
    if piece.text or first:
        delta["content"] = _content(piece)
    if piece.calls:
        delta["tool_calls"] = [{"index": call.index, **_call(call)} for call in piece.calls]
    return {**choice, "delta": delta}


def whole_choice(e: Envelope, whole: Piece) -> dict[str, Any]:
    """Return an entry of `choices` of a response that is not streamed. whole: the result of `joined`."""
    choice = {"index": whole.index, "logprobs": _logprobs(e, whole), "finish_reason": whole.finish}
    if not e.chat:
        return {**choice, "text": whole.text}
    message: dict[str, Any] = {"role": "assistant", "content": _content(whole), "refusal": None}
    if whole.calls:
        message["tool_calls"] = [_call(call) for call in whole.calls]
    return {**choice, "message": message}


def joined(pieces: Sequence[Piece]) -> Piece:
    """Return the pieces of a choice, at least one, as a single piece."""
    text = "".join(piece.text for piece in pieces)
    tokens = tuple(chain.from_iterable(piece.tokens for piece in pieces))
    calls = tuple(chain.from_iterable(piece.calls for piece in pieces))
    return Piece(pieces[-1].index, text, tokens, pieces[-1].finish, calls)


def _content(piece: Piece) -> str | None:
    return piece.text or (None if piece.calls else "")


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _logprobs(e: Envelope, piece: Piece) -> dict[str, Any] | None:
    if e.top is None:
        return None
    if e.chat:
        return {"content": [_chat_token(e, token) for token in piece.tokens], "refusal": None}
    sampled = [token.sampled for token in piece.tokens]
    return {
        "tokens": [token_text(e.model, token.token) for token in sampled],
        "token_logprobs": [_finite(token.logp) for token in sampled],
        "top_logprobs": [_by_text(e, token) for token in sampled],
        "text_offset": [token.offset for token in piece.tokens],
    }


def _by_text(e: Envelope, sampled: SampledToken) -> dict[str, float]:
    """Return text -> log-prob for the e.top most likely tokens and the sampled one. If several have the same
    text, it gets the log-prob of the most likely one.
    """
    logps: dict[str, float] = {}
    for token, logp in (*sampled.top[: e.top], (sampled.token, sampled.logp)):
        logps.setdefault(token_text(e.model, token), _finite(logp))
    return logps


def _chat_token(e: Envelope, token: PlacedToken) -> dict[str, Any]:
    def shown(number: int, logp: float) -> dict[str, Any]:
        content = token_decoder(e.model.tokenizer).bytes_of(number, token.first)
        as_list = None if content is None else list(content)
        return {"token": token_text(e.model, number), "logprob": _finite(logp), "bytes": as_list}

    sampled = token.sampled
    top = [shown(number, logp) for number, logp in sampled.top[: e.top]]
    return {**shown(sampled.token, sampled.logp), "top_logprobs": top}


def _finite(logp: float) -> float:
    return max(logp, LEAST_LOGP)
