"""Continued pre-training on text with LoRA or in full: every token of your documents has a loss.

    python scripts/train.py --config configs/pretrain.py data=docs/                  # Markdown and text files
    python scripts/train.py --config configs/pretrain.py data=books.jsonl full=true  # rows {"text"}

In a folder, each file is a document, or each part of a file between lines <|endoftext|>;
data.sample_by=line or paragraph divides files further. Documents are joined in random order and split into
rows of 512 tokens, which attend over all of their documents, so that no token is lost and none is padding.

By default the documents are the answers about fine-tuning in configs/data: SmolLM2-135M-Instruct, LoRA on
every linear layer, one row of 512 tokens per step: 78 steps of 3 epochs. Expect the held-out loss to fall
from 4.46 to 3.69, and `general_loss`, of text on other subjects, from 3.72 to 3.62. Before and after training
the model continues the beginnings of held-out texts. For many documents of your own, use epochs=1.

Hardware: 2 CPU cores, 2 GB; 3 minutes.
"""

from jaxft.data.sft import Rows
from jaxft.objectives.sft import sft
from jaxft.train.recipes import FINETUNING, LearningRate, LoraOrFullKnobs, RowKnobs
from jaxft.train.settings import Loop, Run


def config(
    base: LoraOrFullKnobs = LoraOrFullKnobs(),
    rows: RowKnobs = RowKnobs(f"{FINETUNING}:text=response", batch=1, epochs=3.0),
    name: str = "pretrain",
    lr: LearningRate | None = None,  # optim.lr; none: 5e-4 for LoRA, 2e-5 in full
) -> Run:
    """Continued pre-training."""
    return Run(
        name=name,
        **base.sections(),
        objective=sft,
        data=Rows(**rows.settings(), format="text", packing="wrapped", too_long="split"),
        optim=base.optim(lr if lr is not None else 2e-5 if base.full else 5e-4),
        loop=Loop(eval_every=30, save_every=30),
        seed=rows.seed,
    )
