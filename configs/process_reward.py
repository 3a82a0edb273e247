"""A process reward model: a scalar head says of each step of a solution whether it is right.

    python scripts/train.py --config configs/process_reward.py
    python scripts/train.py --config configs/process_reward.py data=trl-lib/math_shepherd:train full=true
    python scripts/score.py --run runs/process_reward --file steps.jsonl

SmolLM2-135M-Instruct, LoRA on every linear layer and a head that is read at the last token of each step, on
configs/data/calculator_steps.jsonl: expressions in two steps, of which some take the wrong operation. Rows of
your own are {"prompt", "completions": [steps], "labels": [true or false]}, with the tokens of TRL's
PRMTrainer. The loss is the cross-entropy of the labels (Lightman et al. 2023, arXiv:2305.20050); the first
one is near log 2 = 0.69. The log has the accuracy, also of the right and of the wrong steps alone, as most
steps of a dataset are right.

Hardware: 2 CPU cores, 2 GB; a few minutes, not measured.
"""

from jaxft.data.steps import SolutionRows
from jaxft.models.heads import with_scalar_head
from jaxft.objectives.process_reward import process_reward
from jaxft.train.recipes import CALCULATOR_STEPS, LoraOrFullKnobs, RowKnobs
from jaxft.train.settings import Loop, Run


def config(
    base: LoraOrFullKnobs = LoraOrFullKnobs(general=None),
    rows: RowKnobs = RowKnobs(CALCULATOR_STEPS, batch=1, epochs=3.0),
    name: str = "process_reward",
    lr: float = 2e-4,  # auto: by the model's width, and the default with another model
) -> Run:
    """Process reward modelling."""
    return Run(
        name=name,
        **base.sections(head=with_scalar_head),
        objective=process_reward,
        data=SolutionRows(**rows.settings()),
        optim=base.optim(lr),
        loop=Loop(eval_every=10, save_every=10),
        samples=0,
        seed=rows.seed,
    )
