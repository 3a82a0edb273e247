"""Quantised weights in files, one file per format: bitsandbytes, GPTQ, AWQ, FP8, compressed-tensors, jaxft's.

To add one, write a file here with a FileFormat, and add it to the table in formats.py.

formats.py: quantised checkpoints, read without rounding again, and written: the table of their formats
file_format.py: the type of a format, and layouts of quantised weights
bitsandbytes.py, gptq.py, awq.py, fp8.py, compressed_tensors.py, own_arrays.py: a format each
grouped_int4.py: the parts that GPTQ and AWQ share
"""
