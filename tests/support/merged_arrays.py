"""A base with an adapter merged into it, as arrays."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.weights.edit.merged_weights import LazyTensor, merge_params


def merged_arrays(base, adapter, dtype, token_ids=()):
    """The parameters that an export writes: those that the adapter changes in `dtype`, others as they are."""
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x)) if isinstance(x, LazyTensor) else x,
        merge_params(base, adapter, dtype, token_ids),
    )
