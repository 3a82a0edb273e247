"""DoRA (Liu et al. 2024, arXiv:2402.09353): an adapted weight with a learned norm for each output.

`W' = m (W + s A B) / ||W + s A B||`, with norms over the inputs of each output. As in PEFT (use_dora), the
norm is a constant for gradients (section 4.3 of the paper). It is computed from `||W||^2 + 2 s <W, A B> +
s^2 ||A B||^2`, so that no sum `W + s A B` is stored.

The leaf `magnitude` [L, O] is m. A magnitude of 0 stands for an output without one, whose factor is 1: of
layers that an adapter from a file leaves out, and of outputs whose weights are all 0.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def output_norms(
    w: Float[Array, "I O"], a: Float[Array, "*K I R"], b: Float[Array, "*K R O"], scale: Float[Array, "*K"]
) -> Float[Array, "*K O"]:
    """Return the norm over inputs of each output of `w + scale a b`, in float32 or wider."""
    wide, highest = np.promote_types(w.dtype, np.float32), jax.lax.Precision.HIGHEST
    a, low = a.astype(wide), b.astype(wide) * scale.astype(wide)[..., None, None]
    squares = jnp.sum(jnp.square(w.astype(wide)), 0)
    cross = jnp.einsum("...ir,io->...ro", a.astype(w.dtype), w, preferred_element_type=wide)
    gram = jnp.einsum("...ir,...is->...rs", a, a, precision=highest)
    squares_low = jnp.sum(low * (jnp.einsum("...rs,...so->...ro", gram, low, precision=highest)), -2)
    total = 2 * jnp.sum(low * cross, -2) + squares_low
    return jnp.sqrt(jnp.maximum(squares.reshape((1,) * (total.ndim - 1) + squares.shape) + total, 0))


def gains(magnitude: Float[Array, "*K O"], norms: Float[Array, "*K O"]) -> Float[Array, "*K O"]:
    """Return the factor of each output, `magnitude / norms` with constant norms; 1 where magnitude is 0."""
    none = magnitude == 0
    norms = jnp.where(none, jnp.ones((), norms.dtype), jax.lax.stop_gradient(norms))
    return jnp.where(none, jnp.ones((), norms.dtype), magnitude.astype(norms.dtype) / norms)


def output_factors(
    magnitude: Float[Array, "*K O"], w: Float[Array, "I O"], a: Array, b: Array, scale: Array
) -> Float[Array, "*K O"]:
    """Return the factor of each output of a base weight w with a pair; only magnitude has a gradient."""
    return gains(magnitude, output_norms(*jax.lax.stop_gradient((w, a, b)), scale))


def scale_outputs(y: Float[Array, "*N O"], gain: Float[Array, "*K O"]) -> Float[Array, "*N O"]:
    """Return `y * gain` in the dtype of y. With a gain [K, O], the rows of y are K groups of equal size."""
    *lead, outs = gain.shape
    groups = y if not lead else y.reshape(*lead, y.shape[0] // lead[0], *y.shape[1:])
    gain = gain.reshape(*lead, *(1,) * (groups.ndim - gain.ndim), outs)
    return (groups.astype(gain.dtype) * gain).astype(y.dtype).reshape(y.shape)


def rescaled(weight: Float[Array, "*L I O"], magnitude: Float[Array, "*L O"]) -> Float[Array, "*L I O"]:
    """Return the weight with each output's norm set to its magnitude; a magnitude of 0 leaves it as it is."""
    norms = jnp.sqrt(jnp.sum(jnp.square(weight), -2))
    return weight * gains(magnitude.astype(weight.dtype), norms)[..., None, :]
