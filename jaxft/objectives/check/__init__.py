"""The loss bench: synthetic pairs, probes and laws for a preference loss.

synthetic.py: synthetic pairs
probe.py: values and gradients of a loss on synthetic pairs
traits.py: properties of a loss
exact.py: exact toys: the population minimiser of a loss, its quality and displacement
claims.py: checks of a loss on exact toys
laws.py: all checks of a loss
"""
