"""Generation of text: rows in progress, each with its own tokens, adapter and sampling settings.

sampling.py: how the next token is sampled: temperature, top-k, top-p, min-p
state.py: the static arguments of an engine, and its rows as arrays
programs.py: the compiled programs start, extend, decode and keep
session.py: rows assigned to requests; completions of a list of prompts
scheduler.py: a session in a thread, for a server: a queue, cancelling, continued conversations
text_stream.py: text while tokens arrive, up to a stop string
"""
