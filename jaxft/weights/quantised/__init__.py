"""Quantised weights in files, one file per format: bitsandbytes, GPTQ, AWQ, FP8, compressed-tensors, jaxft's.

To add one, write a file here with a FileFormat, and add it to the table in formats.py.
"""
