"""Research on losses: declared comparisons, and what is chance in them.

statistics.py: paired differences over held-out prompts and seeds, with intervals, tests and sample sizes.
"""
