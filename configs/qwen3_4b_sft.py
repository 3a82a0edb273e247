r"""SFT of Qwen3-4B on your own instruction rows, with LoRA or full fine-tuning.

    python scripts/train.py --config configs/qwen3_4b_sft.py data=rows.jsonl   # 20 GB of GPU memory
    python scripts/train.py --config configs/qwen3_4b_sft.py data=rows.jsonl \
        data.chat_template_kwargs=enable_thinking=false   # for rows without reasoning

Plan for one H100: 19.4 GiB, 2.5 s per step of 16 rows of 4096 tokens, so a million tokens in 40 s. For a
TPU v5e slice of four chips (--devices v5e:2x2, micro=4 remat=full): 5.8 GiB per chip, 3.3 s. Times are
estimates by scripts/plan.py, not measured. quant=nf4 needs less memory, full=true more.

If the last response has no reasoning, Qwen3's template writes an empty thinking block before it, which is
trained on. With enable_thinking=false that block is part of the prompt and not trained on.

Hardware: a GPU of 24 GB; 40 s for a million tokens on an H100 (planned).
"""

from jaxft.data.sft import Rows
from jaxft.train.recipes import FINETUNING, QWEN3_4B, GpuKnobs, RowKnobs, SftKnobs
from jaxft.train.settings import Run


def config(
    base: GpuKnobs = GpuKnobs(QWEN3_4B),
    rows: RowKnobs = RowKnobs(FINETUNING, batch=16, micro=2, epochs=2.0, max_length=4096),
    loss: SftKnobs = SftKnobs(),
    name: str = "qwen3_4b_sft",
) -> Run:
    """SFT of Qwen3-4B."""
    return Run(name=name, objective=loss.objective(), **base.sharded_run(), **rows.source(Rows))
