"""Evaluation: held-out rows, rows of a file, completions, lm-evaluation-harness.

evaluate.py: held-out loss
harness.py: a model as lm-evaluation-harness uses one, with log-probabilities of continuations
likelihood.py: loss and perplexity, preferences, for `jaxft evaluate`
scored_completions.py: scores of completions, pass@k
"""
