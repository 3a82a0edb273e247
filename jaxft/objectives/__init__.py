"""Objectives: pure functions (params, batch, key, aux) -> (loss, metrics), one file each.

objective.py: the Objective type
sft.py: cross-entropy
pair.py: stable building blocks of losses; the interface of preference losses: PairBatch, the facts that a
    loss declares, metrics
preference.py: the objective around a preference loss: log-ratios to the reference, TR-DPO, reward, metrics
reward_model.py: Bradley-Terry reward models; process reward models, which score each step of a solution
decision.py: probabilities of given choices, trained by proper scoring rules; metrics
policy.py: the objective around a policy loss, with KL penalty and critic
logprobs.py: log-probs without whole logits; the loss of a token: label smoothing, z-loss, dynamic fine-tuning
read_positions.py: the positions of a row whose log-probs are needed
metrics.py: metrics stored as sums, which add over microbatches, steps and devices
alarms.py: alarms and summaries from logged metrics
intervals.py: confidence intervals of fractions and means; two models on the same rows
losses/: preference losses, policy losses
"""
