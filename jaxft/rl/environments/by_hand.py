"""A person in the policy's place: turns are typed, everything else is as in a rollout."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxft.data.chat.tool_calls import CallFormat
from jaxft.engine.session import Finish, Sampled
from jaxft.rl.trajectory import Trajectory

CALL = "/call"


class TypedTurns:
    """A session whose turns a person types; see play.TurnSession.

    read() -> a turn; it ends the program by EOFError. show(text): prints what the policy is given. A turn
    "/call NAME {...}" is written as a call of a tool in the template's format.
    """

    def __init__(
        self,
        read: Callable[[], str],
        show: Callable[[str], None],
        tokenizer: Any,
        stop: int,
        format: CallFormat | None,
    ):
        self.read, self.show, self.tokenizer, self.stop, self.format = read, show, tokenizer, stop, format
        self.asked = dict[int, int]()  # the most tokens of the turn that each episode is to have

    def start(self, prompt: Sequence[int], episodes: Sequence[int], number: int, max_new: int) -> None:
        """Show a prompt."""
        self.asked |= dict.fromkeys(episodes, max_new)
        self.show(self.tokenizer.decode(prompt))

    def extend(self, episode: int, tokens: Sequence[int], max_new: int) -> None:
        """Show what answers a turn."""
        self.asked[episode] = max_new
        self.show(self.tokenizer.decode(tokens))

    def drop(self, episode: int) -> None:
        """End an episode."""
        self.asked.pop(episode, None)

    def wait(self) -> list[Sampled]:
        """Read a turn of the first episode that is to have one."""
        if not self.asked:
            return []
        episode, most = next(iter(self.asked.items()))
        del self.asked[episode]
        text = written_call(self.read(), self.format)
        ids = [*self.tokenizer(text, add_special_tokens=False).input_ids, self.stop]
        finish: Finish = "stop" if len(ids) <= most else "length"
        tokens = np.array(ids[:most], np.int32)
        return [Sampled(episode, tokens, np.zeros(len(tokens), np.float32), finish)]


def written_call(text: str, format: CallFormat | None) -> str:
    """Return a typed turn as the policy would write it. Text that is no valid /call is returned unchanged.

    Example: written_call('/call add {"a": 1, "b": 2}', call_format("hermes")) is
    '<tool_call>\\n{"name": "add", "arguments": {"a": 1, "b": 2}}\\n</tool_call>'.
    """
    name, _, arguments = text.removeprefix(CALL).strip().partition(" ")
    if format is None or not text.startswith(f"{CALL} "):
        return text
    try:
        call = json.dumps({"name": name, "arguments": json.loads(arguments or "{}")}, ensure_ascii=False)
    except ValueError:
        return text
    return f"{format.opens}\n{call}\n{format.closes or ''}".strip()


def result_line(episode: Trajectory) -> str:
    """Return how an episode ended, its score and its faults, in a line."""
    ended = "fault" if episode.fault else "ended" if episode.ended else "limit"
    faults = "".join(f"; {fault.kind}: {fault.text}" for fault in episode.faults)
    return f"[{ended}; score {episode.score:g}{faults}]"
