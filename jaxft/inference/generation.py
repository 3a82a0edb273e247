"""The choices of one request as pieces of text: what the server streams and the chat prints."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

from jaxft.inference.api_request import ApiError, ChoiceSettings
from jaxft.inference.api_response import Piece
from jaxft.inference.scheduler import NewTokens, Scheduler, Ticket, TokenRequest
from jaxft.inference.served_model import ServedModel, completion_text
from jaxft.inference.text_stream import TextStream


@dataclass(eq=False)
class ChoiceText:
    """The text of one choice: tokens in, pieces out. Ends at a stop string, a stop token or the limit."""

    index: int
    stream: TextStream
    tokens: int = 0
    ended: bool = False

    def piece(self, progress: NewTokens) -> Piece:
        """Return what new tokens add. Raises ApiError if the request failed."""
        if progress.finish in ("error", "cancelled"):
            raise ApiError(503 if progress.finish == "cancelled" else 500, progress.error or "cancelled")
        finish, text, used = progress.finish, "", len(progress.tokens)
        if not self.stream.stops:
            text = self.stream.add_all([sampled.token for sampled in progress.tokens])
        else:
            for number, sampled in enumerate(progress.tokens, 1):
                text += self.stream.add(sampled.token)
                if self.stream.stopped:
                    used = number
                    break
        if finish and not self.stream.stopped:
            text += self.stream.finish()
        if self.stream.stopped:
            finish = "stop"
        self.tokens += used
        self.ended = finish is not None
        return Piece(self.index, text, progress.tokens[:used], finish)


class Generation:
    """The choices of a request that is queued. Iterate over `pieces`, then `cancel` whatever happened."""

    def __init__(self, choices: list[ChoiceText], prompt_tokens: int, count: int):
        self.choices, self.prompt_tokens, self.count = choices, prompt_tokens, count
        self.queue: asyncio.Queue[tuple[int, NewTokens]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.tickets: list[Ticket] = []

    @property
    def completion_tokens(self) -> int:
        """Tokens of all choices so far."""
        return sum(choice.tokens for choice in self.choices)

    def deliver(self, index: int, progress: NewTokens) -> None:
        """Pass tokens from the scheduler's thread to the event loop."""
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
            if piece.text or piece.tokens or piece.finish:
                yield piece

    def cancel(self) -> None:
        """Free the rows of what has not ended."""
        for ticket in self.tickets:
            ticket.cancel()


def token_requests(
    model: ServedModel, choice: ChoiceSettings, prompts: Sequence[tuple[int, ...]]
) -> list[TokenRequest]:
    """Return the request of each choice, those of a prompt together.

    Choice i of prompt j has the random key of prompt j * n + i of generate.py: with n=1 a request's
    completions equal those of generate.py with the same prompts and seed.
    """
    seed = secrets.randbits(31) if choice.seed is None else choice.seed
    top = bool(choice.top)
    return [
        TokenRequest(prompt, choice.sampling, seed, j * choice.n + i, model.stop, model.adapter, top)
        for j, prompt in enumerate(prompts)
        for i in range(choice.n)
    ]


def choice_texts(model: ServedModel, choice: ChoiceSettings, count: int) -> list[ChoiceText]:
    """Return the empty texts of `count` choices."""
    decode = partial(completion_text, model)
    return [ChoiceText(index, TextStream(decode, choice.stop)) for index in range(count)]


def submit_choices(
    scheduler: Scheduler, model: ServedModel, choice: ChoiceSettings, prompts: Sequence[tuple[int, ...]]
) -> Generation:
    """Queue all choices of a request; see Scheduler.submit for errors. Runs in an event loop."""
    requests = token_requests(model, choice, prompts)
    prompt_tokens = sum(map(len, prompts))
    generation = Generation(choice_texts(model, choice, len(requests)), prompt_tokens, len(requests))
    generation.tickets = scheduler.submit(
        [(request, partial(generation.deliver, index)) for index, request in enumerate(requests)]
    )
    return generation
