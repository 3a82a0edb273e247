"""Studies: comparisons of losses that are declared before training.

study.py: the declaration of a study, decided before training
halving.py: runs a study: successive halving of each loss's trials, then its best setting with every seed
trial_arrays.py: learning rate and knobs as arrays, so that one compiled program trains any trial
study_results.py: comparisons (their statistics: report/statistics.py), curves, sensitivity
appendix.py: a study as an HTML page, and its tables as LaTeX and CSV
verify.py: checks that the files of a run or a study are unchanged, and repeats a training step
"""
