"""From settings to a run that can start: open settings, rows, weights that start from others, kernels.

attention_kernels.py: which attention kernel a run has, why, and whether it is right on its device
eva.py: EVA: statistics of layers' inputs on the run's first batches, ranks and first directions from them;
    the adapter with these ranks
jobs.py: a run (or the members of a sweep) before weights are loaded
open_settings.py: what a command leaves open: lengths and batches from its rows, a learning rate from its
    model
reference.py: precomputed reference
teacher.py: the second, frozen model of a run: its name, checks, storage, weights
"""
