"""Environments that ship with jaxft, and what environments call: tools, threads, the sandbox, OpenEnv."""
