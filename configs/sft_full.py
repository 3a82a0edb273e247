"""SFT of every weight: the same rows and model as configs/sft.py, for comparison.

    python scripts/train.py --config configs/sft_full.py
    python scripts/train.py --config configs/sft_full.py start=runs/sft name=more   # after configs/sft.py

SmolLM2-135M-Instruct in full: float32 weights and AdamW moments, bfloat16 compute, two packed rows of 512
tokens per step: 89 steps. Expect json_match of the 96 held-out messages to rise from 0 to more than 0.9. The
learning rate is 1/30 of LoRA's; `general_loss` before and after shows what the model forgets. Training takes
3.4 GB, and writing a checkpoint of weights and moments takes more for a while.

Hardware: 2 CPU cores, 8 GB; 5 minutes.
"""

from jaxft.data.sft import Rows
from jaxft.optim.optimizer import Optim
from jaxft.train.recipes import EXTRACTION, GENERAL, FullKnobs, LearningRate, ScoredRowKnobs, SftKnobs
from jaxft.train.settings import Loop, Run


def config(
    base: FullKnobs = FullKnobs(),
    rows: ScoredRowKnobs = ScoredRowKnobs(EXTRACTION, batch=2, epochs=1.0),
    loss: SftKnobs = SftKnobs(),
    name: str = "sft_full",
    lr: LearningRate = 5e-5,
    train: str = "base/.*",  # a path pattern; base/layers/.* freezes the embedding table and the last norm
) -> Run:
    """Full fine-tuning."""
    return Run(
        name=name,
        **base.sections(),
        objective=loss.objective(),
        data=Rows(**rows.settings()),
        train=train,
        optim=Optim(lr=lr, weight_decay=0.01),
        loop=Loop(eval_every=20, save_every=40, keep_last=1),
        general=GENERAL,
        scoring=rows.scoring(),
        seed=rows.seed,
    )
