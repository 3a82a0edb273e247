r"""Llama-3.2-1B-Instruct or 3B, LoRA or in full, on instruction rows of your own.

    python scripts/train.py --config configs/llama32_sft.py data=rows.jsonl   # 1B, 16 GB
    python scripts/train.py --config configs/llama32_sft.py data=rows.jsonl full=true   # 1B, 40 GB
    python scripts/train.py --config configs/llama32_sft.py data=rows.jsonl micro=8 \
        model=meta-llama/Llama-3.2-3B-Instruct   # 3B, 24 GB

One GPU; a step has 16 packed rows of 2048 tokens in `micro` microbatches. Needs access to the model on the
hub (HF_TOKEN).

Hardware: a GPU of 16 GB; not measured.
"""

from jaxft.data.sft import Rows
from jaxft.train.recipes import FINETUNING, GpuKnobs, RowKnobs, SftKnobs
from jaxft.train.settings import Run


def config(
    base: GpuKnobs = GpuKnobs("meta-llama/Llama-3.2-1B-Instruct"),
    rows: RowKnobs = RowKnobs(FINETUNING, batch=16, micro=4, epochs=2.0, max_length=2048),
    loss: SftKnobs = SftKnobs(),
    name: str = "llama32_sft",
) -> Run:
    """SFT of Llama 3.2 1B or 3B."""
    return Run(name=name, objective=loss.objective(), **base.sharded_run(), **rows.source(Rows))
