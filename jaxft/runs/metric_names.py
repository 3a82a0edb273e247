"""Names of metrics of rollouts and of the train loop; the file of an objective has the names of its own."""

# Of rollouts (jaxft/rl)
REWARD = "reward"
COMPLETION_KL = "objective/kl"
COMPLETION_LENGTH = "completions/mean_length"

# Of the train loop (jaxft/train)
SCORES = "scores/"  # prefix of the mean scores of held-out completions, by the name of the function
LEARNING_RATE, EPOCH, TOKENS = "learning_rate", "epoch", "num_tokens"
SECONDS, SPEED, MFU, MEMORY = "seconds", "tokens_per_second", "mfu", "memory_gib"
EVALUATION_SECONDS, SAMPLING_SECONDS = "evaluation_seconds", "sampling_seconds"  # since the last entry
