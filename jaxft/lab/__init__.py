"""Research on losses: declared comparisons, and what is chance in them.

halving.py: runs a study: successive halving of each loss, then its best setting with every seed
exact_toys.py: toys with a known truth: the population minimiser of a loss, its quality, displacement
influence.py: influence of training pairs on held-out pairs
loss_claims.py: checks on exact toys of what a loss claims
loss_laws.py: all checks of a loss
loss_probe.py: values and gradients of a loss on synthetic pairs
loss_traits.py: properties of a loss
named_losses.py: losses that a command line names
study.py: the declaration of a study, decided before training
synthetic_pairs.py: synthetic pairs
judging.py: which of two models answers better: verdicts, win rates, lengths, agreement of judges
judges.py: functions, reward models, models and servers as judges; files of answers
appendix.py: a study as one HTML page, and its tables as LaTeX and CSV
results.py: the results of a study: comparisons, curves, sensitivity
verify.py: checks of a record, and a step computed again to the bit
worlds.py: synthetic preference rows with a known true reward
zoo.py: losses side by side on exact toys, as one page
training_gradients.py: gradients of a held-out loss through training, weights of sources that follow them
"""
