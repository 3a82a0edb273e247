"""Preference losses of your own, in a file outside the package: copy this one and change it.

    python scripts/loss_bench.py --loss configs/examples/my_losses.py:mine             # what it does, then a short run beside DPO
    python scripts/train.py --config configs/dpo.py loss=configs/examples/my_losses.py:mine beta=0.2

A loss takes the pairs of a batch and gives one value a pair, never a mean: the pairs' weights and the microbatches are added up
outside. What a pair has is in jaxft/objectives/pair.py.
"""

import jax
import jax.numpy as jnp

from jaxft.objectives.pair import coupled


def mine(pair, beta: float = 0.1, length: float = 0.01):
    """DPO that asks for a wider margin where the answers differ much in length."""
    margin = beta * (pair.chosen.ratio - pair.rejected.ratio)
    return -jax.nn.log_sigmoid(margin - length * abs(pair.chosen.length - pair.rejected.length))


def clipped_tokens(pair, beta: float = 0.1, most: float = 2.0):
    """DPO of log-ratios whose tokens count at most `most` nats each: no single token decides."""
    ratio = jnp.clip(pair.tokens.logp - pair.tokens.reference, -most, most)
    total = pair.total(ratio)
    return -jax.nn.log_sigmoid(beta * (total["chosen"] - total["rejected"]))


@coupled
def centred(pair, state, beta: float = 0.1):
    """DPO of margins less their mean over the step's pairs, which has no gradient: what counts is to be better than usual.

    A loss that looks at other pairs is declared with @coupled, so that it sees all microbatches at once; a pair without weight counts nowhere.
    """
    margin = pair.chosen.ratio - pair.rejected.ratio
    used = (pair.weight > 0).astype(margin.dtype)
    mean = jax.lax.stop_gradient((used * margin).sum() / jnp.maximum(used.sum(), 1))
    return -jax.nn.log_sigmoid(beta * (margin - mean))
