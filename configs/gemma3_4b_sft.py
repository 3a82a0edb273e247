"""SFT of Gemma 3 4B's text decoder on your own instruction rows, with LoRA or full fine-tuning.

    python scripts/train.py --config configs/gemma3_4b_sft.py data=rows.jsonl   # 16 GB of GPU memory

Plan for one H100: 15.2 GiB, 6.7 s per step of 16 rows of 4096 tokens, so a million tokens in 102 s. For a
TPU v5e slice of four chips (--devices v5e:2x2, micro=4 remat=full): 7.0 GiB per chip, 4.9 s. Times are
estimates by scripts/plan.py, not measured. quant=nf4 needs less memory, full=true more.

google/gemma-3-4b-it is multimodal. Only its text decoder is loaded and trained, on text; adapters and exports
are for the whole model.
Access must be granted on the hub (HF_TOKEN).

Hardware: a GPU of 24 GB; 102 s for a million tokens on an H100 (planned).
"""

from jaxft.data.sft import Rows
from jaxft.train.recipes import FINETUNING, GpuKnobs, RowKnobs, SftKnobs
from jaxft.train.settings import Run


def config(
    base: GpuKnobs = GpuKnobs("google/gemma-3-4b-it"),
    rows: RowKnobs = RowKnobs(FINETUNING, batch=16, micro=4, epochs=2.0, max_length=4096),
    loss: SftKnobs = SftKnobs(),
    name: str = "gemma3_4b_sft",
) -> Run:
    """SFT of Gemma 3 4B."""
    return Run(name=name, objective=loss.objective(), **base.sharded_run(), **rows.source(Rows))
