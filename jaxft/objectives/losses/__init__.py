"""Losses as pure functions, each with its equation and source.

policy_losses.py: PPO's clip, GSPO, CISPO, ...; KL estimators and penalties
preference_losses.py: preference losses against a reference: DPO, IPO, ...
ranking_losses.py: losses over K rated responses to a prompt: Plackett-Luce, LiPO, ...
reference_free_losses.py: preference losses without a reference: SimPO, CPO, ORPO, ...; losses of single
    responses: KTO, BCO, APO
"""
