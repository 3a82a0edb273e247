r"""Mistral-7B-Instruct-v0.3, LoRA or in full, on conversations of your own.

    python scripts/train.py --config configs/mistral_7b_sft.py data=rows.jsonl   # 22 GB
    python scripts/train.py --config configs/mistral_7b_sft.py data=rows.jsonl data.system=merge

Plan for one H100: 21.8 GiB, 4.0 s for a step of 16 rows of 4096 tokens, so a million tokens in a minute.
For a TPU v5e slice of eight chips (--devices v5e:2x4, micro=2 remat=full): 5.8 GiB per chip, 2.8 s. Times
are those of the roofline (scripts/plan.py), not measured.

Rows with a system message need data.system=merge: the template shows it in the last turn alone. Turns
alternate between user and assistant. Needs access to the model on the hub (HF_TOKEN).

Hardware: a GPU of 24 GB; 60 s for a million tokens on an H100 (planned).
"""

from jaxft.data.sft import Rows
from jaxft.objectives.sft import sft
from jaxft.train.recipes import FINETUNING, GpuKnobs, RowKnobs
from jaxft.train.settings import Run


def config(
    base: GpuKnobs = GpuKnobs("mistralai/Mistral-7B-Instruct-v0.3"),
    rows: RowKnobs = RowKnobs(FINETUNING, batch=16, micro=4, epochs=2.0, max_length=4096),
    name: str = "mistral_7b_sft",
) -> Run:
    """SFT of Mistral 7B."""
    return Run(name=name, objective=sft, **base.sharded_run(), **rows.source(Rows))
