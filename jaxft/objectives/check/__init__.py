"""The loss bench: synthetic pairs, probes and laws for a preference loss.

exact.py: exact toys: the population minimiser of a loss, its quality and displacement
claims.py: checks of a loss on exact toys
"""
