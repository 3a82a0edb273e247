"""Rows as token ids: the store of tokenised rows, and the plans of their batches.

cache.py: files of tokenised rows
epochs.py: the length of a run
flat.py: arrays in memory-mapped parts, names of rows
left_out.py: rows that data.drop leaves out
lengths.py: tokens of rows before a limit, what each limit keeps and costs; the alarm about rows that are left
    out
pack.py: packing plans
pair_layout.py: pairs in rows of tokens
pair_plan.py: which pairs share a batch
pair_tokens.py: tokens of preference rows
prompt_tokens.py: tokens and columns of prompts
reader.py: a dataset as token ids, chunk by chunk in several processes
sft_tokens.py: tokens of SFT rows
tokenised.py: tokenised rows: a prompt and its continuations
"""
