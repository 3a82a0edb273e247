"""A PEFT folder with an adapter whose products are not zero, as after training."""

import jax
import numpy as np

from jaxft.distributed import sharding
from jaxft.models.adapted import HeadSettings
from jaxft.nn import tree
from jaxft.train import trainable_params
from jaxft.weights import initial_params
from jaxft.weights.peft import peft_write


def save_random_adapter(folder, model, settings, heads=None):
    """Write an adapter of a model with these settings and a random b."""
    whole = trainable_params.partition_params(model, settings, None).model
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    fresh = initial_params.init_all_but_base(whole, mesh, 7, heads or HeadSettings())["adapter"]
    rng = np.random.default_rng(0)
    adapter = tree.map_with_path(
        lambda p, x: rng.normal(0, 0.1, x.shape) if p.endswith("/b") else np.asarray(x), fresh
    )
    peft_write.save_adapter(folder, adapter, settings, model, "base")
