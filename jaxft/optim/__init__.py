"""Optimizers, their state and updates.

optimizer.py: the Optimizer type, settings
rules.py: update rules: AdamW, schedule-free AdamW, Adafactor
muon.py: Muon
schedules.py: learning-rate schedules
skipped_updates.py: an optimizer whose policy can be left unchanged while heads are updated
update.py: the guarded update, stochastic rounding
layerwise.py: the update layer by layer
low_precision.py: Adam with 8-bit or bfloat16 moments
fused_backward.py: the step whose backward pass updates each layer
"""
