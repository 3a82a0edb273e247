"""Weights computed from data or from other weights: calibrated codes, starts of adapters.

calibrated_base.py: calibrate a model layer by layer; its codes in the cache
calibrated_rounding.py: round one weight by GPTQ, and codes and scales by coordinate descent; low-rank pairs
lora_start.py: starts of PiSSA, OLoRA and LoftQ with the base without them; QERA corrects a calibrated base
"""
