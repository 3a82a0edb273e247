"""Guess a number: the environment answers each guess by "Higher." or "Lower."."""

import random

from jaxft.rl.environments.environment import RowColumns
from jaxft.rl.rewards import last_number


class GuessNumber:
    """The reward is 1 for the right number. Rows: `guess_rows`; data.max_turns limits the guesses."""

    def reset(self, row: RowColumns) -> None:
        """Begin with the row's own prompt."""
        self.number = int(row["answer"])

    def step(self, state: None, text: str) -> tuple[str | None, float, bool, None]:
        """Compare the last number of the text."""
        guess = last_number(text)
        if guess is None:
            return "Say a number.", 0.0, False, None
        if guess == self.number:
            return None, 1.0, True, None
        return ("Higher." if guess < self.number else "Lower."), 0.0, False, None


def guess_rows(count: int, seed: int, most: int = 20) -> list[RowColumns]:
    """Return prompts with a number from 1 to `most` as the answer."""
    rng = random.Random(seed)
    prompt = f"Guess my number from 1 to {most}. I say whether it is higher or lower. Answer with a number."
    return [{"prompt": prompt, "answer": str(rng.randint(1, most))} for _ in range(count)]
