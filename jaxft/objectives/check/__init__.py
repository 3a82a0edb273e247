"""The loss bench: synthetic pairs, probes and laws for a preference loss."""
