"""Model families, one file each, that build a Model (see model.py)."""
