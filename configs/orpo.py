"""ORPO with LoRA: imitate the better completion and lower the odds of the worse one; no reference, no SFT
before it.

    python scripts/train.py --config configs/orpo.py

Hong et al. 2024, arXiv:2403.07691. SmolLM2-135M-Instruct on the pairs in configs/data. At the start the model
finds the worse completion likelier in three pairs of four: expect the held-out loss, most of which is the
likelihood of the better completion, to fall from 4.84 to 3.80 and rewards/accuracies to rise from 0.25 to
0.34 (0.44 with beta=0.5).

Hardware: 2 CPU cores, 2 GB; 3 minutes.
"""

from functools import partial

from jaxft.annotations import NonNegativeFloat
from jaxft.data.pairs import PairRows
from jaxft.objectives.losses.reference_free_losses import orpo, orpo_metrics
from jaxft.objectives.preference import mean_logp, preference, with_beta
from jaxft.train.recipes import PAIRS, LearningRate, LoraKnobs, RowKnobs
from jaxft.train.settings import Loop, Run


def config(
    base: LoraKnobs = LoraKnobs(),
    rows: RowKnobs = RowKnobs(PAIRS),
    name: str = "orpo",
    lr: LearningRate = 1e-3,
    beta: NonNegativeFloat = 0.1,  # weight of the log odds ratio
) -> Run:
    """Odds ratio preference optimisation."""
    return Run(
        name=name,
        **base.sections(),
        objective=partial(
            preference, **with_beta(orpo, beta), reference=None, reward=mean_logp, extra=orpo_metrics
        ),
        data=PairRows(**rows.settings()),
        optim=base.optim(lr),
        loop=Loop(eval_every=10, save_every=10),
        seed=rows.seed,
    )
