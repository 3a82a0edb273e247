"""Several runs in one program.

multi_adapter.py: several adapters on one base
sweep.py: a sweep: runs trained together on one base
sweep_programs.py: the programs of a sweep
sweep_runs.py: the runs of a sweep: together, or else one after the other
"""
