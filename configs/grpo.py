"""GRPO with LoRA: several completions of each prompt are scored by a function, and the better ones of each
group are made likelier.

    python scripts/train.py --config configs/grpo.py
    python scripts/train.py --config configs/grpo.py rewards=my_rewards.py:mine data=prompts.jsonl

SmolLM2-135M-Instruct learns to say whether an opinion is positive, on the opinions in configs/data; LoRA on
every linear layer. A rollout of 8 x 8 short completions and its step take about 9 seconds on two CPU cores
without AVX512; the run has 24 of them. A reward is a function of (prompt, completion, row), see
jaxft.rl.rewards; the scores of several are added. With environment= or tools= an episode has several turns,
see configs/grpo_tools.py.

Hardware: 2 CPU cores, 2 GB; 4 minutes.

Advantages, token weights and losses combine freely. Named methods, and what to add to the command for them
(with nothing added it is GRPO with TRL's token weights):

"""

from functools import partial
from typing import Any, Literal

from jaxft.annotations import FiniteFloat, Fraction, NonNegativeFloat, PositiveFloat
from jaxft.objectives.losses.policy_losses import FixedKL, KLInReward, clipped, k1, policy_gradient
from jaxft.objectives.policy import policy
from jaxft.rl.advantages import grpo, maxrl, weighted_sum
from jaxft.rl.estimators import by_group
from jaxft.rl.rewards import exact
from jaxft.rl.rollout_rules import Rules, shape_scores
from jaxft.rl.rollout_source import Rollouts
from jaxft.rl.token_weights import token_mean
from jaxft.train.recipes import (
    OPINIONS,
    AdvantageFunction,
    CombineFunction,
    CorrectionFunction,
    EosPenalty,
    EstimatorFunction,
    FilterFunction,
    KLFactor,
    LearningRate,
    LoraKnobs,
    Overlong,
    PolicyLossFunction,
    ReferenceKnobs,
    RewardFunction,
    RolloutKnobs,
    TokenWeightsFunction,
)
from jaxft.train.settings import Loop, Run

METHODS = {
    "GRPO": "token_weights=sequence_mean",
    "Dr. GRPO": "advantage=centred token_weights=constant_length",
    "DAPO": "filter=nonconstant_groups eps_high=0.28 overlong=2",
    "GSPO": "loss=gspo token_weights=sequence_mean",
    "RLOO": "advantage=rloo loss=policy_gradient token_weights=sequence_sum beta=0.05 kl_in=rewards",
    "REINFORCE++": "estimate=reinforce beta=0.01 kl_in=rewards",
    "REINFORCE++ with the group's mean as baseline": "estimate=group_whitened",
    "DPPO": "loss=dppo_tv advantage=centred token_weights=constant_length ratio_to_sampler=true",
    "MaxRL": "advantage=maxrl",
    "GDPO, of several rewards": "estimate=by_each",
    "GFPO, the shorter half of each group": "advantage=gfpo group=16",
    "GFPO, more of the groups of harder prompts": "advantage=adaptive_gfpo group=16",
    "with truncated importance sampling, TIS": "correction=truncated_tokens",
    "with masked importance sampling, MIS": "correction=masked_completions",
}
__doc__ = str(__doc__) + "\n".join(f"    {name}:\n        {settings}" for name, settings in METHODS.items())


def config(
    base: LoraKnobs = LoraKnobs(),
    prompts: RolloutKnobs = RolloutKnobs(OPINIONS, epochs=0.6),
    name: str = "grpo",
    lr: LearningRate = 5e-4,
    rewards: tuple[RewardFunction, ...] = (),  # exact by default; in addition to an environment's score
    reward_weights: tuple[FiniteFloat, ...] = (),  # data.rules.reward_weights; the last of reward_model
    combine: CombineFunction = weighted_sum,  # data.rules.combine; sum_of_known skips those without a score
    reward_model: str | None = None,  # an additional reward, named as in configs/ppo.py
    missing_eos: EosPenalty = 0.0,
    overlong: Overlong | None = None,
    advantage: AdvantageFunction | None = None,  # grpo by default
    estimate: EstimatorFunction | None = None,  # data.rules.estimate; instead of advantage
    token_weights: TokenWeightsFunction = token_mean,
    filter: FilterFunction | None = None,
    train_on_truncated: bool = True,
    loss: PolicyLossFunction = clipped,  # the loss of a sampled token
    eps_low: Fraction | None = None,  # the lower clipping bound; the loss's default if unset
    eps_high: NonNegativeFloat | None = None,  # the upper clipping bound, such as DAPO's 0.28
    beta: KLFactor = 0.0,
    kl_in: Literal["loss", "rewards"] = "loss",  # where the KL penalty is added
    correction: CorrectionFunction | None = None,
    correction_bounds: tuple[NonNegativeFloat, PositiveFloat] | None = None,  # least,most; else its own
    ratio_to_sampler: bool = False,
    other: ReferenceKnobs = ReferenceKnobs(),
) -> Run:
    """Group-relative policy optimisation."""
    if advantage and estimate:
        raise ValueError("estimate replaces advantage; set only one of them")
    if loss is policy_gradient and prompts.passes * prompts.minibatches > 1:
        raise ValueError(
            "policy_gradient is for completions of the current policy, and passes x minibatches = "
            f"{prompts.passes * prompts.minibatches} steps change it; "
            "use loss=unclipped"
        )
    if kl_in == "rewards" and not beta:
        raise ValueError("kl_in=rewards needs a beta above 0; set beta=0.05")
    if advantage is maxrl and (missing_eos or overlong is not None or kl_in == "rewards"):
        raise ValueError(
            "advantage=maxrl divides by the mean score, which missing_eos, overlong and kl_in=rewards make "
            "negative; leave them out, or use another advantage"
        )
    if correction_bounds and not correction:
        raise ValueError("correction_bounds needs a correction, such as correction=truncated_tokens")
    heads, models = base.reward_model(reward_model, prompts.max_length)
    all_rewards: tuple[Any, ...] = (*prompts.rewards(rewards, exact), *models)
    bounds = {name: x for name, x in (("eps_low", eps_low), ("eps_high", eps_high)) if x is not None}
    if other.reference_model and not beta:
        raise ValueError(f"reference_model={other.reference_model} needs a KL penalty; set beta=0.05")
    penalty: Any = beta
    if kl_in == "rewards":
        penalty = KLInReward(FixedKL(beta, k1, other.penalty_reference))
    elif other.reference_model:
        penalty = FixedKL(beta, reference=other.penalty_reference)
    least_most = dict(zip(("least", "most"), correction_bounds or (), strict=False))
    rules = Rules(
        all_rewards,
        estimate or partial(by_group, advantage=advantage or grpo),
        token_weights,
        reward_weights,
        combine,
        partial(shape_scores, missing_eos=missing_eos, overlong=prompts.overlong(overlong)),
        filter=filter,
        train_on_truncated=train_on_truncated,
        correction=partial(correction, **least_most) if correction and least_most else correction,
        ratio_to_sampler=ratio_to_sampler,
    )
    return Run(
        name=name,
        **base.sections(),
        objective=partial(
            policy,
            loss=partial(loss, **bounds) if bounds else loss,
            beta=penalty,
            temperature=prompts.temperature,
        ),
        data=Rollouts(**prompts.settings(), rules=rules),
        heads=heads,
        optim=base.optim(lr),
        loop=Loop(eval_every=6, save_every=6),
        seed=prompts.seed,
        teacher=other.teacher(base),
    )
