"""A working directory with a tiny Llama that is taught by rewards."""

import json
import shutil

from tiny_llama import tiny_torch, write_folder
from tiny_run import write_rows

CONFIG = '''"""A tiny policy and a reward beside this file."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp

from jaxft.rl.advantages import scaled
from jaxft.rl.completions import Rules
from jaxft.rl.estimators import actor_critic, by_group
from jaxft.nn.lora import Adapter
from jaxft.models.heads import HeadSettings, scores, view
from jaxft.objectives.kl import AdaptiveKL, FixedKL, KLInReward
from jaxft.objectives.preference import preference
from jaxft.objectives.critic import Critic, value_function
from jaxft.objectives.policy import policy
from jaxft.objectives.policy_losses import clipped
from jaxft.objectives.preference_losses import dpo
from jaxft.optim.optimizer import Optim
from jaxft.rl.online_pairs import OnlinePairs
from jaxft.rl.rollout import Rollouts
from jaxft.train.settings import Loop, Run
from jaxft.weights.pretrained import model_for


def letters(prompt, completion, row):
    """The share of characters that are an a or an o."""
    return sum(c in "ao" for c in completion) / max(len(completion), 1)


def ascii(prompt, completion, row):
    """The share of characters that are ASCII: about half of what a fresh model writes."""
    return sum(c.isascii() for c in completion) / max(len(completion), 1)


def even(prompt, completion, row):
    return 0.5


def with_critic(model, temperature, beta, shared=False):
    """A critic beside the policy, an entropy bonus, and the KL in the rewards, its coefficient by a controller."""
    hidden = lambda params, batch, h: h if shared else model.hidden(view(params, "critic"), batch)
    value = value_function(hidden, lambda params, h: scores(view(params, "critic"), h))
    penalty = AdaptiveKL(beta, target=0.1, horizon=50) if beta else FixedKL(0.0)
    return policy(model, clipped, KLInReward(penalty), 0.01, temperature, Critic(value, coef=0.5))


def config(
    name: str = "rl", rewards: tuple[Callable, ...] = (letters,), steps: int | None = 4, passes: int = 2,
    minibatches: int = 1, batch: int = 4, group: int = 4, lr: float = 1e-2, beta: float = 0.02, temperature: float = 0.9,
    seed: int = 0, held_out: float = 0.2, data: str = "asked.jsonl", max_new: int = 24, save: int = 1, micro: int = 1,
    ppo: bool = False, warm_up: int = 0, target_kl: float | None = None, full_critic: bool = False, scale: bool = False,
    cut_off: bool = True, base: str = "base", shared: bool = False,
    online: bool = False,
) -> Run:
    estimate = partial(actor_critic, kl_coef=None) if ppo else by_group
    pairs = partial(preference, loss=partial(dpo, beta=0.1), beta=0.1)
    actor = partial(policy, loss=clipped, beta=beta, temperature=temperature)
    return Run(
        name=name,
        weights=base,
        model=model_for(base, dtype=jnp.float32),
        objective=pairs if online else partial(with_critic, temperature=temperature, beta=beta, shared=shared) if ppo else actor,
        data=(OnlinePairs if online else Rollouts)(
            data, held_out=held_out, max_prompt=64, max_new=max_new, batch=batch, group=group, temperature=temperature,
            passes=passes, minibatches=minibatches, micro=micro, seed=seed,
            rules=Rules(
                rewards, estimate, scale=scaled if scale else None, cut_off=cut_off, warm_up=warm_up, target_kl=target_kl
            ),
        ),
        beside={"critic": HeadSettings(None if shared or full_critic else Adapter(rank=4), weights="base" if full_critic else None)}
        if ppo
        else {},
        adapter=Adapter(rank=4),
        optim=Optim(lr=lr),
        loop=Loop(steps=steps, save_every=save, eval_every=2),
        samples=2,
        seed=seed,
    )
'''


def write_place(folder):
    """base/, asked.jsonl and config.py."""
    write_folder(folder / "base", tiny_torch())
    write_rows(
        folder / "asked.jsonl",
        [{"prompt": f"what is {i}" + " plus one" * (i % 4) + "?", "answer": i} for i in range(20)],
    )
    (folder / "config.py").write_text(CONFIG)


def write_endless(folder):
    """endless/, the base with no token that ends a text."""
    shutil.copytree(folder / "base", folder / "endless")
    for name, key in (
        ("config", "eos_token_id"),
        ("generation_config", "eos_token_id"),
        ("tokenizer_config", "eos_token"),
    ):
        path = folder / "endless" / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: None}))
    (folder / "endless" / "special_tokens_map.json").unlink(missing_ok=True)
