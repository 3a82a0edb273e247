"""The loss bench: synthetic pairs, probes and laws for a preference loss.

synthetic.py: synthetic pairs
probe.py: values and gradients of a loss on synthetic pairs
traits.py: properties of a loss
laws.py: checks of a loss
"""
