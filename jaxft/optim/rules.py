"""Update rules: AdamW, schedule-free AdamW, Adafactor; the type of a rule, and what all of them share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from jaxft import tree
from jaxft.nn.param import Specs, is_spec, kernel
from jaxft.optim.averaging import Averaging, schedule_free
from jaxft.optim.transforms import apply_per_layer
from jaxft.tree import Mask, Params


class UpdateRule(NamedTuple):
    """An optax transformation with facts about its updates and state.

    rowwise: the update of a row depends on no other row, so that a large matrix may be updated in blocks of
    rows. replicated: fields of its state that every device stores in full if their shape differs from their
    parameter's (factored moments, scales); other fields of another shape are an error on a mesh, see
    state_sharding. averaging: the average of a schedule-free optimizer; None for other optimizers.
    """

    transform: optax.GradientTransformation
    rowwise: bool = False
    replicated: tuple[str, ...] = ()
    averaging: Averaging | None = None


def adamw(
    schedule: optax.Schedule,
    specs: Specs,
    weight_decay: float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> UpdateRule:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with float32 moments; only matrices are decayed."""
    check_adam(b1, b2, eps)
    adam = optax.scale_by_adam(b1, b2, eps)
    return UpdateRule(with_decay(adam, schedule, specs, weight_decay), rowwise=True)


def schedule_free_adamw(
    schedule: optax.Schedule,
    specs: Specs,
    weight_decay: float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> UpdateRule:
    """Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682): averaging in place of momentum and of a
    falling learning rate. The averaged weights are evaluated and exported.

    It needs optim.schedule=constant, which has a warm-up. b1: interpolation between the base optimizer's
    weights (0) and their average (1), at which gradients are taken; above 0.
    """
    check_adam(b1, b2, eps)
    if b1 == 0:
        raise ValueError("optim.b1=0 is out of range for schedule_free_adamw; use a number such as 0.9")
    rms = optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)
    transform = with_decay(rms, schedule, specs, weight_decay)
    return UpdateRule(transform, rowwise=True, averaging=schedule_free(b1, schedule))


def adafactor(schedule: optax.Schedule, specs: Specs, weight_decay: float) -> UpdateRule:
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235): factored second moments, clipped updates.

    Updates are clipped at RMS 1 per layer. The learning rate is absolute (no multiplication by the
    parameter's scale) and there is no first moment.
    """
    one_layer = optax.chain(
        optax.scale_by_factored_rms(factored=True, decay_rate=0.8, min_dim_size_to_factor=128),
        optax.clip_by_block_rms(1.0),
    )
    transform = with_decay(apply_per_layer(one_layer, specs), schedule, specs, weight_decay)
    return UpdateRule(transform, replicated=("v_row", "v_col", "v"))


def check_adam(b1: float, b2: float, eps: float) -> None:
    """Raise ValueError for hyper-parameters of Adam that are out of range."""
    for name, beta in (("b1", b1), ("b2", b2)):
        if not 0 <= beta < 1:
            raise ValueError(f"optim.{name}={beta} is out of range; use 0 <= {name} < 1")
    if not 1e-37 < eps < 3.4e38:  # float32, in which the smallest numbers count as 0
        raise ValueError(f"optim.eps={eps} is not above 0 and finite in float32; use one such as 1e-8")


def decay_mask(specs: Specs) -> Mask:
    """Return True for kernels. Norms, biases and scalars are not decayed."""
    return jax.tree.map(lambda s: kernel(s) is not None, specs, is_leaf=is_spec)


def mask_of_matrices(specs: Specs) -> Callable[[Params], Any]:
    """Return a function from parameters, None at some leaves, to their decay mask."""
    decayed = tree.paths(decay_mask(specs))
    return lambda params: tree.map_with_path(lambda path, _: decayed[path], params)


def with_decay(
    direction: optax.GradientTransformation, schedule: optax.Schedule, specs: Specs, weight_decay: float
) -> optax.GradientTransformation:
    """Chain a direction, decoupled weight decay of matrices, and the negative learning rate."""
    return optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay, mask_of_matrices(specs)),
        optax.scale_by_learning_rate(schedule),
    )
