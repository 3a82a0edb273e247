"""The loss of one target token: cross-entropy, with label smoothing, z-loss or dynamic fine-tuning."""

from dataclasses import dataclass
from typing import Annotated, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.annotations import BELOW_ONE, at_least, check_bounds


class TokenValues(Protocol):
    """The part of logprobs.LogProbs that a loss reads, one number per token."""

    @property
    def logp(self) -> Float[Array, "..."]:
        """Log-prob of the target."""

    @property
    def lse(self) -> Float[Array, "..."] | None:
        """Log-sum-exp of the logits; None where no loss of the forward pass needs it."""

    @property
    def mean_logit(self) -> Float[Array, "..."] | None:
        """Mean of the logits over the vocabulary; None as for lse."""


@dataclass(frozen=True)
class TargetLoss:
    """The loss of a token: `-(1 - s) log p(target) - s mean_v log p_v + z lse^2`.

    p is the softmax over the vocabulary, lse the log-sum-exp of the logits. label_smoothing: s, as
    label_smoothing_factor in transformers (Szegedy et al. 2016, arXiv:1512.00567). z_loss: z, which keeps lse
    near 0 (1e-4 in PaLM, Chowdhery et al. 2022, arXiv:2204.02311). dft: dynamic fine-tuning (Wu et al. 2025,
    arXiv:2508.05629), which weights a token's cross-entropy by its probability: `-sg(p) log p`, where sg
    stops the gradient.

    >>> from types import SimpleNamespace
    >>> token = SimpleNamespace(logp=jnp.log(jnp.array([0.5])), lse=jnp.array([3.0]), mean_logit=None)
    >>> losses = CROSS_ENTROPY, TargetLoss(z_loss=0.01), TargetLoss(dft=True)
    >>> [round(loss.value(token).item(), 3) for loss in losses]
    [0.693, 0.783, 0.347]
    """

    label_smoothing: Annotated[float, BELOW_ONE] = 0.0
    z_loss: Annotated[float, at_least(0)] = 0.0
    dft: bool = False

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.dft and self.label_smoothing:
            raise ValueError(
                f"dft=true and label_smoothing={self.label_smoothing} are two losses; set label_smoothing=0"
            )

    @property
    def is_plain(self) -> bool:
        """Whether the loss is the cross-entropy."""
        return self == CROSS_ENTROPY

    def value(self, lp: TokenValues) -> Float[Array, "..."]:
        """Return the loss of each token from its logprobs.LogProbs."""
        s, loss = self.label_smoothing, -lp.logp
        if self.dft:
            loss = jax.lax.stop_gradient(jnp.exp(lp.logp)) * loss
        if s:
            loss = (1 - s) * loss - s * (_given(lp.mean_logit) - _given(lp.lse))
        return loss if self.z_loss == 0 else loss + self.z_loss * jnp.square(_given(lp.lse))

    def slope(
        self, p: Float[Array, "... V"], targets: Int[Array, "..."], lp: TokenValues
    ) -> Float[Array, "... V"]:
        """Return d value / d logits. p: the softmax of the logits."""
        s = self.label_smoothing
        at_target = jax.lax.broadcasted_iota(targets.dtype, p.shape, p.ndim - 1) == targets[..., None]
        slope = p - at_target.astype(p.dtype)
        if self.dft:
            slope = jnp.exp(lp.logp)[..., None] * slope
        if s:
            slope = p - (1 - s) * at_target.astype(p.dtype) - s / p.shape[-1]
        return slope if self.z_loss == 0 else slope + 2 * self.z_loss * _given(lp.lse)[..., None] * p


def _given(x: Float[Array, "..."] | None) -> Float[Array, "..."]:
    """Return x. Raises ValueError for None: a sweep's forward pass follows its first member."""
    if x is None:
        raise ValueError(
            "label_smoothing or z_loss of a member of a sweep needs the first member to have it too; list "
            "the members so, or train this one alone"
        )
    return x


CROSS_ENTROPY = TargetLoss()
