"""Devices, meshes, processes and how a run ends."""
