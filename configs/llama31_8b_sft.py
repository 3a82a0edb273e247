r"""Llama-3.1-8B-Instruct, LoRA or in full, on one GPU or sharded over several.

    python scripts/train.py --config configs/llama31_8b_sft.py data=rows.jsonl   # 80 GB
    python scripts/train.py --config configs/llama31_8b_sft.py data=rows.jsonl quant=nf4 micro=16 remat=full   # 8.2 GiB
    python scripts/train.py --config configs/llama31_8b_sft.py data=rows.jsonl full=true mesh.fsdp=8
    python scripts/train.py --config configs/llama31_8b_sft.py data=rows.jsonl full=true params=bfloat16 \
        fused_backward=true batch=1 micro=1 remat=full   # 19 GiB

A step has 16 packed rows of 4096 tokens, `micro` says in how many parts. Needs access to the model on the hub (HF_TOKEN).
"""

from typing import Literal

import jax.numpy as jnp

from jaxft.data.sft import Rows
from jaxft.distributed.sharding import MeshShape
from jaxft.nn.lora import Adapter
from jaxft.nn.quant import Quant
from jaxft.objectives.sft import sft
from jaxft.optim.low_precision import adamw_8bit, adamw_bf16
from jaxft.optim.optimizer import Optim, adafactor, adamw
from jaxft.train.settings import Loop, Run
from jaxft.weights.pretrained import model_for

OPTIMIZERS = {"adamw": adamw, "adamw_8bit": adamw_8bit, "adamw_bf16": adamw_bf16, "adafactor": adafactor}


def config(
    data: str = "configs/data/finetuning.jsonl",
    model: str = "meta-llama/Llama-3.1-8B-Instruct",
    name: str = "llama31_8b_sft",
    full: bool = False,
    lr: float | None = None,
    rank: int = 16,
    epochs: float = 2.0,
    batch: int = 16,
    micro: int = 2,
    max_length: int = 4096,
    params: Literal["float32", "bfloat16"] = "float32",  # of what full=true trains
    fused_backward: bool = False,  # of full=true: no gradient outlives its update, no clipping; takes micro=1 and remat=full
    optimizer: Literal[
        "auto", "adamw", "adamw_8bit", "adamw_bf16", "adafactor"
    ] = "auto",  # auto: adamw, in full adafactor
    quant: Literal["none", "int8", "int4", "nf4", "fp4", "affine4", "kept"] = "none",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    remat: Literal["offload", "pairs", "full", "attention", "projections", "none"] = "attention",
    residual: Literal["bfloat16", "float32"] | None = None,  # of the residual stream between layers: as dtype
    seed: int = 0,
) -> Run:
    """SFT of an 8B model; full fine-tuning takes Adafactor, whose state is small."""
    if optimizer == "auto":
        optimizer = "adafactor" if full else "adamw"
    return Run(
        name=name,
        weights=model,
        model=model_for(model, dtype=jnp.dtype(dtype), remat=remat, residual=jnp.dtype(residual or dtype)),
        objective=sft,
        data=Rows(
            data, held_out=0.05, batch=batch, micro=micro, max_length=max_length, epochs=epochs, seed=seed
        ),
        adapter=None if full else Adapter(rank=rank, alpha=2.0 * rank),
        quant=None if quant == "none" else Quant(quant),
        params=params,
        optim=Optim(
            lr=lr if lr is not None else 1e-5 if full else 2e-4,
            optimizer=OPTIMIZERS[optimizer],
            clip=None if fused_backward else 1.0,
            layerwise=full,
            fused_backward=fused_backward,
        ),
        mesh=MeshShape(data=1, fsdp=-1),
        loop=Loop(log_every=10, eval_every=100, save_every=100),
        general="configs/data/general.jsonl",
        seed=seed,
    )
