"""A working directory with a tiny Llama that becomes a reward model."""

from dpo_place import pairs, write_pair_place
from tiny_run import write_rows

CONFIG = '''"""A reward model of a tiny Llama."""

import jax.numpy as jnp

from functools import partial

from jaxft.optim import optimizer, schedules
from jaxft.data.pairs import PairRows
from jaxft.nn.adapters.lora import Adapter
from jaxft.models.adapted import with_scalar_head
from jaxft.objectives.reward_model import reward
from jaxft.weights.peft.adapter_folders import read_adapter_settings
from jaxft.nn.quant import Quant
from jaxft.train.settings import Loop, Run
from jaxft.weights.pretrained import model_for


def config(
    model: str = "base", data: str = "pairs.jsonl", name: str = "tiny", lr: float = 1e-2, margin: str | None = None,
    center: float = 0.01, steps: int | None = 4, full: bool = False, micro: int = 1, seed: int = 0, start: str | None = None,
    quant: str = "none", samples: int = 0, remat: str = "projections",
) -> Run:
    llm = with_scalar_head(model_for(model, dtype=jnp.float32, remat=remat))
    extras = (margin,) if margin else ()
    return Run(
        name=name,
        weights=model,
        model=llm,
        objective=partial(reward, margin=margin, center=center),
        data=PairRows(data, held_out=0.2, batch=4, micro=micro, max_length=64, seed=seed, epochs=10.0, extras=extras),
        adapter=None if full else read_adapter_settings(start, llm) if start else Adapter(rank=4),
        start=start,
        quant=None if quant == "none" else Quant(quant, 16),
        optim=optimizer.Optim(lr=lr, schedule=schedules.constant_schedule, warmup=0.0),
        loop=Loop(steps=steps, save_every=1, eval_fraction=None),
        samples=samples,
        seed=seed,
    )
'''  # noqa: E501


def write_place(folder):
    """base/, pairs.jsonl with a margin in column `ahead` and a text in `grade`, and config.py."""
    write_pair_place(folder)
    (folder / "config.py").write_text(CONFIG)
    write_rows(
        folder / "pairs.jsonl", [{**row, "ahead": i / 20, "grade": "good"} for i, row in enumerate(pairs())]
    )
