"""A code interpreter: the model writes Python, which the sandbox runs, and reads what it prints."""

import math

from jaxft.rl.environments.environment import RowColumns
from jaxft.rl.environments.sandbox import SandboxLimits, run_python
from jaxft.rl.rewards import last_number


class CodeInterpreter:
    """The reward is 1 if the last number of the final turn is that of the row's answer, or if the text is
    the answer where that has no number. A subclass may have other `limits`.
    """

    limits = SandboxLimits()

    def reset(self, row: RowColumns) -> None:
        """Begin with the row's own prompt."""
        self.answer = str(row["answer"])

    def step(self, state: None, text: str) -> tuple[None, float, bool, None]:
        """End the episode with the first turn that runs no code."""
        expected, got = last_number(self.answer), last_number(text)
        if expected is None:
            right = text.strip().casefold() == self.answer.strip().casefold()
        else:
            right = got is not None and math.isclose(got, expected, rel_tol=1e-6, abs_tol=1e-6)
        return None, float(right), True, None

    def python(self, code: str) -> str:
        """Run a Python program and return what it prints.

        Args:
            code: The program. No variables are left from earlier calls.
        """
        found = run_python(code, self.limits)
        if found.code is None:
            return f"{found.output}\n[stopped after {self.limits.seconds:g} s]".lstrip()
        return found.output or "[no output; print what you want to read]"
