"""Reward models on a folder's base, as a run starts and exports them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from loading_process import one_device
from tiny_llama import tiny_tokenizer

from jaxft.models import adapted
from jaxft.models.adapted import HeadSettings
from jaxft.nn.adapters.lora import Adapter
from jaxft.train import trainable_params
from jaxft.train.export import export
from jaxft.weights import initial_params, pretrained

SETTINGS = Adapter(rank=3, alpha=6.0, targets=("q", "down"))


def torch_score(model, ids):
    """The score of one sequence without padding, by a torch classifier."""
    import torch

    with torch.no_grad():
        return float(model(torch.tensor(np.asarray(ids)[None], dtype=torch.long)).logits[0, 0])


def begun(folder, adapter=SETTINGS, start=None, seed=1):
    """(Trained, the whole tree) of a reward run on a folder's base, with weights that matter."""
    model = adapted.with_scalar_head(pretrained.model_for(str(folder), dtype=jnp.float32))
    t, mesh = trainable_params.partition_params(model, adapter, None), one_device()
    whole = pretrained.load_base(str(folder), t.stored, mesh)
    whole = {
        "base": whole,
        **initial_params.init_all_but_base(t.model, mesh, seed, HeadSettings(adapter, start), str(folder)),
    }
    if adapter and start is None:

        def shake(path, x):
            return (
                x
                if path[-1].key == "scale"
                else x + 0.1 * jax.random.normal(jax.random.key(len(path)), x.shape)
            )  # noqa: E731

        whole["adapter"] = jax.tree_util.tree_map_with_path(shake, whole["adapter"])
    return t, whole


def saved(t, whole, base, out, adapter=SETTINGS):
    """The folder that a run writes."""
    run = SimpleNamespace(
        adapter=adapter,
        model=adapted.with_scalar_head(pretrained.model_for(str(base), dtype=jnp.float32)),
        weights=str(base),
    )
    return export.export_run(t, whole, run, tiny_tokenizer(), out)
