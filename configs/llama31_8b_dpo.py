"""Llama-3.1-8B-Instruct, DPO with LoRA on one 80 GB GPU or sharded over several.

    python scripts/train.py --config configs/llama31_8b_dpo.py data=pairs.jsonl
    python scripts/train.py --config configs/llama31_8b_dpo.py data=pairs.jsonl start=runs/llama31_8b_sft

Needs access to the model on the hub (HF_TOKEN). The reference costs a forward pass and no memory;
reference=precomputed runs it once, before the first step. Expect the first loss to be 0.6931 and
rewards/accuracies on held-out pairs to rise above 0.5 in the first tenth of the run.

Hardware: a GPU of 80 GB, or of 10 GB with quant=nf4 remat=full; not measured.
"""

from functools import partial

from jaxft.data.pairs import PairRows
from jaxft.objectives.losses.preference_losses import dpo
from jaxft.objectives.preference import preference, with_beta
from jaxft.train.recipes import (
    LLAMA_8B,
    PAIRS,
    GpuKnobs,
    PairBeta,
    ReferenceSetting,
    RowKnobs,
    choose_reference,
)
from jaxft.train.settings import Run


def config(
    base: GpuKnobs = GpuKnobs(LLAMA_8B, lr=5e-6),
    rows: RowKnobs = RowKnobs(PAIRS, batch=32, micro=8, max_length=2048),
    name: str = "llama31_8b_dpo",
    beta: PairBeta = 0.1,
    reference: ReferenceSetting | None = None,
) -> Run:
    """DPO of Llama 3.1 8B."""
    source = choose_reference(reference, dpo, base.full)
    objective = partial(preference, **with_beta(dpo, beta), reference=source)
    return Run(name=name, objective=objective, **base.sharded_run(every=50), **rows.source(PairRows))
