"""Research on losses: comparisons declared in advance, and their statistics.

Losses without a model:
loss_evaluation.py: losses by name, their values and gradients on synthetic pairs
exact_toys.py: toys with known rewards, and the policy that a loss reaches on them with unlimited data
loss_checks.py: all checks of a loss
zoo.py: losses side by side on exact toys, as an HTML page

studies/: comparisons of losses that are declared before training, with seeds, statistics and a page

Rows:
worlds.py: synthetic preference rows with a known true reward
robustness.py: losses trained on worlds with faults such as flipped labels, as an HTML page
influence.py: influence of training pairs on held-out pairs
training_gradients.py: gradients of a held-out loss through training; weights of data sources from them

Judges:
judges.py: functions, reward models, language models and servers as judges; files of answers
judging.py: win rates of two models: verdicts, intervals, length control, agreement of judges
"""
