"""Reports of a run while it trains.

clock.py: the time of each phase
logs.py: the logs of a run; parameters and data as JSON for its report
meter.py: metrics between log entries
nonfinite.py: a record of the first non-finite step
"""
