"""Rows of text in, batches of tokens out: reading, formats, chat templates and loss masks, packing, sources."""
