"""Runs in object stores.

store.py: object stores
store_copy.py: the copy of a run's folder in an object store, which commands may name
"""
