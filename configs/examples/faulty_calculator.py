"""An environment in a file of your own: the calculator, one in ten of whose calls fails as a service does.

    python scripts/train.py --config configs/grpo_tools.py start=runs/calculator_format
        environment=configs/examples/faulty_calculator.py:Faulty

An exception of a tool excludes the episode from training and means and is counted in episodes/faults/raised,
unless it is an error in the policy's call (ValueError, TypeError, ...), of which the policy gets the message.
"""

import functools
import random

from jaxft.rl.environments.shipped_environments import Calculator


def faulty(tool):
    """Return the tool with its signature and docstring, of whose calls one in ten fails."""

    @functools.wraps(tool)
    def call(*args, **named):
        if random.random() < 0.1:
            raise ConnectionError("the calculator is down")
        return tool(*args, **named)

    return call


class Faulty(Calculator):
    add, multiply = faulty(Calculator.add), faulty(Calculator.multiply)
