"""Environments that ship with jaxft, and what environments call: tools, threads, the sandbox, OpenEnv.

calls.py: a thread and an event loop per episode, which call users' functions with a time-out
tools.py: functions as tools: JSON schemas, calls in a turn's text and their results
sandbox.py: Python code that a model wrote, in a process with limits
sandbox_child.py: that process
shipped_environments.py: a calculator, a code interpreter, search, guess a number, with their rows
openenv.py: OpenEnv servers through their clients
environment.py: the Environment type; environments from users' functions and classes, also TRL's
"""
