"""SFT with LoRA: teach a small pretrained model to turn messages into JSON, on the rows in configs/data.

    python scripts/train.py --config configs/sft.py
    python scripts/train.py --config configs/sft.py quant=nf4   # QLoRA: a base of 4.1 bits per parameter

SmolLM2-135M-Instruct, LoRA on every linear layer, one packed row of 512 tokens per step: 177 steps, about 4
minutes and 2 GB on a 2-core CPU with AVX512-BF16, about 12 on another. Before and after training the model
completes 96 held-out messages, whose values, and any four words in a row, are in no training row: expect
json_match, the fraction of completions that are exactly the right JSON, to rise from 0 to more than 0.9.

Hardware: 2 CPU cores with AVX512-BF16, 2 GB; 4 minutes.
"""

from jaxft.data.sft import Rows
from jaxft.engine.sampling import Sampling
from jaxft.train.recipes import EXTRACTION, LearningRate, LoraKnobs, ScoredRowKnobs, SftKnobs
from jaxft.train.settings import Loop, Run


def config(
    base: LoraKnobs = LoraKnobs(),
    rows: ScoredRowKnobs = ScoredRowKnobs(EXTRACTION, batch=1, epochs=1.0),
    loss: SftKnobs = SftKnobs(),
    name: str = "sft",
    lr: LearningRate = 1.5e-3,
) -> Run:
    """LoRA supervised fine-tuning."""
    return Run(
        name=name,
        **base.sections(),
        objective=loss.objective(),
        data=Rows(**rows.settings()),
        optim=base.optim(lr),
        loop=Loop(eval_every=90, save_every=90),
        scoring=rows.scoring(),
        sampling=Sampling(max_new=48),  # the longest response has 41 tokens
        seed=rows.seed,
    )
