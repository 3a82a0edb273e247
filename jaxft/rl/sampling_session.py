"""The interface between rollouts and what samples: rows in progress that can be continued.

The engine is one implementation; a recorded file, which replays a run's rollouts, is another.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import jax

from jaxft.engine.session import Sampled


class TurnSession(Protocol):
    """Rows in progress. Episodes have numbers of the caller's choice.

    A row stays taken from `start` until `drop`, so that a turn that has ended can be continued.
    """

    def start(self, prompt: Sequence[int], episodes: Sequence[int], number: int, max_new: int) -> None:
        """Queue a prompt with a completion for each of the episodes, of at most `max_new` tokens.

        number: of the prompt, from which the random keys of its completions derive.
        """

    def extend(self, episode: int, tokens: Sequence[int], max_new: int) -> None:
        """Append given tokens to an episode whose turn has ended, and sample up to `max_new` more."""

    def drop(self, episode: int) -> None:
        """End an episode. Its row is free for another."""

    def wait(self) -> list[Sampled]:
        """Sample for a while, and return the turns that have ended. [] if none has, or if no row is in
        progress.
        """


class Sampler(Protocol):
    """Opens sessions with one set of weights."""

    def session(self, key: jax.Array) -> AbstractContextManager[TurnSession]:
        """Return a session. key: from which the keys of all completions derive. On exit, rows that are still
        in progress are dropped.
        """
