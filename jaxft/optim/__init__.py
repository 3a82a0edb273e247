"""Optimizers, their state and updates.

optimizer.py: the Optimizer type, settings
rules.py: update rules: AdamW, schedule-free AdamW, Adafactor
muon.py: Muon
schedules.py: learning-rate schedules
averaging.py: averages of the weights, which are evaluated and exported
spikes.py: steps skipped as loss spikes
freezable.py: an optimizer whose policy can be left unchanged while heads are updated
transforms.py: per-layer optimizers, groups of learning rates, clipping, float32
update.py: the guarded update, stochastic rounding
layerwise.py: the update layer by layer
low_precision.py: Adam with 8-bit or bfloat16 moments
state_sharding.py: shardings of optimizer state
fused_backward.py: the step whose backward pass updates each layer
"""
