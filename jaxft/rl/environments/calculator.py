"""A calculator with two tools: expressions that take one call or two, such as 17 * 23 + 58."""

import random

from jaxft.data.columns import tool_schema
from jaxft.rl.environment import RowColumns
from jaxft.rl.rewards import last_number


class Calculator:
    """The reward is 1 if the last number of the final turn is the row's answer. Rows: `calculator_rows`."""

    def reset(self, row: RowColumns) -> None:
        """Begin with the row's own prompt."""
        self.answer = last_number(row["answer"])
        if self.answer is None:
            raise ValueError(f"column 'answer' has no number: {row['answer']!r:.80}")

    def step(self, state: None, text: str) -> tuple[None, float, bool, None]:
        """End the episode with the first turn that calls no tool."""
        return None, float(last_number(text) == self.answer), True, None

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        return a + b

    def multiply(self, a: int, b: int) -> int:
        """Multiply two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        return a * b


def calculator_rows(count: int, seed: int, two_calls: float = 0.5) -> list[RowColumns]:
    """Return questions with answers. two_calls: the fraction of them that need both tools.

    Example: calculator_rows(1, 0) is [{"prompt": "What is 62 * 67 + 94?", "answer": "4248"}] or like it.
    """
    rng = random.Random(seed)
    return [_question(rng, rng.random() < two_calls)[0] for _ in range(count)]


def calculator_demonstrations(count: int, seed: int, two_calls: float = 0.0) -> list[RowColumns]:
    """Return conversations that show the format of calls: rows for SFT, with tools. By default each has one
    call, so that a model still has to learn to use the tools one after the other.
    """
    rng = random.Random(seed)
    tools = [tool_schema(getattr(Calculator, name)) for name in ("add", "multiply")]
    rows = list[RowColumns]()
    for _ in range(count):
        row, calls = _question(rng, rng.random() < two_calls)
        messages: list[RowColumns] = [{"role": "user", "content": row["prompt"]}]
        for name, a, b, result in calls:
            call = {"type": "function", "function": {"name": name, "arguments": {"a": a, "b": b}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "name": name, "content": str(result)})
        messages.append({"role": "assistant", "content": f"The answer is {row['answer']}."})
        rows.append({"messages": messages, "tools": tools})
    return rows


def _question(rng: random.Random, both: bool) -> tuple[RowColumns, list[tuple[str, int, int, int]]]:
    """Return a row, and the calls (tool, a, b, result) that answer it."""
    a, b, c = (rng.randint(11, 99) for _ in range(3))
    if both:
        calls = [("multiply", a, b, a * b), ("add", a * b, c, a * b + c)]
        return {"prompt": f"What is {a} * {b} + {c}?", "answer": str(a * b + c)}, calls
    if rng.random() < 0.5:
        return {"prompt": f"What is {a} + {b}?", "answer": str(a + b)}, [("add", a, b, a + b)]
    return {"prompt": f"What is {a} * {b}?", "answer": str(a * b)}, [("multiply", a, b, a * b)]
