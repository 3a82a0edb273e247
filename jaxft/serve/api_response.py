"""Responses of OpenAI's API, as JSON objects."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from jaxft.data.chat.tool_calls import ToolCall
from jaxft.engine.scheduler import SampledToken
from jaxft.engine.text_stream import token_decoder
from jaxft.serve.served_model import ServedModel, token_text

LEAST_LOGP = -9999.0  # in place of -inf, which JSON does not have


@dataclass(frozen=True)
class PlacedToken:
    """A sampled token and its position. first: no earlier token has text. offset: index of the character in
    which it begins.
    """

    sampled: SampledToken
    first: bool
    offset: int


@dataclass(frozen=True)
class Piece:
    """A part of choice `index`: text, the tokens that it is from, why the choice ended, if it has, and tool
    calls.
    """

    index: int
    text: str
    tokens: tuple[PlacedToken, ...] = ()
    finish: str | None = None
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Envelope:
    """The fields that all chunks of a response share. top: as in api_request.ChoiceSettings."""

    id: str
    created: int
    model: ServedModel
    chat: bool
    top: int | None

    def response(self, choices: list[dict[str, Any]], usage: Any = None, chunk: bool = False) -> dict:
        """Return the response, or a chunk of it, with these choices."""
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model.name}
        return {**head, "choices": choices, "usage": usage}


def usage_of(prompt: int, completion: int) -> dict[str, int]:
    """Return the numbers of tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def chunk_choice(e: Envelope, piece: Piece, first: bool) -> dict[str, Any]:
    """Return a piece as the choice of a chunk. first: of its choice."""
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
    """Return all pieces of a choice together as a choice."""
    choice = {"index": whole.index, "logprobs": _logprobs(e, whole), "finish_reason": whole.finish}
    if not e.chat:
        return {**choice, "text": whole.text}
    message: dict[str, Any] = {"role": "assistant", "content": _content(whole), "refusal": None}
    if whole.calls:
        message["tool_calls"] = [_call(call) for call in whole.calls]
    return {**choice, "message": message}


def joined(pieces: Sequence[Piece]) -> Piece:
    """Return all pieces of a choice as one."""
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
    """Return the most likely tokens and the sampled one by their texts; of tokens with the same text the most
    likely one.
    """
    found: dict[str, float] = {}
    for token, logp in (*sampled.top[: e.top], (sampled.token, sampled.logp)):
        found.setdefault(token_text(e.model, token), _finite(logp))
    return found


def _chat_token(e: Envelope, token: PlacedToken) -> dict[str, Any]:
    def shown(number: int, logp: float) -> dict[str, Any]:
        found = token_decoder(e.model.tokenizer).bytes_of(number, token.first)
        as_list = None if found is None else list(found)
        return {"token": token_text(e.model, number), "logprob": _finite(logp), "bytes": as_list}

    sampled = token.sampled
    top = [shown(number, logp) for number, logp in sampled.top[: e.top]]
    return {**shown(sampled.token, sampled.logp), "top_logprobs": top}


def _finite(logp: float) -> float:
    return max(logp, LEAST_LOGP)
