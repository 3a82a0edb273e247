"""Environments that ship with jaxft, and what environments call: tools, threads, the sandbox, OpenEnv.

calls.py: a thread and an event loop per episode, which call users' functions with a time-out
tools.py: functions as tools: JSON schemas, calls in a turn's text and their results, whose tokens have no
    loss (rl/trajectory.py)
shipped_environments.py: a calculator, a code interpreter with its sandbox, search, guess a number, with their
    rows
sandbox_child.py: the process of the sandbox
environment.py: the Environment type; environments from users' functions and classes, also TRL's, and from
    OpenEnv servers
"""
