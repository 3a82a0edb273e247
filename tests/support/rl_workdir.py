"""A working directory with a tiny Llama, prompts, and a recipe whose rewards are in its file."""

import json
import shutil

from tiny_llama import tiny_torch, write_folder
from tiny_run import write_rows

CONFIG = '''"""A tiny policy and rewards for it."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp

from jaxft.models.adapted import HeadSettings, scores, view
from jaxft.nn.adapters.lora import Adapter
from jaxft.objectives.policy import Critic, value_function
from jaxft.objectives.losses.policy_losses import AdaptiveKL, FixedKL, KLInReward
from jaxft.objectives.policy import policy, with_target_kl
from jaxft.objectives.losses.policy_losses import clipped
from jaxft.objectives.preference import preference
from jaxft.objectives.losses.preference_losses import dpo
from jaxft.optim.optimizer import Optim
from jaxft.rl.advantages import scale_scores
from jaxft.rl.estimators import actor_critic, by_group
from jaxft.rl.online_pairs import OnlinePairs
from jaxft.rl.rollout_source import Rollouts
from jaxft.rl.rollout_rules import Rules
from jaxft.train.settings import Loop, Run
from jaxft.weights.pretrained import model_for


def letters(prompt, completion, row):
    """The fraction of characters that are an a or an o."""
    return sum(c in "ao" for c in completion) / max(len(completion), 1)


def ascii(prompt, completion, row):
    """The fraction of characters that are ASCII: about half of those of a random model."""
    return sum(c.isascii() for c in completion) / max(len(completion), 1)


def constant(prompt, completion, row):
    return 0.5


def once_more(state, text, row):
    """Ask for a second turn; the environment is broken for every fifth row."""
    if row["answer"] % 5 == 0:
        raise RuntimeError("out of order")
    return ("and then?" if state is None else None), len(text) / 10, state is not None, 1


def reached(environments, **columns):
    """One of TRL's reward functions: the state of once_more after its second turn."""
    return [float(state) for state in environments]


def ppo_objective(model, temperature, beta, shared=False, target_kl=None):
    """PPO with an entropy bonus, an adaptive KL in the rewards, and a critic, shared or not."""
    hidden = lambda params, batch, h: h if shared else model.hidden(view(params, "critic"), batch)[0]
    value = value_function(hidden, lambda params, h: scores(view(params, "critic"), h))
    penalty = AdaptiveKL(beta, target=0.1, horizon=50) if beta else FixedKL(0.0)
    objective = policy(model, clipped, KLInReward(penalty), 0.01, temperature, Critic(value, coef=0.5))
    return objective if target_kl is None else with_target_kl(objective, target_kl)


def config(
    name: str = "rl", rewards: tuple[Callable, ...] = (letters,), steps: int | None = 4, passes: int = 2,
    minibatches: int = 1, batch: int = 4, group: int = 4, lr: float = 1e-2, beta: float = 0.02,
    temperature: float = 0.9, seed: int = 0, held_out: float = 0.2, data: str = "prompts.jsonl", max_new: int = 24,
    save: int = 1, micro: int = 1, ppo: bool = False, warm_up: int = 0, target_kl: float | None = None,
    full_critic: bool = False, scale: bool = False, truncated: bool = True, base: str = "base",
    shared: bool = False, online: bool = False,
) -> Run:
    if online:
        objective = partial(preference, loss=partial(dpo, beta=0.1), beta=0.1)
    elif ppo:
        objective = partial(ppo_objective, temperature=temperature, beta=beta, shared=shared)
        objective = partial(objective, target_kl=target_kl)
    else:
        objective = partial(policy, loss=clipped, beta=beta, temperature=temperature)
    estimate = actor_critic if ppo else by_group
    scale_by = scale_scores if scale else None
    rules = Rules(rewards, estimate, scale=scale_by, train_on_truncated=truncated, warm_up=warm_up)
    critic_adapter = None if shared or full_critic else Adapter(rank=4)
    critic_head = HeadSettings(critic_adapter, weights="base" if full_critic else None)
    return Run(
        name=name,
        weights=base,
        model=model_for(base, dtype=jnp.float32),
        objective=objective,
        data=(OnlinePairs if online else Rollouts)(
            data, held_out=held_out, max_prompt=64, max_new=max_new, batch=batch, group=group,
            temperature=temperature, passes=passes, minibatches=minibatches, micro=micro, seed=seed, rules=rules,
        ),
        heads={"critic": critic_head} if ppo else {},
        adapter=Adapter(rank=4),
        optim=Optim(lr=lr),
        loop=Loop(steps=steps, save_every=save, eval_every=2, eval_fraction=None),
        samples=2,
        seed=seed,
    )
'''  # noqa: E501


def write_workdir(folder):
    """base/, prompts.jsonl and config.py."""
    write_folder(folder / "base", tiny_torch())
    write_rows(
        folder / "prompts.jsonl",
        [{"prompt": f"what is {i}" + " plus one" * (i % 4) + "?", "answer": i} for i in range(20)],
    )
    (folder / "config.py").write_text(CONFIG)


def write_without_eos(folder):
    """endless/, the base without an end token."""
    shutil.copytree(folder / "base", folder / "endless")
    for name, key in (
        ("config", "eos_token_id"),
        ("generation_config", "eos_token_id"),
        ("tokenizer_config", "eos_token"),
    ):
        path = folder / "endless" / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: None}))
    (folder / "endless" / "special_tokens_map.json").unlink(missing_ok=True)
    template = folder / "endless" / "chat_template.jinja"  # it ends turns with the end token
    template.write_text(template.read_text().replace("</s>", "\n"))


KILL = """
import glob, os, time
from jaxft.train.logs import meter
add = meter.Meter.add
def killed(self, step, batch, found):
    add(self, step, batch, found)
    if step + 1 == {step}:
        until = time.monotonic() + 60  # the checkpoint before is written in the background
        while {checkpoint} and not glob.glob("runs/{name}/checkpoints/{checkpoint}"):
            assert time.monotonic() < until
            time.sleep(0.01)
        os.kill(os.getpid(), {signal})
meter.Meter.add = killed
"""
KILL_AFTER_SAMPLING = """
import glob, os, time
from jaxft.rl import rollout_source
append_table = rollout_source.append_table
def killed(path, step, *rest):
    append_table(path, step, *rest)  # its completions are in the table, and nothing is trained on them yet
    if step > 1:
        until = time.monotonic() + 60  # the checkpoint before is written in the background
        while not glob.glob("runs/{name}/{before}"):
            assert time.monotonic() < until
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
rollout_source.append_table = killed
"""


def kill_at(step, name, checkpoint, signal=9):
    """A hook that kills the run after an optimizer step, once the checkpoint is there; 0 for none."""
    return KILL.format(step=step, name=name, checkpoint=checkpoint, signal=signal)


def kill_after_sampling(name, checkpoint):
    """A hook that kills the run between sampling its second rollout and training on it.

    checkpoint: the one that must be complete; 0 for none.
    """
    before = f"checkpoints/{checkpoint}" if checkpoint else "config.json"
    return KILL_AFTER_SAMPLING.format(name=name, before=before)


def table(workdir, name):
    """The entries of a run's completions.jsonl."""
    return [json.loads(line) for line in (workdir.runs(name) / "completions.jsonl").read_text().splitlines()]
