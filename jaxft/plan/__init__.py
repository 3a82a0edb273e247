"""Compile a run for a machine without that machine, and estimate its memory and step time."""
