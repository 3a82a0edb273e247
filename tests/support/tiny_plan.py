"""Tiny runs, and a simulated machine, for the tests of plans."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp

from jaxft.data.pairs import PairRows
from jaxft.data.sft import Rows
from jaxft.models import adapted
from jaxft.models.adapted import HeadSettings
from jaxft.models.families.llama import LlamaConfig, llama
from jaxft.nn.adapters.lora import Adapter
from jaxft.objectives import policy
from jaxft.objectives.losses.policy_losses import FixedKL, KLInReward, clipped
from jaxft.objectives.losses.preference_losses import dpo
from jaxft.objectives.policy import Critic, value_function
from jaxft.objectives.preference import preference
from jaxft.objectives.sft import sft
from jaxft.plan import machines
from jaxft.rl.estimators import actor_critic
from jaxft.rl.reward_models import HeadReward
from jaxft.rl.rollout_rules import Rules
from jaxft.rl.rollout_source import Rollouts
from jaxft.train.settings import Run

HAS_CUDA = all(map(importlib.util.find_spec, ("jax_plugins", "jax_plugins.xla_cuda12")))
HAS_TPU = importlib.util.find_spec("libtpu") is not None
TINY = LlamaConfig(vocab=512, width=64, layers=4, heads=4, kv_heads=2, head_dim=16, mlp=128)
CHIP = machines.Chip("cpu", 2**40, 2**30, 1e9, 1e8, 1e7, "made up")


def tiny(remat="projections", full=False, quant=None, **kwargs):
    rows = Rows("none", batch=8, micro=2, max_length=64)
    adapter = None if full else Adapter(rank=4)
    return Run(
        "tiny",
        "tiny",
        llama(TINY, jnp.float32, remat=remat),
        sft,
        rows,
        adapter=adapter,
        quant=quant,
        **kwargs,
    )


def made_up(count=8):
    return machines.Machine(f"{count} made up", CHIP, jax.devices()[:count])


def tiny_pairs(**kwargs):
    rows = PairRows("none", batch=4, micro=2, max_length=32)
    objective = partial(preference, loss=partial(dpo, beta=0.1), beta=0.1, reference="precomputed")
    return Run("tiny", "tiny", llama(TINY, jnp.float32), objective, rows, Adapter(rank=4), **kwargs)


def tiny_ppo(critic=None, rewards=None, group=2):
    def objective(model):
        hidden = lambda params, batch, h: model.hidden(adapted.view(params, "critic"), batch)[0]  # noqa: E731
        value = value_function(hidden, lambda params, h: adapted.scores(adapted.view(params, "critic"), h))
        return policy.policy(model, clipped, KLInReward(FixedKL(0.1)), critic=Critic(value))

    prompts = Rollouts(
        "none", held_out=None, max_prompt=32, max_new=16, batch=4, group=group, micro=2,
        rules=Rules(rewards or (HeadReward("reward"),), actor_critic),
    )  # fmt: skip
    settings = {
        "critic": critic or HeadSettings(Adapter(rank=4)),
        "reward": HeadSettings(Adapter(rank=4), "none", trained=False),
    }
    llm = llama(TINY, jnp.float32)
    return Run("tiny", "tiny", llm, objective, prompts, Adapter(rank=4), heads=settings, samples=0)
