"""Evaluation: held-out rows, rows of a file, completions, lm-evaluation-harness.

evaluate.py: held-out loss
harness.py: lm-evaluation-harness: its tasks, and a model as it uses one
likelihood.py: loss and perplexity, preferences, for `jaxft evaluate`
scored_completions.py: completions of held-out prompts and of files, with scores and pass@k
"""
