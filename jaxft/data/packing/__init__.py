"""Rows as token ids: the store of tokenised rows, and the plans of their batches.

pack.py: packing plans: which examples share a row (their arrays: data/sft.py); the length of a run
pair_layout.py: which pairs share a batch and a row, and the arrays of such a batch
reader.py: a dataset as token ids, chunk by chunk in several processes
row_cache.py: files of tokenised rows, arrays in memory-mapped parts
row_tasks.py: tokens and loss masks of SFT rows, pairs and prompts; truncation
tokenised.py: tokenised rows: a prompt and its continuations
"""
