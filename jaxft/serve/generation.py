"""The completions of one request ("choices" in OpenAI's API) as pieces of text, to be streamed or printed."""

import asyncio
import codecs
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from jaxft.data.chat.tool_calls import CallStream, call_format
from jaxft.engine.scheduler import NewTokens, SampledToken, Scheduler, Ticket, TokenRequest
from jaxft.engine.session import RequestSettings
from jaxft.engine.text_stream import TextStream, token_decoder
from jaxft.serve.constraint import Grammar
from jaxft.serve.openai_api import ApiError, ChoiceSettings, Piece, PlacedToken
from jaxft.serve.served_models import ServedModel


@dataclass(eq=False)
class ChoiceText:
    """Turns the tokens of one choice into pieces of text. It ends at a stop string, a stop token or the
    largest number of tokens.

    calls: removes tool calls from the text; None leaves them in it. places: whether pieces list their tokens
    with positions, for log-probs. tokens, characters: the numbers of tokens and whole characters so far.
    begun: whether a token has added text.
    """

    index: int
    stream: TextStream
    calls: CallStream | None = None
    places: bool = True
    tokens: int = 0
    ended: bool = False
    begun: bool = False
    characters: int = 0
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def piece(self, progress: NewTokens) -> Piece:
        """Decode new tokens to the next piece. Raises ApiError if the request failed or was cancelled."""
        if progress.finish in ("error", "cancelled"):
            raise ApiError(503 if progress.finish == "cancelled" else 500, progress.error or "cancelled")
        finish: str | None = progress.finish
        text, used = "", len(progress.tokens)
        of_text = [sampled.token for sampled in progress.tokens]
        if finish == "stop":  # the last one is a stop token
            of_text.pop()
        if not self.stream.stops:
            text = self.stream.add_all(of_text)
        else:
            for number, token in enumerate(of_text, 1):
                text += self.stream.add(token)
                if self.stream.stopped:
                    used = number
                    break
        if finish and not self.stream.stopped:
            text += self.stream.finish()
        if self.stream.stopped:
            finish = "stop"
        self.tokens += used
        self.ended = finish is not None
        placed = tuple(map(self._placed, progress.tokens[:used])) if self.places else ()
        if self.calls is None:
            return Piece(self.index, text, placed, finish)
        text, calls = self.calls.add(text, self.ended)
        if finish == "stop" and self.calls.count:
            finish = "tool_calls"
        return Piece(self.index, text, placed, finish, calls)

    def _placed(self, sampled: SampledToken) -> PlacedToken:
        """Return a token with its position in the choice's text, even if it ends within a character."""
        first = not self.begun
        content = self.stream.decoder.bytes_of(sampled.token, first)
        added = content or b""
        self.begun |= content is not None  # also by a token whose space is omitted
        done = len(self.decoder.decode(added[:1]))  # characters that end before its first byte, or with it
        begins_one = self.decoder.getstate()[0] == added[:1]
        offset = self.characters + (done if begins_one else max(done - 1, 0))
        self.characters += done + len(self.decoder.decode(added[1:]))
        return PlacedToken(sampled, first, offset)


class Generation:
    """The choices of a queued request. Iterate over `pieces()`; call `cancel` in a `finally` clause.
    prompt_tokens: tokens of all prompts together. count: the number of choices.
    """

    def __init__(self, choices: list[ChoiceText], prompt_tokens: int, count: int):
        self.choices, self.prompt_tokens, self.count = choices, prompt_tokens, count
        self.queue: asyncio.Queue[tuple[int, NewTokens]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.tickets: list[Ticket] = []

    @property
    def completion_tokens(self) -> int:
        """The number of sampled tokens so far, of all choices together."""
        return sum(choice.tokens for choice in self.choices)

    def deliver(self, index: int, progress: NewTokens) -> None:
        """Pass new tokens of a choice, given by its index, from the scheduler's thread to the event loop."""
        self.loop.call_soon_threadsafe(self.queue.put_nowait, (index, progress))

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield pieces of all choices until each has ended. Raises ApiError if one fails."""
        while not all(choice.ended for choice in self.choices):
            index, progress = await self.queue.get()
            choice = self.choices[index]
            if choice.ended:
                continue
            piece = choice.piece(progress)
            if choice.ended:
                self.tickets[index].cancel()
            if piece.text or piece.calls or piece.tokens or piece.finish:
                yield piece

    def cancel(self) -> None:
        """Free the rows of choices that have not ended."""
        for ticket in self.tickets:
            ticket.cancel()


def token_requests(
    model: ServedModel,
    choice: ChoiceSettings,
    prompts: Sequence[tuple[int, ...]],
    grammar: Grammar | None = None,
) -> list[TokenRequest]:
    """Return one request per choice: choice.n for the first prompt, then choice.n for the next, and so on.
    grammar: the grammar of all completions, None for any text. Entry i of the result has the random key that
    scripts/generate.py uses for its prompt i: with n=1, equal prompts and seeds lead to equal completions.
    """
    seed = secrets.randbits(31) if choice.seed is None else choice.seed
    settings = RequestSettings(choice.sampling, model.stop, model.adapter, bool(choice.top), grammar)
    return [
        TokenRequest(prompt, settings, seed, j * choice.n + i)
        for j, prompt in enumerate(prompts)
        for i in range(choice.n)
    ]


def choice_texts(
    model: ServedModel, choice: ChoiceSettings, count: int, has_tools: bool = False
) -> list[ChoiceText]:
    """Return `count` choices without tokens. has_tools: whether tool calls are removed from their text."""
    calls = call_format(model.tools) if has_tools else None
    decoder = token_decoder(model.tokenizer, calls.tokens if calls else ())
    return [
        ChoiceText(
            index,
            TextStream(decoder, choice.stop),
            CallStream(calls) if calls else None,
            places=choice.top is not None,
        )
        for index in range(count)
    ]


def submit_choices(
    scheduler: Scheduler,
    model: ServedModel,
    choice: ChoiceSettings,
    prompts: Sequence[tuple[int, ...]],
    has_tools: bool = False,
    grammar: Grammar | None = None,
) -> Generation:
    """Queue all choices of a request. Call it in a running event loop. Raises what Scheduler.submit raises.
    has_tools, grammar: see choice_texts and token_requests.
    """
    requests = token_requests(model, choice, prompts, grammar)
    texts = choice_texts(model, choice, len(requests), has_tools)
    generation = Generation(texts, sum(map(len, prompts)), len(requests))
    generation.tickets = scheduler.submit(
        [(request, partial(generation.deliver, index)) for index, request in enumerate(requests)]
    )
    return generation
