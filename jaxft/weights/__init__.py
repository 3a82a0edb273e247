"""Model weights in and out of files."""
