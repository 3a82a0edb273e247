"""Data: files, row formats, chat templates, loss masks, packing and sources of batches."""
