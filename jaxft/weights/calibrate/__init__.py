"""Weights computed from data or from other weights: calibrated codes, starts of adapters.

layer_calibration.py: calibrate a model layer by layer
calibrated_rounding.py: round one weight by GPTQ, and codes and scales by coordinate descent; low-rank pairs
calibrated_codes.py: calibrated codes in the cache
lora_start.py: starts of PiSSA, OLoRA and LoftQ with the base without them; QERA corrects a calibrated base
"""
