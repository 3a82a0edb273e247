"""A Meter without a run, and steps that are fed to it by hand."""

from types import SimpleNamespace

import numpy as np

from jaxft.batch import Tokens
from jaxft.objectives import metrics
from jaxft.objectives.objective import Facts
from jaxft.train.logs.meter import Meter


def make_meter(max_bad, counters=None, model=None, facts=None):
    """A meter of a source with 10 steps an epoch whose rows are called `row <step>`. facts: of its
    objective.
    """
    info = SimpleNamespace(steps_per_epoch=10)
    source = SimpleNamespace(info=info, row_names=lambda step: [f"row {step}"])
    model = model or SimpleNamespace(forward_flops=lambda tokens, context, read: 1.0)
    partition = SimpleNamespace(model=model, mask={"base": {}})
    objective = SimpleNamespace(facts=facts or Facts())
    member = SimpleNamespace(programs=SimpleNamespace(partition=partition, objective=objective))
    return Meter(member, source, max_bad, counters)


def feed(meter, step, loss, bad=False, batch=None):
    """One step with this loss, of five tokens if no batch is given."""
    one = np.float32(1)
    found = {
        name: metrics.Sum(np.float32(x), one)
        for name, x in (("loss", loss), ("skipped", bad), ("learning_rate", 1e-3))
    }
    meter.add(step, batch or five_tokens(), found)


def five_tokens():
    """An example of five tokens without padding."""
    one = np.ones((1, 1, 5), int)
    return Tokens(one, one, np.arange(5)[None, None], one[..., :4], one[..., :4], np.full((1, 1, 4), 0.25))
