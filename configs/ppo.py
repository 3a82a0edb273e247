"""PPO with LoRA: a reward model trains a policy, with a critic; all of them are adapters and heads on one
base.

    python scripts/train.py --config configs/reward.py
    python scripts/train.py --config configs/ppo.py reward=runs/reward
    python scripts/train.py --config configs/ppo.py reward=runs/reward critic=reward quant=nf4
    python scripts/train.py --config configs/ppo.py reward=my_rewards.py:mine

SmolLM2-135M-Instruct on the prompts of the pairs in configs/data: 21 rollouts of 8 x 4 completions with two
passes over each. On a CPU without AVX512-BF16 dtype=float32 is faster, and takes about three times as long.
From an adapter that answers such questions (configs/sft.py data=configs/data/finetuning.jsonl lr=2e-3
name=chat, then start=runs/chat) expect the held-out reward to rise by 1.6 to 1.9 of its standard deviations,
at a KL of 6 to 10 nats per completion. The reference is the policy at step 0, or reference_model=.

`reward` is a run's folder (configs/reward.py) or a PEFT folder with a head, which share the base; a
classifier with one label in a folder or as org/name@revision, which is a separate model, stored in bfloat16
or as set by quant=; or a function of (prompt, completion, row). `critic` is one of
    fresh    a fresh adapter and head
    reward   the same, starting as the reward model; the default if the reward model shares the base
    shared   a head on the policy's hidden states, which saves the critic's passes; the default otherwise
    full     a separate model, trained in full

Hardware: 2 CPU cores with AVX512-BF16, 3 GB; 12 minutes.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax

from jaxft.annotations import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat
from jaxft.models.adapted import HeadSettings, scores, view
from jaxft.models.model import Model
from jaxft.nn.adapters.lora import Adapter
from jaxft.objectives.losses.policy_losses import AdaptiveKL, FixedKL, KLInReward, clipped, k1
from jaxft.objectives.objective import Objective
from jaxft.objectives.policy import Critic, policy, value_function, with_target_kl
from jaxft.rl.advantages import scale_scores
from jaxft.rl.estimators import actor_critic
from jaxft.rl.rollout_rules import Rules, shape_scores
from jaxft.rl.rollout_source import Rollouts
from jaxft.train.recipes import (
    PAIRS,
    EosPenalty,
    KLFunction,
    LearningRate,
    LoraKnobs,
    PolicyLossFunction,
    ReferenceKnobs,
    RewardFunction,
    RolloutKnobs,
)
from jaxft.train.settings import Loop, Run


def actor_and_critic(
    model: Model,
    policy: Callable[..., Objective],
    critic: Callable[..., Critic],
    shared: bool,
    target_kl: float | None,
) -> Objective:
    """Return the objective of a policy and its critic, which has a separate forward pass or, if `shared`, is
    a head on the policy's hidden states.

    A shared critic sends no gradient to the hidden states: it would move the policy more than the rewards do.
    """

    def hidden(params: Any, batch: Any, policy_hidden: Any) -> Any:
        if shared:
            return jax.lax.stop_gradient(policy_hidden)
        return model.hidden(view(params, "critic"), batch)[0]

    def head(params: Any, h: Any) -> Any:
        return scores(view(params, "critic"), h)

    objective = policy(model, critic=critic(value_function(hidden, head)))
    return objective if target_kl is None else with_target_kl(objective, target_kl)


def critic_head(kind: str, reward_head: HeadSettings | None, base: LoraKnobs) -> HeadSettings:
    """Return the critic's head, with an adapter or a separate base model as its kind requires.

    reward_head: of the reward model, None if it does not share the base. Raises ValueError if `kind` needs
    it.
    """
    if kind == "reward":
        if reward_head is None:
            raise ValueError(
                "critic=reward starts from a reward model that shares the base, and reward= is none; use "
                "critic=shared, fresh or full"
            )
        return replace(reward_head, trained=True)
    if kind == "fresh":
        return HeadSettings(Adapter(rank=base.rank or 16))
    return HeadSettings(weights=base.weights) if kind == "full" else HeadSettings()


def config(
    base: LoraKnobs = LoraKnobs(),
    prompts: RolloutKnobs = RolloutKnobs(PAIRS, epochs=0.75, group=4, max_prompt=256, max_new=32, passes=2),
    name: str = "ppo",
    lr: LearningRate = 3e-4,
    reward: str | RewardFunction = "runs/reward",  # a run, a folder or org/name of a classifier, a function
    critic: Literal["fresh", "reward", "shared", "full"]
    | None = None,  # reward (default on its base): starts from it; shared (default otherwise): a head
    loss: PolicyLossFunction = clipped,  # the loss of a sampled token
    kl: KLFunction = k1,  # estimator of the KL in the rewards
    kl_coef: NonNegativeFloat = 0.05,  # factor of the KL in the rewards
    kl_target: PositiveFloat | None = None,  # nats per completion, which an adaptive coefficient aims for
    target_kl: PositiveFloat | None = None,  # nats per token that end the passes over a rollout
    missing_eos: EosPenalty = 1.0,
    limit: PositiveFloat | None = None,  # clips scores to +-limit
    scale: bool = False,  # divides scores by the standard deviation of all scores so far
    whiten_rewards: bool = False,  # divides rewards of tokens by their standard deviation
    gamma: Fraction = 1.0,  # discount of GAE
    lam: Fraction = 0.95,  # lambda of GAE
    eps: Fraction | None = None,  # clipping bound of the ratio, the loss's own by default
    value_coef: PositiveFloat = 0.1,  # weight of the critic's loss
    value_clip: PositiveFloat | None = 0.2,  # largest change of a value since sampling
    entropy: NonNegativeFloat = 0.0,  # weight of a bonus for the policy's entropy
    warm_up: NonNegativeInt = 0,
    other: ReferenceKnobs = ReferenceKnobs(),
) -> Run:
    """Proximal policy optimisation."""
    heads, rewards = base.reward_model(reward, prompts.max_length)
    kind = critic or ("reward" if heads else "shared")
    penalty: Any = FixedKL(kl_coef, kl, other.penalty_reference)
    if kl_target is not None:
        if not kl_coef:
            raise ValueError("kl_target adapts kl_coef by factors, which needs a kl_coef above 0")
        horizon = 10_000 * prompts.passes
        penalty = AdaptiveKL(kl_coef, kl_target, horizon, kl, other.penalty_reference)
    rules = Rules(
        rewards,
        partial(actor_critic, gamma=gamma, lam=lam, whiten_rewards=whiten_rewards, kl=kl),
        warm_up=warm_up,
        shape=partial(shape_scores, missing_eos=missing_eos, limit=limit),
        scale=scale_scores if scale else None,
    )
    return Run(
        name=name,
        **base.sections(),
        objective=partial(
            actor_and_critic,
            policy=partial(
                policy,
                loss=loss if eps is None else partial(loss, eps_low=eps, eps_high=eps),
                beta=KLInReward(penalty),
                entropy=entropy,
                temperature=prompts.temperature,
            ),
            critic=partial(Critic, coef=value_coef, clip=value_clip),
            shared=kind == "shared",
            target_kl=target_kl,
        ),
        data=Rollouts(**prompts.settings(), eval_group=prompts.group, rules=rules),
        heads={"critic": critic_head(kind, heads.get("reward"), base), **heads},
        optim=base.optim(lr),
        loop=Loop(eval_every=14, save_every=14),
        seed=prompts.seed,
        teacher=other.teacher(base),
    )
