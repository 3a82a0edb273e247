"""New weights made of others, or from data: merged, extended, calibrated; starts of adapters.

merged_weights.py: a base and an adapter, merged
new_adapters.py: several adapters as one; an adapter from the difference of two models
extended_model.py: a model with new tokens or a chat template; chat templates by name for base models
calibrated_base.py: calibrate a model layer by layer; its codes in the cache
calibrated_rounding.py: round one weight by GPTQ, and codes and scales by coordinate descent; low-rank pairs
lora_start.py: starts of PiSSA, OLoRA and LoftQ with the base without them; QERA corrects a calibrated base
"""
