"""Research on losses: comparisons declared in advance, and their statistics.

A loss alone, without a model:
loss_evaluation.py: losses by name, their values and gradients on synthetic pairs
exact_toys.py: toys with a known truth: the population minimiser of a loss, its quality, displacement, claims
loss_checks.py: the checks of a loss
zoo.py: losses side by side on exact toys, as one page

Studies:
study.py: the declaration of a study, decided before training
halving.py: runs a study: successive halving of the trials of each loss, then every seed
trial_arrays.py: trials as arrays, so that one compiled program trains any trial
results.py: the results of a study: comparisons (their statistics: report/statistics.py), curves, sensitivity
appendix.py: a study as one HTML page, and its tables as LaTeX and CSV
verify.py: checks of a record, and a step computed again to the bit

Rows and their truth:
worlds.py: synthetic preference rows with a known true reward
robustness.py: losses trained in worlds with a planted fault: its cost, over-optimisation, as one page
influence.py: influence of training pairs on held-out pairs
training_gradients.py: gradients of a held-out loss through training, weights of sources that follow them

Judges:
judges.py: functions, reward models, models and servers as judges; files of answers
judging.py: comparison of two models by judges: verdicts, win rates, lengths, agreement of judges
"""
