"""Compile a run for a machine that is not here, and estimate memory and time."""
