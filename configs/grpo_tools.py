"""GRPO with tools: a policy learns to use a calculator over several turns, from the answers alone.

    python scripts/train.py --config configs/sft.py name=calculator_format chat_template=qwen score=none
        data=configs/data/calculator_format.jsonl held_out=none general=none samples=0 loop.steps=30
    python scripts/train.py --config configs/grpo_tools.py start=runs/calculator_format
    python scripts/train.py --config configs/grpo_tools.py environment=my_env.py:Game data=games.jsonl
    python scripts/train.py --config configs/grpo_tools.py environment=none tools=mine.py:add,mine.py:multiply

SmolLM2-135M-Instruct, which writes no tool calls by itself, first learns their format from 30 conversations
with one call or two. Then it plays episodes of up to three turns on questions that need both tools, one after
the other, such as 17 * 23 + 58 and (17 + 23) * 58: it calls `add` or `multiply`, reads the result, and calls
again or answers. The reward is 1 for the right number in the last turn. Expect right answers to rise from 5 %
to more than 80 % in 14 steps of 4 x 8 episodes (configs/README.md has the curves).

An environment is a class or a function as in jaxft/rl/environments/environment.py, or one that TRL's
environment_factory takes. Tools are plain functions; their signatures and docstrings are in the prompt.
Tokens that the policy did not sample, such as results, have no loss. `jaxft inspect --run runs/grpo_tools`
shows episodes turn by turn. Faults of an environment exclude the episode, and are counted in episodes/faults.
For longer episodes set max_new, max_turns and max_episode.

Hardware: 2 CPU cores with AVX512-BF16, 3 GB; 12 minutes.
"""

from dataclasses import replace
from functools import partial

from jaxft.objectives.losses.policy_losses import clipped
from jaxft.objectives.policy import echo as with_echo
from jaxft.objectives.policy import policy
from jaxft.rl.advantages import grpo
from jaxft.rl.environments.shipped_environments import Calculator
from jaxft.rl.estimators import by_group
from jaxft.rl.rewards import number
from jaxft.rl.rollout_rules import Rules
from jaxft.rl.rollout_source import Rollouts
from jaxft.rl.token_weights import token_mean
from jaxft.train.recipes import (
    CALCULATOR,
    EchoWeight,
    EstimatorFunction,
    KLFactor,
    LearningRate,
    LoraKnobs,
    PolicyLossFunction,
    RewardFunction,
    RolloutKnobs,
    TokenWeightsFunction,
)
from jaxft.train.settings import Loop, Run


def config(
    base: LoraKnobs = LoraKnobs(chat_template="qwen", general=None),
    prompts: RolloutKnobs = RolloutKnobs(
        CALCULATOR,
        batch=4,
        micro=4,
        group=8,
        max_prompt=320,
        max_new=48,
        environment=Calculator,
        max_turns=3,
        max_episode=144,
        epochs=0.175,
    ),
    name: str = "grpo_tools",
    lr: LearningRate = 2.5e-4,
    rewards: tuple[RewardFunction, ...] = (),  # in addition to the environment's score; number without one
    estimate: EstimatorFunction | None = None,  # by_turn for rewards of single turns; by_group by default
    token_weights: TokenWeightsFunction = token_mean,
    train_on_truncated: bool = True,  # whether to train on episodes that a limit has ended
    loss: PolicyLossFunction = clipped,  # the loss of a sampled token
    beta: KLFactor = 0.0,
    echo: EchoWeight | None = None,
) -> Run:
    """Group-relative policy optimisation of episodes with tools."""
    rules = Rules(
        prompts.rewards(rewards, number),
        estimate or partial(by_group, advantage=grpo),
        token_weights,
        train_on_truncated=train_on_truncated,
    )
    objective = partial(policy, loss=loss, beta=beta, temperature=prompts.temperature)
    return Run(
        name=name,
        **base.sections(),
        objective=partial(with_echo, objective=objective, coef=echo) if echo else objective,
        data=Rollouts(**prompts.settings(), rules=rules, observations=bool(echo)),
        optim=replace(base.optim(lr), warmup=3),
        loop=Loop(eval_every=14, save_every=7),
        samples=0,  # of one turn each; episodes are in completions.jsonl
        seed=prompts.seed,
    )
