r"""Llama-3.1-8B-Instruct, LoRA or in full, on one GPU or sharded over several.

    python scripts/train.py --config configs/llama31_8b_sft.py data=rows.jsonl   # 80 GB
    python scripts/train.py --config configs/llama31_8b_sft.py data=rows.jsonl \
        quant=nf4 micro=16 remat=full   # 8.2 GiB
    python scripts/train.py --config configs/llama31_8b_sft.py data=rows.jsonl full=true mesh.fsdp=8
    python scripts/train.py --config configs/llama31_8b_sft.py data=rows.jsonl full=true params=bfloat16 \
        fused_backward=true batch=1 micro=1 remat=full   # 20.8 GiB

A step has 16 packed rows of 4096 tokens in `micro` microbatches. Needs access to the model on the hub
(HF_TOKEN).

Hardware: a GPU of 80 GB, or of 10 GB with quant=nf4 micro=16 remat=full; not measured.
"""

from jaxft.data.sft import Rows
from jaxft.optim.optimizer import MakeRule, Optim
from jaxft.optim.rules import adafactor, adamw
from jaxft.train.recipes import FINETUNING, LLAMA_8B, DType, GpuKnobs, RowKnobs, SftKnobs
from jaxft.train.settings import Run


def config(
    base: GpuKnobs = GpuKnobs(LLAMA_8B),
    rows: RowKnobs = RowKnobs(FINETUNING, batch=16, micro=2, epochs=2.0, max_length=4096),
    loss: SftKnobs = SftKnobs(),
    name: str = "llama31_8b_sft",
    optimizer: MakeRule | None = None,  # adamw for LoRA, adafactor in full
    params: DType = "float32",  # in full: how the weights are stored
    fused_backward: bool = False,  # in full: updates layers in the backward pass, with micro=1 remat=full
) -> Run:
    """SFT of Llama 3.1 8B; full fine-tuning uses Adafactor, whose state is small."""
    optim = Optim(
        lr=base.learning_rate,
        optimizer=optimizer or (adafactor if base.full else adamw),
        clip=None if fused_backward else 1.0,
        lora_plus=base.lora_plus,
        layerwise=base.full,
        fused_backward=fused_backward,
    )
    return Run(
        name=name,
        objective=loss.objective(),
        params=params,
        **base.sharded_run(optim=optim),
        **rows.source(Rows),
    )
