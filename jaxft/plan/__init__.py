"""Compile a run for a machine without that machine, and estimate its memory and step time.

machines.py: chips and topologies (targets/ has their descriptions), and which models fit them (`fits.json`)
plan.py: compile a run's programs: memory, FLOPs and estimated time of each
search.py: search for the fastest settings that fit
plan_report.py: plans, costs and dry runs as text
hlo.py: instructions of a compiled program
program_bytes.py: bytes in memory by kind, such as weights and optimizer state; bytes that a step moves
"""
