"""Names of metrics that logs, tables and plots look up: each is defined here or next to the objective that
computes it.

A held-out metric has the prefix HELD_OUT.
"""

from jaxft.objectives.alarms import CLIPPED_RATIO, GENERAL_LOSS, REWARD_STD, ZERO_STD
from jaxft.objectives.decision import BRIER, CONFIDENCE, CORRECT, ECE, LOG_LOSS
from jaxft.objectives.metrics import (
    ENTROPY,
    GRAD_NORM,
    HELD_OUT,
    KL,
    LOSS,
    PAIR_COUNT,
    SKIPPED,
    TOKEN_ACCURACY,
    count_of,
    without_count,
)
from jaxft.objectives.pair import ACCURACY, CHOSEN_LOGP, CHOSEN_REWARD, MARGIN, REJECTED_LOGP, REJECTED_REWARD
from jaxft.objectives.policy import VALUE_LOSS
from jaxft.objectives.reward_model import ACCURACY as REWARD_ACCURACY
from jaxft.objectives.reward_model import MARGIN as REWARD_MARGIN

__all__ = [
    "ACCURACY", "BRIER", "CHOSEN_LOGP", "CHOSEN_REWARD", "CLIPPED_RATIO", "COMPLETION_KL",
    "COMPLETION_LENGTH", "CONFIDENCE", "CORRECT", "ECE", "ENTROPY", "EPOCH", "EVALUATION_SECONDS",
    "GENERAL_LOSS", "GRAD_NORM", "HELD_OUT", "KL", "LEARNING_RATE", "LOG_LOSS", "LOSS", "MARGIN",
    "MEMORY", "MFU", "PAIR_COUNT", "REJECTED_LOGP", "REJECTED_REWARD", "REWARD", "REWARD_ACCURACY",
    "REWARD_MARGIN", "REWARD_STD", "SAMPLING_SECONDS", "SCORES", "SECONDS", "SKIPPED", "SPEED",
    "TOKENS", "TOKEN_ACCURACY", "VALUE_LOSS", "ZERO_STD", "count_of", "without_count",
]  # fmt: skip

# Of rollouts (jaxft/rl)
REWARD = "reward"
COMPLETION_KL = "objective/kl"
COMPLETION_LENGTH = "completions/mean_length"

# Of the train loop (jaxft/train)
SCORES = "scores/"  # prefix of the mean scores of held-out completions, by the name of the function
LEARNING_RATE, EPOCH, TOKENS = "learning_rate", "epoch", "num_tokens"
SECONDS, SPEED, MFU, MEMORY = "seconds", "tokens_per_second", "mfu", "memory_gib"
EVALUATION_SECONDS, SAMPLING_SECONDS = "evaluation_seconds", "sampling_seconds"  # since the last entry
