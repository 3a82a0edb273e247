"""A working directory for runs on preference pairs: a tiny Llama, pairs, a config with the tests' knobs."""

from tiny_run import write_place, write_rows

CONFIG = '''"""Preferences of a tiny Llama."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax.numpy as jnp

from jaxft.optim import optimizer, schedules
from jaxft.data.pairs import PairRows
from jaxft.engine.sampling import Sampling
from jaxft.nn.adapters.lora import Adapter
from jaxft.objectives.preference import EMAReference, implicit_reward, preference
from jaxft.objectives.losses.preference_losses import dpo
from jaxft.weights.peft.adapter_folders import read_adapter_settings
from jaxft.nn.quant import Quant
from jaxft.train.settings import Loop, Run
from jaxft.train.start.teacher import find_teacher
from jaxft.weights.pretrained import model_for

REFERENCES = {"start": "start", "precomputed": "precomputed", "moving": EMAReference(0.5, 2), "none": None}


def config(
    model: str = "base", data: str = "pairs.jsonl", held_out: str | float | None = 0.2, name: str = "tiny", lr: float = 1e-2,
    loss: Callable = dpo, beta: float = 0.1, reference: Literal["start", "precomputed", "moving", "none"] = "start",
    teacher: str | None = None, teacher_quant: str = "none",
    reward: Callable = implicit_reward, third: str | None = None, steps: int | None = 3, full: bool = False, batch: int = 4,
    micro: int = 1, seed: int = 0, start: str | None = None, epochs: float = 10.0, quant: str = "none",
    remat: str = "projections",
) -> Run:
    llm = model_for(model, dtype=jnp.float32, remat=remat)
    own = None if teacher_quant == "none" else Quant(teacher_quant)
    second = teacher and find_teacher(teacher, model, partial(model_for, dtype=jnp.float32), own, shares=not full)
    return Run(
        name=name,
        teacher=second,
        weights=model,
        model=llm,
        objective=partial(preference, loss=loss, reference="teacher" if second else REFERENCES[reference], beta=beta, reward=reward),
        data=PairRows(data, held_out=held_out, batch=batch, micro=micro, max_length=64, seed=seed, epochs=epochs, third=third),
        adapter=None if full else read_adapter_settings(start, llm) if start else Adapter(rank=4),
        start=start,
        quant=None if quant == "none" else Quant(quant),
        optim=optimizer.Optim(lr=lr, schedule=schedules.constant_schedule, warmup=0.0),
        loop=Loop(steps=steps, save_every=1, eval_fraction=None),
        samples=0,
        sampling=Sampling(max_new=4),
        seed=seed,
    )
'''  # noqa: E501

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def pairs(count=24):
    """A rule that any model can learn: the answer says yes, not no."""
    return [
        {
            "prompt": f"{i} {WORDS[i % 10]}?",
            "chosen": "yes " + WORDS[i % 7],
            "rejected": "no " + " ".join(WORDS[: 1 + i % 4]),
        }
        for i in range(count)
    ]


def write_pair_place(folder):
    """base/, pairs.jsonl and config.py."""
    write_place(folder)
    write_rows(folder / "pairs.jsonl", pairs())
    (folder / "config.py").write_text(CONFIG)
