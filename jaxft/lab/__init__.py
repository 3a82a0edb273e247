"""Research on losses.

loss_laws.py: checks of a loss
loss_probe.py: values and gradients of a loss on synthetic pairs
loss_traits.py: properties of a loss
named_losses.py: losses that a command line names
synthetic_pairs.py: synthetic pairs
"""
