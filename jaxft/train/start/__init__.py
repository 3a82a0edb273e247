"""From settings to a run that can start: open settings, rows, initial weights, attention kernels.

attention_kernels.py: which attention kernel a run uses and why; a check that it is correct on its device
eva.py: the EVA adapter: ranks and initial directions from the layers' inputs on the first batches
jobs.py: a run (or the members of a sweep) before weights are loaded
open_settings.py: settings that a command leaves open: lengths and batches from its rows, a learning rate
    from its model
reference_logprobs.py: precomputed log-probs of a reference policy
teacher.py: the second, frozen model of a run: its name, checks, storage, weights
"""
