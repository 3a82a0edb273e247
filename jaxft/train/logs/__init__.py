"""Reports of a run while it trains.

clock.py: the time of each phase
logs.py: the logs of a run; parameters and data as JSON for its report
meter.py: metrics and speed between log entries; the end of a run after loop.max_bad non-finite steps in a row
nonfinite.py: the record of a run's first non-finite step, for debugging (loop.debug_nonfinite)
"""
