"""Weights from data or from other weights: calibrated codes, starts of adapters.

calibrated_codes.py: calibrated codes in the cache
first_pairs.py: the pairs from which PiSSA and OLoRA start
layer_calibration.py: calibration of a model layer by layer
lora_start.py: PiSSA, OLoRA and LoftQ: pairs from the base's weights, and the base without them; QERA: pairs
    that correct a calibrated base
rounding.py: calibrated rounding of a weight: GPTQ; codes and scales by coordinate descent, low-rank
    corrections
"""
