"""Evaluation: held-out rows, rows of a file, completions, lm-evaluation-harness.

evaluate_models.py: what `jaxft evaluate` does: loads models, and evaluates rows, completions or tasks
run_evaluations.py: evaluation before, during and after training; early ends; whether a run is finished
evaluate.py: held-out loss; loss, perplexity and preferences of rows
completer.py: completions of prompts in rows by loaded weights
harness.py: lm-evaluation-harness: its tasks, and a model as it uses one
scored_completions.py: completions of held-out prompts and of files, pass@k, scores by functions as in
    rl/rewards.py
"""
