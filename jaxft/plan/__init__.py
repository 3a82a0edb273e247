"""Compile a run for a machine without that machine, and estimate its memory and step time.

machines.py: chips and topologies; targets/ has their descriptions
dry_run.py: `jaxft train RECIPE --dry-run`: settings by section, parameters, planned bytes
costs.py: steps, hours and money of a run
fits.py: which models fit which hardware (from `fits.json`)
programs.py: compile a run's programs
plan.py: the plan of a run
search.py: search for the fastest settings that fit
text.py: a plan as text
memory.py: resident arrays, largest arrays, out-of-memory errors
hlo.py: instructions of a compiled program
traffic.py: bytes that it moves
flops.py: its FLOPs
roofline.py: an estimate of its time
"""
