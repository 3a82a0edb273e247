"""KTO with LoRA: completions that are good or bad, each by itself; a pair counts as one of each.

    python scripts/train.py --config configs/kto.py
    python scripts/train.py --config configs/kto.py data=rows.jsonl held_out=0.1

Ethayarajh et al. 2024, arXiv:2402.01306. Rows of your own are {prompt, completion, label} or pairs. The KL is
estimated on a third, mismatched completion in every row. SmolLM2-135M on the pairs in configs/data. The
first loss is 0.5; expect the held-out one to fall to 0.446, with rewards/chosen 0.22, rewards/rejected -0.23
and 94 % of the held-out pairs in order.

Hardware: 2 CPU cores, 2 GB; 3 minutes.
"""

from functools import partial

from jaxft.annotations import NonNegativeFloat
from jaxft.data.pairs import PairRows
from jaxft.objectives.losses.reference_free_losses import kto, kto_metrics
from jaxft.objectives.preference import preference, with_beta
from jaxft.train.recipes import PAIRS, LearningRate, LoraKnobs, PairBeta, ReferenceKnobs, RowKnobs
from jaxft.train.settings import Loop, Run


def config(
    base: LoraKnobs = LoraKnobs(),
    rows: RowKnobs = RowKnobs(PAIRS),
    name: str = "kto",
    lr: LearningRate = 1e-4,
    beta: PairBeta = 0.1,
    desirable_weight: NonNegativeFloat = 1.0,  # of good completions
    undesirable_weight: NonNegativeFloat = 1.0,  # of bad completions
    other: ReferenceKnobs = ReferenceKnobs(),
) -> Run:
    """Kahneman-Tversky optimisation."""
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    return Run(
        name=name,
        **base.sections(),
        objective=partial(
            preference,
            **with_beta(kto, beta, **weights),
            reference=other.reference(),
            extra=kto_metrics,
        ),
        data=PairRows(**rows.settings(), third="mismatched", unpaired=True),
        optim=base.optim(lr),
        loop=Loop(eval_every=10, save_every=10),
        seed=rows.seed,
        teacher=other.teacher(base),
    )
