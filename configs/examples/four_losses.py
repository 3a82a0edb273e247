"""A study of four preference losses on the shipped pairs: `jaxft study configs/examples/four_losses.py`.

Each loss has 6 trials of its learning rate and knobs, of which the best ones train longer, and 3 seeds of its
best setting. 40 % of the 60 held-out prompts select settings, the others compare the losses. SimPO reads no
reference; the other losses share one. 32 minutes and 2.3 GB on two AMD Zen 4 cores.
"""

from jaxft.lab.studies.study import LogRange, SearchedLoss, Study, study_recipe
from jaxft.objectives.losses.preference_losses import dpo, dpop, ipo
from jaxft.objectives.losses.reference_free_losses import simpo


def study() -> Study:
    """Declare the study."""
    return Study(
        name="four-losses",
        recipe=study_recipe("dpo", "loop.steps=20"),
        losses={
            "dpo": SearchedLoss(dpo, {"beta": LogRange(0.03, 0.3)}),
            "ipo": SearchedLoss(ipo, {"beta": LogRange(0.03, 0.3)}),
            "simpo": SearchedLoss(simpo, {"beta": LogRange(1, 4), "gamma": (0.0, 0.5, 1.0)}),
            "dpop": SearchedLoss(dpop, {"beta": LogRange(0.03, 0.3), "penalty": (5.0, 50.0)}),
        },
        lr=LogRange(3e-5, 3e-4),
        trials=6,
        seeds=(0, 1, 2),
        margin=0.05,
        tuning=0.4,
        evaluations=3,
    )
