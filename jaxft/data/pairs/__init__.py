"""Preference rows, from their formats to batches."""
