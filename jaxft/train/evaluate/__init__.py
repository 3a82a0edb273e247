"""Evaluation: held-out rows, rows of a file, completions, lm-evaluation-harness.

evaluate.py: held-out loss; loss, perplexity and preferences of rows for `jaxft evaluate`
harness.py: lm-evaluation-harness: its tasks, and a model as it uses one
scored_completions.py: completions of held-out prompts and of files, with scores and pass@k
"""
