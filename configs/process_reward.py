"""A process reward model: a scalar head predicts for each step of a solution whether it is right.

    python scripts/train.py --config configs/process_reward.py
    python scripts/train.py --config configs/process_reward.py data=trl-lib/math_shepherd:train full=true
    python scripts/score.py --run runs/process_reward --file steps.jsonl

SmolLM2-135M-Instruct, LoRA on every linear layer and a head that is read at the last token of each step, on
configs/data/calculator_steps.jsonl: expressions in two steps, of which some take the wrong operation. Rows of
your own are {"prompt", "completions": [steps], "labels": [true or false]}, tokenised as TRL's PRMTrainer
does. The loss is the cross-entropy of the labels (Lightman et al. 2023, arXiv:2305.20050). Solutions
are not packed, since packing puts solutions of one length, and here often of one label, into a row.

60 steps: expect the accuracy over 128 held-out steps, of which 51 % are right, to rise from 0.51 to 0.8 after
20 steps and to 1.0 after 60, and the held-out loss to fall from 0.70 to less than 0.01. The log has the
accuracy of the right and of the wrong steps too, as most steps of a dataset are right.

Hardware: 2 CPU cores, 2 GB; about 4 minutes, not measured on an idle machine.
"""

from jaxft.data.sft import SolutionRows
from jaxft.models.adapted import with_scalar_head
from jaxft.objectives.reward_model import process_reward
from jaxft.train.recipes import CALCULATOR_STEPS, LearningRate, LoraOrFullKnobs, RowKnobs
from jaxft.train.settings import Loop, Run


def config(
    base: LoraOrFullKnobs = LoraOrFullKnobs(general=None),
    rows: RowKnobs = RowKnobs(CALCULATOR_STEPS, batch=16, epochs=3.0),
    name: str = "process_reward",
    lr: LearningRate = 5e-4,
) -> Run:
    """Process reward modelling."""
    return Run(
        name=name,
        **base.sections(head=with_scalar_head),
        objective=process_reward,
        data=SolutionRows(**rows.settings(), packing=False),
        optim=base.optim(lr),
        loop=Loop(eval_every=20, save_every=20),
        samples=0,
        seed=rows.seed,
    )
