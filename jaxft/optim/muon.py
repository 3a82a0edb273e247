"""Muon: orthogonalised momentum for the kernels of layers, AdamW for all other parameters."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxft import tree
from jaxft.nn.param import ParamSpec, Specs, is_spec, kernel
from jaxft.optim.rules import UpdateRule, with_decay
from jaxft.tree import OptState, Params

QUINTIC = (3.4445, -4.7750, 2.0315)  # c of the Newton-Schulz iteration c0 x + (c1 A + c2 A^2) x, A = x x'
ITERATIONS = 5
TABLE_AXES = {"vocab", "table_width"}  # axes of embeddings, of heads, and of adapters on a head


class MuonState(NamedTuple):
    """The momentum of each matrix."""

    momentum: Params


def muon(
    schedule: optax.Schedule,
    specs: Specs,
    weight_decay: float,
    *,
    momentum: float = 0.95,
    rms: float | None = 0.2,
) -> UpdateRule:
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) with Nesterov momentum.

    Each layer's kernels, and the LoRA matrices on them, are updated by the semi-orthogonal matrix nearest to
    their momentum. Embeddings, heads, norms and biases are updated by AdamW with b1=0.9 and b2=0.999.

    rms: root mean square of an update's elements (Liu et al. 2025, arXiv:2502.16982). 0.2 is near AdamW's, so
    that AdamW's learning rates and weight decay suit both; it is `match_rms_adamw` of torch.optim.Muon. None
    scales by sqrt(max(1, outputs / inputs)) as the original does, for learning rates near 0.02.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"optim.optimizer_kwargs=momentum:{momentum} is out of range; use 0 <= momentum < 1")
    kinds = tree.paths(jax.tree.map(_kind, specs, is_leaf=is_spec))
    direction = optax.partition(
        {"matrix": scale_by_muon(momentum, rms), "other": optax.scale_by_adam()},
        lambda params: tree.map_with_path(lambda path, _: kinds[path], params),
    )
    return UpdateRule(with_decay(direction, schedule, specs, weight_decay))


def _kind(spec: ParamSpec) -> str:
    """Return "matrix" for a kernel of a layer, stacked or not; "other" for tables, heads and vectors."""
    return "matrix" if kernel(spec) and TABLE_AXES.isdisjoint(spec.axes) else "other"


def scale_by_muon(momentum: float, rms: float | None) -> optax.GradientTransformation:
    """Replace every gradient by Muon's update, a matrix for the last two axes of a leaf; see muon."""

    def init(params: Params) -> OptState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def direction(mean: Array, grad: Array) -> Array:
        nesterov = momentum * mean + (1 - momentum) * grad
        inputs, outputs = grad.shape[-2:]
        scale = math.sqrt(max(1, outputs / inputs)) if rms is None else rms * math.sqrt(max(inputs, outputs))
        return scale * orthogonalized(nesterov)

    def update(grads: Params, state: MuonState, params: Params | None = None) -> tuple[Params, OptState]:
        mean = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.momentum, grads)
        return jax.tree.map(direction, mean, grads), MuonState(mean)

    return optax.GradientTransformation(init, update)


def orthogonalized(x: Float[Array, "*batch I O"]) -> Float[Array, "*batch I O"]:
    """Return approximately the nearest semi-orthogonal matrix of each matrix: `u v'` of its SVD `x = u s v'`.

    Five quintic Newton-Schulz iterations bring the singular values to between 0.7 and 1.2; a matrix of zeros
    stays zero.

    >>> x = jnp.array([[3.0, 0.0], [0.0, 0.5]])
    >>> bool(jnp.all(jnp.abs(jnp.diag(orthogonalized(x)) - 1) < 0.35))
    True
    """
    if x.shape[-2] > x.shape[-1]:
        return jnp.swapaxes(orthogonalized(jnp.swapaxes(x, -1, -2)), -1, -2)
    x = x / jnp.maximum(jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True)), 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = QUINTIC[0] * x + (QUINTIC[1] * gram + QUINTIC[2] * (gram @ gram)) @ x
    return x
