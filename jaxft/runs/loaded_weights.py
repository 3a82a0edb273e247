"""The model that a command line names, on a mesh for inference."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxft.models.adapted import adapted
from jaxft.models.model import Model
from jaxft.nn import quant
from jaxft.runs.named_weights import NamedWeights
from jaxft.tree import Params
from jaxft.weights import adapters, pretrained
from jaxft.weights.stop_tokens import stop_tokens


class LoadedWeights(NamedTuple):
    """A model with its parameters {"base", "adapter"}, without "adapter" for a model alone.

    stop: token ids that end a completion. notes: lines for the user.
    """

    mesh: Mesh
    model: Model
    params: Params
    tokenizer: Any
    stop: tuple[int, ...]
    notes: list[str]


def load_named(
    named: NamedWeights, mesh: Mesh, dtype: str | None = None, kind: quant.QuantKind | None = None
) -> LoadedWeights:
    """Load named weights onto a mesh.

    dtype: of the computation; None is that of the run, or bfloat16. kind: how the base is quantised; None is
    as in the run, or not at all. Raises ValueError for an adapter that doesn't fit the base.
    """
    record = named.record
    chosen = dtype or (record["model"]["dtype"] if record else "bfloat16")
    residual = None if dtype or not record else record["model"].get("residual")
    model = pretrained.model_for(named.ref, dtype=jnp.dtype(chosen), residual=residual)
    storage = quant.quant_setting(kind, record if named.adapter else None)
    params, settings = {"base": pretrained.load_frozen(named.ref, model, mesh, storage)}, None
    if named.adapter:
        pretrained.check_adapter_base(named.adapter, named.ref)
        params["adapter"], settings = adapters.load_adapter(named.adapter, model, mesh)
    tokenizer = pretrained.load_tokenizer(named.tokenizer)
    notes = pretrained.file_notes(named.ref, model)
    stop = stop_tokens(named.ref, model, tokenizer)
    return LoadedWeights(mesh, adapted(model, settings), params, tokenizer, stop, notes)
