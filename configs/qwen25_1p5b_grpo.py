"""GRPO of Qwen2.5-1.5B-Instruct on GSM8K, rewarding the right number, with full fine-tuning.

    python scripts/train.py --config configs/qwen25_1p5b_grpo.py   # 32 GB of GPU memory
    python scripts/train.py --config configs/qwen25_1p5b_grpo.py rank=16 full=false lr=1e-5   # with LoRA
    python scripts/train.py --config configs/qwen25_1p5b_grpo.py model=Qwen/Qwen2.5-1.5B   # the base model

The settings are DAPO's: no KL penalty and so no reference, eps_high=0.28, the same weight for every token,
no training on groups whose completions all have the same score, and a penalty for completions that almost
reach max_new tokens. For Dr. GRPO add advantage=centred token_weights=constant_length eps_high=0.2
overlong=none. Other rewards and methods: configs/grpo.py.

Plan for one H100: 31.1 GiB, 4.4 s for each of the four optimizer steps of a rollout of 64 x 8 completions;
the 460 steps of an epoch take 35 minutes, plus the time of sampling. For a TPU v5e slice of eight chips
(--devices v5e:2x4, micro=2 remat=full): 9.2 GiB per chip, 2.2 s. Times are estimates by scripts/plan.py, not
measured.

Hardware: a GPU of 40 GB; 35 minutes plus sampling on an H100 (planned).
"""

from functools import partial

from jaxft.annotations import NonNegativeFloat
from jaxft.objectives.losses.policy_losses import clipped
from jaxft.objectives.policy import policy
from jaxft.rl.advantages import grpo, nonconstant_groups
from jaxft.rl.estimators import by_group
from jaxft.rl.rewards import number
from jaxft.rl.rollout_rules import Rules, shape_scores
from jaxft.rl.rollout_source import Rollouts
from jaxft.rl.token_weights import token_mean
from jaxft.train.recipes import (
    AdvantageFunction,
    GpuKnobs,
    KLFactor,
    Overlong,
    RewardFunction,
    RolloutKnobs,
    TokenWeightsFunction,
)
from jaxft.train.settings import Run


def config(
    base: GpuKnobs = GpuKnobs("Qwen/Qwen2.5-1.5B-Instruct", general=None, full=True, lr=1e-6),
    prompts: RolloutKnobs = RolloutKnobs(
        "openai/gsm8k/main:train",
        held_out=0.02,
        batch=64,
        micro=8,
        max_prompt=256,
        max_new=512,
        minibatches=4,
    ),
    columns: tuple[str, ...] = ("prompt=question",),
    name: str = "qwen25_1p5b_grpo",
    rewards: tuple[RewardFunction, ...] = (number,),  # each scores a completion
    advantage: AdvantageFunction = grpo,  # of a completion within its group
    token_weights: TokenWeightsFunction = token_mean,
    eps_high: NonNegativeFloat = 0.28,  # the upper clipping bound
    overlong: Overlong | None = 128,
    beta: KLFactor = 0.0,
) -> Run:
    """GRPO of Qwen2.5-1.5B on GSM8K."""
    shape = partial(shape_scores, overlong=prompts.overlong(overlong))
    estimate = partial(by_group, advantage=advantage)
    scored = prompts.rewards(rewards, number)
    rules = Rules(scored, estimate, token_weights, shape=shape, filter=nonconstant_groups)
    loss = partial(clipped, eps_high=eps_high)
    objective = partial(policy, loss=loss, beta=beta, temperature=prompts.temperature)
    source = prompts.source(Rollouts, columns=columns, rules=rules)
    return Run(name=name, objective=objective, **base.sharded_run(every=20), **source)
