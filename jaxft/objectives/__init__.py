"""Objectives: pure functions (params, batch, key, aux) -> (loss, metrics), one file each."""
