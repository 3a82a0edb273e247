"""Optimizers, their state and updates."""
