"""The text of a completion while its tokens arrive: whole characters, up to a stop string.

The pieces together are the text of all tokens at once, but a new token costs the same however long the
completion is: only tokens whose text is not certain yet, and one before them, are decoded again.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

REPLACEMENT = "\ufffd"  # what a tokenizer decodes an unfinished character to
LONGEST_TAIL = 8  # tokens after which broken bytes are taken as such; a character has at most 4
EURO = ("<0xE2>", "<0x82>", "<0xAC>")
BYTE_LEVEL_EURO = ("\u00e2", "\u0124", "\u00ac")  # its bytes as byte-level BPE writes them


def _no_bytes(token: int) -> bytes | None:
    return None


@dataclass(frozen=True)
class TokenDecoder:
    """A tokenizer's decoding of a completion's tokens into text.

    decode: token ids -> text. skipped: ids that add no text, such as special tokens. size: ids from here on
    have no token, since a model may have more ids than its tokenizer. byte_ids: ids of single bytes in
    tokenizers with byte fallback (Llama 2, Mistral, Gemma), which decode successive bytes as a whole: one
    wrong byte spoils the characters before it. () if the tokenizer has no byte fallback; then a token is a
    sequence of bytes (byte-level BPE) or of characters. raw: token id -> the bytes of a byte-level token, or
    None.
    """

    decode: Callable[[list[int]], str]
    skipped: Collection[int] = frozenset()
    byte_ids: Collection[int] = frozenset()
    raw: Callable[[int], bytes | None] = _no_bytes
    size: int = 1 << 31

    def adds_text(self, token: int) -> bool:
        """Whether a token may add text."""
        return token < self.size and token not in self.skipped

    def bytes_of(self, token: int, first: bool) -> bytes | None:
        """Return the bytes that a token adds to a text; None for one that is skipped.

        first: whether it begins the text, where a tokenizer may omit a space. The bytes of all tokens,
        joined, are the text.
        """
        if not self.adds_text(token):
            return None
        raw = self.raw(token)
        if raw is not None:
            return raw
        alone = self.decode([token])
        return (alone if first else self.decode([token, token])[len(alone) :]).encode()


@lru_cache(maxsize=32)
def token_decoder(tokenizer: Any, shown: tuple[str, ...] = ()) -> TokenDecoder:
    """Return the decoder of a tokenizer, which skips special tokens except `shown`.

    Spaces are not cleaned up: older transformers would remove a space before "." that has been sent.
    """
    skipped = frozenset(
        token
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.special
        and added.content not in shown
        and not tokenizer.decode([token], skip_special_tokens=True)
    )

    in_vocabulary = set(tokenizer.get_vocab().values())
    size = 1 + max(in_vocabulary)
    skipped |= set(range(size)) - in_vocabulary

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def is_euro(tokens: Sequence[str]) -> bool:
        ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
        return None not in ids and decode(ids) == "\u20ac"

    if is_euro(BYTE_LEVEL_EURO):
        return TokenDecoder(decode, skipped, raw=partial(_byte_level, tokenizer), size=size)
    if not is_euro(EURO):
        return TokenDecoder(decode, skipped, size=size)
    ids = {tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>"): bytes([byte]) for byte in range(256)}
    of_bytes = {token: byte for token, byte in ids.items() if token not in (None, tokenizer.unk_token_id)}
    return TokenDecoder(decode, skipped, frozenset(of_bytes), of_bytes.get, size)


@cache
def _byte_alphabet() -> dict[str, int]:
    """Return character -> byte, as byte-level BPE writes bytes in its vocabulary: printable ones as they are,
    the others as U+0100 and up.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level(tokenizer: Any, token: int) -> bytes | None:
    """Return the bytes of a token of byte-level BPE; None for a token that was added to it as text."""
    if token in tokenizer.added_tokens_decoder:
        return None
    bytes_by_character, text = _byte_alphabet(), tokenizer.convert_ids_to_tokens(token) or ""
    known = all(character in bytes_by_character for character in text)
    return bytes(bytes_by_character[character] for character in text) if known else None


