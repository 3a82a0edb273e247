"""Quantised weights in files: bitsandbytes, GPTQ, AWQ, FP8, compressed-tensors and jaxft's own format.

To add a format, write a FileFormat here, and add it to FILE_FORMATS in formats.py.

formats.py: the table of formats, and jaxft's own: quantised checkpoints are read and written without rounding
    again
file_format.py: the type of a format, and layouts of quantised weights
bitsandbytes.py: nf4, fp4 and int8
gptq_awq.py: GPTQ and AWQ, int4
compressed_tensors.py: compressed-tensors and DeepSeek's FP8
"""
