"""Optimizers, their state and updates.

optimizer.py: the Optimizer type, its settings, gradient clipping, the shardings of its state; steps skipped
    as loss spikes, a policy left unchanged while heads are updated
rules.py: update rules (AdamW, schedule-free AdamW, Adafactor, Muon), averages of the weights, transformations
schedules.py: learning-rate schedules
update.py: apply an update, unless the step is not finite; stochastic rounding
layerwise.py: the update layer by layer, also inside the backward pass
low_precision.py: Adam with 8-bit or bfloat16 moments
"""
