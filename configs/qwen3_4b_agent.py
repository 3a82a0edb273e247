"""GRPO of Qwen3-4B as an agent: it searches a library and runs Python over several turns, with LoRA.

    python scripts/train.py --config configs/qwen3_4b_agent.py                # questions that need a search
    python scripts/train.py --config configs/qwen3_4b_agent.py environment=code_interpreter data=mine.jsonl
    python scripts/train.py --config configs/qwen3_4b_agent.py environment=my_env.py:Library data=mine.jsonl

Rows have a prompt and an answer; the reward is 1 for the right answer in the last turn. An episode has up to
six turns and 4,096 tokens. Qwen3's template leaves the reasoning of earlier questions out; if that changes
tokens that the policy has sampled, the next turn begins a new training row. The settings are DAPO's, as in
configs/qwen25_1p5b_grpo.py: eps_high=0.28, no KL penalty, groups with equal scores left out.
The code interpreter runs what the model writes in a process with limits, which is no security boundary.

`jaxft plan qwen3_4b_agent --devices h100:1` compiles a train step of 28 GiB and sampling of 47 GiB, of
which the key/value cache of 64 rows takes 39 GiB.

Hardware: a GPU of 80 GB; 79 s a step plus sampling on an H100 (planned).
"""

from functools import partial

from jaxft.annotations import NonNegativeFloat
from jaxft.objectives.losses.policy_losses import clipped
from jaxft.objectives.policy import echo as with_echo
from jaxft.objectives.policy import policy
from jaxft.rl.advantages import grpo, nonconstant_groups
from jaxft.rl.environments.shipped_environments import CodeInterpreter, Search
from jaxft.rl.estimators import by_group
from jaxft.rl.rewards import number
from jaxft.rl.rollout_rules import Rules
from jaxft.rl.rollout_source import Rollouts
from jaxft.rl.token_weights import token_mean
from jaxft.train.recipes import QWEN3_4B, EchoWeight, GpuKnobs, RewardFunction, RolloutKnobs
from jaxft.train.settings import Run


class Agent(Search, CodeInterpreter):
    """Search and a Python interpreter in one environment: the tools of both, and Search's reward."""


def config(
    base: GpuKnobs = GpuKnobs(QWEN3_4B, general=None, lr=1e-5),
    prompts: RolloutKnobs = RolloutKnobs(
        "configs/data/library.jsonl",
        batch=32,
        micro=32,
        max_prompt=1024,
        max_new=1024,
        environment=Agent,
        max_turns=6,
        max_episode=4096,
    ),
    name: str = "qwen3_4b_agent",
    rewards: tuple[RewardFunction, ...] = (),  # in addition to the environment's score; number without one
    eps_high: NonNegativeFloat = 0.28,  # the upper clipping bound
    echo: EchoWeight | None = None,
) -> Run:
    """GRPO of an agent with search and code."""
    estimate = partial(by_group, advantage=grpo)
    rules = Rules(prompts.rewards(rewards, number), estimate, token_mean, filter=nonconstant_groups)
    objective = partial(policy, loss=partial(clipped, eps_high=eps_high), temperature=prompts.temperature)
    # the keys of 256 rows, as many as are decoded at once by default, would take 145 GiB
    source = prompts.source(Rollouts, rules=rules, observations=bool(echo), decode_rows=64)
    chosen = partial(with_echo, objective=objective, coef=echo) if echo else objective
    return Run(name=name, objective=chosen, **base.sharded_run(every=20), **source)
