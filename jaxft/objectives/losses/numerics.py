"""Numerically stable building blocks of losses, and the check of their settings."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Float


def require(ok: Any, message: str) -> None:
    """Raise ValueError(message) if `ok` is False. A traced value (a sweep's setting inside a program) is not
    checked.
    """
    if not isinstance(ok, jax.core.Tracer) and not ok:
        raise ValueError(message)


def capped(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Cap an exponent where exp stays finite: at 80, in float16 at 11 (TRL's caps). No gradient above the
    cap.
    """
    return jnp.minimum(x, 11.0 if x.dtype == jnp.float16 else 80.0)


def square(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x^2 with |x| clipped where the square stays finite, at half the root of the dtype's largest
    number.
    """
    limit = float(jnp.finfo(x.dtype).max) ** 0.5 / 2
    return jnp.square(jnp.clip(x, -limit, limit))


def logistic(x: Float[Array, "..."], label_smoothing: float | Array = 0.0) -> Float[Array, "..."]:
    """Return -(1 - eps) log sigmoid(x) - eps log sigmoid(-x): the cross-entropy of a label that is wrong with
    probability eps.
    """
    require(
        (label_smoothing >= 0) & (label_smoothing <= 0.5),
        f"label_smoothing must be in [0, 0.5], got {label_smoothing}",
    )
    return -(1 - label_smoothing) * log_sigmoid(x) - label_smoothing * log_sigmoid(-x)


def log1mexp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return log(1 - exp(x)) for x <= 0, constant above -1e-12, where the true value goes to minus infinity.

    expm1 near 0 and log1p far below lose no digits; they change over at -log 2, and each sees only arguments
    in its own range.

    >>> round(float(log1mexp(jnp.log(jnp.asarray(0.25)))), 3) == round(float(jnp.log(jnp.asarray(0.75))), 3)
    True
    """
    x = jnp.minimum(x, -max(1e-12, float(jnp.finfo(x.dtype).tiny)))
    near = x > -0.6931471805599453
    by_expm1 = jnp.log(-jnp.expm1(jnp.where(near, x, -0.5)))
    by_log1p = jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x)))
    return jnp.where(near, by_expm1, by_log1p)
