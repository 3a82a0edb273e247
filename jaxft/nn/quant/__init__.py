"""Quantised weights in memory, and matmuls in FP8.

fp8.py: matmuls with frozen FP8 weights: where they run, rounding of activations and cotangents
quant.py: quantised tensors, and the settings of a quantised base
quant_formats.py: int8, fp8, int4, nf4, fp4 and affine4: pack and unpack
"""
