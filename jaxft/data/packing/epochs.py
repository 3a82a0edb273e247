"""The length of a run in optimizer steps, from a number of epochs or of tokens, and the epoch of a step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Epochs:
    """Passes over the rows.

    batch_tokens(epoch): tokens of each batch of an epoch. alike: whether every epoch has the same number of
    batches and of tokens; it hasn't if rows are packed and sources have weights.
    """

    batch_tokens: Callable[[int], Int[np.ndarray, " steps"]]
    alike: bool = True

    def steps_in(self, epoch: int) -> int:
        """Return the optimizer steps of an epoch."""
        return len(self.batch_tokens(0 if self.alike else epoch))

    def locate(self, step: int) -> tuple[int, int]:
        """Return (epoch, step in that epoch)."""
        if self.alike:
            return divmod(step, self.steps_in(0))
        epoch = 0
        while step >= self.steps_in(epoch):
            step -= self.steps_in(epoch)
            epoch += 1
        return epoch, step

    def steps_of_epochs(self, epochs: float) -> int:
        """Return the optimizer steps of a number of epochs, which may be a fraction; at least 1."""
        if self.alike:
            return max(1, math.ceil(epochs * self.steps_in(0) - 1e-9))
        whole = math.floor(epochs)
        rest = (epochs - whole) * self.steps_in(whole) if epochs > whole else 0.0
        return max(1, sum(map(self.steps_in, range(whole))) + math.ceil(rest - 1e-9))

    def steps_of_tokens(self, tokens: int) -> int:
        """Return the optimizer steps after which at least `tokens` tokens were read."""
        steps = epoch = 0
        if self.alike:
            total = int(self.batch_tokens(0).sum())
            epoch, tokens = divmod(tokens - 1, total)
            steps, tokens = epoch * self.steps_in(0), tokens + 1
        while True:
            read = np.cumsum(self.batch_tokens(epoch))
            if tokens <= read[-1]:
                return steps + int(np.searchsorted(read, tokens)) + 1
            steps, tokens, epoch = steps + len(read), tokens - int(read[-1]), epoch + 1


def epochs_of(batch_tokens: Callable[[int], Int[np.ndarray, " steps"]], alike: bool = True) -> Epochs:
    """Return Epochs that compute the batches of each epoch once."""
    return Epochs(lru_cache(maxsize=None)(batch_tokens), alike)
