"""Short names of the functions that settings may name, such as `loss=ipo` or `optim.optimizer=muon`.

A setting takes the names of a table by its annotation, `Annotated[Callable, ShortNames.of(OPTIMIZERS)]`. This
file imports neither jax nor the functions, so the shell's completion can read it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple


def name_of(fn: Callable) -> str:
    """Return a function's name, also of a partial or a callable object."""
    while isinstance(fn, partial):
        fn = fn.func
    return str(getattr(fn, "__name__", type(fn).__name__))


class ShortNames(NamedTuple):
    """Part of the annotation of a setting that is a function: (short name, package.module:name) pairs.

    or_dict: whether a dict of functions by name is a value too.
    """

    pairs: tuple[tuple[str, str], ...]
    or_dict: bool = False

    @classmethod
    def of(cls, names: Mapping[str, str], or_dict: bool = False) -> "ShortNames":
        """Return the pairs of a table."""
        return cls(tuple(names.items()), or_dict)


def _in(module: str, names: str) -> dict[str, str]:
    """Return short name -> package.module:name of functions of a module. names: divided by spaces."""
    return {name: f"{module}:{name}" for name in names.split()}


OPTIMIZERS = {
    "adamw": "jaxft.optim.rules:adamw",
    "adamw_8bit": "jaxft.optim.low_precision:adamw_8bit",
    "adamw_bf16": "jaxft.optim.low_precision:adamw_bf16",
    "adafactor": "jaxft.optim.rules:adafactor",
    "lion": "optax:lion",
    "muon": "jaxft.optim.muon:muon",
    "schedule_free_adamw": "jaxft.optim.rules:schedule_free_adamw",
}
SCHEDULES = {
    "constant": "jaxft.optim.schedules:constant_schedule",
    "linear": "jaxft.optim.schedules:linear_schedule",
    "cosine": "jaxft.optim.schedules:cosine_schedule",
    "wsd": "jaxft.optim.schedules:wsd_schedule",
    "cosine_with_restarts": "jaxft.optim.schedules:cosine_with_restarts_schedule",
}
PREFERENCE_LOSSES = {
    **_in(
        "jaxft.objectives.losses.preference_losses",
        "dpo cdpo dpo_margin dpop rdpo hinge squared_hinge ipo sigmoid_norm exo_pair robust discopop "
        "nca_pair bco_pair sppo_hard apo_zero apo_down nll aot aot_unpaired",
    ),
    **_in(
        "jaxft.objectives.losses.reference_free_losses",
        "simpo alphapo cpo cpo_hinge cpo_ipo orpo tpo tpo_hinge tpo_ipo tpo_l apo_zero_unpaired kto bco",
    ),
    **_in(
        "jaxft.objectives.losses.ranking_losses",
        "plackett_luce info_nca nca rpo_bwd_kl rpo_fwd_kl rpo_sq lipo",
    ),
}
POLICY_LOSSES = _in(
    "jaxft.objectives.losses.policy_losses",
    "policy_gradient unclipped clipped dual_clip dppo_tv dppo_kl gspo gspo_token cispo sapo geo_mean vespo "
    "near_policy",
)
DECISION_LOSSES = _in("jaxft.objectives.decision", "cross_entropy brier log_score")
KL_ESTIMATORS = _in("jaxft.objectives.kl", "k1 k2 k3")
REWARDS = _in("jaxft.rl.rewards", "exact number json_match")
COMBINATIONS = _in("jaxft.rl.advantages", "weighted_sum sum_of_known")
ADVANTAGES = _in("jaxft.rl.advantages", "grpo grpo_batch centred rloo opo maxrl gfpo adaptive_gfpo")
ESTIMATORS = _in("jaxft.rl.estimators", "by_group by_turn by_each group_whitened reinforce")
TOKEN_WEIGHTS = _in(
    "jaxft.rl.token_weights", "token_mean sequence_mean prompt_mean constant_length sequence_sum"
)
CORRECTIONS = _in(
    "jaxft.rl.importance",
    "truncated_tokens masked_tokens truncated_completions masked_completions masked_geometric_means",
)
ENVIRONMENTS = {
    "calculator": "jaxft.rl.environments.calculator:Calculator",
    "code_interpreter": "jaxft.rl.environments.code_interpreter:CodeInterpreter",
    "guess_number": "jaxft.rl.environments.guess_number:GuessNumber",
    "search": "jaxft.rl.environments.search:Search",
}
FILTERS = _in("jaxft.rl.advantages", "nonconstant_groups")
