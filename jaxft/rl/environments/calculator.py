"""A calculator with two tools: expressions that take both, such as 17 * 23 + 58 and (17 + 23) * 58."""

import operator
import random
from collections.abc import Sequence

from jaxft.data.rows.columns import tool_schema
from jaxft.rl.environments.environment import RowColumns
from jaxft.rl.rewards import last_number

OPERATORS = {"add": ("+", operator.add), "multiply": ("*", operator.mul)}


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
            a: First number.
            b: Second number.
        """
        return a + b

    def multiply(self, a: int, b: int) -> int:
        """Multiply two numbers.

        Args:
            a: First number.
            b: Second number.
        """
        return a * b


def calculator_rows(count: int, seed: int) -> list[RowColumns]:
    """Return questions with answers, which take a call of each tool, one after the other.

    Example: calculator_rows(1, 0) is [{"prompt": "What is (62 + 67) * 94?", "answer": "12126"}] or like it.
    """
    rng = random.Random(seed)
    orders = ("multiply", "add"), ("add", "multiply")
    return [_question(rng, rng.choice(orders))[0] for _ in range(count)]


def calculator_demonstrations(count: int, seed: int, chained: float = 0.5) -> list[RowColumns]:
    """Return conversations that show the format of calls: rows for SFT, with tools.

    chained: the fraction of them with two calls, of the same tool or of both. Few need both, so that a model
    still has to learn that.
    """
    rng = random.Random(seed)
    tools = [tool_schema(getattr(Calculator, name)) for name in OPERATORS]
    rows = list[RowColumns]()
    for _ in range(count):
        row, calls = _question(rng, rng.choices(list(OPERATORS), k=1 + (rng.random() < chained)))
        messages: list[RowColumns] = [{"role": "user", "content": row["prompt"]}]
        for name, a, b, result in calls:
            call = {"type": "function", "function": {"name": name, "arguments": {"a": a, "b": b}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "name": name, "content": str(result)})
        messages.append({"role": "assistant", "content": f"The answer is {row['answer']}."})
        rows.append({"messages": messages, "tools": tools})
    return rows


def _question(rng: random.Random, names: Sequence[str]) -> tuple[RowColumns, list[tuple[str, int, int, int]]]:
    """Return a row whose answer takes calls of these tools in turn, and the calls (tool, a, b, result)."""
    value, calls = rng.randint(11, 99), list[tuple[str, int, int, int]]()
    text = str(value)
    for name in names:
        other, (sign, result_of) = rng.randint(11, 99), OPERATORS[name]
        left = f"({text})" if name == "multiply" and "+" in text else text
        result = result_of(value, other)
        calls.append((name, value, other, result))
        text, value = f"{left} {sign} {other}", result
    return {"prompt": f"What is {text}?", "answer": str(value)}, calls
