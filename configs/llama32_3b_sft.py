"""Llama-3.2-3B-Instruct, LoRA on instruction rows of your own.

    python scripts/train.py --config configs/llama32_3b_sft.py data=rows.jsonl

One GPU of 24 GB (rank 16, packed 16 x 2048 in 8 microbatches); needs access to the model on the hub (HF_TOKEN).
"""

from typing import Literal

import jax.numpy as jnp

from jaxft.data.sft import Rows
from jaxft.distributed.sharding import MeshShape
from jaxft.nn.lora import Adapter
from jaxft.nn.quant import Quant
from jaxft.objectives.sft import sft
from jaxft.optim.optimizer import Optim
from jaxft.train.settings import Loop, Run
from jaxft.weights.pretrained import model_for


def config(
    data: str = "configs/data/finetuning.jsonl",
    model: str = "meta-llama/Llama-3.2-3B-Instruct",
    name: str = "llama32_3b_sft",
    lr: float = 2e-4,
    rank: int = 16,
    epochs: float = 2.0,
    batch: int = 16,
    micro: int = 8,
    max_length: int = 2048,
    quant: Literal["none", "int8", "int4", "nf4", "fp4", "affine4", "kept"] = "none",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    remat: Literal["offload", "pairs", "full", "attention", "projections", "none"] = "attention",
    residual: Literal["bfloat16", "float32"] | None = None,  # of the residual stream between layers: as dtype
    seed: int = 0,
) -> Run:
    """LoRA supervised fine-tuning of a 3B model."""
    return Run(
        name=name,
        weights=model,
        model=model_for(model, dtype=jnp.dtype(dtype), remat=remat, residual=jnp.dtype(residual or dtype)),
        objective=sft,
        data=Rows(
            data, held_out=0.05, batch=batch, micro=micro, max_length=max_length, epochs=epochs, seed=seed
        ),
        adapter=Adapter(rank=rank, alpha=2.0 * rank),
        quant=None if quant == "none" else Quant(quant),
        optim=Optim(lr=lr),
        mesh=MeshShape(data=1, fsdp=-1),
        loop=Loop(log_every=10, eval_every=100, save_every=100),
        general="configs/data/general.jsonl",
        seed=seed,
    )
