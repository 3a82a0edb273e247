"""A random tiny Llama with an adapter on a mesh, and its export as a run makes it."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from tiny_llama import tiny_tokenizer

from jaxft.distributed import sharding
from jaxft.models.families.llama import LlamaConfig, llama
from jaxft.models.model_types import config_to_hf
from jaxft.nn import param_spec
from jaxft.nn.adapters.lora import Adapter
from jaxft.train import trainable_params
from jaxft.train.export.export import export_run

CONFIG = LlamaConfig(vocab=320, width=64, layers=3, heads=4, kv_heads=2, head_dim=16, mlp=96, tied=True)


def mesh():
    """All devices along fsdp and tensor."""
    return sharding.make_mesh(sharding.MeshShape(data=1, fsdp=-1, tensor=2))


def write_base(folder):
    """What the export reads of the base's folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_hf(CONFIG)))
    return folder


def export(folder, on, kind, base):
    """adapter/, or with "model" model/ of a base that is trained with an adapter on all of its linear layers
    and its head.
    """
    model, settings = llama(CONFIG, dtype=jnp.bfloat16), Adapter(rank=4, targets="all-linear")
    t = trainable_params.partition_params(model, settings, None if kind == "adapter" else ".*")
    random = np.random.default_rng(0)

    def random_leaf(spec, place):
        value = random.standard_normal(spec.shape).astype(np.float32)
        return jax.make_array_from_callback(spec.shape, place, lambda index: value[index])

    whole = jax.tree.map(random_leaf, t.specs, param_spec.shardings(t.specs, on), is_leaf=param_spec.is_spec)
    run = SimpleNamespace(adapter=settings, model=model, weights=str(base))
    return export_run(t, whole, run, tiny_tokenizer(), folder)
