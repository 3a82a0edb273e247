"""Quantised weights in files: bitsandbytes, GPTQ, AWQ, FP8, compressed-tensors and jaxft's own format.

To add a format, write a FileFormat here, and add it to FILE_FORMATS in quantised_checkpoints.py.

quantised_checkpoints.py: the table of formats, and jaxft's own; reading and writing without rounding again
file_format.py: the type of a format, and layouts of quantised weights
bitsandbytes.py: nf4, fp4 and int8
packed_formats.py: GPTQ, AWQ, compressed-tensors and DeepSeek's FP8: int4, int8 and fp8
"""
