"""Research on losses: declared comparisons, and what is chance in them.

statistics.py: paired differences over held-out prompts and seeds, with intervals, tests and sample sizes.
halving.py: Run a study: successive halving of each loss's trials, then its best setting with every seed
ledger.py: An append-only log whose lines are chained by digests, so that a changed, removed or added line is
    found
loss_laws.py: checks of a loss
loss_probe.py: values and gradients of a loss on synthetic pairs
loss_traits.py: properties of a loss
named_losses.py: losses that a command line names
study.py: The declaration of a study: losses, how their knobs are searched, seeds and rows, decided before
    training
synthetic_pairs.py: synthetic pairs
trials.py: Trials as arrays: the learning rate and the knobs of a loss are part of a train state, so that one
    compiled
"""
