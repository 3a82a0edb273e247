"""From rows of text to batches of tokens: files, formats, chat templates, loss masks, packing and sources."""
