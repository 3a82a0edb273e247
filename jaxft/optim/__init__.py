"""Optimizers, their states and updates."""
