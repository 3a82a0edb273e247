"""A reward model: a scalar head that scores the better of two completions higher, on the pairs in
configs/data.

    python scripts/train.py --config configs/reward.py
    python scripts/train.py --config configs/reward.py quant=nf4 name=reward_nf4

SmolLM2-135M-Instruct, LoRA on every linear layer and a head that is read at the last token of each
completion: 27 steps. The first loss is near log 2 = 0.69 (a fresh head is random). Expect held-out accuracy
to rise from 0.50 to 0.84, and the held-out loss to fall from 0.73 to 0.43; always preferring the longer
completion gives 0.50. full=true trains all weights; model=runs/reward/model then continues from its result.
scripts/score.py scores pairs with the result. data.responses=4 compares all pairs of rankings of four
responses; margin=score is the difference of their ratings (score_chosen, score_rejected).

Hardware: 2 CPU cores, 2 GB; 5 minutes.
"""

from functools import partial

from jaxft.annotations import NonNegativeFloat
from jaxft.data.pairs import PairRows
from jaxft.models.adapted import with_scalar_head
from jaxft.objectives.reward_model import margin_columns, reward
from jaxft.train.recipes import PAIRS, LearningRate, LoraOrFullKnobs, RowKnobs
from jaxft.train.settings import Loop, Run


def config(
    base: LoraOrFullKnobs = LoraOrFullKnobs(general=None),
    rows: RowKnobs = RowKnobs(PAIRS),
    name: str = "reward",
    lr: LearningRate = 2e-4,
    margin: str | None = None,  # margin of the loss: a column, or score for score_chosen - score_rejected
    center: NonNegativeFloat = 0.01,  # weight of the term that keeps rewards around 0
) -> Run:
    """Reward modelling."""
    return Run(
        name=name,
        **base.sections(head=with_scalar_head),
        objective=partial(reward, margin=margin, center=center),
        data=PairRows(**rows.settings(), extras=margin_columns(margin)),
        optim=base.optim(lr),
        loop=Loop(eval_every=10, save_every=10),
        samples=0,
        seed=rows.seed,
    )
