"""Optimizers, their state and updates.

optimizer.py: the Optimizer type, its settings, the shardings of its state
rules.py: update rules (AdamW, schedule-free AdamW, Adafactor), averages of the weights, transformations
muon.py: Muon
schedules.py: learning-rate schedules
skipped_updates.py: steps skipped as loss spikes; a policy left unchanged while heads are updated
update.py: apply an update, unless the step is not finite; stochastic rounding
layerwise.py: the update layer by layer
low_precision.py: Adam with 8-bit or bfloat16 moments
fused_backward.py: the step whose backward pass updates each layer
"""
