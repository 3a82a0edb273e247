"""Architectures: one file each, exporting a Model (see params.Model)."""
