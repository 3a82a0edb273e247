"""Research on losses: declared comparisons, and what is chance in them.

statistics.py: paired differences over held-out prompts and seeds, with intervals, tests and sample sizes.
exact_toys.py: toys with a known truth: the population minimiser of a loss, its quality, displacement
loss_claims.py: checks on exact toys of what a loss claims
loss_laws.py: all checks of a loss
loss_probe.py: values and gradients of a loss on synthetic pairs
loss_traits.py: properties of a loss
named_losses.py: losses that a command line names
synthetic_pairs.py: synthetic pairs
worlds.py: synthetic preference rows with a known true reward
"""
