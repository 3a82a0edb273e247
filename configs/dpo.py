"""DPO with LoRA: prefer the better of two completions, on pairs of right and wrong JSON.

    python scripts/train.py --config configs/dpo.py start=runs/sft name=sft_dpo   # after configs/sft.py
    python scripts/train.py --config configs/dpo.py data=pairs.jsonl lr=1e-4

SmolLM2-135M-Instruct, LoRA on every linear layer. The reference is the model at step 0, which needs no
second copy. 26 steps, about 2 minutes and 2 GB on a 2-core CPU. In half of the pairs in
configs/data/extraction_pairs.jsonl the message lacks a part, and the better completion has null there; in
the others the worse one has null for a value that is given. The completions differ in a few tokens, so that
DPO soon lowers the probability of the better one as well: its learning rate is low, and 2e-4 needs
DPO-Positive, loss=dpop. The first loss is log 2 = 0.6931. After configs/sft.py, json_match of 60 held-out
messages is 0.42 to 0.63, depending on the CPU's rounding; expect it to rise by about 0.07, and with
DPO-Positive by about 0.22.

`loss` is any loss of jaxft.objectives.losses.preference_losses that has a beta, such as loss=ipo, or your
own, such as loss=configs/examples/my_losses.py:mine. A loss that is declared reference-free runs no
reference.

Hardware: 2 CPU cores, 2 GB; 2 minutes.
"""

from functools import partial

from jaxft.data.pairs import PairRows
from jaxft.objectives.losses.preference_losses import dpo
from jaxft.objectives.preference import EMAReference, implicit_reward, mean_logp, preference, with_beta
from jaxft.train.recipes import (
    EXTRACTION_PAIRS,
    LearningRate,
    LoraOrFullKnobs,
    MovingReference,
    PairBeta,
    PairLossFunction,
    ReferenceKnobs,
    ReferenceSetting,
    ScoredRowKnobs,
    choose_reference,
)
from jaxft.train.settings import Loop, Run


def config(
    base: LoraOrFullKnobs = LoraOrFullKnobs(),
    rows: ScoredRowKnobs = ScoredRowKnobs(EXTRACTION_PAIRS),
    name: str = "dpo",
    lr: LearningRate = 5e-5,
    loss: PairLossFunction = dpo,  # the loss of a pair
    beta: PairBeta = 0.1,
    reference: ReferenceSetting | None = None,
    moving: MovingReference | None = None,  # TR-DPO: alpha,every of a moving reference, 0.6,512 in the paper
    other: ReferenceKnobs = ReferenceKnobs(),
) -> Run:
    """Direct preference optimisation."""
    given = {"reference": reference, "moving": moving, "reference_model": other.reference_model}
    if len(both := [f"{name}={value}" for name, value in given.items() if value]) > 1:
        raise ValueError(f"{' and '.join(both)} contradict each other; set only one of them")
    source = EMAReference(*moving) if moving else choose_reference(reference, loss, base.full)
    teacher = other.teacher(base, base.full)
    if teacher and source is None:
        raise ValueError(f"the loss reads no reference; leave out reference_model={other.reference_model}")
    return Run(
        name=name,
        **base.sections(),
        objective=partial(
            preference,
            **with_beta(loss, beta),
            reference=other.reference(source),
            reward=mean_logp if source is None else implicit_reward,
        ),
        data=PairRows(**rows.settings()),
        optim=base.optim(lr),
        loop=Loop(eval_every=13, save_every=13),
        scoring=rows.scoring(),
        teacher=teacher,
        seed=rows.seed,
    )
