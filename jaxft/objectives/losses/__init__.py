"""Losses as pure functions, each with its equation and source.

policy_losses.py: PPO's clip, GSPO, CISPO, ...; KL estimators and penalties
preference_losses.py: preference losses, one function each
ranking_losses.py: losses of rankings
reference_free_losses.py: preference losses without a reference
"""
