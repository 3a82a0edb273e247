"""The text of a completion while its tokens arrive: whole characters, up to a stop string."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what a tokenizer decodes an unfinished character to


class TextStream:
    """Turns tokens into text, piece by piece. The pieces together are the text of all tokens.

    decode: token ids -> text. stops: strings before which the text ends. A piece never ends within a
    character, nor with what may be the beginning of a stop string. `stopped`: whether one was found; further
    tokens then add nothing. `text`: all pieces so far.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()):
        self.decode, self.stops = decode, tuple(stops)
        self.ids: list[int] = []
        self.text, self.stopped = "", False

    def add(self, token: int) -> str:
        """Return the text that is certain after one more token."""
        return "" if self.stopped else self.add_all([token])

    def add_all(self, tokens: Sequence[int]) -> str:
        """Return the text that is certain after further tokens; with stop strings, add them one by one."""
        if self.stopped:
            return ""
        self.ids += tokens
        whole = self.decode(self.ids)
        return self._certain(whole.rstrip(REPLACEMENT), self.stops)

    def finish(self) -> str:
        """Return the rest of the text after the last token."""
        if self.stopped:
            return ""
        return self._certain(self.decode(self.ids), ())

    def _certain(self, whole: str, stops: Sequence[str]) -> str:
        start = len(self.text)
        found = [at for at in (whole.find(stop, start) for stop in self.stops) if at >= 0]
        if found:
            self.stopped, end = True, min(found)
        else:
            end = len(whole) - max((_begun(whole, stop) for stop in stops), default=0)
        piece = whole[start : max(end, start)]
        self.text += piece
        return piece


def _begun(text: str, stop: str) -> int:
    """Return the length of the longest end of the text that is the beginning of the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
