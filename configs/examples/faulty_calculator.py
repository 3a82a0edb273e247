"""An environment in a file of your own: the calculator, where 10 % of the calls fail, as a service's may.

    python scripts/train.py --config configs/grpo_tools.py start=runs/calculator_format
        environment=configs/examples/faulty_calculator.py:Faulty

If a tool raises, the episode is excluded from training and means and counted in episodes/faults/raised. An
error in the policy's call (ValueError, TypeError, ...) is not counted: the policy gets its message.
"""

import functools
import random

from jaxft.rl.environments.shipped_environments import Calculator


def faulty(tool):
    """Return the tool with the same signature and docstring; 10 % of its calls raise ConnectionError."""

    @functools.wraps(tool)
    def call(*args, **named):
        if random.random() < 0.1:
            raise ConnectionError("the calculator is down")
        return tool(*args, **named)

    return call


class Faulty(Calculator):
    add, multiply = faulty(Calculator.add), faulty(Calculator.multiply)
