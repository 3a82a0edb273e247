"""Generation of text: rows in progress, each with its own tokens, adapter and sampling settings.

sampling.py: how the next token is sampled: temperature, top-k, top-p, min-p
state.py: what an engine is compiled for, and its rows
programs.py: the programs: start, extend, decode, keep
session.py: which request has which row; completions of a list of prompts
scheduler.py: a session in a thread, for a server: a queue, cancelling, conversations that go on
text_stream.py: text while tokens arrive, up to a stop string
"""
