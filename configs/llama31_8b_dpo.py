"""Llama-3.1-8B-Instruct, DPO with LoRA on one 80 GB GPU or sharded over several.

    python scripts/train.py --config configs/llama31_8b_dpo.py data=pairs.jsonl
    python scripts/train.py --config configs/llama31_8b_dpo.py data=pairs.jsonl start=runs/llama31_8b_sft

Needs access to the model on the hub (HF_TOKEN). The reference costs a forward pass and no memory; reference=precomputed pays it
once. Expect the first loss to be 0.6931 and rewards/accuracies on held-out pairs to rise above one half in the first tenth.
"""

from functools import partial
from typing import Literal

import jax.numpy as jnp

from jaxft.data.pairs.source import PairRows
from jaxft.distributed.sharding import MeshShape
from jaxft.nn.quant import Quant
from jaxft.objectives.preference import preference
from jaxft.objectives.preference_losses import dpo
from jaxft.optim.optimizer import Optim
from jaxft.train.settings import Loop, Run
from jaxft.weights.adapters import adapter_settings
from jaxft.weights.pretrained import model_for


def config(
    data: str = "configs/data/pairs.jsonl",
    model: str = "meta-llama/Llama-3.1-8B-Instruct",
    name: str = "llama31_8b_dpo",
    start: str | None = None,
    beta: float = 0.1,
    reference: Literal["start", "precomputed"] = "start",
    lr: float = 5e-6,
    rank: int | None = None,  # of a fresh adapter: 16
    epochs: float = 1.0,
    batch: int = 32,
    micro: int = 8,
    max_length: int = 2048,
    quant: Literal["none", "int8", "int4", "nf4", "fp4", "affine4", "kept"] = "none",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    remat: Literal["offload", "pairs", "full", "attention", "projections", "none"] = "attention",
    residual: Literal["bfloat16", "float32"] | None = None,  # of the residual stream between layers: as dtype
    seed: int = 0,
) -> Run:
    """DPO of an 8B model."""
    llm = model_for(model, dtype=jnp.dtype(dtype), remat=remat, residual=jnp.dtype(residual or dtype))
    return Run(
        name=name,
        weights=model,
        model=llm,
        objective=partial(preference, loss=partial(dpo, beta=beta), beta=beta, reference=reference),
        data=PairRows(
            data, held_out=0.05, batch=batch, micro=micro, max_length=max_length, epochs=epochs, seed=seed
        ),
        adapter=adapter_settings(start, rank, llm),
        start=start,
        quant=None if quant == "none" else Quant(quant),
        optim=Optim(lr=lr),
        mesh=MeshShape(data=1, fsdp=-1),
        loop=Loop(log_every=5, eval_every=50, save_every=50),
        general="configs/data/general.jsonl",
        seed=seed,
    )
