"""Your own preference losses, in a file outside the package: copy this one and change it.

    python scripts/loss_bench.py --loss configs/examples/my_losses.py:mine  # checks and a short run
    python scripts/train.py --config configs/dpo.py loss=configs/examples/my_losses.py:mine beta=0.2

A loss takes a batch of pairs and returns one value per pair, never a mean: the objective weights and sums
them over microbatches. jaxft/objectives/pair.py documents the fields of a pair. Declare a loss that reads no
reference with @reference_free, so that none is run.
"""

import jax
import jax.numpy as jnp

from jaxft.objectives.pair import coupled, reference_free


def mine(pair, beta: float = 0.1, length: float = 0.01):
    """DPO with a margin that grows with the difference in length."""
    margin = beta * (pair.chosen.ratio - pair.rejected.ratio)
    return -jax.nn.log_sigmoid(margin - length * abs(pair.chosen.length - pair.rejected.length))


def clipped_tokens(pair, beta: float = 0.1, cap: float = 2.0):
    """DPO of log-ratios that are clipped to +-`cap` nats per token, so that no single token dominates."""
    ratio = jnp.clip(pair.tokens.logp - pair.tokens.reference, -cap, cap)
    total = pair.total(ratio)
    return -jax.nn.log_sigmoid(beta * (total["chosen"] - total["rejected"]))


@reference_free
def likelier(pair, beta: float = 2.0):
    """The chosen response should be likelier per token than the rejected one."""
    return -jax.nn.log_sigmoid(beta * (pair.chosen.mean - pair.rejected.mean))


@coupled
def centred(pair, state, beta: float = 0.1):
    """DPO of margins minus their mean over the step's pairs, without gradient through the mean.

    A loss that reads other pairs is declared with @coupled, so that it is called once with all microbatches.
    Pairs of weight 0 must not influence it.
    """
    margin = pair.chosen.ratio - pair.rejected.ratio
    used = (pair.weight > 0).astype(margin.dtype)
    mean = jax.lax.stop_gradient((used * margin).sum() / jnp.maximum(used.sum(), 1))
    return -jax.nn.log_sigmoid(beta * (margin - mean))
