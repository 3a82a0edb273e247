"""Continued pre-training on text with LoRA or in full: every token of your documents is learned.

    python scripts/train.py --config configs/pretrain.py data=docs/             # .md and .txt files, each a document
    python scripts/train.py --config configs/pretrain.py data=books.jsonl full=true epochs=1   # rows {"text"}

Hardware: 2 CPU cores, 2 GB; 3 minutes.
"""

from jaxft.data.sft import Rows
from jaxft.objectives.sft import sft
from jaxft.train.recipes import FINETUNING, LoraOrFullKnobs, RowKnobs
from jaxft.train.settings import Loop, Run


def config(
    base: LoraOrFullKnobs = LoraOrFullKnobs(),
    rows: RowKnobs = RowKnobs(f"{FINETUNING}:text=response", batch=1, epochs=3.0),
    name: str = "pretrain",
    lr: float | None = None,  # none: 5e-4 for LoRA, 3e-5 in full
) -> Run:
    """Continued pre-training."""
    return Run(
        name=name,
        **base.sections(),
        objective=sft,
        data=Rows(**rows.settings(), format="text", packing="wrapped", too_long="split"),
        optim=base.optim(lr if lr is not None else 3e-5 if base.full else 5e-4),
        loop=Loop(eval_every=30, save_every=30),
        seed=rows.seed,
    )
