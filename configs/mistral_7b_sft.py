r"""SFT of Mistral-7B-Instruct-v0.3 on your own conversations, with LoRA or full fine-tuning.

    python scripts/train.py --config configs/mistral_7b_sft.py data=rows.jsonl   # 22 GB of GPU memory
    python scripts/train.py --config configs/mistral_7b_sft.py data=rows.jsonl data.system=merge

Plan for one H100: 21.8 GiB, 4.0 s per step of 16 rows of 4096 tokens, so a million tokens in a minute. For
a TPU v5e slice of eight chips (--devices v5e:2x4, micro=2 remat=full): 5.8 GiB per chip, 2.8 s. Times are
estimates by scripts/plan.py, not measured.

Rows with a system message need data.system=merge, because the template shows the message only if the last
turn is the user's. Turns must alternate between user and assistant. Access must be granted on the hub
(HF_TOKEN).

Hardware: a GPU of 24 GB; 60 s for a million tokens on an H100 (planned).
"""

from jaxft.data.sft import Rows
from jaxft.train.recipes import FINETUNING, GpuKnobs, RowKnobs, SftKnobs
from jaxft.train.settings import Run


def config(
    base: GpuKnobs = GpuKnobs("mistralai/Mistral-7B-Instruct-v0.3"),
    rows: RowKnobs = RowKnobs(FINETUNING, batch=16, micro=4, epochs=2.0, max_length=4096),
    loss: SftKnobs = SftKnobs(),
    name: str = "mistral_7b_sft",
) -> Run:
    """SFT of Mistral 7B."""
    return Run(name=name, objective=loss.objective(), **base.sharded_run(), **rows.source(Rows))