class TextStream:
    """Turns tokens into text, piece by piece. The pieces together are the text of all tokens.

    stops: strings before which the text ends. No piece ends within a character, or with what may be the
    beginning of a stop string. `stopped`: whether a stop string was found; further tokens then add nothing.
    """

    def __init__(self, decoder: TokenDecoder, stops: Sequence[str] = ()):
        self.decoder, self.stops = decoder, tuple(stops)
        self.stopped = False
        self._pieces: list[str] = []
        self._waiting = ""  # certain text that may begin a stop string
        self._tail: list[int] = []  # the last tokens; the text of the first `_done` of them is certain
        self._done = 0
        self._run = 0  # byte tokens at the end of the tail
        self._before = ""  # the text of the first `_done` tokens, decoded alone
        self._ahead = 0  # characters after `_before` that are certain too, and have been returned

    @property
    def text(self) -> str:
        """All pieces so far."""
        return "".join(self._pieces)

    def add(self, token: int) -> str:
        """Add a token; return the new text that no later token can change, "" if there is none yet."""
        return self.add_all([token])

    def add_all(self, tokens: Sequence[int]) -> str:
        """Add tokens, as `add` does. If the stream has stop strings, call `add` for each token instead."""
        if self.stopped:
            return ""
        for token in tokens:
            if self.decoder.adds_text(token):
                self._tail.append(token)
                self._run = self._run + 1 if token in self.decoder.byte_ids else 0
        return self._piece(self._certain(), self.stops)

    def finish(self) -> str:
        """Return the text that `add` has not returned yet. Call it after the last token."""
        if self.stopped:
            return ""
        rest = self.decoder.decode(self._tail)[len(self._before) + self._ahead :]
        self._tail, self._done, self._run, self._before, self._ahead = [], 0, 0, "", 0
        piece = self._piece(rest, self.stops)
        return piece if self.stopped else piece + self._piece("", ())

    def _certain(self) -> str:
        """Return the new text that no later token changes."""
        decode, tail = self.decoder.decode, self._tail
        end = len(tail) - self._run
        if end <= self._done:
            return ""
        text = decode(tail[:end])
        new = text[len(self._before) :]
        cut: int | None = end
        certain = new
        if new.endswith(REPLACEMENT) and not self.decoder.byte_ids:  # perhaps the first bytes of a character
            cut = self._cut_in_broken_bytes(text, end)
            certain = new.rstrip(REPLACEMENT)
        if cut is None:
            piece, self._ahead = certain[self._ahead :], max(self._ahead, len(certain))
            return piece
        whole = len(text if cut == end else decode(tail[:cut])) - len(self._before)
        certain = new[: max(len(certain), whole)]
        piece, self._ahead = certain[self._ahead :], max(len(certain), self._ahead) - whole
        self._tail, self._done = tail[cut - 1 :], 1  # a tokenizer may omit the space before the first token
        self._before = decode(self._tail[:1])
        return piece

    def _cut_in_broken_bytes(self, text: str, end: int) -> int | None:
        """Return how many tokens of the tail have a text that ends with a whole character, if `text`, the
        text of the first `end` tokens, ends within one. None if that character may still be completed.

        After a cut within a character, the texts of both sides together differ from `text`.
        """
        if end - self._done <= LONGEST_TAIL:
            return None
        decode = self.decoder.decode
        cuts = range(end - 1, self._done, -1)
        return next((c for c in cuts if decode(self._tail[:c]) + decode(self._tail[c:end]) == text), None)

    def _piece(self, new: str, stops: Sequence[str]) -> str:
        """Add text; return the text that can be shown: up to a stop string, or to what may begin one."""
        text = self._waiting + new
        places = [at for at in (text.find(stop) for stop in stops) if at >= 0]
        if places:
            self.stopped, end = True, min(places)
        else:
            end = len(text) - max((_begun(text, stop) for stop in stops), default=0)
        piece, self._waiting = text[:end], text[end:]
        if piece:
            self._pieces.append(piece)
        return piece


def _begun(text: str, stop: str) -> int:
    """Return how many characters at the end of the text are the beginning of the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
