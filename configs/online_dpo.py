"""Online DPO with LoRA: any preference loss on pairs of the policy's own best and worst completions, ranked
by a reward.

    python scripts/train.py --config configs/online_dpo.py
    python scripts/train.py --config configs/online_dpo.py reward=runs/reward data=prompts.jsonl
    python scripts/train.py --config configs/online_dpo.py loss=ipo

SmolLM2-135M-Instruct on the opinions in configs/data, 40 steps; after half of them 67 % of the held-out
completions are right, 3 % at the start (in float32). `reward` is a function of (prompt, completion, row), or
names a reward model as in configs/ppo.py. A prompt whose completions all have the same score is not trained
on. The reference is the policy at step 0, or reference_model=.

Hardware: 2 CPU cores, 3 GB; 14 minutes.
"""

from functools import partial

from jaxft.objectives.losses.preference_losses import dpo
from jaxft.objectives.preference import preference, with_beta
from jaxft.rl.online_pairs import OnlinePairs
from jaxft.rl.rewards import exact
from jaxft.rl.rollout_rules import Rules
from jaxft.train.recipes import (
    OPINIONS,
    LearningRate,
    LoraKnobs,
    PairBeta,
    PairLossFunction,
    PromptKnobs,
    ReferenceKnobs,
    RewardFunction,
)
from jaxft.train.settings import Loop, Run


def config(
    base: LoraKnobs = LoraKnobs(),
    prompts: PromptKnobs = PromptKnobs(OPINIONS, batch=16, group=4, epochs=2.0),
    name: str = "online_dpo",
    lr: LearningRate = 1e-4,
    reward: str | RewardFunction = exact,  # a run, a classifier or a function
    loss: PairLossFunction = dpo,  # the loss of a pair
    beta: PairBeta = 0.1,
    other: ReferenceKnobs = ReferenceKnobs(),
) -> Run:
    """Direct preference optimisation on the policy's own completions."""
    heads, rewards = base.reward_model(reward, prompts.max_length)
    return Run(
        name=name,
        **base.sections(),
        objective=partial(preference, **with_beta(loss, beta), reference=other.reference()),
        data=OnlinePairs(**prompts.settings(), rules=Rules(rewards)),
        heads=heads,
        optim=base.optim(lr),
        loop=Loop(eval_every=10, save_every=10),
        seed=prompts.seed,
        teacher=other.teacher(base),
    )
